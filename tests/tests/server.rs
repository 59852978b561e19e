//! A page server and clients of all kinds: what it sends, counts, bears, and how it ends.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use tests::need;
use tests::program::{PATIENCE, Program, Running};
use tests::random::Random;
use tests::scratch::Scratch;
use tests::server::{Server, serve_args};
use tests::vm::Vm;
use umem::channel::{Receiver, Sender};
use umem::image::ImageWriter;
use umem::link::Stream;
use umem::publish::Existing;
use umem::units::{PAGE_SIZE, PageIndex, PageRange};
use umem::wire::{
    ChannelKind, Encoding, Epoch, FailCode, Features, Hello, Incoming, MAX_PAGES_PER_FRAME, Message,
    RefuseCode, Request, RequestId, Role, Run, SessionId, VERSION,
};

/// Pages of the images that are made here.
const PAGES: u64 = 1024;

fn socket(scratch: &Scratch) -> String {
    format!("unix:{}", scratch.path("socket").display())
}

/// A channel to a server.
struct Client {
    sender: Sender,
    receiver: Receiver,
    stream: Arc<Stream>,
    session: SessionId,
    next: u64,
}

/// What came for a page.
#[derive(Debug, PartialEq)]
enum Answer {
    Raw(Vec<u8>),
    Lz4(Vec<u8>),
    Zero,
    Failed(FailCode, String),
}

impl Client {
    fn connect(url: &str, kind: ChannelKind, features: Features, session: SessionId) -> Self {
        Self::try_connect(url, kind, features, session).unwrap()
    }

    fn demand(url: &str) -> Self {
        Self::connect(url, ChannelKind::Demand, Features::NONE, SessionId::NEW)
    }

    fn try_connect(
        url: &str,
        kind: ChannelKind,
        features: Features,
        session: SessionId,
    ) -> Result<Self, (RefuseCode, String)> {
        let stream = Arc::new(Stream::connect(&url.parse().unwrap(), PATIENCE, None).unwrap());
        stream.set_timeouts(Some(PATIENCE), Some(PATIENCE)).unwrap();
        let mut sender = Sender::new(Arc::clone(&stream));
        let mut receiver = Receiver::new(Arc::clone(&stream), Incoming::connector());
        let hello = Hello {
            version: VERSION,
            features,
            pages: None,
            epoch: Epoch(0),
            keep_alive_ms: 0,
            channel: kind,
            role: Role::Fetcher,
            session,
            digest: None,
            image: "",
        };
        sender.send(&Message::Hello(hello)).unwrap();
        let welcome = match receiver.receive().unwrap() {
            Message::Welcome(welcome) => welcome,
            Message::Refused(refused) => return Err((refused.code, refused.text.to_owned())),
            other => panic!("{other:?}"),
        };
        receiver.incoming.open(kind, Role::Provider, welcome.features);
        assert_eq!(welcome.features, features.and(Features::LZ4));
        Ok(Self {
            sender,
            receiver,
            stream,
            session: welcome.session,
            next: 1,
        })
    }

    fn ask(&mut self, pages: PageRange) {
        let request = RequestId(self.next);
        self.next += 1;
        let ranges = [pages];
        let ranges = (&ranges[..]).into();
        self.sender
            .send(&Message::Request(Request { request, ranges }))
            .unwrap();
    }

