//! The page-state table: what is known of every page of a region, and the only way to change it.
//!
//! ```text
//!                  cancel
//!            ┌──────────────────┐
//!            ▼                  │
//!   ┌────────────┐  claim  ┌────┴─────┐  arrive  ┌─────────┐
//!   │   Absent   ├────────►│ InFlight ├─────────►│ Present │◄─┐
//!   └──────┬─────┘         └────┬─────┘          └────┬────┘  │
//!          │ remove             │ remove              │remove │ touch
//!          │               ┌────▼────┐                │       │
//!          └──────────────►│ Removed │◄───────────────┘       │
//!                          └────┬────┘                        │
//!                               └─────────────────────────────┘
//! ```
//!
//! - *claim*: somebody (a fault or the background fill) is going to fetch the page. Of any number of claims one is
//!   granted; the others join it, and a page is fetched once. But who waits for a fill may wait for long, because that gives way to
//!   everybody: such a page may be *shared*, which is to be fetched by both, and who comes first installs it.
//! - *arrive*: its content was installed.
//! - *cancel*: it was not fetched after all and may be claimed again (where two fetch it: by the fill, and it stays in flight).
//! - *remove*: the memory was given back. A removed page reads zero and never comes from the source again; content that
//!   is still on its way finds the page `Removed` and is dropped.
//! - *touch*: a removed page was used again, and is an ordinary zero page.
//!
//! Memory of which some pages are there before it is served begins with these as `Present` (*preset*).
//!
//! Every transition is one compare-and-swap on one byte, so the table may be used by any number of threads and no page is
//! ever in two states. What the table cannot do is make a transition and the system call that goes with it one step;
//! [`crate::pager`] says how installing and removing exclude each other.
//!
//! `Present` and `Removed` are *settled*: from there no way leads back to the source. So whoever has seen a page settled
//! may rely on it, and memory all of whose pages are settled needs no pager.
//!
//! Memory is installed in units, of one page or (on huge pages) of 512, and what the kernel cannot install or drop apart
//! has one state: the table has one entry a unit. Counts are in pages all the same.
//!
//! A table can be shared with another process, which serves the region ([`crate::handoff`]). It is what outlives that process:
//! whoever takes over finds in it what is settled, and gives up what was in flight. The counts are each process' own, and
//! only right for the one that makes the transitions; the other one counts anew.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::AcqRel, Ordering::Acquire, Ordering::Release};

mod table;

use self::table::Table;
use crate::units::{PageIndex, PageRange};

/// The state of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PageState {
    /// Its content is still at the source.
    Absent = 0,
    /// It is being fetched.
    InFlight = 1,
    /// It is in memory.
    Present = 2,
    /// It was given back: it reads zero.
    Removed = 3,
}

/// How a present page came to be present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Arrival {
    /// Somebody waited for it.
    Demand = 0,
    /// The background fill fetched it.
    Prefetched = 1,
    /// It is all zero, whoever wanted it.
    Zero = 2,
    /// It was sent before anybody wanted it, and before the region was served.
    Pushed = 3,
}

/// Number of ways to arrive.
pub const ARRIVALS: usize = 4;

/// What became of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The caller is to fetch the page and to end with `arrive` or `cancel`.
    Granted,
    /// Somebody else is fetching it.
    Joined,
    /// There is nothing to fetch: the page is present.
    Present,
    /// There is nothing to fetch: the page was removed and reads zero.
    Removed,
}

/// How many pages are in which state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateCounts {
    /// Pages whose content is still at the source.
    pub absent: u64,
    /// Pages being fetched.
    pub in_flight: u64,
    /// Pages in memory.
    pub present: u64,
    /// Pages given back.
    pub removed: u64,
}

const STATE_BITS: u8 = 0b11;
const ARRIVAL_SHIFT: u8 = 2;
const FETCHER_SHIFT: u8 = 2;

/// Who fetches a page that is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Fetcher {
    Fill = 0,
    Demand = 1,
    Both = 2,
}

/// One page's byte: bits 0-1 the state, bits 2-3 how it arrived if it is present, and who fetches it if it is in flight.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Entry(u8);

