//! The thread that reads events, and what it has noted of them.
//!
//! A thread that unmaps watched memory waits for this one, whatever locks it holds: those of the notifier, those of the
//! allocator. So this one takes no lock and neither allocates nor frees.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64, fence};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};

use super::sys::{Message, Userfaultfd};
use crate::counter::OwnCounter;
use crate::ranges::AddressRange;
use crate::signals;
use crate::watcher::{Noticed, wait_for};

/// How many events can be noted before they are taken out.
const SLOTS: usize = 1 << 14;

/// What the thread needs.
#[derive(Debug)]
pub(super) struct Monitor {
    pub(super) uffd: Arc<Userfaultfd>,
    pub(super) counter: OwnCounter,
    pub(super) noted: Arc<Noted>,
    pub(super) ready: Arc<OwnedFd>,
    pub(super) stop: OwnedFd,
}

impl Monitor {
    /// Starts the thread, which takes no signals.
    pub(super) fn spawn(self) -> io::Result<JoinHandle<()>> {
        signals::without(|| {
            std::thread::Builder::new()
                .name("ummunotify".to_owned())
                .spawn(move || self.run())
        })
    }

    fn run(self) {
        loop {
            let mut descriptors = [
                PollFd::from_borrowed_fd(self.uffd.descriptor(), PollFlags::IN),
                PollFd::new(&self.stop, PollFlags::IN),
            ];
            if poll(&mut descriptors, None).is_err() {
                continue;
            }
            if !descriptors[1].revents().is_empty() {
                return;
            }
            if !descriptors[0].revents().contains(PollFlags::IN) {
                continue;
            }
            // Whoever waits for the event to be read is still in the call that invalidates. By reading it is let go, so both
            // the counter and the descriptor are first; who is woken by that waits until it is noted.
            self.counter.increment();
            fence(SeqCst);
            if self.noted.awaited.load(SeqCst) {
                let _ = rustix::io::write(&self.ready, &1_u64.to_ne_bytes());
            }
            // Who waited may have been killed: then there is nothing to read, and nothing was invalidated.
            let noticed = match self.uffd.read() {
                Some(Message::Gone(range)) => Noticed::Invalidated(range),
                Some(Message::Moved { from, to }) => Noticed::Moved { from, to },
                // The pages that both processes have are copied when one of them writes.
                Some(Message::Forked) => Noticed::Everything,
                None => Noticed::Invalidated(AddressRange::new(0, 0)),
            };
            self.noted.push(noticed);
        }
    }
}

/// Events that were noted and not yet taken out, by one thread that notes and one at a time that takes.
#[derive(Debug)]
pub(super) struct Noted {
    slots: Box<[Slot]>,
    /// Written to slots, or lost.
    handled: AtomicU64,
    /// Written to slots.
    written: AtomicU64,
    taken: AtomicU64,
    lost: AtomicU64,
    awaited: AtomicBool,
}

/// A [`Noticed`] in words: where, and where to.
#[derive(Debug, Default)]
struct Slot {
    kind: AtomicU64,
    from: [AtomicU64; 2],
    to: [AtomicU64; 2],
}

const INVALIDATED: u64 = 0;
const MOVED: u64 = 1;
const EVERYTHING: u64 = 2;

impl Noted {
    pub(super) fn new() -> Self {
        Self {
            slots: std::iter::repeat_with(Slot::default).take(SLOTS).collect(),
            handled: AtomicU64::new(0),
            written: AtomicU64::new(0),
            taken: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            awaited: AtomicBool::new(false),
        }
    }

    fn push(&self, noticed: Noticed) {
        let written = self.written.load(Relaxed);
        if written - self.taken.load(Acquire) == SLOTS as u64 {
            self.lost.fetch_add(1, AcqRel);
        } else {
            let none = AddressRange::new(0, 0);
            let (kind, from, to) = match noticed {
                Noticed::Invalidated(range) => (INVALIDATED, range, none),
                Noticed::Moved { from, to } => (MOVED, from, to),
                Noticed::Everything => (EVERYTHING, none, none),
            };
            let slot = &self.slots[written as usize % SLOTS];
            slot.kind.store(kind, Relaxed);
            for (words, range) in [(&slot.from, from), (&slot.to, to)] {
                words[0].store(range.start, Relaxed);
                words[1].store(range.end, Relaxed);
            }
            self.written.store(written + 1, Release);
        }
        self.handled.fetch_add(1, AcqRel);
    }

    /// Waits until so many events have been noted or lost. It takes the thread as long as reading one: it has moved the counter.
    pub(super) fn wait_for(&self, count: u64) {
        wait_for(|| (self.handled.load(Acquire) >= count).then_some(()));
    }

    /// Takes out what there is.
    pub(super) fn take_all(&self, taken: &mut dyn FnMut(Noticed)) {
        let end = self.written.load(Acquire);
        for at in self.taken.load(Relaxed)..end {
            let slot = &self.slots[at as usize % SLOTS];
            let range =
                |words: &[AtomicU64; 2]| AddressRange::new(words[0].load(Relaxed), words[1].load(Relaxed));
            taken(match slot.kind.load(Relaxed) {
                INVALIDATED => Noticed::Invalidated(range(&slot.from)),
                MOVED => Noticed::Moved {
                    from: range(&slot.from),
                    to: range(&slot.to),
                },
                _ => Noticed::Everything,
            });
            self.taken.store(at + 1, Release);
        }
    }

    pub(super) fn lost(&self) -> u64 {
        self.lost.load(Acquire)
    }

    /// From now on somebody waits. For what the thread noted before without waking him, he looks after this.
    pub(super) fn wake(&self) {
        self.awaited.store(true, SeqCst);
        // Either the thread, which has moved the counter before, sees this, or who looks now sees the counter.
        fence(SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_can_be_noted_is_counted_as_lost() {
        let noted = Noted::new();
        let range = |at| AddressRange::new(at, at + 1);
        for at in 0..SLOTS as u64 + 5 {
            noted.push(Noticed::Invalidated(range(at)));
        }
        assert_eq!(noted.lost(), 5);
        noted.wait_for(SLOTS as u64 + 5);
        let mut count = 0;
        noted.take_all(&mut |noticed| {
            assert_eq!(noticed, Noticed::Invalidated(range(count)));
            count += 1;
        });
        assert_eq!(count, SLOTS as u64);
        let moved = Noticed::Moved {
            from: range(1),
            to: range(2),
        };
        for noticed in [moved, Noticed::Everything] {
            noted.push(noticed);
            let mut all = Vec::new();
            noted.take_all(&mut |noticed| all.push(noticed));
            assert_eq!(all, [noticed]);
        }
    }
}
