//! The read-only pages outside RAM: the firmware ROM, the boot-information page, and the ACPI tables.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    ptr::NonNull,
};

use firmware::boot_info::BootInfo;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use thiserror::Error;
use vm_memory::GuestAddress;

use super::{acpi, builtin::FIRMWARE_ROM};
use crate::address_map::{BOOT_INFO, PAGE_SIZE, ROM_END, ROM_SIZE_MAX};

/// Why there is no ROM to start from.
#[derive(Debug, Error)]
pub enum RomError {
    /// The file cannot be read.
    #[error("cannot read firmware {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Nothing in it.
    #[error("firmware {} is empty; pass a flat ROM image, or `--firmware none`", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Its last byte would not be just below 4 GiB.
    #[error(
        "firmware {} has {size} bytes, not a multiple of {PAGE_SIZE}; pad its start, because it is mapped to end at 4 GiB",
        path.display()
    )]
    Unaligned {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// It would lie over other things.
    #[error("firmware {} is larger than {} KiB, the most that fits below 4 GiB", path.display(), ROM_SIZE_MAX >> 10)]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// No memory for it.
    #[error("no memory for {size} bytes of read-only pages")]
    Memory {
        /// How much.
        size: usize,
        /// What the kernel answered.
        source: rustix::io::Errno,
    },
}

/// Pages that a guest can read and nobody can write, and where it finds them.
#[derive(Debug)]
pub struct ReadOnlyPages {
    guest: GuestAddress,
    host: NonNull<u8>,
    size: usize,
}

// SAFETY: the pages belong to the process, and nobody writes to them.
unsafe impl Send for ReadOnlyPages {}
// SAFETY: as above.
unsafe impl Sync for ReadOnlyPages {}

impl ReadOnlyPages {
    /// The firmware that comes with this program.
    pub fn builtin_rom() -> Result<Self, RomError> {
        Self::rom(FIRMWARE_ROM)
    }

    /// Firmware from a file: a flat image that ends with the reset vector.
    pub fn rom_from_file(path: &Path) -> Result<Self, RomError> {
        let error = |source| RomError::Read {
            path: path.to_owned(),
            source,
        };
        let mut content = Vec::new();
        File::open(path)
            .map_err(error)?
            .take(ROM_SIZE_MAX + 1)
            .read_to_end(&mut content)
            .map_err(error)?;
        let size = content.len() as u64;
        let path = || path.to_owned();
        if size == 0 {
            return Err(RomError::Empty { path: path() });
        }
        if size > ROM_SIZE_MAX {
            return Err(RomError::TooLarge { path: path() });
        }
        if !size.is_multiple_of(PAGE_SIZE) {
            return Err(RomError::Unaligned { path: path(), size });
        }
        Self::rom(&content)
    }

    /// The page that tells the firmware where to go, and behind it the ACPI tables of a machine with this many CPUs (at most
    /// 255), and with a balloon or without.
    pub fn description(boot: &BootInfo, cpus: u32, balloon: bool) -> Result<Self, RomError> {
        Self::new(BOOT_INFO, &[boot.to_page(), acpi::tables(cpus, balloon)].concat())
    }

    /// Pages that were saved: whole ones, which lie over nothing else.
    pub(crate) fn restored(guest: GuestAddress, content: &[u8]) -> Result<Self, RomError> {
        Self::new(guest, content)
    }

    /// Where the guest finds them.
    pub fn guest_address(&self) -> GuestAddress {
        self.guest
    }

    /// Where they are in this process, for as long as `self`. Only to be read from.
    pub fn host_address(&self) -> *mut u8 {
        self.host.as_ptr()
    }

    /// Their size in bytes.
    pub fn size(&self) -> u64 {
        self.size as u64
    }

    fn rom(content: &[u8]) -> Result<Self, RomError> {
        Self::new(GuestAddress(ROM_END - content.len() as u64), content)
    }

    fn new(guest: GuestAddress, content: &[u8]) -> Result<Self, RomError> {
        let size = content.len();
        let failed = |source| RomError::Memory { size, source };
        // SAFETY: a new mapping, where nothing else is.
        let address = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                size,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }
        .map_err(failed)?;
        let host = NonNull::new(address.cast()).ok_or(failed(rustix::io::Errno::NOMEM))?;
        let pages = Self { guest, host, size };
        // SAFETY: `size` bytes were just mapped writable, and nobody else knows of them.
        unsafe { host.copy_from_nonoverlapping(NonNull::from(content).cast(), size) };
        // SAFETY: they were mapped by this function, and no reference to them exists.
        unsafe { mprotect(address, size, MprotectFlags::READ) }.map_err(failed)?;
        Ok(pages)
    }

    /// What the guest reads there.
    pub fn content(&self) -> &[u8] {
        // SAFETY: mapped for as long as `self`, initialised, and written by nobody.
        unsafe { std::slice::from_raw_parts(self.host.as_ptr(), self.size) }
    }
}

impl Drop for ReadOnlyPages {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; the contract of `Vm::map` keeps them alive for as long as a guest sees them.
        let result = unsafe { munmap(self.host.as_ptr().cast(), self.size) };
        debug_assert!(result.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address_map::ACPI_TABLES;
    use firmware::boot_info::{MAGIC, Protocol};

    fn from_content(content: &[u8]) -> Result<ReadOnlyPages, RomError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        ReadOnlyPages::rom_from_file(file.path())
    }

    #[test]
    fn a_rom_ends_at_4_gib() {
        let rom = from_content(&[0x90; 8192]).unwrap();
        assert_eq!(rom.guest_address().0 + rom.size(), 1 << 32);
        assert!(rom.content().iter().all(|byte| *byte == 0x90));
        let builtin = ReadOnlyPages::builtin_rom().unwrap();
        assert_eq!(builtin.guest_address().0 + builtin.size(), 1 << 32);
        assert_eq!(builtin.content(), FIRMWARE_ROM);
    }

    #[test]
    fn sizes_that_cannot_be_a_rom_are_told_apart() {
        assert!(matches!(from_content(&[]), Err(RomError::Empty { .. })));
        assert!(matches!(
            from_content(&[0; 4097]),
            Err(RomError::Unaligned { size: 4097, .. })
        ));
        assert!(from_content(&vec![0; 256 << 10]).is_ok());
        assert!(matches!(
            from_content(&vec![0; (256 << 10) + 4096]),
            Err(RomError::TooLarge { .. })
        ));
        assert!(matches!(
            ReadOnlyPages::rom_from_file(Path::new("/no/such/rom")),
            Err(RomError::Read { .. })
        ));
    }

    #[test]
    fn the_boot_information_page_is_where_the_firmware_looks() {
        let boot = BootInfo {
            protocol: Protocol::Pvh,
            entry: 0x10_0000,
            argument: 0xe_0000,
            page_table_root: 0,
        };
        let pages = ReadOnlyPages::description(&boot, 1, false).unwrap();
        assert_eq!(pages.guest_address().0, firmware::boot_info::ADDRESS);
        assert_eq!(pages.content()[..8], MAGIC);
        let acpi = (ACPI_TABLES.0 - pages.guest_address().0) as usize;
        assert_eq!(pages.content()[acpi..acpi + 8], *b"RSD PTR ");
        assert_eq!(pages.size(), 2 * 4096);
    }
}