impl Entry {
    const ABSENT: Self = Self(PageState::Absent as u8);
    const BY_FILL: Self = Self::in_flight(Fetcher::Fill);
    const BY_DEMAND: Self = Self::in_flight(Fetcher::Demand);
    const BY_BOTH: Self = Self::in_flight(Fetcher::Both);
    const REMOVED: Self = Self(PageState::Removed as u8);

    const fn in_flight(by: Fetcher) -> Self {
        Self(PageState::InFlight as u8 | ((by as u8) << FETCHER_SHIFT))
    }

    fn is_in_flight(self) -> bool {
        self.state() == PageState::InFlight
    }

    fn present(arrival: Arrival) -> Self {
        Self(PageState::Present as u8 | ((arrival as u8) << ARRIVAL_SHIFT))
    }

    fn state(self) -> PageState {
        match self.0 & STATE_BITS {
            0 => PageState::Absent,
            1 => PageState::InFlight,
            2 => PageState::Present,
            _ => PageState::Removed,
        }
    }

    fn is_settled(self) -> bool {
        matches!(self.state(), PageState::Present | PageState::Removed)
    }

    /// Below `ARRIVALS` whatever the byte is: another process may have written it.
    fn arrival(self) -> usize {
        usize::from(self.0 >> ARRIVAL_SHIFT).min(ARRIVALS - 1)
    }
}

/// The table: one byte a unit, so 256 KiB a GiB for single pages. Untouched parts of it cost no memory.
#[derive(Debug)]
pub struct PageStates {
    entries: Table,
    /// Pages a unit.
    unit: u64,
    /// Pages that are `Absent` or `InFlight`.
    unsettled: AtomicU64,
    /// Pages that are `InFlight`, for people: it lags behind the entries by a moment.
    in_flight: AtomicU64,
    removed: AtomicU64,
    /// Present pages by how they arrived, indexed by [`Arrival`].
    by_arrival: [AtomicU64; ARRIVALS],
}

impl PageStates {
    /// `pages` absent pages, installed `unit` at a time. `None`: there is no memory for the table.
    ///
    /// # Panics
    ///
    /// Where `pages` is not a multiple of `unit`.
    pub fn new(pages: u64, unit: u64) -> Option<Self> {
        assert!(
            unit > 0 && pages > 0 && pages.is_multiple_of(unit),
            "{pages} pages are no multiple of {unit}"
        );
        let count = usize::try_from(pages / unit).ok()?;
        Some(Self::of(Table::new(count)?, unit))
    }

    /// The same in memory that another process can be given, with the descriptor to give.
    ///
    /// # Panics
    ///
    /// Where `pages` is not a multiple of `unit`.
    pub fn new_shared(pages: u64, unit: u64) -> io::Result<(Self, OwnedFd)> {
        assert!(
            unit > 0 && pages > 0 && pages.is_multiple_of(unit),
            "{pages} pages are no multiple of {unit}"
        );
        let (table, descriptor) = Table::new_shared((pages / unit) as usize)?;
        Ok((Self::of(table, unit), descriptor))
    }

    /// A table that another process made for `pages` pages, as it is now. An error: it is not one of that size, or it could
    /// become shorter under this process.
    pub fn from_shared(descriptor: BorrowedFd<'_>, pages: u64, unit: u64) -> io::Result<Self> {
        if unit == 0 || pages == 0 || !pages.is_multiple_of(unit) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let states = Self::of(Table::from_shared(descriptor, (pages / unit) as usize)?, unit);
        states.recount();
        Ok(states)
    }

    fn of(entries: Table, unit: u64) -> Self {
        let pages = entries.len() as u64 * unit;
        Self {
            entries,
            unit,
            unsettled: AtomicU64::new(pages),
            in_flight: AtomicU64::new(0),
            removed: AtomicU64::new(0),
            by_arrival: Default::default(),
        }
    }

    /// Counts what there is, for a process that has not made all transitions itself. Transitions meanwhile may be missed.
    pub fn recount(&self) {
        let (mut unsettled, mut in_flight, mut removed) = (0, 0, 0);
        let mut by_arrival = [0; ARRIVALS];
        for entry in self.entries.iter() {
            let entry = Entry(entry.load(Acquire));
            unsettled += u64::from(!entry.is_settled());
            match entry.state() {
                PageState::Absent => {}
                PageState::InFlight => in_flight += 1,
                PageState::Present => by_arrival[entry.arrival()] += 1,
                PageState::Removed => removed += 1,
            }
        }
        self.in_flight.store(in_flight * self.unit, Release);
        self.removed.store(removed * self.unit, Release);
        for (count, counted) in self.by_arrival.iter().zip(by_arrival) {
            count.store(counted * self.unit, Release);
        }
        self.unsettled.store(unsettled * self.unit, Release);
    }

