//! What a pager's threads share, and what they do with it.

use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::AcqRel, Ordering::Acquire, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use rustix::fd::OwnedFd;
use rustix::thread::CpuSet;

use super::install::Fetched;
use super::stripe::Stripe;
use super::{FaultClass, Notice, PagerError, TouchRecord};
use crate::causes::chain;
use crate::collapse::Collapser;
use crate::region::{PageSize, Region};
use crate::schedule::{Schedule, step_forward};
use crate::source::{Class, Content, Inbox, PageSink, PageSource, SourceError};
use crate::states::{Arrival, PageState, PageStates};
use crate::stats::Histogram;
use crate::units::{PageIndex, PageRange};

/// Somebody waits for a unit that another thread is fetching.
pub(super) struct Waiting {
    pub(super) unit: PageIndex,
    pub(super) since: Instant,
    pub(super) class: FaultClass,
}

pub(super) type Observer = Box<dyn Fn(Notice) + Send + Sync>;

pub(super) struct Shared {
    /// By page, all of one length but the last. Before the region, whose end would wait for its own event to be read.
    pub(super) stripes: Vec<Stripe>,
    /// The region, if it is this process' own.
    pub(super) region: Option<Arc<Region>>,
    /// What of it is to become huge pages again.
    pub(super) collapser: Collapser,
    pub(super) page_size: PageSize,
    pub(super) source: Arc<dyn PageSource>,
    pub(super) states: Arc<PageStates>,
    /// Units that a pager before this one may have installed, or not; sorted.
    pub(super) uncertain: Vec<PageIndex>,
    /// Pages that the kernel held when the pager began.
    pub(super) populated_at_start: OnceLock<u64>,
    pub(super) schedule: Schedule,
    pub(super) waiting: Mutex<Vec<Waiting>>,
    pub(super) latency: [Histogram; FaultClass::ALL.len()],
    pub(super) duplicate: AtomicU64,
    pub(super) all_present_at: OnceLock<Instant>,
    /// Everything that is to be served is registered.
    pub(super) begun: AtomicBool,
    /// The region was unregistered, or the first failure was told: nothing more is to be told.
    pub(super) released: AtomicBool,
    pub(super) failed: AtomicBool,
    /// The owner waits for the threads to end.
    pub(super) closing: AtomicBool,
    /// The page of the latest fault that had to be served from the source.
    pub(super) last_fault: AtomicU64,
    pub(super) record: Option<Arc<TouchRecord>>,
    pub(super) demand_cpus: Option<CpuSet>,
    pub(super) stop: OwnedFd,
    pub(super) observer: Observer,
}

impl Shared {
    /// A buffer for `pages` pages.
    pub(super) fn buffer(pages: u64) -> Vec<u8> {
        vec![0; PageRange::new(PageIndex(0), pages).bytes()]
    }

    /// Makes the calling thread one that serves demand.
    pub(super) fn prepare_demand_thread(&self) {
        step_forward();
        if let Some(cpus) = &self.demand_cpus
            && let Err(error) = rustix::thread::sched_setaffinity(None, cpus)
        {
            tracing::warn!(%error, "cannot bind a thread of the pager to its CPUs");
        }
    }

    /// A reader thread: fetches what the fault thread could not have at once.
    pub(super) fn serve_demand(self: Arc<Self>) {
        self.prepare_demand_thread();
        let mut buffer = Self::buffer(self.page_size.pages());
        while let Ok(unit) = self.schedule.take() {
            let result = match self.source.read(unit, Class::Demand, &mut buffer) {
                Ok(content) => self.deliver(Fetched::new(unit, content, &buffer), Arrival::Demand),
                Err(error) => Err(self.source_error(error)),
            };
            self.schedule.end_demand();
            if let Err(error) = result {
                self.fail(error);
            }
            self.release_if_settled();
        }
    }

    /// Makes huge pages of what the region consists of, once it is released. Of another process' memory that process takes care itself.
    pub(super) fn collapse(&self) {
        if let Some(region) = &self.region {
            self.collapser.run(region);
        }
    }

    /// Asks the source for pages that it brings by itself. False: they have to be read. Huge pages are: what a source brings comes
    /// in pieces, and they are installed whole.
    pub(super) fn submit(&self, ranges: &[PageRange], class: Class) -> bool {
        self.page_size == PageSize::Small && self.source.submit(ranges, class)
    }

    /// Lends the receiving of what was submitted as demand to the fault thread, if there is but one: what it receives it installs,
    /// which in another stripe might wait for that one's fault thread.
    pub(super) fn lend_inbox(&self) -> Option<Box<dyn Inbox>> {
        match &self.stripes[..] {
            [_] => self.source.lend_inbox(),
            _ => None,
        }
    }

    pub(super) fn source_error(&self, source: SourceError) -> PagerError {
        PagerError::Source {
            url: self.source.url(),
            source,
        }
    }

    /// Tells of the first failure. What it was about is never installed, and whoever waits for it keeps waiting: anything else
    /// would be an invented page.
    pub(super) fn fail(&self, error: PagerError) {
        // What the end breaks off is no failure, nor is what happens to a source of which nothing is missing any more.
        let moot = self.closing.load(Relaxed) || self.released.load(Acquire);
        if !moot && !self.failed.swap(true, AcqRel) {
            (self.observer)(Notice::Failed(Arc::new(error)));
        }
    }

    pub(super) fn stripe_of(&self, page: PageIndex) -> &Stripe {
        let first = self.stripes[0].pages;
        &self.stripes[((page.0 - first.start.0) / first.count) as usize]
    }

