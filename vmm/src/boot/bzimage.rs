//! Loading a bzImage by Linux' 64-bit boot protocol, and the structures that it is handed:
//! `Documentation/arch/x86/{boot,zero-page}.rst`.
//!
//! Beside the kernel itself they take eight pages of RAM, which the memory map shows as reserved: `boot_params`, the command
//! line, and page tables that map the lowest 4 GiB one to one.

use std::{
    io::{self, Read, Seek, SeekFrom},
    ops::Range,
};

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, ReadVolatile};

use super::{
    command_line,
    kernel::{LoadedKernel, Start},
    layout::ScratchMemory,
    memory_map::memory_map,
};
use crate::address_map::{ACPI_TABLES, BOOT_STRUCTURES, PAGE_SIZE, RamMap};

/// What the kernel gets in RSI.
pub(super) const BOOT_PARAMS: GuestAddress = GuestAddress(BOOT_STRUCTURES.start);
/// Where the command line is, which may be replaced without the rest.
pub(super) const COMMAND_LINE: GuestAddress = GuestAddress(BOOT_PARAMS.0 + PAGE_SIZE);
/// The page tables' root.
pub(super) const PAGE_TABLES: GuestAddress = GuestAddress(COMMAND_LINE.0 + PAGE_SIZE);
/// What the structures take: the page tables are a root, a second level, and a directory for each of 4 GiB.
pub(super) const PAGES: Range<u64> = BOOT_PARAMS.0..PAGE_TABLES.0 + 6 * PAGE_SIZE;
/// The page of the command line.
pub(super) const COMMAND_LINE_PAGE: Range<u64> = COMMAND_LINE.0..PAGE_TABLES.0;

/// Where the setup header may end in the file: its length is a byte.
pub(super) const HEADER_END: usize = offset::MAGIC + 0xff;

/// The 64-bit entry's distance from the kernel's start.
const ENTRY_64: u64 = 0x200;
const SECTOR: u64 = 512;
/// Protocol 2.12 was the first that says whether there is a 64-bit entry (Linux 3.8).
const VERSION_MIN: u16 = 0x020c;
/// Bits of `loadflags` and of `xloadflags`.
const LOADED_HIGH: u8 = 1 << 0;
const XLF_KERNEL_64: u16 = 1 << 0;
/// A loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

/// Page table bits: present, writable, accessed, dirty, and for a directory's entry a page of 2 MiB.
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 0b1110_0000;
const LARGE_PAGE_SIZE: u64 = 2 << 20;

/// Where fields are: in the file's first sectors, and in `boot_params`, into which the setup header is copied.
mod offset {
    pub(super) const ACPI_RSDP: usize = 0x70;
    pub(super) const E820_ENTRIES: usize = 0x1e8;
    pub(super) const SETUP_SECTORS: usize = 0x1f1;
    pub(super) const SYSTEM_SIZE: usize = 0x1f4;
    pub(super) const BOOT_FLAG: usize = 0x1fe;
    /// The setup header ends this many bytes behind its magic.
    pub(super) const HEADER_LENGTH: usize = 0x201;
    pub(super) const MAGIC: usize = 0x202;
    pub(super) const VERSION: usize = 0x206;
    pub(super) const LOADER: usize = 0x210;
    pub(super) const LOAD_FLAGS: usize = 0x211;
    pub(super) const CODE_START: usize = 0x214;
    pub(super) const INITRAMFS: usize = 0x218;
    pub(super) const INITRAMFS_SIZE: usize = 0x21c;
    pub(super) const COMMAND_LINE: usize = 0x228;
    pub(super) const INITRAMFS_MAX: usize = 0x22c;
    pub(super) const ALIGNMENT: usize = 0x230;
    pub(super) const RELOCATABLE: usize = 0x234;
    pub(super) const X_LOAD_FLAGS: usize = 0x236;
    pub(super) const COMMAND_LINE_SIZE: usize = 0x238;
    pub(super) const PREFERRED_ADDRESS: usize = 0x258;
    pub(super) const INIT_SIZE: usize = 0x260;
    /// End of the fields that are used here.
    pub(super) const USED_END: usize = 0x264;
    pub(super) const E820_TABLE: usize = 0x2d0;
}

