//! What client and service say to each other (`docs/invalidations.md`). All numbers are little-endian.
//!
//! A request has 32 bytes, and each has one reply: a head of 16 bytes and as many bytes as that says.

use std::time::Duration;

use crate::abi;
use crate::queue::Event;
use crate::ranges::{AddressRange, Cookie};

/// Clients at a time; one more is told that there is no room.
pub const CLIENTS_AT_MOST: usize = 32;

/// Ranges that one client can register.
pub const RANGES_AT_MOST: usize = 65_536;

/// Events in one reply.
pub const EVENTS_AT_MOST: usize = 1024;

/// The longest that a change waits for an acknowledgement, whatever is asked for.
pub const LONGEST_LIMIT: Duration = Duration::from_secs(5);

/// The first request's.
pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"ummunoti");
pub(super) const VERSION: u32 = 1;

pub(super) const REQUEST_SIZE: usize = 32;
pub(super) const HEAD_SIZE: usize = 16;
pub(super) const EVENT_SIZE: usize = size_of::<abi::RawEvent>();

const HELLO: u32 = 1;
const REGISTER: u32 = 2;
const UNREGISTER: u32 = 3;
const READ: u32 = 4;
const ACKNOWLEDGE: u32 = 5;

/// The kind of a reply that is an error.
const ERROR: u32 = 0;

/// Events besides those of the seed.
const EVENT_TYPE_BEGIN: u32 = 2;
const EVENT_TYPE_END: u32 = 3;

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// The first one. `limit`: how long changes are to wait for its acknowledgement, if they are.
    Hello {
        limit: Option<Duration>,
    },
    Register {
        range: AddressRange,
        cookie: Cookie,
    },
    Unregister {
        cookie: Cookie,
    },
    Read {
        max: u32,
    },
    Acknowledge {
        change: u64,
    },
}

/// Why bytes are no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadRequest {
    #[error("there is no request of kind {0}")]
    Kind(u32),
    #[error("it does not begin as this protocol does")]
    Magic,
    #[error("its version is {0}, and this is version {VERSION}")]
    Version(u32),
}

impl Request {
    pub(super) const fn kind(self) -> u32 {
        match self {
            Self::Hello { .. } => HELLO,
            Self::Register { .. } => REGISTER,
            Self::Unregister { .. } => UNREGISTER,
            Self::Read { .. } => READ,
            Self::Acknowledge { .. } => ACKNOWLEDGE,
        }
    }

    pub(super) fn encode(self) -> [u8; REQUEST_SIZE] {
        let (small, words) = match self {
            // Nobody waits for 0 microseconds: that is who does not acknowledge.
            Self::Hello { limit } => {
                let limit = limit.map_or(0, |limit| (limit.as_micros() as u64).max(1));
                (VERSION, [MAGIC, limit, 0])
            }
            Self::Register { range, cookie } => (0, [range.start, range.end, cookie.0]),
            Self::Unregister { cookie } => (0, [0, 0, cookie.0]),
            Self::Read { max } => (max, [0; 3]),
            Self::Acknowledge { change } => (0, [change, 0, 0]),
        };
        let mut bytes = [0; REQUEST_SIZE];
        bytes[..4].copy_from_slice(&self.kind().to_le_bytes());
        bytes[4..8].copy_from_slice(&small.to_le_bytes());
        for (at, word) in bytes[8..].chunks_exact_mut(8).zip(words) {
            at.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    pub(super) fn decode(bytes: &[u8; REQUEST_SIZE]) -> Result<Self, BadRequest> {
        let (small, word) = (half(bytes, 4), |index: usize| word(bytes, 8 + index * 8));
        Ok(match half(bytes, 0) {
            HELLO if word(0) != MAGIC => return Err(BadRequest::Magic),
            HELLO if small != VERSION => return Err(BadRequest::Version(small)),
            HELLO => Self::Hello {
                limit: (word(1) > 0).then(|| Duration::from_micros(word(1))),
            },
            REGISTER => Self::Register {
                range: AddressRange::new(word(0), word(1)),
                cookie: Cookie(word(2)),
            },
            UNREGISTER => Self::Unregister {
                cookie: Cookie(word(2)),
            },
            READ => Self::Read { max: small },
            ACKNOWLEDGE => Self::Acknowledge { change: word(0) },
            kind => return Err(BadRequest::Kind(kind)),
        })
    }
}

/// The head of a reply: the request's kind or [`ERROR`], the size of what follows, and a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    kind: u32,
    pub(super) size: u32,
    /// Of an error its errno; else what the request has as a result.
    pub(super) value: u64,
}

impl Head {
    pub(super) fn is_error(self) -> bool {
        self.kind == ERROR
    }

    pub(super) fn is_for(self, request: Request) -> bool {
        self.kind == request.kind()
    }

    pub(super) fn decode(bytes: &[u8; HEAD_SIZE]) -> Self {
        Self {
            kind: half(bytes, 0),
            size: half(bytes, 4),
            value: word(bytes, 8),
        }
    }

