//! A part of a region that has a userfaultfd of its own, and where its pages are.

use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::{io, thread};

use crate::uffd::Userfaultfd;
use crate::units::{HostAddress, PAGE_SIZE, PageIndex, PageRange};

/// How often it is tried to unregister memory that others move at the same time.
const UNREGISTER_TRIES: u32 = 1000;

/// A part of a region with its own userfaultfd, and so with its own thread that reads faults.
#[derive(Debug)]
pub(super) struct Stripe {
    pub(super) uffd: Userfaultfd,
    pub(super) pages: PageRange,
    /// Where the pages are. Held to install, and held alone to read events: see the pager's documentation.
    placement: RwLock<Placement>,
    /// Nobody reads its events any more.
    pub(super) events_ended: AtomicBool,
}

impl Stripe {
    pub(super) fn new(uffd: Userfaultfd, placement: Placement) -> Self {
        Self {
            uffd,
            pages: placement.pages,
            placement: RwLock::new(placement),
            events_ended: AtomicBool::new(false),
        }
    }

    /// No event is read while this is held.
    pub(super) fn placement(&self) -> RwLockReadGuard<'_, Placement> {
        self.placement.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing is installed while this is held, but by who holds it.
    pub(super) fn placement_alone(&self) -> RwLockWriteGuard<'_, Placement> {
        self.placement.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes who waits at `addresses`, to look again.
    pub(super) fn wake(&self, addresses: Range<HostAddress>) {
        if let Err(error) = self.uffd.wake(addresses.clone()) {
            tracing::debug!(%error, ?addresses, "cannot wake");
        }
    }

    /// Takes its memory off its userfaultfd. The race: a piece is being moved meanwhile, and is not where it is thought to be;
    /// it is when the event has been read. (A piece that is moved after it was looked for, and found to be where it was, stays
    /// registered, and is answered by the fault thread for as long as that lives.)
    pub(super) fn unregister(&self) -> io::Result<()> {
        let mut tries = 0;
        loop {
            let placement = self.placement().clone();
            let mut result = Ok(());
            for piece in placement.pieces() {
                result = result.and(self.uffd.unregister(piece.addresses()));
                // The kernel wakes all waiters before it takes the memory off the userfaultfd. The race: a thread that faults
                // under the VMA lock in between goes to sleep after that, and nobody would wake it (seen on Linux 6.18).
                self.wake(piece.addresses());
            }
            tries += 1;
            if (result.is_ok() && *self.placement() == placement) || tries == UNREGISTER_TRIES {
                return result;
            }
            thread::yield_now();
        }
    }
}

/// Pages that lie together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) pages: PageRange,
    pub(super) start: HostAddress,
}

impl Piece {
    pub(super) fn addresses(&self) -> Range<HostAddress> {
        self.start..HostAddress(self.start.0 + self.pages.bytes() as u64)
    }

    /// The part of it that holds `pages`.
    fn of_pages(&self, pages: PageRange) -> Option<Self> {
        let part = self.pages.from(pages.start).clamp_to(pages.end());
        let offset = part.start.0.saturating_sub(self.pages.start.0) * PAGE_SIZE as u64;
        (part.count > 0).then_some(Self {
            pages: part,
            start: HostAddress(self.start.0 + offset),
        })
    }

    /// The part of it that lies at `addresses`.
    fn at(&self, addresses: &Range<HostAddress>) -> Option<Self> {
        let own = self.addresses();
        let (start, end) = (own.start.max(addresses.start), own.end.min(addresses.end));
        let first = self
            .pages
            .start
            .advance(PageIndex::containing(start.0.saturating_sub(own.start.0)).0);
        (start < end).then(|| Self {
            pages: PageRange::new(first, (end.0 - start.0) / PAGE_SIZE as u64),
            start,
        })
    }
}

/// Where pages are in the address space that they are served to: in one piece, until somebody there moves or unmaps some.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Placement {
    pages: PageRange,
    /// By page.
    pieces: Vec<Piece>,
}

impl Placement {
    /// `pages` in one piece from `start` on.
    pub(super) fn new(pages: PageRange, start: HostAddress) -> Self {
        Self {
            pages,
            pieces: vec![Piece { pages, start }],
        }
    }

    /// Where they are.
    pub(super) fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Where `pages` are; what of them is mapped nowhere is left out.
    pub(super) fn pieces_of(&self, pages: PageRange) -> impl Iterator<Item = Piece> {
        self.pieces.iter().filter_map(move |piece| piece.of_pages(pages))
    }

    /// Where the first of `pages` is, and as many as follow it there.
    pub(super) fn run_at(&self, pages: PageRange) -> Option<Piece> {
        self.pieces_of(pages)
            .next()
            .filter(|piece| piece.pages.start == pages.start)
    }

