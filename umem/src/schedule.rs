//! Two classes of work: demand, for which somebody waits, and background, which waits for demand.
//!
//! Demand has a queue and reader threads of its own. Background passes a gate before each step, which is closed while any
//! demand is outstanding. A page that both want is one request, because a page is claimed once, unless background is slow
//! ([`crate::states`]); and background that has claimed pages no longer looks at the gate before it has delivered them, so demand
//! that joins it cannot wait for something that waits for demand.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::units::PageRange;

/// Demand that fits without allocating: as many threads can wait at a time.
const CAPACITY: usize = 1024;

/// Steps of background work under way at a time: at most as many as keep a connection busy. Demand that comes after them is
/// behind them where they share a link or a processor, and one for a page that is among them waits for it. So each demand
/// halves the number, and as many steps as it is, ended without demand, add one. It begins with the least: what a guest waits for
/// first, it waits for at the beginning.
const WINDOW: RangeInclusive<usize> = 2..=16;

/// Of threads that work for the background: a tenth of the weight of others where they compete for a CPU.
const BACKGROUND_NICENESS: i32 = 10;

/// The longest that there is.
const BACKGROUND_SLICE_NS: u64 = 100_000_000;

/// The shortest that there is.
const DEMAND_SLICE_NS: u64 = 100_000;

/// Lets other threads of this host go before the calling one, which works for what nobody waits for: it gets less of a CPU
/// where they compete, and whoever wakes up need not wait for the end of its slice (from Linux 6.12 on, where a thread with a
/// shorter slice goes first).
pub(crate) fn step_back() {
    set_attributes(
        libc::SCHED_BATCH,
        niceness().max(BACKGROUND_NICENESS),
        BACKGROUND_SLICE_NS,
    );
}

/// Lets the calling thread, for whose work a vCPU waits, go before others of this host when it wakes up, and for a short time
/// (from Linux 6.12 on; needs no permission).
pub fn step_forward() {
    set_attributes(libc::SCHED_OTHER, niceness(), DEMAND_SLICE_NS);
}

/// The calling thread's, which somebody may have wanted.
fn niceness() -> i32 {
    rustix::process::getpriority_process(None).unwrap_or(0)
}

/// `SCHED_FLAG_RESET_ON_FORK` (Linux include/uapi/linux/sched.h).
const RESET_ON_FORK: u64 = 1;

/// sched_setattr(2) for the calling thread. Where it fails, work is done all the same.
fn set_attributes(policy: i32, nice: i32, slice_ns: u64) {
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
        policy: policy as u32,
        // What it starts later is as any other thread: a vCPU, for example.
        flags: RESET_ON_FORK,
        nice,
        priority: 0,
        slice_ns,
        deadline: 0,
        period: 0,
    };
    // SAFETY: sched_setattr reads the structure, whose size it is told, and changes the calling thread alone.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if result != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "cannot change a thread's priority");
    }
}

#[derive(Debug)]
pub(crate) struct Schedule {
    inner: Mutex<Inner>,
    /// There is demand to take, or the end.
    demand: Condvar,
    /// The gate opens, or the end.
    gate: Condvar,
    /// There is progress, or the end.
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
    /// Those that ended without demand since `window` changed.
    calm: usize,
    /// Counts what background waits for.
    progress: u64,
    /// Threads that wait for `gate`: waking nobody is a system call all the same.
    at_gate: usize,
    /// Threads that wait for `background`.
    waiting: usize,
    stopped: bool,
}

