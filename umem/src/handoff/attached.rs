//! The side of the process with the memory.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{fmt, str};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::MemfdFlags;

use super::passing::{PassingError, receive, send};
use super::{FailureKind, Figures, FillKind, Message, Serve, StripePlace, VERSION};
use crate::causes::chain;
use crate::collapse::Collapser;
use crate::link::{Address, Stream};
use crate::pager::{
    self, Fill, Notice, PagerError, PagerOptions, PagerStats, RegisteredStripe, StartError,
    populated_huge_pages,
};
use crate::region::Region;
use crate::source::SourceError;
use crate::states::{Arrival, PageStates, StateCounts};
use crate::uffd::InstallError;
use crate::units::PageIndex;

/// The first and the longest pause between attempts to find a pager.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));

/// After how long without a word a pager is asked for one.
const QUIET: Duration = Duration::from_secs(1);

/// How long a pager may take to answer what it is asked before it serves, and to say its figures after.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where a pager is: `PATH` or `PATH#IMAGE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagerAddress {
    /// Its socket.
    pub path: PathBuf,
    /// The image; empty: the only one there is.
    pub image: String,
}

impl str::FromStr for PagerAddress {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (path, image) = text.split_once('#').unwrap_or((text, ""));
        if path.is_empty() {
            return Err("expected PATH or PATH#NAME");
        }
        Ok(Self {
            path: path.into(),
            image: image.to_owned(),
        })
    }
}

impl fmt::Display for PagerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "attach:{}", self.path.display())?;
        if self.image.is_empty() {
            Ok(())
        } else {
            write!(f, "#{}", self.image)
        }
    }
}

/// Why memory is not served by another process.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// There is no such process.
    #[error("cannot connect to the pager at {pager}")]
    Connect {
        /// Where it was looked for.
        pager: String,
        /// Why.
        source: io::Error,
    },
    /// It does not want to.
    #[error("the pager at {pager} refused: {text}")]
    Refused {
        /// Where it is.
        pager: String,
        /// Why, in its words.
        text: String,
    },
    /// It cannot be talked with.
    #[error("the connection to the pager at {pager} failed")]
    Passing {
        /// Where it is.
        pager: String,
        /// Why.
        source: PassingError,
    },
    /// It was not found again in time.
    #[error("no pager was found at {pager} for {}", crate::stats::seconds(*.time))]
    TimedOut {
        /// Where it was looked for.
        pager: String,
        /// How long.
        time: Duration,
        /// Why it was not found.
        source: Box<Self>,
    },
    /// It says that it has lost its source, or found it damaged.
    #[error("the pager at {pager} cannot go on: {text}")]
    Failed {
        /// Where it is.
        pager: String,
        /// Why, in its words.
        text: String,
    },
}

/// What a pager says of an image.
#[derive(Clone, Debug)]
pub struct ImageDescription {
    /// Pages of RAM.
    pub pages: u64,
    /// Its identity.
    pub digest: [u8; 32],
    /// What its maker wrote beside it.
    pub metadata: Vec<u8>,
}

impl PagerAddress {
    /// Asks the pager for its image.
    pub fn describe(&self) -> Result<ImageDescription, AttachError> {
        let stream = self.connect()?;
        let describe = Message::Describe {
            version: VERSION,
            image: self.image.clone(),
        };
        match self.ask(&stream, &describe, &[])? {
            Message::Image {
                pages,
                digest,
                metadata,
            } => Ok(ImageDescription {
                pages,
                digest,
                metadata,
            }),
            other => Err(self.unexpected(other)),
        }
    }

    fn connect(&self) -> Result<UnixStream, AttachError> {
        let fail = |source| AttachError::Connect {
            pager: self.to_string(),
            source,
        };
        let Stream::Unix(stream) =
            Stream::connect(&Address::Unix(self.path.clone()), PATIENCE, None).map_err(fail)?
        else {
            return Err(fail(io::ErrorKind::Unsupported.into()));
        };
        stream.set_read_timeout(Some(PATIENCE)).map_err(fail)?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(fail)?;
        Ok(stream)
    }