    /// Asks for pages, and checks what comes for each of them by its checksum.
    fn read(&mut self, pages: PageRange) -> BTreeMap<u64, Answer> {
        self.ask(pages);
        let mut answers = BTreeMap::new();
        let mut buffer = vec![0; MAX_PAGES_PER_FRAME * PAGE_SIZE];
        while (answers.len() as u64) < pages.count {
            match self.receiver.receive().unwrap() {
                Message::Pages(came) => {
                    let unpacked = came.unpack(&mut buffer).unwrap();
                    unpacked.verify().unwrap();
                    for run in unpacked.runs() {
                        let (pages, data) = match run {
                            Run::Zero(pages) => (pages, &[][..]),
                            Run::Data(pages, data) => (pages, data),
                        };
                        for (index, page) in pages.pages().enumerate() {
                            let content = data.get(index * PAGE_SIZE..(index + 1) * PAGE_SIZE);
                            let answer = match (content, came.encoding) {
                                (None, _) => Answer::Zero,
                                (Some(content), Encoding::Raw) => Answer::Raw(content.to_vec()),
                                (Some(content), Encoding::Lz4) => Answer::Lz4(content.to_vec()),
                            };
                            assert!(answers.insert(page.0, answer).is_none(), "page {page} came twice");
                        }
                    }
                }
                Message::Zero(zero) => {
                    answers.extend(zero.range.pages().map(|page| (page.0, Answer::Zero)));
                }
                Message::Failed(failed) => answers.extend(
                    failed
                        .range
                        .pages()
                        .map(|page| (page.0, Answer::Failed(failed.code, failed.text.to_owned()))),
                ),
                other => panic!("{other:?}"),
            }
        }
        assert!(answers.keys().copied().eq(pages.start.0..pages.end().0));
        answers
    }
}

fn all() -> PageRange {
    PageRange::new(PageIndex(0), PAGES)
}

/// An image of which every 8 pages are, in turn: zero, easy to compress, noise, and a mixture; and what is in it.
fn mixed_image(scratch: &Scratch, name: &str, random: &mut Random) -> (PathBuf, Vec<[u8; PAGE_SIZE]>) {
    let mut content = Vec::new();
    for page in 0..PAGES {
        let kind = match page / 8 % 4 {
            3 => random.below(3),
            kind => kind,
        };
        content.push(match kind {
            0 => [0; PAGE_SIZE],
            1 => [random.below(255) as u8 + 1; PAGE_SIZE],
            _ => std::array::from_fn(|_| random.below(256) as u8),
        });
    }
    let path = scratch.path(name);
    let mut writer = ImageWriter::create(&path, PAGES * PAGE_SIZE as u64).unwrap();
    for (page, content) in content.iter().enumerate() {
        writer.write_page(PageIndex(page as u64), content).unwrap();
    }
    writer.finish(b"", Existing::Keep).unwrap();
    (path, content)
}

#[test]
fn pages_are_right_with_and_without_compression() {
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let (image, content) = mixed_image(&scratch, "image", &mut random);
    let server = Server::start(&socket(&scratch), &[("base", &image)]);
    for features in [Features::NONE, Features::LZ4, Features::ALL] {
        let mut client = Client::connect(server.url(), ChannelKind::Demand, features, SessionId::NEW);
        let (mut raw, mut lz4) = (0, 0);
        // All at once, and in pieces that begin and end anywhere.
        let mut pieces = vec![all()];
        let mut at = 0;
        while at < PAGES {
            let count = (1 + random.below(40)).min(PAGES - at);
            pieces.push(PageRange::new(PageIndex(at), count));
            at += count;
        }
        for piece in pieces {
            for (page, answer) in client.read(piece) {
                let expected = &content[page as usize];
                match &answer {
                    Answer::Raw(got) => raw += usize::from(got == expected),
                    Answer::Lz4(got) => lz4 += usize::from(got == expected),
                    Answer::Zero => assert_eq!(expected, &[0; PAGE_SIZE]),
                    Answer::Failed(..) => panic!("page {page}: {answer:?}"),
                }
            }
        }
        let data = content.iter().filter(|page| **page != [0; PAGE_SIZE]).count();
        assert_eq!(raw + lz4, 2 * data, "a page was wrong");
        assert_eq!(lz4 > 0, features.contains(Features::LZ4));
    }
}

