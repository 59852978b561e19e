//! Binding to Linux' userfaultfd.
//!
//! As in the kernel's `Documentation/admin-guide/mm/userfaultfd.rst` and the manual pages userfaultfd(2) and
//! ioctl_userfaultfd(2). Nothing is assumed of the kernel: [`Userfaultfd::probe`] asks what there is.

use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::{fmt, io};

use linux_raw_sys::general as sys;
use linux_raw_sys::ioctl::{
    UFFDIO_API, UFFDIO_CONTINUE, UFFDIO_COPY, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE,
    UFFDIO_ZEROPAGE,
};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Updater};
use rustix::mm::{UserfaultfdFlags, userfaultfd};

use crate::units::HostAddress;

const UFFDIO_MOVE: Opcode =
    rustix::ioctl::opcode::read_write::<sys::uffdio_move>(sys::UFFDIO as u8, sys::_UFFDIO_MOVE as u8);
const UFFDIO_POISON: Opcode =
    rustix::ioctl::opcode::read_write::<sys::uffdio_poison>(sys::UFFDIO as u8, sys::_UFFDIO_POISON as u8);

/// The device that hands out userfaultfds to whom its permissions let.
pub const DEVICE: &str = "/dev/userfaultfd";

/// What a userfaultfd can do, as UFFDIO_API answers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Features(u64);

impl Features {
    /// MADV_DONTNEED, MADV_REMOVE and their like are told as events.
    pub const EVENT_REMOVE: Self = Self(sys::UFFD_FEATURE_EVENT_REMOVE as u64);
    /// munmap of registered memory is told as an event.
    pub const EVENT_UNMAP: Self = Self(sys::UFFD_FEATURE_EVENT_UNMAP as u64);
    /// mremap of registered memory is told as an event.
    pub const EVENT_REMAP: Self = Self(sys::UFFD_FEATURE_EVENT_REMAP as u64);
    /// Missing faults on hugetlbfs.
    pub const MISSING_HUGETLBFS: Self = Self(sys::UFFD_FEATURE_MISSING_HUGETLBFS as u64);
    /// Missing faults on shared memory.
    pub const MISSING_SHMEM: Self = Self(sys::UFFD_FEATURE_MISSING_SHMEM as u64);
    /// Minor faults on hugetlbfs.
    pub const MINOR_HUGETLBFS: Self = Self(sys::UFFD_FEATURE_MINOR_HUGETLBFS as u64);
    /// Minor faults on shared memory.
    pub const MINOR_SHMEM: Self = Self(sys::UFFD_FEATURE_MINOR_SHMEM as u64);
    /// Absent pages can be made such that who touches them gets SIGBUS.
    pub const POISON: Self = Self(sys::UFFD_FEATURE_POISON as u64);
    /// Pages can be moved from other memory of the same process.
    pub const MOVE: Self = Self(sys::UFFD_FEATURE_MOVE as u64);

    const NAMES: [(u64, &'static str, &'static str); 17] = [
        (
            sys::UFFD_FEATURE_PAGEFAULT_FLAG_WP as u64,
            "pagefault-flag-wp",
            "5.7",
        ),
        (sys::UFFD_FEATURE_EVENT_FORK as u64, "event-fork", "4.11"),
        (sys::UFFD_FEATURE_EVENT_REMAP as u64, "event-remap", "4.11"),
        (sys::UFFD_FEATURE_EVENT_REMOVE as u64, "event-remove", "4.11"),
        (
            sys::UFFD_FEATURE_MISSING_HUGETLBFS as u64,
            "missing-hugetlbfs",
            "4.11",
        ),
        (sys::UFFD_FEATURE_MISSING_SHMEM as u64, "missing-shmem", "4.11"),
        (sys::UFFD_FEATURE_EVENT_UNMAP as u64, "event-unmap", "4.11"),
        (sys::UFFD_FEATURE_SIGBUS as u64, "sigbus", "4.14"),
        (sys::UFFD_FEATURE_THREAD_ID as u64, "thread-id", "4.14"),
        (
            sys::UFFD_FEATURE_MINOR_HUGETLBFS as u64,
            "minor-hugetlbfs",
            "5.13",
        ),
        (sys::UFFD_FEATURE_MINOR_SHMEM as u64, "minor-shmem", "5.14"),
        (sys::UFFD_FEATURE_EXACT_ADDRESS as u64, "exact-address", "5.18"),
        (
            sys::UFFD_FEATURE_WP_HUGETLBFS_SHMEM as u64,
            "wp-hugetlbfs-shmem",
            "5.19",
        ),
        (sys::UFFD_FEATURE_WP_UNPOPULATED as u64, "wp-unpopulated", "6.4"),
        (sys::UFFD_FEATURE_POISON as u64, "poison", "6.6"),
        (sys::UFFD_FEATURE_WP_ASYNC as u64, "wp-async", "6.7"),
        (sys::UFFD_FEATURE_MOVE as u64, "move", "6.8"),
    ];

