//! Pages to be given away.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::{DeviceError, failed};
use crate::units::{PAGE_SIZE, PageIndex, PageRange};

/// Whole pages of private memory, which [`Server::donate`](super::Server::donate) can move to where they are wanted. They read zero
/// at first.
#[derive(Debug)]
pub struct PageBuffer {
    start: NonNull<u8>,
    pages: u64,
}

// SAFETY: memory of its owner's own.
unsafe impl Send for PageBuffer {}
// SAFETY: the same; it changes by `&mut` alone.
unsafe impl Sync for PageBuffer {}

impl PageBuffer {
    /// Room for so many pages.
    pub fn new(pages: u64) -> Result<Self, DeviceError> {
        let length = PageRange::new(PageIndex(0), pages).bytes();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), length, protection, MapFlags::PRIVATE)
        }
        .map_err(failed("mmap"))?;
        // A page that a child has too cannot be moved, and a huge page would be split first. Without either it is copied.
        for advice in [Advice::LinuxDontFork, Advice::LinuxNoHugepage] {
            // SAFETY: neither changes what the memory holds.
            let _ = unsafe { rustix::mm::madvise(start, length, advice) };
        }
        let start = NonNull::new(start.cast())
            .ok_or(Errno::NOMEM)
            .map_err(failed("mmap"))?;
        Ok(Self { start, pages })
    }

    /// Memory that there is. `None`: it is not aligned to a page.
    ///
    /// # Safety
    ///
    /// As many pages of private memory are mapped there, and used by nobody else for as long as this is; it is dropped only if
    /// they are to be unmapped.
    pub unsafe fn from_raw(start: *mut u8, pages: u64) -> Option<Self> {
        let start = NonNull::new(start).filter(|start| start.addr().get().is_multiple_of(PAGE_SIZE))?;
        Some(Self { start, pages })
    }

    /// How many pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    fn length(&self) -> usize {
        self.pages as usize * PAGE_SIZE
    }
}

impl Deref for PageBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: mapped for as long as `self`; what was moved away reads zero.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length()) }
    }
}

impl DerefMut for PageBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed by nobody else.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length()) }
    }
}

impl Drop for PageBuffer {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nobody borrows from it any more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.length()) };
    }
}
