//! How fast RAM comes from a page server, against the least that the same machine could do in the same run.
//!
//!     cargo bench -p umem --bench remote [-- bulk|demand|demand-under-fill …]
//!
//! `docs/page-service.md` says what is measured and what it means.

#[path = "fault/floor.rs"]
mod floor;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::CpuSet;
use umem::image::{Image, ImageWriter};
use umem::link::{Address, Listener};
use umem::pager::{Fill, Notice, Pager};
use umem::publish::Existing;
use umem::region::{Backing, PageSize, Region};
use umem::server::{Server, ServerStopper};
use umem::source::remote::{RemoteOptions, RemoteSource, RemoteUrl};
use umem::units::{PAGE_SIZE, PageIndex};

use floor::Floor;

/// Pages of the image: 512 MiB.
const PAGES: u64 = 131_072;

/// Pages touched for the demand figures, at a time: few enough for many slices of each kind.
const TOUCHES: usize = 2000;

/// Slices of each kind, one of each kind after the other.
const SLICES: usize = 15;

/// What is measured, by its name, from an image.
type Part = (&'static str, fn(&Path));

fn main() {
    let directory = tempfile::tempdir().expect("a directory for the image");
    let path = directory.path().join("image");
    make_image(&path);
    // `cargo bench` adds options of its own.
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with("--"))
        .collect();
    let parts: [Part; 3] = [
        ("bulk", bulk),
        ("demand", demand),
        ("demand-under-fill", demand_under_fill),
    ];
    for (name, part) in parts {
        if wanted.is_empty() || wanted.iter().any(|word| word == name) {
            part(&path);
        }
    }
}

/// Every page different, none zero, and nothing that could be compressed.
fn make_image(path: &Path) {
    let mut writer = ImageWriter::create(path, PAGES * PAGE_SIZE as u64).expect("an image");
    let mut page = [0; PAGE_SIZE];
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for index in 0..PAGES {
        for word in page.chunks_mut(8) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            word.copy_from_slice(&random.to_le_bytes());
        }
        writer
            .write_page(PageIndex(index), &page)
            .expect("room for the image");
    }
    writer.finish(b"", Existing::Keep).expect("room for the image");
}

/// A page server in a thread of its own.
struct Serving {
    url: RemoteUrl,
    stopper: ServerStopper,
    thread: Option<thread::JoinHandle<()>>,
}

impl Serving {
    fn start(image: &Path, listen: &str) -> Self {
        let image = Arc::new(Image::open(image).expect("the image just made"));
        let server = Server::new(HashMap::from([("image".into(), image)])).expect("a server");
        let address: Address = listen.parse().expect("an address");
        let listener = Listener::bind(&address).expect("a listener");
        let url = listener.address().expect("its address").to_string();
        let stopper = server.stopper();
        let thread = thread::spawn(move || server.serve(listener).expect("a server"));
        Self {
            url: url.parse().expect("its URL"),
            stopper,
            thread: Some(thread),
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.stopper.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the server's end");
        }
    }
}

/// Memory that comes from a page server.
struct Remote {
    pager: Pager,
    region: Arc<Region>,
    present: Receiver<()>,
}

impl Remote {
    fn start(url: &RemoteUrl, connections: usize, fill: Fill) -> Self {
        let options = RemoteOptions {
            connections,
            ..RemoteOptions::default()
        };
        let (source, _) = RemoteSource::connect(std::slice::from_ref(url), options).expect("the server");
        let size = PAGES * PAGE_SIZE as u64;
        let region = Arc::new(Region::new(size, Backing::Memfd, PageSize::Small).expect("memory"));
        let (sender, present) = channel();
        let observer = move |notice| match notice {
            Notice::AllPagesPresent => drop(sender.send(())),
            Notice::Failed(error) => {
                // Whoever touches the page would wait for ever.
                eprintln!("{error:?}");
                std::process::exit(1);
            }
            Notice::SourceLost(_) | Notice::SourceBack => {}
        };
        let pager = Pager::start(Arc::clone(&region), Arc::new(source), fill, observer).expect("a pager");
        Self {
            pager,
            region,
            present,
        }
    }
}

/// The time that a touch takes.
fn touch(region: &Region, page: u64) -> Duration {
    let address = region.start().wrapping_add(page as usize * PAGE_SIZE);
    let since = Instant::now();
    // SAFETY: within the region, which is mapped for as long as it is borrowed.
    std::hint::black_box(unsafe { address.read_volatile() });
    since.elapsed()
}

