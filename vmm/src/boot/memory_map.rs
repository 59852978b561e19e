//! What the kernel is told of guest-physical memory. Both boot protocols number the kinds of memory as the BIOS's E820 call does
//! (ACPI specification, 15.1).

use std::ops::Range;

use crate::address_map::{ACPI_TABLES, PAGE_SIZE, RamMap};

/// What a kernel may do with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    /// What it likes.
    Ram = 1,
    /// Leave it alone.
    Reserved = 2,
    /// Read the ACPI tables there.
    Acpi = 3,
}

/// A piece of guest-physical memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) range: Range<u64>,
    pub(super) kind: Kind,
}

/// All memory in the order of its addresses. `reserved` is the part of low RAM that has the boot structures.
pub(super) fn memory_map(ram: RamMap, reserved: &Range<u64>) -> Vec<Piece> {
    let piece = |range, kind| Piece { range, kind };
    let high = ram
        .ranges()
        .skip(1)
        .map(|high| piece(high.guest.0..high.guest.0 + high.size, Kind::Ram));
    [
        piece(0..reserved.start, Kind::Ram),
        piece(reserved.clone(), Kind::Reserved),
        piece(reserved.end..ram.low_size(), Kind::Ram),
        piece(ACPI_TABLES.0..ACPI_TABLES.0 + PAGE_SIZE, Kind::Acpi),
    ]
    .into_iter()
    .filter(|piece| !piece.range.is_empty())
    .chain(high)
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    const GIB: u64 = 1 << 30;

    #[test]
    fn every_byte_of_ram_is_in_it_once() {
        let reserved = 0xe_0000..0xe_8000;
        for size in [1 << 20, 3 * GIB, 64 * GIB] {
            let ram = RamMap::new(size).unwrap();
            let map = memory_map(ram, &reserved);
            assert!(
                map.windows(2)
                    .all(|pair| pair[0].range.end <= pair[1].range.start)
            );
            let (acpi, in_ram): (Vec<_>, Vec<_>) = map.iter().partition(|piece| piece.kind == Kind::Acpi);
            let sum: u64 = in_ram
                .iter()
                .map(|piece| piece.range.end - piece.range.start)
                .sum();
            assert_eq!(sum, ram.size());
            for piece in in_ram {
                assert!(ram.offset_of(GuestAddress(piece.range.start)).is_some());
                assert!(ram.offset_of(GuestAddress(piece.range.end - 1)).is_some());
                assert_eq!(piece.kind == Kind::Reserved, piece.range == reserved);
            }
            assert_eq!(acpi.len(), 1);
            assert_eq!(ram.offset_of(GuestAddress(acpi[0].range.start)), None);
        }
    }
}
