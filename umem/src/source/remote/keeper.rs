//! A lane's thread: receives what comes, and makes connections anew.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant};

use super::lane::{Generation, Lane, Taken, Wanted};
use super::opened::{Opened, Opening};
use super::{Ended, RemoteError, Shared};
use crate::channel::{ChannelError, Receiver, Sender};
use crate::link::Stream;
use crate::schedule::{step_back, step_forward};
use crate::source::{Content, PageSink, SourceError};
use crate::units::{PAGE_SIZE, PageIndex, PageRange};
use crate::wire::{
    ChannelKind, FailCode, Failed, MAX_PAGES_PER_FRAME, Message, Pages, RequestId, Run, WireError,
};

/// The first and the longest pause between attempts to connect.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));

/// How long a connection that has nothing to answer lasts where all is well.
const LASTING: Duration = Duration::from_secs(2);

/// A lane's thread.
///
/// Whether a server is of any use shows in its answers: a connection alone, also one with a welcome, ends neither the growing
/// pauses nor the time for which pages may be waited for in vain.
pub(super) struct Keeper {
    shared: Arc<Shared>,
    lane: Arc<Lane>,
    /// The server to try first.
    first: usize,
    pause: Duration,
    /// When the last answer was followed by the loss of the connection.
    trouble_since: Option<Instant>,
    /// How many answers there were by then.
    answers: u64,
    connected_before: bool,
    /// Its connection is one of those that are lost.
    lost: bool,
}

/// A connection, as its receiving thread has it.
struct Link {
    generation: Generation,
    /// The server's place in the list.
    server: usize,
    receiver: Receiver,
    stream: Arc<Stream>,
    keep_alive: Option<Duration>,
    since: Instant,
    /// When something came last.
    heard: Instant,
    /// When an answer came last, or the connection was made.
    answered: Instant,
    /// When the server was asked for a sign of life, if nothing has come since.
    asked: Option<Instant>,
    /// For pages that came compressed.
    buffer: Vec<u8>,
}

impl Keeper {
    pub(super) fn new(shared: Arc<Shared>, lane: Arc<Lane>) -> Self {
        Self {
            shared,
            lane,
            first: 0,
            pause: BACKOFF.0,
            trouble_since: None,
            answers: 0,
            connected_before: false,
            lost: false,
        }
    }

    /// Keeps the lane, which may have a connection already, to a server at this place in the list.
    pub(super) fn run(mut self, mut opened: Option<(usize, Opened)>) {
        match self.lane.kind {
            ChannelKind::Demand => step_forward(),
            _ => step_back(),
        }
        while let Some((server, opened)) = opened.take().or_else(|| self.connect()) {
            let Some(mut link) = self.resume(server, opened) else {
                return;
            };
            let ended = loop {
                if let Err(ended) = self.shared.receive(&self.lane, &mut link, None) {
                    break ended;
                }
            };
            if self.lose(link, ended).is_break() {
                return;
            }
        }
    }

    fn resume(&mut self, server: usize, opened: Opened) -> Option<Link> {
        let shared = &self.shared;
        let Opened {
            sender,
            receiver,
            stream,
            keep_alive,
            session,
            ..
        } = opened;
        shared.remember_session(server, session);
        // As often as it may have to be asked for a sign.
        let tick = keep_alive.map_or(shared.silence, |keep_alive| keep_alive.min(shared.silence));
        if let Err(error) = stream.set_timeouts(Some(tick), Some(shared.patience)) {
            tracing::warn!(%error, "cannot limit how long a page server is waited for");
            let _ = stream.shutdown();
        }
        let generation = self.lane.resume(sender, &stream)?;
        if self.connected_before {
            shared.reconnects.fetch_add(1, Relaxed);
        }
        self.connected_before = true;
        self.note_found();
        self.first = server;
        let now = Instant::now();
        Some(Link {
            generation,
            server,
            receiver,
            stream,
            keep_alive,
            since: now,
            heard: now,
            answered: now,
            asked: None,
            buffer: vec![0; MAX_PAGES_PER_FRAME * PAGE_SIZE],
        })
    }

