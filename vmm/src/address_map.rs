//! What lies where in guest-physical memory.
//!
//! ```text
//! 0                    RAM, up to 3 GiB
//!     0xe_0000           of it, the structures that the guest is booted with (up to 0x10_0000)
//! 0xc000_0000          nothing; devices of the platform (I/O APIC 0xfec0_0000, local APIC 0xfee0_0000)
//! 0xfeb0_0000          the balloon's registers, if there is one
//! 0xfeff_0000          boot-information page, read-only
//! 0xfeff_1000          ACPI tables, 1 page, read-only
//! 0xfeff_c000          KVM's identity-mapped page table, 1 page
//! 0xfeff_d000          KVM's task state segment, 3 pages
//!   4 GiB - ROM size   firmware ROM, read-only, up to 256 KiB
//! 4 GiB                the rest of RAM
//! ```
//!
//! RAM is one contiguous space of *RAM offsets*, from 0 to its size; the hole below 4 GiB exists in guest-physical
//! addresses only.

use std::ops::Range;

use thiserror::Error;
use vm_memory::GuestAddress;

/// Bytes in a page.
pub const PAGE_SIZE: u64 = 4096;

/// End of the RAM below the hole.
pub const LOW_RAM_END: u64 = 0xc000_0000;

/// Start of the RAM above the hole.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// The ROM's last byte lies just below: the reset vector is 16 bytes before it (Intel SDM volume 3, 11.1.4).
pub const ROM_END: u64 = 1 << 32;

/// The largest ROM that fits without touching KVM's own pages.
pub const ROM_SIZE_MAX: u64 = 256 << 10;

/// The page that tells the firmware where to go.
pub const BOOT_INFO: GuestAddress = GuestAddress(firmware::boot_info::ADDRESS);

/// The page with the ACPI tables, of which the RSDP is first. It follows the boot-information page.
pub const ACPI_TABLES: GuestAddress = GuestAddress(BOOT_INFO.0 + PAGE_SIZE);

/// KVM's I/O APIC.
pub const IO_APIC: u32 = 0xfec0_0000;

/// KVM's local APICs, each CPU's own.
pub const LOCAL_APIC: u32 = 0xfee0_0000;

/// The registers of the balloon, of a page of their own.
pub const BALLOON: GuestAddress = GuestAddress(guest::balloon::REGISTERS);

/// The page for `KVM_SET_IDENTITY_MAP_ADDR`.
pub const KVM_IDENTITY_MAP: GuestAddress = GuestAddress(0xfeff_c000);

/// The three pages for `KVM_SET_TSS_ADDR`.
pub const KVM_TSS: GuestAddress = GuestAddress(0xfeff_d000);

/// Where in RAM the boot structures go. It is the area in which a PC keeps its BIOS, so that no kernel is linked there.
pub const BOOT_STRUCTURES: Range<u64> = 0xe_0000..0x10_0000;

/// The smallest RAM: what the boot structures need.
pub const RAM_SIZE_MIN: u64 = BOOT_STRUCTURES.end;

/// The end of the guest-physical addresses that the architecture knows (Intel SDM volume 3, 4.1.4: MAXPHYADDR is at most 52).
const PHYSICAL_ADDRESS_END: u64 = 1 << 52;

/// Whether read-only pages may be there: between RAM and 4 GiB, where nothing else is.
pub(crate) fn may_be_read_only(address: u64, size: u64) -> bool {
    let taken = [
        (u64::from(IO_APIC), PAGE_SIZE),
        (u64::from(LOCAL_APIC), PAGE_SIZE),
        (BALLOON.0, PAGE_SIZE),
        (KVM_IDENTITY_MAP.0, PAGE_SIZE),
        (KVM_TSS.0, 3 * PAGE_SIZE),
    ];
    let Some(end) = address.checked_add(size) else {
        return false;
    };
    let apart = |(start, size): &(u64, u64)| end <= *start || start + size <= address;
    address >= LOW_RAM_END && end <= ROM_END && taken.iter().all(apart)
}

/// Why a size cannot be that of a VM's RAM.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum RamSizeError {
    /// Not a multiple of the page size.
    #[error("RAM size {0} is not a multiple of {PAGE_SIZE} bytes; round it to whole pages")]
    Unaligned(u64),
    /// Less than [`RAM_SIZE_MIN`].
    #[error("RAM size {0} is too small; a VM needs at least {RAM_SIZE_MIN} bytes")]
    TooSmall(u64),
    /// More than the architecture can address.
    #[error("RAM size {0} is beyond the 52 bits of a physical address; choose a smaller one")]
    TooLarge(u64),
}

/// One contiguous piece of RAM in guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// Its guest-physical address.
    pub guest: GuestAddress,
    /// The RAM offset of its first byte.
    pub offset: u64,
    /// Its size in bytes.
    pub size: u64,
}

/// Where RAM of a certain size lies in guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamMap {
    size: u64,
}

