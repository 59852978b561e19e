//! The structures and numbers of the device's interface, as in `include/linux/umem.h`.
//!
//! Source: the umem v4 patch, I. Yamahata 2012.

/// What [`INIT`] takes and gives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Init {
    /// In bytes; comes back rounded up to whole pages.
    pub size: u64,
    /// Comes back: the file through which pages are served.
    pub shmem_fd: i32,
    /// Of no meaning.
    pub padding: i32,
}

/// `_IOWR(0x1E, 0, struct umem_init)`.
pub const INIT: u32 = (READ | WRITE) << 30 | (size_of::<Init>() as u32) << 16 | TYPE << 8;
/// `_IO(0x1E, 1)`.
pub const MAKE_VMA_ANONYMOUS: u32 = TYPE << 8 | 1;

const TYPE: u32 = 0x1e;
const WRITE: u32 = 1;
const READ: u32 = 2;
