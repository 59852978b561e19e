//! What was asked for on one channel and has not come, which survives the channel's connections.
//!
//! ```text
//!              ask                      every page came
//!   (nothing) -----> asked on C1 ----------------------> (nothing)
//!                      |      ^
//!     C1 is lost,      |      | resume(C2), or at once
//!     or fails a page  v      | where there is C2 already
//!                    asked on none
//! ```
//!
//! When a server says goodbye (C1 is *retired*), what it was asked stays asked on C1, which answers still, and what is asked
//! from then on goes to C2.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use super::Ended;
use super::receive::Link;
use super::reception::Reception;
use crate::channel::{ChannelError, Posted, Sender};
use crate::link::Stream;
use crate::source::{Class, SourceError};
use crate::units::{PageIndex, PageRange};
use crate::wire::{
    BitmapKind, BitmapRequest, ChannelKind, Goodbye, GoodbyeReason, Message, Request, RequestId,
};

/// One channel, with what survives its connections.
pub(super) struct Lane {
    pub(super) kind: ChannelKind,
    /// Who receives on the current connection, where that is lent.
    pub(super) reception: Reception<Link, Ended>,
    state: Mutex<LaneState>,
    /// Somebody began to wait, or the end.
    changed: Condvar,
    /// Pages that were asked for and have not come.
    outstanding: AtomicU64,
    connected: AtomicBool,
}

struct LaneState {
    /// Takes what is asked; `None` while there is no connection.
    current: Option<Current>,
    /// Connections whose servers said goodbye and still answer.
    retired: Vec<(Generation, Arc<Stream>)>,
    /// Of the newest connection.
    generation: Generation,
    next: u64,
    pending: HashMap<RequestId, Pending>,
    /// When something was asked for while nothing else was.
    waiting_since: Instant,
    /// How many answers came.
    answers: u64,
    /// Nothing more is wanted.
    closed: bool,
}

/// Counts a lane's connections.
pub(super) type Generation = u64;

struct Current {
    generation: Generation,
    sender: Sender,
    stream: Arc<Stream>,
    /// A thread sends what could not be sent at once.
    pushing: bool,
}

/// What was asked for.
pub(super) struct Pending {
    /// The connection that is to answer; `None`: it is to be asked on the next one.
    on: Option<Generation>,
    /// What has not come.
    left: Vec<PageRange>,
    /// How many servers said that they cannot give it.
    failures: usize,
    /// Pages that came damaged, once for each time.
    damaged: Vec<PageIndex>,
    wanted: Wanted,
}

/// Who wants it, and what of it is there.
pub(super) enum Wanted {
    /// Pages for the sink.
    Pages(Class),
    /// Pages for a thread that waits.
    Read {
        pages: PageRange,
        buffer: Vec<u8>,
        answer: SyncSender<Result<Vec<u8>, SourceError>>,
    },
    /// Which pages of a chunk hold something, for a thread that waits.
    Bitmap {
        chunk: PageRange,
        bits: Vec<u8>,
        answer: SyncSender<Result<Vec<u8>, SourceError>>,
    },
}

/// Pages were taken that somebody asked for.
pub(super) struct Taken {
    /// For the sink, if they are.
    pub(super) class: Option<Class>,
    /// Nothing is left of what they were asked for with; a thread that waits for that can be told.
    pub(super) complete: Option<Wanted>,
}

