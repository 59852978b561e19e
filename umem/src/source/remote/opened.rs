//! Opening a channel to a page server.

use std::sync::Arc;
use std::time::Duration;

use super::{RemoteError, RemoteUrl};
use crate::channel::{ChannelError, Receiver, Sender};
use crate::link::Stream;
use crate::wire::{
    ChannelKind, Epoch, Features, Hello, Incoming, Message, RequestId, Role, SessionId, VERSION,
};

/// How long a server may take to answer a hello.
const HELLO_PATIENCE: Duration = Duration::from_secs(10);

/// A new channel, before anything was asked on it.
pub(super) struct Opened {
    pub(super) sender: Sender,
    pub(super) receiver: Receiver,
    pub(super) stream: Arc<Stream>,
    pub(super) pages: u64,
    pub(super) digest: Option<[u8; 32]>,
}

pub(super) fn open_channel(
    url: &RemoteUrl,
    channel: ChannelKind,
    digest: Option<[u8; 32]>,
    pages: Option<u64>,
) -> Result<Opened, RemoteError> {
    let failed = |source: ChannelError| RemoteError::Channel {
        url: url.to_string(),
        source,
    };
    let stream = Stream::connect(&url.address, HELLO_PATIENCE, None)
        .and_then(|stream| {
            stream
                .set_timeouts(Some(HELLO_PATIENCE), Some(HELLO_PATIENCE))
                .map(|()| stream)
        })
        .map_err(|source| RemoteError::Connect {
            url: url.to_string(),
            source,
        })?;
    let stream = Arc::new(stream);
    let mut sender = Sender::new(Arc::clone(&stream));
    let mut receiver = Receiver::new(Arc::clone(&stream), Incoming::connector());
    let hello = Hello {
        version: VERSION,
        features: Features::NONE,
        pages,
        epoch: Epoch(0),
        keep_alive_ms: 0,
        channel,
        role: Role::Fetcher,
        session: SessionId::NEW,
        digest,
        image: &url.image,
    };
    sender.send(&Message::Hello(hello)).map_err(failed)?;
    let welcome = match receiver.receive().map_err(failed)? {
        Message::Welcome(welcome) => welcome,
        Message::Refused(refused) => {
            let (code, text) = (refused.code, refused.text.to_owned());
            return Err(RemoteError::Refused {
                url: url.to_string(),
                code,
                text,
            });
        }
        // `Incoming` lets nothing else through.
        _ => return Err(failed(ChannelError::Closed)),
    };
    welcome.check(&hello).map_err(|error| failed(error.into()))?;
    receiver.incoming.open(channel, Role::Provider, welcome.features);
    let keep_alive = match welcome.keep_alive_ms {
        0 => None,
        milliseconds => Some(Duration::from_millis(milliseconds.into())),
    };
    stream
        .set_timeouts(keep_alive, Some(HELLO_PATIENCE))
        .map_err(|error| failed(ChannelError::Lost(error)))?;
    Ok(Opened {
        sender,
        receiver,
        stream,
        pages: welcome.pages,
        digest: welcome.digest,
    })
}

impl Opened {
    pub(super) fn read_metadata(&mut self, url: &RemoteUrl) -> Result<Vec<u8>, RemoteError> {
        let failed = |source: ChannelError| RemoteError::Channel {
            url: url.to_string(),
            source,
        };
        let request = RequestId(u64::MAX);
        self.sender
            .send(&Message::MetadataRequest { request })
            .map_err(failed)?;
        let metadata = match self.receiver.receive().map_err(failed)? {
            Message::Metadata { bytes, .. } => bytes.to_vec(),
            Message::Failed(answer) => {
                let (pages, code, text) = (answer.range, answer.code, answer.text.to_owned());
                return Err(RemoteError::Failed {
                    url: url.to_string(),
                    pages,
                    code,
                    text,
                });
            }
            _ => return Err(failed(ChannelError::Closed)),
        };
        Ok(metadata)
    }
}
