//! The rings of all CPUs, and the counter that is behind them until somebody looks.
//!
//! The kernel moves the head of a CPU's ring in the middle of each invalidation. So who finds all heads where they were when
//! the rings were last read knows that there was none since; who does not reads the rings before he looks at the counter.

use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::ring::Ring;
use crate::counter::{Backlog, OwnCounter};
use crate::mapping::Mapping;
use crate::ranges::{AddressRange, Cookie, Ranges};
use crate::watcher::Noticed;

/// How many invalidations are remembered one by one until somebody asks.
const PENDING: usize = 1 << 14;

/// The rings, whoever looks at them.
#[derive(Debug)]
pub(super) struct Rings {
    gate: Gate,
    heads: Box<[NonNull<AtomicU64>]>,
    noted: Mutex<Noted>,
}

// SAFETY: the heads are in the mappings of the rings, which are as old and as long there; they are only read, atomically.
unsafe impl Send for Rings {}
// SAFETY: as for Send.
unsafe impl Sync for Rings {}

/// What has been read of the rings.
#[derive(Debug)]
pub(super) struct Noted {
    counter: OwnCounter,
    rings: Vec<Ring>,
    watched: Watched,
    pending: Vec<Noticed>,
}

/// How many rings there are, and the sum of the places up to which they have been read: two words in a page of which a
/// process made by fork has zeroes, since it does not have the rings either. There the counter stands still.
#[derive(Debug)]
struct Gate(Mapping);

impl Gate {
    fn word(&self, index: usize) -> &AtomicU64 {
        // SAFETY: in the page, which is mapped as long as `self` is, and used in this way alone.
        unsafe { self.0.start().cast::<AtomicU64>().add(index).as_ref() }
    }

    fn count(&self) -> &AtomicU64 {
        self.word(0)
    }

    fn read_up_to(&self) -> &AtomicU64 {
        self.word(1)
    }
}

/// The watched ranges. One that is watched several times is among them once.
#[derive(Debug, Default)]
struct Watched {
    ranges: Ranges,
    times: HashMap<AddressRange, u32>,
}

impl Watched {
    fn add(&mut self, range: AddressRange) {
        let times = self.times.entry(range).or_default();
        *times += 1;
        if *times == 1 {
            self.ranges.insert(range, Self::name(range));
        }
    }

    fn remove(&mut self, range: AddressRange) {
        let Some(times) = self.times.get_mut(&range) else {
            return;
        };
        *times -= 1;
        if *times == 0 {
            self.times.remove(&range);
            self.ranges.remove(range, Self::name(range));
        }
    }

    /// Tells apart ranges that start at one address.
    fn name(range: AddressRange) -> Cookie {
        Cookie(range.end)
    }
}

impl Rings {
    pub(super) fn new(rings: Vec<Ring>, counter: OwnCounter) -> std::io::Result<Self> {
        let heads = rings.iter().map(Ring::head).collect();
        let gate = Gate(Mapping::wiped_in_a_fork(2 * size_of::<AtomicU64>())?);
        gate.read_up_to().store(rings.iter().map(Ring::at).sum(), Release);
        gate.count().store(rings.len() as u64, Release);
        let noted = Noted {
            counter,
            rings,
            watched: Watched::default(),
            pending: Vec::with_capacity(PENDING),
        };
        Ok(Self {
            gate,
            heads,
            noted: Mutex::new(noted),
        })
    }

    /// What has been noted, with the rings read.
    pub(super) fn read(&self) -> MutexGuard<'_, Noted> {
        let mut noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        // They may have been closed meanwhile.
        if self.gate.count().load(Acquire) > 0 {
            noted.read_rings();
            let read_up_to = noted.rings.iter().map(Ring::at).sum();
            self.gate.read_up_to().store(read_up_to, Release);
        }
        noted
    }

    /// From now on the counter stands still.
    pub(super) fn close(&self) {
        let _noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        self.gate.count().store(0, Release);
        self.gate.read_up_to().store(0, Release);
    }
}

impl Backlog for Rings {
    #[inline]
    fn catch_up(&self) {
        // First, so that each head is at or after the place up to which its ring was read: then the sums are the same if and
        // only if all are there.
        let read_up_to = self.gate.read_up_to().load(Acquire);
        let count = self.gate.count().load(Acquire) as usize;
        let heads = self.heads[..count].iter();
        // SAFETY: mapped as long as `self` is, in the process in which the count is not 0.
        let sum: u64 = heads.map(|head| unsafe { head.as_ref() }.load(Acquire)).sum();
        if sum != read_up_to {
            drop(self.read());
        }
    }
}

impl Noted {
    fn read_rings(&mut self) {
        let Self {
            counter,
            rings,
            watched,
            pending,
        } = self;
        let mut note = |noticed| {
            counter.increment();
            // Of the last that there is room for nothing is said but that there were more.
            if pending.len() + 1 < PENDING {
                pending.push(noticed);
            } else if pending.len() < PENDING {
                pending.push(Noticed::Everything);
            }
        };
        for ring in rings {
            let complete = ring.drain(|range| {
                if watched.ranges.any_overlaps(range) {
                    note(Noticed::Invalidated(range));
                }
            });
            if !complete && !watched.ranges.is_empty() {
                note(Noticed::Everything);
            }
        }
    }

    /// From now on also watches a range.
    pub(super) fn watch(&mut self, range: AddressRange) {
        self.watched.add(range);
    }

    /// No longer watches it.
    pub(super) fn unwatch(&mut self, range: AddressRange) {
        self.watched.remove(range);
    }

    /// Whether there is something to take.
    pub(super) fn is_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Takes out what hit something; in exchange for an empty list.
    pub(super) fn take(&mut self, into: &mut Vec<Noticed>) {
        std::mem::swap(&mut self.pending, into);
    }

    /// A list for [`Noted::take`].
    pub(super) fn list() -> Vec<Noticed> {
        Vec::with_capacity(PENDING)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_watched_as_often_as_it_was_added() {
        let mut watched = Watched::default();
        let range = AddressRange::new(0x1000, 0x3000);
        // Another one that starts at the same address.
        let shorter = AddressRange::new(0x1000, 0x2000);
        for range in [range, range, shorter] {
            watched.add(range);
        }
        let hit = |watched: &Watched, at| watched.ranges.any_overlaps(AddressRange::new(at, at + 1));
        watched.remove(range);
        assert!(hit(&watched, 0x2fff));
        watched.remove(range);
        assert!(!hit(&watched, 0x2000) && hit(&watched, 0x1fff));
        watched.remove(range);
        watched.remove(shorter);
        assert!(watched.ranges.is_empty() && watched.times.is_empty());
    }
}
