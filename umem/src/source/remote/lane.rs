//! One channel to a page server, with what survives its connection: the table of what was asked for and has not come.

use std::collections::HashMap;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::channel::{ChannelError, Sender};
use crate::link::Stream;
use crate::source::{Class, SourceError};
use crate::units::PageRange;
use crate::wire::{BitmapKind, BitmapRequest, ChannelKind, Message, Request, RequestId};

/// One channel, with what survives its connection.
pub(super) struct Lane {
    pub(super) kind: ChannelKind,
    pub(super) state: Mutex<LaneState>,
    /// There is something to wait for, or the end.
    pub(super) changed: Condvar,
}

pub(super) struct LaneState {
    /// `None` while there is no connection.
    pub(super) sender: Option<Sender>,
    pub(super) stream: Option<Arc<Stream>>,
    pub(super) next: u64,
    pub(super) pending: HashMap<RequestId, Pending>,
    /// Nothing more is wanted.
    pub(super) closed: bool,
}

/// What was asked for.
pub(super) enum Pending {
    /// Pages for the sink.
    Pages { left: Vec<PageRange>, class: Class },
    /// Pages for a thread that waits.
    Read {
        pages: PageRange,
        left: Vec<PageRange>,
        buffer: Vec<u8>,
        answer: SyncSender<Result<Vec<u8>, SourceError>>,
    },
    /// Which pages of a chunk hold something, for a thread that waits.
    Bitmap {
        chunk: PageRange,
        left: Vec<PageRange>,
        bits: Vec<u8>,
        answer: SyncSender<Result<Vec<u8>, SourceError>>,
    },
}

/// Why nothing more comes on a connection.
pub(super) enum Ended {
    /// The connection; another may do better.
    Channel(ChannelError),
    /// The source; no other connection would.
    Source(SourceError),
}

impl Lane {
    pub(super) fn lock(&self) -> MutexGuard<'_, LaneState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets what was asked for, which lets go who waits for it, and ends the connection.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.pending.clear();
        if let Some(stream) = &state.stream {
            // Where it fails, it has ended.
            let _ = stream.shutdown();
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Asks for something, now or as soon as there is a connection.
    pub(super) fn ask(&self, pending: Pending) {
        let mut state = self.lock();
        if state.closed {
            // Whoever waits for it learns that nobody will answer.
            return;
        }
        let id = RequestId(state.next);
        state.next += 1;
        let LaneState { sender, stream, .. } = &mut *state;
        if let Some(sender) = sender
            && let Err(error) = pending.send(id, sender)
        {
            tracing::debug!(%error, "cannot ask");
            // Half a frame may be out: the receiving thread is to see the end of it, and to ask on the next connection.
            if let Some(stream) = stream {
                let _ = stream.shutdown();
            }
        }
        state.pending.insert(id, pending);
        drop(state);
        self.changed.notify_all();
    }
}

impl Pending {
    pub(super) fn send(&self, request: RequestId, sender: &mut Sender) -> Result<(), ChannelError> {
        match self {
            Self::Pages { left, .. } | Self::Read { left, .. } => sender.send(&Message::Request(Request {
                request,
                ranges: (&left[..]).into(),
            })),
            Self::Bitmap { chunk, .. } => sender.send(&Message::BitmapRequest(BitmapRequest {
                request,
                kind: BitmapKind::Data,
                range: *chunk,
            })),
        }
    }

    pub(super) fn left(&mut self) -> Option<&mut Vec<PageRange>> {
        match self {
            Self::Pages { left, .. } | Self::Read { left, .. } => Some(left),
            // Bitmaps come by themselves, never as pages.
            Self::Bitmap { .. } => None,
        }
    }
}

impl Lane {
    /// Goes on with a new connection: asks for everything that has not come.
    pub(super) fn resume(&self, sender: Sender, stream: &Arc<Stream>) -> Result<(), ChannelError> {
        let mut state = self.lock();
        if state.closed {
            return Err(ChannelError::Closed);
        }
        state.stream = Some(Arc::clone(stream));
        let LaneState {
            sender: place,
            pending,
            ..
        } = &mut *state;
        let sender = place.insert(sender);
        let mut ids: Vec<RequestId> = pending.keys().copied().collect();
        ids.sort_unstable();
        for id in ids {
            if let Some(pending) = pending.get_mut(&id) {
                // Bitmaps are asked for whole.
                if let Pending::Bitmap { chunk, left, .. } = pending {
                    *left = vec![*chunk];
                }
                pending.send(id, sender)?;
            }
        }
        Ok(())
    }

    pub(super) fn ping(&self) -> Result<(), Ended> {
        self.say(&Message::Ping { token: 0 })
    }

    pub(super) fn pong(&self, token: u64) -> Result<(), Ended> {
        self.say(&Message::Pong { token })
    }

    pub(super) fn say(&self, message: &Message<'_>) -> Result<(), Ended> {
        match &mut self.lock().sender {
            Some(sender) => sender.send(message).map_err(Ended::Channel),
            None => Ok(()),
        }
    }

    pub(super) fn take_bitmap(&self, request: RequestId, range: PageRange, new: &[u8]) -> Result<(), Ended> {
        let not_asked = || Ended::Channel(ChannelError::Unasked { pages: range });
        let mut state = self.lock();
        let Some(Pending::Bitmap {
            chunk, left, bits, ..
        }) = state.pending.get_mut(&request)
        else {
            return Err(not_asked());
        };
        if !subtract(left, range) {
            return Err(not_asked());
        }
        let complete = left.is_empty();
        let at = ((range.start.0 - chunk.start.0) / 8) as usize;
        bits[at..at + new.len()].copy_from_slice(new);
        if complete && let Some(Pending::Bitmap { bits, answer, .. }) = state.pending.remove(&request) {
            let _ = answer.try_send(Ok(bits));
        }
        Ok(())
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
