//! The fault loop: events in, pages installed.
//!
//! ```text
//!                     ┌───────────────┐ immediate answer   ┌────────┐
//!   userfaultfd ────► │ fault thread  │ ─────────────────► │ region │ ──► the waiting thread runs on
//!                     └──────┬────────┘                    └────────┘
//!                            │ would have to wait               ▲ ▲
//!                            ▼                                  │ │
//!                     demand queue ──► reader threads ──────────┘ │
//!                                      fill thread ───────────────┘
//!                                      (waits while demand is outstanding)
//! ```
//!
//! A source that brings pages by itself ([`PageSource::submit`]) is asked in place of the reader threads, and installs what
//! comes, from its own threads, by the same way as they do ([`PageSink`](crate::source::PageSink)). Or it lends the fault
//! thread, if there is one alone, an [`Inbox`](crate::source::Inbox): that thread then takes and installs what it has asked for.
//!
//! **Installing and removing exclude each other.** The race: a thread fetches page P; P is dropped (a REMOVE event, whose
//! reading lets the dropping thread go on); the fetched content is installed after the drop, and P shows its old content
//! where it must read zero. The kernel refuses installations (EAGAIN) only until the event has been read. So the fault
//! thread reads events while it alone holds the placement (where the pages are), and marks what they remove and notes what
//! they move before it lets go of it; every other thread checks the page's state and installs while it shares it. Content
//! installed before the event is read is dropped, or moved, with the page; after it, the page is `Removed` and the content is
//! not installed, or installed where the page is now. This is the one lock that is held across a system call; an installation
//! under it is at most `INSTALL_STEP` pages long, and the read never waits.
//!
//! The fault thread needs no lock for its own installations, since it alone reads events: it sees EAGAIN, reads the event,
//! and looks at the page's state again.
//!
//! A region may be divided into *stripes*, each with its own userfaultfd, fault thread and lock: a userfaultfd has one queue,
//! and one thread has one pair of hands. All of the above then holds for each stripe by itself.

mod faults;
mod fill;
mod install;
mod order;
mod poison;
mod record;
mod shared;
mod stripe;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::Release};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{fmt, io};

use rustix::event::EventfdFlags;
use rustix::thread::CpuSet;

use self::faults::FaultThread;
pub use self::record::{MAX_TOUCHED, TouchRecord};
pub(crate) use self::shared::populated_huge_pages;
use self::shared::{Observer, Shared};
use self::stripe::{Placement, Stripe};

use crate::collapse::Collapser;
use crate::region::{PageSize, Region};
use crate::schedule::Schedule;
use crate::source::{PageSource, SourceError, SourceStats};
use crate::states::{Arrival, PageStates, StateCounts};
use crate::stats::{Distribution, Histogram, Summary};
use crate::uffd::{self, Features, InstallError, RegisterMode, Userfaultfd};
use crate::units::{HostAddress, PageIndex, PageRange};
use crate::working_set::WorkingSet;

/// Pages installed by one system call at most: what a fault may have to wait for behind background work.
pub(crate) const INSTALL_STEP: u64 = 16;

/// Threads that read on behalf of faults which the fault thread cannot answer at once.
const READERS: usize = 4;

/// What loads pages that nobody has asked for.
#[derive(Clone, Debug, Default)]
pub enum Fill {
    /// Nothing does.
    #[default]
    Off,
    /// Everything is loaded in order while nobody waits.
    Sequential,
    /// Everything is loaded while nobody waits, what is near the latest fault first.
    NearFaults,
    /// What an earlier run touched is loaded while nobody waits, and nothing else.
    Recorded(Arc<WorkingSet>),
}

/// How a pager works.
#[derive(Clone, Debug)]
pub struct PagerOptions {
    /// What loads pages that nobody has asked for.
    pub fill: Fill,
    /// Into how many parts with a userfaultfd each the region is divided, as far as it has as many huge pages.
    pub stripes: usize,
    /// Where pages are written down in the order in which they are first touched.
    pub record: Option<Arc<TouchRecord>>,
    /// The CPUs that threads which serve demand are bound to, if they are.
    pub demand_cpus: Option<CpuSet>,
}

impl From<Fill> for PagerOptions {
    fn from(fill: Fill) -> Self {
        Self {
            fill,
            stripes: 1,
            record: None,
            demand_cpus: None,
        }
    }
}