    /// The first page of each unit that is in flight, in order. When whoever fetched it is gone, it may have been installed, and nobody
    /// is left to say so: whoever takes over fetches it in his place, and it stays in flight until he has.
    pub fn in_flight(&self) -> Vec<PageIndex> {
        self.units(self.all())
            .map(|unit| unit.start)
            .filter(|page| self.get(*page) == PageState::InFlight)
            .collect()
    }

    /// The memory that the table takes when all of it is in use, in bytes.
    pub fn table_size(&self) -> u64 {
        self.entries.len() as u64
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.entries.len() as u64 * self.unit
    }

    /// All pages.
    pub fn all(&self) -> PageRange {
        PageRange::new(PageIndex(0), self.pages())
    }

    /// The state of `page`.
    pub fn get(&self, page: PageIndex) -> PageState {
        self.entry(page).state()
    }

    /// The unit that `page` belongs to.
    pub fn unit_of(&self, page: PageIndex) -> PageRange {
        PageRange::new(PageIndex(page.0 - page.0 % self.unit), self.unit)
    }

    /// The units that `range` touches, in order.
    pub fn units(&self, range: PageRange) -> impl Iterator<Item = PageRange> + use<> {
        let unit = self.unit;
        let first = range.start.0 - range.start.0 % unit;
        let end = range.end().0.min(self.pages());
        (first..end)
            .step_by(unit as usize)
            .map(move |start| PageRange::new(PageIndex(start), unit))
    }

    /// Wants `unit` to be fetched by the caller, for whom somebody waits.
    pub fn claim(&self, unit: PageRange) -> Claim {
        self.claim_by(unit, Entry::BY_DEMAND)
    }

    fn claim_by(&self, unit: PageRange, by: Entry) -> Claim {
        match self.change(unit, |entry| (entry == Entry::ABSENT).then_some(by)) {
            Ok(()) => Claim::Granted,
            Err(PageState::InFlight | PageState::Absent) => Claim::Joined,
            Err(PageState::Present) => Claim::Present,
            Err(PageState::Removed) => Claim::Removed,
        }
    }

    /// Wants `unit` to be fetched by the caller although a fill is fetching it. False: no fill is, or it is fetched twice already.
    pub fn share(&self, unit: PageRange) -> bool {
        self.change(unit, |entry| (entry == Entry::BY_FILL).then_some(Entry::BY_BOTH))
            .is_ok()
    }

    /// Whether somebody who has found `page` in flight, and is about to install it, may find that it is there: two were to install
    /// it, or had been and the other one has.
    pub fn may_be_there(&self, page: PageIndex) -> bool {
        let entry = self.entry(page);
        entry.is_settled() || entry == Entry::BY_BOTH
    }

    fn entry(&self, page: PageIndex) -> Entry {
        Entry(self.entries[(page.0 / self.unit) as usize].load(Acquire))
    }

    /// Claims for a fill the first run of absent units in `range`, at most `most` pages long (but at least a unit). `None`: there is
    /// none.
    pub fn claim_run(&self, range: PageRange, most: u64) -> Option<PageRange> {
        let mut units = self.units(range);
        let mut run = units.find(|unit| {
            // Looked at before it is claimed: a failed swap would take the line from who is working on it.
            self.get(unit.start) == PageState::Absent
                && self.claim_by(*unit, Entry::BY_FILL) == Claim::Granted
        })?;
        for unit in units {
            if run.count + unit.count > most || self.claim_by(unit, Entry::BY_FILL) != Claim::Granted {
                break;
            }
            run.count += unit.count;
        }
        Some(run)
    }

    /// The unit's content was installed. False: it was not in flight, which means that it was removed meanwhile.
    pub fn arrive(&self, unit: PageRange, arrival: Arrival) -> bool {
        self.change(unit, |entry| {
            entry.is_in_flight().then_some(Entry::present(arrival))
        })
        .is_ok()
    }

