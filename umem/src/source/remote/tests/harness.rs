//! A server that speaks real frames over real sockets and does what each test asks of it, and a sink that counts what comes.

use std::collections::HashMap;
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crate::causes::chain;
use crate::channel::{Receiver, Sender};
use crate::image;
use crate::link::{Listener, Stream};
use crate::source::remote::{RemoteOptions, RemoteSource, RemoteUrl};
use crate::source::{Class, Content, PageSink, PageSource, SourceError};
use crate::units::{PAGE_SIZE, PageIndex, PageRange};
use crate::wire::{
    Bitmap, BitmapKind, ChannelKind, Checksums, Encoding, Epoch, FailCode, Failed, Features, Goodbye,
    GoodbyeReason, Hello, Incoming, Message, Pages, RequestId, Role, SessionId, VERSION, Welcome, lz4,
};

/// Nothing here takes as long, on a slow machine with other work to do.
pub(super) const PATIENCE: Duration = Duration::from_mins(1);
pub(super) const PAGES: u64 = 1 << 14;
pub(super) const METADATA: &[u8] = b"what the guest needs to start";

pub(super) fn range(start: u64, count: u64) -> PageRange {
    PageRange::new(PageIndex(start), count)
}

/// What a page holds; every seventh is all zero.
pub(super) fn content(page: u64) -> Vec<u8> {
    if page.is_multiple_of(7) {
        return vec![0; PAGE_SIZE];
    }
    page.to_le_bytes().repeat(PAGE_SIZE / 8)
}

/// A server's side of a channel.
pub(super) struct Channel {
    pub(super) stream: Arc<Stream>,
    pub(super) sender: Sender,
    pub(super) receiver: Receiver,
    pub(super) features: Features,
}

/// What a client said.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Said {
    Request(RequestId, Vec<PageRange>),
    Bitmap(RequestId, PageRange),
    Metadata(RequestId),
    Goodbye,
    /// The connection is gone.
    Gone,
}

/// What a hello said.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    pub(super) kind: ChannelKind,
    pub(super) features: Features,
    pub(super) session: SessionId,
}

impl Channel {
    /// Takes a connection, and the hello on it.
    pub(super) fn accept(listener: &Listener) -> (Self, Caller) {
        let stream = Arc::new(listener.accept().unwrap());
        stream.handshake(PATIENCE).unwrap();
        stream.set_timeouts(Some(PATIENCE), Some(PATIENCE)).unwrap();
        let sender = Sender::new(Arc::clone(&stream));
        let mut receiver = Receiver::new(Arc::clone(&stream), Incoming::acceptor());
        let Message::Hello(Hello {
            channel,
            features,
            session,
            ..
        }) = receiver.receive().unwrap()
        else {
            panic!("no hello");
        };
        let caller = Caller {
            kind: channel,
            features,
            session,
        };
        let channel = Self {
            stream,
            sender,
            receiver,
            features: Features::NONE,
        };
        (channel, caller)
    }

    pub(super) fn welcome(&mut self, caller: &Caller) {
        let welcome = self.welcome_to(caller);
        self.sender.send(&Message::Welcome(welcome)).unwrap();
        self.receiver
            .incoming
            .open(caller.kind, Role::Fetcher, self.features);
    }

    /// What it is welcomed with.
    pub(super) fn welcome_to(&mut self, caller: &Caller) -> Welcome {
        self.features = caller.features.and(Features::LZ4);
        Welcome {
            version: VERSION,
            features: self.features,
            pages: PAGES,
            epoch: Epoch(0),
            keep_alive_ms: 5000,
            window: 64,
            session: SessionId([7; 16]),
            digest: Some([3; 32]),
        }
    }

    pub(super) fn open(listener: &Listener) -> (Self, Caller) {
        let (mut channel, caller) = Self::accept(listener);
        channel.welcome(&caller);
        (channel, caller)
    }

    /// What comes next; pings are answered.
    pub(super) fn hear(&mut self) -> Said {
        loop {
            return match self.receiver.receive() {
                Ok(Message::Request(request)) => {
                    Said::Request(request.request, request.ranges.iter().collect())
                }
                Ok(Message::BitmapRequest(wanted)) => Said::Bitmap(wanted.request, wanted.range),
                Ok(Message::MetadataRequest { request }) => Said::Metadata(request),
                Ok(Message::Goodbye(_)) => Said::Goodbye,
                Ok(Message::Ping { token }) => {
                    let _ = self.sender.send(&Message::Pong { token });
                    continue;
                }
                Ok(message) => panic!("{message:?}"),
                Err(_) => Said::Gone,
            };
        }
    }

