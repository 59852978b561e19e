//! Pages from a page server.
//!
//! One channel for demand and one or more for the fill, each with a thread that receives and hands on what comes (for demand,
//! unless who asks has borrowed that), and with a table of what was asked for and has not come. A connection that is lost is made anew, at the same server or the next one
//! named, and what is still in the table is asked for again: nothing else, and nothing twice. Until then who waits keeps
//! waiting. Only when no server gave an answer for the whole time-out, and somebody waits, is the source lost.

mod called;
mod error;
mod keeper;
mod lane;
mod opened;
mod receive;
mod reception;
#[cfg(test)]
mod tests;
mod url;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use self::called::Way;
use self::keeper::Keeper;
use self::lane::{Lane, Wanted};
use self::opened::{Opened, Opening};
use self::receive::Link;
use self::reception::Loan;
use super::{Class, Content, Inbox, PageSink, PageSource, Received, SourceError, SourceStats};
use crate::channel::ChannelError;
use crate::link::{Credentials, Stream};
use crate::units::{PageIndex, PageRange};
use crate::wire::{ChannelKind, Features, MAX_BITMAP_PAGES, SessionId};

pub use called::Callers;
pub use error::RemoteError;
pub use url::RemoteUrl;

/// The most connections for the fill.
pub const MAX_CONNECTIONS: usize = 16;

/// How long a server may take to answer a hello.
const HELLO_PATIENCE: Duration = Duration::from_secs(10);

/// How long a server may say nothing while somebody waits, before it is asked for a sign of life.
const SILENCE: Duration = Duration::from_secs(5);

/// However short the time-out is, a server may take this long for everything.
const LEAST_PATIENCE: Duration = Duration::from_millis(100);

/// How page servers are used.
#[derive(Clone, Debug)]
pub struct RemoteOptions {
    /// How long pages may be waited for without any answer, while servers are looked for.
    pub timeout: Duration,
    /// Connections for the fill, 1 to [`MAX_CONNECTIONS`]. Demand has its own.
    pub connections: usize,
    /// Whether servers may compress.
    pub lz4: bool,
    /// For TLS, which TCP is without if there are none.
    pub credentials: Option<Credentials>,
}

impl Default for RemoteOptions {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(30),
            connections: 1,
            lz4: false,
            credentials: None,
        }
    }
}

impl RemoteOptions {
    fn features(&self) -> Features {
        if self.lz4 { Features::LZ4 } else { Features::NONE }
    }
}

/// An image on a page server.
pub struct RemoteSource {
    shared: Arc<Shared>,
}

struct Shared {
    /// Tried in turn.
    ways: Vec<Way>,
    options: RemoteOptions,
    timeout: Duration,
    /// How long one server may take to be connected to.
    patience: Duration,
    /// How long it may say nothing while somebody waits.
    silence: Duration,
    /// At each server, so that it knows which channels are one VM's.
    sessions: Mutex<Vec<SessionId>>,
    pages: u64,
    /// The image's identity, which every server that is connected to must have.
    digest: Option<[u8; 32]>,
    /// For demand, and then for the fill.
    lanes: Vec<Arc<Lane>>,
    sink: OnceLock<Weak<dyn PageSink + Send + Sync>>,
    /// Of every [`MAX_BITMAP_PAGES`] pages, once asked for, which hold something.
    data: Vec<OnceLock<Vec<u8>>>,
    closing: AtomicBool,
    /// Lanes that had a connection and have none. Held while the sink is told, so that it is told in order.
    lost: Mutex<usize>,
    bytes: AtomicU64,
    requests: AtomicU64,
    reconnects: AtomicU64,
}

/// Why nothing more comes on a connection.
enum Ended {
    /// The connection is lost, or no good.
    Channel(ChannelError),
    /// The server takes nothing new.
    Goodbye,
    /// The server cannot give what it was asked for; another may.
    Elsewhere(RemoteError),
    /// The source; no other connection would do better.
    Source(SourceError),
}

/// How long one of several servers may take, so that the others are tried too.
fn patience(timeout: Duration, servers: usize) -> Duration {
    (timeout / servers.max(1) as u32).clamp(LEAST_PATIENCE, HELLO_PATIENCE)
}

impl RemoteSource {
    /// Connects to the first of `urls` that answers, and reads the image's metadata. Connections that are lost later are made
    /// anew.
    ///
    /// # Errors
    /// That of the last server, if none answers as it should; none of them is waited for.
    pub fn connect(urls: &[RemoteUrl], options: RemoteOptions) -> Result<(Self, Vec<u8>), RemoteError> {
        Self::connect_to(urls, options, None, None)
    }

