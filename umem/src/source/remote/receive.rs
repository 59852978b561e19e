//! Receiving on a connection: what comes is handed on, and it is looked at whether anything comes.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use super::lane::{Generation, Lane, Taken, Wanted};
use super::{Ended, RemoteError, Shared};
use crate::channel::{ChannelError, Receiver, Sender};
use crate::link::Stream;
use crate::source::{Content, PageSink, SourceError};
use crate::units::{PAGE_SIZE, PageIndex, PageRange};
use crate::wire::{FailCode, Failed, MAX_PAGES_PER_FRAME, Message, Pages, RequestId, Run, WireError};

/// A connection, as who receives has it.
pub(super) struct Link {
    pub(super) generation: Generation,
    /// The server's place in the list.
    pub(super) server: usize,
    pub(super) stream: Arc<Stream>,
    pub(super) life: Life,
    receiver: Receiver,
    /// For pages that came compressed.
    buffer: Vec<u8>,
}

/// What is known of whether there still is a server.
pub(super) struct Life {
    keep_alive: Option<Duration>,
    /// How often it is to be looked at.
    pub(super) tick: Duration,
    pub(super) since: Instant,
    /// When something came last.
    heard: Instant,
    /// When an answer came last, or the connection was made.
    pub(super) answered: Instant,
    /// When the server was asked for a sign of life, if nothing has come since.
    asked: Option<Instant>,
}

impl Link {
    pub(super) fn new(
        generation: Generation,
        server: usize,
        receiver: Receiver,
        stream: Arc<Stream>,
        life: Life,
    ) -> Self {
        Self {
            generation,
            server,
            stream,
            life,
            receiver,
            buffer: vec![0; MAX_PAGES_PER_FRAME * PAGE_SIZE],
        }
    }
}

impl Life {
    pub(super) fn new(keep_alive: Option<Duration>, tick: Duration) -> Self {
        let now = Instant::now();
        Self {
            keep_alive,
            tick,
            since: now,
            heard: now,
            answered: now,
            asked: None,
        }
    }

    fn note_sign(&mut self) {
        self.heard = Instant::now();
        self.asked = None;
    }
}

/// What messages come on, and where pages go.
#[derive(Clone, Copy)]
struct Origin<'a> {
    lane: &'a Arc<Lane>,
    generation: Generation,
    server: usize,
    /// `None`: nobody wants them any more.
    sink: Option<&'a dyn PageSink>,
}

/// Damaged pages of one request after which it is no longer the wire that is to blame.
const MOST_DAMAGE: usize = 16;

impl Shared {
    /// Waits for one message, and hands on what it brings. `sender` is for a connection that the lane has retired.
    pub(super) fn receive(
        &self,
        lane: &Arc<Lane>,
        link: &mut Link,
        sender: Option<&mut Sender>,
    ) -> Result<(), Ended> {
        let message = match link.receiver.receive() {
            Ok(message) => message,
            Err(ChannelError::Quiet) => return self.be_patient(lane, link, sender),
            Err(error) => return Err(Ended::Channel(error)),
        };
        link.life.note_sign();
        let sink = self.sink();
        let from = Origin {
            lane,
            generation: link.generation,
            server: link.server,
            sink: sink.as_deref().map(|sink| sink as &dyn PageSink),
        };
        self.hand_on(from, &message, &mut link.life, &mut link.buffer, sender)
    }

    /// Takes some of what has come, without waiting, and hands it on. False: nothing has come.
    pub(super) fn receive_some(
        &self,
        lane: &Arc<Lane>,
        link: &mut Link,
        sink: Option<&dyn PageSink>,
    ) -> Result<bool, Ended> {
        let came = link.receiver.fill().map_err(Ended::Channel)?;
        if came {
            link.life.note_sign();
        }
        let from = Origin {
            lane,
            generation: link.generation,
            server: link.server,
            sink,
        };
        // Also where nothing came: what came together with the welcome has been read with it.
        while let Some(message) = link.receiver.next_message().map_err(Ended::Channel)? {
            self.hand_on(from, &message, &mut link.life, &mut link.buffer, None)?;
        }
        Ok(came)
    }

    fn hand_on(
        &self,
        from: Origin<'_>,
        message: &Message<'_>,
        life: &mut Life,
        buffer: &mut [u8],
        sender: Option<&mut Sender>,
    ) -> Result<(), Ended> {
        if matches!(
            message,
            Message::Pages(_) | Message::Zero(_) | Message::Bitmap(_) | Message::Failed(_)
        ) {
            life.answered = life.heard;
        } else if self.waits_in_vain(from.lane, life.answered) {
            return Err(Ended::Channel(ChannelError::Quiet));
        }
        match message {
            Message::Pages(pages) => self.take_pages(from, pages, buffer),
            Message::Zero(zero) => self.take(from, zero.request, zero.range, None),
            Message::Bitmap(bitmap) => {
                let (lane, generation) = (from.lane, from.generation);
                let taken = lane.take_bitmap(generation, bitmap.request, bitmap.range, bitmap.bits);
                taken.map(finish)
            }
            Message::Failed(failed) => Err(self.take_failure(from, failed)),
            Message::Ping { token } => {
                let pong = Message::Pong { token: *token };
                say(from.lane, from.generation, sender, &pong)
            }
            Message::Goodbye(_) => Err(Ended::Goodbye),
            // Hints, and answers to what this side never asks.
            _ => Ok(()),
        }
    }