/// Whether the page is in memory, without touching it.
fn is_there(region: &Region, page: u64) -> bool {
    let address = region.start().wrapping_add(page as usize * PAGE_SIZE);
    let mut state = 0;
    // SAFETY: mincore writes one byte for one page, which is within the region.
    let result = unsafe { libc::mincore(address.cast(), PAGE_SIZE, &raw mut state) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    state & 1 != 0
}

/// Pages in an order without pattern.
fn shuffled(count: u64, seed: u64) -> impl Iterator<Item = u64> {
    let mut order: Vec<u64> = (0..count).collect();
    let mut random = seed | 1;
    for i in (1..order.len()).rev() {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        order.swap(i, (random % (i as u64 + 1)) as usize);
    }
    order.into_iter()
}

fn percentile(times: &mut [Duration], percent: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() * percent).div_ceil(100).max(1) - 1]
}

/// Loads everything by a fill, against a plain copy of as many bytes over TCP.
fn bulk(image: &Path) {
    let servers = [
        Serving::start(image, "tcp:127.0.0.1:0"),
        Serving::start(
            image,
            &format!("unix:{}", image.with_extension("socket").display()),
        ),
    ];
    let kinds = [(0, 1), (0, 2), (0, 4), (1, 1), (1, 4)];
    let mut copies = Vec::new();
    let mut fills = vec![Vec::new(); kinds.len()];
    for _ in 0..5 {
        copies.push(plain_copy());
        for ((server, connections), times) in kinds.iter().zip(&mut fills) {
            times.push(fill_time(&servers[*server].url, *connections));
        }
    }
    let gib = PAGES as f64 * PAGE_SIZE as f64 / f64::from(1 << 30);
    let copy = percentile(&mut copies, 50);
    println!("bulk plain-tcp-copy gib_per_s={:.2}", gib / copy.as_secs_f64());
    for ((server, connections), times) in kinds.iter().zip(&mut fills) {
        let time = percentile(times, 50);
        println!(
            "bulk fill over={} connections={connections} gib_per_s={:.2} ratio={:.2}",
            ["tcp", "unix"][*server],
            gib / time.as_secs_f64(),
            copy.as_secs_f64() / time.as_secs_f64(),
        );
    }
}

/// What `iperf3` does: one connection, one buffer on either side, no look at what comes.
fn plain_copy() -> Duration {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let address = listener.local_addr().expect("its address");
    let total = PAGES as usize * PAGE_SIZE;
    let begin = Arc::new(Barrier::new(2));
    let sender = {
        let begin = Arc::clone(&begin);
        thread::spawn(move || {
            let mut stream = TcpStream::connect(address).expect("a connection");
            let buffer = vec![0x5a; 256 << 10];
            begin.wait();
            for _ in 0..total / buffer.len() {
                stream.write_all(&buffer).expect("the other side");
            }
        })
    };
    let mut stream = listener.accept().expect("a connection").0;
    let mut buffer = vec![0; 256 << 10];
    begin.wait();
    let since = Instant::now();
    let mut got = 0;
    while got < total {
        got += stream.read(&mut buffer).expect("the other side");
    }
    let time = since.elapsed();
    sender.join().expect("the sender's end");
    time
}

fn fill_time(url: &RemoteUrl, connections: usize) -> Duration {
    let since = Instant::now();
    let remote = Remote::start(url, connections, Fill::Sequential);
    remote.present.recv().expect("all pages");
    let time = since.elapsed();
    assert_eq!(remote.pager.stats().prefetched, PAGES);
    time
}