/// Noise is sent as it is, and hardly tried.
#[test]
fn what_does_not_compress_is_sent_as_it_is() {
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let path = scratch.path("image");
    let mut writer = ImageWriter::create(&path, PAGES * PAGE_SIZE as u64).unwrap();
    for page in 0..PAGES {
        let content = std::array::from_fn(|_| random.below(256) as u8);
        writer.write_page(PageIndex(page), &content).unwrap();
    }
    writer.finish(b"", Existing::Keep).unwrap();
    let server = Server::start(&socket(&scratch), &[("base", &path)]);
    let mut client = Client::connect(
        server.url(),
        ChannelKind::Background,
        Features::LZ4,
        SessionId::NEW,
    );
    let answers = client.read(all());
    assert!(answers.values().all(|answer| matches!(answer, Answer::Raw(_))));
}

/// A server with `--metrics`.
struct Watched {
    running: Running,
    url: String,
    metrics: PathBuf,
}

impl Watched {
    fn start(scratch: &Scratch, image: &Path) -> Self {
        let metrics = scratch.path("metrics");
        let running = Program::umem(serve_args(&socket(scratch), &[("ba\"se", image)]))
            .arg("--metrics")
            .arg(format!("unix:{}", metrics.display()))
            .start();
        running.wait_for_output("metrics at ");
        Self {
            running,
            url: socket(scratch),
            metrics,
        }
    }

    fn metrics(&self) -> Metrics {
        let stream = UnixStream::connect(&self.metrics).unwrap();
        Metrics::parse(&http_get(stream, "/metrics"))
    }

    /// Waits until a count is this much.
    fn wait_for(&self, name: &str, value: f64) {
        self.running.wait_until(&format!("{name} is {value}"), |_| {
            self.metrics().value(name) >= value
        });
    }

    fn stop(self) -> String {
        self.running.signal(Signal::TERM);
        let finished = self.running.finish();
        finished.assert_code(0);
        finished.line("served ").to_owned()
    }
}

/// The body of the answer, which must be a good one.
fn http_get(mut stream: impl Read + Write, path: &str) -> String {
    let (status, body) = http(
        &mut stream,
        &format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
    );
    assert_eq!(status, "HTTP/1.1 200 OK");
    body
}

