//! Calling the destination, and talking with it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use umem::call::{self, Opened};
use umem::channel::{ChannelError, Receiver, Sender};
use umem::link::{Credentials, Stream};
use umem::wire::{ChannelKind, Epoch, Handover, Hello, Message, Role, SessionId, Step, VERSION};

use super::push::Await;
use super::{FEATURES, KEEP_ALIVE, MigrationError, MigrationOptions, PATIENCE};

/// How the destination is called.
pub(super) struct Dialer {
    pub(super) options: MigrationOptions,
    pub(super) credentials: Option<Credentials>,
    pub(super) pages: u64,
    pub(super) session: SessionId,
    /// Connections that are open, to be shut at the end.
    pub(super) streams: Mutex<Vec<Arc<Stream>>>,
    pub(super) epoch: AtomicU64,
}

impl Dialer {
    pub(super) fn destination(&self) -> String {
        self.options.destination.to_string()
    }

    pub(super) fn call(&self, kind: ChannelKind, session: SessionId) -> Result<Opened, MigrationError> {
        let connect = || -> std::io::Result<Stream> {
            let stream = Stream::connect(&self.options.destination, PATIENCE, self.credentials.as_ref())?;
            stream.set_timeouts(Some(PATIENCE), Some(PATIENCE))?;
            Ok(stream)
        };
        let stream = connect().map_err(|source| MigrationError::Connect {
            destination: self.destination(),
            source,
        })?;
        let hello = Hello {
            version: VERSION,
            features: FEATURES,
            pages: Some(self.pages),
            epoch: Epoch(self.epoch.load(Relaxed)),
            keep_alive_ms: 0,
            channel: kind,
            role: Role::Provider,
            session,
            digest: None,
            image: "",
        };
        let opened = call::call(stream, &hello).map_err(|source| MigrationError::Call {
            destination: self.destination(),
            source,
        })?;
        if !opened.welcome.features.contains(FEATURES) {
            return Err(MigrationError::TooOld(self.destination()));
        }
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that nobody else has any more.
        streams.retain(|stream| Arc::strong_count(stream) > 1);
        streams.push(Arc::clone(&opened.stream));
        Ok(opened)
    }

    pub(super) fn hang_up(&self) {
        let streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        for stream in streams.iter() {
            // Where it fails, it has ended.
            let _ = stream.shutdown();
        }
    }
}

/// What the destination says of the handover.
#[derive(Debug)]
pub(super) enum Heard {
    Step(Step, u32, String),
    /// It has done all that it was told before [`Conversation::ask_for_sign`] with this number.
    Sign(u64),
    Goodbye(String),
}

/// The control channel.
pub(super) struct Conversation {
    sender: Sender,
    receiver: Receiver,
    stream: Arc<Stream>,
    heard: Instant,
    said: Instant,
}

impl Conversation {
    pub(super) fn new(opened: Opened) -> Self {
        let now = Instant::now();
        Self {
            sender: opened.sender,
            receiver: opened.receiver,
            stream: opened.stream,
            heard: now,
            said: now,
        }
    }

    pub(super) fn say(&mut self, message: &Message<'_>) -> Result<(), ChannelError> {
        self.said = Instant::now();
        self.sender.send(message)
    }

    pub(super) fn step(&mut self, step: Step, text: &str) -> Result<(), ChannelError> {
        self.say(&Message::Handover(Handover { step, value: 0, text }))
    }

    /// Has the destination answer with a sign of this number, which is not 0.
    pub(super) fn ask_for_sign(&mut self, number: u64) -> Result<(), ChannelError> {
        self.say(&Message::Ping { token: number })
    }

    /// What comes within `patience`. An error where nothing at all came for too long.
    pub(super) fn hear(&mut self, patience: Duration) -> Result<Option<Heard>, ChannelError> {
        let deadline = Instant::now() + patience;
        loop {
            if self.said.elapsed() >= KEEP_ALIVE {
                self.say(&Message::Ping { token: 0 })?;
            }
            let mut pong = None;
            while let Some(message) = self.receiver.next_message()? {
                self.heard = Instant::now();
                match message {
                    Message::Handover(Handover { step, value, text }) => {
                        return Ok(Some(Heard::Step(step, value, text.to_owned())));
                    }
                    Message::Goodbye(goodbye) => return Ok(Some(Heard::Goodbye(goodbye.text.to_owned()))),
                    Message::Ping { token } => pong = Some(token),
                    Message::Pong { token } if token != 0 => return Ok(Some(Heard::Sign(token))),
                    _ => {}
                }
            }
            if let Some(token) = pong {
                self.say(&Message::Pong { token })?;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if self.receiver.has_more(&self.stream, left.min(KEEP_ALIVE))? {
                continue;
            }
            // Only now: who did something else for a while has not looked at what came meanwhile.
            if self.heard.elapsed() >= PATIENCE {
                return Err(ChannelError::Quiet);
            }
            if left.is_zero() {
                return Ok(None);
            }
        }
    }
}
