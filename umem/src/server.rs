//! The page server: RAM images for any number of fetchers at once.
//!
//! A thread a channel, which does nothing but wait for requests and answer them in turn; what is shared is the page cache. A
//! channel costs its thread and one buffer, and there is a bound on channels. Who connects and says nothing is let go, and so
//! is who asks and does not read the answers.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::fd::OwnedFd;
use rustix::io::Errno;

use crate::channel::{ChannelError, Receiver, Sender};
use crate::image::{Image, ReadError, Wait};
use crate::link::{Listener, Stream};
use crate::units::{PAGE_SIZE, PageIndex, PageRange};
use crate::wire::{
    Bitmap, BitmapKind, BitmapRequest, Checksums, Encoding, Epoch, FailCode, Failed, Features, Goodbye,
    GoodbyeReason, Hello, Incoming, MAX_BITMAP_PAGES, Message, PagesHead, RefuseCode, Refused, RequestId,
    Role, SessionId, VERSION, Welcome, Zero,
};

/// Channels at a time, over all clients.
const MAX_CHANNELS: usize = 1024;

/// How long a new channel may take to say hello, and an answer may wait to be read.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often each side of a channel says something. Who has not been heard of for four times as long is gone.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// How long channels may go on after the server was told to end.
const DRAIN: Duration = Duration::from_secs(5);

/// How long a goodbye may wait to be read: a client that reads has room for it.
const GOODBYE_PATIENCE: Duration = Duration::from_millis(100);

/// Pages read and sent at a time: 256 KiB, which stays in the processor's cache between being read and being sent.
const STEP: u64 = 64;

/// Requests taken at a time on a channel. They are answered in turn; what is beyond waits in the socket.
const WINDOW: u16 = 64;

/// What a server has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServerStats {
    /// Channels opened.
    pub channels: u64,
    /// Connections refused, or ended for what they said or did not say.
    pub refused: u64,
    /// Requests answered.
    pub requests: u64,
    /// Pages sent, zero pages included.
    pub pages: u64,
    /// Bytes of page content sent.
    pub bytes: u64,
}

/// A page server.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// By name.
    images: HashMap<String, Image>,
    session_key: [u8; 16],
    sessions: AtomicU64,
    stopping: AtomicBool,
    stop: OwnedFd,
    channels: Mutex<Channels>,
    ended: Condvar,
    stats: Counters,
}

#[derive(Debug, Default)]
struct Channels {
    next: u64,
    open: HashMap<u64, Arc<Channel>>,
}

/// What others than its thread need of a channel.
#[derive(Debug)]
struct Channel {
    stream: Arc<Stream>,
    sender: Mutex<Sender>,
}

#[derive(Debug, Default)]
struct Counters {
    channels: AtomicU64,
    refused: AtomicU64,
    requests: AtomicU64,
    pages: AtomicU64,
    bytes: AtomicU64,
}

/// Ends a server, from any thread.
#[derive(Clone, Debug)]
pub struct ServerStopper(Arc<Shared>);

impl ServerStopper {
    /// No new channel is taken; those that are open may end what they have begun.
    pub fn stop(&self) {
        self.0.stopping.store(true, Relaxed);
        // The counter cannot overflow, so the write cannot fail.
        let _ = rustix::io::write(&self.0.stop, &1u64.to_ne_bytes());
    }
}

impl Server {
    /// A server of these images, by name.
    pub fn new(images: HashMap<String, Image>) -> io::Result<Self> {
        let mut session_key = [0; 16];
        rustix::rand::getrandom(&mut session_key, rustix::rand::GetRandomFlags::empty())?;
        Ok(Self {
            shared: Arc::new(Shared {
                images,
                session_key,
                sessions: AtomicU64::new(0),
                stopping: AtomicBool::new(false),
                stop: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
                channels: Mutex::new(Channels::default()),
                ended: Condvar::new(),
                stats: Counters::default(),
            }),
        })
    }

    /// What ends it.
    pub fn stopper(&self) -> ServerStopper {
        ServerStopper(Arc::clone(&self.shared))
    }

    /// What it has done so far.
    pub fn stats(&self) -> ServerStats {
        let stats = &self.shared.stats;
        ServerStats {
            channels: stats.channels.load(Relaxed),
            refused: stats.refused.load(Relaxed),
            requests: stats.requests.load(Relaxed),
            pages: stats.pages.load(Relaxed),
            bytes: stats.bytes.load(Relaxed),
        }
    }