/// Why a bzImage cannot be booted.
#[derive(Debug, Error)]
pub enum BzImageError {
    /// It cannot be read.
    #[error("the file cannot be read")]
    Read(#[source] io::Error),
    /// The file ends too early.
    #[error("it is a truncated bzImage: {what} ends at byte {end}, the file at {size}")]
    Truncated {
        /// What is cut off.
        what: &'static str,
        /// Where it should end.
        end: u64,
        /// Where the file ends.
        size: u64,
    },
    /// From before the 64-bit entry.
    #[error("it is a bzImage of boot protocol {}.{:02}, and 2.12 is needed; take Linux 3.8 or newer", .0 >> 8, .0 & 0xff)]
    TooOld(u16),
    /// For 32-bit processors.
    #[error("it is a 32-bit bzImage, without a 64-bit entry; take a kernel for x86-64")]
    Not64Bit,
    /// Its header says what cannot be.
    #[error("the header of the bzImage is damaged: {0}")]
    BadHeader(&'static str),
    /// It does not fit.
    #[error(
        "as it starts it needs {size} bytes from guest-physical {start:#x} on, but low RAM ends at {ram_end:#x}; give the VM \
         more memory"
    )]
    BeyondRam {
        /// Where it would be.
        start: u64,
        /// What it needs.
        size: u64,
        /// Where RAM ends.
        ram_end: u64,
    },
    /// The kernel takes less than other kernels.
    #[error("the command line has {length} bytes; this kernel takes {most}")]
    CommandLineTooLong {
        /// Its length.
        length: usize,
        /// The most that the kernel takes.
        most: u32,
    },
    /// It cannot be copied.
    #[error("it cannot be loaded")]
    Load(#[source] GuestMemoryError),
}

/// The file's setup header, checked to be that of a kernel with a 64-bit entry; at the place that it has in `boot_params`.
#[derive(Debug)]
pub(super) struct SetupHeader {
    page: [u8; PAGE_SIZE as usize],
}

impl SetupHeader {
    /// The header in the start of a file, if that is a bzImage.
    pub(super) fn find(start: &[u8]) -> Result<Option<Self>, BzImageError> {
        let is = |at: usize, bytes: &[u8]| start.get(at..at + bytes.len()) == Some(bytes);
        if !is(offset::BOOT_FLAG, &[0x55, 0xaa]) || !is(offset::MAGIC, b"HdrS") {
            return Ok(None);
        }
        let end = offset::MAGIC + usize::from(start[offset::HEADER_LENGTH]);
        if start.len() < end {
            return Err(BzImageError::Truncated {
                what: "the setup header",
                end: end as u64,
                size: start.len() as u64,
            });
        }
        let mut page = [0; PAGE_SIZE as usize];
        page[offset::SETUP_SECTORS..end].copy_from_slice(&start[offset::SETUP_SECTORS..end]);
        let header = Self { page };
        let version = header.u16(offset::VERSION);
        if version < VERSION_MIN {
            return Err(BzImageError::TooOld(version));
        }
        if end < offset::USED_END {
            return Err(BzImageError::BadHeader("it is shorter than its version says"));
        }
        if header.page[offset::LOAD_FLAGS] & LOADED_HIGH == 0 {
            return Err(BzImageError::BadHeader(
                "the kernel wants to be loaded below 1 MiB",
            ));
        }
        if header.u16(offset::X_LOAD_FLAGS) & XLF_KERNEL_64 == 0 {
            return Err(BzImageError::Not64Bit);
        }
        if !header.u32(offset::ALIGNMENT).is_power_of_two() {
            return Err(BzImageError::BadHeader("its alignment is no power of two"));
        }
        Ok(Some(header))
    }

