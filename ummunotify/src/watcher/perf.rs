//! The watcher `perf`: KVM's MMU notifier, heard through perf's rings, where BPF is not permitted.
//!
//! As with the watcher `kvm` an empty VM has the kernel pass the tracepoint `kvm_unmap_hva_range` in each invalidation. What
//! happens there is no program's, but a record in a ring ([`ring`]), one ring for each CPU; and the head of a ring has moved
//! before the invalidation goes on. So the counter is one that has to be looked at through [`rings`], and no page that could
//! be mapped elsewhere is right by itself.
//!
//! There is no one ring: perf refuses an event that is neither of one CPU nor of one thread, a ring for an event that new
//! threads inherit on all CPUs, and an event of one CPU that writes to the ring of another's. The ring of a thread hears
//! nothing of what others do.

mod ring;
mod rings;
mod sys;
mod tracepoint;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::process::{Pid, getpid};

use self::ring::{Ring, SIZE};
use self::rings::{Noted, Rings};
use self::sys::{Event, Wakes};
use self::tracepoint::Tracepoint;
use super::{Noticed, Watcher, vm};
use crate::counter::{Counter, CounterPage, OwnCounter};
use crate::ranges::{AddressRange, Ranges};
use crate::signals;

/// Why KVM's notifier cannot be heard through perf.
#[derive(Debug, thiserror::Error)]
pub enum PerfError {
    /// There is no VM to be had.
    #[error("cannot make a VM: /dev/kvm is not there, or not for this user")]
    Vm(#[source] io::Error),
    /// There is no such tracepoint, or it is not for this user.
    #[error(
        "cannot look up the tracepoint kvm_unmap_hva_range: tracefs is not mounted on /sys/kernel/tracing, or not for this user"
    )]
    Tracepoint(#[source] io::Error),
    /// Perf is not for this process.
    #[error(
        "no permission to use perf on all processes: it needs CAP_PERFMON, or kernel.perf_event_paranoid at -1"
    )]
    Permission,
    /// An event cannot be opened.
    #[error("cannot open a perf event")]
    Open(#[source] io::Error),
    /// There are no descriptors, memory or threads.
    #[error("cannot start to watch")]
    Start(#[source] io::Error),
}

/// The watcher.
#[derive(Debug)]
pub(crate) struct Perf {
    rings: Arc<Rings>,
    page: CounterPage,
    events: Arc<[Events]>,
    /// Readable while something was noted since it was last drained, if anybody waits.
    ready: Arc<OwnedFd>,
    /// Ends the thread.
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
    /// For what is taken out.
    taken: Vec<Noticed>,
    owner: Pid,
    _vm: Arc<OwnedFd>,
}

/// Those of one CPU, which write to one ring.
#[derive(Debug)]
struct Events {
    /// Writes all the time, and wakes in time for the ring to be read before it is full.
    records: Event,
    /// Wakes too; switched on when somebody waits. That costs an invalidation an interrupt of its own CPU, some 15 us.
    wakes: Event,
}

impl Perf {
    /// Opens it: from now on invalidations are noticed.
    pub(crate) fn open() -> Result<(Self, Counter), PerfError> {
        let vm = vm::get().map_err(PerfError::Vm)?;
        let (events, rings) = Self::open_events()?;
        Self::start(events.into(), rings, vm).map_err(PerfError::Start)
    }

    /// The events of each CPU, and their ring.
    fn open_events() -> Result<(Vec<Events>, Vec<Ring>), PerfError> {
        let tracepoint = Tracepoint::find().map_err(PerfError::Tracepoint)?;
        let (mut events, mut rings) = (Vec::new(), Vec::new());
        for cpu in sys::cpus().map_err(PerfError::Start)? {
            let open = |wakes| Event::open(tracepoint.id, cpu, wakes).map_err(refused_event);
            let of_cpu = Events {
                records: open(Wakes::After(SIZE as u32 / 2))?,
                wakes: open(Wakes::Always)?,
            };
            rings.push(Ring::map(&of_cpu.records, tracepoint).map_err(PerfError::Start)?);
            of_cpu
                .wakes
                .write_to_ring_of(&of_cpu.records)
                .map_err(PerfError::Open)?;
            events.push(of_cpu);
        }
        Ok((events, rings))
    }

    fn start(events: Arc<[Events]>, rings: Vec<Ring>, vm: Arc<OwnedFd>) -> io::Result<(Self, Counter)> {
        let (own, page) = OwnCounter::new()?;
        let rings = Arc::new(Rings::new(rings, own)?);
        let counter = Counter::behind(page.clone(), rings.heads(), Arc::clone(&rings) as _);
        let descriptor = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let (ready, stop) = (Arc::new(descriptor()?), descriptor()?);
        let waker = Waker {
            events: Arc::clone(&events),
            rings: Arc::clone(&rings),
            ready: Arc::clone(&ready),
            stop: stop.try_clone()?,
        };
        let thread = waker.spawn()?;
        let watcher = Self {
            rings,
            page,
            events,
            ready,
            stop,
            thread: Some(thread),
            taken: Noted::list(),
            owner: getpid(),
            _vm: vm,
        };
        Ok((watcher, counter))
    }
}

fn refused_event(error: io::Error) -> PerfError {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => PerfError::Permission,
        _ => PerfError::Open(error),
    }
}