    /// A connection has ended. What it was asked is asked again elsewhere, or, after a goodbye, still answered by it.
    fn lose(&mut self, link: Link, ended: Ended) -> ControlFlow<()> {
        let shared = Arc::clone(&self.shared);
        let (server, answered_at, lasted) = (link.server, link.answered, link.since.elapsed());
        let url = &shared.urls[server];
        let answered = self.note_answers();
        if let Ended::Goodbye = ended {
            tracing::info!(%url, channel = %self.lane.kind, "page server is about to end, asking elsewhere");
            shared.drain(&self.lane, link);
        } else {
            self.lane.leave(link.generation);
            let _ = link.stream.shutdown();
        }
        if shared.closing.load(Relaxed) {
            return ControlFlow::Break(());
        }
        let next = (server + 1) % shared.urls.len();
        let since = match &ended {
            // From then on it was of no use.
            Ended::Channel(ChannelError::Quiet) => answered_at,
            _ => Instant::now(),
        };
        // A server that was of use and was lost may be there again; one that was of none is the last to be tried again.
        let same =
            answered && matches!(&ended, Ended::Channel(error) if !matches!(error, ChannelError::Quiet));
        self.first = if same { server } else { next };
        let trouble_since = *self.trouble_since.get_or_insert(since);
        self.note_lost(&ended);
        let error = match ended {
            Ended::Source(error) => {
                shared.give_up(&self.lane, error);
                return ControlFlow::Break(());
            }
            Ended::Goodbye => ChannelError::Closed,
            Ended::Channel(error) => error,
            Ended::Elsewhere(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "asking another page server"
                );
                return ControlFlow::Continue(());
            }
        };
        let error = RemoteError::Channel {
            url: url.to_string(),
            source: error,
        };
        if answered {
            tracing::warn!(channel = %self.lane.kind, error = &error as &dyn std::error::Error, "page server lost, connecting anew");
            return ControlFlow::Continue(());
        }
        tracing::debug!(channel = %self.lane.kind, error = &error as &dyn std::error::Error, "page server lost again");
        if lasted >= LASTING {
            self.pause = BACKOFF.0;
        }
        self.back_off(trouble_since, server, error)
    }

    /// Connects, trying all servers in turn. `None`: this side is ending, or it was in vain for the whole time-out and somebody
    /// waits, who was told.
    fn connect(&mut self) -> Option<(usize, Opened)> {
        let shared = Arc::clone(&self.shared);
        loop {
            let mut failure = None;
            for offset in 0..shared.urls.len() {
                if shared.closing.load(Relaxed) {
                    return None;
                }
                let server = (self.first + offset) % shared.urls.len();
                match shared.opening(server, self.lane.kind).open() {
                    Ok(opened) => return Some((server, opened)),
                    Err(error) => failure = Some((server, error)),
                }
            }
            let (server, error) = failure?;
            tracing::debug!(channel = %self.lane.kind, error = &error as &dyn std::error::Error, "no page server");
            // A server that said goodbye may still have answered meanwhile.
            self.note_answers();
            let since = *self.trouble_since.get_or_insert_with(Instant::now);
            if self.back_off(since, server, error).is_break() {
                return None;
            }
        }
    }

    /// The lane has no connection any more: with the first one that has none, the source is lost.
    fn note_lost(&mut self, why: &Ended) {
        let why: &dyn std::error::Error = match why {
            // It is told as a failure.
            Ended::Source(_) => return,
            Ended::Goodbye => &ChannelError::Closed,
            Ended::Channel(error) => error,
            Ended::Elsewhere(error) => error,
        };
        if std::mem::replace(&mut self.lost, true) {
            return;
        }
        let mut lost = self.shared.lost();
        *lost += 1;
        if *lost == 1
            && let Some(sink) = self.shared.sink()
        {
            sink.lost(why);
        }
    }

    /// The lane has a connection: with the last one that had none, the source is back.
    fn note_found(&mut self) {
        if !std::mem::take(&mut self.lost) {
            return;
        }
        let mut lost = self.shared.lost();
        *lost -= 1;
        if *lost == 0
            && let Some(sink) = self.shared.sink()
        {
            sink.back();
        }
    }

    /// Whether there were answers since this was last asked, which ends all trouble.
    fn note_answers(&mut self) -> bool {
        let answers = self.lane.answers();
        let new = answers != self.answers;
        if new {
            (self.answers, self.pause, self.trouble_since) = (answers, BACKOFF.0, None);
        }
        new
    }

    /// Pauses after a failure. It is the end when somebody has waited in vain for the whole time-out.
    fn back_off(&mut self, since: Instant, server: usize, error: RemoteError) -> ControlFlow<()> {
        let shared = &self.shared;
        let mut pause = self.pause;
        if let Some(waited) = self.lane.waited(since) {
            let left = shared.timeout.saturating_sub(waited);
            if left.is_zero() {
                let error = RemoteError::TimedOut {
                    after: shared.timeout,
                    url: shared.urls[server].to_string(),
                    source: Box::new(error),
                };
                shared.give_up(&self.lane, SourceError::Lost(error.into()));
                return ControlFlow::Break(());
            }
            pause = pause.min(left);
        }
        self.pause = (self.pause * 2).min(BACKOFF.1);
        if self.lane.pause(pause) {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    }
}

