//! How fast RAM comes from a page server, against the least that the same machine could do in the same run.
//!
//!     cargo bench -p umem --bench remote [-- bulk|demand|demand-under-fill …]
//!
//! `docs/page-service.md` says what is measured and what it means.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use umem::link::Address;
use umem::measure::floor::{Answer, Floor};
use umem::measure::served::{Served, Serving, fill_time};
use umem::measure::sockets::{Socket, plain_copy, round_trips};
use umem::measure::{Place, Waits, make_image, run_on, shuffled, touch, usable_cpus};
use umem::pager::Fill;
use umem::region::Backing;
use umem::units::PAGE_SIZE;

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
    make_image(&path, PAGES).expect("an image");
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

fn serve(image: &Path, socket: Socket) -> Serving {
    let address = match socket {
        Socket::Tcp => Address::Tcp("127.0.0.1:0".into()),
        Socket::Unix => Address::Unix(image.with_extension("socket")),
    };
    Serving::start(image, &address).expect("a page server")
}

fn start(serving: &Serving, connections: usize, fill: Fill) -> Served {
    let source = serving.source(connections).expect("the server");
    Served::start(PAGES, Backing::Memfd, source, fill).expect("a pager")
}

/// Loads everything by a fill, against a plain copy of as many bytes over TCP.
fn bulk(image: &Path) {
    let usable = usable_cpus().expect("this thread's CPUs");
    let bytes = PAGES as usize * PAGE_SIZE;
    let servers = [serve(image, Socket::Tcp), serve(image, Socket::Unix)];
    let kinds = [(0, 1), (0, 2), (0, 4), (1, 1), (1, 4)];
    let mut copies = Waits::default();
    let mut fills = vec![Waits::default(); kinds.len()];
    for _ in 0..5 {
        copies.push(plain_copy(Socket::Tcp, Place::Free, &usable, bytes).expect("a plain copy"));
        for ((server, connections), times) in kinds.iter().zip(&mut fills) {
            let source = servers[*server].source(*connections).expect("the server");
            times.push(fill_time(PAGES, source).expect("all pages"));
        }
    }
    let gib_per_s = |times: &Waits| {
        let gib = bytes as f64 / f64::from(1 << 30);
        gib / Duration::from_nanos(times.percentile(50)).as_secs_f64()
    };
    let copy = gib_per_s(&copies);
    println!("bulk plain-tcp-copy gib_per_s={copy:.2}");
    for ((server, connections), times) in kinds.iter().zip(&fills) {
        let fill = gib_per_s(times);
        println!(
            "bulk fill over={} connections={connections} gib_per_s={fill:.2} ratio={:.2}",
            ["tcp", "unix"][*server],
            fill / copy,
        );
    }
}

/// What a fault on a page that is elsewhere takes, against answering a fault at all and asking somebody at all; everything on
/// one CPU, where nothing but the work is measured.
fn demand(image: &Path) {
    let usable = usable_cpus().expect("this thread's CPUs");
    // Threads run where the one that starts them does.
    Place::Same.run_as_waiting(&usable).expect("a CPU to stay on");
    for socket in [Socket::Tcp, Socket::Unix] {
        let server = serve(image, socket);
        let (mut floors, mut trips, mut remotes) = (Waits::default(), Waits::default(), Waits::default());
        for slice in 0..SLICES as u64 {
            let floor = Floor::start(TOUCHES as u64, Backing::Memfd, Answer::Copy).expect("a floor");
            shuffled(TOUCHES as u64, 1).for_each(|page| floors.push(touch(floor.region(), page)));
            drop(floor);
            trips.append(round_trips(socket, Place::Same, &usable, TOUCHES).expect("round trips"));
            let remote = start(&server, 1, Fill::Off);
            let pages = shuffled(PAGES, slice + 1).take(TOUCHES);
            pages.for_each(|page| remotes.push(touch(remote.region(), page)));
        }
        let mut line = format!(
            "demand over={} cpus=one touches={}",
            socket.name(),
            remotes.count()
        );
        for percent in [50, 99] {
            let [floor, trip, remote] = [&floors, &trips, &remotes].map(|waits| waits.percentile(percent));
            let ratio = remote as f64 / (floor + trip) as f64;
            let _ = write!(
                line,
                " p{percent}_ns={remote} floor_p{percent}_ns={floor} round_trip_p{percent}_ns={trip} p{percent}_ratio={ratio:.2}"
            );
        }
        println!("{line}");
    }
    run_on(&usable).expect("all CPUs again");
}

/// What a fault takes while a fill loads everything as fast as it can, against the same without the fill.
fn demand_under_fill(image: &Path) {
    let server = serve(image, Socket::Tcp);
    for connections in [1, 4] {
        let (mut quiet, mut filled) = (Waits::default(), Waits::default());
        for slice in 0..SLICES as u64 {
            let pages: Vec<u64> = shuffled(PAGES, slice + 1).take(TOUCHES).collect();
            let remote = start(&server, connections, Fill::Off);
            for page in &pages {
                quiet.push(touch(remote.region(), *page));
            }
            drop(remote);
            let remote = start(&server, connections, Fill::Sequential);
            for page in &pages {
                // Those alone that had to be waited for, and only for as long as there is a fill.
                if remote.is_complete() {
                    break;
                }
                if !remote.has(*page).expect("mincore") {
                    filled.push(touch(remote.region(), *page));
                }
                // A guest does something with what it has touched, and the fill is to have its turn.
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        for percent in [50, 99] {
            let (without, with) = (quiet.percentile(percent), filled.percentile(percent));
            println!(
                "demand-under-fill over=tcp cpus=all connections={connections} percentile={percent} \
                 without_fill_ns={without} with_fill_ns={with} ratio={:.2} touches={}",
                with as f64 / without as f64,
                filled.count(),
            );
        }
    }
}
