//! A lane's thread: makes connections anew, and receives what comes. On the demand lane it lends the receiving to who asks
//! ([`super::reception`]).

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant};

use super::called::Way;
use super::lane::Lane;
use super::opened::{Opened, Opening};
use super::receive::{Life, Link};
use super::reception::Turn;
use super::{Ended, RemoteError, Shared};
use crate::channel::ChannelError;
use crate::schedule::{step_back, step_forward};
use crate::source::{PageSink, SourceError};
use crate::wire::ChannelKind;

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
            let Some(link) = self.resume(server, opened) else {
                return;
            };
            let (link, ended) = match self.lane.kind {
                ChannelKind::Demand => self.receive_in_turn(link),
                _ => self.receive(link),
            };
            if self.lose(link, ended).is_break() {
                return;
            }
        }
    }

    /// Receives until the connection ends.
    fn receive(&self, mut link: Link) -> (Link, Ended) {
        loop {
            if let Err(ended) = self.shared.receive(&self.lane, &mut link, None) {
                return (link, ended);
            }
        }
    }

    /// Receives whenever nobody has borrowed that, and looks after the connection always, until it ends.
    fn receive_in_turn(&self, link: Link) -> (Link, Ended) {
        let (shared, lane) = (&self.shared, &self.lane);
        let stream = Arc::clone(&link.stream);
        let mut deadline = Instant::now() + link.life.tick;
        lane.reception.put(link);
        loop {
            match lane.reception.wait(deadline) {
                Turn::Over(link, ended) => return (link, ended),
                Turn::Nothing => {}
                Turn::Receive => {
                    // First all that has come: what TLS has decrypted already does not show in the descriptor.
                    let received = lane.reception.receive(|link| {
                        let sink = shared.sink();
                        let sink = sink.as_deref().map(|sink| sink as &dyn PageSink);
                        while shared.receive_some(lane, link, sink)? {}
                        Ok(())
                    });
                    if received.is_some() {
                        // Whatever else it was that ended the wait, who receives will see.
                        let _ = stream.wait_to_read(deadline.saturating_duration_since(Instant::now()));
                    }
                }
            }
            if Instant::now() >= deadline {
                let next = lane.reception.look_after(|link| shared.look_after(lane, link));
                deadline = next.unwrap_or(deadline);
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
        let life = Life::new(keep_alive, tick);
        Some(Link::new(generation, server, receiver, stream, life))
    }

    /// A connection has ended. What it was asked is asked again elsewhere, or, after a goodbye, still answered by it.
    fn lose(&mut self, link: Link, ended: Ended) -> ControlFlow<()> {
        let shared = Arc::clone(&self.shared);
        let (server, answered_at, lasted) = (link.server, link.life.answered, link.life.since.elapsed());
        let url = &shared.ways[server];
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
        let next = (server + 1) % shared.ways.len();
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
            for offset in 0..shared.ways.len() {
                if shared.closing.load(Relaxed) {
                    return None;
                }
                let server = (self.first + offset) % shared.ways.len();
                match shared.open(server, self.lane.kind) {
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
                    url: shared.ways[server].to_string(),
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

    pub(super) fn sink(&self) -> Option<Arc<dyn PageSink + Send + Sync>> {
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

    /// Opens a channel to a server, or takes one that its provider has opened.
    fn open(&self, server: usize, channel: ChannelKind) -> Result<Opened, RemoteError> {
        let url = match &self.ways[server] {
            Way::Server(url) => url,
            Way::Callers(callers) => return callers.take(channel, self.patience),
        };
        let opening = Opening {
            url,
            channel,
            digest: self.digest,
            pages: Some(self.pages),
            session: self.session(server),
            features: self.options.features(),
            credentials: self.options.credentials.as_ref(),
            patience: self.patience,
        };
        opening.open()
    }
}
