//! Page servers that do not keep to the protocol, or say what is not so: a VM believes nothing that it can check.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use tests::need;
use tests::peer::{Frame, Liar, Lie, Peer, frame, welcome};
use tests::random::Random;
use tests::scratch::Scratch;
use tests::served::{FILLS, MARGIN, SEED, assert_right, served};
use tests::vm::{FinishedVm, Vm};
use umem::image::Image;
use umem::units::{PageIndex, PageRange};
use umem::wire::{
    Bitmap, BitmapKind, ChannelKind, Epoch, FailCode, Failed, Features, Goodbye, GoodbyeReason, Header,
    Message, MessageType, RefuseCode, Refused, Request, RequestId, Version, Zero,
};

/// Little, because most of it is fetched page by page, again and again.
const MIB: u64 = 8;

/// RAM of one image, and paths for those who lie about it.
struct Bench {
    scratch: Scratch,
    image: PathBuf,
    next: AtomicU64,
}

impl Bench {
    fn new() -> Self {
        let scratch = Scratch::new();
        let image = scratch.fingerprinted(&format!("{MIB}M"), SEED, "order=random");
        let next = AtomicU64::new(0);
        Self { scratch, image, next }
    }

    fn path(&self) -> PathBuf {
        let number = self.next.fetch_add(1, Relaxed);
        self.scratch.path(&format!("liar-{number}"))
    }
}

/// A welcome with another payload.
fn bent_welcome(peer: &mut Peer, image: &Image, at: usize, bytes: &[u8]) {
    let mut whole = Vec::new();
    Message::Welcome(welcome(image)).encode(&mut whole).unwrap();
    let mut payload = whole.split_off(umem::wire::HEADER_SIZE);
    payload[at..at + bytes.len()].copy_from_slice(bytes);
    peer.send_frame(MessageType::Welcome, 0, &payload);
}

fn refuse(peer: &mut Peer, code: RefuseCode, text: &str) {
    let version = Version { major: 7, minor: 0 };
    peer.send(&Message::Refused(Refused { version, code, text }));
}

/// How a server answers the first hello, and the exit code and message of the VM.
type Opening = (fn(&mut Peer, &Image), i32, &'static [&'static str]);

const OPENINGS: [Opening; 17] = [
    (
        |peer, image| bent_welcome(peer, image, 8, &2u16.to_le_bytes()),
        4,
        &["protocol version 2.", "this program 1."],
    ),
    (
        |peer, image| bent_welcome(peer, image, 10, &9u16.to_le_bytes()),
        4,
        &["another version"],
    ),
    (
        |peer, image| bent_welcome(peer, image, 12, &8192u32.to_le_bytes()),
        4,
        &["pages of 8192 bytes"],
    ),
    (
        |peer, image| bent_welcome(peer, image, 16, &Features::ALL.0.to_le_bytes()),
        4,
        &["set of features"],
    ),
    (
        |peer, image| bent_welcome(peer, image, 24, &0u64.to_le_bytes()),
        4,
        &["number of pages 0x0"],
    ),
    (
        |peer, image| bent_welcome(peer, image, 24, &u64::MAX.to_le_bytes()),
        4,
        &["number of pages 0xffff"],
    ),
    (
        |peer, image| bent_welcome(peer, image, 0, b"otherone"),
        4,
        &["magic"],
    ),
    (
        |peer, image| bent_welcome(peer, image, 48, &[0; 16]),
        4,
        &["session"],
    ),
    (
        |peer, _| refuse(peer, RefuseCode::WrongVersion, ""),
        2,
        &["another protocol version"],
    ),
    (
        |peer, _| refuse(peer, RefuseCode::Other(99), "no time"),
        2,
        &["no time"],
    ),
    (
        |peer, _| peer.send_bytes(&noise(4096)),
        4,
        &["does not speak this protocol"],
    ),
    (|_, _| {}, 4, &["closed the connection"]),
    (
        |peer, image| peer.send_bytes(&half_a_welcome(image)),
        4,
        &["connection is lost"],
    ),
    (
        |peer, _| peer.send_bytes(&frame(MessageType::Pong, 0, &[])),
        4,
        &["pong frame where the answer to a hello belongs"],
    ),
    (
        |peer, _| peer.send_frame(MessageType::Welcome, 0, &[0; 1024]),
        4,
        &["magic"],
    ),
    (
        |peer, _| peer.send_bytes(&huge(MessageType::Welcome)),
        4,
        &["4294967295 bytes", "1024 are allowed"],
    ),
    (
        |peer, _| peer.send_bytes(&huge(MessageType::Other(0xf0ff))),
        4,
        &["4294967295 bytes"],
    ),
];

