//! VMs that move over a network that does what it should not, while either side may be killed: there are never two that run, every end is
//! one of the handover's diagram and comes in time, and no page is a wrong one.
//!
//! `UMEM_TEST_ROUNDS` is the number of runs, `UMEM_TEST_SEED` the seed from which the seeds of the runs follow, and `UMEM_FAULT_SEED`
//! repeats the one run of this seed. With `UMEM_TEST_NAMESPACE` and `UMEM_TEST_NETWORK` (scripts/stress makes both) the sources are in
//! that network namespace, and reach this one over a link at that address.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tests::moving::{Instance, MODES, assert_one_guest, guest_output};
use tests::need;
use tests::program::Running;
use tests::proxy::{Plan, Proxy};
use tests::random::{Random, number, rounds};
use tests::scratch::Scratch;
use tests::vm::{FinishedVm, Vm};

/// The variable by which a run is repeated.
const FAULT_SEED: &str = "UMEM_FAULT_SEED";

/// Runs at a time.
const AT_ONCE: usize = 2;

/// How long a destination waits for a source that is lost.
const SOURCE_TIMEOUT: Duration = Duration::from_secs(3);

/// Silence is noticed after 10 s, more than once in a row where there are several connections; a destination may take 30 s to prepare.
const LONGEST: Duration = Duration::from_mins(1);

/// What happens besides what the network does by its plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Nothing,
    SourceKilled,
    DestinationKilled,
    LinkDown,
    Cancelled,
}

/// What became of the source, and of the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    Killed,
    /// The guest runs here.
    Runs,
    /// It left.
    Migrated,
    /// Nobody knows here whether it runs there. It does not run here.
    InDoubt,
    /// It runs there, and pages are missing there.
    Serves,
    /// The destination says that nothing arrived.
    NeverRan,
    /// Pages were lost with the source.
    SourceLost,
}

struct Outcome {
    seed: u64,
    event: Event,
    mode: &'static str,
    ends: (End, End),
    elapsed: Duration,
}

fn run(scratch: &Scratch, seed: u64) -> Outcome {
    let began = Instant::now();
    let mut random = Random::new(seed);
    let mode = random.choose(&MODES);
    let link = std::env::var("UMEM_TEST_NETWORK").ok();
    let tcp = random.once_in(2) || link.is_some();
    let event = random.choose(&[
        Event::Nothing,
        Event::SourceKilled,
        Event::DestinationKilled,
        Event::LinkDown,
        Event::Cancelled,
    ]);
    // Faults by frames with nothing else, and at times with something else.
    let plan = if event == Event::Nothing || random.once_in(4) {
        Plan::new(random.number())
    } else {
        Plan::NONE
    };
    let listen = |name: &str| {
        if tcp {
            let here = link.as_deref().filter(|_| name == "proxy").unwrap_or("127.0.0.1");
            format!("tcp:{here}:0")
        } else {
            format!("unix:{}", scratch.path(&format!("{name}-{seed}")).display())
        }
    };
    let pages = random.choose(&[256, 1024, 2048]);
    let backing = random.choose(&["backing=memfd", "backing=anonymous"]);
    let cpus = if random.once_in(6) { 2 } else { 1 };
    let vm = Vm::with_memory("32M")
        .memory(backing)
        .cpus(cpus)
        .patience(2 * LONGEST);
    let vm = match std::env::var("UMEM_TEST_NAMESPACE") {
        Ok(name) => vm.network_namespace(&name),
        Err(_) => vm,
    };
    let source = Instance::dirty(vm, pages, "forever");
    let waiting = Vm::arriving(&listen("destination"))
        .memory(random.choose(&["backing=memfd", "backing=anonymous"]))
        .memory(random.choose(&["fill=near-faults", "fill=sequential"]))
        .memory(&format!("source-timeout={}s", SOURCE_TIMEOUT.as_secs()))
        .patience(2 * LONGEST);
    let destination = Instance::waiting_with(waiting);
    let proxy = Proxy::start(&listen("proxy"), &destination.url, plan);
    if random.once_in(3) {
        proxy.throttle(Some((4 << 20) << random.below(4)));
    }
    let connections = random.choose(&[1, 1, 3]);
    let options = format!(",memory_mode={mode},connections={connections},timeout_s=5,downtime_ms=20");
    let sent = source.send(proxy.url(), &options);
    // As often within the first moments as at any time of it.
    let longest = random.choose(&[20, 100, 400]);
    sent.wait_for_exit(random.moment(Duration::from_millis(longest)));
    match event {
        Event::Nothing => {}
        Event::SourceKilled => source.signal(Signal::KILL),
        Event::DestinationKilled => destination.signal(Signal::KILL),
        Event::LinkDown => {
            for _ in 0..=random.below(3) {
                proxy.link_down();
                sent.wait_for_exit(random.moment(Duration::from_millis(200)));
                proxy.link_up();
                sent.wait_for_exit(random.moment(Duration::from_millis(200)));
            }
        }
        Event::Cancelled => drop(source.api.try_ask("PUT", "/api/v1/vm.cancel-migration", b"")),
    }
    let ends = settle(source, destination, sent, event, &proxy);
    Outcome {
        seed,
        event,
        mode,
        ends,
        elapsed: began.elapsed(),
    }
}