/// What a pager tells its owner, from one of its own threads or from the one that starts it.
#[derive(Clone, Debug)]
pub enum Notice {
    /// Every page is there, the region is ordinary memory, and umem is out of the way. Told once.
    AllPagesPresent,
    /// A page cannot be had, and whoever waits for it waits for ever. Told once.
    Failed(Arc<PagerError>),
    /// The connection to the source is lost, for the reason given, and is being made anew: until then pages do not come.
    SourceLost(String),
    /// It was made anew.
    SourceBack,
}

/// Why a pager cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// The source has no such page, or a wrong one.
    #[error("cannot load guest memory from {url}")]
    Source {
        /// The source.
        url: String,
        /// What it says.
        source: SourceError,
    },
    /// The kernel does not take the page.
    #[error("cannot install page {page}")]
    Install {
        /// The page.
        page: PageIndex,
        /// What the kernel says.
        source: InstallError,
    },
    /// There is content that the pager did not bring.
    #[error("page {page} has content that was never loaded")]
    Unaccounted {
        /// The page.
        page: PageIndex,
    },
    /// Part of a huge page was dropped before the page was loaded.
    #[error("a part of a huge page among the pages {pages} was dropped before the rest was loaded")]
    PartlyRemoved {
        /// What was dropped.
        pages: PageRange,
    },
    /// Faults can no longer be read.
    #[error("cannot read page faults")]
    Events(#[source] io::Error),
}

/// Why a pager could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No userfaultfd.
    #[error(transparent)]
    Userfaultfd(#[from] uffd::OpenError),
    /// The region could not be registered.
    #[error("cannot register guest memory with userfaultfd")]
    Register(#[source] io::Error),
    /// Somebody touched the region before: what is there did not come from the source.
    #[error(
        "{0} pages of guest memory are populated before anything was loaded (is all memory of this process locked?)"
    )]
    Populated(u64),
    /// The region's pages could not be counted.
    #[error("cannot count the populated pages of guest memory")]
    Count(#[source] io::Error),
    /// There is no memory for the page-state table.
    #[error("no memory for the page states of a region of this size")]
    NoMemory,
    /// A thread or a descriptor could not be had.
    #[error("cannot start the pager")]
    Os(#[source] io::Error),
}

/// Why somebody waited: the classes by which fault latency is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultClass {
    /// Answered at once from the source.
    Immediate = 0,
    /// Answered at once with a zero page.
    Zero = 1,
    /// Fetched by a reader thread.
    Fetched = 2,
    /// Joined a fetch that was under way.
    Joined = 3,
    /// A page of shared memory that was there and only had to be mapped.
    Minor = 4,
}

impl FaultClass {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Immediate,
        Self::Zero,
        Self::Fetched,
        Self::Joined,
        Self::Minor,
    ];

    /// Its name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Immediate => "immediate",
            Self::Zero => "zero",
            Self::Fetched => "fetched",
            Self::Joined => "joined",
            Self::Minor => "minor",
        }
    }
}

/// What a pager has done so far.
#[derive(Clone, Debug)]
pub struct PagerStats {
    /// Pages by state.
    pub states: StateCounts,
    /// Pages that the kernel held in memory when the pager started.
    pub populated_at_start: u64,
    /// Pages that arrived because somebody waited for them.
    pub demand: u64,
    /// Pages that arrived by background fill.
    pub prefetched: u64,
    /// Pages that were there before the pager was.
    pub pushed: u64,
    /// Pages that are all zero.
    pub zero: u64,
    /// Pages that arrived though they were there.
    pub duplicate: u64,
    /// Latency of all faults, in nanoseconds: from reading the fault's event to having woken the thread that waits.
    pub faults: Summary,
    /// The same by class.
    pub fault_classes: [Summary; FaultClass::ALL.len()],
    /// The same by class, in full; empty for a pager in another process.
    pub fault_distributions: [Distribution; FaultClass::ALL.len()],
    /// When all pages were there.
    pub all_present_at: Option<Instant>,
    /// What the source did.
    pub source: SourceStats,
}

/// A running pager. Dropping it stops its threads; pages that are absent then must not be touched any more.
///
/// Memory that is dropped (MADV_DONTNEED on anonymous memory, MADV_REMOVE on a memfd) reads zero from then on, and is not loaded
/// again. On a memfd MADV_DONTNEED drops a mapping and not content, but the kernel tells of it in the same way: of pages that
/// are not loaded yet it must not be used.
pub struct Pager {
    shared: Arc<Shared>,
    /// One a stripe.
    fault_threads: Vec<JoinHandle<()>>,
    /// Readers and fill.
    workers: Vec<JoinHandle<()>>,
}