fn noise(length: u64) -> Vec<u8> {
    let mut random = Random::new(length);
    (0..length).map(|_| random.below(256) as u8).collect()
}

fn half_a_welcome(image: &Image) -> Vec<u8> {
    let mut bytes = Vec::new();
    Message::Welcome(welcome(image)).encode(&mut bytes).unwrap();
    bytes.truncate(60);
    bytes
}

/// A header that announces more than any memory has room for.
fn huge(kind: MessageType) -> Vec<u8> {
    let mut header = Header::for_payload(kind, 0, &[]);
    header.length = u32::MAX;
    header.flags = umem::wire::SKIPPABLE;
    header.encode().to_vec()
}

#[test]
fn an_answer_to_a_hello_that_is_none_is_named() {
    let bench = Bench::new();
    for (number, (say, code, words)) in OPENINGS.into_iter().enumerate() {
        println!("opening {number}");
        let liar = Liar::about(bench.path(), &bench.image, move |peer, image, _, _| {
            say(peer, image);
            Lie::AndClose
        });
        let vm = served(&[&liar.url()]).run();
        vm.assert_error(code, words);
        assert!(vm.stderr.contains(&liar.url()), "{}", vm.stderr);
        assert!(vm.stdout.is_empty(), "{}", vm.stdout);
        assert_eq!(liar.connections(), 1);
    }
}

/// How a server answers what is asked about the image's metadata.
#[test]
fn metadata_that_is_none_is_named() {
    type Answer = fn(&mut Peer, RequestId);
    let answers: [(Answer, i32, &[&str]); 3] = [
        (
            |peer, request| {
                peer.send(&Message::Metadata {
                    request,
                    bytes: &noise(100),
                });
            },
            6,
            &["does not say how its guest is started"],
        ),
        (
            |peer, request| {
                failed(
                    peer,
                    request,
                    PageRange::new(PageIndex(0), 1),
                    FailCode::Unreadable,
                );
            },
            4,
            &["unreadable"],
        ),
        (|_, _| {}, 4, &["closed the connection"]),
    ];
    let bench = Bench::new();
    for (answer, code, words) in answers {
        let liar = Liar::about(bench.path(), &bench.image, move |peer, _, _, frame| {
            let Message::MetadataRequest { request } = frame.message() else {
                return Lie::None;
            };
            answer(peer, request);
            Lie::AndClose
        });
        let vm = served(&[&liar.url()]).run();
        vm.assert_error(code, words);
        assert!(vm.stdout.is_empty(), "{}", vm.stdout);
    }
}

/// What is announced is refused for its size, and not only when all memory is used up.
#[test]
fn ram_beyond_all_sense_is_refused() {
    let bench = Bench::new();
    let liar = Liar::about(bench.path(), &bench.image, move |peer, image, _, frame| {
        if !matches!(frame.message(), Message::Hello(_)) {
            return Lie::None;
        }
        bent_welcome(peer, image, 24, &(1u64 << 43).to_le_bytes());
        Lie::Told
    });
    let vm = served(&[&liar.url()]).run();
    vm.assert_error(2, &["no VM can have this RAM", "choose a smaller one"]);
    assert!(vm.stdout.is_empty(), "{}", vm.stdout);
}

