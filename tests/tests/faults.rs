//! A VM and its page server, and between them a network that does what it should not: whatever it does, no page is a wrong one,
//! and every end comes in time and is the right one.
//!
//! `UMEM_TEST_ROUNDS` is the number of runs, `UMEM_TEST_SEED` the seed from which the seeds of the runs follow, and
//! `UMEM_FAULT_SEED` repeats the one run of this seed.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use tests::need;
use tests::proxy::{Kind, Plan, Proxy, Record};
use tests::random::{Random, number, rounds};
use tests::scratch::Scratch;
use tests::served::{MARGIN, SEED, assert_right, assert_right_and_quiet, served, socket};
use tests::server::Server;
use tests::vm::{FinishedVm, Vm};

/// The variable by which a run is repeated.
const FAULT_SEED: &str = "UMEM_FAULT_SEED";

/// VMs at a time.
const AT_ONCE: usize = 2;

/// What a run is made of besides its faults, as options of `--memory`. A new dimension is a line.
const DIMENSIONS: [&[&str]; 5] = [
    &[
        "fill=off",
        "fill=sequential",
        "fill=near-faults",
        "fill=near-faults",
    ],
    &["backing=memfd", "backing=anonymous"],
    &["connections=1", "connections=1", "connections=4"],
    &["lz4=off", "lz4=off", "lz4=on"],
    &["stripes=1", "stripes=3"],
];

/// How long a VM looks for its server: where the network gets well again, and where it does not.
const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(300);

/// A VM whose network gets well again takes no longer. Silence is noticed after 10 s at most, and there are plans with several.
const LONGEST: Duration = Duration::from_mins(1);

/// What all runs share: the same two images, served over both kinds of sockets.
struct Bench {
    scratch: Scratch,
    images: [(&'static str, u64, PathBuf); 2],
    servers: [Server; 2],
}

/// What came of a run.
struct Outcome {
    seed: u64,
    code: i32,
    elapsed: Duration,
    reconnects: u64,
    record: Record,
}

impl Bench {
    fn new() -> Self {
        let scratch = Scratch::new();
        let image = |name, mib: u64| {
            let image = scratch.fingerprinted(&format!("{mib}M"), SEED, "order=random");
            let path = scratch.path(name);
            std::fs::rename(image, &path).unwrap();
            (name, mib, path)
        };
        // Page after page takes its time: RAM that is not filled is smaller.
        let images = [image("small", 16), image("large", 32)];
        let named = images.each_ref().map(|(name, _, path)| (*name, path.as_path()));
        let servers = [socket(&scratch).as_str(), "tcp:127.0.0.1:0"].map(|url| Server::start(url, &named));
        Self {
            scratch,
            images,
            servers,
        }
    }

    /// A run that follows from its seed.
    fn run(&self, seed: u64) -> Outcome {
        let mut random = Random::new(seed);
        let plan = Plan::new(random.number());
        let options = DIMENSIONS.map(|options| random.choose(options));
        let (name, mib, _) = &self.images[usize::from(!options.contains(&"fill=off"))];
        let (server, listen, separator) = if random.once_in(2) {
            let path = self.scratch.path(&format!("proxy-{seed}"));
            (&self.servers[0], format!("unix:{}", path.display()), '#')
        } else {
            (&self.servers[1], "tcp:127.0.0.1:0".to_owned(), '/')
        };
        let proxy = Proxy::start(&listen, server.url(), plan);
        let url = format!("{}{separator}{name}", proxy.url());
        let timeout = if plan.gone { SHORT } else { LONG };
        let mut vm = Vm::default()
            .memory(&format!("source={url},source-timeout={}ms", timeout.as_millis()))
            .cpus(1 + random.below(2) as u32)
            .patience(LONGEST);
        for option in options {
            vm = vm.memory(option);
        }
        let since = Instant::now();
        let vm = vm.run();
        let ended = Instant::now();
        let record = proxy.record();
        if number(FAULT_SEED).is_some() {
            println!("{plan:?}\n{record:?}\n{}{}", vm.stdout, vm.stderr);
        }
        check(&vm, &plan, &record, *mib);
        if let (Some(gone), Some(4)) = (record.gone, vm.code()) {
            let waited = ended - gone;
            assert!(waited < timeout + MARGIN, "it ended {waited:?} after its server");
        }
        drop(proxy);
        if let Some(path) = listen.strip_prefix("unix:") {
            std::fs::remove_file(path).unwrap();
        }
        Outcome {
            seed,
            code: vm.code().unwrap(),
            elapsed: ended - since,
            reconnects: reconnects(&vm),
            record,
        }
    }
}

/// How often it connected anew; a VM that did not find its server at the start does not say.
fn reconnects(vm: &FinishedVm) -> u64 {
    const KEY: &str = "/source/reconnects";
    if vm.has_report() && vm.report().has(KEY) {
        vm.report().count(KEY)
    } else {
        0
    }
}

/// Checks that a VM came to an end that its network accounts for.
fn check(vm: &FinishedVm, plan: &Plan, record: &Record, mib: u64) {
    let all = || format!("{plan:?}\n{record:?}\n{}\n{}", vm.stdout, vm.stderr);
    assert!(!vm.stderr.contains("panicked"), "{}", all());
    assert!(!vm.stdout.contains("wrong_page="), "{}", all());
    let last = vm.stderr.lines().last().unwrap_or_default();
    // Who finds nobody to begin with does not wait for somebody.
    let at_the_start = plan.from_the_start && !last.contains("the VM was stopped");
    match vm.code() {
        Some(0) => assert_right(vm, mib),
        Some(4) if record.gone.is_some() => {
            assert!(
                last.contains("no page server was reached") || at_the_start,
                "{}",
                all()
            );
        }
        Some(4) if at_the_start => assert!(!record.faults.is_empty() && !last.is_empty(), "{}", all()),
        Some(6) if record.corrupted_twice() => assert!(last.contains("checksum"), "{}", all()),
        _ => panic!("no reason for this end\n{}", all()),
    }
}

/// The seeds of all runs.
fn seeds() -> Vec<u64> {
    if let Some(seed) = number(FAULT_SEED) {
        return vec![seed];
    }
    let mut random = Random::seeded();
    (0..rounds(40)).map(|_| random.number()).collect()
}

#[test]
fn no_network_makes_a_page_wrong() {
    need!(tests::host::kvm());
    let bench = Bench::new();
    let seeds = seeds();
    let next = AtomicU64::new(0);
    let outcomes = Mutex::new(Vec::new());
    let failed = Mutex::new(Vec::new());
    let since = Instant::now();
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(seed) = seeds.get(next.fetch_add(1, Relaxed) as usize) {
                    match catch_unwind(AssertUnwindSafe(|| bench.run(*seed))) {
                        Ok(outcome) => outcomes.lock().unwrap().push(outcome),
                        Err(_) => failed.lock().unwrap().push(format!("{FAULT_SEED}={seed}")),
                    }
                }
            });
        }
    });
    println!("{}", summary(&outcomes.into_inner().unwrap(), since.elapsed()));
    // Nobody else is the worse for it.
    for server in &bench.servers {
        let url = match server.url().strip_prefix("unix:") {
            Some(_) => format!("{}#small", server.url()),
            None => format!("{}/small", server.url()),
        };
        assert_right_and_quiet(&served(&[&url]).run(), 16);
    }
    for server in bench.servers {
        let served = server.stop();
        assert_eq!(served.stderr, "", "nobody is to be told of it");
    }
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{} failed: {}", failed.len(), failed.join(" "));
}