impl Lane {
    pub(super) fn new(kind: ChannelKind) -> Self {
        Self {
            kind,
            reception: Reception::new(),
            state: Mutex::new(LaneState {
                current: None,
                retired: Vec::new(),
                generation: 0,
                next: 1,
                pending: HashMap::new(),
                waiting_since: Instant::now(),
                answers: 0,
                closed: false,
            }),
            changed: Condvar::new(),
            outstanding: AtomicU64::new(0),
            connected: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, LaneState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The smaller, the sooner something that is asked here comes.
    pub(super) fn load(&self) -> (bool, u64) {
        (!self.connected.load(Relaxed), self.outstanding.load(Relaxed))
    }

    /// Forgets what was asked for, which lets go who waits for it, and ends the connections.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.pending.clear();
        let retired = state.retired.iter().map(|(_, stream)| stream);
        for stream in state.current.iter().map(|current| &current.stream).chain(retired) {
            // Where it fails, it has ended.
            let _ = stream.shutdown();
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Asks for something, now or as soon as there is a connection. Does not wait.
    pub(super) fn ask(self: &Arc<Self>, left: Vec<PageRange>, wanted: Wanted) {
        let mut state = self.lock();
        if state.closed {
            // Whoever waits for it learns that nobody will answer.
            return;
        }
        let id = RequestId(state.next);
        state.next += 1;
        let pending = Pending {
            on: None,
            left,
            failures: 0,
            damaged: Vec::new(),
            wanted,
        };
        self.outstanding.fetch_add(pending.pages(), Relaxed);
        let first = state.pending.is_empty();
        state.pending.insert(id, pending);
        if first {
            state.waiting_since = Instant::now();
        }
        self.send(&mut state, id);
        // Nobody waits here while there is a connection, and to wake nobody is a system call all the same.
        let paused = first && state.current.is_none();
        drop(state);
        if paused {
            self.changed.notify_all();
        }
    }

    /// Sends a request on the connection there is.
    fn send(self: &Arc<Self>, state: &mut LaneState, id: RequestId) {
        let LaneState {
            current: Some(current),
            pending,
            ..
        } = state
        else {
            return;
        };
        if let Some(pending) = pending.get_mut(&id) {
            pending.on = Some(current.generation);
            self.post(current, &pending.message(id));
        }
    }

    /// Neither waits nor fails: who receives sees the end of a connection that cannot be written.
    fn post(self: &Arc<Self>, current: &mut Current, message: &Message<'_>) {
        match current.sender.post(message) {
            Ok(Posted::Out) => {}
            Ok(Posted::Waiting) if current.pushing => {}
            Ok(Posted::Waiting) => {
                let (lane, generation) = (Arc::clone(self), current.generation);
                let stream = Arc::clone(&current.stream);
                // The other side does not read for now, which is rare: a thread for it need not be there before.
                let thread = thread::Builder::new().name("umem-push".into());
                match thread.spawn(move || lane.push_out(generation, &stream)) {
                    Ok(_) => current.pushing = true,
                    Err(error) => {
                        tracing::warn!(%error, "no thread to send requests");
                        let _ = current.stream.shutdown();
                    }
                }
            }
            Err(error) => {
                tracing::debug!(%error, "cannot ask");
                // Half a frame may be out.
                let _ = current.stream.shutdown();
            }
        }
    }

    /// Sends what could not be sent at once, whenever the connection takes more.
    fn push_out(&self, generation: Generation, stream: &Stream) {
        loop {
            match rustix::event::poll(&mut [PollFd::new(stream, PollFlags::OUT)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => {
                    tracing::warn!(error = %errno, "cannot wait for a connection");
                    let _ = stream.shutdown();
                }
            }
            let mut state = self.lock();
            let current = state.current.as_mut();
            let Some(current) = current.filter(|current| current.generation == generation) else {
                return;
            };
            match current.sender.push_out() {
                Ok(Posted::Waiting) => {}
                Ok(Posted::Out) => {
                    current.pushing = false;
                    return;
                }
                Err(error) => {
                    tracing::debug!(%error, "cannot ask");
                    let _ = stream.shutdown();
                    return;
                }
            }
        }
    }

    /// Goes on with a new connection: asks for everything that is not asked elsewhere. `None`: nothing is wanted any more.
    pub(super) fn resume(self: &Arc<Self>, sender: Sender, stream: &Arc<Stream>) -> Option<Generation> {
        let mut state = self.lock();
        if state.closed {
            return None;
        }
        state.generation += 1;
        let generation = state.generation;
        state.current = Some(Current {
            generation,
            sender,
            stream: Arc::clone(stream),
            pushing: false,
        });
        self.connected.store(true, Relaxed);
        self.ask_again(&mut state);
        Some(generation)
    }

    /// Asks for what is asked nowhere, oldest first.
    fn ask_again(self: &Arc<Self>, state: &mut LaneState) {
        let asked_nowhere = state.pending.iter().filter(|(_, pending)| pending.on.is_none());
        let mut ids: Vec<RequestId> = asked_nowhere.map(|(id, _)| *id).collect();
        ids.sort_unstable();
        for id in ids {
            if let Some(pending) = state.pending.get_mut(&id)
                // Bitmaps are asked for whole.
                && let Wanted::Bitmap { chunk, .. } = pending.wanted
            {
                pending.left = vec![chunk];
            }
            self.send(state, id);
        }
    }

    /// A connection will answer nothing more: what it has not answered is asked again, at once if there is another one.
    pub(super) fn leave(self: &Arc<Self>, generation: Generation) {
        let mut state = self.lock();
        if state
            .current
            .as_ref()
            .is_some_and(|current| current.generation == generation)
        {
            state.current = None;
            self.connected.store(false, Relaxed);
        }
        state.retired.retain(|(retired, _)| *retired != generation);
        for pending in state.pending.values_mut() {
            if pending.on == Some(generation) {
                pending.on = None;
            }
        }
        self.ask_again(&mut state);
    }

    /// A server said goodbye: nothing more is asked there, and that is said. What says the rest on the connection.
    pub(super) fn retire(&self, generation: Generation) -> Option<Sender> {
        let mut state = self.lock();
        let current = state
            .current
            .take_if(|current| current.generation == generation)?;
        self.connected.store(false, Relaxed);
        state.retired.push((generation, current.stream));
        drop(state);
        let mut sender = current.sender;
        let goodbye = Goodbye {
            reason: GoodbyeReason::Done,
            text: "",
        };
        // If it cannot be said, the connection ends by itself.
        let _ = sender.post(&Message::Goodbye(goodbye));
        Some(sender)
    }

    /// Whether a connection has answers to give.
    pub(super) fn awaits(&self, generation: Generation) -> bool {
        let state = self.lock();
        let mut pending = state.pending.values();
        pending.any(|pending| pending.on == Some(generation))
    }

    /// Says something on a connection, if it still takes anything.
    pub(super) fn say(self: &Arc<Self>, generation: Generation, message: &Message<'_>) {
        let mut state = self.lock();
        let current = state.current.as_mut();
        if let Some(current) = current.filter(|current| current.generation == generation) {
            self.post(current, message);
        }
    }

    /// How many answers came.
    pub(super) fn answers(&self) -> u64 {
        self.lock().answers
    }

    pub(super) fn is_waiting(&self) -> bool {
        !self.lock().pending.is_empty()
    }

    /// How long somebody has been waiting, counted from `since` if it was before that.
    pub(super) fn waited(&self, since: Instant) -> Option<Duration> {
        let state = self.lock();
        (!state.pending.is_empty()).then(|| since.max(state.waiting_since).elapsed())
    }

    /// Waits until somebody begins to wait, or the end, but no longer than `pause`. False: it is the end.
    pub(super) fn pause(&self, pause: Duration) -> bool {
        let mut state = self.lock();
        if !state.closed {
            state = self
                .changed
                .wait_timeout(state, pause)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        !state.closed
    }

    /// Takes pages that this connection was asked for, and only those.
    pub(super) fn take(
        &self,
        generation: Generation,
        request: RequestId,
        range: PageRange,
        data: Option<&[u8]>,
    ) -> Result<Taken, Ended> {
        let mut state = self.lock();
        let pending = state.asked(generation, request, range)?;
        if matches!(pending.wanted, Wanted::Bitmap { .. }) || !subtract(&mut pending.left, range) {
            return Err(not_asked(range));
        }
        let class = match &mut pending.wanted {
            Wanted::Pages(class) => Some(*class),
            Wanted::Read { pages, buffer, .. } => {
                if let Some(data) = data {
                    let offset = PageRange::new(pages.start, range.start.0 - pages.start.0).bytes();
                    buffer[offset..offset + data.len()].copy_from_slice(data);
                }
                None
            }
            Wanted::Bitmap { .. } => None,
        };
        self.outstanding.fetch_sub(range.count, Relaxed);
        let complete = state.answered(request);
        Ok(Taken { class, complete })
    }

    /// Takes a piece of a bitmap that this connection was asked for.
    pub(super) fn take_bitmap(
        &self,
        generation: Generation,
        request: RequestId,
        range: PageRange,
        new: &[u8],
    ) -> Result<Option<Wanted>, Ended> {
        let mut state = self.lock();
        let pending = state.asked(generation, request, range)?;
        let Wanted::Bitmap { chunk, bits, .. } = &mut pending.wanted else {
            return Err(not_asked(range));
        };
        if !subtract(&mut pending.left, range) {
            return Err(not_asked(range));
        }
        let at = ((range.start.0 - chunk.start.0) / 8) as usize;
        bits[at..at + new.len()].copy_from_slice(new);
        Ok(state.answered(request))
    }

    /// A server cannot give what it was asked for. Answers how many have said so of the same.
    pub(super) fn fail(
        &self,
        generation: Generation,
        request: RequestId,
        range: PageRange,
    ) -> Result<usize, Ended> {
        let mut state = self.lock();
        let pending = state.asked(generation, request, range)?;
        pending.failures += 1;
        Ok(pending.failures)
    }

    /// A page of what was asked for came damaged. Answers how often that one has, and how often any of the same request.
    pub(super) fn damage(
        &self,
        generation: Generation,
        request: RequestId,
        page: PageIndex,
    ) -> Result<(usize, usize), Ended> {
        let mut state = self.lock();
        let pending = state.asked(generation, request, PageRange::single(page))?;
        pending.damaged.push(page);
        let same = pending.damaged.iter().filter(|damaged| **damaged == page);
        Ok((same.count(), pending.damaged.len()))
    }
}

impl LaneState {
    fn asked(
        &mut self,
        generation: Generation,
        request: RequestId,
        range: PageRange,
    ) -> Result<&mut Pending, Ended> {
        let pending = self.pending.get_mut(&request);
        let pending = pending.filter(|pending| pending.on == Some(generation));
        pending.ok_or_else(|| not_asked(range))
    }

    /// Something was answered; what is complete is forgotten.
    fn answered(&mut self, request: RequestId) -> Option<Wanted> {
        self.answers += 1;
        let complete = self.pending.get(&request)?.left.is_empty();
        let pending = if complete {
            self.pending.remove(&request)
        } else {
            None
        };
        pending.map(|pending| pending.wanted)
    }
}

fn not_asked(pages: PageRange) -> Ended {
    Ended::Channel(ChannelError::Unasked { pages })
}

impl Pending {
    fn message(&self, request: RequestId) -> Message<'_> {
        match self.wanted {
            Wanted::Pages(_) | Wanted::Read { .. } => Message::Request(Request {
                request,
                ranges: (&self.left[..]).into(),
            }),
            Wanted::Bitmap { chunk, .. } => Message::BitmapRequest(BitmapRequest {
                request,
                kind: BitmapKind::Data,
                range: chunk,
            }),
        }
    }

    fn pages(&self) -> u64 {
        match self.wanted {
            Wanted::Pages(_) | Wanted::Read { .. } => self.left.iter().map(|range| range.count).sum(),
            Wanted::Bitmap { .. } => 0,
        }
    }
}

/// Takes `range` out of `left`. False, and nothing is changed: not all of it is there in one piece.
pub(super) fn subtract(left: &mut Vec<PageRange>, range: PageRange) -> bool {
    let holds = |whole: &PageRange| whole.start <= range.start && range.end() <= whole.end();
    let Some(index) = left.iter().position(holds) else {
        return false;
    };
    let whole = left[index];
    let before = PageRange::new(whole.start, range.start.0 - whole.start.0);
    let after = PageRange::new(range.end(), whole.end().0 - range.end().0);
    left.splice(
        index..=index,
        [before, after].into_iter().filter(|piece| piece.count > 0),
    );
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::PageIndex;

    #[test]
    fn what_came_is_no_longer_left() {
        let range = |start, count| PageRange::new(PageIndex(start), count);
        let mut left = vec![range(10, 10)];
        assert!(!subtract(&mut left, range(9, 2)));
        assert!(subtract(&mut left, range(12, 3)));
        assert_eq!(left, [range(10, 2), range(15, 5)]);
        assert!(!subtract(&mut left, range(11, 2)), "a page came twice");
        assert!(subtract(&mut left, range(15, 5)));
        assert!(subtract(&mut left, range(10, 2)));
        assert!(left.is_empty());
    }
}