fn assert_no_panic(vm: &FinishedVm) {
    assert!(!vm.stderr.contains("panicked"), "{}", vm.stderr);
}

/// Waits until nothing changes any more by itself.
fn await_rest(source: &Instance, destination: &Instance, sent: &Running, event: Event, proxy: &Proxy) {
    let began = Instant::now();
    loop {
        let over = sent.wait_for_exit(Duration::from_millis(5));
        let at_rest = matches!(source.phase().as_str(), "in-doubt" | "postcopy");
        let nobody_there = event == Event::DestinationKilled
            || destination.wait_for_exit(Duration::ZERO)
            || proxy.record().gone.is_some();
        // A source whose destination is gone, or cannot be reached any more, waits for somebody to decide.
        if over || (at_rest && nobody_there) {
            return;
        }
        assert!(
            began.elapsed() < LONGEST,
            "it does not end: source {:?}, destination {:?}\n{}\n{}",
            source.info().map(|info| info["migration"].clone()),
            destination.info().map(|info| info["migration"].clone()),
            **source,
            **destination
        );
    }
}

/// What became of the destination, and what the guest said there.
fn end_of_destination(destination: Instance, event: Event) -> (End, String) {
    if event == Event::DestinationKilled {
        let gone = destination.finish();
        let end = if gone.signal().is_some() {
            End::Killed
        } else {
            End::NeverRan
        };
        return (end, guest_output(&gone.stdout));
    }
    let began = Instant::now();
    while !destination.wait_for_exit(Duration::from_millis(5)) {
        let long = began.elapsed() > LONGEST / 2;
        let runs = !destination.guest_output().is_empty();
        if destination.phase().is_empty() && long {
            assert_takes_another(destination);
            return (End::NeverRan, String::new());
        }
        // With all pages, nothing can happen to it any more.
        if runs && (destination.phase() == "complete" || long) {
            destination.wait_for_progress();
            let vm = destination.stop();
            vm.assert_code(0);
            assert_no_panic(&vm);
            return (End::Runs, guest_output(&vm.stdout));
        }
        assert!(
            began.elapsed() < LONGEST,
            "the destination does not end\n{:?}\n{}",
            destination.info(),
            *destination
        );
    }
    let vm = destination.finish();
    assert_no_panic(&vm);
    let output = guest_output(&vm.stdout);
    match vm.code() {
        Some(5) => {
            assert_eq!(output, "", "it never ran here, it says");
            (End::NeverRan, output)
        }
        Some(4) => {
            let report = vm.report();
            let lost: u64 = (0..)
                .map(|index| format!("/lost_pages/{index}/1"))
                .map_while(|pointer| report.has(&pointer).then(|| report.count(&pointer)))
                .sum();
            assert!(lost > 0, "{report}");
            assert_eq!(report.arrivals() + lost, report.count("/pages/total"), "{report}");
            (End::SourceLost, output)
        }
        _ => panic!("no reason for this end\n{}", *vm),
    }
}

/// Nobody has reached a destination, and it still waits: for anybody.
fn assert_takes_another(destination: Instance) {
    let other = Instance::dirty(Vm::with_memory("32M"), 16, "forever");
    let sent = other.send(&destination.url, "").finish();
    assert_eq!(sent.code(), Some(0), "{sent}\n{}\n{}", *other, *destination);
    destination.wait_for_progress();
    let outputs = [other.finish(), destination.stop()].map(|vm| guest_output(&vm.stdout));
    assert_one_guest(&outputs);
}

