//! Memory that is mapped as long as the value lives.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags};

/// A mapping.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: memory may be used and unmapped by any thread. What is in it is the business of who uses `start`.
unsafe impl Send for Mapping {}
// SAFETY: as for Send; there are no methods that change it.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Part of a file, or of what is like one, shared with all who map it.
    pub(crate) fn shared(
        file: BorrowedFd<'_>,
        offset: u64,
        length: usize,
        protection: ProtFlags,
    ) -> io::Result<Self> {
        // SAFETY: at an address that the kernel chooses, so nothing that is mapped is replaced.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                length,
                protection,
                MapFlags::SHARED,
                file,
                offset,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { start, length })
    }

    /// Memory of this process alone: one made by fork has zeroes in its place.
    pub(crate) fn wiped_in_a_fork(length: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: at an address that the kernel chooses, so nothing that is mapped is replaced.
        let start = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), length, protection, MapFlags::PRIVATE)
        }?;
        let memory = Self {
            start: NonNull::new(start.cast()).ok_or(io::ErrorKind::InvalidData)?,
            length,
        };
        // SAFETY: just mapped, and nobody uses it.
        unsafe { rustix::mm::madvise(start, length, Advice::LinuxWipeOnFork) }?;
        Ok(memory)
    }

    /// The first byte.
    #[inline]
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `shared`, and nobody uses it after this value.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.length) };
    }
}