    /// The same, to the image with this digest and as many pages.
    fn connect_to(
        urls: &[RemoteUrl],
        options: RemoteOptions,
        digest: Option<[u8; 32]>,
        pages: Option<u64>,
    ) -> Result<(Self, Vec<u8>), RemoteError> {
        let mut failure = RemoteError::Closed;
        for (server, url) in urls.iter().enumerate() {
            let opening = Opening {
                url,
                channel: ChannelKind::Demand,
                digest,
                pages,
                session: SessionId::NEW,
                features: options.features(),
                credentials: options.credentials.as_ref(),
                patience: patience(options.timeout, urls.len()),
            };
            match opening.open_with_metadata() {
                Ok((opened, metadata)) => {
                    let ways = urls.iter().cloned().map(Way::Server).collect();
                    let terms = (opened.pages, opened.digest);
                    let source = Self::start(ways, options, terms, Some((server, opened)));
                    return Ok((source, metadata));
                }
                Err(error) => {
                    tracing::info!(
                        error = &error as &dyn std::error::Error,
                        "trying the next page server"
                    );
                    failure = error;
                }
            }
        }
        Err(failure)
    }

    /// The `pages` pages of a machine whose provider opens the channels, and opens them again when they are lost.
    pub fn called(callers: Arc<Callers>, pages: u64, options: RemoteOptions) -> Self {
        Self::start(vec![Way::Callers(callers)], options, (pages, None), None)
    }

    /// With the first demand channel, and the place it is to, if there is one.
    fn start(
        ways: Vec<Way>,
        options: RemoteOptions,
        (pages, digest): (u64, Option<[u8; 32]>),
        mut first: Option<(usize, Opened)>,
    ) -> Self {
        let fill = options.connections.clamp(1, MAX_CONNECTIONS);
        let kinds = [ChannelKind::Demand]
            .into_iter()
            .chain(vec![ChannelKind::Background; fill]);
        let mut sessions = vec![SessionId::NEW; ways.len()];
        if let Some((server, demand)) = &first {
            sessions[*server] = demand.session;
        }
        let shared = Arc::new(Shared {
            timeout: options.timeout,
            patience: patience(options.timeout, ways.len()),
            ways,
            // A quarter: nothing, then nothing after being asked for a sign, and there is time left to look elsewhere.
            silence: (options.timeout / 4).clamp(LEAST_PATIENCE, SILENCE),
            sessions: Mutex::new(sessions),
            options,
            pages,
            digest,
            lanes: kinds.map(|kind| Arc::new(Lane::new(kind))).collect(),
            sink: OnceLock::new(),
            data: (0..pages.div_ceil(MAX_BITMAP_PAGES))
                .map(|_| OnceLock::new())
                .collect(),
            closing: AtomicBool::new(false),
            lost: Mutex::default(),
            bytes: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            reconnects: AtomicU64::new(0),
        });
        for (index, lane) in shared.lanes.iter().enumerate() {
            let keeper = Keeper::new(Arc::clone(&shared), Arc::clone(lane));
            let first = first.take();
            let spawned = thread::Builder::new()
                .name(format!("umem-remote-{index}"))
                .spawn(move || keeper.run(first));
            if let Err(error) = spawned {
                tracing::error!(%error, "no thread for a page server's channel");
            }
        }
        Self { shared }
    }

    /// How many pages the image has.
    pub fn pages(&self) -> u64 {
        self.shared.pages
    }
}

impl Drop for RemoteSource {
    fn drop(&mut self) {
        self.close();
    }
}

impl RemoteSource {
    /// Nothing more will be asked of it: that its servers go away from now on is no loss, and they are not called again.
    pub fn has_all(&self) {
        self.shared.closing.store(true, Relaxed);
    }
}

impl PageSource for RemoteSource {
    fn url(&self) -> String {
        self.shared
            .ways
            .iter()
            .map(Way::to_string)
            .collect::<Vec<_>>()
            .join(",")
    }

    fn try_read(&self, pages: PageRange, _: &mut [u8]) -> Result<Option<Content>, SourceError> {
        let zero = pages.pages().all(|page| self.shared.is_known_zero(page));
        Ok(zero.then_some(Content::Zero))
    }

    fn read(&self, pages: PageRange, class: Class, buffer: &mut [u8]) -> Result<Content, SourceError> {
        let (answer, answered) = sync_channel(1);
        let wanted = Wanted::Read {
            pages,
            buffer: vec![0; pages.bytes()],
            answer,
        };
        self.shared.lane(class).ask(vec![pages], wanted);
        let content = answered
            .recv()
            .unwrap_or_else(|_| Err(SourceError::Lost(RemoteError::Closed.into())))?;
        buffer.copy_from_slice(&content);
        Ok(Content::Data)
    }

    fn next_data(&self, within: PageRange) -> Result<Option<PageRange>, SourceError> {
        let shared = &self.shared;
        let mut at = within.start.0;
        let end = within.end().0.min(shared.pages);
        while at < end {
            let chunk = at / MAX_BITMAP_PAGES;
            let start = chunk * MAX_BITMAP_PAGES;
            let count = MAX_BITMAP_PAGES.min(shared.pages - start);
            let bits = shared.data_bits(chunk, PageRange::new(PageIndex(start), count))?;
            let has = |page: &u64| bits[((page - start) / 8) as usize] & (1 << ((page - start) % 8)) != 0;
            let stop = (start + count).min(end);
            if let Some(first) = (at..stop).find(has) {
                let run = (first..stop).take_while(has).count() as u64;
                return Ok(Some(PageRange::new(PageIndex(first), run)));
            }
            at = stop;
        }
        Ok(None)
    }

