//! What keeps servers from installing pages while the client reads events: the pager's placement lock, across processes.
//!
//! The races, without it: the client drops a page, and goes on as soon as its pager has read the event; before the pager has marked
//! the page as removed, a server finds it wanted and installs it, and what should read zero does not. Or the client unmaps the
//! memory or moves it, the event is read, and other memory that has a userfaultfd too comes to be where it was: the kernel
//! does not look whose it is, and a server installs a page there.
//!
//! So a server looks whether a page is wanted, and installs it, *inside*, and the client reads events and marks what they say while
//! the gate is closed and nobody is inside. Until an event is read, the kernel refuses to install anything. Memory that was moved is no
//! longer where servers know it to be: from then on they leave installing to the client.
//!
//! Each server has a slot, in which it says that it is inside. Of a process that was killed there the client's keeper empties the slots;
//! and a server that waits at the gate of a client that was killed sees that.

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use rustix::event::Timespec;
use rustix::thread::futex;

/// Servers that may install by themselves at a time; what others serve the client installs.
const SLOTS: usize = 64;

/// Values of [`Gate::closed`].
const OPEN: u32 = 0;
const CLOSED: u32 = 1;
/// And somebody waits until it is open.
const AWAITED: u32 = 2;

/// How often who waits looks whether the other side is there at all.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};

/// In memory that all who have a part of a device share.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Gate {
    closed: AtomicU32,
    moved: AtomicU32,
    slots: [Slot; SLOTS],
}

#[repr(C)]
#[derive(Debug)]
struct Slot {
    /// Whose it is; 0 is nobody.
    process: AtomicU32,
    /// Threads of that process that are inside.
    inside: AtomicU32,
}

/// A server's place at the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place(u32);

/// Nothing is read by the client while this is held.
#[derive(Debug)]
pub(super) struct Inside<'a> {
    gate: &'a Gate,
    slot: &'a Slot,
}

impl Gate {
    pub(super) fn new() -> Self {
        Self {
            closed: AtomicU32::new(OPEN),
            moved: AtomicU32::new(0),
            slots: [const {
                Slot {
                    process: AtomicU32::new(0),
                    inside: AtomicU32::new(0),
                }
            }; SLOTS],
        }
    }

    /// A place for a server of this process. `None`: all are taken.
    pub(super) fn take_place(&self) -> Option<Place> {
        let own = std::process::id();
        let is_free = |slot: &Slot| slot.process.compare_exchange(0, own, SeqCst, SeqCst).is_ok();
        self.slots.iter().position(is_free).map(|slot| Place(slot as u32))
    }

    /// It is for others now. Nobody is inside by it.
    pub(super) fn give_back(&self, place: Place) {
        self.slots[place.0 as usize].process.store(0, SeqCst);
    }

