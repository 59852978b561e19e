//! Turns what becomes of a VM into events: what its control tells, and what has to be looked for.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use super::{Event, Events};
use crate::address_map::PAGE_SIZE;
use crate::control::{self, Control, VmState};

/// How often is looked for what nobody tells: whether a running VM waits for pages, and how much of RAM is there.
const INTERVAL: Duration = Duration::from_millis(100);

/// Fill progress is told in so many steps.
const STEPS: u64 = 10;

/// Of which VM events are told.
#[derive(Clone, Debug)]
pub struct WatchOptions {
    /// Where its RAM comes from.
    pub source_url: String,
    /// Its RAM in pages of 4 KiB.
    pub pages: u64,
    /// Shows how much of it is there, in bytes.
    pub bar: ProgressBar,
}

/// Tells a VM's events, until it is dropped.
#[derive(Debug)]
pub struct Watch {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Tells what becomes of the VM under `control`, in a thread of its own where that has to be looked for.
    ///
    /// # Errors
    /// There is no thread for it.
    pub fn start(control: &Control, events: &Events, options: WatchOptions) -> io::Result<Self> {
        let WatchOptions {
            source_url,
            pages,
            bar,
        } = options;
        let teller = Arc::new(Teller {
            events: events.clone(),
            source_url,
            pages,
            told: Mutex::new(Told {
                state: control.state(),
                lost: None,
            }),
            all_present: AtomicBool::new(false),
        });
        let observer = Arc::clone(&teller);
        control.observe(move |event| observer.hear(event));
        let (stop, stopped) = mpsc::channel();
        let control = control.clone();
        let thread = thread::Builder::new().name("watch".into()).spawn(move || {
            let mut steps = 0;
            while stopped.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                // First: when all is there nobody waits any more, and that is to be told too.
                let all_present = teller.all_present.load(SeqCst);
                teller.look(control.state());
                if all_present {
                    break;
                }
                if let Some(states) = control.pages() {
                    let settled = states.present + states.removed;
                    bar.set_position(settled * PAGE_SIZE);
                    // What an earlier run touched is all that a fill may be to load.
                    if bar.length().is_some_and(|length| bar.position() >= length) {
                        bar.finish_and_clear();
                    }
                    teller.progress(settled, &mut steps);
                }
            }
            bar.finish_and_clear();
        })?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that watches the VM panicked");
        }
    }
}

struct Teller {
    events: Events,
    source_url: String,
    pages: u64,
    told: Mutex<Told>,
    all_present: AtomicBool,
}

/// What was told last. Held while more is told, so that everything is told in order.
struct Told {
    state: VmState,
    /// Since when the page source is out of reach.
    lost: Option<Instant>,
}

impl Teller {
    /// The control tells something.
    fn hear(&self, event: &control::Event) {
        let mut told = self.told();
        match event {
            control::Event::State(state) => self.state(&mut told, *state),
            control::Event::AllPagesPresent => {
                self.all_present.store(true, SeqCst);
                self.events.tell(&Event::AllPagesPresent { total: self.pages });
            }
            control::Event::SourceLost(error) => {
                told.lost.get_or_insert_with(Instant::now);
                self.events.tell(&Event::SourceLost {
                    url: self.source_url.clone(),
                    error: error.clone(),
                });
            }
            control::Event::SourceBack => {
                if let Some(since) = told.lost.take() {
                    self.events.tell(&Event::SourceBack {
                        url: self.source_url.clone(),
                        lost_for: since.elapsed(),
                    });
                }
            }
            control::Event::Invalidated { cause, ranges } => self.events.tell(&Event::Invalidated {
                cause: cause.name(),
                ranges: ranges.iter().map(|range| (range.start, range.end)).collect(),
            }),
            // The end of the VM says why.
            control::Event::PagerFailed(_) => {}
        }
    }

    /// What was seen a moment ago. It may be outdated, so it counts only for what the control does not tell.
    fn look(&self, seen: VmState) {
        let mut told = self.told();
        let untold = [VmState::Running, VmState::WaitingForPages];
        if untold.contains(&seen) && untold.contains(&told.state) {
            self.state(&mut told, seen);
        }
    }

    fn state(&self, told: &mut Told, state: VmState) {
        let previous = std::mem::replace(&mut told.state, state);
        if previous != state {
            self.events.tell(&Event::State {
                state: state.name(),
                previous: previous.name(),
            });
        }
    }

    fn progress(&self, settled: u64, steps: &mut u64) {
        let _told = self.told();
        let reached = settled * STEPS / self.pages.max(1);
        if reached > *steps && !self.all_present.load(SeqCst) {
            *steps = reached;
            self.events.tell(&Event::FillProgress {
                settled,
                total: self.pages,
            });
        }
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