impl Shared {
    /// Tells all who wait that nothing will come.
    fn give_up(&self, lane: &Lane, error: SourceError) {
        // First: whoever waits in `read` or `next_data` is let go by the end of the lane, and knows no reason.
        if let Some(sink) = self.sink() {
            sink.failed(error);
        }
        lane.close();
    }

    fn sink(&self) -> Option<Arc<dyn PageSink>> {
        self.sink.get().and_then(std::sync::Weak::upgrade)
    }

    /// Lets a server that said goodbye answer what it was asked, while the lane goes on elsewhere.
    fn drain(self: &Arc<Self>, lane: &Arc<Lane>, mut link: Link) {
        let (shared, lane) = (Arc::clone(self), Arc::clone(lane));
        let generation = link.generation;
        let Some(mut sender) = lane.retire(generation) else {
            return;
        };
        let kept = Arc::clone(&lane);
        let drain = move || {
            while lane.awaits(generation) {
                // What did not go out before is this thread's to send now.
                let _ = sender.push_out();
                match shared.receive(&lane, &mut link, Some(&mut sender)) {
                    Ok(()) => {}
                    Err(Ended::Source(error)) => {
                        shared.give_up(&lane, error);
                        break;
                    }
                    Err(_) => break,
                }
            }
            lane.leave(generation);
            let _ = link.stream.shutdown();
        };
        let thread = thread::Builder::new().name("umem-drain".into());
        if let Err(error) = thread.spawn(drain) {
            tracing::warn!(%error, "no thread to take the last answers of a page server");
            kept.leave(generation);
        }
    }

