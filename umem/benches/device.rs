//! A fault by way of a device, in nanoseconds until the thread that touched the page goes on, against the least that answers a
//! fault (`umem::measure::floor`), of which a slice is measured beside each slice of the device's.
//!
//! ```text
//! cargo bench -p umem --bench device
//! ```
//!
//! Threads are pinned: the server to one CPU, and to the same or another one the thread that touches pages, with the device's pager.
//! The server is a thread of the same process or a process of its own, for both. `way`: what the server does for a page.
//! `buffer` serves it out of a buffer, as the floor does; `window` writes it to the window, which is populated, and says so;
//! `window-dropped` also drops it from there again, as the driver's documentation has it.

use std::io::{IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use rustix::thread::CpuSet;
use umem::device::{Device, DeviceOptions, Mapping, Server, Serving};
use umem::measure::floor::{self, Answer, Floor};
use umem::region::{Backing, PageSize, Region};
use umem::uffd::Userfaultfd;
use umem::units::{HostAddress, PAGE_SIZE, PageIndex};

/// Pages of the memory: 16 MiB, more than a processor's own cache.
const PAGES: u64 = 4096;

/// Touches at the start of each slice that are not counted.
const UNCOUNTED: usize = 64;

/// Of each kind.
const SLICES: usize = 12;

/// Set for the process that serves.
const SERVER: &str = "UMEM_BENCH_SERVER";

static CONTENT: [u8; PAGE_SIZE] = [0x5a; PAGE_SIZE];

/// What a server does for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Buffer = 0,
    Window = 1,
    WindowDropped = 2,
}

impl Way {
    const ALL: [Self; 3] = [Self::Buffer, Self::Window, Self::WindowDropped];

    fn name(self) -> &'static str {
        match self {
            Self::Buffer => "buffer",
            Self::Window => "window",
            Self::WindowDropped => "window-dropped",
        }
    }
}

fn main() {
    if std::env::var_os(SERVER).is_some() {
        return serve_by_socket();
    }
    let cpus = allowed_cpus();
    for (name, toucher) in [("same", cpus.first()), ("across", cpus.get(1))] {
        let Some(toucher) = toucher else {
            eprintln!("skipped: across CPUs: this process may use one CPU only");
            continue;
        };
        for processes in [1, 2] {
            for way in Way::ALL {
                let (mut device, mut floor) = (Vec::new(), Vec::new());
                for _ in 0..SLICES {
                    device.extend(touch_device(cpus[0], *toucher, processes, way));
                    floor.extend(touch_floor(cpus[0], *toucher, processes));
                }
                print!(
                    "cpus={name} processes={processes} way={} touches={}",
                    way.name(),
                    device.len()
                );
                for (percentile, percent) in [("p50", 50), ("p99", 99)] {
                    let (device, floor) = (at(&mut device, percent), at(&mut floor, percent));
                    print!(
                        " device_{percentile}_ns={device} floor_{percentile}_ns={floor} {percentile}_ratio={:.2}",
                        device as f64 / floor as f64
                    );
                }
                println!();
            }
        }
    }
}

fn at(times: &mut [u64], percent: usize) -> u64 {
    times.sort_unstable();
    times[(times.len() * percent).div_ceil(100).max(1) - 1]
}

/// Serves until there is no client any more.
fn serve(server: &Server, way: Way) {
    let window = server.window().expect("the window");
    if way == Way::Window {
        // SAFETY: within the window, which is this server's to write.
        unsafe { std::ptr::write_bytes(window, 0x11, server.size() as usize) };
    }
    let mut pages = [PageIndex(0); 64];
    loop {
        let count = server.read(&mut pages).expect("requests");
        if count == 0 {
            return;
        }
        for page in &pages[..count] {
            if way == Way::Buffer {
                server.write_from(*page, &CONTENT).expect("a page that is taken");
                continue;
            }
            server.fill(*page, &CONTENT).expect("a page of the window");
            server.write(&[*page]).expect("a page that is taken");
            if way == Way::WindowDropped {
                let at = window.wrapping_add(page.byte_offset() as usize);
                // SAFETY: within the window; the page was served.
                unsafe { libc::madvise(at.cast(), PAGE_SIZE, libc::MADV_REMOVE) };
            }
        }
    }
}

/// Who answers, to be waited for.
enum Answering {
    Thread(JoinHandle<()>),
    Process(Child),
}

impl Answering {
    fn join(self) {
        match self {
            Self::Thread(thread) => thread.join().expect("the server"),
            Self::Process(mut process) => assert!(process.wait().expect("the server").success()),
        }
    }
}

