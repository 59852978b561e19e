//! Frames of every kind: a few fixed ones, and any.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::super::*;
use super::{decode, encode};
use crate::image::checksum;
use crate::units::{PAGE_SIZE, PageIndex, PageRange};

/// Encodes a message and sees that it comes back.
fn round_trip(message: Message<'_>) -> Vec<u8> {
    let frame = encode(&message);
    assert_eq!(decode(&frame), Ok(message));
    frame
}

/// `count` pages, every third of which is zero, every fourth compressible, and their checksums.
pub(super) fn content(count: usize, seed: u64) -> (Vec<u64>, Vec<u8>) {
    let mut checksums = Vec::new();
    let mut data = Vec::new();
    for index in 0..count {
        let mut page = [0; PAGE_SIZE];
        match (index as u64 + seed) % 4 {
            0 => {}
            1 => page.fill(seed as u8 | 1),
            _ => {
                for (at, word) in page.chunks_exact_mut(8).enumerate() {
                    let word_is =
                        (seed ^ (index * PAGE_SIZE + at) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                    word.copy_from_slice(&word_is.to_le_bytes());
                }
            }
        }
        checksums.push(checksum(&page));
        if checksums.last() != Some(&0) {
            data.extend_from_slice(&page);
        }
    }
    (checksums, data)
}

/// A pages frame with this content, compressed if asked for and if that makes it shorter.
pub(super) fn pages_frame(start: u64, count: usize, seed: u64, lz4: bool) -> Vec<u8> {
    let (checksums, data) = content(count, seed);
    let mut buffer = vec![0; lz4::bound(data.len())];
    let mut compressor = lz4::Compressor::default();
    let compressed = lz4.then(|| compressor.compress(&data, &mut buffer)).flatten();
    round_trip(Message::Pages(Pages {
        request: RequestId(seed),
        range: PageRange::new(PageIndex(start), count as u64),
        epoch: Epoch(3),
        encoding: if compressed.is_some() {
            Encoding::Lz4
        } else {
            Encoding::Raw
        },
        checksums: (&checksums[..]).into(),
        data: compressed.unwrap_or(&data),
    }))
}

fn codes(known: usize) -> impl Strategy<Value = u16> {
    prop_oneof![1..=known as u16, any::<u16>()]
}

fn text() -> impl Strategy<Value = String> {
    "\\PC{0,60}"
}

fn range(limit: u64) -> impl Strategy<Value = PageRange> {
    (1..=limit).prop_flat_map(|count| {
        (0..=MAX_PAGES - count).prop_map(move |start| PageRange::new(PageIndex(start), count))
    })
}

fn ranges(limit: u64, most: usize) -> impl Strategy<Value = Vec<PageRange>> {
    vec(range(limit), 1..most)
}

fn bitmap_range(limit: u64) -> impl Strategy<Value = PageRange> {
    range(limit).prop_map(|range| {
        PageRange::new(
            PageIndex(range.start.0 / BITMAP_ALIGNMENT * BITMAP_ALIGNMENT),
            range.count,
        )
    })
}

fn hello() -> impl Strategy<Value = Vec<u8>> {
    let kinds = prop_oneof![
        Just(ChannelKind::Demand),
        Just(ChannelKind::Background),
        Just(ChannelKind::Control)
    ];
    let role = prop_oneof![Just(Role::Fetcher), Just(Role::Provider)];
    (
        (
            any::<u16>(),
            any::<u64>(),
            option::of(1..=MAX_PAGES),
            any::<u64>(),
            any::<u32>(),
        ),
        (
            kinds,
            role,
            any::<[u8; 16]>(),
            option::of(any::<[u8; 32]>()),
            "\\PC{0,60}",
        ),
    )
        .prop_map(
            |((minor, features, pages, epoch, keep_alive_ms), (channel, role, session, digest, image))| {
                round_trip(Message::Hello(Hello {
                    version: Version { minor, ..VERSION },
                    features: Features(features),
                    pages,
                    epoch: Epoch(epoch),
                    keep_alive_ms,
                    channel,
                    role,
                    session: SessionId(session),
                    digest,
                    image: &image,
                }))
            },
        )
}

fn welcome() -> impl Strategy<Value = Vec<u8>> {
    (
        (
            any::<u16>(),
            any::<u64>(),
            1..=MAX_PAGES,
            any::<u64>(),
            any::<u32>(),
            1u16..,
        ),
        (
            any::<[u8; 16]>().prop_filter("a session", |id| *id != [0; 16]),
            option::of(any::<[u8; 32]>()),
        ),
    )
        .prop_map(
            |((minor, features, pages, epoch, keep_alive_ms, window), (session, digest))| {
                round_trip(Message::Welcome(Welcome {
                    version: Version { minor, ..VERSION },
                    features: Features(features),
                    pages,
                    epoch: Epoch(epoch),
                    keep_alive_ms,
                    window,
                    session: SessionId(session),
                    digest,
                }))
            },
        )
}

fn setup() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        hello(),
        welcome(),
        (any::<u16>(), any::<u16>(), codes(RefuseCode::ALL.len()), text()).prop_map(
            |(major, minor, code, text)| {
                round_trip(Message::Refused(Refused {
                    version: Version { major, minor },
                    code: RefuseCode::from_code(code),
                    text: &text,
                }))
            }
        ),
        (codes(GoodbyeReason::ALL.len()), text()).prop_map(|(code, text)| {
            round_trip(Message::Goodbye(Goodbye {
                reason: GoodbyeReason::from_code(code),
                text: &text,
            }))
        }),
        any::<u64>().prop_map(|token| round_trip(Message::Ping { token })),
        any::<u64>().prop_map(|token| round_trip(Message::Pong { token })),
        (any::<u64>(), any::<u64>()).prop_map(|(number, epoch)| {
            round_trip(Message::Barrier {
                number,
                epoch: Epoch(epoch),
            })
        }),
        any::<u64>().prop_map(|number| round_trip(Message::BarrierAck { number })),
    ]
}

