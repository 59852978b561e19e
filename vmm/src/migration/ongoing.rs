//! A VM that is being sent, as those see it who want something of that.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::MigrationOptions;
use super::status::{Phase, Status};
use crate::report::milliseconds;

/// A migration that goes on, in the hands of other threads.
#[derive(Debug)]
pub(crate) struct Ongoing {
    pub(super) began: Instant,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    status: Status,
    cancelled: bool,
    taken_back: bool,
}

/// Why a migration is not cancelled, or the VM not taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TooLate {
    /// It was handed over: it may run there.
    InDoubt,
    /// It runs there.
    Away,
    /// It is not in doubt.
    NotInDoubt,
    /// The token is another one's.
    WrongToken,
}

impl Ongoing {
    pub(crate) fn new(options: &MigrationOptions, ram_bytes: u64) -> Self {
        Self {
            began: Instant::now(),
            state: Mutex::new(State {
                status: Status {
                    direction: "out",
                    mode: options.mode,
                    phase: Phase::Preparing,
                    peer: options.destination.to_string(),
                    token: String::new(),
                    round: 0,
                    bytes_total: ram_bytes,
                    bytes_sent: 0,
                    bytes_left: ram_bytes,
                    dirty_rate: 0,
                    bandwidth: 0,
                    expected_downtime_ms: None,
                    downtime_ms: None,
                    elapsed_ms: 0.0,
                },
                cancelled: false,
                taken_back: false,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn status(&self) -> Status {
        let mut status = self.lock().status.clone();
        status.elapsed_ms = milliseconds(self.began.elapsed());
        status
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.lock().status);
    }

    /// The VM is to stay.
    pub(crate) fn cancel(&self) -> Result<(), TooLate> {
        let mut state = self.lock();
        match state.status.phase {
            Phase::InDoubt => Err(TooLate::InDoubt),
            Phase::Postcopy | Phase::Complete => Err(TooLate::Away),
            _ => {
                state.cancelled = true;
                Ok(())
            }
        }
    }

    /// The VM is to run here after all: the other side is known not to run it, now or later.
    pub(crate) fn take_back(&self, token: &str) -> Result<(), TooLate> {
        let mut state = self.lock();
        match state.status.phase {
            Phase::InDoubt if state.status.token != token => Err(TooLate::WrongToken),
            Phase::InDoubt => {
                state.taken_back = true;
                Ok(())
            }
            Phase::Postcopy | Phase::Complete => Err(TooLate::Away),
            _ => Err(TooLate::NotInDoubt),
        }
    }

    /// Whether the VM is to stay.
    pub(super) fn is_cancelled(&self) -> bool {
        self.lock().cancelled
    }

    /// Whether it is to run here after all.
    pub(super) fn is_taken_back(&self) -> bool {
        self.lock().taken_back
    }

    /// Nobody cancels any more. False: somebody has.
    pub(super) fn commit(&self) -> bool {
        let mut state = self.lock();
        if !state.cancelled {
            state.status.phase = Phase::InDoubt;
        }
        !state.cancelled
    }

    /// The destination runs it: nobody takes it back any more, and whoever did, and was wrong, has not made a second one of it.
    pub(super) fn hand_over(&self, downtime: Duration) {
        let mut state = self.lock();
        state.status.phase = Phase::Postcopy;
        state.status.downtime_ms = Some(milliseconds(downtime));
    }
}
