//! The rings of all CPUs, and the counter that is behind them until somebody looks.
//!
//! The kernel moves the head of a CPU's ring in the middle of each invalidation. So who finds all heads where they were when
//! the rings were last read knows that there was none since; who does not reads the rings before he looks at the counter.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::ring::Ring;
use crate::counter::{Backlog, Heads, OwnCounter};
use crate::ranges::{AddressRange, Cookie, Ranges};
use crate::watcher::Noticed;

/// How many invalidations are remembered one by one until somebody asks.
const PENDING: usize = 1 << 14;

/// The rings, whoever looks at them.
#[derive(Debug)]
pub(super) struct Rings {
    heads: Arc<Heads>,
    noted: Mutex<Noted>,
}

/// What has been read of the rings.
#[derive(Debug)]
pub(super) struct Noted {
    counter: OwnCounter,
    rings: Vec<Ring>,
    watched: Watched,
    pending: Vec<Noticed>,
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
    pub(super) fn new(rings: Vec<Ring>, counter: OwnCounter) -> io::Result<Self> {
        // SAFETY: the heads are in the mappings of the rings, which are there as long as the value that has both.
        let heads = unsafe { Heads::new(rings.iter().map(Ring::head).collect()) }?;
        heads.set_counted(rings.iter().map(Ring::at).sum());
        let noted = Noted {
            counter,
            rings,
            watched: Watched::default(),
            pending: Noted::list(),
        };
        Ok(Self {
            heads: Arc::new(heads),
            noted: Mutex::new(noted),
        })
    }

    /// The heads of the rings.
    pub(super) fn heads(&self) -> Arc<Heads> {
        Arc::clone(&self.heads)
    }

    /// What has been noted, with the rings read.
    pub(super) fn read(&self) -> MutexGuard<'_, Noted> {
        let mut noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        // They may have been closed meanwhile.
        if self.heads.are_open() {
            noted.read_rings();
            self.heads.set_counted(noted.rings.iter().map(Ring::at).sum());
        }
        noted
    }

    /// From now on the counter stands still.
    pub(super) fn close(&self) {
        let _noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        self.heads.close();
    }
}

impl Backlog for Rings {
    fn catch_up(&self) {
        drop(self.read());
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