    /// The unit was not fetched after all; of two who fetch it, by one of them. False: it was not in flight, which means that it was
    /// removed meanwhile.
    pub fn cancel(&self, unit: PageRange) -> bool {
        self.change(unit, |entry| {
            // The other one may have installed it by now.
            let left = if entry == Entry::BY_BOTH {
                Entry::BY_DEMAND
            } else {
                Entry::ABSENT
            };
            entry.is_in_flight().then_some(left)
        })
        .is_ok()
    }

    /// The memory of `range` was given back. A unit of which only a part was given back stays what it is; false: one of those
    /// is not settled, so that the rest of it cannot be told from what was given back.
    pub fn remove(&self, range: PageRange) -> bool {
        let mut told_apart = true;
        for unit in self.units(range) {
            if unit.start >= range.start && unit.end() <= range.end() {
                // Refused where it is removed already.
                let _ = self.change(unit, |entry| (entry != Entry::REMOVED).then_some(Entry::REMOVED));
            } else {
                told_apart &= self.is_settled(unit.start);
            }
        }
        told_apart
    }

    /// A settled unit that had no memory was given zero pages: a removed one that was used again, or a present one whose
    /// memory was taken away without a word (a hole punched into the file behind it). False: it is not settled.
    pub fn touch(&self, unit: PageRange) -> bool {
        self.change(unit, |entry| {
            entry.is_settled().then_some(Entry::present(Arrival::Zero))
        })
        .is_ok()
    }

    /// What is known of `range` before the region is served: it is there.
    pub fn preset(&self, range: PageRange, arrival: Arrival) {
        for unit in self.units(range) {
            // Refused where it is settled.
            let _ = self.change(unit, |entry| {
                (entry == Entry::ABSENT).then_some(Entry::present(arrival))
            });
        }
    }

    /// What was [preset](Self::preset) is not there any more: its content is another's now, and still at the source. Only before the
    /// region is served: a page that was settled once it is stays so.
    pub fn forget(&self, range: PageRange) {
        for unit in self.units(range) {
            // Refused where it is absent.
            let _ = self.change(unit, |entry| entry.is_settled().then_some(Entry::ABSENT));
        }
    }

    /// Whatever is not settled is zero, and from now on the kernel's to fill: it counts as present zero pages, also where a
    /// fetch is still under way.
    pub fn settle_rest_as_zero(&self) {
        for unit in self.units(self.all()) {
            // Refused where it is settled.
            let _ = self.change(unit, |entry| {
                (!entry.is_settled()).then_some(Entry::present(Arrival::Zero))
            });
        }
    }

    /// Whether `page` is present or removed, for good.
    pub fn is_settled(&self, page: PageIndex) -> bool {
        self.entry(page).is_settled()
    }

    /// Whether every page is settled. Whoever settles the last page sees it after that.
    pub fn all_settled(&self) -> bool {
        self.unsettled.load(Acquire) == 0
    }

    /// The same by a look at each of them.
    pub fn is_all_settled(&self) -> bool {
        self.entries
            .iter()
            .all(|entry| Entry(entry.load(Acquire)).is_settled())
    }

    /// How many pages are in which state.
    pub fn counts(&self) -> StateCounts {
        let unsettled = self.unsettled.load(Acquire);
        let in_flight = self.in_flight.load(Acquire).min(unsettled);
        StateCounts {
            absent: unsettled - in_flight,
            in_flight,
            present: self
                .by_arrival
                .iter()
                .fold(0, |sum, count| sum.wrapping_add(count.load(Acquire))),
            removed: self.removed.load(Acquire),
        }
    }

    /// How many present pages arrived that way.
    pub fn arrived_by(&self, arrival: Arrival) -> u64 {
        self.by_arrival[arrival as usize].load(Acquire)
    }

    /// The one place where states change: swaps the unit's entry for what `next` says, or answers the state for which
    /// `next` has no successor.
    fn change(&self, unit: PageRange, next: impl Fn(Entry) -> Option<Entry>) -> Result<(), PageState> {
        debug_assert!(
            unit.count == self.unit && unit.start.0.is_multiple_of(self.unit),
            "{unit} is no unit"
        );
        let entry = &self.entries[(unit.start.0 / self.unit) as usize];
        let mut old = Entry(entry.load(Acquire));
        loop {
            let Some(new) = next(old) else {
                return Err(old.state());
            };
            match entry.compare_exchange_weak(old.0, new.0, AcqRel, Acquire) {
                Ok(_) => {
                    self.count(old, new);
                    return Ok(());
                }
                Err(now) => old = Entry(now),
            }
        }
    }

