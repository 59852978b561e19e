//! Clients of a page server that mean no good, or do not know what they may ask.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use tests::need;
use tests::peer::{Frame, HELLO, Peer, frame};
use tests::program::PATIENCE;
use tests::random::Random;
use tests::scratch::Scratch;
use tests::served::{FILLS, MARGIN, SEED, assert_right_and_quiet, served, socket};
use tests::server::Server;
use umem::image::{Image, Wait};
use umem::units::{PageIndex, PageRange};
use umem::wire::{
    FailCode, HEADER_SIZE, Header, Hello, Message, MessageType, RefuseCode, Request, RequestId, Role,
    VERSION, Version,
};

/// Who passes on what a VM and its server say to each other, and keeps what the VM says, channel by channel.
struct Eavesdropper {
    path: PathBuf,
    said: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Eavesdropper {
    fn start(path: PathBuf, server: PathBuf) -> Self {
        let listener = UnixListener::bind(&path).unwrap();
        let said = Arc::new(Mutex::new(Vec::new()));
        let kept: Arc<Mutex<Vec<Vec<u8>>>> = Arc::clone(&said);
        // They end with the connections, and with the test's process.
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = UnixStream::connect(&server) else {
                    return;
                };
                let index = {
                    let mut said = kept.lock().unwrap();
                    said.push(Vec::new());
                    said.len() - 1
                };
                let (from_server, to_client) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                let kept = Arc::clone(&kept);
                thread::spawn(move || {
                    pass_on(&client, &server, |bytes| {
                        kept.lock().unwrap()[index].extend_from_slice(bytes);
                    });
                });
                thread::spawn(move || pass_on(&from_server, &to_client, |_| {}));
            }
        });
        Self { path, said }
    }

    fn url(&self) -> String {
        format!("unix:{}", self.path.display())
    }

    /// What the VM said on each of its channels.
    fn said(&self) -> Vec<Vec<u8>> {
        self.said.lock().unwrap().clone()
    }
}

fn pass_on(mut from: &UnixStream, mut to: &UnixStream, mut keep: impl FnMut(&[u8])) {
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        keep(&buffer[..length]);
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    // Gone already, if that fails.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// What a VM says on the channel for the pages that it waits for, from the hello on.
fn requests_of_a_vm(socket: &Path) -> Vec<u8> {
    let scratch = Scratch::new();
    let eavesdropper = Eavesdropper::start(scratch.path("socket"), socket.to_path_buf());
    served(&[&eavesdropper.url()])
        .command_line("workload=touch pages=all order=random")
        .run()
        .assert_ended_well();
    let said = eavesdropper.said();
    said.into_iter().max_by_key(Vec::len).unwrap()
}

/// What a client says that means no good.
fn nonsense(kind: u64, genuine: &[u8], random: &mut Random) -> Vec<u8> {
    let mut noise = |length: u64| (0..length).map(|_| random.below(256) as u8).collect::<Vec<u8>>();
    match kind {
        // Nothing.
        0 => Vec::new(),
        // Less than a header, and more than one.
        1 => noise(16),
        2 => noise(64 << 10),
        // Half of a good header, and a header without its payload.
        3 => genuine[..16].to_vec(),
        4 => genuine[..32].to_vec(),
        // Zeros, and the largest numbers.
        5 => vec![0; 4096],
        6 => vec![0xff; 4096],
        // A hello and then noise.
        7 => [&genuine[..hello_length(genuine)], &noise(4096)].concat(),
        // A hello twice.
        8 => genuine[..hello_length(genuine)].repeat(2),
        // All that a VM asks for, except for one bit.
        _ => {
            let mut bytes = genuine.to_vec();
            let bit = random.below(8 * bytes.len() as u64);
            bytes[(bit / 8) as usize] ^= 1 << (bit % 8);
            bytes
        }
    }
}

/// The first frame's length: a header of 32 bytes that begins with the payload's.
fn hello_length(genuine: &[u8]) -> usize {
    32 + u32::from_le_bytes(*genuine.first_chunk().unwrap()) as usize
}

/// Says something to a server, and keeps the connection. What the server does not want to hear, it need not.
fn say(socket: &Path, bytes: &[u8]) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_nonblocking(true).unwrap();
    // As much as there is room for: nobody waits here.
    let mut rest = bytes;
    while let Ok(length @ 1..) = (&stream).write(rest) {
        rest = &rest[length..];
    }
    stream
}

