//! Opening a channel to a page server.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::{RemoteError, RemoteUrl};
use crate::call::{self, CallError};
use crate::channel::{ChannelError, Receiver, Sender};
use crate::link::{Credentials, Stream};
use crate::wire::{
    ChannelKind, Epoch, Features, Hello, Message, RefuseCode, RequestId, Role, SessionId, VERSION, Welcome,
};

/// A channel that is to be opened.
#[derive(Clone, Copy)]
pub(super) struct Opening<'a> {
    pub(super) url: &'a RemoteUrl,
    pub(super) channel: ChannelKind,
    /// What the image must be, once that is known.
    pub(super) digest: Option<[u8; 32]>,
    pub(super) pages: Option<u64>,
    pub(super) session: SessionId,
    pub(super) features: Features,
    pub(super) credentials: Option<&'a Credentials>,
    /// How long the server may take for each of: the connection, TLS, and its answer to the hello.
    pub(super) patience: Duration,
}

/// A new channel, before anything was asked on it.
pub(super) struct Opened {
    pub(super) sender: Sender,
    pub(super) receiver: Receiver,
    pub(super) stream: Arc<Stream>,
    pub(super) pages: u64,
    pub(super) digest: Option<[u8; 32]>,
    pub(super) session: SessionId,
    /// How often each side says something; `None`: when it has to.
    pub(super) keep_alive: Option<Duration>,
}

impl Opened {
    pub(super) fn new(sender: Sender, receiver: Receiver, stream: Arc<Stream>, welcome: &Welcome) -> Self {
        let keep_alive = match welcome.keep_alive_ms {
            0 => None,
            milliseconds => Some(Duration::from_millis(milliseconds.into())),
        };
        Self {
            sender,
            receiver,
            stream,
            pages: welcome.pages,
            digest: welcome.digest,
            session: welcome.session,
            keep_alive,
        }
    }
}

impl Opening<'_> {
    fn failed(&self, source: ChannelError) -> RemoteError {
        RemoteError::Channel {
            url: self.url.to_string(),
            source,
        }
    }

    /// Opens the channel. The session is a new one if the server does not know it any more: an image does not change.
    pub(super) fn open(self) -> Result<Opened, RemoteError> {
        match self.try_open() {
            Err(RemoteError::Refused {
                code: RefuseCode::UnknownSession,
                ..
            }) if self.session != SessionId::NEW => Self {
                session: SessionId::NEW,
                ..self
            }
            .try_open(),
            result => result,
        }
    }

    fn try_open(&self) -> Result<Opened, RemoteError> {
        let stream = self.connect().map_err(|source| RemoteError::Connect {
            url: self.url.to_string(),
            source,
        })?;
        let hello = Hello {
            version: VERSION,
            features: self.features,
            pages: self.pages,
            epoch: Epoch(0),
            keep_alive_ms: 0,
            channel: self.channel,
            role: Role::Fetcher,
            session: self.session,
            digest: self.digest,
            image: &self.url.image,
        };
        let call::Opened {
            sender,
            receiver,
            stream,
            welcome,
        } = call::call(stream, &hello).map_err(|error| match error {
            CallError::Refused { code, text } => RemoteError::Refused {
                url: self.url.to_string(),
                code,
                text,
            },
            CallError::Channel(error) => self.failed(error),
        })?;
        Ok(Opened::new(sender, receiver, stream, &welcome))
    }

    fn connect(&self) -> io::Result<Stream> {
        let stream = Stream::connect(&self.url.address, self.patience, self.credentials)?;
        stream.set_timeouts(Some(self.patience), Some(self.patience))?;
        Ok(stream)
    }

    /// Opens the channel and reads the image's metadata.
    pub(super) fn open_with_metadata(self) -> Result<(Opened, Vec<u8>), RemoteError> {
        let mut opened = self.open()?;
        let metadata = self.read_metadata(&mut opened)?;
        Ok((opened, metadata))
    }

    fn read_metadata(&self, opened: &mut Opened) -> Result<Vec<u8>, RemoteError> {
        let request = RequestId(u64::MAX);
        let Opened { sender, receiver, .. } = opened;
        let ask = Message::MetadataRequest { request };
        sender.send(&ask).map_err(|error| self.failed(error))?;
        loop {
            match receiver.receive().map_err(|error| self.failed(error))? {
                Message::Metadata { bytes, .. } => return Ok(bytes.to_vec()),
                Message::Failed(answer) => {
                    let (pages, code, text) = (answer.range, answer.code, answer.text.to_owned());
                    return Err(RemoteError::Failed {
                        url: self.url.to_string(),
                        pages,
                        code,
                        text,
                    });
                }
                Message::Ping { token } => {
                    let pong = Message::Pong { token };
                    sender.send(&pong).map_err(|error| self.failed(error))?;
                }
                _ => return Err(self.failed(ChannelError::Closed)),
            }
        }
    }
}