    /// Serves who connects to `listener`, until stopped.
    pub fn serve(&self, listener: &Listener) -> io::Result<()> {
        let shared = &self.shared;
        while !shared.stopping.load(Relaxed) {
            let mut ready = [
                PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(shared.stop.as_fd(), PollFlags::IN),
            ];
            match rustix::event::poll(&mut ready, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            if ready[0].revents().is_empty() || shared.stopping.load(Relaxed) {
                continue;
            }
            match listener.accept() {
                Ok(stream) => shared.welcome(stream),
                // Gone before it was taken, or no descriptor left for it: the others go on.
                Err(error) => {
                    tracing::warn!(%error, "cannot take a connection");
                    thread::sleep(Duration::from_millis(10));
                }
            }
        }
        shared.drain();
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Channels> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a connection its thread.
    fn welcome(self: &Arc<Self>, stream: Stream) {
        let stream = Arc::new(stream);
        let sender = Mutex::new(Sender::new(Arc::clone(&stream)));
        let channel = Arc::new(Channel { stream, sender });
        let number = {
            let mut channels = self.lock();
            if channels.open.len() >= MAX_CHANNELS {
                drop(channels);
                self.stats.refused.fetch_add(1, Relaxed);
                channel.refuse(RefuseCode::Busy, "as many channels as can be are open");
                return;
            }
            channels.next += 1;
            let number = channels.next;
            channels.open.insert(number, Arc::clone(&channel));
            number
        };
        let shared = Arc::clone(self);
        let thread = thread::Builder::new()
            .name(format!("channel-{number}"))
            .spawn(move || {
                if let Err(error) = shared.serve_channel(&channel) {
                    match error {
                        ChannelError::Closed => {}
                        // Most often somebody's certificates are wrong, and what the other side can say of it is less.
                        error @ ChannelError::Tls(_) => tracing::warn!(
                            channel = number,
                            error = &error as &dyn std::error::Error,
                            "client sent away"
                        ),
                        error => tracing::info!(
                            channel = number,
                            error = &error as &dyn std::error::Error,
                            "channel ended"
                        ),
                    }
                }
                shared.forget(number);
            });
        if let Err(error) = thread {
            tracing::warn!(%error, "no thread for a connection");
            self.forget(number);
        }
    }

    fn forget(&self, number: u64) {
        if let Some(channel) = self.lock().open.remove(&number) {
            // Whoever else holds it does not keep the connection.
            let _ = channel.stream.shutdown();
        }
        self.ended.notify_all();
    }

    /// Says goodbye to all, waits until they have ended, and ends those that do not.
    fn drain(&self) {
        let open: Vec<Arc<Channel>> = self.lock().open.values().cloned().collect();
        let deadline = Instant::now() + DRAIN;
        for channel in open {
            // Who does not read what it asked for finds out when the connection ends: nobody waits for it here.
            let _ = channel.stream.set_timeouts(None, Some(GOODBYE_PATIENCE));
            if let Ok(mut sender) = channel.sender.try_lock() {
                let goodbye = Goodbye {
                    reason: GoodbyeReason::Draining,
                    text: "",
                };
                let _ = sender.send(&Message::Goodbye(goodbye));
            }
        }
        let mut channels = self.lock();
        while !channels.open.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                for channel in channels.open.values() {
                    let _ = channel.stream.shutdown();
                }
            }
            let wait = left.max(Duration::from_millis(100));
            channels = self
                .ended
                .wait_timeout(channels, wait)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn serve_channel(&self, channel: &Channel) -> Result<(), ChannelError> {
        channel.stream.handshake(PATIENCE).map_err(ChannelError::Tls)?;
        channel
            .stream
            .set_timeouts(Some(PATIENCE), Some(PATIENCE))
            .map_err(ChannelError::Lost)?;
        let mut receiver = Receiver::new(Arc::clone(&channel.stream), Incoming::acceptor());
        let image = match receiver.receive()? {
            Message::Hello(hello) => match self.open(&hello) {
                Ok((image, welcome)) => {
                    let kind = hello.channel;
                    channel.sender().send(&Message::Welcome(welcome))?;
                    receiver.incoming.open(kind, Role::Fetcher, welcome.features);
                    image
                }
                Err((code, text)) => {
                    self.stats.refused.fetch_add(1, Relaxed);
                    channel.refuse(code, &text);
                    return Ok(());
                }
            },
            // `Incoming` lets nothing else through.
            _ => return Ok(()),
        };
        self.stats.channels.fetch_add(1, Relaxed);
        // From here on who has nothing to ask for says at least that.
        channel
            .stream
            .set_timeouts(Some(4 * KEEP_ALIVE), Some(PATIENCE))
            .map_err(ChannelError::Lost)?;
        let mut buffer = vec![0; STEP as usize * PAGE_SIZE];
        loop {
            match receiver.receive()? {
                Message::Request(request) => {
                    for range in request.ranges.iter() {
                        self.answer(channel, image, request.request, range, &mut buffer)?;
                    }
                    self.stats.requests.fetch_add(1, Relaxed);
                }
                Message::MetadataRequest { request } => {
                    let bytes = image.metadata();
                    channel.sender().send(&Message::Metadata { request, bytes })?;
                }
                Message::BitmapRequest(wanted) => answer_bitmap(channel, image, wanted)?,
                Message::Ping { token } => channel.sender().send(&Message::Pong { token })?,
                Message::Barrier { number, .. } => channel.sender().send(&Message::BarrierAck { number })?,
                Message::Goodbye(_) => {
                    let goodbye = Goodbye {
                        reason: GoodbyeReason::Done,
                        text: "",
                    };
                    return channel.sender().send(&Message::Goodbye(goodbye));
                }
                // Hints, and answers to what this side never asks.
                _ => {}
            }
        }
    }

    /// What a hello is answered.
    fn open(&self, hello: &Hello<'_>) -> Result<(&Image, Welcome), (RefuseCode, String)> {
        if self.stopping.load(Relaxed) {
            return Err((RefuseCode::Draining, "this server is about to end".into()));
        }
        if hello.role != Role::Fetcher {
            return Err((
                RefuseCode::NotPermitted,
                "this server has pages and takes none".into(),
            ));
        }
        let image = match (hello.image, self.images.len()) {
            ("", 1) => self.images.values().next(),
            (name, _) => self.images.get(name),
        };
        let Some(image) = image else {
            let mut names: Vec<&str> = self.images.keys().map(String::as_str).collect();
            names.sort_unstable();
            let text = format!("no image '{}' here; there are: {}", hello.image, names.join(", "));
            return Err((RefuseCode::UnknownImage, text));
        };
        let digest = image.footer().digest;
        if hello.digest.is_some_and(|expected| expected != digest) {
            return Err((
                RefuseCode::WrongDigest,
                format!("image '{}' has another digest", hello.image),
            ));
        }
        if hello.pages.is_some_and(|pages| pages != image.pages()) {
            return Err((
                RefuseCode::WrongSize,
                format!("image '{}' has {} pages", hello.image, image.pages()),
            ));
        }
        let session = if hello.session == SessionId::NEW {
            self.new_session()
        } else {
            hello.session
        };
        let welcome = Welcome {
            version: VERSION,
            features: Features::NONE,
            pages: image.pages(),
            epoch: Epoch(0),
            keep_alive_ms: KEEP_ALIVE.as_millis() as u32,
            window: WINDOW,
            session,
            digest: Some(digest),
        };
        Ok((image, welcome))
    }

    /// A number that nobody else has: of this server's random key and a counter.
    fn new_session(&self) -> SessionId {
        let mut id = self.session_key;
        let count = self.sessions.fetch_add(1, Relaxed);
        let hash = blake3::keyed_hash(
            &{
                let mut key = [0; 32];
                key[..16].copy_from_slice(&self.session_key);
                key
            },
            &count.to_le_bytes(),
        );
        id.copy_from_slice(&hash.as_bytes()[..16]);
        SessionId(id)
    }

    /// Sends the pages of `range`.
    fn answer(
        &self,
        channel: &Channel,
        image: &Image,
        request: RequestId,
        range: PageRange,
        buffer: &mut [u8],
    ) -> Result<(), ChannelError> {
        let end = PageIndex(image.pages());
        let inside = range.clamp_to(end);
        let mut at = inside.start;
        while at < inside.end() {
            let step = PageRange::new(at, STEP).clamp_to(inside.end());
            self.answer_step(channel, image, request, step, buffer)?;
            at = step.end();
        }
        if inside.count < range.count {
            let outside = PageRange::new(range.start.max(end), range.count - inside.count);
            let text = "";
            let failed = Failed {
                request,
                range: outside,
                code: FailCode::OutOfRange,
                text,
            };
            channel.sender().send(&Message::Failed(failed))?;
        }
        self.stats.pages.fetch_add(inside.count, Relaxed);
        Ok(())
    }

    fn answer_step(
        &self,
        channel: &Channel,
        image: &Image,
        request: RequestId,
        range: PageRange,
        buffer: &mut [u8],
    ) -> Result<(), ChannelError> {
        let mut checksums = [0; STEP as usize];
        let checksums = &mut checksums[..range.count as usize];
        let buffer = &mut buffer[..range.bytes()];
        let read = image.checksums(range, Wait::Yes, checksums).and_then(|_| {
            if checksums.iter().all(|checksum| *checksum == 0) {
                return Ok(());
            }
            // What it is worth is for the fetcher to judge, who has the checksums.
            image.read(range, Wait::Yes, buffer).map(drop)
        });
        if let Err(error) = read {
            let code = match error {
                ReadError::Io { .. } => FailCode::Unreadable,
                ReadError::Corrupt { .. } | ReadError::Truncated { .. } => FailCode::Corrupt,
            };
            let text = error.to_string();
            return channel.sender().send(&Message::Failed(Failed {
                request,
                range,
                code,
                text: &text,
            }));
        }
        let data_pages = checksums.iter().filter(|checksum| **checksum != 0).count();
        if data_pages == 0 {
            return channel.sender().send(&Message::Zero(Zero {
                request,
                range,
                epoch: Epoch(0),
            }));
        }
        let head = PagesHead {
            request,
            range,
            epoch: Epoch(0),
            encoding: Encoding::Raw,
            checksums: Checksums::from(&*checksums),
            data_length: data_pages * PAGE_SIZE,
        };
        let mut data: Vec<IoSlice<'_>> = buffer
            .chunks(PAGE_SIZE)
            .zip(&*checksums)
            .filter(|(_, checksum)| **checksum != 0)
            .map(|(page, _)| IoSlice::new(page))
            .collect();
        self.stats.bytes.fetch_add(head.data_length as u64, Relaxed);
        channel.sender().send_pages(&head, &mut data)
    }
}

/// Sends which pages hold something, by the checksum table.
fn answer_bitmap(channel: &Channel, image: &Image, wanted: BitmapRequest) -> Result<(), ChannelError> {
    let BitmapRequest { request, kind, range } = wanted;
    let fail = |code, text: &str| {
        let range = PageRange::new(range.start, 1);
        channel.sender().send(&Message::Failed(Failed {
            request,
            range,
            code,
            text,
        }))
    };
    if kind != BitmapKind::Data {
        return fail(
            FailCode::Unreadable,
            "this server keeps no list of what was received",
        );
    }
    if range.end() > PageIndex(image.pages()) {
        return fail(FailCode::OutOfRange, "");
    }
    let mut at = range.start;
    while at < range.end() {
        let piece = PageRange::new(at, MAX_BITMAP_PAGES).clamp_to(range.end());
        let mut bits = vec![0; piece.count.div_ceil(8) as usize];
        let mut next = piece.start;
        loop {
            match image.next_with_checksum(next) {
                Ok(Some(run)) if run.start < piece.end() => {
                    for page in run.clamp_to(piece.end()).pages() {
                        let bit = page.0 - piece.start.0;
                        bits[(bit / 8) as usize] |= 1 << (bit % 8);
                    }
                    next = run.end();
                }
                Ok(_) => break,
                Err(error) => return fail(FailCode::Corrupt, &error.to_string()),
            }
        }
        channel.sender().send(&Message::Bitmap(Bitmap {
            request,
            kind,
            range: piece,
            bits: &bits,
        }))?;
        at = piece.end();
    }
    Ok(())
}

impl Channel {
    fn sender(&self) -> MutexGuard<'_, Sender> {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refuse(&self, code: RefuseCode, text: &str) {
        let refused = Refused {
            version: VERSION,
            code,
            text,
        };
        let _ = self.sender().send(&Message::Refused(refused));
    }
}