/// More memory than 50 clients and a VM can make a server use, and less than their requests would take if it kept them.
const MEMORY_MAX_KIB: u64 = 64 << 10;

#[test]
fn clients_that_mean_no_good_disturb_nobody() {
    need!(tests::host::kvm());
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("32M", SEED, "order=random");
    let server = Server::start(&socket(&scratch), &[("base", &image)]);
    let path = scratch.path("socket");
    let genuine = requests_of_a_vm(&path);
    for fill in FILLS {
        let vm = served(&[server.url()])
            .memory(&format!("fill={fill}"))
            .cpus(2)
            .start();
        let mut most = 0;
        // None of them reads, and all stay for as long as the VM runs.
        let mut clients = Vec::new();
        for client in 0..50 {
            clients.push(say(&path, &nonsense(client % 10, &genuine, &mut random)));
            most = most.max(server.status_kib("VmRSS").unwrap());
        }
        let vm = vm.finish();
        most = most.max(server.status_kib("VmRSS").unwrap());
        assert_right_and_quiet(&vm, 32);
        assert!(most < MEMORY_MAX_KIB, "the server took {most} KiB");
        drop(clients);
    }
    let memory = || server.status_kib("VmRSS").unwrap();
    // What they took is not kept: ten times as many take no more.
    let before = memory();
    for round in 0..500 {
        drop(say(&path, &nonsense(round % 10, &genuine, &mut random)));
    }
    let vm = served(&[server.url()]).run();
    assert_right_and_quiet(&vm, 32);
    assert!(
        memory() < before + (16 << 10),
        "from {before} KiB to {} KiB",
        memory()
    );
    let served = server.stop();
    assert_eq!(served.stderr, "", "nobody is to be told of it");
}

/// Waits until the server has closed the connection.
fn wait_until_closed(mut stream: UnixStream) {
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return,
            Err(error) => panic!("the server keeps the connection: {error}"),
        }
    }
}

/// Connections that say nothing, or nothing sensible, do not stay.
#[test]
fn clients_that_say_nothing_sensible_are_let_go() {
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let image = scratch.image("8M", "workload=hello");
    let server = Server::start(&socket(&scratch), &[("base", &image)]);
    let path = scratch.path("socket");
    let noise: Vec<u8> = (0..4096).map(|_| random.below(256) as u8).collect();
    for bytes in [&[][..], &noise[..16], &noise, &[0; 32]] {
        wait_until_closed(say(&path, bytes));
    }
    let served = server.stop();
    assert_eq!(served.count("channels"), 0, "{served}");
}

/// Neither who says nothing nor who does not read what it asked for holds up the end of a server.
#[test]
fn a_server_ends_in_time_whatever_its_clients_do() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("32M", SEED, "");
    let listen = socket(&scratch);
    let path = scratch.path("socket");
    let genuine = {
        let server = Server::start(&listen, &[("base", &image)]);
        let genuine = requests_of_a_vm(&path);
        server.stop();
        genuine
    };
    // What each has to read, and does not, when the server is told to end.
    for (what, said, unread) in [
        ("nothing", &[][..], 0),
        ("half a header", &genuine[..16], 0),
        ("a hello", &genuine[..hello_length(&genuine)], 1),
        ("requests", &genuine, 64 << 10),
    ] {
        let server = Server::start(&listen, &[("base", &image)]);
        let clients: Vec<UnixStream> = (0..5).map(|_| say(&path, said)).collect();
        server.wait_until("it answers", |_| {
            clients
                .iter()
                .all(|client| rustix::io::ioctl_fionread(client).unwrap() >= unread)
        });
        println!("clients that say {what}");
        let served = server.stop();
        assert_eq!(served.stderr, "");
        drop(clients);
    }
}