    fn ask(
        &self,
        stream: &UnixStream,
        message: &Message,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Message, AttachError> {
        send(stream, message, descriptors)
            .and_then(|()| receive(stream))
            .map(|(answer, _)| answer)
            .map_err(|source| AttachError::Passing {
                pager: self.to_string(),
                source,
            })
    }

    fn unexpected(&self, message: Message) -> AttachError {
        let pager = self.to_string();
        match message {
            Message::Refused { text } => AttachError::Refused { pager, text },
            _ => AttachError::Passing {
                pager,
                source: PassingError::Protocol("an answer to something else".into()),
            },
        }
    }
}

/// Memory of this process that a pager in another one serves. Dropping it ends that.
pub struct AttachedPager {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

type Observer = Box<dyn Fn(Notice) + Send + Sync>;

struct Shared {
    pager: PagerAddress,
    digest: [u8; 32],
    timeout: Duration,
    /// Kept so that a userfaultfd is never closed while somebody may touch the memory.
    stripes: Vec<RegisteredStripe>,
    states: Arc<PageStates>,
    table: OwnedFd,
    working_set: Option<File>,
    fill: FillKind,
    region: Arc<Region>,
    collapser: Arc<Collapser>,
    /// What runs it, as soon as there is something to do.
    collapsing: Mutex<Option<JoinHandle<()>>>,
    closing: AtomicBool,
    connection: Mutex<Connection>,
    changed: Condvar,
    all_present_at: OnceLock<Instant>,
    figures: OnceLock<Figures>,
    observer: Observer,
}

#[derive(Default)]
struct Connection {
    stream: Option<Arc<UnixStream>>,
    /// Times that a pager was found again.
    reconnects: u64,
    /// Since when there is none; nothing before the first.
    lost_since: Option<Instant>,
}

impl AttachedPager {
    /// Registers `region` and hands it to the pager at `address`, which serves it from the image with this digest. `own` are
    /// pages that this process brings itself. A pager that dies is waited for as long as `timeout`.
    pub fn start(
        address: PagerAddress,
        digest: [u8; 32],
        timeout: Duration,
        region: Arc<Region>,
        options: impl Into<PagerOptions>,
        own: &[(PageIndex, Vec<u8>)],
        observer: impl Fn(Notice) + Send + Sync + 'static,
    ) -> Result<Self, StartError> {
        let PagerOptions { fill, stripes, .. } = options.into();
        let stripes = pager::register(&region, stripes, region.registration().1)?;
        let populated = region.populated().map_err(StartError::Count)?;
        if populated > 0 {
            return Err(StartError::Populated(populated));
        }
        let unit = region.page_size().pages();
        let (states, table) = PageStates::new_shared(region.pages(), unit).map_err(StartError::Os)?;
        let (fill, working_set) = match fill {
            Fill::Off => (FillKind::Off, None),
            Fill::Sequential => (FillKind::Sequential, None),
            Fill::NearFaults => (FillKind::NearFaults, None),
            Fill::Recorded(set) => {
                let memfd = rustix::fs::memfd_create("umem-working-set", MemfdFlags::CLOEXEC);
                let mut file = File::from(memfd.map_err(|errno| StartError::Os(errno.into()))?);
                file.write_all(&set.encode()).map_err(StartError::Os)?;
                (FillKind::Recorded, Some(file))
            }
        };
        let shared = Arc::new(Shared {
            pager: address,
            digest,
            timeout,
            stripes,
            states: Arc::new(states),
            table,
            working_set,
            fill,
            region,
            collapser: Arc::default(),
            collapsing: Mutex::default(),
            closing: AtomicBool::new(false),
            connection: Mutex::default(),
            changed: Condvar::new(),
            all_present_at: OnceLock::new(),
            figures: OnceLock::new(),
            observer: Box::new(observer),
        });
        for (page, content) in own {
            shared.install_own(*page, content)?;
        }
        let thread = {
            let shared = Arc::clone(&shared);
            thread::Builder::new()
                .name("umem-attached".into())
                .spawn(move || shared.keep_attached())
                .map_err(StartError::Os)?
        };
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Ends the pager's work, and waits for its figures for a moment. Whoever touches an absent page from now on waits until
    /// this is dropped.
    pub fn stop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        let shared = &self.shared;
        shared.closing.store(true, SeqCst);
        let stream = shared.lock().stream.clone();
        shared.changed.notify_all();
        if let Some(stream) = &stream {
            // The other side answers by its figures and its end; one that is stuck does not get longer than that.
            let _ = send(stream, &Message::Stop, &[]);
            let deadline = Instant::now() + PATIENCE;
            let mut connection = shared.lock();
            while connection.stream.is_some() {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    let _ = stream.shutdown(std::net::Shutdown::Both);
                    break;
                }
                connection = shared
                    .changed
                    .wait_timeout(connection, left)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            }
        }
        if thread.join().is_err() {
            tracing::error!("the thread that talks with the pager panicked");
        }
        shared.collapser.end();
        let collapsing = shared
            .collapsing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if collapsing.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that makes huge pages panicked");
        }
    }

