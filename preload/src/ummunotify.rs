//! `/dev/ummunotify`: what the driver of the ummunotify v2 patch (R. Dreier and E. Munson 2010) did, with a notifier.

use std::ffi::{c_int, c_void};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::AtomicI32;
use std::sync::atomic::Ordering::{AcqRel, Acquire};
use std::sync::{Mutex, PoisonError};

use ::ummunotify::abi::{
    EXCHANGE_FEATURES, READ_LIMIT, REGISTER_REGION, RawEvent, Register, UNREGISTER_REGION,
};
use ::ummunotify::{AddressRange, COUNTER_PAGE, Choice, Cookie, Notifier};

use self::signal::Signals;
use crate::device::{Device as _, Errno, MapRequest, Mapped, complain};
use crate::user;

mod signal;

/// An open file of the device.
pub(crate) struct Device {
    /// Whose thread waits on the notifier's descriptor, and so ends before that is closed.
    signals: Mutex<Option<Signals>>,
    notifier: Notifier,
    /// The status flags that a program can change: O_NONBLOCK, O_ASYNC.
    flags: AtomicI32,
}

const CHANGEABLE: c_int = libc::O_NONBLOCK | libc::O_ASYNC;

impl Device {
    /// As the driver's open.
    pub(crate) fn open(flags: c_int) -> Result<Self, Errno> {
        if flags & libc::O_ACCMODE != libc::O_RDONLY {
            return Err(libc::EINVAL);
        }
        let name = std::env::var("UMMUNOTIFY_WATCHER").unwrap_or_else(|_| "auto".to_owned());
        let choice: Choice = name.parse().map_err(|error| lacks(&error))?;
        let notifier = Notifier::open(choice.with_page()).map_err(|error| lacks(&error))?;
        Ok(Self {
            notifier,
            flags: AtomicI32::new(flags & libc::O_NONBLOCK),
            signals: Mutex::new(None),
        })
    }

    /// As F_SETFL. `fd`: of which the owner of signals is asked.
    fn set_status(&self, fd: c_int, flags: c_int) -> Result<(), Errno> {
        let before = self.flags.swap(flags & CHANGEABLE, AcqRel);
        if (before ^ flags) & libc::O_ASYNC != 0 {
            let signals = if flags & libc::O_ASYNC != 0 {
                Some(Signals::start(self.descriptor()?, fd).map_err(|_| libc::ENOMEM)?)
            } else {
                None
            };
            let before = {
                let mut current = self.signals.lock().unwrap_or_else(PoisonError::into_inner);
                std::mem::replace(&mut *current, signals)
            };
            drop(before);
        }
        Ok(())
    }

    /// Changes one status flag.
    fn set_flag(&self, fd: c_int, flag: c_int, on: bool) -> Result<(), Errno> {
        let flags = self.flags.load(Acquire);
        self.set_status(fd, if on { flags | flag } else { flags & !flag })
    }

    fn control(&self, fd: c_int, request: u64, argument: *mut c_void) -> Result<c_int, Errno> {
        match request as u32 {
            EXCHANGE_FEATURES => {
                // The driver marks it as used before it looks at the address.
                let wanted = user::copy_from::<u32>(argument);
                let there = self.notifier.exchange_features(wanted.unwrap_or_default());
                let there = there.map_err(|error| error.errno())?;
                wanted?;
                user::copy_to(argument, &[there])?;
            }
            REGISTER_REGION => {
                let range: Register = user::copy_from(argument)?;
                self.notifier
                    .register(
                        AddressRange::new(range.start, range.end),
                        Cookie(range.user_cookie),
                    )
                    .map_err(|error| error.errno())?;
            }
            UNREGISTER_REGION => {
                let cookie = user::copy_from::<u64>(argument)?;
                self.notifier
                    .unregister(Cookie(cookie))
                    .map_err(|error| error.errno())?;
            }
            _ => match request {
                libc::FIONBIO => {
                    let on = user::copy_from::<c_int>(argument)? != 0;
                    self.set_flag(fd, libc::O_NONBLOCK, on)?;
                }
                libc::FIOASYNC => {
                    let on = user::copy_from::<c_int>(argument)? != 0;
                    self.set_flag(fd, libc::O_ASYNC, on)?;
                }
                _ => return Err(libc::ENOTTY),
            },
        }
        Ok(0)
    }
}

impl crate::device::Device for Device {
    fn descriptor(&self) -> Result<RawFd, Errno> {
        let descriptor = self.notifier.descriptor().map_err(|_| libc::ENODEV)?;
        Ok(descriptor.as_raw_fd())
    }

    fn flags(&self, _: c_int) -> c_int {
        self.flags.load(Acquire) | libc::O_RDONLY
    }

    fn set_flags(&self, fd: c_int, flags: c_int) -> Option<Result<(), Errno>> {
        Some(self.set_status(fd, flags))
    }

    fn ioctl(&self, fd: c_int, request: u64, argument: *mut c_void) -> Option<Result<c_int, Errno>> {
        Some(self.control(fd, request, argument))
    }

    fn read(&self, buffer: *mut c_void, length: usize) -> Result<usize, Errno> {
        let max = length.min(READ_LIMIT) / size_of::<RawEvent>();
        let events = if self.flags.load(Acquire) & libc::O_NONBLOCK != 0 {
            self.notifier
                .try_read_or_none(max)
                .map_err(|_| libc::ENODEV)?
                .ok_or(libc::EAGAIN)?
        } else {
            self.notifier.read(max).map_err(|error| error.errno())?
        };
        let events: Vec<RawEvent> = events.into_iter().map(RawEvent::from).collect();
        if !events.is_empty() {
            user::copy_to(buffer, &events)?;
        }
        Ok(size_of_val(events.as_slice()))
    }

    fn write(&self, _: *const c_void, _: usize) -> Result<usize, Errno> {
        // It is open for reading alone.
        Err(libc::EBADF)
    }

    /// Which file to map, and how, after what the kernel sees to for a file that is open for reading.
    fn mmap(&self, request: MapRequest) -> Result<Mapped, Errno> {
        let MapRequest {
            length,
            protection,
            flags,
            offset,
            ..
        } = request;
        let shared = flags & libc::MAP_PRIVATE == 0;
        if shared && protection & libc::PROT_WRITE != 0 {
            return Err(libc::EACCES);
        }
        // A private copy of a counter is a number that stands still.
        let one_page = length.checked_next_multiple_of(COUNTER_PAGE) == Some(COUNTER_PAGE);
        if !one_page || offset != 0 || protection & libc::PROT_WRITE != 0 {
            return Err(libc::EINVAL);
        }
        let flags = flags & !libc::MAP_TYPE | libc::MAP_SHARED;
        // Rather none than one that stands still for a while: the program would believe it.
        let page = self.notifier.counter().page().ok_or(libc::ENODEV)?;
        Ok(Mapped::File(page.file().as_raw_fd(), flags))
    }
}

/// Says why the device cannot be opened.
fn lacks(error: &dyn std::error::Error) -> Errno {
    complain("/dev/ummunotify", error);
    libc::ENODEV
}
