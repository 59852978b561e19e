//! Two classes of work: demand, for which somebody waits, and background, which waits for demand.
//!
//! Demand has a queue and reader threads of its own. Background passes a gate before each step, which is closed while any
//! demand is outstanding. A page that both want is one request, because a page is claimed once ([`crate::states`]); and
//! background that has claimed pages no longer looks at the gate before it has delivered them, so demand that joins it
//! cannot wait for something that waits for demand.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::units::PageRange;

/// Demand that fits without allocating: as many threads can wait at a time.
const CAPACITY: usize = 1024;

/// Steps of background work under way at a time: at most as many as keep a connection busy. Demand that comes after them is
/// behind them where they share a link or a processor, so each demand halves the number, and each step that ends without demand
/// adds one.
const WINDOW: RangeInclusive<usize> = 2..=16;

/// Of threads that work for the background: a tenth of the weight of others where they compete for a CPU.
const BACKGROUND_NICENESS: i32 = 10;

/// The longest that there is.
const BACKGROUND_SLICE_NS: u64 = 100_000_000;

/// Lets other threads of this host go before the calling one, which works for what nobody waits for: it gets less of a CPU
/// where they compete, and whoever wakes up need not wait for the end of its slice (from Linux 6.12 on, where a thread with a
/// shorter slice goes first).
pub(crate) fn step_back() {
    // As in sched_setattr(2).
    #[repr(C)]
    struct Attributes {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        slice_ns: u64,
        deadline: u64,
        period: u64,
    }
    let attributes = Attributes {
        size: size_of::<Attributes>() as u32,
        policy: libc::SCHED_BATCH as u32,
        flags: 0,
        nice: BACKGROUND_NICENESS,
        priority: 0,
        slice_ns: BACKGROUND_SLICE_NS,
        deadline: 0,
        period: 0,
    };
    // SAFETY: sched_setattr reads the structure, whose size it is told, and changes the calling thread alone.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if result != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "cannot lower a thread's priority");
    }
}

#[derive(Debug)]
pub(crate) struct Schedule {
    inner: Mutex<Inner>,
    /// There is demand to take, or the end.
    demand: Condvar,
    /// Nothing is outstanding any more, or there is progress, or the end.
    background: Condvar,
}

#[derive(Debug)]
struct Inner {
    queue: VecDeque<PageRange>,
    /// Demand that has begun and not ended.
    outstanding: usize,
    /// Steps of background work that have begun and not ended.
    background_outstanding: usize,
    /// How many there may be.
    window: usize,
    /// Counts what background waits for.
    progress: u64,
    /// Threads that wait for `background`: waking nobody is a system call all the same.
    waiting: usize,
    stopped: bool,
}

/// The work is to end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Stopped;

impl Schedule {
    pub(crate) fn new() -> Self {
        let inner = Inner {
            queue: VecDeque::with_capacity(CAPACITY),
            outstanding: 0,
            background_outstanding: 0,
            window: *WINDOW.end(),
            progress: 0,
            waiting: 0,
            stopped: false,
        };
        Self {
            inner: Mutex::new(inner),
            demand: Condvar::new(),
            background: Condvar::new(),
        }
    }

    /// Somebody waits for a page that is about to be asked for: closes the gate.
    pub(crate) fn begin_demand(&self) {
        let mut inner = self.lock();
        inner.outstanding += 1;
        inner.window = (inner.window / 2).max(*WINDOW.start());
    }

    /// Hands a claimed unit, whose demand has begun, to the readers.
    pub(crate) fn enqueue(&self, unit: PageRange) {
        self.lock().queue.push_back(unit);
        self.demand.notify_one();
    }