    /// Pages that were claimed are not going to be fetched after all: who waits for them looks again.
    pub(super) fn give_up(&self, pages: PageRange) {
        for unit in self.states.units(pages) {
            // What may be there stays in flight for who takes over.
            let is_next_ones = self.closing.load(Relaxed) && self.is_uncertain(unit.start);
            if !is_next_ones {
                self.states.cancel(unit);
            }
        }
        self.wake(pages);
        self.record_waiting(pages);
    }

    /// Whether a pager before this one may have installed the unit that begins with `page`.
    pub(super) fn is_uncertain(&self, page: PageIndex) -> bool {
        self.uncertain.binary_search(&page).is_ok()
    }

    /// Wakes who waits for `pages`, to look again.
    pub(super) fn wake(&self, pages: PageRange) {
        for stripe in &self.stripes {
            let placement = stripe.placement();
            for piece in placement.pieces_of(pages) {
                stripe.wake(piece.addresses());
            }
        }
    }

    /// A page from the source was touched, for the first time.
    pub(super) fn note_touch(&self, page: PageIndex) {
        self.last_fault.store(page.0, Relaxed);
        if let Some(record) = &self.record {
            record.add(page);
        }
    }

    pub(super) fn await_fetch(&self, unit: PageRange, since: Instant, class: FaultClass) {
        self.waiting().push(Waiting {
            unit: unit.start,
            since,
            class,
        });
    }

    /// Those who waited for `pages` have been woken.
    pub(super) fn record_waiting(&self, pages: PageRange) {
        let mut waiting = self.waiting();
        if waiting.is_empty() {
            return;
        }
        let now = Instant::now();
        waiting.retain(|waiting| {
            let woken = pages.contains(waiting.unit);
            if woken {
                self.latency[waiting.class as usize].record(now - waiting.since);
            }
            !woken
        });
    }

    pub(super) fn waiting(&self) -> MutexGuard<'_, Vec<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the last page is settled, umem leaves.
    pub(super) fn release_if_settled(&self) {
        let is_time = self.states.all_settled() && self.begun.load(Acquire) && !self.released.load(Acquire);
        // Counts are told by one process and recounted by another, and can be too small for a moment; a page that is settled stays so,
        // and what is released by mistake reads zero for ever.
        if is_time && self.states.is_all_settled() {
            self.release();
        }
    }

    /// Unregisters the region: it is ordinary memory from now on. Called when every page is settled, or when whatever is
    /// absent is known to be zero, which is what the kernel fills in by itself.
    pub(super) fn release(&self) {
        if self.released.swap(true, AcqRel) {
            return;
        }
        let populated = populated_huge_pages(&self.states);
        // First: a page that is no longer registered is the guest's to write, and who reads the states meanwhile must not take it
        // for one that is still at the source.
        self.states.settle_rest_as_zero();
        for stripe in &self.stripes {
            if let Err(error) = stripe.unregister() {
                // Nothing is lost: it stays registered and the fault thread goes on answering.
                tracing::warn!(%error, "cannot unregister guest memory");
                self.wake(self.states.all());
                return;
            }
        }
        self.record_waiting(self.states.all());
        let _ = self.all_present_at.set(Instant::now());
        (self.observer)(Notice::AllPagesPresent);
        // For a reader, which has nothing else to do then.
        self.collapser.hand_over(populated);
        // The fault thread stays: a thread that began to drop pages before the memory was taken off waits for its event to
        // be read.
        self.schedule.stop();
    }

    pub(super) fn stop_fault_threads(&self) {
        // Nobody reads the counter, so all see it. The counter cannot overflow, so the write cannot fail.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
    }
}

impl From<Class> for Arrival {
    fn from(class: Class) -> Self {
        match class {
            Class::Demand => Self::Demand,
            Class::Background => Self::Prefetched,
        }
    }
}

impl PageSink for Shared {
    fn arrived(&self, pages: PageRange, content: Content, buffer: &[u8], class: Class) {
        if let Err(error) = self.deliver(Fetched::new(pages, content, buffer), class.into()) {
            self.fail(error);
        }
    }

    fn completed(&self, class: Class) {
        match class {
            Class::Demand => self.schedule.end_demand(),
            Class::Background => self.schedule.end_background(),
        }
        self.release_if_settled();
    }

    fn failed(&self, error: SourceError) {
        self.fail(self.source_error(error));
    }

    fn lost(&self, why: &dyn Error) {
        // When nothing more is wanted of it, nobody misses it.
        if !self.released.load(Relaxed) && !self.closing.load(Relaxed) {
            (self.observer)(Notice::SourceLost(chain(why)));
        }
    }

    fn back(&self) {
        if !self.closing.load(Relaxed) {
            (self.observer)(Notice::SourceBack);
        }
    }
}

impl Shared {
    /// Pages were dropped.
    pub(super) fn remove(&self, dropped: &[PageRange]) {
        for pages in dropped {
            if !self.states.remove(*pages) {
                self.fail(PagerError::PartlyRemoved { pages: *pages });
            }
            self.record_waiting(*pages);
        }
    }
}

/// Ranges of 2 MiB that are populated throughout and can be huge pages again: page by page is how they came, not how they
/// must stay.
pub(crate) fn populated_huge_pages(states: &PageStates) -> Vec<PageRange> {
    let huge = PageSize::Huge.pages();
    if states.unit_of(PageIndex(0)).count == huge {
        return Vec::new();
    }
    (0..states.pages() / huge)
        .map(|index| PageRange::new(PageIndex(index * huge), huge))
        .filter(|range| range.pages().all(|page| states.get(page) == PageState::Present))
        .collect()
}