    /// None at all.
    pub const fn none() -> Self {
        Self(0)
    }

    /// Both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Those that are in both.
    #[must_use]
    pub const fn common(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether all of `other` are among these.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Every feature this program knows a name for: name, the Linux version it came with, and whether it is here.
    pub fn survey(self) -> impl Iterator<Item = (&'static str, &'static str, bool)> {
        Self::NAMES
            .into_iter()
            .map(move |(bit, name, since)| (name, since, self.0 & bit != 0))
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set()
            .entries(self.survey().filter(|feature| feature.2).map(|feature| feature.0))
            .finish()
    }
}

/// Why no userfaultfd could be had.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Neither the device nor the system call may be used.
    #[error(
        "no permission to use userfaultfd for kernel-mode faults: give this user read and write access to \
         /dev/userfaultfd, or run as root, or 'sysctl -w vm.unprivileged_userfaultfd=1'"
    )]
    Permission,
    /// The kernel was built without it.
    #[error("this kernel has no userfaultfd: it needs Linux 5.14 with CONFIG_USERFAULTFD=y")]
    Unsupported,
    /// The kernel lacks features that were asked for.
    #[error("this kernel's userfaultfd lacks {missing:?}: it needs a newer Linux")]
    Features {
        /// Those that it lacks.
        missing: Features,
    },
    /// Anything else.
    #[error("cannot open a userfaultfd")]
    Io(#[source] io::Error),
}

/// Why a fault happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// There is no page.
    Missing,
    /// There is a page in the shared memory behind the mapping, but it is not mapped here.
    Minor,
    /// A page that is write-protected was written.
    WriteProtect,
}

/// What the kernel tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A thread (or the kernel in its place) waits for a page.
    Fault {
        /// The address, rounded down to a page.
        address: HostAddress,
        /// Why.
        kind: FaultKind,
        /// Whether it wanted to write.
        write: bool,
    },
    /// The pages in a range are being dropped. The thread that drops them waits until this event has been read.
    Remove {
        /// The first byte.
        start: HostAddress,
        /// The byte after the last.
        end: HostAddress,
    },
    /// A range was unmapped.
    Unmap {
        /// The first byte.
        start: HostAddress,
        /// The byte after the last.
        end: HostAddress,
    },
    /// A range was moved to another address.
    Remap {
        /// The first byte, where it was.
        from: HostAddress,
        /// The first byte, where it is.
        to: HostAddress,
        /// Bytes.
        length: u64,
    },
    /// An event that was not asked for.
    Other(u8),
}

impl Event {
    fn decode(message: &sys::uffd_msg) -> Self {
        match u32::from(message.event) {
            sys::UFFD_EVENT_PAGEFAULT => {
                // SAFETY: the event says which member of the union the kernel filled in.
                let fault = unsafe { message.arg.pagefault };
                let kind = if fault.flags & u64::from(sys::UFFD_PAGEFAULT_FLAG_WP) != 0 {
                    FaultKind::WriteProtect
                } else if fault.flags & u64::from(sys::UFFD_PAGEFAULT_FLAG_MINOR) != 0 {
                    FaultKind::Minor
                } else {
                    FaultKind::Missing
                };
                let write = fault.flags & u64::from(sys::UFFD_PAGEFAULT_FLAG_WRITE) != 0;
                Self::Fault {
                    address: HostAddress(fault.address),
                    kind,
                    write,
                }
            }
            sys::UFFD_EVENT_REMOVE => {
                // SAFETY: the event says which member of the union the kernel filled in.
                let remove = unsafe { message.arg.remove };
                Self::Remove {
                    start: HostAddress(remove.start),
                    end: HostAddress(remove.end),
                }
            }
            sys::UFFD_EVENT_UNMAP => {
                // SAFETY: as for UFFD_EVENT_REMOVE, whose member it shares.
                let unmap = unsafe { message.arg.remove };
                Self::Unmap {
                    start: HostAddress(unmap.start),
                    end: HostAddress(unmap.end),
                }
            }
            sys::UFFD_EVENT_REMAP => {
                // SAFETY: the event says which member of the union the kernel filled in.
                let remap = unsafe { message.arg.remap };
                Self::Remap {
                    from: HostAddress(remap.from),
                    to: HostAddress(remap.to),
                    length: remap.len,
                }
            }
            _ => Self::Other(message.event),
        }
    }
}