    /// The page at `address`.
    pub(super) fn page_at(&self, address: HostAddress) -> Option<PageIndex> {
        let byte = address..HostAddress(address.0 + 1);
        let piece = self.pieces.iter().find(|piece| {
            let own = piece.addresses();
            own.start <= byte.start && byte.end <= own.end
        })?;
        let offset = address.0 - piece.start.0;
        Some(piece.pages.start.advance(PageIndex::containing(offset).0))
    }

    /// The pages at `addresses`.
    pub(super) fn pages_at(&self, addresses: &Range<HostAddress>) -> Vec<PageRange> {
        let parts = self.pieces.iter().filter_map(|piece| piece.at(addresses));
        parts.map(|piece| piece.pages).collect()
    }

    /// Nothing of it is at `addresses` any more. Answers what was.
    pub(super) fn unmap(&mut self, addresses: &Range<HostAddress>) -> Vec<PageRange> {
        let gone = self.pages_at(addresses);
        let mut left = Vec::with_capacity(self.pieces.len() + 1);
        for piece in &self.pieces {
            let Some(gone) = piece.at(addresses) else {
                left.push(*piece);
                continue;
            };
            let before = PageRange::new(piece.pages.start, gone.pages.start.0 - piece.pages.start.0);
            let after = piece.pages.from(gone.pages.end());
            left.extend(
                [before, after]
                    .into_iter()
                    .filter_map(|pages| piece.of_pages(pages)),
            );
        }
        self.pieces = left;
        gone
    }

    /// What was from `from` on is from `to` on, for `length` bytes. What was there was unmapped before.
    pub(super) fn remap(&mut self, from: HostAddress, to: HostAddress, length: u64) {
        let addresses = from..HostAddress(from.0 + length);
        let moved: Vec<Piece> = self
            .pieces
            .iter()
            .filter_map(|piece| piece.at(&addresses))
            .collect();
        self.unmap(&addresses);
        self.pieces.extend(moved.into_iter().map(|piece| Piece {
            start: HostAddress(piece.start.0 - from.0 + to.0),
            ..piece
        }));
        self.pieces.sort_unstable_by_key(|piece| piece.pages.start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const PAGE: u64 = PAGE_SIZE as u64;

    /// Pages by their address, in pages; the plain model.
    fn model(placement: &Placement) -> BTreeMap<u64, u64> {
        let pieces = placement.pieces().iter();
        pieces
            .flat_map(|piece| {
                let at = piece.start.0 / PAGE;
                piece
                    .pages
                    .pages()
                    .enumerate()
                    .map(move |(offset, page)| (at + offset as u64, page.0))
            })
            .collect()
    }

    #[derive(Clone, Debug)]
    enum Step {
        Unmap(u64, u64),
        Remap(u64, u64, u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (90..130u64, 1..9u64).prop_map(|(at, count)| Step::Unmap(at, count)),
            // To addresses that are never used twice: the kernel unmaps what is in the way, and says so.
            (90..130u64, 1..9u64, 0..1000u64).prop_map(|(at, count, to)| Step::Remap(at, count, to)),
        ];
        prop::collection::vec(step, 0..12)
    }

    proptest! {
        #[test]
        fn pages_are_where_they_were_moved_to(steps in steps()) {
            let mut placement = Placement::new(PageRange::new(PageIndex(7), 20), HostAddress(100 * PAGE));
            let mut expected = model(&placement);
            for (turn, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Unmap(at, count) => {
                        let gone = placement.unmap(&(HostAddress(at * PAGE)..HostAddress((at + count) * PAGE)));
                        let mut pages: Vec<u64> = (at..at + count).filter_map(|at| expected.remove(&at)).collect();
                        pages.sort_unstable();
                        let mut gone: Vec<u64> = gone.iter().flat_map(|run| run.pages()).map(|page| page.0).collect();
                        gone.sort_unstable();
                        prop_assert_eq!(gone, pages);
                    }
                    Step::Remap(at, count, to) => {
                        let to = (turn as u64 + 1) * 10_000 + to;
                        placement.remap(HostAddress(at * PAGE), HostAddress(to * PAGE), count * PAGE);
                        let moved: Vec<_> = (at..at + count).filter_map(|at| Some((at, expected.remove(&at)?))).collect();
                        expected.extend(moved.into_iter().map(|(from, page)| (from - at + to, page)));
                    }
                }
                prop_assert_eq!(&model(&placement), &expected);
                for (at, page) in &expected {
                    prop_assert_eq!(placement.page_at(HostAddress(at * PAGE + 5)), Some(PageIndex(*page)));
                    let run = placement.run_at(PageRange::new(PageIndex(*page), 4)).unwrap();
                    prop_assert_eq!(run.start, HostAddress(at * PAGE));
                }
                for page in 0..40 {
                    let mapped = expected.values().any(|there| *there == page);
                    prop_assert_eq!(placement.run_at(PageRange::single(PageIndex(page))).is_some(), mapped);
                }
            }
        }
    }
}
