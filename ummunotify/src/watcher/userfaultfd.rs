//! The watcher `userfaultfd`: the events of a userfaultfd whose registrations cause no faults.
//!
//! Ranges are registered for write-protection faults, and nothing is ever protected. What is left of userfaultfd are its
//! events: the thread that unmaps, moves or drops registered memory, or forks, waits until the event has been read. A thread
//! of our own ([`monitor`]) does nothing else than that, and moves the counter first.

mod monitor;
mod sys;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{Pid, getpid};

use self::monitor::{Monitor, Noted};
use self::sys::{Features, Userfaultfd};
use super::{Noticed, Watcher};
use crate::counter::{Counter, CounterPage, OwnCounter};
use crate::ranges::{AddressRange, Ranges};

const PAGE: u64 = 4096;

/// Why a userfaultfd cannot watch.
#[derive(Debug, thiserror::Error)]
pub enum UserfaultfdError {
    /// There is none.
    #[error("this kernel has no userfaultfd, or it is not for this process")]
    Open(#[source] io::Error),
    /// It lacks what is needed.
    #[error("this kernel's userfaultfd lacks write protection: it needs Linux 5.7")]
    Features,
    /// There are no descriptors, memory or threads.
    #[error("cannot start to watch")]
    Start(#[source] io::Error),
}

/// The watcher.
#[derive(Debug)]
pub(crate) struct UserfaultfdWatcher {
    uffd: Arc<Userfaultfd>,
    counter: CounterPage,
    noted: Arc<Noted>,
    /// How many events had been lost when it was last drained.
    lost: u64,
    /// Readable while something was noted since it was last drained, if anybody waits.
    ready: Arc<OwnedFd>,
    /// Ends the thread.
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
    owner: Pid,
}

impl UserfaultfdWatcher {
    /// Opens it, and starts its thread.
    pub(crate) fn open() -> Result<(Self, Counter), UserfaultfdError> {
        let offered = Userfaultfd::probe().map_err(UserfaultfdError::Open)?;
        if !offered.has(Features::NEEDED) {
            return Err(UserfaultfdError::Features);
        }
        let wanted = Features::NEEDED.and(offered.among(Features::USEFUL));
        // The kernel gives a forked process' userfaultfd only to who may trace processes.
        let uffd = Userfaultfd::open(wanted.and(offered.among(Features::FORK)))
            .or_else(|_| Userfaultfd::open(wanted))
            .map_err(UserfaultfdError::Open)?;
        Self::start(uffd).map_err(UserfaultfdError::Start)
    }

    fn start(uffd: Userfaultfd) -> io::Result<(Self, Counter)> {
        let (own, counter) = OwnCounter::new()?;
        let uffd = Arc::new(uffd);
        let noted = Arc::new(Noted::new());
        let descriptor = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let (ready, stop) = (Arc::new(descriptor()?), descriptor()?);
        let monitor = Monitor {
            uffd: Arc::clone(&uffd),
            counter: own,
            noted: Arc::clone(&noted),
            ready: Arc::clone(&ready),
            stop: stop.try_clone()?,
        };
        let thread = monitor.spawn()?;
        let watcher = Self {
            uffd,
            counter: counter.clone(),
            noted,
            lost: 0,
            ready,
            stop,
            thread: Some(thread),
            owner: getpid(),
        };
        Ok((watcher, Counter::of(counter)))
    }
}

/// The pages that have something of a range.
fn pages(range: AddressRange) -> AddressRange {
    let end = range.end.checked_next_multiple_of(PAGE).unwrap_or(!(PAGE - 1));
    AddressRange::new(range.start & !(PAGE - 1), end)
}

impl Watcher for UserfaultfdWatcher {
    fn watch(&mut self, range: AddressRange) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        self.uffd.register(pages(range))
    }

    fn unwatch(&mut self, range: AddressRange, ranges: &Ranges) {
        if range.is_empty() {
            return;
        }
        // What is not mapped any more, or was mapped anew, is not registered. And what stays registered is noticed in vain.
        let unregister = |start, end| {
            if start < end {
                let _ = self.uffd.unregister(AddressRange::new(start, end));
            }
        };
        let gone = pages(range);
        let mut at = gone.start;
        // They come in the order of their starts.
        ranges.overlapping(gone, |other, _| {
            let stays = pages(other);
            unregister(at, stays.start.min(gone.end));
            at = at.max(stays.end);
        });
        unregister(at, gone.end);
    }

    fn drain(&mut self, noticed: &mut dyn FnMut(Noticed)) -> u64 {
        // Before anything is taken out, so that what is noted meanwhile makes it readable again.
        let _ = rustix::io::read(&self.ready, &mut [0; 8]);
        let counter = self.counter.load();
        self.noted.wait_for(counter);
        self.noted.take_all(noticed);
        let lost = self.noted.lost();
        if lost != self.lost {
            self.lost = lost;
            noticed(Noticed::Everything);
        }
        counter
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some((*self.ready).as_fd())
    }

    fn wake(&mut self) {
        self.noted.wake();
    }
}

impl Drop for UserfaultfdWatcher {
    fn drop(&mut self) {
        // A forked process has no such thread; and the stop would be that of the parent's.
        if self.owner != getpid() {
            return;
        }
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