/// For which faults a range is registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegisterMode {
    /// Pages that are not there.
    Missing,
    /// Pages that are not there, and pages of shared memory that are there but not mapped.
    MissingAndMinor,
}

/// Why pages could not be installed, or only the first of them.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InstallError {
    /// The first page that was not installed is there already; the kernel woke nobody for it.
    #[error("the page is there already")]
    Exists,
    /// An event must be read first.
    #[error("the layout of the memory is changing")]
    Changing,
    /// The range is no longer registered, or no longer mapped.
    #[error("the range is not registered")]
    NotRegistered,
    /// The process whose memory it is has ended.
    #[error("the process with this memory has ended")]
    Gone,
    /// There is no memory for the page.
    #[error("out of memory for guest pages")]
    OutOfMemory,
    /// Anything else.
    #[error("userfaultfd: {0}")]
    Other(Errno),
}

impl From<Errno> for InstallError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::EXIST => Self::Exists,
            Errno::AGAIN => Self::Changing,
            Errno::NOENT => Self::NotRegistered,
            Errno::SRCH => Self::Gone,
            Errno::NOMEM => Self::OutOfMemory,
            errno => Self::Other(errno),
        }
    }
}

/// How far an installation came: bytes installed from the range's start, and why it stopped if that is not all.
#[derive(Debug, PartialEq, Eq)]
pub struct Installed {
    /// Bytes installed.
    pub bytes: u64,
    /// Why the rest was not.
    pub stopped: Option<InstallError>,
}

/// A userfaultfd: non-blocking, close-on-exec, accepting kernel-mode faults.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
}