/// A source that nobody tells whose the VM is, or that serves pages that nobody can ask for.
fn end_of_waiting_source(source: Instance, destination: Instance, event: Event) -> (End, End) {
    source.assert_stands_still();
    let end = match source.phase().as_str() {
        "in-doubt" => End::InDoubt,
        "postcopy" => End::Serves,
        other => panic!("a source in phase {other} that does not end"),
    };
    let (there, output) = end_of_destination(destination, event);
    let before = source.guest_output();
    assert_one_guest(&[before.clone(), output.clone()]);
    let token = format!("token={}", source.token());
    if end == End::InDoubt && output.is_empty() && source.api.ctl(&["take-back", &token]).code() == Some(0) {
        source.wait_for_progress();
        assert_one_guest(&[guest_output(&source.stop().stdout)]);
    } else {
        let after = guest_output(&source.stop().stdout);
        assert_eq!(after, before, "it ran on its way to the end");
    }
    (end, there)
}

/// Waits until nothing changes any more, and checks that it may be so.
fn settle(source: Instance, destination: Instance, sent: Running, event: Event, proxy: &Proxy) -> (End, End) {
    await_rest(&source, &destination, &sent, event, proxy);
    proxy.throttle(None);
    if event == Event::SourceKilled {
        let source = source.finish();
        let here = if source.signal().is_some() {
            End::Killed
        } else {
            End::Migrated
        };
        let (there, output) = end_of_destination(destination, event);
        assert_one_guest(&[guest_output(&source.stdout), output]);
        return (here, there);
    }
    if !sent.wait_for_exit(Duration::ZERO) {
        return end_of_waiting_source(source, destination, event);
    }
    let sent = sent.finish();
    if sent.code() == Some(0) {
        let source = source.finish();
        assert_no_panic(&source);
        assert_eq!(source.report().text("/outcome"), "migrated");
        let (there, output) = end_of_destination(destination, event);
        assert!(
            matches!(there, End::Runs | End::Killed),
            "{there:?} after all of it had arrived"
        );
        assert_one_guest(&[guest_output(&source.stdout), output]);
        return (End::Migrated, there);
    }
    assert_eq!(sent.code(), Some(5), "{sent}\n{}", *source);
    source.wait_for_progress();
    let (there, output) = end_of_destination(destination, event);
    assert!(
        matches!(there, End::Killed | End::NeverRan),
        "{there:?}: two VMs ran"
    );
    assert_eq!(output, "", "two VMs ran");
    source.wait_for_progress();
    assert_one_guest(&[guest_output(&source.stop().stdout)]);
    (End::Runs, there)
}

/// The seeds of all runs.
fn seeds() -> Vec<u64> {
    if let Some(seed) = number(FAULT_SEED) {
        return vec![seed];
    }
    let mut random = Random::seeded();
    (0..rounds(20)).map(|_| random.number()).collect()
}

#[test]
fn never_two_vms_and_never_a_wrong_page() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let seeds = seeds();
    let next = AtomicU64::new(0);
    let outcomes = Mutex::new(Vec::new());
    let failed = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(seed) = seeds.get(next.fetch_add(1, Relaxed) as usize) {
                    match catch_unwind(AssertUnwindSafe(|| run(&scratch, *seed))) {
                        Ok(outcome) => outcomes.lock().unwrap().push(outcome),
                        Err(_) => failed.lock().unwrap().push(format!("{FAULT_SEED}={seed}")),
                    }
                }
            });
        }
    });
    let outcomes = outcomes.into_inner().unwrap();
    let mut counts = BTreeMap::<_, u64>::new();
    for outcome in &outcomes {
        *counts.entry((outcome.event, outcome.ends)).or_default() += 1;
    }
    for ((event, (source, destination)), count) in counts {
        println!("{count:>5} {event:?}: source {source:?}, destination {destination:?}");
    }
    for mode in MODES {
        let of = outcomes.iter().filter(|outcome| outcome.mode == mode);
        println!("{:>5} by {mode}", of.count());
    }
    if let Some(slowest) = outcomes.iter().max_by_key(|outcome| outcome.elapsed) {
        println!(
            "the longest took {:.1?}: {FAULT_SEED}={}",
            slowest.elapsed, slowest.seed
        );
    }
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{} failed: {}", failed.len(), failed.join(" "));
}
