//! What being watched costs: a look at the counter, munmap with and without, and how soon a reader hears of it.
//!
//!     cargo bench -p ummunotify --bench invalidation
//!
//! `docs/ummunotify.md` says what is measured and what it means. Each figure of munmap is from a process of its own, because
//! what a watcher leaves in an address space is not nothing; rounds of these processes alternate.

use std::hint::black_box;
use std::process::Command;
use std::time::Instant;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use rustix::thread::CpuSet;
use ummunotify::{AddressRange, Choice, Cookie, Event, Notifier, WatcherKind};

const PAGE: u64 = 4096;

/// Where nothing else is. Pages of even numbers are registered, and the others are not.
const BASE: u64 = 0x2000_0000_0000;

/// Page numbers from which those to be unmapped are drawn, whatever number is registered.
const SPREAD: u64 = 1_000_000;

/// Calls of munmap that are measured in one process.
const CALLS: usize = 20_000;
/// Calls before, which are not measured.
const UNCOUNTED: usize = 500;
/// Processes of each kind.
const ROUNDS: usize = 7;

/// What a process measures: the watcher, how many ranges are registered, and whether what is unmapped is one of these.
const KINDS: [(&str, u64, bool); 16] = [
    ("none", 0, false),
    ("kvm", 1, false),
    ("kvm", 1000, false),
    ("kvm", 1_000_000, false),
    ("kvm", 1, true),
    ("kvm", 1000, true),
    ("kvm", 1_000_000, true),
    ("perf", 1, false),
    ("perf", 1000, false),
    ("perf", 1_000_000, false),
    ("perf", 1, true),
    ("perf", 1000, true),
    ("perf", 1_000_000, true),
    ("userfaultfd", 1, false),
    ("userfaultfd", 1000, false),
    ("userfaultfd", 1, true),
];

fn main() {
    let words: Vec<String> = std::env::args().collect();
    if let Some(at) = words.iter().position(|word| word == "--munmap") {
        let ranges = words[at + 2].parse().expect("a number of ranges");
        println!("{}", munmap_ns(&words[at + 1], ranges, words[at + 3] == "true"));
        return;
    }
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    pin(0);
    check();
    register();
    compare_munmap();
    for (place, reader) in [("same", 0), ("across", 1)].into_iter().take(cpus) {
        for kind in [WatcherKind::Kvm, WatcherKind::Perf, WatcherKind::Userfaultfd] {
            latency(kind, place, reader);
        }
    }
}

/// The look at the counter that a cache takes before it believes what it has.
fn check() {
    const TIMES: u64 = 200_000_000;
    for kind in [WatcherKind::Kvm, WatcherKind::Perf, WatcherKind::Userfaultfd] {
        let Some(notifier) = open(kind) else { continue };
        check_of(&notifier, TIMES);
        check_after_munmap(&notifier);
    }
}

/// The same after an invalidation of something else, of which one watcher hears only now.
fn check_after_munmap(notifier: &Notifier) {
    const TIMES: usize = 20_000;
    map(BASE);
    notifier
        .register(AddressRange::new(BASE, BASE + PAGE), Cookie(1))
        .expect("a range");
    let valid_at = notifier.counter().load();
    let mut times = Vec::with_capacity(TIMES);
    for _ in 0..TIMES {
        let at = BASE + 2 * PAGE;
        map(at);
        unmap(at);
        let start = Instant::now();
        let counter = notifier.counter().load();
        times.push(start.elapsed().as_nanos() as u64);
        assert_eq!(counter, valid_at);
    }
    notifier.unregister(Cookie(1)).expect("that range");
    unmap(BASE);
    let p50 = percentile(times, 50);
    println!("check_after_munmap watcher={} p50_ns={p50}", notifier.watcher());
}

fn check_of(notifier: &Notifier, times: u64) {
    let (counter, valid_at) = (notifier.counter(), notifier.counter().load());
    let mut valid = 0_u64;
    let start = Instant::now();
    for _ in 0..times {
        // An atomic load, which is made anew each time.
        valid += u64::from(counter.load() == valid_at);
    }
    let elapsed = start.elapsed();
    assert_eq!(black_box(valid), times);
    let ns = elapsed.as_nanos() as f64 / times as f64;
    println!("check watcher={} ns={ns:.2}", notifier.watcher());
}

/// One range more and one less, with many.
fn register() {
    const TIMES: u64 = 20_000;
    for ranges in [1, 1000, 1_000_000] {
        let Some(notifier) = open(WatcherKind::Kvm) else {
            return;
        };
        let start = Instant::now();
        register_even_pages(&notifier, ranges);
        let each = start.elapsed().as_nanos() as u64 / ranges;
        let start = Instant::now();
        for time in 0..TIMES {
            let at = BASE + (time * 7919 % SPREAD * 2 + 1) * PAGE;
            notifier
                .register(AddressRange::new(at, at + PAGE), Cookie(u64::MAX))
                .expect("a range");
            notifier.unregister(Cookie(u64::MAX)).expect("that range");
        }
        let again = start.elapsed().as_nanos() as u64 / TIMES;
        println!(
            "register watcher=kvm ranges={ranges} each_of_them_ns={each} register_and_unregister_ns={again}"
        );
    }
}