    fn encode(self) -> Vec<u8> {
        let mut bytes = self.kind.to_le_bytes().to_vec();
        bytes.extend(self.size.to_le_bytes());
        bytes.extend(self.value.to_le_bytes());
        bytes
    }
}

/// A reply to `request`.
pub(super) fn reply(request: Request, value: u64, events: &[abi::RawEvent]) -> Vec<u8> {
    let size = (events.len() * EVENT_SIZE) as u32;
    let kind = request.kind();
    let mut bytes = Head { kind, size, value }.encode();
    for event in events {
        bytes.extend(event.kind.to_le_bytes());
        bytes.extend(event.flags.to_le_bytes());
        for word in [event.hint_start, event.hint_end, event.user_cookie_counter] {
            bytes.extend(word.to_le_bytes());
        }
    }
    bytes
}

/// A reply to what is not served.
pub(super) fn refusal(errno: i32, text: &str) -> Vec<u8> {
    let head = Head {
        kind: ERROR,
        size: text.len() as u32,
        value: errno as u64,
    };
    [head.encode(), text.as_bytes().to_vec()].concat()
}

/// The change is about to be made.
pub(super) fn begin(change: u64) -> abi::RawEvent {
    abi::RawEvent {
        kind: EVENT_TYPE_BEGIN,
        user_cookie_counter: change,
        ..Default::default()
    }
}

/// The change was made.
pub(super) fn end(change: u64) -> abi::RawEvent {
    abi::RawEvent {
        kind: EVENT_TYPE_END,
        user_cookie_counter: change,
        ..Default::default()
    }
}

/// What is told of changes and invalidations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// As a [`Notifier`](crate::Notifier) tells.
    Event(Event),
    /// A change is about to be made, of which the events since the last `Begin` tell what it hits. It waits for this client to
    /// acknowledge it, for as long as the limit is.
    Begin {
        /// Its number; they grow.
        change: u64,
    },
    /// It was made.
    End {
        /// Its number.
        change: u64,
    },
}

/// An event of a reply. `None`: there is none of that kind.
pub(super) fn notice(bytes: &[u8; EVENT_SIZE]) -> Option<Notice> {
    let last = word(bytes, 24);
    Some(match half(bytes, 0) {
        abi::EVENT_TYPE_INVAL => Notice::Event(Event::Invalidated {
            cookie: Cookie(last),
            part: AddressRange::new(word(bytes, 8), word(bytes, 16)),
            exact: half(bytes, 4) & abi::EVENT_FLAG_HINT != 0,
        }),
        abi::EVENT_TYPE_LAST => Notice::Event(Event::Last { counter: last }),
        EVENT_TYPE_BEGIN => Notice::Begin { change: last },
        EVENT_TYPE_END => Notice::End { change: last },
        _ => return None,
    })
}

/// The 32 bits at a place that there is.
fn half(bytes: &[u8], at: usize) -> u32 {
    let mut half = [0; 4];
    half.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(half)
}

/// The 64 bits at a place that there is.
fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from(half(bytes, at)) | u64::from(half(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn requests() -> impl Strategy<Value = Request> {
        prop_oneof![
            prop::option::of(1..u64::from(u32::MAX)).prop_map(|limit| Request::Hello {
                limit: limit.map(Duration::from_micros)
            }),
            any::<[u64; 3]>().prop_map(|[start, end, cookie]| Request::Register {
                range: AddressRange::new(start, end),
                cookie: Cookie(cookie)
            }),
            any::<u64>().prop_map(|cookie| Request::Unregister {
                cookie: Cookie(cookie)
            }),
            any::<u32>().prop_map(|max| Request::Read { max }),
            any::<u64>().prop_map(|change| Request::Acknowledge { change }),
        ]
    }

    proptest! {
        #[test]
        fn a_request_is_read_as_it_was_written(request in requests()) {
            prop_assert_eq!(Request::decode(&request.encode()), Ok(request));
        }

        #[test]
        fn no_bytes_are_a_panic(bytes in any::<[u8; 32]>(), kind in 0..8_u8) {
            let mut bytes = bytes;
            let _ = Request::decode(&bytes);
            let _ = notice(&bytes);
            bytes[..4].copy_from_slice(&[kind, 0, 0, 0]);
            let _ = Request::decode(&bytes);
            let _ = notice(&bytes);
        }
    }

    /// What the document says, in bytes.
    #[test]
    fn requests_and_replies_are_laid_out_as_documented() {
        let hello = Request::Hello {
            limit: Some(Duration::from_millis(3)),
        };
        let mut expected = b"\x01\0\0\0\x01\0\0\0ummunoti\xb8\x0b".to_vec();
        expected.resize(REQUEST_SIZE, 0);
        assert_eq!(hello.encode()[..], expected);
        let event = Event::Invalidated {
            cookie: Cookie(9),
            part: AddressRange::new(0x1000, 0x2000),
            exact: true,
        };
        let reply = reply(Request::Read { max: 1 }, 0, &[event.into(), begin(5)]);
        assert_eq!(reply[..16], *b"\x04\0\0\0\x40\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(reply[16..32], *b"\0\0\0\0\x01\0\0\0\0\x10\0\0\0\0\0\0");
        assert_eq!(reply[48..56], *b"\x02\0\0\0\0\0\0\0");
        assert_eq!(reply[72..80], 5_u64.to_le_bytes());
        assert_eq!(refusal(12, "no"), b"\0\0\0\0\x02\0\0\0\x0c\0\0\0\0\0\0\0no");
    }
}
