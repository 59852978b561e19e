//! A notifier: what a program has in its hand, as it would have `/dev/ummunotify` open.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, epoll, eventfd, poll};
use rustix::process::{Pid, getpid};

use crate::choice::{Choice, OpenError, WatcherKind};
use crate::counter::Counter;
use crate::queue::{Event, Queue, RANGES_AT_MOST, Refused};
use crate::ranges::{AddressRange, Cookie};
use crate::watcher::{Noticed, Watcher};

/// Why nothing can be done: a notifier watches the address space of the process that opened it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the notifier belongs to the process that this one was forked from")]
pub struct Forked;

/// Why features were not exchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExchangeError {
    /// It was used before.
    #[error("features are exchanged before anything else")]
    InUse,
    /// Another process opened it.
    #[error(transparent)]
    Forked(#[from] Forked),
}

/// Why a range was not registered.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// Another range has this cookie.
    #[error("another range is registered with this cookie")]
    CookieInUse,
    /// Its end is before its start.
    #[error("the range ends before it starts")]
    EndsBeforeItStarts,
    /// There are too many.
    #[error("{RANGES_AT_MOST} ranges are registered, and there can be no more")]
    TooMany,
    /// The watcher cannot watch it.
    #[error("the range cannot be watched")]
    Watch(#[source] io::Error),
    /// Another process opened the notifier.
    #[error(transparent)]
    Forked(#[from] Forked),
}

/// Why a range was not unregistered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnregisterError {
    /// There is none.
    #[error("no range is registered with this cookie")]
    UnknownCookie,
    /// Another process opened the notifier.
    #[error(transparent)]
    Forked(#[from] Forked),
}

/// Why nothing was read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A signal came.
    #[error("a signal came before an event")]
    Interrupted,
    /// The wait failed.
    #[error("cannot wait for events")]
    Wait(#[source] io::Error),
    /// Another process opened the notifier.
    #[error(transparent)]
    Forked(#[from] Forked),
}

/// Registered ranges of this process' addresses, and the events of what invalidates them.
///
/// All methods may be called by any number of threads at a time. Closing is dropping.
///
/// ```
/// use ummunotify::{AddressRange, Choice, Cookie, Event, Notifier};
/// # use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
/// # let notifier = match Notifier::open(Choice::Auto) {
/// #     Ok(notifier) => notifier,
/// #     Err(error) => { println!("skipped: {error}"); return Ok(()); }
/// # };
/// # let map = || unsafe {
/// #     mmap_anonymous(std::ptr::null_mut(), 4096, ProtFlags::READ, MapFlags::PRIVATE | MapFlags::POPULATE)
/// # };
/// let buffer = map()?;
/// let start = buffer as u64;
/// notifier.register(AddressRange::new(start, start + 4096), Cookie(1))?;
/// let valid_at = notifier.counter().load();
///
/// // As long as the counter stands still, what was learnt of the mapping (where its pages are, say) is right.
/// assert_eq!(notifier.counter().load(), valid_at);
///
/// unsafe { munmap(buffer, 4096)? };
/// assert_ne!(notifier.counter().load(), valid_at);
/// let events = notifier.try_read(10)?;
/// assert!(matches!(events[0], Event::Invalidated { cookie: Cookie(1), .. }));
/// assert_eq!(events[1], Event::Last { counter: notifier.counter().load() });
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Notifier {
    state: Mutex<State>,
    counter: Counter,
    kind: WatcherKind,
    ready: Ready,
    owner: Pid,
}

pub(crate) struct State {
    pub(crate) queue: Queue,
    watcher: Box<dyn Watcher>,
    counter: Counter,
    /// Too late to exchange features.
    used: bool,
    /// Somebody may be waiting on the descriptor.
    awaited: bool,
    /// The eventfd is readable.
    announced: bool,
}

/// What a reader waits for.
struct Ready {
    /// Readable when one of the following is.
    either: OwnedFd,
    /// There are events in the queue. Besides, the watcher may have noticed something.
    queued: OwnedFd,
}

impl std::fmt::Debug for Notifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Notifier")
            .field("watcher", &self.kind)
            .finish_non_exhaustive()
    }
}