fn about_pages() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        (1u64.., ranges(MAX_REQUEST_PAGES / 16, 16)).prop_map(|(id, ranges)| {
            round_trip(Message::Request(Request {
                request: RequestId(id),
                ranges: (&ranges[..]).into(),
            }))
        }),
        (0..MAX_PAGES - 4, 1usize..4, any::<u64>(), any::<bool>())
            .prop_map(|(start, count, seed, lz4)| pages_frame(start, count, seed, lz4)),
        (any::<u64>(), range(MAX_RANGE_PAGES), any::<u64>()).prop_map(|(id, range, epoch)| {
            round_trip(Message::Zero(Zero {
                request: RequestId(id),
                range,
                epoch: Epoch(epoch),
            }))
        }),
        (
            any::<u64>(),
            range(MAX_RANGE_PAGES),
            codes(FailCode::ALL.len()),
            text()
        )
            .prop_map(|(id, range, code, text)| {
                round_trip(Message::Failed(Failed {
                    request: RequestId(id),
                    range,
                    code: FailCode::from_code(code),
                    text: &text,
                }))
            }),
        ranges(MAX_RANGE_PAGES, 40).prop_map(|ranges| {
            round_trip(Message::Cancel {
                ranges: (&ranges[..]).into(),
            })
        }),
        (any::<u64>(), ranges(MAX_RANGE_PAGES, 40)).prop_map(|(epoch, ranges)| {
            round_trip(Message::Discard {
                epoch: Epoch(epoch),
                ranges: (&ranges[..]).into(),
            })
        }),
        (0..MAX_PAGES).prop_map(|page| round_trip(Message::Locality {
            page: PageIndex(page)
        })),
    ]
}

fn about_memory() -> impl Strategy<Value = Vec<u8>> {
    let kind = || prop_oneof![Just(BitmapKind::Received), Just(BitmapKind::Data)];
    prop_oneof![
        (1u64.., kind(), bitmap_range(MAX_PAGES)).prop_map(|(id, kind, range)| {
            round_trip(Message::BitmapRequest(BitmapRequest {
                request: RequestId(id),
                kind,
                range,
            }))
        }),
        (1u64.., kind(), bitmap_range(2000), any::<u64>()).prop_map(|(id, kind, range, seed)| {
            let bits = bits_for(range.count, |page| (page ^ seed).count_ones() % 3 == 0);
            round_trip(Message::Bitmap(Bitmap {
                request: RequestId(id),
                kind,
                range,
                bits: &bits,
            }))
        }),
        (1u64..).prop_map(|id| round_trip(Message::MetadataRequest {
            request: RequestId(id)
        })),
        (1u64.., vec(any::<u8>(), 0..500)).prop_map(|(id, bytes)| {
            round_trip(Message::Metadata {
                request: RequestId(id),
                bytes: &bytes,
            })
        }),
        vec(any::<u8>(), 1..500).prop_map(|bytes| round_trip(Message::Machine { bytes: &bytes })),
        vec(any::<u8>(), 1..500).prop_map(|bytes| round_trip(Message::State { bytes: &bytes })),
        (codes(Step::ALL.len()), any::<u32>(), text()).prop_map(|(code, value, text)| {
            round_trip(Message::Handover(Handover {
                step: Step::from_code(code),
                value,
                text: &text,
            }))
        }),
        (0x8000u16.., any::<u64>(), vec(any::<u8>(), 0..100)).prop_map(|(code, id, payload)| {
            round_trip(Message::Unknown {
                code,
                id,
                payload: &payload,
            })
        }),
    ]
}