    /// Goes inside, when the gate is open. `None`: the client is gone, as `is_gone` says.
    pub(super) fn enter(&self, place: Place, is_gone: impl Fn() -> bool) -> Option<Inside<'_>> {
        let slot = &self.slots[place.0 as usize];
        loop {
            // Before it is looked at: either we see that it is closed, or who has closed it sees us.
            slot.inside.fetch_add(1, SeqCst);
            let inside = Inside { gate: self, slot };
            if self.closed.load(SeqCst) == OPEN {
                return Some(inside);
            }
            drop(inside);
            if self.closed.compare_exchange(CLOSED, AWAITED, SeqCst, SeqCst) != Err(OPEN) {
                let _ = futex::wait(&self.closed, futex::Flags::empty(), AWAITED, Some(&LOOK));
                if is_gone() {
                    return None;
                }
            }
        }
    }

    /// Whether the memory, or a part of it, is no longer where it was mapped. To be asked inside.
    pub(super) fn has_moved(&self) -> bool {
        self.moved.load(SeqCst) != 0
    }

    /// Servers install nothing more by themselves.
    pub(super) fn note_move(&self) {
        self.moved.store(1, SeqCst);
    }

    /// For the client: lets nobody inside and waits until nobody is, or until `is_over`.
    pub(super) fn close(&self, is_over: impl Fn() -> bool) {
        self.closed.store(CLOSED, SeqCst);
        for slot in &self.slots {
            loop {
                let inside = slot.inside.load(SeqCst);
                if inside == 0 || is_over() {
                    break;
                }
                let _ = futex::wait(&slot.inside, futex::Flags::empty(), inside, Some(&LOOK));
            }
        }
    }

    /// Lets servers go inside again.
    pub(super) fn open(&self) {
        if self.closed.swap(OPEN, SeqCst) == AWAITED {
            let _ = futex::wake(&self.closed, futex::Flags::empty(), i32::MAX as u32);
        }
    }

    /// A process has ended, wherever it was.
    pub(super) fn forget(&self, process: u32) {
        for slot in &self.slots {
            if slot.process.load(SeqCst) == process {
                slot.inside.store(0, SeqCst);
                slot.process.store(0, SeqCst);
                let _ = futex::wake(&slot.inside, futex::Flags::empty(), i32::MAX as u32);
            }
        }
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let last = self.slot.inside.fetch_sub(1, SeqCst) == 1;
        if last && self.gate.closed.load(SeqCst) != OPEN {
            let _ = futex::wake(&self.slot.inside, futex::Flags::empty(), i32::MAX as u32);
        }
    }
}

impl Place {
    /// As a number other than 0, for an atomic.
    pub(super) fn to_number(self) -> u32 {
        self.0 + 1
    }

    pub(super) fn from_number(number: u32) -> Option<Self> {
        number.checked_sub(1).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

    /// Servers go in and out; the client closes the gate, finds nobody inside, and opens it again.
    #[test]
    fn nobody_is_inside_while_it_is_closed() {
        const ROUNDS: u64 = 2000;
        let gate = Gate::new();
        let (inside, entered, ended) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let place = gate.take_place().unwrap();
                    while !ended.load(Relaxed) {
                        let _inside = gate.enter(place, || false).unwrap();
                        inside.fetch_add(1, SeqCst);
                        entered.fetch_add(1, Relaxed);
                        std::thread::yield_now();
                        inside.fetch_sub(1, SeqCst);
                    }
                    gate.give_back(place);
                });
            }
            for _ in 0..ROUNDS {
                let before = entered.load(Relaxed);
                gate.close(|| false);
                assert_eq!(inside.load(SeqCst), 0);
                std::thread::yield_now();
                assert_eq!(inside.load(SeqCst), 0);
                gate.open();
                while entered.load(Relaxed) == before {
                    std::thread::yield_now();
                }
            }
            ended.store(true, Relaxed);
        });
    }

    #[test]
    fn who_was_killed_inside_is_not_waited_for() {
        let gate = Gate::new();
        let place = gate.take_place().unwrap();
        std::mem::forget(gate.enter(place, || false));
        std::thread::scope(|scope| {
            let closing = scope.spawn(|| gate.close(|| false));
            while gate.closed.load(SeqCst) == OPEN {
                std::thread::yield_now();
            }
            assert!(!closing.is_finished(), "somebody is inside");
            gate.forget(std::process::id());
        });
        // Closed by who was killed then.
        assert!(gate.enter(place, || true).is_none());
        gate.open();
        assert!(gate.enter(place, || true).is_some());
    }

    #[test]
    fn places_run_out() {
        let gate = Gate::new();
        let places: Vec<Place> = std::iter::from_fn(|| gate.take_place()).collect();
        assert_eq!(places.len(), SLOTS);
        gate.give_back(places[7]);
        assert_eq!(gate.take_place(), Some(places[7]));
        assert_eq!(Place::from_number(places[0].to_number()), Some(places[0]));
        assert_eq!(Place::from_number(0), None);
    }
}