fn touch_device(server_cpu: usize, toucher_cpu: usize, processes: u32, way: Way) -> Vec<u64> {
    let device = Device::create(DeviceOptions {
        size: PAGES * PAGE_SIZE as u64,
        max_requests: 512,
        serving: Serving::Copied,
    });
    let (server, client) = device.expect("a device").into_halves();
    let (server, client) = (server.expect("a server half"), client.expect("a client half"));
    // Threads and processes run where the thread runs that starts them.
    run_on(server_cpu);
    let answering = if processes == 1 {
        Answering::Thread(std::thread::spawn(move || serve(&server, way)))
    } else {
        let (socket, process) = start_server(way as u8);
        server.send(&socket).expect("a server half that is sent");
        Answering::Process(process)
    };
    run_on(toucher_cpu);
    let mapping: Mapping = client.map(client.everything()).expect("memory");
    drop(client);
    let times = touch_all(mapping.start(), PAGES);
    drop(mapping);
    answering.join();
    times
}

fn touch_floor(server_cpu: usize, toucher_cpu: usize, processes: u32) -> Vec<u64> {
    run_on(server_cpu);
    if processes == 1 {
        let floor = Floor::start(PAGES, Backing::Anonymous, Answer::Copy).expect("a floor");
        run_on(toucher_cpu);
        return touch_all(floor.region().start(), PAGES);
    }
    let size = (PAGES + 1) * PAGE_SIZE as u64;
    let region = Region::new(size, Backing::Anonymous, PageSize::Small).expect("memory for the floor");
    let (features, mode) = region.registration();
    let uffd = Userfaultfd::open(features).expect("a userfaultfd for the floor");
    uffd.register(region.all_addresses(), mode).expect("registration");
    let (socket, process) = start_server(u8::MAX);
    let last = floor::last_page(&region);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [uffd.as_fd()];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
    let bytes = last.0.to_ne_bytes();
    let sent = rustix::net::sendmsg(
        &socket,
        &[IoSlice::new(&bytes)],
        &mut ancillary,
        SendFlags::empty(),
    );
    assert_eq!(sent.expect("a userfaultfd that is sent"), bytes.len());
    run_on(toucher_cpu);
    let times = touch_all(region.start(), PAGES);
    // SAFETY: within the region. It ends the loop.
    unsafe { (last.0 as *const u8).read_volatile() };
    Answering::Process(process).join();
    times
}

/// This program again, as the one that serves; what it serves is sent to it.
fn start_server(kind: u8) -> (UnixStream, Child) {
    let (mut here, there) = UnixStream::pair().expect("sockets");
    let program = std::env::current_exe().expect("this program");
    let process = Command::new(program)
        .env(SERVER, "1")
        .stdin(OwnedFd::from(there))
        .spawn()
        .expect("a process that serves");
    here.write_all(&[kind]).expect("what it is to do");
    (here, process)
}

fn serve_by_socket() {
    let socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().expect("the socket"));
    let mut kind = [0];
    std::io::Read::read_exact(&mut &socket, &mut kind).expect("what to do");
    if let Some(way) = Way::ALL.into_iter().find(|way| *way as u8 == kind[0]) {
        return serve(&Server::receive(&socket).expect("a server half"), way);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut last = [0; 8];
    rustix::net::recvmsg(
        &socket,
        &mut [IoSliceMut::new(&mut last)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )
    .expect("a userfaultfd");
    let uffd = ancillary
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        })
        .expect("a userfaultfd");
    let uffd = Userfaultfd::from_descriptor(uffd);
    floor::serve(&uffd, Answer::Copy, HostAddress(u64::from_ne_bytes(last)));
}

/// Touches every page, in an order without pattern. How long each took, in nanoseconds.
fn touch_all(start: *mut u8, pages: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..pages).collect();
    let mut random: u64 = 1;
    for i in (1..order.len()).rev() {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        order.swap(i, ((random >> 33) % (i as u64 + 1)) as usize);
    }
    let touch = |page: u64| {
        let address = start.wrapping_add(page as usize * PAGE_SIZE);
        let begin = Instant::now();
        // SAFETY: within the memory.
        let byte = unsafe { address.read_volatile() };
        let waited = begin.elapsed();
        assert_eq!(byte, 0x5a, "page {page}");
        waited.as_nanos() as u64
    };
    order.into_iter().map(touch).skip(UNCOUNTED).collect()
}

fn allowed_cpus() -> Vec<usize> {
    let allowed = rustix::thread::sched_getaffinity(None).expect("this thread's CPUs");
    (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect()
}

fn run_on(cpu: usize) {
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    rustix::thread::sched_setaffinity(None, &cpus).expect("running on one CPU");
}