impl Userfaultfd {
    /// What this kernel's userfaultfd can do.
    pub fn probe() -> Result<Features, OpenError> {
        let fd = open_descriptor()?;
        let mut api = sys::uffdio_api {
            api: u64::from(sys::UFFD_API),
            features: 0,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_API takes this structure.
        unsafe { update::<UFFDIO_API, _>(fd.as_fd(), &mut api) }.map_err(|e| OpenError::Io(e.into()))?;
        Ok(Features(api.features))
    }

    /// Opens one with `wanted` switched on.
    pub fn open(wanted: Features) -> Result<Self, OpenError> {
        let fd = open_descriptor()?;
        let mut api = sys::uffdio_api {
            api: u64::from(sys::UFFD_API),
            features: wanted.0,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_API takes this structure.
        match unsafe { update::<UFFDIO_API, _>(fd.as_fd(), &mut api) } {
            Ok(()) => Ok(Self { fd }),
            // The kernel's word for a feature that it does not know.
            Err(Errno::INVAL) => Err(OpenError::Features {
                missing: Features(wanted.0 & !Self::probe()?.0),
            }),
            Err(errno) => Err(OpenError::Io(errno.into())),
        }
    }

    /// One that another process opened and switched on.
    pub fn from_descriptor(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Registers a page-aligned range: from now on its faults come here.
    pub fn register(&self, range: Range<HostAddress>, mode: RegisterMode) -> io::Result<()> {
        let mode = match mode {
            RegisterMode::Missing => sys::UFFDIO_REGISTER_MODE_MISSING,
            RegisterMode::MissingAndMinor => {
                sys::UFFDIO_REGISTER_MODE_MISSING | sys::UFFDIO_REGISTER_MODE_MINOR
            }
        };
        let mut register = sys::uffdio_register {
            range: raw(range),
            mode: u64::from(mode),
            ioctls: 0,
        };
        // SAFETY: UFFDIO_REGISTER takes this structure; it changes how faults are resolved, not what memory holds.
        unsafe { update::<UFFDIO_REGISTER, _>(self.fd.as_fd(), &mut register) }?;
        Ok(())
    }

    /// Unregisters a range and wakes all who wait in it: from now on the kernel resolves its faults.
    pub fn unregister(&self, range: Range<HostAddress>) -> io::Result<()> {
        let mut range = raw(range);
        // SAFETY: UFFDIO_UNREGISTER takes this structure.
        unsafe { update::<UFFDIO_UNREGISTER, _>(self.fd.as_fd(), &mut range) }?;
        Ok(())
    }

    /// Installs copies of `content` (whole pages) from `at` on and wakes who waits for them. Never replaces a page.
    pub fn copy(&self, at: HostAddress, content: &[u8]) -> Installed {
        self.copy_in_mode(at, content, 0)
    }

    /// The same, and wakes nobody.
    pub fn copy_silently(&self, at: HostAddress, content: &[u8]) -> Installed {
        self.copy_in_mode(at, content, u64::from(sys::UFFDIO_COPY_MODE_DONTWAKE))
    }

    fn copy_in_mode(&self, at: HostAddress, content: &[u8], mode: u64) -> Installed {
        let len = content.len() as u64;
        let mut copy = sys::uffdio_copy {
            dst: at.0,
            src: content.as_ptr() as u64,
            len,
            mode,
            copy: 0,
        };
        // SAFETY: UFFDIO_COPY takes this structure, reads `content` and writes only pages that did not exist, in ranges
        // registered with this descriptor.
        let result = unsafe { update::<UFFDIO_COPY, _>(self.fd.as_fd(), &mut copy) };
        installed(result, copy.copy, len)
    }

    /// Installs zero pages and wakes who waits for them. Never replaces a page. Not for huge pages.
    pub fn zero(&self, range: Range<HostAddress>) -> Installed {
        let mut zeropage = sys::uffdio_zeropage {
            range: raw(range),
            mode: 0,
            zeropage: 0,
        };
        // SAFETY: UFFDIO_ZEROPAGE takes this structure and installs only pages that did not exist.
        let result = unsafe { update::<UFFDIO_ZEROPAGE, _>(self.fd.as_fd(), &mut zeropage) };
        installed(result, zeropage.zeropage, zeropage.range.len)
    }

    /// Maps pages that are already in the shared memory behind the range and wakes who waits for them.
    pub fn continue_(&self, range: Range<HostAddress>) -> Installed {
        let mut continue_ = sys::uffdio_continue {
            range: raw(range),
            mode: 0,
            mapped: 0,
        };
        // SAFETY: UFFDIO_CONTINUE takes this structure and maps pages that the mapping's file holds.
        let result = unsafe { update::<UFFDIO_CONTINUE, _>(self.fd.as_fd(), &mut continue_) };
        installed(result, continue_.mapped, continue_.range.len)
    }

    /// Moves pages of private anonymous memory of this process from `from` on to `range`, and wakes who waits for them. Where they
    /// were there is nothing afterwards. Needs [`Features::MOVE`].
    ///
    /// # Safety
    ///
    /// As many bytes from `from` on are the caller's, who has nothing there that must stay.
    pub unsafe fn move_(&self, range: Range<HostAddress>, from: *mut u8) -> Installed {
        let range = raw(range);
        let mut move_ = sys::uffdio_move {
            dst: range.start,
            src: from as u64,
            len: range.len,
            mode: 0,
            move_: 0,
        };
        // SAFETY: UFFDIO_MOVE takes this structure; the pages that it takes away the caller vouches for.
        let result = unsafe { update::<UFFDIO_MOVE, _>(self.fd.as_fd(), &mut move_) };
        installed(result, move_.move_, range.len)
    }

    /// Makes absent pages such that who touches them gets SIGBUS, and wakes who waits for them. Never replaces a page. Needs
    /// [`Features::POISON`].
    pub fn poison(&self, range: Range<HostAddress>) -> Installed {
        let mut poison = sys::uffdio_poison {
            range: raw(range),
            mode: 0,
            updated: 0,
        };
        // SAFETY: UFFDIO_POISON takes this structure and marks only pages that do not exist.
        let result = unsafe { update::<UFFDIO_POISON, _>(self.fd.as_fd(), &mut poison) };
        installed(result, poison.updated, poison.range.len)
    }

    /// Another descriptor for it.
    pub fn duplicate(&self) -> io::Result<Self> {
        Ok(Self {
            fd: self.fd.try_clone()?,
        })
    }

    /// Wakes who waits in a range, to look again.
    pub fn wake(&self, range: Range<HostAddress>) -> io::Result<()> {
        let mut range = raw(range);
        // SAFETY: UFFDIO_WAKE takes this structure.
        unsafe { update::<UFFDIO_WAKE, _>(self.fd.as_fd(), &mut range) }?;
        Ok(())
    }

    /// Reads the events that are there, at most as many as `buffer` holds; none is not an error.
    ///
    /// A short read means that the queue was empty. The kernel hands out faults before other events.
    pub fn read<'b>(&self, buffer: &'b mut EventBuffer) -> io::Result<impl Iterator<Item = Event> + use<'b>> {
        let size = size_of::<sys::uffd_msg>();
        // SAFETY: the messages are plain data, and the kernel writes whole ones, as many as its answer says.
        let bytes = unsafe {
            let messages = &mut buffer.messages;
            std::slice::from_raw_parts_mut(messages.as_mut_ptr().cast::<u8>(), size_of_val(&**messages))
        };
        let count = match rustix::io::read(&self.fd, bytes) {
            Ok(length) => length / size,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(errno) => return Err(errno.into()),
        };
        let messages = &buffer.messages[..count];
        // SAFETY: the kernel wrote the first `count` messages.
        Ok(messages
            .iter()
            .map(|message| Event::decode(unsafe { message.assume_init_ref() })))
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Where [`Userfaultfd::read`] puts events.
pub struct EventBuffer {
    messages: Box<[MaybeUninit<sys::uffd_msg>]>,
}

impl EventBuffer {
    /// Room for `count` events.
    pub fn new(count: usize) -> Self {
        Self {
            messages: Box::new_uninit_slice(count),
        }
    }

    /// How many events it holds.
    pub fn capacity(&self) -> usize {
        self.messages.len()
    }
}

fn raw(range: Range<HostAddress>) -> sys::uffdio_range {
    sys::uffdio_range {
        start: range.start.0,
        len: range.end.0 - range.start.0,
    }
}

/// The kernel answers an installation twice: by errno, and in the structure by bytes done or a negative errno. Bytes done
/// come with EAGAIN; what stopped it shows when the rest is asked for.
fn installed(result: Result<(), Errno>, answer: i64, wanted: u64) -> Installed {
    match result {
        Ok(()) => Installed {
            bytes: wanted,
            stopped: None,
        },
        Err(Errno::AGAIN) if answer > 0 => Installed {
            bytes: answer.unsigned_abs(),
            stopped: Some(InstallError::Changing),
        },
        Err(errno) => Installed {
            bytes: 0,
            stopped: Some(errno.into()),
        },
    }
}

/// # Safety
///
/// `OPCODE` must be an ioctl of the userfaultfd that reads and writes a `T` and nothing else of this program's memory but
/// what the caller vouches for.
unsafe fn update<const OPCODE: Opcode, T>(fd: BorrowedFd<'_>, value: &mut T) -> Result<(), Errno> {
    // SAFETY: the caller vouches for opcode and type.
    unsafe { rustix::ioctl::ioctl(fd, Updater::<OPCODE, T>::new(value)) }
}

fn open_descriptor() -> Result<OwnedFd, OpenError> {
    match open_by_device() {
        Ok(fd) => return Ok(fd),
        // Not there, not ours, or there without a driver behind it (a container's device node).
        Err(Errno::NOENT | Errno::ACCESS | Errno::PERM | Errno::NXIO | Errno::NODEV | Errno::NOTTY) => {}
        Err(errno) => return Err(OpenError::Io(errno.into())),
    }
    // SAFETY: the descriptor is used through this module alone, which never replaces a page that exists.
    match unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) } {
        Ok(fd) => Ok(fd),
        Err(Errno::PERM | Errno::ACCESS) => Err(OpenError::Permission),
        Err(Errno::NOSYS) => Err(OpenError::Unsupported),
        Err(errno) => Err(OpenError::Io(errno.into())),
    }
}

fn open_by_device() -> Result<OwnedFd, Errno> {
    let device = rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    // SAFETY: USERFAULTFD_IOC_NEW takes flags by value and returns a new descriptor.
    unsafe { rustix::ioctl::ioctl(device, NewUserfaultfd) }
}

/// USERFAULTFD_IOC_NEW: its argument is the flags themselves and its result the new descriptor.
struct NewUserfaultfd;

// SAFETY: the kernel takes the pointer for a number and returns a descriptor that this process owns.
unsafe impl Ioctl for NewUserfaultfd {
    type Output = OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        rustix::ioctl::opcode::none(sys::UFFDIO as u8, 0)
    }

    fn as_ptr(&mut self) -> *mut rustix::ffi::c_void {
        let flags = OFlags::CLOEXEC | OFlags::NONBLOCK;
        std::ptr::without_provenance_mut(flags.bits() as usize)
    }

    unsafe fn output_from_ptr(
        output: IoctlOutput,
        _: *mut rustix::ffi::c_void,
    ) -> rustix::io::Result<Self::Output> {
        // SAFETY: the ioctl succeeded, so its result is a new descriptor that nobody else owns.
        Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(output) })
    }
}

impl fmt::Display for Userfaultfd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "userfaultfd {}", self.fd.as_raw_fd())
    }
}
