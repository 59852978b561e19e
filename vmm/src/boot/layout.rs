//! RAM as it is before the first instruction.
//!
//! The loaders write into scratch memory of the size of low RAM, of which only the pages that they touch exist. RAM above
//! 4 GiB is not part of it: nothing that is loaded goes there, and so a layout costs the same whatever the size of RAM.

use std::{
    fs::File,
    io::{self, Cursor},
    ops::Range,
    path::{Path, PathBuf},
};

use firmware::boot_info::{BootInfo, Protocol};
use thiserror::Error;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress,
    bitmap::{AtomicBitmap, Bitmap},
    mmap::FromRangesError,
};

use super::{
    bios,
    builtin::GUEST_ELF,
    bzimage::{self, BzImageError},
    command_line::{self, CommandLineError},
    kernel::{self, KernelError, LoadedKernel, Start},
    page_set::PageSet,
    pvh::{self, PvhError},
};
use crate::address_map::{BOOT_STRUCTURES, PAGE_SIZE, RamMap, RamSizeError};

/// Low RAM, in which writes are tracked.
pub(super) type ScratchMemory = GuestMemoryMmap<AtomicBitmap>;

/// The command line of the built-in guest if none is given.
const BUILTIN_COMMAND_LINE: &str = "workload=hello";

/// What to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// The guest that comes with this program.
    BuiltIn,
    /// A bzImage, or an ELF kernel with a PVH entry.
    File(PathBuf),
}

/// What a layout is made from.
#[derive(Clone, Debug)]
pub struct LayoutConfig {
    /// Bytes of RAM.
    pub ram_size: u64,
    /// What to boot.
    pub kernel: Kernel,
    /// What the kernel finds as its first module.
    pub initramfs: Option<PathBuf>,
    /// What the kernel reads as its command line; by default `workload=hello` for the built-in guest, else empty.
    /// Linux is told besides to reset on a panic.
    pub command_line: Option<String>,
}