impl RamMap {
    /// The map of RAM with `size` bytes.
    pub fn new(size: u64) -> Result<Self, RamSizeError> {
        if !size.is_multiple_of(PAGE_SIZE) {
            return Err(RamSizeError::Unaligned(size));
        }
        if size < RAM_SIZE_MIN {
            return Err(RamSizeError::TooSmall(size));
        }
        if size - size.min(LOW_RAM_END) > PHYSICAL_ADDRESS_END - HIGH_RAM_START {
            return Err(RamSizeError::TooLarge(size));
        }
        Ok(Self { size })
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of RAM below the hole; the RAM offset of the first byte above it.
    pub fn low_size(&self) -> u64 {
        self.size.min(LOW_RAM_END)
    }

    /// The one or two pieces, in order.
    pub fn ranges(&self) -> impl Iterator<Item = RamRange> + use<> {
        let low = self.low_size();
        [
            RamRange {
                guest: GuestAddress(0),
                offset: 0,
                size: low,
            },
            RamRange {
                guest: GuestAddress(HIGH_RAM_START),
                offset: low,
                size: self.size - low,
            },
        ]
        .into_iter()
        .filter(|range| range.size > 0)
    }

    /// The RAM offset of a guest-physical address, if there is RAM.
    pub fn offset_of(&self, address: GuestAddress) -> Option<u64> {
        self.ranges().find_map(|range| {
            let distance = address.0.checked_sub(range.guest.0)?;
            (distance < range.size).then_some(range.offset + distance)
        })
    }

    /// Where the guest sees these bytes of RAM, in order.
    pub fn addresses_of(&self, offsets: Range<u64>) -> impl Iterator<Item = Range<GuestAddress>> + use<> {
        self.ranges().filter_map(move |range| {
            let start = offsets.start.max(range.offset);
            let end = offsets.end.min(range.offset + range.size);
            let at = |offset| GuestAddress(offset - range.offset + range.guest.0);
            (start < end).then(|| at(start)..at(end))
        })
    }

    /// The guest-physical address of a RAM offset, if RAM is that large.
    pub fn address_of(&self, offset: u64) -> Option<GuestAddress> {
        self.ranges().find_map(|range| {
            let distance = offset.checked_sub(range.offset)?;
            (distance < range.size).then_some(GuestAddress(range.guest.0 + distance))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn small_ram_is_one_range() {
        let ranges: Vec<_> = RamMap::new(GIB).unwrap().ranges().collect();
        assert_eq!(
            ranges,
            [RamRange {
                guest: GuestAddress(0),
                offset: 0,
                size: GIB
            }]
        );
        assert_eq!(RamMap::new(3 * GIB).unwrap().ranges().count(), 1);
    }

    #[test]
    fn large_ram_continues_at_4_gib() {
        let map = RamMap::new(4 * GIB).unwrap();
        let high = map.ranges().nth(1).unwrap();
        assert_eq!(
            high,
            RamRange {
                guest: GuestAddress(4 * GIB),
                offset: 3 * GIB,
                size: GIB
            }
        );
        assert_eq!(map.offset_of(GuestAddress(3 * GIB)), None);
        assert_eq!(map.offset_of(GuestAddress(5 * GIB)), None);
        assert_eq!(map.address_of(4 * GIB), None);
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        assert_eq!(RamMap::new(GIB + 1), Err(RamSizeError::Unaligned(GIB + 1)));
        assert_eq!(RamMap::new(0), Err(RamSizeError::TooSmall(0)));
        let too_large = 1 << 52;
        assert_eq!(RamMap::new(too_large), Err(RamSizeError::TooLarge(too_large)));
    }

    #[test]
    fn nothing_below_4_gib_overlaps() {
        let mut areas = [
            (0, LOW_RAM_END),
            (IO_APIC.into(), PAGE_SIZE),
            (LOCAL_APIC.into(), PAGE_SIZE),
            (BALLOON.0, PAGE_SIZE),
            (BOOT_INFO.0, PAGE_SIZE),
            (ACPI_TABLES.0, PAGE_SIZE),
            (KVM_IDENTITY_MAP.0, PAGE_SIZE),
            (KVM_TSS.0, 3 * PAGE_SIZE),
            (ROM_END - ROM_SIZE_MAX, ROM_SIZE_MAX),
        ];
        areas.sort_unstable();
        assert!(areas.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
    }

    proptest! {
        #[test]
        fn address_of_and_offset_of_are_inverse(pages in 256_u64..1 << 24, at in any::<u64>()) {
            let map = RamMap::new(pages * PAGE_SIZE).unwrap();
            let offset = at % map.size();
            let address = map.address_of(offset).unwrap();
            prop_assert_eq!(map.offset_of(address), Some(offset));
            if let Some(offset) = map.offset_of(GuestAddress(at)) {
                prop_assert_eq!(map.address_of(offset), Some(GuestAddress(at)));
            }
        }

        #[test]
        fn ranges_cover_ram_once(pages in 256_u64..1 << 24) {
            let map = RamMap::new(pages * PAGE_SIZE).unwrap();
            let mut next = 0;
            for range in map.ranges() {
                prop_assert_eq!(range.offset, next);
                next += range.size;
            }
            prop_assert_eq!(next, map.size());
        }
    }
}
