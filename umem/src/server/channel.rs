//! One channel: from its hello to its end, on a thread of its own.

use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::client::{Client, Peer};
use super::lz4::Adaptive;
use super::metrics::{End, Refusal, Sent};
use super::provider::{Provider, Unreadable};
use super::turns::Place;
use super::{KEEP_ALIVE, PATIENCE, STEP, Shared};
use crate::call;
use crate::channel::{ChannelError, Receiver, Sender};
use crate::image::Wait;
use crate::link::Stream;
use crate::schedule::{step_back, step_forward};
use crate::units::{PAGE_SIZE, PageIndex, PageRange};
use crate::wire::{
    Bitmap, BitmapKind, BitmapRequest, ChannelKind, Checksums, Encoding, Epoch, FailCode, Failed, Features,
    Goodbye, GoodbyeReason, Incoming, MAX_BITMAP_PAGES, Message, PagesHead, RefuseCode, Refused, Request,
    RequestId, Role, VERSION, WireError, Zero,
};

/// How long a channel may say nothing at all.
const SILENCE: Duration = KEEP_ALIVE.saturating_mul(4);

/// What others than its thread need of a channel.
#[derive(Debug)]
pub(super) struct Channel {
    stream: Arc<Stream>,
    sender: Mutex<Sender>,
    said_goodbye: AtomicBool,
}

impl Channel {
    pub(super) fn new(stream: Stream) -> Self {
        let stream = Arc::new(stream);
        Self {
            sender: Mutex::new(Sender::new(Arc::clone(&stream))),
            stream,
            said_goodbye: AtomicBool::new(false),
        }
    }

    /// Ends the connection, for whoever reads or writes it too.
    pub(super) fn shutdown(&self) {
        // Where it fails, it has ended.
        let _ = self.stream.shutdown();
    }

    /// Says that this server is about to end, if that needs no waiting. A thread that is about to send does it itself.
    pub(super) fn say_draining(&self) {
        if let Ok(mut sender) = self.sender.try_lock()
            && is_writable(&self.stream, Duration::ZERO).is_ok()
        {
            self.say_goodbye(&mut sender, GoodbyeReason::Draining);
        }
    }

    pub(super) fn refuse(&self, code: RefuseCode, text: &str) {
        let refused = Refused {
            version: VERSION,
            code,
            text,
        };
        // Nobody waits for who does not even read this.
        let _ = self.sender().send_with(&Message::Refused(refused), |_| {
            Err(io::ErrorKind::WouldBlock.into())
        });
    }

    fn sender(&self) -> MutexGuard<'_, Sender> {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say_goodbye(&self, sender: &mut Sender, reason: GoodbyeReason) {
        if !self.said_goodbye.swap(true, SeqCst) {
            let goodbye = Message::Goodbye(Goodbye { reason, text: "" });
            // Who is gone needs none.
            let _ = sender.send_with(&goodbye, |stream| is_writable(stream, PATIENCE));
        }
    }
}

/// Waits until a connection takes more, or is gone.
fn is_writable(stream: &Stream, patience: Duration) -> io::Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // At most 10 s, which is a valid time.
        let timeout = Timespec::try_from(left).unwrap_or_default();
        match poll(
            &mut [PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::OUT)],
            Some(&timeout),
        ) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