    fn digest(&self) -> Option<[u8; 32]> {
        self.shared.digest
    }

    fn attach(&self, sink: Weak<dyn PageSink + Send + Sync>) {
        // Held, so that a connection that is lost meanwhile is told of by either this or its keeper.
        let lost = self.shared.lost();
        // Called once.
        let _ = self.shared.sink.set(sink);
        if *lost > 0
            && let Some(sink) = self.shared.sink()
        {
            sink.lost(&ChannelError::Closed);
        }
    }

    fn submit(&self, ranges: &[PageRange], class: Class) -> bool {
        self.shared.lane(class).ask(ranges.to_vec(), Wanted::Pages(class));
        true
    }

    fn beside(&self) -> Result<Option<Arc<dyn PageSource>>, SourceError> {
        let shared = &self.shared;
        let options = RemoteOptions {
            connections: 1,
            ..shared.options.clone()
        };
        let urls: Vec<RemoteUrl> = shared.servers().cloned().collect();
        if urls.len() < shared.ways.len() {
            // Who calls has called for this source alone.
            return Ok(None);
        }
        let (source, _) = Self::connect_to(&urls, options, shared.digest, Some(shared.pages))
            .map_err(|error| SourceError::Lost(error.into()))?;
        Ok(Some(Arc::new(source)))
    }

    fn lend_inbox(&self) -> Option<Box<dyn Inbox>> {
        let (loan, stream) = self.shared.lanes[0]
            .reception
            .borrow(|link| Arc::clone(&link.stream))?;
        Some(Box::new(DemandInbox {
            shared: Arc::clone(&self.shared),
            loan,
            stream,
        }))
    }

    fn close(&self) {
        self.shared.closing.store(true, Relaxed);
        for lane in &self.shared.lanes {
            lane.close();
        }
        for place in &self.shared.ways {
            if let Way::Callers(callers) = place {
                callers.close();
            }
        }
    }

    fn stats(&self) -> SourceStats {
        let shared = &self.shared;
        SourceStats {
            bytes: shared.bytes.load(Relaxed),
            requests: shared.requests.load(Relaxed),
            reconnects: shared.reconnects.load(Relaxed),
        }
    }
}

/// The receiving on the demand lane's connection, borrowed.
struct DemandInbox {
    shared: Arc<Shared>,
    loan: Loan,
    stream: Arc<Stream>,
}

impl Inbox for DemandInbox {
    fn receive(&self, sink: &dyn PageSink) -> Received {
        let lane = &self.shared.lanes[0];
        let receive = |link: &mut Link| self.shared.receive_some(lane, link, Some(sink));
        match lane.reception.receive_on(&self.loan, receive) {
            // What was decrypted is no longer in the socket.
            Some(true) if self.stream.is_encrypted() => Received::More,
            Some(_) => Received::All,
            None => Received::Over,
        }
    }
}

impl AsFd for DemandInbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Drop for DemandInbox {
    fn drop(&mut self) {
        self.shared.lanes[0].reception.give_back(&self.loan);
    }
}

impl Shared {
    /// Where something of a class is best asked for.
    fn lane(&self, class: Class) -> &Arc<Lane> {
        let fill = self.lanes[1..].iter().min_by_key(|lane| lane.load());
        match (class, fill) {
            (Class::Background, Some(lane)) => lane,
            _ => &self.lanes[0],
        }
    }

    fn servers(&self) -> impl Iterator<Item = &RemoteUrl> {
        self.ways.iter().filter_map(|place| match place {
            Way::Server(url) => Some(url),
            Way::Callers(_) => None,
        })
    }

    fn is_known_zero(&self, page: PageIndex) -> bool {
        let bits = self.data[(page.0 / MAX_BITMAP_PAGES) as usize].get();
        let bit = page.0 % MAX_BITMAP_PAGES;
        bits.is_some_and(|bits| bits[(bit / 8) as usize] & (1 << (bit % 8)) == 0)
    }

    /// Which pages of a chunk hold something; asked for once. Waits.
    fn data_bits(&self, chunk: u64, range: PageRange) -> Result<&[u8], SourceError> {
        let known = &self.data[chunk as usize];
        if known.get().is_none() {
            let (answer, answered) = sync_channel(1);
            let bits = vec![0; range.count.div_ceil(8) as usize];
            let wanted = Wanted::Bitmap {
                chunk: range,
                bits,
                answer,
            };
            self.lane(Class::Background).ask(vec![range], wanted);
            let bits = answered
                .recv()
                .unwrap_or_else(|_| Err(SourceError::Lost(RemoteError::Closed.into())))?;
            let _ = known.set(bits);
        }
        known
            .get()
            .map(Vec::as_slice)
            .ok_or_else(|| SourceError::Lost(RemoteError::Closed.into()))
    }

    fn lost(&self) -> MutexGuard<'_, usize> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember_session(&self, server: usize, session: SessionId) {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)[server] = session;
    }

    fn session(&self, server: usize) -> SessionId {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)[server]
    }
}