    /// Waits for demand. Every unit taken ends with `end_demand`.
    pub(crate) fn take(&self) -> Result<PageRange, Stopped> {
        let mut inner = self.lock();
        loop {
            if inner.stopped {
                return Err(Stopped);
            }
            if let Some(unit) = inner.queue.pop_front() {
                return Ok(unit);
            }
            inner = self.demand.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Demand that was begun has been served, or never will be.
    pub(crate) fn end_demand(&self) {
        let mut inner = self.lock();
        inner.outstanding -= 1;
        inner.progress += 1;
        self.wake_background(inner);
    }

    /// A step of background work was asked for.
    pub(crate) fn begin_background(&self) {
        self.lock().background_outstanding += 1;
    }

    /// A step of background work is done.
    pub(crate) fn end_background(&self) {
        let mut inner = self.lock();
        inner.background_outstanding -= 1;
        if inner.outstanding == 0 {
            inner.window = (inner.window + 1).min(*WINDOW.end());
        }
        inner.progress += 1;
        self.wake_background(inner);
    }

    /// The gate: waits until no demand is outstanding, and less than the window of background work.
    pub(crate) fn pass_gate(&self) -> Result<(), Stopped> {
        let mut inner = self.lock();
        while (inner.outstanding > 0 || inner.background_outstanding >= inner.window) && !inner.stopped {
            inner = self.wait_in_background(inner);
        }
        if inner.stopped { Err(Stopped) } else { Ok(()) }
    }

    /// Somebody may find settled now what was not before.
    pub(crate) fn note_progress(&self) {
        let mut inner = self.lock();
        inner.progress += 1;
        self.wake_background(inner);
    }

    /// How much progress was noted so far, to be given to [`Self::wait_for_progress`].
    pub(crate) fn progress(&self) -> u64 {
        self.lock().progress
    }

    /// Waits until more progress has been noted than `seen`.
    pub(crate) fn wait_for_progress(&self, seen: u64) -> Result<(), Stopped> {
        let mut inner = self.lock();
        while inner.progress == seen && !inner.stopped {
            inner = self.wait_in_background(inner);
        }
        if inner.stopped { Err(Stopped) } else { Ok(()) }
    }

    fn wait_in_background<'a>(&self, mut inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        inner.waiting += 1;
        let mut inner = self
            .background
            .wait(inner)
            .unwrap_or_else(PoisonError::into_inner);
        inner.waiting -= 1;
        inner
    }

    fn wake_background(&self, inner: MutexGuard<'_, Inner>) {
        let waiting = inner.waiting > 0;
        drop(inner);
        if waiting {
            self.background.notify_all();
        }
    }

    /// Ends the work of all who wait here.
    pub(crate) fn stop(&self) {
        self.lock().stopped = true;
        self.demand.notify_all();
        self.background.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::PageIndex;
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
    use std::thread;

    fn unit(page: u64) -> PageRange {
        PageRange::single(PageIndex(page))
    }

    fn submit(schedule: &Schedule, page: u64) {
        schedule.begin_demand();
        schedule.enqueue(unit(page));
    }

    #[test]
    fn demand_is_taken_in_order() {
        let schedule = Schedule::new();
        (0..3).for_each(|page| submit(&schedule, page));
        assert_eq!(
            (0..3).map(|_| schedule.take()).collect::<Vec<_>>(),
            (0..3).map(|p| Ok(unit(p))).collect::<Vec<_>>()
        );
    }

    #[test]
    fn background_waits_for_all_demand() {
        let schedule = Schedule::new();
        schedule.pass_gate().unwrap();
        submit(&schedule, 0);
        submit(&schedule, 1);
        let served = AtomicBool::new(false);
        thread::scope(|scope| {
            let gate = scope.spawn(|| {
                schedule.pass_gate().unwrap();
                assert!(
                    served.load(SeqCst),
                    "the gate opened before the last demand was served"
                );
            });
            schedule.take().unwrap();
            schedule.end_demand();
            schedule.take().unwrap();
            served.store(true, SeqCst);
            schedule.end_demand();
            gate.join().unwrap();
        });
    }

    #[test]
    fn the_window_shrinks_with_demand_and_grows_without() {
        let schedule = Schedule::new();
        for _ in 0..5 {
            schedule.begin_demand();
            schedule.end_demand();
        }
        assert_eq!(schedule.lock().window, 2);
        for ended in 0..20 {
            schedule.begin_background();
            schedule.end_background();
            assert_eq!(schedule.lock().window, (3 + ended).min(16));
        }
    }

    #[test]
    fn progress_that_came_first_is_not_missed() {
        let schedule = Schedule::new();
        let seen = schedule.progress();
        submit(&schedule, 0);
        schedule.take().unwrap();
        schedule.end_demand();
        schedule.wait_for_progress(seen).unwrap();
    }

    #[test]
    fn the_end_ends_every_wait() {
        let schedule = Schedule::new();
        thread::scope(|scope| {
            let waits = [
                scope.spawn(|| schedule.take().map(|_| ())),
                scope.spawn(|| schedule.wait_for_progress(0)),
            ];
            schedule.stop();
            for wait in waits {
                assert_eq!(wait.join().unwrap(), Err(Stopped));
            }
        });
    }
}
