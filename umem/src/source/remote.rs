//! Pages from a page server.
//!
//! One channel for demand and one for the fill, each with a thread that receives and hands on what comes, and with a table of
//! what was asked for and has not come. A connection that is lost is made anew, at the same server or the next one named, and
//! what is still in the table is asked for again: nothing else, and nothing twice. Until then who waits keeps waiting. Only
//! when nothing was reached for the whole time-out, and somebody waits, is the source lost.

mod error;
mod lane;
mod opened;
mod url;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use self::lane::{Ended, Lane, LaneState, Pending, subtract};
use self::opened::{Opened, open_channel};
use super::{Class, Content, PageSink, PageSource, SourceError, SourceStats};
use crate::channel::{ChannelError, Receiver};
use crate::units::{PAGE_SIZE, PageIndex, PageRange};
use crate::wire::{
    ChannelKind, FailCode, MAX_BITMAP_PAGES, MAX_PAGES_PER_FRAME, Message, Pages, RequestId, Run, WireError,
};

pub use error::RemoteError;
pub use url::RemoteUrl;

/// The first and the longest pause between attempts to connect.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));

/// An image on a page server.
pub struct RemoteSource {
    shared: Arc<Shared>,
}

struct Shared {
    /// Tried in turn.
    urls: Vec<RemoteUrl>,
    timeout: Duration,
    pages: u64,
    /// The image's identity, which every server that is connected to must have.
    digest: Option<[u8; 32]>,
    lanes: [Lane; 2],
    sink: OnceLock<Weak<dyn PageSink>>,
    /// Of every [`MAX_BITMAP_PAGES`] pages, once asked for, which hold something.
    data: Vec<OnceLock<Vec<u8>>>,
    closing: AtomicBool,
    bytes: AtomicU64,
    requests: AtomicU64,
    reconnects: AtomicU64,
}