impl Notifier {
    /// Opens one for this process, with a watcher of the kind asked for.
    pub fn open(choice: Choice) -> Result<Self, OpenError> {
        let (kind, watcher, counter) = choice.open()?;
        Self::with(kind, watcher, counter).map_err(OpenError::Io)
    }

    pub(crate) fn with(kind: WatcherKind, watcher: Box<dyn Watcher>, counter: Counter) -> io::Result<Self> {
        let either = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let queued = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        for descriptor in [Some(queued.as_fd()), watcher.descriptor()].into_iter().flatten() {
            epoll::add(
                &either,
                descriptor,
                epoll::EventData::new_u64(0),
                epoll::EventFlags::IN,
            )?;
        }
        let state = State {
            queue: Queue::default(),
            watcher,
            counter: counter.clone(),
            used: false,
            awaited: false,
            announced: false,
        };
        Ok(Self {
            state: Mutex::new(state),
            counter,
            kind,
            ready: Ready { either, queued },
            owner: getpid(),
        })
    }

    /// Who notices invalidations.
    pub fn watcher(&self) -> WatcherKind {
        self.kind
    }

    /// The counter: as long as it has the value that the last [`Event::Last`] told, there are no new events.
    pub fn counter(&self) -> &Counter {
        &self.counter
    }

    /// Which of the features `wanted` there are: none so far. Only before anything else is done.
    pub fn exchange_features(&self, wanted: u32) -> Result<u32, ExchangeError> {
        /// None is defined.
        const FEATURES: u32 = 0;
        let mut state = self.lock()?;
        if std::mem::replace(&mut state.used, true) {
            return Err(ExchangeError::InUse);
        }
        Ok(wanted & FEATURES)
    }

    /// Watches a range of addresses. It may overlap others or be the same, but no two have one cookie.
    pub fn register(&self, range: AddressRange, cookie: Cookie) -> Result<(), RegisterError> {
        let mut state = self.lock()?;
        state.used = true;
        // What happened before is no event of this range.
        state.drain();
        let result = state.register(range, cookie);
        state.announce(&self.ready);
        result
    }

    /// Watches a range no longer. There is no more event of it, even if it was invalidated.
    pub fn unregister(&self, cookie: Cookie) -> Result<(), UnregisterError> {
        let mut state = self.lock()?;
        // What happened before may be an event of another range.
        state.drain();
        let result = match state.queue.unregister(cookie) {
            Some(range) => {
                let State { queue, watcher, .. } = &mut *state;
                watcher.unwatch(range, queue.ranges());
                Ok(())
            }
            None => Err(UnregisterError::UnknownCookie),
        };
        state.announce(&self.ready);
        result
    }

    /// Up to `max` events, none if there is none. When the last one has been told, [`Event::Last`] follows it.
    pub fn try_read(&self, max: usize) -> Result<Vec<Event>, Forked> {
        Ok(self.try_read_or_none(max)?.unwrap_or_default())
    }

    /// The same, but waits until there is an event.
    pub fn read(&self, max: usize) -> Result<Vec<Event>, ReadError> {
        loop {
            if let Some(events) = self.try_read_or_none(max)? {
                return Ok(events);
            }
            let descriptor = self.descriptor()?;
            match poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => return Err(ReadError::Interrupted),
                Err(errno) => return Err(ReadError::Wait(errno.into())),
            }
        }
    }

    /// A descriptor that poll, select and epoll say is readable while there is something to read. In rare cases (an
    /// invalidation in a range that was unregistered meanwhile) what there is to read is [`Event::Last`] alone.
    pub fn descriptor(&self) -> Result<BorrowedFd<'_>, Forked> {
        let mut state = self.lock()?;
        if !state.awaited {
            state.awaited = true;
            state.watcher.wake();
            state.drain();
            state.announce(&self.ready);
        }
        Ok(self.ready.either.as_fd())
    }

    /// As [`Notifier::try_read`], which cannot tell that there is no event from a `max` of 0.
    pub fn try_read_or_none(&self, max: usize) -> Result<Option<Vec<Event>>, Forked> {
        let mut state = self.lock()?;
        state.used = true;
        let counter = state.drain();
        if !state.queue.readable() {
            // What was drained may have been the reason to look.
            state.announce(&self.ready);
            return Ok(None);
        }
        let events = std::iter::from_fn(|| state.queue.next(counter))
            .take(max)
            .collect();
        state.announce(&self.ready);
        Ok(Some(events))
    }

    /// The state, if it is this process'. In a child made by fork it is a copy that nobody tells of anything, but what the
    /// watcher shares with the kernel is still the parent's.
    pub(crate) fn lock(&self) -> Result<MutexGuard<'_, State>, Forked> {
        if getpid() != self.owner {
            return Err(Forked);
        }
        Ok(self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Tells who waits what the queue has come to.
    pub(crate) fn announce(&self, state: &mut State) {
        state.announce(&self.ready);
    }
}