impl Pager {
    /// Registers `region` and begins to serve its faults from `source`. The region must not have been touched.
    pub fn start(
        region: Arc<Region>,
        source: Arc<dyn PageSource>,
        options: impl Into<PagerOptions>,
        observer: impl Fn(Notice) + Send + Sync + 'static,
    ) -> Result<Self, StartError> {
        let options = options.into();
        let stripes = register(&region, options.stripes, region.registration().1)?;
        // After registering: from here on nothing is populated unseen.
        let populated_at_start = region.populated().map_err(StartError::Count)?;
        if populated_at_start > 0 {
            return Err(StartError::Populated(populated_at_start));
        }
        let page_size = region.page_size();
        let states = PageStates::new(region.pages(), page_size.pages()).ok_or(StartError::NoMemory)?;
        let memory = Memory {
            stripes,
            page_size,
            states: Arc::new(states),
        };
        let begin = Begin {
            region: Some(region),
            uncertain: Vec::new(),
            later: false,
        };
        Self::serve(memory, begin, source, options, Box::new(observer))
    }

    /// Prepares to serve a region whose pages come before that ([`PreparedPager`]).
    pub fn prepare(
        region: Arc<Region>,
        states: Arc<PageStates>,
        source: Arc<dyn PageSource>,
        options: impl Into<PagerOptions>,
        observer: impl Fn(Notice) + Send + Sync + 'static,
    ) -> Result<PreparedPager, StartError> {
        let options = options.into();
        let memory = Memory {
            stripes: open_stripes(&region, options.stripes)?,
            page_size: region.page_size(),
            states,
        };
        let begin = Begin {
            region: Some(region),
            uncertain: Vec::new(),
            later: true,
        };
        Self::serve(memory, begin, source, options, Box::new(observer)).map(PreparedPager)
    }

    /// Goes on serving memory that was served before by a process that is gone, or was not served yet: memory of another
    /// process, or of this one. What was in flight is fetched again.
    pub fn take_over(
        memory: Memory,
        source: Arc<dyn PageSource>,
        options: impl Into<PagerOptions>,
        observer: impl Fn(Notice) + Send + Sync + 'static,
    ) -> Result<Self, StartError> {
        let begin = Begin {
            region: None,
            uncertain: memory.states.in_flight(),
            later: false,
        };
        let pager = Self::serve(memory, begin, source, options.into(), Box::new(observer))?;
        // Faults that were read and not answered are nowhere any more: who waits is woken, and faults again.
        pager.shared.wake(pager.shared.states.all());
        Ok(pager)
    }