fn compare_munmap() {
    let program = std::env::current_exe().expect("this program");
    let mut figures: Vec<Vec<u64>> = vec![Vec::new(); KINDS.len()];
    for _ in 0..ROUNDS {
        for ((watcher, ranges, hit), figures) in KINDS.iter().zip(&mut figures) {
            let output = Command::new(&program)
                .args(["--munmap", watcher, &ranges.to_string(), &hit.to_string()])
                .output()
                .expect("this program runs");
            let text = String::from_utf8_lossy(&output.stdout);
            if let Ok(ns) = text.trim().parse() {
                figures.push(ns);
            }
        }
    }
    let mut none = 0;
    for ((watcher, ranges, hit), mut figures) in KINDS.into_iter().zip(figures) {
        figures.sort_unstable();
        let Some(&median) = figures.get(figures.len() / 2) else {
            continue;
        };
        if watcher == "none" {
            none = median;
        }
        let ratio = median as f64 / none as f64;
        println!("munmap watcher={watcher} ranges={ranges} hit={hit} p50_ns={median} ratio={ratio:.2}");
    }
}

/// The median of one process' calls.
fn munmap_ns(watcher: &str, ranges: u64, hit: bool) -> u64 {
    pin(0);
    let notifier = (watcher != "none").then(|| {
        let notifier = Notifier::open(watcher.parse().expect("a watcher")).expect("the watcher");
        if watcher != "userfaultfd" {
            register_even_pages(&notifier, ranges);
        } else if !hit {
            // This one watches only what is mapped.
            for range in 0..ranges {
                map(BASE + (SPREAD * 2 + range * 2) * PAGE);
                let at = BASE + (SPREAD * 2 + range * 2) * PAGE;
                notifier
                    .register(AddressRange::new(at, at + PAGE), Cookie(range))
                    .expect("a range");
            }
        }
        notifier
    });
    let mut random = 88_172_645_463_325_252_u64;
    let mut times = Vec::with_capacity(CALLS);
    for call in 0..UNCOUNTED + CALLS {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let number = if hit && watcher != "userfaultfd" {
            random % ranges * 2
        } else {
            random % SPREAD * 2 + 1
        };
        let at = BASE + number * PAGE;
        map(at);
        if let Some(notifier) = notifier.as_ref().filter(|_| hit) {
            if watcher == "userfaultfd" {
                notifier
                    .register(AddressRange::new(at, at + PAGE), Cookie(call as u64))
                    .expect("a range");
            } else if call % 100 == 0 {
                while !notifier
                    .try_read(1000)
                    .expect("this process' notifier")
                    .is_empty()
                {}
            }
        }
        let before = notifier.as_ref().map(|notifier| notifier.counter().load());
        let start = Instant::now();
        unmap(at);
        let elapsed = start.elapsed();
        if let Some(notifier) = &notifier {
            assert_eq!(
                Some(notifier.counter().load()),
                before.map(|before| before + u64::from(hit))
            );
            if hit && watcher == "userfaultfd" {
                notifier.unregister(Cookie(call as u64)).expect("that range");
            }
        }
        if call >= UNCOUNTED {
            times.push(elapsed.as_nanos() as u64);
        }
    }
    percentile(times, 50)
}

fn register_even_pages(notifier: &Notifier, ranges: u64) {
    for range in 0..ranges {
        let at = BASE + range * 2 * PAGE;
        notifier
            .register(AddressRange::new(at, at + PAGE), Cookie(range))
            .expect("a range");
    }
}

/// From the call of munmap to the return of a read that waits.
fn latency(kind: WatcherKind, place: &str, cpu: usize) {
    const TIMES: usize = 5000;
    let Some(notifier) = open(kind) else { return };
    let (sender, heard) = std::sync::mpsc::channel();
    let times = std::thread::scope(|scope| {
        scope.spawn(|| {
            pin(cpu);
            for _ in 0..TIMES {
                // The second event is the last one.
                let mut events = notifier.read(2).expect("events");
                let now = Instant::now();
                if events.len() < 2 {
                    events.extend(notifier.read(1).expect("the last event"));
                }
                assert!(
                    matches!(events[..], [Event::Invalidated { .. }, Event::Last { .. }]),
                    "{events:?}"
                );
                sender.send(now).expect("somebody who listens");
            }
        });
        let mut times = Vec::with_capacity(TIMES);
        for time in 0..TIMES {
            let at = BASE;
            map(at);
            notifier
                .register(AddressRange::new(at, at + PAGE), Cookie(time as u64))
                .expect("a range");
            let start = Instant::now();
            unmap(at);
            times.push((heard.recv().expect("the time of the event") - start).as_nanos() as u64);
            notifier.unregister(Cookie(time as u64)).expect("that range");
        }
        times
    });
    let (p50, p99) = (percentile(times.clone(), 50), percentile(times, 99));
    println!("event watcher={kind} cpus={place} p50_ns={p50} p99_ns={p99}");
}

fn open(kind: WatcherKind) -> Option<Notifier> {
    Notifier::open(Choice::Only(kind))
        .inspect_err(|error| println!("left out: {error}"))
        .ok()
}

fn unmap(at: u64) {
    // SAFETY: a page of `map`, to which nobody has a reference.
    unsafe { munmap(at as *mut _, PAGE as usize) }.expect("a mapping");
}

/// A page that is there.
fn map(at: u64) {
    let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE | MapFlags::POPULATE;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: where nothing is mapped, or it fails.
    unsafe { mmap_anonymous(at as *mut _, PAGE as usize, protection, flags) }
        .expect("an address that is free");
}

fn pin(cpu: usize) {
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    rustix::thread::sched_setaffinity(None, &cpus).expect("a CPU");
}

fn percentile(mut times: Vec<u64>, percent: usize) -> u64 {
    times.sort_unstable();
    times[times.len() * percent / 100]
}