impl Shared {
    /// Serves a channel to its end.
    pub(super) fn serve_channel(&self, number: u64, channel: &Channel) {
        if let Err(error) = channel.stream.handshake(PATIENCE) {
            // Most often somebody's certificates are wrong, and what the other side can say of it is less.
            let error = &error as &dyn std::error::Error;
            tracing::warn!(
                channel = number,
                error,
                "client sent away: the TLS handshake failed"
            );
            self.metrics.refuse(Refusal::Handshake);
            return;
        }
        if let Err(error) = channel.stream.set_timeouts(Some(PATIENCE), Some(PATIENCE)) {
            tracing::info!(%error, channel = number, "connection lost");
            return;
        }
        let mut receiver = Receiver::new(Arc::clone(&channel.stream), Incoming::acceptor());
        let hello = match receiver.receive() {
            Ok(Message::Hello(hello)) => hello,
            // `Incoming` lets nothing else through.
            Ok(_) => return,
            // Damaged on the way: said again, it may be a good one.
            Err(ChannelError::Protocol(WireError::HeaderChecksum | WireError::PayloadChecksum { .. })) => {
                self.metrics.refuse(Refusal::Garbage);
                return;
            }
            Err(ChannelError::Protocol(error)) => {
                self.refuse(channel, error.refuse_code(), &error.to_string());
                return;
            }
            Err(ChannelError::Quiet) => {
                self.metrics.refuse(Refusal::Silent);
                return;
            }
            Err(_) => {
                self.metrics.leave();
                return;
            }
        };
        let (image, welcome) = match self.open(&hello) {
            Ok(opened) => opened,
            Err((code, text)) => {
                self.refuse(channel, code, &text);
                return;
            }
        };
        let (kind, features) = (hello.channel, welcome.features);
        let client = Client {
            peer: Peer::of(&*channel.stream),
            session: welcome.session,
        };
        self.join(number, client);
        let welcomed = channel.sender().send(&Message::Welcome(welcome));
        receiver.incoming.open(kind, Role::Fetcher, features);
        let result =
            welcomed.and_then(|()| self.attend(channel, image, (kind, features), client, &mut receiver));
        if let Err(error) = result {
            let error = &error as &dyn std::error::Error;
            tracing::info!(channel = number, error, "channel ended");
        }
    }

    /// Serves pages on an open channel until it ends. That its client closes it is no error.
    fn attend(
        &self,
        channel: &Channel,
        provider: &dyn Provider,
        (kind, features): (ChannelKind, Features),
        client: Client,
        receiver: &mut Receiver,
    ) -> Result<(), ChannelError> {
        self.metrics.open(kind);
        match kind {
            ChannelKind::Demand => step_forward(),
            _ => step_back(),
        }
        let mut serving = Serving {
            shared: self,
            channel,
            provider,
            kind,
            place: self.turns.join(kind, client),
            buffer: vec![0; STEP as usize * PAGE_SIZE],
            lz4: features
                .contains(Features::LZ4)
                .then(|| Adaptive::new(STEP as usize * PAGE_SIZE)),
        };
        let result = serving.serve(receiver);
        drop(serving);
        let end = match &result {
            Ok(()) => End::Done,
            Err(_) if self.has_stopped() => End::Stopped,
            Err(ChannelError::Closed) => End::Closed,
            Err(ChannelError::Quiet) => End::Quiet,
            Err(ChannelError::Lost(error)) if error.kind() == io::ErrorKind::TimedOut => End::Unread,
            Err(ChannelError::Lost(_) | ChannelError::Tls(_)) => End::Lost,
            Err(ChannelError::Protocol(_) | ChannelError::Unasked { .. } | ChannelError::SpeaksTls) => {
                End::Protocol
            }
        };
        self.metrics.end(kind, end);
        match result {
            Err(ChannelError::Closed) => Ok(()),
            result => result,
        }
    }

    /// Serves pages on a channel that this side has opened.
    pub(super) fn attend_called(
        &self,
        opened: call::Opened,
        kind: ChannelKind,
        provider: &dyn Provider,
    ) -> Result<(), ChannelError> {
        let call::Opened {
            sender,
            mut receiver,
            stream,
            welcome,
        } = opened;
        let client = Client {
            peer: Peer::of(&*stream),
            session: welcome.session,
        };
        let channel = Channel {
            stream,
            sender: Mutex::new(sender),
            said_goodbye: AtomicBool::new(false),
        };
        let result = self.attend(
            &channel,
            provider,
            (kind, welcome.features),
            client,
            &mut receiver,
        );
        channel.shutdown();
        result
    }

    /// Refuses a connection, and counts it.
    pub(super) fn refuse(&self, channel: &Channel, code: RefuseCode, text: &str) {
        self.metrics.refuse(code.into());
        channel.refuse(code, text);
    }
}