    /// One past the last address at which the initramfs may have a byte.
    pub(super) fn initramfs_end(&self) -> u64 {
        u64::from(self.u32(offset::INITRAMFS_MAX)) + 1
    }

    /// The kernel without its setup code: where in the file.
    fn code(&self) -> Range<u64> {
        // 0 stands for 4, says the protocol.
        let sectors = match self.page[offset::SETUP_SECTORS] {
            0 => 4,
            sectors => u64::from(sectors),
        };
        let start = (sectors + 1) * SECTOR;
        start..start + u64::from(self.u32(offset::SYSTEM_SIZE)) * 16
    }

    /// Where the kernel goes, and how much it needs there until it has read the memory map.
    fn place(&self, ram_end: u64) -> Result<Range<u64>, BzImageError> {
        let code = self.code();
        let size = u64::from(self.u32(offset::INIT_SIZE)).max(code.end - code.start);
        let preferred = self.u64(offset::PREFERRED_ADDRESS);
        let lowest = BOOT_STRUCTURES
            .end
            .next_multiple_of(self.u32(offset::ALIGNMENT).into());
        let relocatable = self.page[offset::RELOCATABLE] != 0;
        // Where it was linked to, it need not move itself.
        let candidates = [preferred, if relocatable { lowest } else { preferred }];
        let fits = |start: u64| {
            let end = start.checked_add(size).filter(|end| *end <= ram_end)?;
            (start >= BOOT_STRUCTURES.end).then_some(start..end)
        };
        candidates
            .into_iter()
            .find_map(fits)
            .ok_or(BzImageError::BeyondRam {
                start: candidates[1],
                size,
                ram_end,
            })
    }

    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        std::array::from_fn(|index| self.page[at + index])
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }
}

/// Loads the kernel that `header` was found in.
pub(super) fn load<F: Read + Seek + ReadVolatile>(
    file: &mut F,
    header: SetupHeader,
    memory: &ScratchMemory,
    ram_end: u64,
) -> Result<LoadedKernel, BzImageError> {
    let code = header.code();
    let size = file.seek(SeekFrom::End(0)).map_err(BzImageError::Read)?;
    if code.end > size {
        return Err(BzImageError::Truncated {
            what: "the kernel",
            end: code.end,
            size,
        });
    }
    if code.end - code.start <= ENTRY_64 {
        return Err(BzImageError::BadHeader("the kernel ends before its entry"));
    }
    let place = header.place(ram_end)?;
    file.seek(SeekFrom::Start(code.start))
        .map_err(BzImageError::Read)?;
    memory
        .read_exact_volatile_from(GuestAddress(place.start), file, (code.end - code.start) as usize)
        .map_err(BzImageError::Load)?;
    Ok(LoadedKernel {
        start: Start::Linux {
            address: place.start,
            header: Box::new(header),
        },
        segments: vec![place],
        linux: true,
    })
}

/// The entry of a kernel that was loaded to `address`.
pub(super) fn entry(address: u64) -> u64 {
    address + ENTRY_64
}