    /// Waits for one message, and hands on what it brings. `sender` is for a connection that the lane has retired.
    fn receive(&self, lane: &Arc<Lane>, link: &mut Link, sender: Option<&mut Sender>) -> Result<(), Ended> {
        let message = match link.receiver.receive() {
            Ok(message) => message,
            Err(ChannelError::Quiet) => return self.be_patient(lane, link, sender),
            Err(error) => return Err(Ended::Channel(error)),
        };
        link.heard = Instant::now();
        link.asked = None;
        if matches!(
            message,
            Message::Pages(_) | Message::Zero(_) | Message::Bitmap(_) | Message::Failed(_)
        ) {
            link.answered = link.heard;
        } else if self.waits_in_vain(lane, link.answered) {
            return Err(Ended::Channel(ChannelError::Quiet));
        }
        let from = Origin {
            lane,
            generation: link.generation,
            server: link.server,
        };
        match message {
            Message::Pages(pages) => self.take_pages(from, &pages, &mut link.buffer),
            Message::Zero(zero) => self.take(from, zero.request, zero.range, None),
            Message::Bitmap(bitmap) => {
                let taken = lane.take_bitmap(link.generation, bitmap.request, bitmap.range, bitmap.bits);
                taken.map(finish)
            }
            Message::Failed(failed) => Err(self.take_failure(from, &failed)),
            Message::Ping { token } => say(from, sender, &Message::Pong { token }),
            Message::Goodbye(_) => Err(Ended::Goodbye),
            // Hints, and answers to what this side never asks.
            _ => Ok(()),
        }
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
        if self.waits_in_vain(lane, link.answered) {
            return Err(Ended::Channel(ChannelError::Quiet));
        }
        let waiting = lane.is_waiting().then_some(self.silence);
        let Some(limit) = link.keep_alive.into_iter().chain(waiting).min() else {
            return Ok(());
        };
        match link.asked {
            Some(asked) if asked.elapsed() >= limit => Err(Ended::Channel(ChannelError::Quiet)),
            None if link.heard.elapsed() >= limit => {
                link.asked = Some(Instant::now());
                let from = Origin {
                    lane,
                    generation: link.generation,
                    server: link.server,
                };
                say(from, sender, &Message::Ping { token: 0 })
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
        if let (Some(class), Some(sink)) = (class, self.sink()) {
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

    /// A page is not what its checksum says. It may have been the wire, so any server may try twice; then it is its own
    /// fault.
    fn take_damage(&self, from: Origin<'_>, request: RequestId, page: PageIndex) -> Ended {
        let error = RemoteError::Corrupt {
            url: self.urls[from.server].to_string(),
            page,
        };
        match from.lane.fail(from.generation, request, PageRange::single(page)) {
            Ok(failures) if failures < self.urls.len().max(2) => Ended::Elsewhere(error),
            Ok(_) => Ended::Source(SourceError::Corrupt(error.into())),
            Err(ended) => ended,
        }
    }

    /// A server cannot give pages. Another may, so as many as there are are asked: no more, so that it comes to an end.
    fn take_failure(&self, from: Origin<'_>, failed: &Failed<'_>) -> Ended {
        let error = RemoteError::Failed {
            url: self.urls[from.server].to_string(),
            pages: failed.range,
            code: failed.code,
            text: failed.text.to_owned(),
        };
        match from.lane.fail(from.generation, failed.request, failed.range) {
            Ok(failures) if failures < self.urls.len() => Ended::Elsewhere(error),
            Ok(_) => Ended::Source(match failed.code {
                FailCode::Corrupt => SourceError::Corrupt(error.into()),
                _ => SourceError::Lost(error.into()),
            }),
            Err(ended) => ended,
        }
    }
}

/// What a message came on.
#[derive(Clone, Copy)]
struct Origin<'a> {
    lane: &'a Arc<Lane>,
    generation: Generation,
    server: usize,
}

fn say(on: Origin<'_>, sender: Option<&mut Sender>, message: &Message<'_>) -> Result<(), Ended> {
    if let Some(sender) = sender {
        return sender.post(message).map(drop).map_err(Ended::Channel);
    }
    on.lane.say(on.generation, message);
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

impl Shared {
    /// How a channel to a server is opened.
    fn opening(&self, server: usize, channel: ChannelKind) -> Opening<'_> {
        Opening {
            url: &self.urls[server],
            channel,
            digest: self.digest,
            pages: Some(self.pages),
            session: self.session(server),
            features: self.options.features(),
            credentials: self.options.credentials.as_ref(),
            patience: self.patience,
        }
    }
}