fn summary(outcomes: &[Outcome], elapsed: Duration) -> String {
    let mut endings = BTreeMap::<i32, u64>::new();
    let mut runs = BTreeMap::<Kind, u64>::new();
    let mut faults = BTreeMap::<Kind, u64>::new();
    for outcome in outcomes {
        *endings.entry(outcome.code).or_default() += 1;
        for (kind, count) in &outcome.record.faults {
            *runs.entry(*kind).or_default() += 1;
            *faults.entry(*kind).or_default() += count;
        }
    }
    let sum = |count: fn(&Outcome) -> u64| outcomes.iter().map(count).sum::<u64>();
    let mut by_length: Vec<_> = outcomes.iter().collect();
    by_length.sort_by_key(|outcome| Reverse(outcome.elapsed));
    let mut text = format!("{:<10} {:>6} {:>6}\n", "fault", "runs", "times");
    for (kind, _) in Kind::ALL {
        let of = |counts: &BTreeMap<Kind, u64>| counts.get(&kind).copied().unwrap_or(0);
        let name = format!("{kind:?}").to_lowercase();
        writeln!(text, "{name:<10} {:>6} {:>6}", of(&runs), of(&faults)).unwrap();
    }
    for (code, count) in endings {
        writeln!(text, "{count} runs ended with exit code {code}").unwrap();
    }
    writeln!(
        text,
        "{} runs in {:.1} s, {:.3} s a run; {} connections, {} of them after one was lost, {} MiB",
        outcomes.len(),
        elapsed.as_secs_f64(),
        elapsed.as_secs_f64() / outcomes.len().max(1) as f64,
        sum(|outcome| outcome.record.connections),
        sum(|outcome| outcome.reconnects),
        sum(|outcome| outcome.record.bytes) >> 20,
    )
    .unwrap();
    for outcome in by_length.iter().take(3) {
        let Outcome {
            seed, code, elapsed, ..
        } = outcome;
        writeln!(
            text,
            "among the longest: {elapsed:.3?}, exit code {code}, {FAULT_SEED}={seed}"
        )
        .unwrap();
    }
    text
}