/// Writes `boot_params` and the page tables, for RAM as in `ram`, a kernel at `address`, and the initramfs, if any, at those
/// addresses. The command line is written by itself.
pub(super) fn write(
    memory: &ScratchMemory,
    ram: RamMap,
    address: u64,
    header: &SetupHeader,
    command_line: &str,
    initramfs: Option<&Range<u64>>,
) -> Result<(), BzImageError> {
    let most = header.u32(offset::COMMAND_LINE_SIZE);
    if command_line.len() > most as usize && command_line.len() <= command_line::LENGTH_MAX {
        return Err(BzImageError::CommandLineTooLong {
            length: command_line.len(),
            most,
        });
    }
    let mut params = header.page;
    let mut put = |at: usize, bytes: &[u8]| params[at..at + bytes.len()].copy_from_slice(bytes);
    put(offset::ACPI_RSDP, &ACPI_TABLES.0.to_le_bytes());
    put(offset::LOADER, &[LOADER_UNDEFINED]);
    // All of it lies below 4 GiB.
    put(offset::CODE_START, &(address as u32).to_le_bytes());
    put(offset::COMMAND_LINE, &(COMMAND_LINE.0 as u32).to_le_bytes());
    if let Some(range) = initramfs {
        put(offset::INITRAMFS, &(range.start as u32).to_le_bytes());
        put(
            offset::INITRAMFS_SIZE,
            &((range.end - range.start) as u32).to_le_bytes(),
        );
    }
    let map = memory_map(ram, &PAGES);
    put(offset::E820_ENTRIES, &[map.len() as u8]);
    let table: Vec<u8> = map
        .iter()
        .flat_map(|piece| {
            let size = piece.range.end - piece.range.start;
            let numbers = [piece.range.start, size].map(u64::to_le_bytes);
            [&numbers.concat()[..], &(piece.kind as u32).to_le_bytes()].concat()
        })
        .collect();
    put(offset::E820_TABLE, &table);
    memory
        .write_slice(&params, BOOT_PARAMS)
        .and_then(|()| memory.write_slice(&page_tables(), PAGE_TABLES))
        .map_err(BzImageError::Load)
}