    /// What was done so far; latencies and what the source did only after the end.
    pub fn stats(&self) -> PagerStats {
        let shared = &self.shared;
        let states = self.counts();
        let figures = shared.figures.get().cloned().unwrap_or_default();
        let mut source = figures.source;
        source.reconnects = shared.lock().reconnects;
        PagerStats {
            states,
            populated_at_start: 0,
            demand: shared.states.arrived_by(Arrival::Demand),
            prefetched: shared.states.arrived_by(Arrival::Prefetched),
            pushed: shared.states.arrived_by(Arrival::Pushed),
            zero: shared.states.arrived_by(Arrival::Zero),
            duplicate: figures.duplicate,
            faults: figures.faults,
            fault_classes: figures.fault_classes,
            fault_distributions: Default::default(),
            all_present_at: shared.all_present_at.get().copied(),
            source,
        }
    }

    /// How many pages are in which state.
    pub fn counts(&self) -> StateCounts {
        // The transitions are the other process's.
        self.shared.states.recount();
        self.shared.states.counts()
    }

    /// For how long somebody has been waiting in vain: since the pager was lost, if a page is waited for now.
    pub fn longest_wait(&self) -> Option<Duration> {
        let since = self.shared.lock().lost_since?;
        self.shared.somebody_waits().then(|| since.elapsed())
    }

    /// What is known of its pages.
    pub fn states(&self) -> Arc<PageStates> {
        Arc::clone(&self.shared.states)
    }

    /// The most memory that its page-state table can take, in bytes.
    pub fn table_size(&self) -> u64 {
        self.shared.states.table_size()
    }
}

impl Drop for AttachedPager {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        for stripe in &self.stripes {
            // The other process may have its descriptor still open, and nobody there who reads it: the end of the region would
            // wait for that.
            if let Err(error) = stripe.uffd.unregister(self.region.addresses(stripe.pages)) {
                tracing::debug!(%error, "cannot unregister memory");
            }
        }
    }
}

impl fmt::Debug for AttachedPager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttachedPager")
            .field("pager", &self.shared.pager)
            .finish_non_exhaustive()
    }
}