    fn serve(
        memory: Memory,
        begin: Begin,
        source: Arc<dyn PageSource>,
        options: PagerOptions,
        observer: Observer,
    ) -> Result<Self, StartError> {
        let PagerOptions {
            fill,
            record,
            demand_cpus,
            ..
        } = options;
        let Memory {
            stripes,
            page_size,
            states,
        } = memory;
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| StartError::Os(errno.into()))?;
        let stripes = stripes.into_iter().map(|stripe| {
            let placement = Placement::new(stripe.pages, stripe.start);
            Stripe::new(stripe.uffd, placement)
        });
        let shared = Arc::new(Shared {
            stripes: stripes.collect(),
            region: begin.region,
            collapser: Collapser::default(),
            page_size,
            source,
            states,
            uncertain: begin.uncertain,
            populated_at_start: OnceLock::new(),
            schedule: Schedule::new(),
            waiting: Mutex::new(Vec::with_capacity(1024)),
            latency: Default::default(),
            duplicate: AtomicU64::new(0),
            all_present_at: OnceLock::new(),
            begun: AtomicBool::new(!begin.later),
            released: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            last_fault: AtomicU64::new(0),
            record,
            demand_cpus,
            stop,
            observer,
        });
        if begin.later {
            // Closes the gate for the fill. No fault comes before something is registered.
            shared.schedule.begin_demand();
        }
        let sink: Weak<Shared> = Arc::downgrade(&shared);
        shared.source.attach(sink);
        let mut pager = Self {
            shared,
            fault_threads: Vec::new(),
            workers: Vec::new(),
        };
        for stripe in 0..pager.shared.stripes.len() {
            let serve = move |shared| FaultThread::new(shared, stripe).run();
            let thread = pager.spawn(format!("umem-faults-{stripe}"), serve)?;
            pager.fault_threads.push(thread);
        }
        // Nothing is read from a source that installs what it is asked for.
        let readers = if pager.shared.source.installs() {
            0
        } else {
            READERS
        };
        for reader in 0..readers {
            let work = move |shared: Arc<Shared>| {
                Arc::clone(&shared).serve_demand();
                // There is no demand any more.
                if reader == 0 {
                    shared.collapse();
                }
            };
            let reader = pager.spawn(format!("umem-reader-{reader}"), work)?;
            pager.workers.push(reader);
        }
        if !matches!(fill, Fill::Off) || !pager.shared.uncertain.is_empty() {
            let fill = pager.spawn("umem-fill".into(), move |shared| shared.fill(&fill))?;
            pager.workers.push(fill);
        }
        Ok(pager)
    }

    /// Ends the pager's threads. The memory stays registered, so whoever touches an absent page from now on waits until the
    /// pager is dropped. After it the figures are exact: a page is counted after who waited for it has been woken.
    pub fn stop(&mut self) {
        self.shared.closing.store(true, Relaxed);
        self.shared.collapser.end();
        self.shared.schedule.stop();
        self.shared.source.close();
        // A source's own threads are not joined here: what they are installing is installed and counted after this, and they
        // install nothing more.
        for stripe in &self.shared.stripes {
            drop(stripe.placement_alone());
        }
        // The fault thread last: the others cannot install what they have while an event is unread.
        join(self.workers.drain(..));
        self.shared.stop_fault_threads();
        join(self.fault_threads.drain(..));
    }

    /// Of a pager that was prepared: loads what nobody touches from now on. Called once.
    pub fn fill(&self) {
        self.shared.schedule.end_demand();
    }

    /// If every page is settled, whoever brought it: makes the region ordinary memory, as the pager does by itself when it has
    /// brought the last page. Answers whether that is so.
    pub fn release(&self) -> bool {
        self.shared.states.recount();
        self.shared.release_if_settled();
        self.shared.released.load(Relaxed)
    }

    /// Gives up what is being fetched of `pages`: who waits for it looks again.
    pub fn look_again(&self, pages: PageRange) {
        self.shared.give_up(pages);
    }

    /// What was done so far.
    pub fn stats(&self) -> PagerStats {
        let shared = &self.shared;
        let histograms: Vec<&Histogram> = shared.latency.iter().collect();
        PagerStats {
            states: shared.states.counts(),
            populated_at_start: shared.populated_at_start.get().copied().unwrap_or(0),
            demand: shared.states.arrived_by(Arrival::Demand),
            prefetched: shared.states.arrived_by(Arrival::Prefetched),
            pushed: shared.states.arrived_by(Arrival::Pushed),
            zero: shared.states.arrived_by(Arrival::Zero),
            duplicate: shared.duplicate.load(Relaxed),
            faults: Histogram::summary_of(&histograms),
            fault_classes: std::array::from_fn(|class| shared.latency[class].summary()),
            fault_distributions: std::array::from_fn(|class| shared.latency[class].distribution()),
            all_present_at: shared.all_present_at.get().copied(),
            source: shared.source.stats(),
        }
    }

    /// The page that somebody has waited for longest, and for how long.
    pub fn longest_wait(&self) -> Option<(PageIndex, Duration)> {
        let waiting = self.shared.waiting();
        let longest = waiting.iter().min_by_key(|waiting| waiting.since)?;
        Some((longest.unit, longest.since.elapsed()))
    }

    /// What is known of its pages.
    pub fn states(&self) -> Arc<PageStates> {
        Arc::clone(&self.shared.states)
    }

    /// Where its pages come from.
    pub fn source(&self) -> Arc<dyn PageSource> {
        Arc::clone(&self.shared.source)
    }

    /// The most memory that its page-state table can take, in bytes.
    pub fn table_size(&self) -> u64 {
        self.shared.states.table_size()
    }

    fn spawn(
        &self,
        name: String,
        work: impl FnOnce(Arc<Shared>) + Send + 'static,
    ) -> Result<JoinHandle<()>, StartError> {
        let shared = Arc::clone(&self.shared);
        thread::Builder::new()
            .name(name)
            .spawn(move || work(shared))
            .map_err(StartError::Os)
    }
}

/// How a pager begins.
struct Begin {
    /// Its region, if it is this process' own.
    region: Option<Arc<Region>>,
    /// Units that a pager before it may have installed, or not; sorted.
    uncertain: Vec<PageIndex>,
    /// Nothing is registered yet.
    later: bool,
}

/// A pager that has its threads and serves nothing yet: of a region that somebody writes to, and notes so in its page states.
///
/// ```text
///                 begin                   fill
///   prepared ---------------> serving ---------> serving, and filling
///      |  pages are preset       pages arrive that are touched
///      |  and forgotten
///      +--- drop: nothing was served
/// ```
#[derive(Debug)]
pub struct PreparedPager(Pager);