/// What a fault on a page that is elsewhere takes, against answering a fault at all and asking somebody at all; everything on
/// one CPU, where nothing but the work is measured.
fn demand(image: &Path) {
    let everywhere = rustix::thread::sched_getaffinity(None).expect("this thread's CPUs");
    let first = (0..CpuSet::MAX_CPU)
        .find(|cpu| everywhere.is_set(*cpu))
        .expect("a CPU");
    let mut one = CpuSet::new();
    one.set(first);
    // Threads run where the one that starts them does.
    rustix::thread::sched_setaffinity(None, &one).expect("a CPU to stay on");
    for (kind, listen) in [
        ("tcp", "tcp:127.0.0.1:0".to_owned()),
        (
            "unix",
            format!("unix:{}", image.with_extension("socket").display()),
        ),
    ] {
        let server = Serving::start(image, &listen);
        let (mut floors, mut trips, mut remotes) = (Vec::new(), Vec::new(), Vec::new());
        for slice in 0..SLICES {
            let floor = Floor::start(TOUCHES as u64, Backing::Memfd);
            floors.extend(shuffled(TOUCHES as u64, 1).map(|page| touch(floor.region(), page)));
            drop(floor);
            trips.extend(round_trips(kind));
            let remote = Remote::start(&server.url, 1, Fill::Off);
            let pages = shuffled(PAGES, slice as u64 + 1).take(TOUCHES);
            remotes.extend(pages.map(|page| touch(&remote.region, page)));
        }
        let mut line = format!("demand over={kind} cpus=one touches={}", remotes.len());
        for percent in [50, 99] {
            let (floor, trip, remote) = (
                percentile(&mut floors, percent),
                percentile(&mut trips, percent),
                percentile(&mut remotes, percent),
            );
            let ratio = remote.as_secs_f64() / (floor + trip).as_secs_f64();
            let (floor, trip, remote) = (floor.as_nanos(), trip.as_nanos(), remote.as_nanos());
            let _ = write!(
                line,
                " p{percent}_ns={remote} floor_p{percent}_ns={floor} round_trip_p{percent}_ns={trip} p{percent}_ratio={ratio:.2}"
            );
        }
        println!("{line}");
    }
    rustix::thread::sched_setaffinity(None, &everywhere).expect("all CPUs again");
}

/// Sixteen bytes there and a page back.
fn round_trips(kind: &str) -> Vec<Duration> {
    let (here, there) = connected(kind);
    let answering = thread::spawn(move || {
        let mut there = there;
        let mut request = [0; 16];
        let page = vec![0x5a; PAGE_SIZE];
        while there.read_exact(&mut request).is_ok() {
            there.write_all(&page).expect("the other side");
        }
    });
    let mut here = here;
    let mut page = vec![0; PAGE_SIZE];
    let times = (0..TOUCHES)
        .map(|_| {
            let since = Instant::now();
            here.write_all(&[1; 16]).expect("the other side");
            here.read_exact(&mut page).expect("the other side");
            since.elapsed()
        })
        .collect();
    drop(here);
    answering.join().expect("the other side's end");
    times
}

trait Both: Read + Write + Send {}

impl<T: Read + Write + Send> Both for T {}

fn connected(kind: &str) -> (Box<dyn Both>, Box<dyn Both>) {
    if kind == "unix" {
        let (here, there) = std::os::unix::net::UnixStream::pair().expect("a pair");
        return (Box::new(here), Box::new(there));
    }
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let here = TcpStream::connect(listener.local_addr().expect("its address")).expect("a connection");
    let there = listener.accept().expect("a connection").0;
    for stream in [&here, &there] {
        stream.set_nodelay(true).expect("no delay");
    }
    (Box::new(here), Box::new(there))
}

/// What a fault takes while a fill loads everything as fast as it can, against the same without the fill.
fn demand_under_fill(image: &Path) {
    let server = Serving::start(image, "tcp:127.0.0.1:0");
    for connections in [1, 4] {
        let (mut quiet, mut filled) = (Vec::new(), Vec::new());
        let mut shares = Vec::new();
        for slice in 0..SLICES as u64 {
            let remote = Remote::start(&server.url, connections, Fill::Off);
            let pages: Vec<u64> = shuffled(PAGES, slice + 1).take(TOUCHES).collect();
            quiet.extend(pages.iter().map(|page| touch(&remote.region, *page)));
            drop(remote);
            let remote = Remote::start(&server.url, connections, Fill::Sequential);
            let mut count = 0;
            for page in &pages {
                // Those alone that had to be waited for, and only for as long as there is a fill.
                if remote.present.try_recv().is_ok() {
                    break;
                }
                if !is_there(&remote.region, *page) {
                    filled.push(touch(&remote.region, *page));
                    count += 1;
                }
                // A guest does something with what it has touched, and the fill is to have its turn.
                thread::sleep(Duration::from_micros(200));
            }
            shares.push(count);
        }
        for percent in [50, 99] {
            let (quiet, filled) = (percentile(&mut quiet, percent), percentile(&mut filled, percent));
            println!(
                "demand-under-fill over=tcp cpus=all connections={connections} percentile={percent} without_fill_ns={} with_fill_ns={} ratio={:.2} touches={}",
                quiet.as_nanos(),
                filled.as_nanos(),
                filled.as_secs_f64() / quiet.as_secs_f64(),
                shares.iter().sum::<usize>(),
            );
        }
    }
}