/// What a channel's thread works with.
struct Serving<'a> {
    shared: &'a Shared,
    channel: &'a Channel,
    provider: &'a dyn Provider,
    kind: ChannelKind,
    place: Place<'a>,
    buffer: Vec<u8>,
    /// If it was agreed upon.
    lz4: Option<Adaptive>,
}

impl Serving<'_> {
    fn serve(&mut self, receiver: &mut Receiver) -> Result<(), ChannelError> {
        // From here on who has nothing to ask for says at least that.
        self.channel
            .stream
            .set_timeouts(Some(SILENCE), Some(PATIENCE))
            .map_err(ChannelError::Lost)?;
        loop {
            match receiver.receive_within(SILENCE)? {
                Message::Request(request) => {
                    let since = Instant::now();
                    self.answer(&request)?;
                    self.shared.metrics.answer(self.kind, since.elapsed());
                }
                Message::MetadataRequest { request } => {
                    let bytes = self.provider.metadata();
                    self.place.take();
                    self.send(&Message::Metadata { request, bytes })?;
                }
                Message::BitmapRequest(wanted) => self.answer_bitmap(wanted)?,
                Message::Ping { token } => self.send(&Message::Pong { token })?,
                Message::Barrier { number, .. } => self.send(&Message::BarrierAck { number })?,
                Message::Goodbye(_) => {
                    self.channel
                        .say_goodbye(&mut self.channel.sender(), GoodbyeReason::Done);
                    return Ok(());
                }
                // Hints, and answers to what this side never asks.
                _ => {}
            }
            self.place.give_back();
            // Whoever told this server to end could not say so while something was being sent here.
            if self.shared.is_stopping() {
                self.channel
                    .say_goodbye(&mut self.channel.sender(), GoodbyeReason::Draining);
            }
        }
    }

    fn send(&mut self, message: &Message<'_>) -> Result<(), ChannelError> {
        let place = &mut self.place;
        self.channel
            .sender()
            .send_with(message, |stream| wait_for_room(place, stream))
    }

    fn answer(&mut self, request: &Request<'_>) -> Result<(), ChannelError> {
        let end = PageIndex(self.provider.pages());
        for range in request.ranges.iter() {
            let inside = range.clamp_to(end);
            let mut at = inside.start;
            while at < inside.end() {
                let step = PageRange::new(at, STEP).clamp_to(inside.end());
                self.place.take();
                self.answer_step(request.request, step)?;
                at = step.end();
            }
            if inside.count < range.count {
                let outside = PageRange::new(range.start.max(end), range.count - inside.count);
                self.fail(request.request, outside, FailCode::OutOfRange, "")?;
            }
        }
        Ok(())
    }

    fn fail(
        &mut self,
        request: RequestId,
        range: PageRange,
        code: FailCode,
        text: &str,
    ) -> Result<(), ChannelError> {
        self.shared.metrics.pages(Sent::Failed, range.count, 0, 0);
        self.send(&Message::Failed(Failed {
            request,
            range,
            code,
            text,
        }))
    }

    /// Answers pages with one frame. The turn is this channel's.
    fn answer_step(&mut self, request: RequestId, range: PageRange) -> Result<(), ChannelError> {
        let mut checksums = [0; STEP as usize];
        let checksums = &mut checksums[..range.count as usize];
        if let Err(Unreadable { code, text }) = self.read(range, checksums) {
            return self.fail(request, range, code, &text);
        }
        let metrics = &self.shared.metrics;
        let data_pages = checksums.iter().filter(|checksum| **checksum != 0).count();
        let zero_pages = range.count - data_pages as u64;
        metrics.pages(Sent::Zero, zero_pages, 0, 0);
        let epoch = Epoch(0);
        if data_pages == 0 {
            return self.send(&Message::Zero(Zero {
                request,
                range,
                epoch,
            }));
        }
        let content = &mut self.buffer[..range.bytes()];
        let length = data_pages * PAGE_SIZE;
        // Before the connection is locked.
        let together = self.lz4.is_some() || zero_pages == 0;
        let compressed = self.lz4.as_mut().and_then(|lz4| {
            close_up(content, checksums);
            lz4.compress(&content[..length])
        });
        let (encoding, sent) = match compressed {
            Some(_) => (Encoding::Lz4, Sent::Lz4),
            None => (Encoding::Raw, Sent::Raw),
        };
        let whole;
        let pieces;
        let data: &[IoSlice<'_>] = match compressed {
            Some(compressed) => {
                whole = [IoSlice::new(compressed)];
                &whole
            }
            None if together => {
                whole = [IoSlice::new(&content[..length])];
                &whole
            }
            None => {
                pieces = content
                    .chunks(PAGE_SIZE)
                    .zip(&*checksums)
                    .filter(|(_, checksum)| **checksum != 0)
                    .map(|(page, _)| IoSlice::new(page))
                    .collect::<Vec<_>>();
                &pieces
            }
        };
        let head = PagesHead {
            request,
            range,
            epoch,
            encoding,
            checksums: Checksums::from(&*checksums),
            data_length: data.iter().map(|piece| piece.len()).sum(),
        };
        metrics.pages(sent, data_pages as u64, length, head.data_length);
        let place = &mut self.place;
        self.channel
            .sender()
            .send_pages_with(&head, data, |stream| wait_for_room(place, stream))
    }

    /// Reads pages and their checksums; what has to wait for the disk does so without a turn.
    fn read(&mut self, range: PageRange, checksums: &mut [u64]) -> Result<(), Unreadable> {
        let provider = self.provider;
        let buffer = &mut self.buffer[..range.bytes()];
        if provider.read(range, Wait::No, checksums, buffer)?.is_none() {
            self.place
                .without(|| provider.read(range, Wait::Yes, checksums, buffer))?;
        }
        Ok(())
    }

    /// Sends which pages may hold something.
    fn answer_bitmap(&mut self, wanted: BitmapRequest) -> Result<(), ChannelError> {
        let BitmapRequest { request, kind, range } = wanted;
        let one = PageRange::single(range.start);
        if kind != BitmapKind::Data {
            let text = "this server keeps no list of what was received";
            return self.fail(request, one, FailCode::Unreadable, text);
        }
        if range.end() > PageIndex(self.provider.pages()) {
            return self.fail(request, one, FailCode::OutOfRange, "");
        }
        let mut at = range.start;
        while at < range.end() {
            let piece = PageRange::new(at, MAX_BITMAP_PAGES).clamp_to(range.end());
            let mut bits = vec![0; piece.count.div_ceil(8) as usize];
            // It may have to read a whole part of the table. Nobody asks for this twice, so it needs no turn.
            if let Err(Unreadable { code, text }) = self.data_bits(piece, &mut bits) {
                return self.fail(request, one, code, &text);
            }
            self.place.take();
            self.send(&Message::Bitmap(Bitmap {
                request,
                kind,
                range: piece,
                bits: &bits,
            }))?;
            self.place.give_back();
            at = piece.end();
        }
        Ok(())
    }

    fn data_bits(&self, piece: PageRange, bits: &mut [u8]) -> Result<(), Unreadable> {
        let mut rest = piece;
        while rest.count > 0
            && let Some(run) = self.provider.next_data(rest)?
        {
            let run = run.from(rest.start).clamp_to(piece.end());
            for page in run.pages() {
                let bit = page.0 - piece.start.0;
                bits[(bit / 8) as usize] |= 1 << (bit % 8);
            }
            rest = rest.from(run.end());
        }
        Ok(())
    }
}

/// Moves the pages that are not zero together.
fn close_up(content: &mut [u8], checksums: &[u64]) {
    let mut to = 0;
    for (page, checksum) in checksums.iter().enumerate() {
        if *checksum != 0 {
            let from = page * PAGE_SIZE;
            if from != to {
                content.copy_within(from..from + PAGE_SIZE, to);
            }
            to += PAGE_SIZE;
        }
    }
}

/// A client that does not read keeps nobody else waiting.
fn wait_for_room(place: &mut Place<'_>, stream: &Stream) -> io::Result<()> {
    if place.has_turn() {
        place.without(|| is_writable(stream, PATIENCE))
    } else {
        is_writable(stream, PATIENCE)
    }
}
