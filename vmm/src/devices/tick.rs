//! A reminder for the event loop to do a little later what cannot, or should not, be done at once.

use std::{
    os::fd::{AsRawFd, RawFd},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tracing::warn;
use vmm_sys_util::{errno, timerfd::TimerFd};

/// How much later: unnoticeable to somebody who types, and rare to the host.
const DELAY: Duration = Duration::from_millis(10);

/// A one-shot timer that many may set. Set, it stays set until it has expired.
#[derive(Debug)]
pub(super) struct Tick {
    timer: Mutex<TimerFd>,
    armed: AtomicBool,
}

impl Tick {
    pub(super) fn new() -> Result<Self, errno::Error> {
        Ok(Self {
            timer: Mutex::new(TimerFd::new()?),
            armed: AtomicBool::new(false),
        })
    }

    /// Sees to it that the descriptor becomes readable soon. Costs a system call only if it was not seen to already.
    pub(super) fn arm(&self) {
        if self.armed.swap(true, Ordering::SeqCst) {
            return;
        }
        let mut timer = self.timer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = timer.reset(DELAY, None) {
            warn!(%error, "cannot set a timer; console output may be late");
        }
    }

    /// To be called when the descriptor is readable, *before* the postponed work: what is postponed after this call finds
    /// the timer not set, and sets it again.
    pub(super) fn expired(&self) {
        let mut timer = self.timer.lock().unwrap_or_else(PoisonError::into_inner);
        // Does not wait: the timer has expired, and nobody sets it while `armed` is true.
        let _ = timer.wait();
        self.armed.store(false, Ordering::SeqCst);
    }
}

impl AsRawFd for Tick {
    fn as_raw_fd(&self) -> RawFd {
        self.timer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use std::{io, os::fd::BorrowedFd};

    fn readable(tick: &Tick, milliseconds: i64) -> io::Result<bool> {
        // SAFETY: the descriptor is open for as long as `tick` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(tick.as_raw_fd()) };
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: milliseconds * 1_000_000,
        };
        Ok(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout))? == 1)
    }

    #[test]
    fn expires_once_per_arming() {
        let tick = Tick::new().unwrap();
        assert!(!readable(&tick, 20).unwrap());
        tick.arm();
        tick.arm();
        assert!(readable(&tick, 500).unwrap());
        tick.expired();
        assert!(!readable(&tick, 20).unwrap());
        tick.arm();
        assert!(readable(&tick, 500).unwrap());
    }
}