/// Why a connection to a pager ended.
enum Ended {
    /// It is to be found again.
    Gone(PassingError),
    /// This side has ended it.
    Stopped,
    /// It cannot go on, and neither could another.
    Failed(FailureKind, AttachError),
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a page there before anybody else can.
    fn install_own(&self, page: PageIndex, content: &[u8]) -> Result<(), StartError> {
        let unit = self.states.unit_of(page);
        let stripe = self.stripes.iter().find(|stripe| stripe.pages.contains(page));
        let refused = || StartError::Os(io::ErrorKind::InvalidInput.into());
        let stripe = stripe
            .filter(|_| content.len() == unit.bytes())
            .ok_or_else(refused)?;
        let address = self.region.addresses(unit).start;
        match stripe.uffd.copy(address, content).stopped {
            None => {
                self.states.claim(unit);
                self.states.arrive(unit, Arrival::Demand);
                Ok(())
            }
            Some(InstallError::Other(errno)) => Err(StartError::Os(errno.into())),
            Some(_) => Err(refused()),
        }
    }

    /// The thread: finds a pager, hears what it says, finds the next one.
    fn keep_attached(self: Arc<Self>) {
        let mut first = true;
        loop {
            let stream = match self.find(first) {
                Ok(Some(stream)) => stream,
                Ok(None) => return,
                Err(error) => return self.fail(FailureKind::Lost, error),
            };
            let ended = self.listen(&stream);
            self.lock().stream = None;
            self.changed.notify_all();
            match ended {
                Ended::Stopped => return,
                Ended::Gone(_) if self.closing.load(SeqCst) || self.all_present_at.get().is_some() => return,
                Ended::Gone(error) => {
                    tracing::warn!(pager = %self.pager, error = &error as &dyn std::error::Error, "pager lost, looking for it anew");
                    self.lock().lost_since = Some(Instant::now());
                    (self.observer)(Notice::SourceLost(chain(&error)));
                }
                Ended::Failed(kind, error) => return self.fail(kind, error),
            }
            // Faults that it had read and not answered are nowhere now: who waits is to fault again, which also shows whether
            // anybody waits.
            self.wake_all();
            first = false;
        }
    }