impl Watcher for Perf {
    fn watch(&mut self, range: AddressRange) -> io::Result<()> {
        self.rings.read().watch(range);
        Ok(())
    }

    fn unwatch(&mut self, range: AddressRange, _: &Ranges) {
        self.rings.read().unwatch(range);
    }

    fn drain(&mut self, noticed: &mut dyn FnMut(Noticed)) -> u64 {
        let counter = {
            let mut noted = self.rings.read();
            // With the lock, so that it is readable if and only if something is noted.
            let _ = rustix::io::read(&self.ready, &mut [0; 8]);
            noted.take(&mut self.taken);
            self.page.load()
        };
        for what in self.taken.drain(..) {
            noticed(what);
        }
        counter
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some((*self.ready).as_fd())
    }

    fn wake(&mut self) {
        for events in self.events.iter() {
            // It fails for no reason that an open event has.
            let _ = events.wakes.enable();
        }
        // An invalidation that passed the tracepoint when there was one event writes its record before this returns: who looks
        // after it finds that.
        sys::wait_for_all_cpus();
    }
}

impl Drop for Perf {
    fn drop(&mut self) {
        // A forked process has no such thread; and the stop would be that of the parent's.
        if self.owner != getpid() {
            return;
        }
        // Who still has the counter keeps the rings, but there will be nothing in them.
        self.rings.close();
        for events in self.events.iter() {
            let _ = events.records.disable();
            let _ = events.wakes.disable();
        }
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The thread that reads the rings when nobody looks, and tells who waits.
#[derive(Debug)]
struct Waker {
    events: Arc<[Events]>,
    rings: Arc<Rings>,
    ready: Arc<OwnedFd>,
    stop: OwnedFd,
}

impl Waker {
    /// Starts the thread, which takes no signals.
    fn spawn(self) -> io::Result<JoinHandle<()>> {
        signals::without(|| {
            std::thread::Builder::new()
                .name("ummunotify".to_owned())
                .spawn(move || self.run())
        })
    }

    fn run(self) {
        // Of a CPU that was taken away there will be nothing more, and poll would say so again and again.
        let mut there: Vec<bool> = vec![true; self.events.len()];
        loop {
            let rings = self.events.iter().zip(&there).filter(|(_, there)| **there);
            let mut descriptors: Vec<PollFd<'_>> = rings
                .map(|(events, _)| PollFd::new(&events.records, PollFlags::IN))
                .collect();
            descriptors.push(PollFd::new(&self.stop, PollFlags::IN));
            if poll(&mut descriptors, None).is_err() {
                continue;
            }
            let ended = |descriptor: &PollFd<'_>| {
                let revents = descriptor.revents();
                revents.intersects(PollFlags::HUP | PollFlags::ERR) && !revents.contains(PollFlags::IN)
            };
            if descriptors.pop().is_some_and(|stop| !stop.revents().is_empty()) {
                return;
            }
            for (there, descriptor) in there.iter_mut().filter(|there| **there).zip(&descriptors) {
                *there = !ended(descriptor);
            }
            let noted = self.rings.read();
            if noted.is_pending() {
                let _ = rustix::io::write(&self.ready, &1_u64.to_ne_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests;