impl PreparedPager {
    /// Registers the region and serves it from now on. Those of its pages are there that are settled in the states, and no others;
    /// nobody writes to it any more but who touches it.
    ///
    /// What is there need not be mapped, and is mapped by the kernel as soon as it is touched. What nobody touches is loaded from
    /// [`Pager::fill`] on.
    pub fn begin(self) -> Result<Pager, StartError> {
        let Self(mut pager) = self;
        let shared = &pager.shared;
        if let Some(region) = &shared.region {
            let mut populated = region.populated().map_err(StartError::Count)?;
            if populated > shared.states.arrived_by(Arrival::Pushed) {
                // Where the kernel has put a large page around what was written, what is beside that has memory and no content.
                drop_unsettled(region, &shared.states).map_err(StartError::Count)?;
                populated = region.populated().map_err(StartError::Count)?;
            }
            let _ = shared.populated_at_start.set(populated);
            for stripe in &shared.stripes {
                // Not for minor faults: each page that is there would be one.
                let addresses = region.addresses(stripe.pages);
                let registered = stripe.uffd.register(addresses, RegisterMode::Missing);
                registered.map_err(StartError::Register)?;
            }
        }
        shared.begun.store(true, Release);
        if shared.states.all_settled() {
            // It takes time to look at all pages, and somebody is waiting for this to return.
            let release = pager.spawn("umem-release".into(), |shared| shared.release())?;
            pager.workers.push(release);
        }
        Ok(pager)
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A part of a region, registered with a userfaultfd of its own.
#[derive(Debug)]
pub struct RegisteredStripe {
    /// Where its faults come.
    pub uffd: Userfaultfd,
    /// Its pages.
    pub pages: PageRange,
    /// Where the first of them is, in the process whose memory it is.
    pub start: HostAddress,
}

/// Memory to be served.
#[derive(Debug)]
pub struct Memory {
    /// By page, all of one length but the last.
    pub stripes: Vec<RegisteredStripe>,
    /// In which size it is installed.
    pub page_size: PageSize,
    /// What is known of its pages.
    pub states: Arc<PageStates>,
}

/// Divides a region into stripes, as many as asked for if there are as many huge pages, and registers each with a userfaultfd
/// of its own.
pub fn register(
    region: &Region,
    stripes: usize,
    mode: RegisterMode,
) -> Result<Vec<RegisteredStripe>, StartError> {
    let stripes = open_stripes(region, stripes)?;
    for stripe in &stripes {
        let addresses = region.addresses(stripe.pages);
        stripe
            .uffd
            .register(addresses, mode)
            .map_err(StartError::Register)?;
    }
    Ok(stripes)
}

/// The same, with nothing registered yet.
fn open_stripes(region: &Region, stripes: usize) -> Result<Vec<RegisteredStripe>, StartError> {
    let (features, _) = region.registration();
    let events = Features::EVENT_REMOVE
        .and(Features::EVENT_UNMAP)
        .and(Features::EVENT_REMAP);
    // Whole huge pages each, so that each can become huge pages again.
    let huge = PageSize::Huge.pages();
    let length = region
        .pages()
        .div_ceil(stripes.max(1) as u64)
        .next_multiple_of(huge);
    (0..region.pages().div_ceil(length))
        .map(|index| {
            let pages = PageRange::new(PageIndex(index * length), length).clamp_to(PageIndex(region.pages()));
            let start = region.addresses(pages).start;
            let uffd = Userfaultfd::open(features.and(events))?;
            Ok(RegisteredStripe { uffd, pages, start })
        })
        .collect()
}

/// Gives back the memory of pages that are not settled.
fn drop_unsettled(region: &Region, states: &PageStates) -> io::Result<()> {
    let mut rest = states.all();
    while let Some(start) = rest.pages().find(|page| !states.is_settled(*page)) {
        rest = rest.from(start);
        let count = rest.pages().take_while(|page| !states.is_settled(*page)).count() as u64;
        let run = PageRange::new(start, count);
        if let Some(first) = region.first_populated(run)? {
            region.discard(run.from(first))?;
        }
        rest = rest.from(run.end());
    }
    Ok(())
}

fn join(threads: impl IntoIterator<Item = JoinHandle<()>>) {
    for thread in threads {
        if thread.join().is_err() {
            tracing::error!("a pager thread panicked");
        }
    }
}

impl fmt::Debug for Pager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pager")
            .field("source", &self.shared.source.url())
            .finish_non_exhaustive()
    }
}