/// The server of an image, and what a client that asks for its first pages gets.
struct Bench {
    scratch: Scratch,
    server: Server,
    path: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let scratch = Scratch::new();
        let image = scratch.fingerprinted("16M", SEED, "");
        let server = Server::start(&socket(&scratch), &[("base", &image)]);
        let path = scratch.path("socket");
        Self {
            scratch,
            server,
            path,
        }
    }

    /// A channel on which requests may follow.
    fn open(&self) -> Peer {
        let mut peer = Peer::connect(&self.path);
        peer.send(&Message::Hello(HELLO));
        let answer = peer.receive().unwrap();
        assert_eq!(answer.header.kind, MessageType::Welcome);
        peer
    }

    /// Who asks as one should is answered, whatever others did, and nobody was told of them.
    fn end(self) {
        let image = Image::open(&self.scratch.path("image")).unwrap();
        let mut peer = self.open();
        let range = PageRange::new(PageIndex(0), 4);
        peer.send(&request(&[range]));
        let answer = peer.receive().unwrap();
        let Message::Pages(pages) = answer.message() else {
            panic!("{answer:?}")
        };
        let mut checksums = [0; 4];
        image.checksums(range, Wait::Yes, &mut checksums).unwrap();
        assert_eq!(pages.range, range);
        assert!(pages.checksums.iter().eq(checksums));
        drop(peer);
        let served = self.server.stop();
        assert_eq!(served.stderr, "", "nobody is to be told of it");
    }
}

fn request(ranges: &[PageRange]) -> Message<'_> {
    Message::Request(Request {
        request: RequestId(1),
        ranges: ranges.into(),
    })
}

/// Checks that a hello is refused, and the connection ended.
#[track_caller]
fn refused(bench: &Bench, hello: &Hello<'_>, code: RefuseCode, text: &str) {
    let mut peer = Peer::connect(&bench.path);
    peer.send(&Message::Hello(*hello));
    let answer = peer.receive();
    let Some(Message::Refused(refused)) = answer.as_ref().map(Frame::message) else {
        panic!("{hello:?} was answered by {answer:?}")
    };
    assert_eq!(refused.code, code);
    assert!(refused.text.contains(text), "{refused:?}");
    assert_eq!(refused.version, VERSION);
    assert!(peer.receive().is_none(), "it says more after a refusal");
}

#[test]
fn a_hello_that_asks_for_what_is_not_there_is_refused() {
    let bench = Bench::new();
    let role = Role::Provider;
    let (digest, pages) = (Some([7; 32]), Some(77));
    let image = "other";
    for (hello, code, text) in [
        (
            Hello { image, ..HELLO },
            RefuseCode::UnknownImage,
            "there are: base",
        ),
        (
            Hello { digest, ..HELLO },
            RefuseCode::WrongDigest,
            "another digest",
        ),
        (Hello { pages, ..HELLO }, RefuseCode::WrongSize, "4096 pages"),
        (Hello { role, ..HELLO }, RefuseCode::NotPermitted, "takes none"),
    ] {
        refused(&bench, &hello, code, text);
    }
    bench.end();
}

#[test]
fn who_speaks_another_version_is_told_so() {
    let bench = Bench::new();
    let version = Version { major: 2, minor: 0 };
    refused(&bench, &Hello { version, ..HELLO }, RefuseCode::WrongVersion, "");
    bench.end();
}

/// A hello with other bytes in its payload, which its checksum covers.
fn bent_hello(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut whole = Vec::new();
    Message::Hello(HELLO).encode(&mut whole).unwrap();
    let mut payload = whole.split_off(HEADER_SIZE);
    payload[at..at + bytes.len()].copy_from_slice(bytes);
    frame(MessageType::Hello, 0, &payload)
}

/// A header that announces a payload of this length.
fn announced(kind: MessageType, length: u32) -> Vec<u8> {
    let mut header = Header::for_payload(kind, 0, &[]);
    header.length = length;
    header.encode().to_vec()
}

/// At once: none of them is waited for, or given the memory that it asks for.
#[test]
fn a_hello_that_is_none_ends_the_connection() {
    let bench = Bench::new();
    for (what, bytes) in [
        ("another magic", bent_hello(0, b"somebody")),
        ("pages of another size", bent_hello(12, &8192u32.to_le_bytes())),
        (
            "more pages than there can be",
            bent_hello(24, &u64::MAX.to_le_bytes()),
        ),
        ("no channel", bent_hello(44, &[0])),
        ("no role", bent_hello(45, &[9])),
        ("a digest, perhaps", bent_hello(46, &[2])),
        ("a name that goes on after its end", bent_hello(47, &[255])),
        ("reserved bytes", bent_hello(96, &[1])),
        ("too short", frame(MessageType::Hello, 0, &[0; 50])),
        ("too long", announced(MessageType::Hello, 1025)),
        ("longer than memory", announced(MessageType::Hello, u32::MAX)),
        ("a request", frame(MessageType::Request, 1, &[0; 16])),
        ("the answer to it", frame(MessageType::Welcome, 0, &[0; 104])),
        ("an unknown type", announced(MessageType::Other(0x7777), 1 << 20)),
    ] {
        println!("{what}");
        let mut peer = Peer::connect(&bench.path);
        peer.send_bytes(&bytes);
        if let Some(answer) = peer.receive() {
            assert_eq!(answer.header.kind, MessageType::Refused);
            assert!(peer.receive().is_none(), "it says more after a refusal");
        }
    }
    let half = bent_hello(0, b"umem");
    for length in [1, HEADER_SIZE - 1, HEADER_SIZE, HEADER_SIZE + 1, half.len() - 1] {
        // It ends within the hello.
        let mut peer = Peer::connect(&bench.path);
        peer.send_bytes(&half[..length]);
        drop(peer);
    }
    bench.end();
}