    /// Sends the pages of `range`, all at once.
    pub(super) fn answer(&mut self, request: RequestId, range: PageRange) {
        for start in (range.start.0..range.end().0).step_by(256) {
            self.answer_frame(
                request,
                PageRange::new(PageIndex(start), 256).clamp_to(range.end()),
            );
        }
    }

    pub(super) fn answer_frame(&mut self, request: RequestId, range: PageRange) {
        let pages: Vec<Vec<u8>> = range.pages().map(|page| content(page.0)).collect();
        self.send_pages(request, range, &pages);
    }

    pub(super) fn send_pages(&mut self, request: RequestId, range: PageRange, pages: &[Vec<u8>]) {
        let checksums: Vec<u64> = pages.iter().map(|page| image::checksum(page)).collect();
        let data: Vec<u8> = pages
            .iter()
            .zip(&checksums)
            .filter(|(_, checksum)| **checksum != 0)
            .flat_map(|(page, _)| page.iter().copied())
            .collect();
        let mut buffer = vec![0; lz4::bound(data.len())];
        let mut compressor = lz4::Compressor::default();
        let compressed = match self.features {
            Features::LZ4 if !data.is_empty() => compressor.compress(&data, &mut buffer),
            _ => None,
        };
        let (encoding, data) = match compressed {
            Some(data) => (Encoding::Lz4, data),
            None => (Encoding::Raw, &data[..]),
        };
        let pages = Pages {
            request,
            range,
            epoch: Epoch(0),
            encoding,
            checksums: Checksums::from(&checksums[..]),
            data,
        };
        // A client that is gone need not take it.
        let _ = self.sender.send(&Message::Pages(pages));
    }

    pub(super) fn send(&mut self, message: &Message<'_>) {
        let _ = self.sender.send(message);
    }

    pub(super) fn fail(&mut self, request: RequestId, range: PageRange, code: FailCode) {
        self.send(&Message::Failed(Failed {
            request,
            range: PageRange::new(range.start, 1),
            code,
            text: "",
        }));
    }

    pub(super) fn say_goodbye(&mut self) {
        self.send(&Message::Goodbye(Goodbye {
            reason: GoodbyeReason::Draining,
            text: "",
        }));
    }

    /// Answers everything, until the client is gone.
    pub(super) fn serve(&mut self) {
        loop {
            match self.hear() {
                Said::Request(request, ranges) => {
                    for range in ranges {
                        self.answer(request, range);
                    }
                }
                other => {
                    if !self.serve_other(&other) {
                        return;
                    }
                }
            }
        }
    }

    /// Answers what is no request for pages. False: there is nothing to answer.
    pub(super) fn serve_other(&mut self, said: &Said) -> bool {
        match *said {
            Said::Metadata(request) => {
                self.send(&Message::Metadata {
                    request,
                    bytes: METADATA,
                });
                true
            }
            Said::Bitmap(request, range) => {
                let mut bits = vec![0; range.count.div_ceil(8) as usize];
                for page in range.pages().filter(|page| !page.0.is_multiple_of(7)) {
                    bits[((page.0 - range.start.0) / 8) as usize] |= 1 << ((page.0 - range.start.0) % 8);
                }
                self.send(&Message::Bitmap(Bitmap {
                    request,
                    kind: BitmapKind::Data,
                    range,
                    bits: &bits,
                }));
                true
            }
            _ => false,
        }
    }
}

/// A socket of a server, which goes with the test.
pub(super) struct Place {
    pub(super) listener: Arc<Listener>,
    pub(super) url: RemoteUrl,
    pub(super) _directory: tempfile::TempDir,
}

impl Place {
    pub(super) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("unix:{}", directory.path().join("socket").display());
        let listener = Listener::bind(&url.parse().unwrap()).unwrap();
        Self {
            listener: Arc::new(listener),
            url: url.parse().unwrap(),
            _directory: directory,
        }
    }

    /// Serves each connection in a thread of its own by `serve`, which is told the connection's number. They end with the
    /// connections, and with the test's process.
    pub(super) fn serve(&self, serve: impl Fn(usize, Channel, Caller) + Send + Sync + 'static) {
        let (listener, serve) = (Arc::clone(&self.listener), Arc::new(serve));
        thread::spawn(move || {
            for number in 0.. {
                let (channel, caller) = Channel::accept(&listener);
                let serve = Arc::clone(&serve);
                thread::spawn(move || serve(number, channel, caller));
            }
        });
    }

    /// Serves all that is asked of a good server.
    pub(super) fn serve_well(&self) {
        self.serve(|_, mut channel, caller| {
            channel.welcome(&caller);
            channel.serve();
        });
    }

    /// Serves metadata on the first channel, and gives each channel to the test.
    pub(super) fn channels(&self) -> mpsc::Receiver<(Channel, Caller)> {
        self.channels_from(0)
    }

    /// The same for a server that is not the first to be connected to.
    pub(super) fn more_channels(&self) -> mpsc::Receiver<(Channel, Caller)> {
        self.channels_from(1)
    }

    pub(super) fn channels_from(&self, first: usize) -> mpsc::Receiver<(Channel, Caller)> {
        let (sender, channels) = mpsc::channel();
        self.serve(move |number, mut channel, caller| {
            channel.welcome(&caller);
            if first + number == 0 {
                let metadata = channel.hear();
                assert!(channel.serve_other(&metadata));
            }
            let _ = sender.send((channel, caller));
        });
        channels
    }
}

