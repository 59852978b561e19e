//! Every message in one type, from bytes and to bytes.

use super::fields::Fields;
use super::header::{check_id, check_length};
use super::{
    Bitmap, BitmapRequest, Epoch, Failed, Goodbye, HEADER_SIZE, Handover, Header, Hello, MAX_PAGES,
    MAX_PAYLOAD, MAX_RANGES, MessageType, Pages, Ranges, Refused, Request, RequestId, Welcome, WireError,
    Zero,
};
use crate::units::PageIndex;

/// What a frame says. Lists, texts and data are borrowed from the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// The first frame of who calls.
    Hello(Hello<'a>),
    /// The answer that opens the channel.
    Welcome(Welcome),
    /// The answer that closes it.
    Refused(Refused<'a>),
    /// The sender starts nothing new on this channel.
    Goodbye(Goodbye<'a>),
    /// Answered at once by a pong with the same token, which is the frame's id. No payload.
    Ping {
        /// Any number.
        token: u64,
    },
    /// The answer to a ping.
    Pong {
        /// The ping's.
        token: u64,
    },
    /// The sender has sent all that comes before it on this channel; pages after it have this epoch or a newer one. The number
    /// is the frame's id, the epoch (u64) its payload.
    Barrier {
        /// Any number.
        number: u64,
        /// No page that comes after it is older.
        epoch: Epoch,
    },
    /// All frames before that barrier have been dealt with: their pages installed or dropped. No payload.
    BarrierAck {
        /// The barrier's.
        number: u64,
    },
    /// Wants pages.
    Request(Request<'a>),
    /// Has pages.
    Pages(Pages<'a>),
    /// Has zero pages.
    Zero(Zero),
    /// Cannot have pages.
    Failed(Failed<'a>),
    /// The fetcher has overwritten or dropped these pages and does not want them any more, asked for or pushed. The payload is
    /// a list of ranges as in a request, at most 4096.
    Cancel {
        /// The pages.
        ranges: Ranges<'a>,
    },
    /// What was sent of these pages before this epoch is no longer right. The payload is the epoch (u64) and a list of ranges
    /// as in a request, at most 4096.
    Discard {
        /// The oldest one in which they are right again.
        epoch: Epoch,
        /// The pages.
        ranges: Ranges<'a>,
    },
    /// The guest was seen at this page (u64, the payload): what is near it is worth pushing first. May be skipped.
    Locality {
        /// The page.
        page: PageIndex,
    },
    /// Wants a bitmap.
    BitmapRequest(BitmapRequest),
    /// Has a bitmap.
    Bitmap(Bitmap<'a>),
    /// Wants the image's metadata. No payload.
    MetadataRequest {
        /// Not 0, and not that of another request in flight on this channel.
        request: RequestId,
    },
    /// Has the image's metadata, which is the payload.
    Metadata {
        /// What is answered.
        request: RequestId,
        /// At most 1 MiB; the VMM knows what it means.
        bytes: &'a [u8],
    },
    /// A machine that is about to move: what the other side has to make for it. The payload is at most 1 MiB; the VMM knows what it
    /// means.
    Machine {
        /// The description.
        bytes: &'a [u8],
    },
    /// All of a machine's state but RAM, in the same manner.
    State {
        /// The state.
        bytes: &'a [u8],
    },
    /// Whose the machine is.
    Handover(Handover<'a>),
    /// One that this version does not know and may skip.
    Unknown {
        /// Its type.
        code: u16,
        /// The frame's id.
        id: u64,
        /// Whatever it says.
        payload: &'a [u8],
    },
}

impl<'a> Message<'a> {
    /// The frame's type.
    pub const fn kind(&self) -> MessageType {
        match self {
            Self::Hello(_) => MessageType::Hello,
            Self::Welcome(_) => MessageType::Welcome,
            Self::Refused(_) => MessageType::Refused,
            Self::Goodbye(_) => MessageType::Goodbye,
            Self::Ping { .. } => MessageType::Ping,
            Self::Pong { .. } => MessageType::Pong,
            Self::Barrier { .. } => MessageType::Barrier,
            Self::BarrierAck { .. } => MessageType::BarrierAck,
            Self::Request(_) => MessageType::Request,
            Self::Pages(_) => MessageType::Pages,
            Self::Zero(_) => MessageType::Zero,
            Self::Failed(_) => MessageType::Failed,
            Self::Cancel { .. } => MessageType::Cancel,
            Self::Discard { .. } => MessageType::Discard,
            Self::Locality { .. } => MessageType::Locality,
            Self::BitmapRequest(_) => MessageType::BitmapRequest,
            Self::Bitmap(_) => MessageType::Bitmap,
            Self::MetadataRequest { .. } => MessageType::MetadataRequest,
            Self::Metadata { .. } => MessageType::Metadata,
            Self::Machine { .. } => MessageType::Machine,
            Self::State { .. } => MessageType::State,
            Self::Handover(_) => MessageType::Handover,
            Self::Unknown { code, .. } => MessageType::Other(*code),
        }
    }

    /// The frame's id.
    pub const fn id(&self) -> u64 {
        match self {
            Self::Ping { token: id }
            | Self::Pong { token: id }
            | Self::Barrier { number: id, .. }
            | Self::BarrierAck { number: id }
            | Self::Request(Request {
                request: RequestId(id),
                ..
            })
            | Self::Pages(Pages {
                request: RequestId(id),
                ..
            })
            | Self::Zero(Zero {
                request: RequestId(id),
                ..
            })
            | Self::Failed(Failed {
                request: RequestId(id),
                ..
            })
            | Self::BitmapRequest(BitmapRequest {
                request: RequestId(id),
                ..
            })
            | Self::Bitmap(Bitmap {
                request: RequestId(id),
                ..
            })
            | Self::MetadataRequest {
                request: RequestId(id),
            }
            | Self::Metadata {
                request: RequestId(id),
                ..
            }
            | Self::Unknown { id, .. } => *id,
            _ => 0,
        }
    }

    /// Reads the payload that belongs to `header`. Neither copies nor allocates.
    ///
    /// Page data is not compared with its checksums here: see [`Unpacked::verify`](super::Unpacked::verify).
    pub fn decode(header: &Header, payload: &'a [u8]) -> Result<Self, WireError> {
        header.check_payload(payload)?;
        let mut fields = Fields::new(header.kind, payload);
        let id = header.id;
        let request = RequestId(id);
        // These keep the rest for later versions, or have taken it, and the requests and answers see to it themselves.
        let message = match header.kind {
            MessageType::Hello => return Hello::decode(fields).map(Self::Hello),
            MessageType::Welcome => return Welcome::decode(fields).map(Self::Welcome),
            MessageType::Refused => return Refused::decode(fields).map(Self::Refused),
            MessageType::Goodbye => return Goodbye::decode(fields).map(Self::Goodbye),
            MessageType::Request => return Request::decode(request, fields).map(Self::Request),
            MessageType::Pages => return Pages::decode(request, fields).map(Self::Pages),
            MessageType::Zero => return Zero::decode(request, fields).map(Self::Zero),
            MessageType::Failed => return Failed::decode(request, fields).map(Self::Failed),
            MessageType::BitmapRequest => {
                return BitmapRequest::decode(request, fields).map(Self::BitmapRequest);
            }
            MessageType::Bitmap => return Bitmap::decode(request, fields).map(Self::Bitmap),
            MessageType::Ping => Self::Ping { token: id },
            MessageType::Pong => Self::Pong { token: id },
            MessageType::Barrier => Self::Barrier {
                number: id,
                epoch: Epoch(fields.u64()?),
            },
            MessageType::BarrierAck => Self::BarrierAck { number: id },
            MessageType::Cancel => Self::Cancel {
                ranges: Ranges::decode(header.kind, fields.rest(), MAX_RANGES)?,
            },
            MessageType::Discard => Self::Discard {
                epoch: Epoch(fields.u64()?),
                ranges: Ranges::decode(header.kind, fields.rest(), MAX_RANGES)?,
            },
            MessageType::Locality => Self::Locality {
                page: locality(PageIndex(fields.u64()?))?,
            },
            MessageType::MetadataRequest => Self::MetadataRequest { request },
            MessageType::Metadata => Self::Metadata {
                request,
                bytes: fields.rest(),
            },
            MessageType::Machine => Self::Machine { bytes: fields.rest() },
            MessageType::State => Self::State { bytes: fields.rest() },
            MessageType::Handover => return Handover::decode(fields).map(Self::Handover),
            MessageType::Other(code) => Self::Unknown {
                code,
                id,
                payload: fields.rest(),
            },
        };
        fields.end()?;
        Ok(message)
    }

    /// Appends the frame, header and payload, with sequence number 0: [`Outgoing::stamp`](super::Outgoing::stamp) puts in the
    /// right one. After an error `out` is what it was before.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        let tail = match self {
            Self::Pages(pages) => pages.data,
            _ => &[],
        };
        frame(self.kind(), self.id(), tail.len(), out, |out| self.put(out))?;
        out.extend_from_slice(tail);
        Ok(())
    }

    fn put(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        match self {
            Self::Hello(hello) => return hello.encode(out),
            Self::Welcome(welcome) => return welcome.encode(out),
            Self::Refused(refused) => refused.encode(out),
            Self::Goodbye(goodbye) => goodbye.encode(out),
            Self::Ping { .. }
            | Self::Pong { .. }
            | Self::BarrierAck { .. }
            | Self::MetadataRequest { .. } => {}
            Self::Barrier { epoch, .. } => out.extend_from_slice(&epoch.0.to_le_bytes()),
            Self::Request(request) => return request.encode(out),
            Self::Pages(pages) => return pages.head().put(out),
            Self::Zero(zero) => return zero.encode(out),
            Self::Failed(failed) => return failed.encode(out),
            Self::Cancel { ranges } => return ranges.encode(self.kind(), MAX_RANGES, out),
            Self::Discard { epoch, ranges } => {
                out.extend_from_slice(&epoch.0.to_le_bytes());
                return ranges.encode(self.kind(), MAX_RANGES, out);
            }
            Self::Locality { page } => out.extend_from_slice(&locality(*page)?.0.to_le_bytes()),
            Self::BitmapRequest(request) => return request.encode(out),
            Self::Bitmap(bitmap) => return bitmap.encode(out),
            Self::Handover(handover) => handover.encode(out),
            Self::Metadata { bytes, .. }
            | Self::Machine { bytes }
            | Self::State { bytes }
            | Self::Unknown { payload: bytes, .. } => {
                out.extend_from_slice(bytes);
            }
        }
        Ok(())
    }
}

fn locality(page: PageIndex) -> Result<PageIndex, WireError> {
    if page.0 < MAX_PAGES {
        Ok(page)
    } else {
        Err(WireError::Field {
            kind: MessageType::Locality,
            field: "page",
            value: page.0,
        })
    }
}

/// Appends a frame whose payload is what `put` appends and `tail` bytes that the caller appends or sends.
pub(super) fn frame(
    kind: MessageType,
    id: u64,
    tail: usize,
    out: &mut Vec<u8>,
    put: impl FnOnce(&mut Vec<u8>) -> Result<(), WireError>,
) -> Result<(), WireError> {
    let at = out.len();
    out.extend_from_slice(&[0; HEADER_SIZE]);
    let put = check_id(kind, id).and_then(|()| put(out)).and_then(|()| {
        let payload = &out[at + HEADER_SIZE..];
        let length = payload.len().saturating_add(tail);
        check_length(kind, length)?;
        let mut header = Header::for_payload(kind, id, payload);
        header.length = length as u32;
        Ok(header)
    });
    match put {
        Ok(header) => {
            out[at..at + HEADER_SIZE].copy_from_slice(&header.encode());
            Ok(())
        }
        Err(error) => {
            out.truncate(at);
            Err(error)
        }
    }
}

const _: () = assert!(MAX_PAYLOAD >= MessageType::Pages.payload_bounds().1);
const _: () = assert!(MAX_PAYLOAD >= MessageType::Metadata.payload_bounds().1);
