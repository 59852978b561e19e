//! The memory of a page-state table: this process' own, or shared with another.

use std::alloc::Layout;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU8;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

/// One byte an entry. Untouched parts cost no memory.
#[derive(Debug)]
pub(super) enum Table {
    Own(Box<[AtomicU8]>),
    Shared(Mapping),
}

impl Table {
    /// `count` entries of 0. `None`: there is no memory.
    pub(super) fn new(count: usize) -> Option<Self> {
        let layout = Layout::array::<AtomicU8>(count)
            .ok()
            .filter(|layout| layout.size() > 0)?;
        // SAFETY: the layout is not empty.
        let entries = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) })?.cast();
        // SAFETY: allocated with this layout by the allocator of boxes; an AtomicU8 of zero bits is valid.
        let entries = unsafe { Box::from_raw(NonNull::slice_from_raw_parts(entries, count).as_ptr()) };
        Some(Self::Own(entries))
    }

    /// `count` entries of 0 in a memfd.
    pub(super) fn new_shared(count: usize) -> io::Result<(Self, OwnedFd)> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memfd = rustix::fs::memfd_create("umem-states", flags)?;
        rustix::fs::ftruncate(&memfd, count as u64)?;
        // A file that cannot become shorter is a mapping that cannot raise SIGBUS.
        rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let table = Self::from_shared(memfd.as_fd(), count)?;
        Ok((table, memfd))
    }

    /// The `count` entries of a memfd that this function's sibling made, in this process or another.
    pub(super) fn from_shared(memfd: BorrowedFd<'_>, count: usize) -> io::Result<Self> {
        let sealed = rustix::fs::fcntl_get_seals(memfd)?.contains(SealFlags::SHRINK);
        if !sealed || rustix::fs::fstat(memfd)?.st_size != count as i64 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Self::Shared(Mapping::new(memfd, count)?))
    }
}

impl Deref for Table {
    type Target = [AtomicU8];

    fn deref(&self) -> &[AtomicU8] {
        match self {
            Self::Own(entries) => entries,
            Self::Shared(mapping) => mapping.entries(),
        }
    }
}

/// A shared mapping.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<AtomicU8>,
    count: usize,
}

// SAFETY: it is memory of atomics, which any thread may use, unmapped when the owner goes.
unsafe impl Send for Mapping {}
// SAFETY: the same.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(memfd: BorrowedFd<'_>, count: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                count,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                memfd,
                0,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, count })
    }

    fn entries(&self) -> &[AtomicU8] {
        // SAFETY: mapped for as long as `self`, sealed against shrinking; everybody who has it uses it by atomics alone.
        unsafe { NonNull::slice_from_raw_parts(self.start, self.count).as_ref() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nobody borrows from it any more.
        if let Err(error) = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.count) } {
            tracing::error!(%error, "cannot unmap a page-state table");
        }
    }
}