    /// Connects and hands over. `None`: this side is ending.
    fn find(&self, first: bool) -> Result<Option<Arc<UnixStream>>, AttachError> {
        let since = Instant::now();
        let mut pause = BACKOFF.0;
        loop {
            let error = match self.hand_over() {
                Ok(stream) => {
                    let stream = Arc::new(stream);
                    let mut connection = self.lock();
                    if self.closing.load(SeqCst) {
                        return Ok(None);
                    }
                    connection.stream = Some(Arc::clone(&stream));
                    connection.reconnects += u64::from(!first);
                    connection.lost_since = None;
                    drop(connection);
                    if !first {
                        (self.observer)(Notice::SourceBack);
                    }
                    return Ok(Some(stream));
                }
                Err(error) => error,
            };
            if since.elapsed() >= self.timeout && self.somebody_waits() {
                return Err(AttachError::TimedOut {
                    pager: self.pager.to_string(),
                    time: self.timeout,
                    source: Box::new(error),
                });
            }
            let connection = self.lock();
            if self.closing.load(SeqCst) {
                return Ok(None);
            }
            let _ = self.changed.wait_timeout(connection, pause);
            if self.closing.load(SeqCst) {
                return Ok(None);
            }
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    fn hand_over(&self) -> Result<UnixStream, AttachError> {
        let stream = self.pager.connect()?;
        let serve = Serve {
            version: VERSION,
            image: self.pager.image.clone(),
            digest: self.digest,
            page_size: self.region.page_size().bytes(),
            fill: self.fill,
            memfd: self.region.memfd().is_some(),
            stripes: self
                .stripes
                .iter()
                .map(|stripe| StripePlace {
                    first_page: stripe.pages.start.0,
                    pages: stripe.pages.count,
                    address: stripe.start.0,
                })
                .collect(),
        };
        if let Some(mut set) = self.working_set.as_ref() {
            // The descriptor's offset is shared with whoever read it before.
            set.rewind().map_err(|source| AttachError::Connect {
                pager: self.pager.to_string(),
                source,
            })?;
        }
        let mut descriptors = vec![self.table.as_fd()];
        descriptors.extend(self.region.memfd());
        descriptors.extend(self.working_set.as_ref().map(AsFd::as_fd));
        descriptors.extend(self.stripes.iter().map(|stripe| stripe.uffd.as_fd()));
        match self
            .pager
            .ask(&stream, &Message::Serve(Box::new(serve)), &descriptors)?
        {
            Message::Serving => Ok(stream),
            other => Err(self.pager.unexpected(other)),
        }
    }

    /// Hears what the pager says until it ends.
    fn listen(&self, stream: &UnixStream) -> Ended {
        if let Err(error) = stream.set_read_timeout(Some(QUIET)) {
            return Ended::Gone(PassingError::Lost(error));
        }
        let mut heard = Instant::now();
        loop {
            match receive(stream) {
                Ok((message, _)) => {
                    heard = Instant::now();
                    match message {
                        Message::Pong | Message::Serving => {}
                        Message::AllPagesPresent => self.all_present(),
                        Message::Failed { kind, text } => {
                            let pager = self.pager.to_string();
                            return Ended::Failed(kind, AttachError::Failed { pager, text });
                        }
                        Message::Stopped(figures) => {
                            // Told once.
                            let _ = self.figures.set(*figures);
                            return Ended::Stopped;
                        }
                        _ => {
                            return Ended::Gone(PassingError::Protocol("an answer to something else".into()));
                        }
                    }
                }
                Err(PassingError::Quiet) => {
                    if heard.elapsed() >= self.timeout && self.somebody_waits() {
                        // It is not gone, so nobody else may serve in its place: once it goes on it would install what it has.
                        let error = AttachError::TimedOut {
                            pager: self.pager.to_string(),
                            time: self.timeout,
                            source: Box::new(AttachError::Passing {
                                pager: self.pager.to_string(),
                                source: PassingError::Quiet,
                            }),
                        };
                        return Ended::Failed(FailureKind::Lost, error);
                    }
                    if let Err(error) = send(stream, &Message::Ping, &[]) {
                        return Ended::Gone(error);
                    }
                }
                Err(error) => return Ended::Gone(error),
            }
        }
    }

    fn all_present(&self) {
        let _ = self.all_present_at.set(Instant::now());
        (self.observer)(Notice::AllPagesPresent);
        self.collapser.hand_over(populated_huge_pages(&self.states));
        let (collapser, region) = (Arc::clone(&self.collapser), Arc::clone(&self.region));
        let thread = thread::Builder::new().name("umem-collapse".into());
        match thread.spawn(move || collapser.run(&region)) {
            Ok(thread) => *self.collapsing.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread),
            Err(error) => tracing::debug!(%error, "no huge pages are made: there is no thread for it"),
        }
    }

    fn fail(&self, kind: FailureKind, error: AttachError) {
        if self.closing.load(SeqCst) {
            return;
        }
        let source = match kind {
            FailureKind::Corrupt => SourceError::Corrupt(error.into()),
            FailureKind::Lost | FailureKind::Pager => SourceError::Lost(error.into()),
        };
        let url = self.pager.to_string();
        (self.observer)(Notice::Failed(Arc::new(PagerError::Source { url, source })));
    }

    fn wake_all(&self) {
        for stripe in &self.stripes {
            let addresses = self.region.addresses(stripe.pages);
            if let Err(error) = stripe.uffd.wake(addresses) {
                tracing::debug!(%error, "cannot wake");
            }
        }
    }

    /// Whether a fault was told that nobody has read, or one was read and not answered.
    fn somebody_waits(&self) -> bool {
        let unread = self.stripes.iter().any(|stripe| {
            let mut ready = [PollFd::from_borrowed_fd(stripe.uffd.as_fd(), PollFlags::IN)];
            let now = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            rustix::event::poll(&mut ready, Some(&now)).is_ok_and(|ready| ready > 0)
        });
        unread || {
            self.states.recount();
            self.states.counts().in_flight > 0
        }
    }
}