/// Why a layout could not be made.
#[derive(Debug, Error)]
pub enum LayoutError {
    /// Such RAM cannot be.
    #[error("no VM can have this RAM")]
    RamSize(#[source] RamSizeError),
    /// No address space for the scratch memory.
    #[error("no address space for a layout of {size:#x} bytes")]
    Memory {
        /// How much was wanted.
        size: u64,
        /// Why.
        source: FromRangesError,
    },
    /// A file cannot be opened.
    #[error("cannot open {what} {}", path.display())]
    Open {
        /// What it is.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel is none that can be booted.
    #[error("cannot boot kernel {}", path.display())]
    Kernel {
        /// Where it is.
        path: PathBuf,
        /// Why.
        source: KernelError,
    },
    /// The built-in guest does not fit.
    #[error("cannot boot the built-in guest")]
    BuiltIn(#[source] KernelError),
    /// The initramfs has no content.
    #[error("initramfs {} is empty or no regular file", path.display())]
    EmptyInitramfs {
        /// Where it is.
        path: PathBuf,
    },
    /// The initramfs does not fit.
    #[error(
        "initramfs {} has {size} bytes, but only {free} bytes in one piece are free for it below 3 GiB; give the VM more memory",
        path.display()
    )]
    InitramfsTooLarge {
        /// Where it is.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// The largest room for it.
        free: u64,
    },
    /// The initramfs cannot be read.
    #[error("cannot read initramfs {}", path.display())]
    ReadInitramfs {
        /// Where it is.
        path: PathBuf,
        /// Why.
        source: GuestMemoryError,
    },
    /// The kernel cannot be told what it needs to know.
    #[error("cannot describe the machine to the kernel")]
    Pvh(#[source] PvhError),
    /// The same of Linux.
    #[error("cannot describe the machine to the kernel")]
    BzImage(#[source] BzImageError),
    /// The same, where it looks for a BIOS.
    #[error("cannot lay out a reset vector")]
    Bios(#[source] GuestMemoryError),
    /// The command line is none.
    #[error("cannot describe the machine to the kernel")]
    CommandLine(#[source] CommandLineError),
}

/// RAM before the first instruction, and how to start it. Pages are numbered by RAM offset.
#[derive(Debug)]
pub struct Layout {
    ram: RamMap,
    memory: ScratchMemory,
    used: PageSet,
    boot: BootInfo,
    command_line: String,
    initramfs: Option<Range<u64>>,
    linux: bool,
}

impl Layout {
    /// Loads everything that `config` names.
    pub fn build(config: &LayoutConfig) -> Result<Self, LayoutError> {
        let ram = RamMap::new(config.ram_size).map_err(LayoutError::RamSize)?;
        let memory = scratch_memory(ram.low_size())?;
        let kernel = load_kernel(&config.kernel, &memory, ram.low_size())?;
        let mut used = PageSet::default();
        used.insert_bytes(kernel.start.structures());
        for segment in kernel.segments {
            used.insert_bytes(segment);
        }
        if kernel.linux {
            used.insert_bytes(bios::PAGE);
            bios::write(&memory).map_err(LayoutError::Bios)?;
        }
        let initramfs_end = kernel.start.initramfs_end().min(ram.low_size());
        let initramfs = match &config.initramfs {
            Some(path) => Some(load_initramfs(path, &memory, &used, initramfs_end)?),
            None => None,
        };
        if let Some(range) = &initramfs {
            used.insert_bytes(range.clone());
        }
        let command_line = match (&config.command_line, &config.kernel) {
            (Some(given), _) => given,
            (None, Kernel::BuiltIn) => BUILTIN_COMMAND_LINE,
            (None, Kernel::File(_)) => "",
        };
        let command_line = final_command_line(command_line, kernel.linux);
        let boot = match &kernel.start {
            Start::Pvh(entry) => {
                pvh::write(&memory, ram, &command_line, initramfs.as_ref()).map_err(LayoutError::Pvh)?;
                BootInfo {
                    protocol: Protocol::Pvh,
                    entry: *entry,
                    argument: pvh::START_INFO.0,
                    page_table_root: 0,
                }
            }
            Start::Linux { address, header } => {
                command_line::write(&memory, bzimage::COMMAND_LINE, &command_line)
                    .map_err(LayoutError::CommandLine)?;
                bzimage::write(&memory, ram, *address, header, &command_line, initramfs.as_ref())
                    .map_err(LayoutError::BzImage)?;
                BootInfo {
                    protocol: Protocol::LongMode,
                    entry: bzimage::entry(*address),
                    argument: bzimage::BOOT_PARAMS.0,
                    page_table_root: bzimage::PAGE_TABLES.0,
                }
            }
        };
        Ok(Self {
            ram,
            memory,
            used,
            boot,
            command_line,
            initramfs,
            linux: kernel.linux,
        })
    }

    /// Nothing but the boot structures, with another command line: what replaces them in RAM that was laid out before.
    pub fn with_command_line(
        ram_size: u64,
        boot: BootInfo,
        initramfs: Option<Range<u64>>,
        linux: bool,
        command_line: &str,
    ) -> Result<Self, LayoutError> {
        let ram = RamMap::new(ram_size).map_err(LayoutError::RamSize)?;
        let memory = scratch_memory(ram.low_size())?;
        let mut used = PageSet::default();
        let command_line = final_command_line(command_line, linux);
        match boot.protocol {
            Protocol::Pvh => {
                used.insert_bytes(pvh::PAGES);
                pvh::write(&memory, ram, &command_line, initramfs.as_ref()).map_err(LayoutError::Pvh)?;
            }
            Protocol::LongMode => {
                used.insert_bytes(bzimage::COMMAND_LINE_PAGE);
                command_line::write(&memory, bzimage::COMMAND_LINE, &command_line)
                    .map_err(LayoutError::CommandLine)?;
            }
        }
        Ok(Self {
            ram,
            memory,
            used,
            boot,
            command_line,
            initramfs,
            linux,
        })
    }

    /// Where the initramfs lies in guest-physical memory.
    pub fn initramfs(&self) -> Option<Range<u64>> {
        self.initramfs.clone()
    }

    /// Whether the kernel is known to be Linux.
    pub fn is_linux(&self) -> bool {
        self.linux
    }

    /// Where RAM is.
    pub fn ram(&self) -> RamMap {
        self.ram
    }

    /// How the kernel is entered.
    pub fn boot_info(&self) -> BootInfo {
        self.boot
    }

    /// What the kernel reads as its command line.
    pub fn command_line(&self) -> &str {
        &self.command_line
    }

    /// The pages that the layout uses, in order, and of each whether it was written. A page that is used but not written
    /// belongs to the kernel and is zero.
    pub fn pages(&self) -> impl Iterator<Item = (u64, bool)> + '_ {
        self.used.iter().map(|index| (index, self.is_written(index)))
    }

    /// Whether the layout uses a page.
    pub fn is_used(&self, index: u64) -> bool {
        self.used.contains(index)
    }

    /// Whether something was written to a page. All others are zero.
    pub fn is_written(&self, index: u64) -> bool {
        let Some(offset) = index.checked_mul(PAGE_SIZE) else {
            return false;
        };
        self.memory.iter().next().is_some_and(|low| {
            offset < low.len() && low.bitmap().dirty_at(MemoryRegionAddress(offset).0 as usize)
        })
    }

    /// Copies a page out. One that was not written is zero.
    pub fn read_page(&self, index: u64, page: &mut [u8; PAGE_SIZE as usize]) {
        let written = self.is_written(index)
            && self
                .memory
                .read_slice(page, GuestAddress(index * PAGE_SIZE))
                .is_ok();
        if !written {
            page.fill(0);
        }
    }
}

/// The command line with what every kernel of its kind is told.
fn final_command_line(given: &str, linux: bool) -> String {
    if linux {
        command_line::for_linux(given)
    } else {
        given.to_owned()
    }
}

/// Zero memory from address 0.
pub(super) fn scratch_memory(size: u64) -> Result<ScratchMemory, LayoutError> {
    ScratchMemory::from_ranges(&[(GuestAddress(0), size as usize)])
        .map_err(|source| LayoutError::Memory { size, source })
}

fn load_kernel(kernel: &Kernel, memory: &ScratchMemory, ram_end: u64) -> Result<LoadedKernel, LayoutError> {
    match kernel {
        Kernel::BuiltIn => {
            kernel::load(&mut Cursor::new(GUEST_ELF), memory, ram_end).map_err(LayoutError::BuiltIn)
        }
        Kernel::File(path) => {
            let mut file = open("kernel", path)?;
            kernel::load(&mut file, memory, ram_end).map_err(|source| LayoutError::Kernel {
                path: path.clone(),
                source,
            })
        }
    }
}

/// Puts the initramfs as high below `end` as it goes, so that a kernel that grows as it starts does not reach it.
fn load_initramfs(
    path: &Path,
    memory: &ScratchMemory,
    used: &PageSet,
    end: u64,
) -> Result<Range<u64>, LayoutError> {
    let mut file = open("initramfs", path)?;
    let size = file
        .metadata()
        .map_or(0, |metadata| if metadata.is_file() { metadata.len() } else { 0 });
    let path = || path.to_owned();
    if size == 0 {
        return Err(LayoutError::EmptyInitramfs { path: path() });
    }
    let start = used
        .highest_room(BOOT_STRUCTURES.end..end, size)
        .map_err(|free| LayoutError::InitramfsTooLarge {
            path: path(),
            size,
            free,
        })?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, size as usize)
        .map_err(|source| LayoutError::ReadInitramfs { path: path(), source })?;
    Ok(start..start + size)
}

fn open(what: &'static str, path: &Path) -> Result<File, LayoutError> {
    File::open(path).map_err(|source| LayoutError::Open {
        what,
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{KernelFile, bzimage_file};
    use super::*;
    use std::{collections::BTreeSet, fs};

    const MIB: u64 = 1 << 20;
    const ADDRESS_PAGE: u64 = KernelFile::ADDRESS / PAGE_SIZE;

    struct Files {
        directory: tempfile::TempDir,
    }

    impl Files {
        fn new() -> Self {
            let files = Self {
                directory: tempfile::tempdir().unwrap(),
            };
            fs::write(files.path("kernel"), KernelFile::default().to_bytes()).unwrap();
            files
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        fn config(&self) -> LayoutConfig {
            LayoutConfig {
                ram_size: 16 * MIB,
                kernel: Kernel::File(self.path("kernel")),
                initramfs: None,
                command_line: None,
            }
        }

        fn config_with_initramfs(&self, size: u64) -> LayoutConfig {
            fs::write(self.path("initramfs"), vec![0xa5; size as usize]).unwrap();
            LayoutConfig {
                initramfs: Some(self.path("initramfs")),
                ..self.config()
            }
        }
    }

    fn page(layout: &Layout, index: u64) -> [u8; 4096] {
        let mut page = [0xee; 4096];
        layout.read_page(index, &mut page);
        page
    }

    #[test]
    fn used_pages_are_the_kernel_with_its_zeroed_part_and_the_structures() {
        let layout = Layout::build(&Files::new().config()).unwrap();
        let pages: Vec<_> = layout.pages().collect();
        assert_eq!(
            pages,
            [
                (0xe0, true),
                (ADDRESS_PAGE, true),
                (ADDRESS_PAGE + 1, false),
                (ADDRESS_PAGE + 2, false)
            ]
        );
        assert_eq!(page(&layout, ADDRESS_PAGE)[..4], KernelFile::CODE);
        assert_eq!(page(&layout, ADDRESS_PAGE + 1), [0; 4096]);
        assert_eq!(layout.boot_info().entry, KernelFile::ADDRESS);
        assert_eq!(layout.boot_info().argument, 0xe_0000);
        assert_eq!(layout.command_line(), "");
    }

    #[test]
    fn nothing_is_outside_the_used_pages() {
        let layout = Layout::build(&Files::new().config_with_initramfs(5000)).unwrap();
        let used: BTreeSet<_> = layout.pages().map(|(index, _)| index).collect();
        for index in (0..16 * MIB / PAGE_SIZE).chain([1 << 20, u64::MAX]) {
            assert_eq!(layout.is_used(index), used.contains(&index));
            if layout.is_written(index) {
                assert!(used.contains(&index));
            } else {
                assert_eq!(page(&layout, index), [0; 4096]);
            }
        }
    }

    #[test]
    fn the_initramfs_is_at_the_end_of_low_ram() {
        let layout = Layout::build(&Files::new().config_with_initramfs(5000)).unwrap();
        let first = 16 * MIB / PAGE_SIZE - 2;
        assert_eq!(page(&layout, first), [0xa5; 4096]);
        assert_eq!(page(&layout, first + 1)[..5000 - 4096], [0xa5; 5000 - 4096]);
        assert_eq!(page(&layout, first + 1)[5000 - 4096..], [0; 2 * 4096 - 5000]);
    }

    #[test]
    fn an_initramfs_that_does_not_fit_is_refused_with_both_sizes() {
        let files = Files::new();
        let free = 15 * MIB - 0x3000;
        Layout::build(&files.config_with_initramfs(free)).unwrap();
        let error = Layout::build(&files.config_with_initramfs(free + 1)).unwrap_err();
        let message = error.to_string();
        assert!(message.contains(&(free + 1).to_string()), "{message}");
        assert!(message.contains(&free.to_string()), "{message}");
        assert!(matches!(
            Layout::build(&files.config_with_initramfs(0)),
            Err(LayoutError::EmptyInitramfs { .. })
        ));
    }

    #[test]
    fn files_that_are_not_there_are_named() {
        let files = Files::new();
        let missing = files.path("missing");
        let config = LayoutConfig {
            kernel: Kernel::File(missing.clone()),
            ..files.config()
        };
        let error = Layout::build(&config).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("cannot open kernel {}", missing.display())
        );
        let config = LayoutConfig {
            kernel: Kernel::File(files.directory.path().to_owned()),
            ..files.config()
        };
        assert!(matches!(
            Layout::build(&config),
            Err(LayoutError::Kernel {
                source: KernelError::Read(_),
                ..
            })
        ));
        let config = LayoutConfig {
            initramfs: Some(missing),
            ..files.config()
        };
        assert!(matches!(
            Layout::build(&config),
            Err(LayoutError::Open {
                what: "initramfs",
                ..
            })
        ));
    }

    fn linux_config(files: &Files) -> LayoutConfig {
        fs::write(files.path("vmlinuz"), bzimage_file()).unwrap();
        LayoutConfig {
            ram_size: 64 * MIB,
            kernel: Kernel::File(files.path("vmlinuz")),
            command_line: Some("quiet".to_owned()),
            ..files.config_with_initramfs(5000)
        }
    }

    #[test]
    fn linux_has_its_structures_its_kernel_and_a_way_to_reset() {
        let layout = Layout::build(&linux_config(&Files::new())).unwrap();
        let boot = layout.boot_info();
        assert_eq!(boot.protocol, Protocol::LongMode);
        assert_eq!((boot.entry, boot.argument), (0x100_0200, 0xe_0000));
        assert_eq!(boot.page_table_root, 0xe_2000);
        assert!(layout.is_linux());
        assert_eq!(layout.command_line(), "panic=-1 quiet");
        // Structures, the BIOS's entry, 4 MiB of kernel, and the initramfs.
        let expected: Vec<_> = [0xe0..0xe8, 0xff..0x100, 0x1000..0x1400, 0x3ffe..0x4000]
            .into_iter()
            .flatten()
            .collect();
        assert_eq!(layout.pages().map(|(page, _)| page).collect::<Vec<_>>(), expected);
        assert_eq!(page(&layout, 0xff)[0xff0..0xff2], [0xb0, 6]);
    }

    #[test]
    fn another_command_line_replaces_one_page_of_linux() {
        let first = Layout::build(&linux_config(&Files::new())).unwrap();
        let second = Layout::with_command_line(
            64 * MIB,
            first.boot_info(),
            first.initramfs(),
            first.is_linux(),
            "panic=5",
        )
        .unwrap();
        assert_eq!(second.pages().collect::<Vec<_>>(), [(0xe1, true)]);
        assert_eq!(page(&second, 0xe1)[..8], *b"panic=5\0");
    }

    #[test]
    fn the_built_in_guest_says_hello_by_default() {
        let config = LayoutConfig {
            ram_size: 64 * MIB,
            kernel: Kernel::BuiltIn,
            initramfs: None,
            command_line: None,
        };
        let layout = Layout::build(&config).unwrap();
        assert_eq!(layout.command_line(), "workload=hello");
        assert!(layout.pages().any(|(_, written)| written));
    }

    #[test]
    fn ram_above_4_gib_is_zero_and_not_part_of_it() {
        let files = Files::new();
        let mut config = files.config();
        config.ram_size = 64 << 30;
        let layout = Layout::build(&config).unwrap();
        assert!(!layout.is_used((64 << 30) / PAGE_SIZE - 1));
        assert_eq!(page(&layout, (64 << 30) / PAGE_SIZE - 1), [0; 4096]);
    }

    #[test]
    fn can_be_read_by_many_threads() {
        fn send_and_sync<T: Send + Sync>(_: &T) {}
        send_and_sync(&Layout::build(&Files::new().config()).unwrap());
    }
}
