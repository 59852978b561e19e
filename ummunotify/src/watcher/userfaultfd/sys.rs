//! The part of userfaultfd(2) that is needed, as in ioctl_userfaultfd(2).

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use linux_raw_sys::general as sys;
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER};
use rustix::ioctl::{Opcode, Updater};
use rustix::mm::{UserfaultfdFlags, userfaultfd};

use crate::ranges::AddressRange;

/// Features, as UFFDIO_API has them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Features(u64);

impl Features {
    /// Events of all that unmaps, drops and moves; and the mode of registration that causes no faults.
    pub(super) const NEEDED: Self = Self(
        (sys::UFFD_FEATURE_EVENT_UNMAP
            | sys::UFFD_FEATURE_EVENT_REMOVE
            | sys::UFFD_FEATURE_EVENT_REMAP
            | sys::UFFD_FEATURE_PAGEFAULT_FLAG_WP) as u64,
    );
    /// That mode for shared memory and huge pages (5.19), and for all files (6.7).
    pub(super) const USEFUL: Self =
        Self((sys::UFFD_FEATURE_WP_HUGETLBFS_SHMEM | sys::UFFD_FEATURE_WP_ASYNC) as u64);
    /// Events of forks.
    pub(super) const FORK: Self = Self(sys::UFFD_FEATURE_EVENT_FORK as u64);

    pub(super) const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    #[must_use]
    pub(super) const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    #[must_use]
    pub(super) const fn among(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

/// What was read.
#[derive(Clone, Copy, Debug)]
pub(super) enum Message {
    /// Unmapped, or its pages dropped.
    Gone(AddressRange),
    /// Mapped elsewhere.
    Moved { from: AddressRange, to: AddressRange },
    /// The address space was copied.
    Forked,
}

/// A userfaultfd: non-blocking, close-on-exec.
#[derive(Debug)]
pub(super) struct Userfaultfd(OwnedFd);

/// # Safety
///
/// The request takes a `T`.
unsafe fn update<const REQUEST: Opcode, T>(fd: BorrowedFd<'_>, value: &mut T) -> io::Result<()> {
    // SAFETY: by this function's own condition.
    unsafe { rustix::ioctl::ioctl(fd, Updater::<REQUEST, T>::new(value)) }?;
    Ok(())
}

impl Userfaultfd {
    /// What this kernel's can do.
    pub(super) fn probe() -> io::Result<Features> {
        Self::switch_on(Features(0)).map(|(_, features)| features)
    }

    /// One with these features.
    pub(super) fn open(features: Features) -> io::Result<Self> {
        Self::switch_on(features).map(|(uffd, _)| uffd)
    }

    fn switch_on(features: Features) -> io::Result<(Self, Features)> {
        // Nothing ever faults, so that it may be one for faults in user mode alone, which anybody may have.
        let flags = UserfaultfdFlags::CLOEXEC
            | UserfaultfdFlags::NONBLOCK
            | UserfaultfdFlags::from_bits_retain(sys::UFFD_USER_MODE_ONLY);
        // SAFETY: a descriptor alone does nothing to memory.
        let fd = unsafe { userfaultfd(flags) }?;
        let mut api = sys::uffdio_api {
            api: u64::from(sys::UFFD_API),
            features: features.0,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_API takes this structure.
        unsafe { update::<UFFDIO_API, _>(fd.as_fd(), &mut api) }?;
        Ok((Self(fd), Features(api.features)))
    }

    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// From now on there are events of what is mapped in whole pages.
    pub(super) fn register(&self, pages: AddressRange) -> io::Result<()> {
        let mut register = sys::uffdio_register {
            range: raw(pages),
            mode: u64::from(sys::UFFDIO_REGISTER_MODE_WP),
            ioctls: 0,
        };
        // SAFETY: UFFDIO_REGISTER takes this structure; in this mode it changes nothing of how memory behaves.
        unsafe { update::<UFFDIO_REGISTER, _>(self.descriptor(), &mut register) }
    }

    /// From now on there are none.
    pub(super) fn unregister(&self, pages: AddressRange) -> io::Result<()> {
        let mut range = raw(pages);
        // SAFETY: UFFDIO_UNREGISTER takes this structure.
        unsafe { update::<UFFDIO_UNREGISTER, _>(self.descriptor(), &mut range) }
    }

    /// Reads one message, if there is any of those that were asked for.
    pub(super) fn read(&self) -> Option<Message> {
        let mut buffer = [MaybeUninit::<u8>::uninit(); size_of::<sys::uffd_msg>()];
        let (read, _) = rustix::io::read(&self.0, &mut buffer).ok()?;
        if read.len() < size_of::<sys::uffd_msg>() {
            return None;
        }
        // SAFETY: the kernel has written a whole message; the structure asks for no alignment that is met here.
        let message = unsafe { buffer.as_ptr().cast::<sys::uffd_msg>().read_unaligned() };
        // SAFETY: the event says which member of the union the kernel filled in.
        unsafe {
            match u32::from(message.event) {
                sys::UFFD_EVENT_UNMAP | sys::UFFD_EVENT_REMOVE => {
                    let gone = message.arg.remove;
                    Some(Message::Gone(AddressRange::new(gone.start, gone.end)))
                }
                sys::UFFD_EVENT_REMAP => {
                    let moved = message.arg.remap;
                    Some(Message::Moved {
                        from: AddressRange::new(moved.from, moved.from + moved.len),
                        to: AddressRange::new(moved.to, moved.to + moved.len),
                    })
                }
                sys::UFFD_EVENT_FORK => {
                    // The child's memory is registered with this one; closed, it is not.
                    drop(OwnedFd::from_raw_fd(message.arg.fork.ufd as i32));
                    Some(Message::Forked)
                }
                _ => None,
            }
        }
    }
}

fn raw(pages: AddressRange) -> sys::uffdio_range {
    sys::uffdio_range {
        start: pages.start,
        len: pages.end - pages.start,
    }
}