/// As they lie at [`PAGE_TABLES`].
fn page_tables() -> Vec<u8> {
    let table = |number: u64| PAGE_TABLES.0 + number * PAGE_SIZE;
    let level_4 = [table(1) | PRESENT_WRITABLE];
    let level_3 = [2, 3, 4, 5].map(|number| table(number) | PRESENT_WRITABLE);
    let directories = (0..4 * 512).map(|page| (page * LARGE_PAGE_SIZE) | LARGE | PRESENT_WRITABLE);
    let padded = |entries: &[u64]| {
        let mut entries = entries.to_vec();
        entries.resize(512, 0);
        entries
    };
    padded(&level_4)
        .into_iter()
        .chain(padded(&level_3))
        .chain(directories)
        .flat_map(u64::to_le_bytes)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::{layout::scratch_memory, testing::bzimage_file};
    use super::*;
    use std::io::Cursor;

    const MIB: u64 = 1 << 20;

    fn load_bytes(bytes: &[u8], ram_end: u64) -> Result<LoadedKernel, BzImageError> {
        let header = SetupHeader::find(&bytes[..bytes.len().min(HEADER_END)])?.expect("it is a bzImage");
        load(
            &mut Cursor::new(bytes),
            header,
            &scratch_memory(ram_end).unwrap(),
            ram_end,
        )
    }

    fn changed(at: usize, bytes: &[u8]) -> Vec<u8> {
        let mut file = bzimage_file();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    }

    fn error(at: usize, bytes: &[u8]) -> BzImageError {
        load_bytes(&changed(at, bytes), 64 * MIB).unwrap_err()
    }

    #[test]
    fn it_goes_to_the_preferred_address_or_where_there_is_room() {
        let at = |ram: u64| load_bytes(&bzimage_file(), ram).map(|kernel| kernel.segments[0].clone());
        assert_eq!(at(64 * MIB).unwrap(), 16 * MIB..20 * MIB);
        assert_eq!(at(20 * MIB).unwrap(), 16 * MIB..20 * MIB);
        assert_eq!(at(20 * MIB - 4096).unwrap(), 2 * MIB..6 * MIB);
        assert!(matches!(
            at(6 * MIB - 4096),
            Err(BzImageError::BeyondRam { start: 0x20_0000, .. })
        ));
        let fixed = changed(offset::RELOCATABLE, &[0]);
        assert!(matches!(
            load_bytes(&fixed, 19 * MIB),
            Err(BzImageError::BeyondRam {
                start: 0x100_0000,
                ..
            })
        ));
        let beyond = changed(offset::PREFERRED_ADDRESS, &[0xff; 8]);
        assert_eq!(
            load_bytes(&beyond, 64 * MIB).unwrap().segments[0],
            2 * MIB..6 * MIB
        );
    }

    #[test]
    fn what_cannot_be_booted_is_told_apart() {
        assert!(SetupHeader::find(b"\x7fELF").unwrap().is_none());
        assert!(matches!(
            error(offset::VERSION, &[0x0b, 2]),
            BzImageError::TooOld(0x20b)
        ));
        assert!(matches!(
            error(offset::X_LOAD_FLAGS, &[0, 0]),
            BzImageError::Not64Bit
        ));
        assert!(matches!(
            error(offset::LOAD_FLAGS, &[0]),
            BzImageError::BadHeader(_)
        ));
        assert!(matches!(
            error(offset::ALIGNMENT, &[0; 4]),
            BzImageError::BadHeader(_)
        ));
        assert!(matches!(
            error(offset::HEADER_LENGTH, &[0x40]),
            BzImageError::BadHeader(_)
        ));
        assert!(matches!(
            error(offset::SYSTEM_SIZE, &[1, 0, 0, 0]),
            BzImageError::BadHeader(_)
        ));
    }

    #[test]
    fn every_truncation_is_found() {
        let file = bzimage_file();
        assert!(load_bytes(&file, 64 * MIB).is_ok());
        for length in offset::MAGIC + 4..file.len() {
            assert!(
                matches!(
                    load_bytes(&file[..length], 64 * MIB),
                    Err(BzImageError::Truncated { .. })
                ),
                "{length}"
            );
        }
    }

    #[test]
    fn the_page_tables_map_4_gib_one_to_one() {
        let tables = page_tables();
        assert_eq!(tables.len() as u64, PAGES.end - PAGE_TABLES.0);
        let entry = |table: u64, index: u64| {
            let at = (table - PAGE_TABLES.0 + index * 8) as usize;
            u64::from_le_bytes(tables[at..at + 8].try_into().unwrap())
        };
        let frame = |entry: u64| {
            assert_eq!(entry & 1, 1);
            entry & !0xfff
        };
        for address in (0..1 << 32).step_by(LARGE_PAGE_SIZE as usize) {
            let level_3 = frame(entry(PAGE_TABLES.0, address >> 39));
            let directory = frame(entry(level_3, address >> 30 & 511));
            assert_eq!(frame(entry(directory, address >> 21 & 511)), address);
        }
    }

    #[test]
    fn boot_params_say_where_everything_is() {
        let memory = scratch_memory(64 * MIB).unwrap();
        let ram = RamMap::new(4096 * MIB).unwrap();
        let header = SetupHeader::find(&bzimage_file()).unwrap().unwrap();
        write(
            &memory,
            ram,
            16 * MIB,
            &header,
            "quiet",
            Some(&(0x200_0000..0x200_1234)),
        )
        .unwrap();
        let u32 = |at: usize| -> u32 { memory.read_obj(GuestAddress(BOOT_PARAMS.0 + at as u64)).unwrap() };
        assert_eq!(
            (u32(offset::INITRAMFS), u32(offset::INITRAMFS_SIZE)),
            (0x200_0000, 0x1234)
        );
        assert_eq!(u64::from(u32(offset::COMMAND_LINE)), COMMAND_LINE.0);
        assert_eq!(u64::from(u32(offset::ACPI_RSDP)), ACPI_TABLES.0);
        assert_eq!(u32(offset::MAGIC), u32::from_le_bytes(*b"HdrS"));
        // 0 to the structures, the structures, the rest of low RAM, ACPI, high RAM.
        assert_eq!(u32(offset::E820_ENTRIES) & 0xff, 5);
        assert_eq!(u32(offset::E820_TABLE + 20), PAGES.start as u32);
        assert_eq!(u32(offset::E820_TABLE + 36), 2);
        let long = "x".repeat(300);
        assert!(matches!(
            write(&memory, ram, 16 * MIB, &header, &long, None),
            Err(BzImageError::CommandLineTooLong {
                length: 300,
                most: 255
            })
        ));
    }
}