    /// For who looks from time to time, while others receive: whether it is too long that nothing came. Answers when to look again.
    pub(super) fn look_after(&self, lane: &Arc<Lane>, link: &mut Link) -> Result<Instant, Ended> {
        let Life { heard, tick, .. } = link.life;
        // Also where something comes: of a frame that trickles in no answer may ever come.
        if self.waits_in_vain(lane, link.life.answered) {
            return Err(Ended::Channel(ChannelError::Quiet));
        }
        if heard.elapsed() < tick {
            return Ok(heard + tick);
        }
        if link.receiver.is_within_frame() {
            return Err(Ended::Channel(link.receiver.stuck()));
        }
        self.be_patient(lane, link, None)?;
        // From when the server was asked for a sign, if it was.
        Ok(Instant::now() + tick)
    }

    /// Whether somebody has waited for the whole time-out, whatever else the server has said.
    fn waits_in_vain(&self, lane: &Lane, answered: Instant) -> bool {
        lane.waited(answered).is_some_and(|waited| waited >= self.timeout)
    }

    /// Nothing came. A link that is dead says nothing, and so does a server with nothing to say: it is asked for a sign, sooner
    /// if somebody waits.
    fn be_patient(
        &self,
        lane: &Arc<Lane>,
        link: &mut Link,
        sender: Option<&mut Sender>,
    ) -> Result<(), Ended> {
        let life = &mut link.life;
        if self.waits_in_vain(lane, life.answered) {
            return Err(Ended::Channel(ChannelError::Quiet));
        }
        let waiting = lane.is_waiting().then_some(self.silence);
        let Some(limit) = life.keep_alive.into_iter().chain(waiting).min() else {
            return Ok(());
        };
        match life.asked {
            Some(asked) if asked.elapsed() >= limit => Err(Ended::Channel(ChannelError::Quiet)),
            None if life.heard.elapsed() >= limit => {
                life.asked = Some(Instant::now());
                say(lane, link.generation, sender, &Message::Ping { token: 0 })
            }
            _ => Ok(()),
        }
    }

    fn take_pages(&self, from: Origin<'_>, pages: &Pages<'_>, buffer: &mut [u8]) -> Result<(), Ended> {
        let unpacked = pages
            .unpack(buffer)
            .map_err(|error| Ended::Channel(error.into()))?;
        if let Err(error) = unpacked.verify() {
            return Err(match error {
                WireError::PageChecksum { page } => self.take_damage(from, pages.request, page),
                error => Ended::Channel(error.into()),
            });
        }
        for run in unpacked.runs() {
            match run {
                Run::Zero(range) => self.take(from, pages.request, range, None)?,
                Run::Data(range, data) => {
                    self.bytes.fetch_add(data.len() as u64, Relaxed);
                    self.take(from, pages.request, range, Some(data))?;
                }
            }
        }
        Ok(())
    }

    /// Takes pages that were asked for, and only those.
    fn take(
        &self,
        from: Origin<'_>,
        request: RequestId,
        range: PageRange,
        data: Option<&[u8]>,
    ) -> Result<(), Ended> {
        let Taken { class, complete } = from.lane.take(from.generation, request, range, data)?;
        if complete.is_some() {
            self.requests.fetch_add(1, Relaxed);
        }
        if let (Some(class), Some(sink)) = (class, from.sink) {
            let content = if data.is_some() {
                Content::Data
            } else {
                Content::Zero
            };
            sink.arrived(range, content, data.unwrap_or_default(), class);
            if complete.is_some() {
                sink.completed(class);
            }
        }
        finish(complete);
        Ok(())
    }

    /// A page is not what its checksum says. It may have been the wire, so any server may try twice with each page; then it is its
    /// own fault.
    fn take_damage(&self, from: Origin<'_>, request: RequestId, page: PageIndex) -> Ended {
        let error = RemoteError::Corrupt {
            url: self.ways[from.server].to_string(),
            page,
        };
        match from.lane.damage(from.generation, request, page) {
            Ok((same, all)) if same < self.ways.len().max(2) && all < MOST_DAMAGE => Ended::Elsewhere(error),
            Ok(_) => Ended::Source(SourceError::Corrupt(error.into())),
            Err(ended) => ended,
        }
    }

    /// A server cannot give pages. Another may, so as many as there are are asked: no more, so that it comes to an end.
    fn take_failure(&self, from: Origin<'_>, failed: &Failed<'_>) -> Ended {
        let error = RemoteError::Failed {
            url: self.ways[from.server].to_string(),
            pages: failed.range,
            code: failed.code,
            text: failed.text.to_owned(),
        };
        match from.lane.fail(from.generation, failed.request, failed.range) {
            Ok(failures) if failures < self.ways.len() => Ended::Elsewhere(error),
            Ok(_) => Ended::Source(match failed.code {
                FailCode::Corrupt => SourceError::Corrupt(error.into()),
                _ => SourceError::Lost(error.into()),
            }),
            Err(ended) => ended,
        }
    }
}

fn say(
    lane: &Arc<Lane>,
    on: Generation,
    sender: Option<&mut Sender>,
    message: &Message<'_>,
) -> Result<(), Ended> {
    if let Some(sender) = sender {
        return sender.post(message).map(drop).map_err(Ended::Channel);
    }
    lane.say(on, message);
    Ok(())
}

/// Gives a thread that waits what it waits for.
fn finish(complete: Option<Wanted>) {
    if let Some(
        Wanted::Read { buffer, answer, .. }
        | Wanted::Bitmap {
            bits: buffer, answer, ..
        },
    ) = complete
    {
        // Whoever does not wait any more does not need it.
        let _ = answer.try_send(Ok(buffer));
    }
}