fn failed(peer: &mut Peer, request: RequestId, range: PageRange, code: FailCode) {
    let text = "says the test";
    peer.send(&Message::Failed(Failed {
        request,
        range,
        code,
        text,
    }));
}

/// A server's answer to a request for pages that is not what was asked for, and what the VM says of it.
type Untruth = (fn(&mut Peer, &Image, &Request<'_>) -> Lie, &'static str);

/// Whether it finds a connection closed or reset depends on what was still on its way.
const LOST: &str = "page server lost, connecting anew";

const UNTRUTHS: [Untruth; 13] = [
    // The next page, which is none that was asked for.
    (
        |peer, image, request| {
            let pages = PageRange::new(PageIndex(last(request).end().0 % image.pages()), 1);
            peer.send_pages(image, request.request, pages, |_, _| {});
            Lie::Told
        },
        "which nobody asked for",
    ),
    (
        |peer, image, request| {
            let pages = PageRange::new(first(request).start, 1);
            peer.send_pages(image, request.request, pages, |_, _| {});
            peer.send_pages(image, request.request, pages, |_, _| {});
            Lie::Told
        },
        "which nobody asked for",
    ),
    // As an answer to something else.
    (
        |peer, image, request| {
            peer.send_pages(
                image,
                RequestId(request.request.0 + (1 << 40)),
                first(request),
                |_, _| {},
            );
            Lie::Told
        },
        "which nobody asked for",
    ),
    // Nothing, or not all.
    (|_, _, _| Lie::AndClose, LOST),
    (
        |peer, image, request| {
            let pages = PageRange::new(first(request).start, 1);
            if request.ranges.pages() > 1 {
                peer.send_pages(image, request.request, pages, |_, _| {});
            }
            Lie::AndClose
        },
        LOST,
    ),
    (
        |peer, image, request| {
            peer.send_pages(image, request.request, first(request), |checksums, _| {
                checksums[0] ^= 1 << 40;
            });
            Lie::Told
        },
        "does not match its checksum",
    ),
    (
        |peer, _, request| {
            let range = PageRange::new(PageIndex((1 << 44) - 1), 1);
            peer.send(&Message::Zero(Zero {
                request: request.request,
                range,
                epoch: Epoch(0),
            }));
            Lie::Told
        },
        "which nobody asked for",
    ),
    // What nobody may say there.
    (
        |peer, image, request| {
            peer.send_pages(image, RequestId::PUSH, first(request), |_, _| {});
            Lie::Told
        },
        "without the feature",
    ),
    (
        |peer, _, request| {
            peer.send(&Message::Request(*request));
            Lie::Told
        },
        "request frame from the provider",
    ),
    (
        |peer, image, _| {
            peer.send(&Message::Welcome(welcome(image)));
            Lie::Told
        },
        "does not keep to the protocol",
    ),
    (
        |peer, _, request| {
            let (request, range) = (request.request, PageRange::new(PageIndex(0), 8));
            peer.send(&Message::Bitmap(Bitmap {
                request,
                kind: BitmapKind::Data,
                range,
                bits: &[0],
            }));
            Lie::Told
        },
        "which nobody asked for",
    ),
    (
        |peer, _, _| {
            peer.send_bytes(&noise(100));
            Lie::Told
        },
        "does not match its checksum",
    ),
    (
        |peer, _, _| {
            peer.send(&Message::Goodbye(Goodbye {
                reason: GoodbyeReason::Draining,
                text: "",
            }));
            Lie::Told
        },
        LOST,
    ),
];

fn first(request: &Request<'_>) -> PageRange {
    request.ranges.iter().next().unwrap()
}

fn last(request: &Request<'_>) -> PageRange {
    request.ranges.iter().last().unwrap()
}

/// One that lies once in the middle of a VM's run.
fn lies_once(bench: &Bench, channel: ChannelKind, untruth: Untruth) -> Liar {
    let requests = AtomicU64::new(0);
    Liar::about(
        bench.path(),
        &bench.image,
        move |peer, image, on, frame: &Frame| {
            let Message::Request(request) = frame.message() else {
                return Lie::None;
            };
            if on != channel || requests.fetch_add(1, Relaxed) != 3 {
                return Lie::None;
            }
            untruth.0(peer, image, &request)
        },
    )
}

#[test]
fn one_lie_is_found_and_the_pages_are_asked_for_again() {
    need!(tests::host::kvm());
    let bench = Bench::new();
    for (number, untruth) in UNTRUTHS.into_iter().enumerate() {
        for (fill, channel) in FILLS
            .into_iter()
            .zip([ChannelKind::Demand, ChannelKind::Background])
        {
            println!("untruth {number}, fill={fill}");
            let liar = lies_once(&bench, channel, untruth);
            let vm = served(&[&liar.url()]).memory(&format!("fill={fill}")).run();
            assert_right(&vm, MIB);
            assert!(vm.stderr.contains(untruth.1), "{}", vm.stderr);
            // None, if the guest asked for all that was left before the fill's connection was made anew.
            assert!(vm.report().count("/source/reconnects") <= 1, "{}", vm.stderr);
            assert!(liar.connections() <= 3);
        }
    }
}

/// Frames that a later version may add are skipped, and keep-alive asks for little.
#[test]
fn what_may_be_skipped_is_skipped() {
    need!(tests::host::kvm());
    let bench = Bench::new();
    for fill in FILLS {
        let liar = Liar::about(bench.path(), &bench.image, |peer, _, _, frame| {
            if matches!(frame.message(), Message::Request(_)) {
                let payload = b"from a later version";
                peer.send(&Message::Unknown {
                    code: 0xf001,
                    id: 3,
                    payload,
                });
                peer.send(&Message::Ping { token: 1 });
                peer.send(&Message::Pong { token: 2 });
            }
            match frame.message() {
                Message::Pong { token: 1 } => Lie::Told,
                _ => Lie::None,
            }
        });
        let vm = served(&[&liar.url()]).memory(&format!("fill={fill}")).run();
        assert_right(&vm, MIB);
        assert_eq!(vm.stderr, "");
    }
}

/// A server that says the same of a page, or of everything, for ever.
fn always(bench: &Bench, untruth: fn(&mut Peer, &Image, &Request<'_>)) -> Liar {
    let requests = AtomicU64::new(0);
    Liar::about(bench.path(), &bench.image, move |peer, image, _, frame| {
        let Message::Request(request) = frame.message() else {
            return Lie::None;
        };
        if requests.fetch_add(1, Relaxed) < 3 {
            return Lie::None;
        }
        untruth(peer, image, &request);
        Lie::Told
    })
}

fn ends(vm: &FinishedVm, code: i32, words: &[&str]) {
    assert_eq!(vm.code(), Some(code), "{}{}", vm.stdout, vm.stderr);
    let last = vm.stderr.lines().last().unwrap_or_default();
    for word in words {
        assert!(last.contains(word), "'{word}' is not in the message: {last}");
    }
    assert!(!vm.stderr.contains("panicked"), "{}", vm.stderr);
    for never in ["wrong_page=", "verified="] {
        assert!(!vm.stdout.contains(never), "{}", vm.stdout);
    }
}

#[test]
fn a_page_that_cannot_be_had_ends_the_vm() {
    type Always = fn(&mut Peer, &Image, &Request<'_>);
    let cases: [(Always, i32, &[&str]); 5] = [
        (
            |peer, image, request| {
                let id = request.request;
                for range in request.ranges.iter() {
                    peer.send_pages(image, id, range, |checksums, data| {
                        (checksums[0], data[0]) = (checksums[0].max(1), data[0] ^ 1);
                    });
                }
            },
            6,
            &["page ", "does not match its checksum"],
        ),
        (
            |peer, _, request| failed(peer, request.request, first(request), FailCode::Unreadable),
            4,
            &["unreadable", "says the test"],
        ),
        (
            |peer, _, request| failed(peer, request.request, first(request), FailCode::Corrupt),
            6,
            &["says the test"],
        ),
        (
            |peer, _, request| failed(peer, request.request, first(request), FailCode::OutOfRange),
            4,
            &["beyond the end of RAM"],
        ),
        (
            |peer, _, request| failed(peer, request.request, first(request), FailCode::Other(99)),
            4,
            &["says the test"],
        ),
    ];
    need!(tests::host::kvm());
    let bench = Bench::new();
    for (untruth, code, words) in cases {
        for fill in FILLS {
            let liar = always(&bench, untruth);
            let vm = served(&[&liar.url()]).memory(&format!("fill={fill}")).run();
            ends(&vm, code, &[words, &[liar.url().as_str()]].concat());
        }
    }
}

/// Who was right once and then has another RAM, or speaks another version, is as good as gone.
#[test]
fn a_server_that_turns_into_another_one_is_lost_in_time() {
    type Turn = fn(&mut Peer, &Image);
    need!(tests::host::kvm());
    let cases: [(Turn, &str); 4] = [
        (
            |peer, image| bent_welcome(peer, image, 24, &8192u64.to_le_bytes()),
            "another number of pages",
        ),
        (
            |peer, image| bent_welcome(peer, image, 64, &[1; 32]),
            "another digest",
        ),
        (
            |peer, image| bent_welcome(peer, image, 8, &2u16.to_le_bytes()),
            "protocol version 2.",
        ),
        (
            |peer, _| refuse(peer, RefuseCode::NotPermitted, "not you"),
            "not you",
        ),
    ];
    let bench = Bench::new();
    for (turn, word) in cases {
        let (requests, image) = (AtomicU64::new(0), bench.image.as_path());
        let liar = Liar::about(bench.path(), image, move |peer, image, _, frame| {
            let asked = requests.load(Relaxed);
            match frame.message() {
                Message::Request(_) if requests.fetch_add(1, Relaxed) >= 5 => Lie::AndClose,
                Message::Hello(_) if asked >= 5 => {
                    turn(peer, image);
                    Lie::AndClose
                }
                _ => Lie::None,
            }
        });
        let since = Instant::now();
        let vm = Vm::default()
            .memory(&format!("source={},source-timeout=1s", liar.url()))
            .run();
        ends(
            &vm,
            4,
            &[word, "no page server was reached and gave an answer for 1 s"],
        );
        assert!(since.elapsed() < MARGIN, "{:?}", since.elapsed());
    }
}

/// A server that takes connections and says nothing on them is given up.
#[test]
fn a_server_that_says_nothing_is_given_up() {
    let bench = Bench::new();
    let liar = Liar::about(bench.path(), Path::new(&bench.image), |_, _, _, _| Lie::Told);
    let since = Instant::now();
    let vm = served(&[&liar.url()]).run();
    vm.assert_error(4, &["nothing came for too long", &liar.url()]);
    assert!(since.elapsed() < 2 * MARGIN, "{:?}", since.elapsed());
}

/// Connecting anew is no progress: a server that lies every time is as good as none.
#[test]
fn a_server_that_always_lies_is_given_up() {
    need!(tests::host::kvm());
    let bench = Bench::new();
    for fill in FILLS {
        let liar = always(&bench, |peer, image, request| {
            let pages = PageRange::new(PageIndex(last(request).end().0 % image.pages()), 1);
            peer.send_pages(image, request.request, pages, |_, _| {});
        });
        let since = Instant::now();
        let vm = Vm::default()
            .memory(&format!("source={},source-timeout=1s,fill={fill}", liar.url()))
            .patience(2 * MARGIN)
            .run();
        ends(&vm, 4, &["which nobody asked for"]);
        assert!(since.elapsed() < MARGIN, "{:?}", since.elapsed());
    }
}