    fn count(&self, old: Entry, new: Entry) {
        // Two threads may count two changes of one page in either order: a count may wrap below zero for a moment.
        if let Some(count) = self.counter(new) {
            count.fetch_add(self.unit, AcqRel);
        }
        if let Some(count) = self.counter(old) {
            count.fetch_sub(self.unit, AcqRel);
        }
        // Last, and moved by settling alone: it falls to zero once.
        if !old.is_settled() && new.is_settled() {
            self.unsettled.fetch_sub(self.unit, AcqRel);
        }
        // Only before the region is served.
        if old.is_settled() && !new.is_settled() {
            self.unsettled.fetch_add(self.unit, AcqRel);
        }
    }

    fn counter(&self, entry: Entry) -> Option<&AtomicU64> {
        match entry.state() {
            PageState::Absent => None,
            PageState::InFlight => Some(&self.in_flight),
            PageState::Present => Some(&self.by_arrival[entry.arrival()]),
            PageState::Removed => Some(&self.removed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Fill,
        Claim,
        Share,
        Arrive(Arrival),
        Cancel,
        Remove,
        Touch,
        SettleRest,
    }

    fn steps() -> impl Strategy<Value = Vec<(u64, Step)>> {
        let step = prop_oneof![
            3 => Just(Step::Fill),
            3 => Just(Step::Claim),
            2 => Just(Step::Share),
            3 => prop_oneof![Just(Arrival::Demand), Just(Arrival::Prefetched), Just(Arrival::Zero)]
                .prop_map(Step::Arrive),
            1 => Just(Step::Cancel),
            2 => Just(Step::Remove),
            2 => Just(Step::Touch),
            1 => Just(Step::SettleRest),
        ];
        prop::collection::vec((0..8u64, step), 0..200)
    }

    /// What a reader of the diagram would expect, and nothing clever: a page after a step, and whether the step was granted.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Page {
        Absent,
        InFlight(Fetcher),
        Present(Arrival),
        Removed,
    }

    impl Page {
        #[allow(clippy::match_same_arms)] // an arm for each arrow
        fn after(self, step: Step) -> (Self, bool) {
            match (self, step) {
                (Self::Absent, Step::Fill) => (Self::InFlight(Fetcher::Fill), true),
                (Self::Absent, Step::Claim) => (Self::InFlight(Fetcher::Demand), true),
                (Self::InFlight(Fetcher::Fill), Step::Share) => (Self::InFlight(Fetcher::Both), true),
                (Self::InFlight(_), Step::Arrive(how)) => (Self::Present(how), true),
                (Self::InFlight(Fetcher::Both), Step::Cancel) => (Self::InFlight(Fetcher::Demand), true),
                (Self::InFlight(_), Step::Cancel) => (Self::Absent, true),
                (_, Step::Remove) => (Self::Removed, true),
                (Self::Present(_) | Self::Removed, Step::Touch)
                | (Self::Absent | Self::InFlight(_), Step::SettleRest) => {
                    (Self::Present(Arrival::Zero), true)
                }
                (_, Step::SettleRest) => (self, true),
                _ => (self, false),
            }
        }

        fn state(self) -> PageState {
            match self {
                Self::Absent => PageState::Absent,
                Self::InFlight(_) => PageState::InFlight,
                Self::Present(_) => PageState::Present,
                Self::Removed => PageState::Removed,
            }
        }
    }

    proptest! {
        #[test]
        fn every_sequence_of_steps_does_what_the_diagram_says(unit in prop_oneof![Just(1u64), Just(512)], steps in steps()) {
            let table = PageStates::new(8 * unit, unit).unwrap();
            let mut model = [Page::Absent; 8];
            for (index, step) in steps {
                let range = PageRange::new(PageIndex(index * unit), unit);
                let before = model[index as usize];
                let (next, answer) = before.after(step);
                let got = match step {
                    Step::Fill => table.claim_run(range, unit) == Some(range),
                    Step::Claim => table.claim(range) == Claim::Granted,
                    Step::Share => table.share(range),
                    Step::Arrive(how) => table.arrive(range, how),
                    Step::Cancel => table.cancel(range),
                    Step::Remove => table.remove(range),
                    Step::Touch => table.touch(range),
                    Step::SettleRest => {
                        table.settle_rest_as_zero();
                        for page in &mut model {
                            *page = page.after(step).0;
                        }
                        true
                    }
                };
                prop_assert_eq!(got, answer, "{:?} on {:?}", step, before);
                model[index as usize] = next;

                let of = |state| model.iter().filter(|page| page.state() == state).count() as u64 * unit;
                prop_assert_eq!(table.counts(), StateCounts {
                    absent: of(PageState::Absent), in_flight: of(PageState::InFlight),
                    present: of(PageState::Present), removed: of(PageState::Removed),
                });
                for how in [Arrival::Demand, Arrival::Prefetched, Arrival::Zero] {
                    let count = model.iter().filter(|page| **page == Page::Present(how)).count() as u64 * unit;
                    prop_assert_eq!(table.arrived_by(how), count);
                }
                for (index, page) in model.iter().enumerate() {
                    prop_assert_eq!(table.get(PageIndex(index as u64 * unit + unit - 1)), page.state());
                    let shared = matches!(page, Page::Present(_) | Page::Removed | Page::InFlight(Fetcher::Both));
                    prop_assert_eq!(table.may_be_there(PageIndex(index as u64 * unit)), shared);
                }
                prop_assert_eq!(table.all_settled(), of(PageState::Absent) + of(PageState::InFlight) == 0);
            }
        }

        #[test]
        fn runs_are_claimed_once_and_in_order(most in 1..20u64, taken in prop::collection::vec(0..64u64, 0..30)) {
            let table = PageStates::new(64, 1).unwrap();
            for page in &taken {
                table.claim(PageRange::single(PageIndex(*page)));
            }
            let mut got = Vec::new();
            while let Some(run) = table.claim_run(table.all(), most) {
                prop_assert!(run.count <= most);
                got.extend(run.pages().map(|page| page.0));
            }
            let free: Vec<u64> = (0..64).filter(|page| !taken.contains(page)).collect();
            prop_assert_eq!(got, free);
        }
    }

    /// Threads that claim, settle, cancel and remove at random: every page is fetched by one thread at a time, the counts
    /// come out right, and `all_settled` is never true while a page is not.
    #[test]
    fn threads_agree() {
        const PAGES: u64 = 64;
        for seed in 0..200u64 {
            let table = PageStates::new(PAGES, 1).unwrap();
            let owned: Vec<AtomicBool> = (0..PAGES).map(|_| AtomicBool::new(false)).collect();
            std::thread::scope(|scope| {
                for thread in 0..3u64 {
                    let (table, owned) = (&table, &owned);
                    scope.spawn(move || {
                        let mut random = seed * 3 + thread + 1;
                        while !table.all_settled() {
                            random ^= random << 13;
                            random ^= random >> 7;
                            random ^= random << 17;
                            let page = PageIndex(random % PAGES);
                            let unit = PageRange::single(page);
                            if random & (63 << 20) == 0 {
                                table.remove(unit);
                            } else if table.claim(unit) == Claim::Granted {
                                assert!(
                                    !owned[page.0 as usize].swap(true, Relaxed),
                                    "seed {seed}: claimed twice"
                                );
                                owned[page.0 as usize].store(false, Relaxed);
                                if random & (1 << 30) == 0 {
                                    table.cancel(unit);
                                } else {
                                    table.arrive(unit, Arrival::Demand);
                                }
                            }
                        }
                        for page in table.all().pages() {
                            assert!(table.is_settled(page), "seed {seed}: page {page} is not settled");
                        }
                    });
                }
            });
            let counts = table.counts();
            assert_eq!((counts.absent, counts.in_flight), (0, 0), "seed {seed}");
            assert_eq!(counts.present + counts.removed, PAGES, "seed {seed}");
            assert_eq!(table.arrived_by(Arrival::Demand), counts.present, "seed {seed}");
        }
    }
}