/// Bits for `count` pages, set where `set` says so.
pub(super) fn bits_for(count: u64, set: impl Fn(u64) -> bool) -> Vec<u8> {
    let mut bits = vec![0; count.div_ceil(8) as usize];
    for page in (0..count).filter(|page| set(*page)) {
        bits[(page / 8) as usize] |= 1 << (page % 8);
    }
    bits
}

/// Any frame, already seen to come back as the message that it was made of.
pub(super) fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![setup(), about_pages(), about_memory()]
}

/// One or two frames of every type, always the same.
#[expect(clippy::too_many_lines, reason = "a list")]
pub(super) fn fixed() -> Vec<(&'static str, Vec<u8>)> {
    let range = PageRange::new(PageIndex(64), 100);
    let ranges = [
        range,
        PageRange::single(PageIndex(7)),
        PageRange::new(PageIndex(1 << 20), 512),
    ];
    let request = RequestId(5);
    let hello = Hello {
        version: VERSION,
        features: Features::ALL,
        pages: Some(1 << 18),
        epoch: Epoch(0),
        keep_alive_ms: 1000,
        channel: ChannelKind::Demand,
        role: Role::Fetcher,
        session: SessionId::NEW,
        digest: Some([7; 32]),
        image: "golden/debian-13",
    };
    let frames = [
        ("hello", Message::Hello(hello)),
        (
            "hello_provider",
            Message::Hello(Hello {
                role: Role::Provider,
                channel: ChannelKind::Background,
                session: SessionId(*b"session of sixte"),
                digest: None,
                image: "",
                ..hello
            }),
        ),
        (
            "welcome",
            Message::Welcome(Welcome {
                version: VERSION,
                features: Features::LZ4 | Features::PUSH,
                pages: 1 << 18,
                epoch: Epoch(2),
                keep_alive_ms: 500,
                window: 64,
                session: SessionId(*b"session of sixte"),
                digest: Some([7; 32]),
            }),
        ),
        (
            "refused",
            Message::Refused(Refused {
                version: VERSION,
                code: RefuseCode::UnknownImage,
                text: "no image 'golden'",
            }),
        ),
        (
            "goodbye",
            Message::Goodbye(Goodbye {
                reason: GoodbyeReason::Draining,
                text: "SIGTERM",
            }),
        ),
        (
            "ping",
            Message::Ping {
                token: 0x0123_4567_89ab_cdef,
            },
        ),
        ("pong", Message::Pong { token: u64::MAX }),
        (
            "barrier",
            Message::Barrier {
                number: 1,
                epoch: Epoch(4),
            },
        ),
        ("barrier_ack", Message::BarrierAck { number: 1 }),
        (
            "request",
            Message::Request(Request {
                request,
                ranges: (&ranges[..]).into(),
            }),
        ),
        (
            "zero",
            Message::Zero(Zero {
                request,
                range,
                epoch: Epoch(1),
            }),
        ),
        (
            "failed",
            Message::Failed(Failed {
                request,
                range,
                code: FailCode::Corrupt,
                text: "page 64 does not match its checksum",
            }),
        ),
        (
            "cancel",
            Message::Cancel {
                ranges: (&ranges[..]).into(),
            },
        ),
        (
            "discard",
            Message::Discard {
                epoch: Epoch(9),
                ranges: (&ranges[..]).into(),
            },
        ),
        ("locality", Message::Locality { page: PageIndex(99) }),
        (
            "bitmap_request",
            Message::BitmapRequest(BitmapRequest {
                request,
                kind: BitmapKind::Received,
                range,
            }),
        ),
        (
            "bitmap",
            Message::Bitmap(Bitmap {
                request,
                kind: BitmapKind::Data,
                range,
                bits: &bits_for(100, |page| page % 7 < 3),
            }),
        ),
        ("metadata_request", Message::MetadataRequest { request }),
        (
            "metadata",
            Message::Metadata {
                request,
                bytes: b"{\"kernel\": \"built-in\"}",
            },
        ),
        (
            "machine",
            Message::Machine {
                bytes: b"{\"cpus\": 2}",
            },
        ),
        (
            "state",
            Message::State {
                bytes: b"{\"vcpus\": []}",
            },
        ),
        (
            "handover",
            Message::Handover(Handover {
                step: Step::Abort,
                value: 0,
                text: "no room",
            }),
        ),
        (
            "unknown",
            Message::Unknown {
                code: 0xf001,
                id: 3,
                payload: b"something new",
            },
        ),
    ];
    let mut frames: Vec<_> = frames
        .into_iter()
        .map(|(name, message)| (name, round_trip(message)))
        .collect();
    frames.push(("pages", pages_frame(4096, 2, 1, false)));
    frames.push(("pages_lz4", pages_frame(4096, 3, 0, true)));
    frames.push(("pages_pushed_zero", pages_frame(12, 1, 0, false)));
    frames
}