impl ExchangeError {
    /// The errno for it.
    pub fn errno(&self) -> i32 {
        match self {
            Self::InUse => libc::EINVAL,
            Self::Forked(_) => libc::ENODEV,
        }
    }
}

impl RegisterError {
    /// The errno for it.
    pub fn errno(&self) -> i32 {
        match self {
            Self::CookieInUse | Self::EndsBeforeItStarts => libc::EINVAL,
            Self::TooMany => libc::ENOMEM,
            Self::Watch(error) => error.raw_os_error().unwrap_or(libc::ENOMEM),
            Self::Forked(_) => libc::ENODEV,
        }
    }
}

impl UnregisterError {
    /// The errno for it.
    pub fn errno(&self) -> i32 {
        match self {
            Self::UnknownCookie => libc::EINVAL,
            Self::Forked(_) => libc::ENODEV,
        }
    }
}

impl ReadError {
    /// The errno for it.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Interrupted => libc::EINTR,
            Self::Wait(error) => error.raw_os_error().unwrap_or(libc::EIO),
            Self::Forked(_) => libc::ENODEV,
        }
    }
}

impl State {
    /// Puts what the watcher has noticed into the queue. The value of the counter at which that was all.
    fn drain(&mut self) -> u64 {
        /// A few are enough while others invalidate; without end they would keep this from an answer.
        const TIMES: usize = 10;
        let mut counter = 0;
        for _ in 0..TIMES {
            counter = self.drain_once();
            if counter == self.counter.load() {
                return counter;
            }
        }
        // What came meanwhile may be in the queue already. Who then finds that the counter has another value than the one he
        // is told reads again, and must not wait for an event that he has had.
        self.queue.owe_last();
        counter
    }

    fn drain_once(&mut self) -> u64 {
        let Self { queue, watcher, .. } = self;
        let mut moved = Vec::new();
        let counter = watcher.drain(&mut |noticed| {
            let hit = match noticed {
                Noticed::Invalidated(range) => queue.invalidate(range),
                Noticed::Moved { from, to } => {
                    moved.push(to);
                    queue.invalidate(from)
                }
                Noticed::Everything => {
                    queue.invalidate_everything();
                    false
                }
            };
            if !hit {
                // The counter moved for it all the same.
                queue.owe_last();
            }
        });
        for to in moved {
            watcher.unwatch(to, queue.ranges());
        }
        counter
    }

    fn register(&mut self, range: AddressRange, cookie: Cookie) -> Result<(), RegisterError> {
        self.queue
            .register(range, cookie)
            .map_err(|refused| match refused {
                Refused::CookieInUse => RegisterError::CookieInUse,
                Refused::EndsBeforeItStarts => RegisterError::EndsBeforeItStarts,
                Refused::TooMany => RegisterError::TooMany,
            })?;
        self.watcher.watch(range).map_err(|error| {
            self.queue.unregister(cookie);
            RegisterError::Watch(error)
        })
    }

    fn announce(&mut self, ready: &Ready) {
        let readable = self.queue.readable();
        if !self.awaited || readable == self.announced {
            return;
        }
        self.announced = readable;
        // Neither can fail: the eventfd is not full when 1 is added to 0, and not empty when it was announced.
        let _ = if readable {
            rustix::io::write(&ready.queued, &1_u64.to_ne_bytes())
        } else {
            rustix::io::read(&ready.queued, &mut [0; 8])
        };
    }
}
