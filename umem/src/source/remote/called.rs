//! Channels that the provider opens: those of a machine that is moving here, which calls in place of being called.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::RemoteError;
use super::opened::Opened;
use crate::call;
use crate::wire::ChannelKind;

/// Channels of one kind that may be waiting; who calls more often has lost the ones before.
const MOST: usize = super::MAX_CONNECTIONS;

/// Channels that a provider has opened, and that a [`RemoteSource`](super::RemoteSource) has not taken yet.
pub struct Callers {
    /// Who calls, for people.
    name: String,
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    opened: VecDeque<(ChannelKind, Opened)>,
    begun: bool,
    closed: bool,
}

impl Callers {
    /// Nobody has called yet. `name` is who will, for people.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            waiting: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Channels can be taken from now on. Before that a provider may have opened them, and attends to none.
    pub fn begin(&self) {
        self.lock().begun = true;
        self.changed.notify_all();
    }

    /// A provider has opened a channel.
    pub fn put(&self, kind: ChannelKind, opened: call::Opened) {
        let call::Opened {
            sender,
            receiver,
            stream,
            welcome,
        } = opened;
        let opened = Opened::new(sender, receiver, stream, &welcome);
        let mut waiting = self.lock();
        if waiting.closed {
            return;
        }
        while waiting.opened.iter().filter(|(of, _)| *of == kind).count() >= MOST {
            let oldest = waiting.opened.iter().position(|(of, _)| *of == kind);
            drop(oldest.and_then(|oldest| waiting.opened.remove(oldest)));
        }
        waiting.opened.push_back((kind, opened));
        drop(waiting);
        self.changed.notify_all();
    }

    /// The channel of this kind that was opened first, which is waited for.
    pub(super) fn take(&self, kind: ChannelKind, patience: Duration) -> Result<Opened, RemoteError> {
        let mut waiting = self.lock();
        while !waiting.begun && !waiting.closed {
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        let deadline = Instant::now() + patience;
        loop {
            if waiting.closed {
                return Err(RemoteError::Closed);
            }
            let first = waiting.opened.iter().position(|(of, _)| *of == kind);
            if let Some((_, opened)) = first.and_then(|first| waiting.opened.remove(first)) {
                return Ok(opened);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(RemoteError::NobodyCalled {
                    name: self.name.clone(),
                });
            }
            let waited = self.changed.wait_timeout(waiting, left);
            waiting = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Nothing more is wanted.
    pub(super) fn close(&self) {
        let mut waiting = self.lock();
        waiting.closed = true;
        waiting.opened.clear();
        drop(waiting);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Display for Callers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl fmt::Debug for Callers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Callers")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// Where a channel comes from.
#[derive(Clone, Debug)]
pub(super) enum Way {
    /// A server that is called.
    Server(super::RemoteUrl),
    /// A provider that calls.
    Callers(Arc<Callers>),
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Server(url) => url.fmt(f),
            Self::Callers(callers) => callers.fmt(f),
        }
    }
}
