//! The one loop on which everything but vCPUs and pages happens: the console, signals, and the end.
//!
//! It runs in the thread that makes it, until the VM ends. The first ending counts.

use std::{
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    sync::{Arc, Mutex, PoisonError},
};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use thiserror::Error;
use tracing::{info, warn};
use vmm_sys_util::{errno, eventfd::EventFd, signal::create_sigset};

use crate::{ending::Ending, signals};

/// Why there is no event loop, or no more.
#[derive(Debug, Error)]
pub enum EventLoopError {
    /// Waiting for events does not work.
    #[error("cannot wait for events")]
    Manager(#[source] event_manager::Error),
    /// No event descriptor.
    #[error("cannot create an event descriptor")]
    Event(#[source] std::io::Error),
    /// Signals cannot be taken as events.
    #[error("cannot take signals as events")]
    Signals(#[source] errno::Error),
}

/// The event loop.
pub struct EventLoop {
    manager: EventManager<Box<dyn MutEventSubscriber>>,
    stopper: Stopper,
}

impl std::fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventLoop")
            .field("stopper", &self.stopper)
            .finish_non_exhaustive()
    }
}

impl EventLoop {
    /// A loop that ends with [`Ending::Stopped`] at SIGTERM, and at SIGINT, SIGQUIT and SIGHUP unless they are ignored.
    ///
    /// The signals are blocked in the calling thread, and in those that it starts from now on. So this comes before any
    /// other thread is started; else a signal may reach one of those and end the program.
    pub fn new() -> Result<Self, EventLoopError> {
        let stopper = Stopper::new().map_err(EventLoopError::Event)?;
        let mut event_loop = Self {
            manager: EventManager::new().map_err(EventLoopError::Manager)?,
            stopper: stopper.clone(),
        };
        // A blocked signal is received even if it is ignored, as SIGINT is in the background of a shell and SIGHUP under nohup.
        let obeyed = |signal: &libc::c_int| *signal == libc::SIGTERM || !signals::is_ignored(*signal);
        let ending: Vec<libc::c_int> = signals::ENDING.into_iter().filter(obeyed).collect();
        let signals = block_and_receive(&ending).map_err(EventLoopError::Signals)?;
        event_loop.add_descriptor(signals, move |_| {
            info!("stopped by a signal");
            Some(Ending::Stopped)
        });
        let wake = stopper.shared.wake.try_clone().map_err(EventLoopError::Event)?;
        event_loop.add(Box::new(Descriptor {
            fd: wake,
            handler: |_: BorrowedFd| None,
            stopper,
        }));
        Ok(event_loop)
    }

    /// What ends the loop from other threads.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Lets the loop serve `subscriber`, and drop it when the loop is dropped.
    pub fn add(&mut self, subscriber: Box<dyn MutEventSubscriber>) {
        self.manager.add_subscriber(subscriber);
    }

    /// Calls `handler` whenever `fd` is readable or hung up; its answer ends the VM. It has to make `fd` unreadable again.
    pub fn add_descriptor<H>(&mut self, fd: OwnedFd, handler: H)
    where
        H: FnMut(BorrowedFd<'_>) -> Option<Ending> + 'static,
    {
        let stopper = self.stopper.clone();
        self.add(Box::new(Descriptor { fd, handler, stopper }));
    }

    /// Serves events until `done`, which is looked at whenever `wake` becomes readable, or until the VM ends.
    pub fn run_until(
        &mut self,
        wake: EventFd,
        done: impl Fn() -> bool,
    ) -> Result<Option<Ending>, EventLoopError> {
        let stopper = self.stopper.clone();
        let handler = |_: BorrowedFd<'_>| None;
        let wake = self.manager.add_subscriber(Box::new(Descriptor {
            fd: wake,
            handler,
            stopper,
        }));
        let ended = loop {
            if let Some(ending) = self.stopper.ending() {
                break Some(ending);
            }
            if done() {
                break None;
            }
            self.manager.run().map_err(EventLoopError::Manager)?;
        };
        // It stays readable.
        self.manager
            .remove_subscriber(wake)
            .map_err(EventLoopError::Manager)?;
        Ok(ended)
    }

    /// Serves events until the VM ends.
    pub fn run(&mut self) -> Result<Ending, EventLoopError> {
        loop {
            if let Some(ending) = self.stopper.ending() {
                return Ok(ending);
            }
            self.manager.run().map_err(EventLoopError::Manager)?;
        }
    }
}

/// Ends the event loop, from any thread.
#[derive(Clone, Debug)]
pub struct Stopper {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    ending: Mutex<Option<Ending>>,
    wake: EventFd,
}

impl Stopper {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            shared: Arc::new(Shared {
                ending: Mutex::new(None),
                wake: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            }),
        })
    }

    /// Ends the VM, unless it has ended already.
    pub fn end(&self, ending: Ending) {
        let mut current = self.shared.ending.lock().unwrap_or_else(PoisonError::into_inner);
        if current.is_none() {
            *current = Some(ending);
            // Written once, so the counter cannot be full. It is never read: an ended loop need not sleep.
            if let Err(error) = self.shared.wake.write(1) {
                warn!(%error, "cannot wake the event loop");
            }
        }
    }

    /// How the VM ended, if it has.
    pub fn ending(&self) -> Option<Ending> {
        self.shared
            .ending
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// A descriptor with a function.
struct Descriptor<F, H> {
    fd: F,
    handler: H,
    stopper: Stopper,
}

impl<F: AsRawFd, H: FnMut(BorrowedFd<'_>) -> Option<Ending>> MutEventSubscriber for Descriptor<F, H> {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        // SAFETY: the descriptor is open for as long as `self.fd` is.
        let fd = unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) };
        if let Some(ending) = (self.handler)(fd) {
            self.stopper.end(ending);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let fd: RawFd = self.fd.as_raw_fd();
        if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
            warn!(%error, fd, "a descriptor is not served");
        }
    }
}

/// Blocks signals in the calling thread and returns the descriptor that they are read from instead.
fn block_and_receive(signals: &[libc::c_int]) -> Result<OwnedFd, errno::Error> {
    signals::block(signals)?;
    let set = create_sigset(signals)?;
    // SAFETY: `set` is an initialised set.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
    if fd < 0 {
        return Err(errno::Error::last());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