impl Inner {
    /// Whether who waits at the gate may go on.
    fn has_room(&self) -> bool {
        self.outstanding == 0 && self.background_outstanding <= self.window / 2
    }
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
            window: *WINDOW.start(),
            calm: 0,
            progress: 0,
            at_gate: 0,
            waiting: 0,
            stopped: false,
        };
        Self {
            inner: Mutex::new(inner),
            demand: Condvar::new(),
            gate: Condvar::new(),
            background: Condvar::new(),
        }
    }

    /// Somebody waits for a page that is about to be asked for: closes the gate.
    pub(crate) fn begin_demand(&self) {
        let mut inner = self.lock();
        inner.outstanding += 1;
        inner.window = (inner.window / 2).max(*WINDOW.start());
        inner.calm = 0;
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
            inner.calm += 1;
            if inner.calm >= inner.window {
                inner.window = (inner.window + 1).min(*WINDOW.end());
                inner.calm = 0;
            }
        }
        inner.progress += 1;
        self.wake_background(inner);
    }

    /// The gate: waits until no demand is outstanding, and less than the window of background work. Who had to wait does so until
    /// half of the window is free: a thread that is woken for every step costs more than a small step itself.
    pub(crate) fn pass_gate(&self) -> Result<(), Stopped> {
        let mut inner = self.lock();
        if inner.background_outstanding >= inner.window || inner.outstanding > 0 {
            inner.at_gate += 1;
            while !inner.has_room() && !inner.stopped {
                inner = self.gate.wait(inner).unwrap_or_else(PoisonError::into_inner);
            }
            inner.at_gate -= 1;
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
        inner.waiting += 1;
        while inner.progress == seen && !inner.stopped {
            inner = self
                .background
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
        }
        inner.waiting -= 1;
        if inner.stopped { Err(Stopped) } else { Ok(()) }
    }

    fn wake_background(&self, inner: MutexGuard<'_, Inner>) {
        let (waiting, opens) = (inner.waiting > 0, inner.at_gate > 0 && inner.has_room());
        drop(inner);
        if waiting {
            self.background.notify_all();
        }
        if opens {
            self.gate.notify_all();
        }
    }

    /// Ends the work of all who wait here.
    pub(crate) fn stop(&self) {
        self.lock().stopped = true;
        self.demand.notify_all();
        self.gate.notify_all();
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

    /// The calling thread's policy, niceness and slice, as sched_getattr(2) tells them; the slice since Linux 6.12, before that 0.
    fn attributes() -> (i32, i32, u64) {
        let mut words = [0_u32; 12];
        // SAFETY: sched_getattr writes no more bytes than it is told that there is room for.
        let result = unsafe {
            libc::syscall(
                libc::SYS_sched_getattr,
                0,
                words.as_mut_ptr(),
                size_of_val(&words),
                0,
            )
        };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        let slice = u64::from(words[6]) | u64::from(words[7]) << 32;
        (words[1].cast_signed(), words[4].cast_signed(), slice)
    }

    #[test]
    fn background_steps_back_and_demand_forward() {
        let (background, demand) = thread::scope(|scope| {
            let background = scope.spawn(|| {
                step_back();
                attributes()
            });
            let demand = scope.spawn(|| {
                step_forward();
                attributes()
            });
            (background.join().unwrap(), demand.join().unwrap())
        });
        let nice = niceness();
        assert_eq!((background.0, background.1), (libc::SCHED_BATCH, nice.max(10)));
        assert_eq!((demand.0, demand.1), (libc::SCHED_OTHER, nice));
        if demand.2 != 0 {
            assert_eq!((background.2, demand.2), (BACKGROUND_SLICE_NS, DEMAND_SLICE_NS));
        }
    }

    #[test]
    fn threads_started_by_one_that_stepped_forward_are_as_any() {
        let usual = attributes();
        let child = thread::spawn(|| {
            step_forward();
            thread::spawn(attributes).join().unwrap()
        });
        assert_eq!(child.join().unwrap(), usual);
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
        assert_eq!(schedule.lock().window, 2);
        schedule.lock().window = 16;
        for _ in 0..5 {
            schedule.begin_demand();
            schedule.end_demand();
        }
        assert_eq!(schedule.lock().window, 2);
        for window in 2..=16 {
            for _ in 0..window {
                assert_eq!(schedule.lock().window, window);
                schedule.begin_background();
                schedule.end_background();
            }
        }
        assert_eq!(schedule.lock().window, 16);
    }

    #[test]
    fn who_waits_for_room_waits_for_half_the_window() {
        let schedule = Schedule::new();
        schedule.lock().window = 16;
        for _ in 0..16 {
            schedule.pass_gate().unwrap();
            schedule.begin_background();
        }
        thread::scope(|scope| {
            let gate = scope.spawn(|| {
                schedule.pass_gate().unwrap();
                schedule.lock().background_outstanding
            });
            while schedule.lock().at_gate == 0 {
                thread::yield_now();
            }
            for _ in 0..8 {
                schedule.end_background();
            }
            assert_eq!(gate.join().unwrap(), 8);
        });
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