#[test]
fn a_request_that_is_none_ends_the_channel() {
    let bench = Bench::new();
    let range = |start: u64, count: u32| [&start.to_le_bytes()[..], &count.to_le_bytes(), &[0; 4]].concat();
    for (what, kind, id, payload) in [
        ("no pages", MessageType::Request, 1, range(0, 0)),
        ("too many pages", MessageType::Request, 1, range(0, 4097)),
        (
            "too many ranges",
            MessageType::Request,
            1,
            range(0, 1).repeat(257),
        ),
        (
            "pages beyond all memory",
            MessageType::Request,
            1,
            range(u64::MAX, 1),
        ),
        (
            "half a range",
            MessageType::Request,
            1,
            range(0, 1)[..12].to_vec(),
        ),
        ("no number", MessageType::Request, 0, range(0, 1)),
        ("pages", MessageType::Zero, 1, [range(0, 1), vec![0; 8]].concat()),
        (
            "a hello again",
            MessageType::Hello,
            0,
            bent_hello(0, b"umem")[HEADER_SIZE..].to_vec(),
        ),
        ("an unknown type", MessageType::Other(0x7777), 0, Vec::new()),
    ] {
        println!("{what}");
        let mut peer = bench.open();
        peer.send_frame(kind, id, &payload);
        assert!(peer.receive().is_none(), "it was answered");
    }
    bench.end();
}

/// Pages that an image does not have are no breach of the protocol: each request is answered.
#[test]
fn pages_beyond_the_end_are_said_to_be() {
    let bench = Bench::new();
    let mut peer = bench.open();
    let ranges =
        [(4096, 1), (4095, 2), (1 << 43, 4000)].map(|(start, count)| PageRange::new(PageIndex(start), count));
    peer.send(&request(&ranges));
    let mut failed = Vec::new();
    while failed.len() < ranges.len() {
        let answer = peer.receive().unwrap();
        match answer.message() {
            Message::Failed(answer) => {
                assert_eq!(answer.code, FailCode::OutOfRange);
                failed.push(answer.range);
            }
            Message::Pages(pages) => assert_eq!(pages.range, PageRange::new(PageIndex(4095), 1)),
            Message::Zero(zero) => assert_eq!(zero.range, PageRange::new(PageIndex(4095), 1)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(
        failed,
        [(4096, 1), (4096, 1), (1 << 43, 4000)].map(|(start, count)| PageRange::new(PageIndex(start), count))
    );
    drop(peer);
    bench.end();
}

/// Neither is who does not read what it asked for waited for, nor does it cost more than its buffers.
#[test]
fn a_client_that_never_reads_is_let_go() {
    let bench = Bench::new();
    let memory = || bench.server.status_kib("VmRSS").unwrap();
    let before = memory();
    let since = Instant::now();
    let mut peers: Vec<Peer> = (0..8)
        .map(|_| {
            let mut peer = bench.open();
            let ranges = [PageRange::new(PageIndex(0), 4096)];
            for _ in 0..4 {
                peer.send(&request(&ranges));
            }
            peer
        })
        .collect();
    bench
        .server
        .wait_until("it has let all go", |_| peers.iter_mut().all(Peer::has_ended));
    let (elapsed, after) = (since.elapsed(), memory());
    // A write that is done in part has its patience once more: twice 10 s.
    assert!(elapsed < 3 * MARGIN, "{elapsed:?}");
    assert!(after < before + (16 << 10), "from {before} KiB to {after} KiB");
    bench.end();
}