impl RemoteSource {
    /// Connects to the first of `urls` that answers, and reads the image's metadata. Connections that are lost later are made
    /// anew for as long as `timeout`.
    pub fn connect(urls: &[RemoteUrl], timeout: Duration) -> Result<(Self, Vec<u8>), RemoteError> {
        let mut failure = RemoteError::Closed;
        for url in urls {
            match open_channel(url, ChannelKind::Demand, None, None) {
                Ok(mut opened) => {
                    let metadata = opened.read_metadata(url)?;
                    let (pages, digest) = (opened.pages, opened.digest);
                    let source = Self::start(urls, timeout, pages, digest, opened);
                    return Ok((source, metadata));
                }
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    fn start(
        urls: &[RemoteUrl],
        timeout: Duration,
        pages: u64,
        digest: Option<[u8; 32]>,
        demand: Opened,
    ) -> Self {
        let lane = |kind| Lane {
            kind,
            state: Mutex::new(LaneState {
                sender: None,
                stream: None,
                next: 1,
                pending: HashMap::new(),
                closed: false,
            }),
            changed: Condvar::new(),
        };
        let shared = Arc::new(Shared {
            urls: urls.to_vec(),
            timeout,
            pages,
            digest,
            lanes: [lane(ChannelKind::Demand), lane(ChannelKind::Background)],
            sink: OnceLock::new(),
            data: (0..pages.div_ceil(MAX_BITMAP_PAGES))
                .map(|_| OnceLock::new())
                .collect(),
            closing: AtomicBool::new(false),
            bytes: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            reconnects: AtomicU64::new(0),
        });
        for (index, first) in [Some(demand), None].into_iter().enumerate() {
            let shared = Arc::clone(&shared);
            let name = format!("umem-remote-{index}");
            let spawned = thread::Builder::new()
                .name(name)
                .spawn(move || shared.keep_lane(index, first));
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

impl PageSource for RemoteSource {
    fn url(&self) -> String {
        self.shared
            .urls
            .iter()
            .map(RemoteUrl::to_string)
            .collect::<Vec<_>>()
            .join(",")
    }

    fn try_read(&self, pages: PageRange, _: &mut [u8]) -> Result<Option<Content>, SourceError> {
        let zero = pages.pages().all(|page| self.shared.is_known_zero(page));
        Ok(zero.then_some(Content::Zero))
    }

    fn read(&self, pages: PageRange, buffer: &mut [u8]) -> Result<Content, SourceError> {
        let (answer, answered) = sync_channel(1);
        let left = vec![pages];
        let content = vec![0; pages.bytes()];
        let pending = Pending::Read {
            pages,
            left,
            buffer: content,
            answer,
        };
        self.shared.lane(Class::Background).ask(pending);
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

    fn attach(&self, sink: Weak<dyn PageSink>) {
        // Called once.
        let _ = self.shared.sink.set(sink);
    }

    fn submit(&self, ranges: &[PageRange], class: Class) -> bool {
        self.shared.lane(class).ask(Pending::Pages {
            left: ranges.to_vec(),
            class,
        });
        true
    }

    fn close(&self) {
        self.shared.closing.store(true, Relaxed);
        for lane in &self.shared.lanes {
            lane.close();
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

impl Shared {
    fn lane(&self, class: Class) -> &Lane {
        &self.lanes[match class {
            Class::Demand => 0,
            Class::Background => 1,
        }]
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
            self.lane(Class::Background).ask(Pending::Bitmap {
                chunk: range,
                left: vec![range],
                bits,
                answer,
            });
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

    /// A lane's thread: receives, and connects anew what is lost.
    fn keep_lane(self: Arc<Self>, index: usize, mut opened: Option<Opened>) {
        let lane = &self.lanes[index];
        // A page that did not match its checksum; the second time it is the server's fault and not the wire's.
        let mut suspect = None;
        loop {
            let (url, channel) = match opened.take() {
                Some(channel) => (self.urls[0].clone(), channel),
                None => match self.reconnect(lane) {
                    Some(connected) => connected,
                    None => return,
                },
            };
            let Opened {
                sender,
                mut receiver,
                stream,
                ..
            } = channel;
            if let Err(error) = lane.resume(sender, &stream) {
                tracing::debug!(%error, %url, "cannot ask again");
                let _ = stream.shutdown();
            }
            let ended = self.receive(lane, &url, &mut receiver, &mut suspect);
            let mut state = lane.lock();
            (state.sender, state.stream) = (None, None);
            drop(state);
            if self.closing.load(Relaxed) {
                return;
            }
            match ended {
                Ended::Channel(error) => {
                    tracing::warn!(%url, channel = %lane.kind, error = &error as &dyn std::error::Error, "page server lost, connecting anew");
                    self.reconnects.fetch_add(1, Relaxed);
                }
                Ended::Source(error) => {
                    self.give_up(lane, error);
                    return;
                }
            }
        }
    }

    /// Connects, trying all servers in turn. `None`: this side is ending, or it was in vain for the whole time-out and somebody
    /// waits, who was told.
    fn reconnect(&self, lane: &Lane) -> Option<(RemoteUrl, Opened)> {
        let since = Instant::now();
        let mut pause = BACKOFF.0;
        loop {
            let mut failure = None;
            for url in &self.urls {
                if self.closing.load(Relaxed) {
                    return None;
                }
                match open_channel(url, lane.kind, self.digest, Some(self.pages)) {
                    Ok(opened) => return Some((url.clone(), opened)),
                    Err(error) => failure = Some((url, error)),
                }
            }
            if since.elapsed() >= self.timeout
                && !lane.lock().pending.is_empty()
                && let Some((url, error)) = failure
            {
                let (seconds, url) = (self.timeout.as_secs(), url.to_string());
                let error = RemoteError::TimedOut {
                    seconds,
                    url,
                    source: Box::new(error),
                };
                self.give_up(lane, SourceError::Lost(error.into()));
                return None;
            }
            let state = lane.lock();
            if !self.closing.load(Relaxed) {
                drop(
                    lane.changed
                        .wait_timeout(state, pause)
                        .unwrap_or_else(PoisonError::into_inner),
                );
            }
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    /// Tells all who wait that nothing will come.
    fn give_up(&self, lane: &Lane, error: SourceError) {
        // Whoever waits in `read` or `next_data` learns it by that.
        lane.close();
        if let Some(sink) = self.sink() {
            sink.failed(error);
        }
    }

    fn sink(&self) -> Option<Arc<dyn PageSink>> {
        self.sink.get().and_then(Weak::upgrade)
    }

    /// Hands on what comes until the connection ends.
    fn receive(
        &self,
        lane: &Lane,
        url: &RemoteUrl,
        receiver: &mut Receiver,
        suspect: &mut Option<PageIndex>,
    ) -> Ended {
        let mut unpacked = vec![0; MAX_PAGES_PER_FRAME * PAGE_SIZE];
        let mut asked_for_a_sign = false;
        loop {
            let message = match receiver.receive() {
                Ok(message) => message,
                // A link that is dead says nothing, and so does a server with nothing to say: it is asked.
                Err(ChannelError::Quiet) if !asked_for_a_sign => {
                    asked_for_a_sign = true;
                    match lane.ping() {
                        Ok(()) => continue,
                        Err(ended) => return ended,
                    }
                }
                Err(error) => return Ended::Channel(error),
            };
            asked_for_a_sign = false;
            let result = match message {
                Message::Pages(pages) => self.take_pages(lane, url, &pages, &mut unpacked, suspect),
                Message::Zero(zero) => self.take(lane, zero.request, zero.range, Content::Zero, &[]),
                Message::Bitmap(bitmap) => lane.take_bitmap(bitmap.request, bitmap.range, bitmap.bits),
                Message::Failed(failed) => {
                    let (pages, code, text) = (failed.range, failed.code, failed.text.to_owned());
                    let error = RemoteError::Failed {
                        url: url.to_string(),
                        pages,
                        code,
                        text,
                    }
                    .into();
                    Err(Ended::Source(match code {
                        FailCode::Corrupt => SourceError::Corrupt(error),
                        _ => SourceError::Lost(error),
                    }))
                }
                Message::Ping { token } => lane.pong(token),
                Message::Goodbye(_) => Err(Ended::Channel(ChannelError::Closed)),
                // Hints, and answers to what this side never asks.
                _ => Ok(()),
            };
            if let Err(ended) = result {
                return ended;
            }
        }
    }

    fn take_pages(
        &self,
        lane: &Lane,
        url: &RemoteUrl,
        pages: &Pages<'_>,
        buffer: &mut [u8],
        suspect: &mut Option<PageIndex>,
    ) -> Result<(), Ended> {
        let unpacked = pages
            .unpack(buffer)
            .map_err(|error| Ended::Channel(error.into()))?;
        match unpacked.verify() {
            Ok(()) => {}
            Err(WireError::PageChecksum { page }) if *suspect == Some(page) => {
                let error = RemoteError::Corrupt {
                    url: url.to_string(),
                    page,
                };
                return Err(Ended::Source(SourceError::Corrupt(error.into())));
            }
            Err(error) => {
                if let WireError::PageChecksum { page } = error {
                    *suspect = Some(page);
                }
                return Err(Ended::Channel(error.into()));
            }
        }
        for run in unpacked.runs() {
            match run {
                Run::Zero(range) => self.take(lane, pages.request, range, Content::Zero, &[])?,
                Run::Data(range, data) => {
                    self.bytes.fetch_add(data.len() as u64, Relaxed);
                    self.take(lane, pages.request, range, Content::Data, data)?;
                }
            }
        }
        Ok(())
    }

    /// Takes pages that were asked for, and only those.
    fn take(
        &self,
        lane: &Lane,
        request: RequestId,
        range: PageRange,
        content: Content,
        data: &[u8],
    ) -> Result<(), Ended> {
        let not_asked = || Ended::Channel(ChannelError::Unasked { pages: range });
        let mut state = lane.lock();
        let pending = state.pending.get_mut(&request).ok_or_else(not_asked)?;
        let left = pending.left().ok_or_else(not_asked)?;
        if !subtract(left, range) {
            return Err(not_asked());
        }
        let complete = left.is_empty();
        let class = match pending {
            Pending::Pages { class, .. } => Some(*class),
            Pending::Read { pages, buffer, .. } => {
                let offset = (range.start.0 - pages.start.0) as usize * PAGE_SIZE;
                if content == Content::Data {
                    buffer[offset..offset + data.len()].copy_from_slice(data);
                }
                None
            }
            Pending::Bitmap { .. } => None,
        };
        let finished = if complete {
            state.pending.remove(&request)
        } else {
            None
        };
        drop(state);
        if let (Some(class), Some(sink)) = (class, self.sink()) {
            sink.arrived(range, content, data, class);
            if complete {
                sink.completed(class);
            }
        }
        if complete {
            self.requests.fetch_add(1, Relaxed);
        }
        if let Some(Pending::Read { buffer, answer, .. }) = finished {
            let _ = answer.try_send(Ok(buffer));
        }
        Ok(())
    }
}