/// The status and the body of the answer.
fn http(mut stream: impl Read + Write, request: &str) -> (String, String) {
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

/// An OpenMetrics text, checked strictly: every sample belongs to the metric that was announced last, no series comes twice,
/// counters end in `_total`, units are at the end of names, histograms are cumulative and end with `+Inf`, which is the count.
struct Metrics(HashMap<String, f64>);

impl Metrics {
    fn parse(text: &str) -> Self {
        let mut samples = HashMap::new();
        let mut families: Vec<(String, String)> = Vec::new();
        let body = text.strip_suffix("# EOF\n").expect("the end is marked");
        let mut last_bucket = (String::new(), 0.0, 0.0);
        for line in body.lines() {
            if let Some(meta) = line.strip_prefix("# ") {
                let [keyword, name, rest] = meta.splitn(3, ' ').collect::<Vec<_>>()[..] else {
                    panic!("{line}");
                };
                match keyword {
                    "HELP" => {
                        assert!(!rest.is_empty(), "{line}");
                        assert!(families.iter().all(|(known, _)| known != name), "{name} twice");
                        families.push((name.to_owned(), String::new()));
                    }
                    "TYPE" => rest.clone_into(&mut families.last_mut().unwrap().1),
                    "UNIT" => assert!(name.ends_with(&format!("_{rest}")), "{line}"),
                    _ => panic!("{line}"),
                }
                assert_eq!(families.last().unwrap().0, name);
                assert!(name.starts_with("umem_serve_"), "{name}");
                continue;
            }
            let (series, value) = line.rsplit_once(' ').unwrap();
            let value: f64 = value.parse().unwrap();
            let (family, kind) = families.last().unwrap();
            let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
            assert!(labels.ends_with('}'), "{line}");
            let suffix = name
                .strip_prefix(family.as_str())
                .expect("it belongs to its family");
            match (kind.as_str(), suffix) {
                ("gauge", "") | ("histogram", "_sum" | "_count") => {}
                ("counter", "_total") => assert!(value >= 0.0),
                ("histogram", "_bucket") => {
                    let (top, of) = labels.rsplit_once("le=\"").map_or_else(
                        || panic!("{line}"),
                        |(before, after)| {
                            let (top, rest) = after.split_once('"').unwrap();
                            (top, format!("{before}{rest}"))
                        },
                    );
                    let top: f64 = if top == "+Inf" {
                        f64::INFINITY
                    } else {
                        top.parse().unwrap()
                    };
                    if last_bucket.0 == of {
                        assert!(top > last_bucket.1 && value >= last_bucket.2, "{line}");
                    } else {
                        assert!(last_bucket.0.is_empty() || last_bucket.1.is_infinite());
                    }
                    last_bucket = (of, top, value);
                }
                _ => panic!("{line} in a {kind}"),
            }
            assert!(
                samples.insert(series.to_owned(), value).is_none(),
                "{series} twice"
            );
        }
        Self(samples)
    }

    #[track_caller]
    fn value(&self, series: &str) -> f64 {
        *self
            .0
            .get(series)
            .unwrap_or_else(|| panic!("no {series} in {:#?}", self.0))
    }

    /// Checks a value that is a whole number.
    #[track_caller]
    fn assert(&self, series: &str, expected: usize) {
        let value = self.value(series);
        assert!(
            (value - expected as f64).abs() < 0.5,
            "{series} is {value}, not {expected}"
        );
    }
}

#[test]
fn metrics_say_what_clients_did() {
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let (image, content) = mixed_image(&scratch, "image", &mut random);
    let server = Watched::start(&scratch, &image);
    let zero = content.iter().filter(|page| **page == [0; PAGE_SIZE]).count();
    let data = content.len() - zero;
    let mut first = Client::demand(&server.url);
    for page in 0..10 {
        first.read(PageRange::single(PageIndex(page)));
    }
    let mut second = Client::connect(&server.url, ChannelKind::Background, Features::LZ4, first.session);
    second.read(all());
    let beyond = second.read(PageRange::new(PageIndex(PAGES), 3));
    assert!(
        beyond
            .values()
            .all(|answer| *answer == Answer::Failed(FailCode::OutOfRange, String::new()))
    );
    let mut control = Client::connect(&server.url, ChannelKind::Control, Features::NONE, SessionId::NEW);
    // Answers are counted after they were sent, a channel after it was welcomed.
    server.wait_for("umem_serve_channels{kind=\"control\"}", 1.0);
    server.wait_for("umem_serve_requests_total{kind=\"background\"}", 2.0);
    server.wait_for("umem_serve_requests_total{kind=\"demand\"}", 10.0);
    let metrics = server.metrics();
    metrics.assert("umem_serve_channels{kind=\"demand\"}", 1);
    metrics.assert("umem_serve_channels{kind=\"background\"}", 1);
    metrics.assert("umem_serve_channels{kind=\"control\"}", 1);
    metrics.assert("umem_serve_clients", 2);
    metrics.assert("umem_serve_connections_silent", 0);
    metrics.assert("umem_serve_requests_total{kind=\"demand\"}", 10);
    metrics.assert("umem_serve_requests_total{kind=\"background\"}", 2);
    metrics.assert("umem_serve_answer_seconds_count{kind=\"demand\"}", 10);
    metrics.assert(
        "umem_serve_answer_seconds_bucket{le=\"+Inf\",kind=\"background\"}",
        2,
    );
    assert!(metrics.value("umem_serve_answer_seconds_sum{kind=\"background\"}") > 0.0);
    let first_zero = content[..10]
        .iter()
        .filter(|page| **page == [0; PAGE_SIZE])
        .count();
    metrics.assert("umem_serve_pages_total{sent=\"zero\"}", zero + first_zero);
    metrics.assert("umem_serve_pages_total{sent=\"failed\"}", 3);
    let sent = |sent: &str| metrics.value(&format!("umem_serve_pages_total{{sent=\"{sent}\"}}")) as usize;
    assert_eq!(sent("raw") + sent("lz4"), data + 10 - first_zero);
    assert!(sent("lz4") > 0 && sent("raw") > 0);
    let bytes = (data + 10 - first_zero) * PAGE_SIZE;
    metrics.assert("umem_serve_content_bytes_total", bytes);
    let wire = metrics.value("umem_serve_wire_bytes_total") as usize;
    assert!(
        wire < bytes && wire > sent("raw") * PAGE_SIZE,
        "{wire} of {bytes}"
    );
    let opened = umem::image::Image::open(&image).unwrap();
    let digest = blake3::Hash::from(opened.footer().digest).to_hex();
    metrics.assert(
        &format!("umem_serve_images{{image=\"ba\\\"se\",digest=\"{digest}\"}}"),
        1,
    );
    // Ends are counted by their reasons.
    let goodbye = umem::wire::Goodbye {
        reason: umem::wire::GoodbyeReason::Done,
        text: "",
    };
    control.sender.send(&Message::Goodbye(goodbye)).unwrap();
    first.stream.shutdown().unwrap();
    server.wait_for("umem_serve_channels_ended_total{reason=\"done\"}", 1.0);
    server.wait_for("umem_serve_channels_ended_total{reason=\"closed\"}", 1.0);
    let metrics = server.metrics();
    metrics.assert("umem_serve_channels{kind=\"demand\"}", 0);
    metrics.assert("umem_serve_channels_opened_total{kind=\"demand\"}", 1);
    drop(second);
    let served = server.stop();
    assert!(
        served.starts_with("served channels=3 refused=0 requests=12 "),
        "{served}"
    );
}

#[test]
fn metrics_are_for_those_who_ask_rightly() {
    let scratch = Scratch::new();
    let image = scratch.image("8M", "workload=hello");
    let server = Program::umem(serve_args(&socket(&scratch), &[("base", &image)]))
        .args(["--metrics", "tcp:127.0.0.1:0"])
        .start();
    server.wait_for_output("metrics at tcp:");
    let stdout = server.stdout();
    let address = stdout
        .lines()
        .find_map(|line| line.strip_prefix("metrics at tcp:"))
        .unwrap();
    let connect = || {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    let close = "Host: x\r\nConnection: close\r\n\r\n";
    assert_eq!(
        http(connect(), &format!("GET / HTTP/1.1\r\n{close}")).0,
        "HTTP/1.1 404 Not Found"
    );
    assert_eq!(
        http(connect(), &format!("POST /metrics HTTP/1.1\r\n{close}")).0,
        "HTTP/1.1 405 Method Not Allowed"
    );
    assert_eq!(http(connect(), "nonsense\r\n\r\n").0, "HTTP/1.1 400 Bad Request");
    // Connections that say nothing, fewer than there may be, are in nobody's way.
    let silent: Vec<TcpStream> = (0..8).map(|_| connect()).collect();
    Metrics::parse(&http_get(connect(), "/metrics"));
    drop(silent);
    server.signal(Signal::TERM);
    server.finish().assert_code(0);
    for metrics in ["tcp:0.0.0.0:0", "tcp:[::]:0"] {
        Program::umem(serve_args(&socket(&scratch), &[("base", &image)]))
            .args(["--metrics", metrics])
            .run()
            .assert_error(2, &["--allow-plaintext", metrics]);
    }
}

#[test]
fn a_host_that_is_not_there_is_said_to_be() {
    let scratch = Scratch::new();
    let image = scratch.image("8M", "workload=hello");
    Program::umem(serve_args("tcp:no-such-host.invalid:1", &[("base", &image)]))
        .run()
        .assert_error(2, &["cannot listen", "no-such-host.invalid", "lookup"]);
}

/// Lets this process, and those that it starts, have as many open files as may be. Answers how many.
fn raise_descriptor_limit() -> u64 {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, raised).unwrap();
    maximum.unwrap_or(u64::MAX)
}

#[test]
fn ten_thousand_silent_connections_starve_nobody() {
    need!(tests::host::kvm());
    let limit = raise_descriptor_limit();
    let silent = limit.saturating_sub(500).min(10_000) as usize;
    println!("{silent} connections, {limit} open files may be");
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("16M", 7, "order=random");
    let server = Server::start(&socket(&scratch), &[("base", &image)]);
    let path = scratch.path("socket");
    let before = server.status_kib("VmRSS").unwrap();
    let clients: Vec<UnixStream> = (0..silent).map(|_| UnixStream::connect(&path).unwrap()).collect();
    let vm = Vm::default()
        .memory(&format!("source={}", server.url()))
        .memory("source-timeout=300s")
        .run();
    vm.assert_ended_well();
    assert!(vm.line("verified=").contains(" wrong=0 "));
    assert_eq!(vm.report().count("/source/reconnects"), 0);
    let after = server.status_kib("VmRSS").unwrap();
    assert!(after < before + (16 << 10), "from {before} KiB to {after} KiB");
    let threads = server.status_kib("Threads").unwrap();
    assert!(threads < 16, "{threads} threads");
    let served = server.stop();
    assert_eq!(served.count("channels"), 2, "{served}");
    // Those for whom there was no room; the others were there when it ended, or had their time.
    assert!(
        served.count("refused") >= silent.saturating_sub(4096) as u64,
        "{served}"
    );
    drop(clients);
}

/// A server with hardly any descriptors goes on with those that it has.
#[test]
fn a_server_without_descriptors_goes_on() {
    let scratch = Scratch::new();
    let image = scratch.image("8M", "workload=hello");
    let path = scratch.path("socket");
    // It plans with 64 descriptors for itself and with a client's at least.
    let server = Program::new("sh")
        .args(["-c", "ulimit -n 14; exec \"$0\" \"$@\""])
        .arg(tests::program::umem())
        .args(serve_args(&socket(&scratch), &[("base", &image)]))
        .start();
    server.wait_for_output("serving at ");
    let clients: Vec<UnixStream> = (0..40).map(|_| UnixStream::connect(&path).unwrap()).collect();
    let mut client = Client::demand(&socket(&scratch));
    client.read(PageRange::new(PageIndex(0), 100));
    drop(clients);
    server.signal(Signal::TERM);
    server.finish().assert_code(0);
}

/// Everybody who means no good is counted by what he did, and nothing is kept of them.
#[test]
fn bad_clients_are_counted_by_their_reasons() {
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let (image, _) = mixed_image(&scratch, "image", &mut random);
    let server = Watched::start(&scratch, &image);
    let path = scratch.path("socket");
    let say = |bytes: &[u8]| {
        let mut stream = UnixStream::connect(&path).unwrap();
        // What the server does not want to hear, it need not.
        let _ = stream.write_all(bytes);
        stream
    };
    // Says nothing, and half of a header.
    let silent = [say(&[]), say(&[0; 16])];
    // Asks, and does not read.
    let mut unread = Client::demand(&server.url);
    for _ in 0..32 {
        unread.ask(all());
    }
    // Leaves at once.
    drop(say(&[]));
    let rounds = 300;
    for round in 0..rounds {
        let noise: Vec<u8> = (0..64).map(|_| random.below(256) as u8).collect();
        drop(say(&noise));
        if round == rounds / 10 {
            server.wait_for("umem_serve_connections_refused_total{reason=\"garbage\"}", 20.0);
        }
    }
    let flat = server.running.status_kib("VmRSS").unwrap();
    for _ in 0..10 * rounds {
        drop(say(&[0xff; 64]));
    }
    // A channel that then says what no client may.
    let mut rude = Client::demand(&server.url);
    rude.sender.send(&Message::Pong { token: 1 }).unwrap();
    (&*rude.stream).write_all(&[0; 64]).unwrap();
    server.wait_for("umem_serve_channels_ended_total{reason=\"protocol\"}", 1.0);
    server.wait_for("umem_serve_connections_refused_total{reason=\"silent\"}", 2.0);
    server.wait_for("umem_serve_channels_ended_total{reason=\"unread\"}", 1.0);
    server.wait_for(
        "umem_serve_connections_refused_total{reason=\"garbage\"}",
        f64::from(11 * rounds) * 0.9,
    );
    let metrics = server.metrics();
    metrics.assert("umem_serve_connections_silent", 0);
    assert!(metrics.value("umem_serve_connections_left_total") >= 1.0);
    let now = server.running.status_kib("VmRSS").unwrap();
    assert!(now < flat + (4 << 10), "from {flat} KiB to {now} KiB");
    drop((silent, unread));
    let served = server.stop();
    assert!(!served.contains(" refused=0 "), "{served}");
}

#[test]
fn a_server_takes_no_more_memory_however_long_it_serves() {
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let (image, content) = mixed_image(&scratch, "image", &mut random);
    let server = Server::start(&socket(&scratch), &[("base", &image)]);
    let read_all = |rounds: usize| {
        thread::scope(|scope| {
            for number in 0..32 {
                let (url, content) = (server.url(), &content);
                scope.spawn(move || {
                    let features = [Features::NONE, Features::LZ4][number % 2];
                    let kind = [ChannelKind::Demand, ChannelKind::Background][number / 2 % 2];
                    let mut client = Client::connect(url, kind, features, SessionId::NEW);
                    for _ in 0..rounds {
                        let answers = client.read(all());
                        let page = (number * 31) % content.len();
                        match &answers[&(page as u64)] {
                            Answer::Raw(got) | Answer::Lz4(got) => assert_eq!(got, &content[page]),
                            Answer::Zero => assert_eq!(content[page], [0; PAGE_SIZE]),
                            answer @ Answer::Failed(..) => panic!("{answer:?}"),
                        }
                    }
                });
            }
        });
    };
    read_all(2);
    let before = server.status_kib("VmRSS").unwrap();
    for _ in 0..4 {
        read_all(4);
    }
    let after = server.status_kib("VmRSS").unwrap();
    println!("{before} KiB, then {after} KiB");
    assert!(after < before + (8 << 10), "from {before} KiB to {after} KiB");
    assert!(after < 64 << 10, "{after} KiB");
}

/// Who replaces an image as one should, by its name, disturbs nobody who has the old one.
#[test]
fn an_image_replaced_by_its_name_is_served_on() {
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let (image, content) = mixed_image(&scratch, "image", &mut random);
    let (other, _) = mixed_image(&scratch, "other", &mut random);
    let server = Server::start(&socket(&scratch), &[("base", &image)]);
    let mut old = Client::demand(server.url());
    std::fs::rename(&other, &image).unwrap();
    let mut new = Client::demand(server.url());
    for client in [&mut old, &mut new] {
        for (page, answer) in client.read(all()) {
            let expected = &content[page as usize];
            match answer {
                Answer::Raw(got) => assert_eq!(&got, expected),
                Answer::Zero => assert_eq!(expected, &[0; PAGE_SIZE]),
                answer => panic!("page {page}: {answer:?}"),
            }
        }
    }
}

/// Checks that pages are answered as they were or not at all, that some are not, and that nobody new is taken afterwards.
fn damaged(harm: impl FnOnce(&Path, &mut Random)) {
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let (image, content) = mixed_image(&scratch, "image", &mut random);
    let server = Server::start(&socket(&scratch), &[("base", &image)]);
    let mut client = Client::demand(server.url());
    let mut other = Client::connect(
        server.url(),
        ChannelKind::Background,
        Features::LZ4,
        SessionId::NEW,
    );
    client.read(PageRange::new(PageIndex(0), 100));
    harm(&image, &mut random);
    for client in [&mut client, &mut other] {
        let mut failed = 0;
        for (page, answer) in client.read(all()) {
            match answer {
                Answer::Raw(got) | Answer::Lz4(got) => assert_eq!(got, content[page as usize]),
                Answer::Zero => assert_eq!(content[page as usize], [0; PAGE_SIZE]),
                Answer::Failed(code, text) => {
                    assert_eq!(code, FailCode::Corrupt);
                    assert!(text.contains("the image cannot be used"), "{text}");
                    failed += 1;
                }
            }
        }
        assert!(failed > 0, "the damage was not noticed");
    }
    let refused = Client::try_connect(server.url(), ChannelKind::Demand, Features::NONE, SessionId::NEW);
    let Err((code, text)) = refused else {
        panic!("a new client was taken");
    };
    assert_eq!(code, RefuseCode::BadImage);
    assert!(text.contains("cannot be used"), "{text}");
}

#[test]
fn an_image_that_is_truncated_is_not_served_on() {
    damaged(|image, random| {
        tests::scratch::truncate(image, random.below(PAGES / 2) * PAGE_SIZE as u64);
    });
}

#[test]
fn an_image_that_is_overwritten_in_place_is_not_served_on() {
    damaged(|image, random| {
        let file = File::options().write(true).open(image).unwrap();
        // The kernel's clock for files may stand still for some milliseconds: written until it has been seen to move.
        let was = file.metadata().unwrap().modified().unwrap();
        let page = 8 + random.below(8) + 32 * random.below(PAGES / 32);
        while file.metadata().unwrap().modified().unwrap() == was {
            file.write_all_at(b"something else", page * PAGE_SIZE as u64)
                .unwrap();
        }
    });
}

#[test]
fn an_image_that_another_is_copied_over_is_not_served_on() {
    damaged(|image, random| {
        let scratch = Scratch::new();
        let (other, _) = mixed_image(&scratch, "other", random);
        std::fs::copy(other, image).unwrap();
    });
}

/// Touched, but the same: nobody is the worse for it.
#[test]
fn an_image_that_was_only_touched_is_served_on() {
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let (image, content) = mixed_image(&scratch, "image", &mut random);
    let server = Server::start(&socket(&scratch), &[("base", &image)]);
    let mut client = Client::demand(server.url());
    let file = File::options().write(true).open(&image).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let answers = client.read(all());
    assert!(answers.iter().all(|(page, answer)| match answer {
        Answer::Raw(got) => *got == content[*page as usize],
        Answer::Zero => content[*page as usize] == [0; PAGE_SIZE],
        _ => false,
    }));
    Client::demand(server.url());
}

/// While a server ends, its successor already has the address.
#[test]
fn a_successor_can_listen_while_a_server_ends() {
    let scratch = Scratch::new();
    let image = scratch.image("8M", "workload=hello");
    for listen in [socket(&scratch).as_str(), "tcp:127.0.0.1:0"] {
        let first = Server::start(listen, &[("base", &image)]);
        let url = first.url().to_owned();
        let mut client = Client::demand(&url);
        client.read(PageRange::new(PageIndex(0), 100));
        // Asked before the end, and answered all the same.
        client.ask(PageRange::new(PageIndex(0), 1));
        first.signal(Signal::TERM);
        let mut answered = false;
        loop {
            match client.receiver.receive().unwrap() {
                Message::Goodbye(_) => break,
                _ => answered = true,
            }
        }
        let second = Server::start(&url, &[("base", &image)]);
        assert!(
            !first.wait_for_exit(Duration::ZERO),
            "it does not wait for its client"
        );
        let mut another = Client::demand(&url);
        another.read(PageRange::new(PageIndex(0), 100));
        while !answered {
            answered = matches!(
                client.receiver.receive().unwrap(),
                Message::Pages(_) | Message::Zero(_)
            );
        }
        client.stream.shutdown().unwrap();
        first.stop();
        second.stop();
    }
}