/// The next channel of this kind; others are kept open.
pub(super) fn next_of(
    channels: &mpsc::Receiver<(Channel, Caller)>,
    kind: ChannelKind,
    others: &mut Vec<Channel>,
) -> Channel {
    loop {
        let (channel, caller) = channels.recv_timeout(PATIENCE).unwrap();
        if caller.kind == kind {
            return channel;
        }
        others.push(channel);
    }
}

/// Counts what arrives. Every page that was asked for arrives once, with what it holds.
#[derive(Default)]
pub(super) struct Sink {
    pub(super) seen: Mutex<Seen>,
    pub(super) changed: Condvar,
}

#[derive(Default)]
pub(super) struct Seen {
    /// How often each page came.
    pub(super) pages: HashMap<u64, u64>,
    pub(super) completed: HashMap<bool, u64>,
    pub(super) failed: Vec<SourceError>,
    /// What was told of the connection.
    pub(super) told: Vec<&'static str>,
}

impl Sink {
    pub(super) fn wait(&self, what: &str, condition: impl Fn(&Seen) -> bool) -> MutexGuard<'_, Seen> {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = self.seen.lock().unwrap();
        while !condition(&seen) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "{what} is still to come; failed: {:?}",
                seen.failed
            );
            seen = self.changed.wait_timeout(seen, left).unwrap().0;
        }
        seen
    }

    /// Waits until all that was submitted has come, and checks that each page did as often as it was asked for.
    pub(super) fn wait_for(&self, expected: &HashMap<u64, u64>, submits: [u64; 2]) {
        let seen = self.wait("a page", |seen| {
            !seen.failed.is_empty()
                || [true, false].map(|demand| seen.completed.get(&demand).copied().unwrap_or(0)) == submits
        });
        assert!(seen.failed.is_empty(), "{:?}", seen.failed);
        assert_eq!(&seen.pages, expected);
    }

    pub(super) fn wait_for_failure(&self) -> String {
        let seen = self.wait("the failure", |seen| !seen.failed.is_empty());
        chain(&seen.failed[0])
    }
}

impl PageSink for Sink {
    fn arrived(&self, pages: PageRange, content: Content, buffer: &[u8], class: Class) {
        let mut seen = self.seen.lock().unwrap();
        for (index, page) in pages.pages().enumerate() {
            let expected = self::content(page.0);
            match content {
                Content::Zero => assert_eq!(expected, [0; PAGE_SIZE], "page {page} came as zero"),
                Content::Data => assert!(
                    expected == buffer[index * PAGE_SIZE..(index + 1) * PAGE_SIZE],
                    "page {page}, {class:?}"
                ),
            }
            *seen.pages.entry(page.0).or_default() += 1;
        }
        self.changed.notify_all();
    }

    fn completed(&self, class: Class) {
        let mut seen = self.seen.lock().unwrap();
        *seen.completed.entry(class == Class::Demand).or_default() += 1;
        self.changed.notify_all();
    }

    fn failed(&self, error: SourceError) {
        self.seen.lock().unwrap().failed.push(error);
        self.changed.notify_all();
    }

    fn lost(&self, _: &dyn std::error::Error) {
        self.seen.lock().unwrap().told.push("lost");
    }

    fn back(&self) {
        self.seen.lock().unwrap().told.push("back");
    }
}

pub(super) fn options(timeout: Duration) -> RemoteOptions {
    RemoteOptions {
        timeout,
        ..RemoteOptions::default()
    }
}

pub(super) fn connect(places: &[&Place], options: RemoteOptions) -> (RemoteSource, Arc<Sink>) {
    let urls: Vec<RemoteUrl> = places.iter().map(|place| place.url.clone()).collect();
    let (source, metadata) = RemoteSource::connect(&urls, options).unwrap();
    assert_eq!(metadata, METADATA);
    assert_eq!(source.pages(), PAGES);
    let sink = Arc::new(Sink::default());
    let weak: Weak<Sink> = Arc::downgrade(&sink);
    source.attach(weak);
    (source, sink)
}

pub(super) fn once(ranges: &[PageRange]) -> HashMap<u64, u64> {
    let pages = ranges.iter().flat_map(|range| range.pages());
    pages.map(|page| (page.0, 1)).collect()
}
