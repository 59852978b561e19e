//! The two directions of a channel: which frame may come when.

use super::header::stamp;
use super::{ChannelKind, Features, Header, Message, MessageType, RequestId, Role, WireError};

/// Numbers the frames that are sent on one channel, in the order in which they are sent. Threads that share a channel encode
/// each for itself, and number under the lock under which they write.
#[derive(Debug, Default)]
pub struct Outgoing {
    pub(super) next: u32,
}

impl Outgoing {
    /// Gives an encoded frame its number. `frame` begins with the frame's header; to be called once for each frame, in the
    /// order in which they go out.
    ///
    /// # Panics
    /// If `frame` is shorter than a header.
    pub fn stamp(&mut self, frame: &mut [u8]) {
        stamp(frame, self.next);
        self.next = self.next.wrapping_add(1);
    }

    /// Encodes and numbers a message.
    pub fn append(&mut self, message: &Message<'_>, out: &mut Vec<u8>) -> Result<(), WireError> {
        let at = out.len();
        message.encode(out)?;
        self.stamp(&mut out[at..]);
        Ok(())
    }
}

/// Checks that frames come in order, and that each may come on this channel, from this side and now. Of every frame: read the
/// header, [`Header::decode`], [`Incoming::accept`], and only then make room for the payload.
#[derive(Debug)]
pub struct Incoming {
    pub(super) next: u32,
    phase: Phase,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// Nothing has come; a hello must.
    Hello,
    /// A hello was sent; its answer must come.
    Answer,
    /// The hello was received and not answered, or refused: nothing may come.
    Shut,
    Open(Terms),
    /// The other side said goodbye: it only answers.
    Draining(Terms),
}

#[derive(Clone, Copy, Debug)]
struct Terms {
    channel: ChannelKind,
    sender: Role,
    features: Features,
}

impl Incoming {
    /// For the side that was called.
    pub const fn acceptor() -> Self {
        Self {
            next: 0,
            phase: Phase::Hello,
        }
    }

    /// For the side that called.
    pub const fn connector() -> Self {
        Self {
            next: 0,
            phase: Phase::Answer,
        }
    }

    /// After hello and welcome: what the channel is for, what the other side is, what was agreed upon.
    pub const fn open(&mut self, channel: ChannelKind, sender: Role, features: Features) {
        self.phase = Phase::Open(Terms {
            channel,
            sender,
            features,
        });
    }

    /// Whether the other side said goodbye.
    pub const fn is_draining(&self) -> bool {
        matches!(self.phase, Phase::Draining(_))
    }

    /// To be asked about every header, before its payload is read.
    pub fn accept(&mut self, header: &Header) -> Result<(), WireError> {
        if header.sequence != self.next {
            return Err(WireError::Sequence {
                expected: self.next,
                got: header.sequence,
            });
        }
        self.next = self.next.wrapping_add(1);
        let kind = header.kind;
        let unexpected = |expected| Err(WireError::Unexpected { kind, expected });
        match (self.phase, kind) {
            (Phase::Hello, MessageType::Hello)
            | (Phase::Answer, MessageType::Welcome | MessageType::Refused) => {
                self.phase = Phase::Shut;
                Ok(())
            }
            (Phase::Hello, _) => unexpected("a hello"),
            (Phase::Answer, _) => unexpected("the answer to a hello"),
            (Phase::Shut, _) => unexpected("nothing"),
            (_, MessageType::Hello | MessageType::Welcome | MessageType::Refused) => {
                unexpected("anything but a hello or its answer")
            }
            (Phase::Open(terms), MessageType::Goodbye) => {
                self.phase = Phase::Draining(terms);
                Ok(())
            }
            (Phase::Open(terms), _) => terms.allow(header),
            (Phase::Draining(terms), _) if is_answer(header) => terms.allow(header),
            (Phase::Draining(_), _) => unexpected("an answer"),
        }
    }
}

/// What may come after a goodbye.
const fn is_answer(header: &Header) -> bool {
    match header.kind {
        MessageType::Pages | MessageType::Zero | MessageType::Failed => header.id != RequestId::PUSH.0,
        MessageType::Ping
        | MessageType::Pong
        | MessageType::BarrierAck
        | MessageType::Bitmap
        | MessageType::Metadata
        | MessageType::Other(_) => true,
        _ => false,
    }
}

impl Terms {
    fn allow(&self, header: &Header) -> Result<(), WireError> {
        let kind = header.kind;
        if !kind.may_come(self.channel, self.sender) {
            return Err(WireError::Channel {
                kind,
                channel: self.channel,
                sender: self.sender,
            });
        }
        let pushed = header.id == RequestId::PUSH.0
            && matches!(kind, MessageType::Pages | MessageType::Zero | MessageType::Failed);
        if !self.features.contains(kind.feature()) || (pushed && !self.features.contains(Features::PUSH)) {
            return Err(WireError::Feature { kind });
        }
        Ok(())
    }
}

impl MessageType {
    /// Whether such a frame may come from `sender` on an open `channel`.
    pub const fn may_come(self, channel: ChannelKind, sender: Role) -> bool {
        let carries_pages = !matches!(channel, ChannelKind::Control);
        let provider = matches!(sender, Role::Provider);
        match self {
            Self::Hello | Self::Welcome | Self::Refused => false,
            Self::Request => carries_pages && !provider,
            Self::Pages | Self::Zero => carries_pages && provider,
            Self::Discard | Self::Metadata => provider,
            Self::Cancel | Self::Locality | Self::MetadataRequest => !provider,
            Self::Machine | Self::State => !carries_pages && provider,
            Self::Handover => !carries_pages,
            // Bitmaps are asked for by either side, and who is asked may fail. The rest is about the channel itself.
            _ => true,
        }
    }
}
