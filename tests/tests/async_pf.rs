//! Asynchronous page faults: guests that work while their pages are on their way.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;
use tests::need;
use tests::random::{Random, rounds};
use tests::scratch::Scratch;
use tests::server::Server;
use tests::vm::{FinishedVm, RunningVm, Vm};

const SEED: u64 = 41;

/// An image whose pages have their fingerprints, and a guest that is told otherwise by its command line.
fn image(scratch: &Scratch) -> PathBuf {
    scratch.fingerprinted("32M", SEED, "order=random")
}

/// The number behind `key=` in what the guest has said.
#[track_caller]
fn figure(vm: &FinishedVm, key: &str) -> u64 {
    let word = vm
        .stdout
        .split_whitespace()
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    let word = word.unwrap_or_else(|| panic!("no {key}= in\n{}", vm.stdout));
    word.parse()
        .unwrap_or_else(|error| panic!("{key}={word}: {error}"))
}

/// Checks that all pages were right and no wake-up was lost.
#[track_caller]
fn assert_complete(vm: &FinishedVm, pages: u64) {
    vm.assert_ended_well();
    assert_eq!((figure(vm, "verified"), figure(vm, "wrong")), (pages, 0));
    // Every page that was told to be absent was told to be ready, but for those of which the last task did not need to hear.
    let (not_present, ready) = (figure(vm, "not_present"), figure(vm, "ready"));
    assert!(ready <= not_present + figure(vm, "early"), "{}", vm.stdout);
    assert!(
        ready + figure(vm, "wake_all") * 64 >= not_present,
        "{}",
        vm.stdout
    );
}

#[test]
fn others_work_while_pages_are_on_their_way() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = image(&scratch);
    let run = |async_pf| {
        let vm = Vm::from_image(&image)
            .memory("source-delay=2ms")
            .option("--cpus", format!("async_pf={async_pf}"))
            .command_line(&format!(
                "workload=tasks tasks=32 faulting=16 pages=1024 seed={SEED} order=random"
            ))
            .run();
        assert_complete(&vm, 1024);
        println!("async_pf={async_pf}:\n{}", vm.stdout);
        vm
    };
    let (off, on) = (run("off"), run("on"));
    assert!(off.stdout.contains("async_page_faults=off"), "{}", off.stdout);
    assert_eq!(
        (figure(&off, "not_present"), figure(&off, "work_during_waits")),
        (0, 0)
    );
    assert!(!off.report().has("/async_page_faults"), "{}", off.report());
    let not_present = figure(&on, "not_present");
    assert!(not_present > 900, "nearly every page is told of: {}", on.stdout);
    assert!(figure(&on, "work_during_waits") > 0, "{}", on.stdout);
    assert!(
        figure(&on, "work_per_s") >= 5 * figure(&off, "work_per_s"),
        "off:\n{}on:\n{}",
        off.stdout,
        on.stdout
    );
    // What KVM counts, where that may be looked at, is what the guest was told.
    if on.report().has("/async_page_faults") {
        let counted = on.report().count("/async_page_faults/not_present");
        assert!(
            counted <= not_present && counted + 64 >= not_present,
            "{}\n{}",
            on.report(),
            on.stdout
        );
    }
}

/// More than KVM has on their way for one vCPU, of which none can do anything else: the vCPU halts until one comes.
#[test]
fn all_tasks_of_all_cpus_wait_and_more_than_there_is_room_for() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let vm = Vm::from_image(&image(&scratch))
        .memory("source-delay=1ms-3ms")
        .cpus(2)
        .command_line(&format!(
            "workload=tasks tasks=100 faulting=100 pages=2000 seed={SEED} order=random"
        ))
        .run();
    assert_complete(&vm, 2000);
    assert!(figure(&vm, "most_parked") >= 60, "{}", vm.stdout);
}

#[test]
fn random_delays_lose_no_wake_up() {
    need!(tests::host::kvm());
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let image = image(&scratch);
    for _ in 0..rounds(3) {
        let delay = random.choose(&["0ms-1ms", "10us-300us", "100us-5ms", "1ms-2ms"]);
        let (cpus, faulting) = (random.choose(&[1, 1, 2]), 1 + random.below(64));
        let backing = random.choose(&["memfd", "anonymous"]);
        let fill = random.choose(&["off", "off", "sequential", "near-faults"]);
        let seed = random.number() >> 32;
        println!("{delay}, seed {seed}, {cpus} CPUs, {faulting} faulting, {backing}, {fill}");
        let vm = Vm::from_image(&image)
            .memory(&format!(
                "source-delay={delay},source-delay-seed={seed},backing={backing},fill={fill}"
            ))
            .cpus(cpus)
            .command_line(&format!(
                "workload=tasks tasks=64 faulting={faulting} pages=3000 seed={SEED} order=random"
            ))
            .run();
        assert_complete(&vm, 3000);
    }
}

/// A VM whose page server stops answering while 64 pages are on their way, and the server.
fn with_stopped_server(scratch: &Scratch, options: &str) -> (RunningVm, Server) {
    let image = image(scratch);
    let socket = scratch.path("socket");
    let server = Server::start(&format!("unix:{}", socket.display()), &[("image", &image)]);
    let vm = Vm::default()
        .memory(&format!(
            "source={},source-timeout=100s,source-delay=3ms",
            server.url()
        ))
        .command_line(&format!(
            "workload=tasks tasks=64 faulting=64 seed={SEED} order=random {options}"
        ))
        .start();
    vm.wait_for_output("async_page_faults=");
    server.signal(Signal::STOP);
    (vm, server)
}

/// KVM's workers still wait for pages.
#[test]
fn a_vm_that_waits_for_pages_is_stopped() {
    need!(tests::host::kvm());
    let mut random = Random::seeded();
    for signal in [Signal::TERM, Signal::TERM, Signal::KILL] {
        let scratch = Scratch::new();
        let (vm, server) = with_stopped_server(&scratch, "patience=100");
        vm.wait_for_exit(random.moment(Duration::from_millis(500)));
        vm.signal(signal);
        assert!(vm.wait_for_exit(Duration::from_secs(10)), "it does not end");
        let vm = vm.finish();
        if signal == Signal::TERM {
            vm.assert_code(0);
            assert_eq!(vm.stderr, "");
        }
        server.kill();
    }
}

/// The guest's watchdog: a token that does not come is named, and is no hang. The VM ends with its faults still unanswered.
#[test]
fn a_lost_wake_up_is_named_and_ends_the_guest() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let (vm, server) = with_stopped_server(&scratch, "patience=1");
    let vm = vm.finish();
    vm.assert_code(65);
    let line = vm.line("lost_token=");
    assert!(line.contains(" parked="), "{line}");
    vm.line("result=failed");
    server.kill();
}

#[test]
fn a_lost_source_ends_a_vm_that_waits_for_pages() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = image(&scratch);
    let server = Server::start(
        &format!("unix:{}", scratch.path("socket").display()),
        &[("image", &image)],
    );
    let vm = Vm::default()
        .memory(&format!(
            "source={},source-timeout=500ms,source-delay=3ms",
            server.url()
        ))
        .command_line(&format!(
            "workload=tasks tasks=64 faulting=64 seed={SEED} order=random"
        ))
        .start();
    vm.wait_for_output("async_page_faults=");
    server.kill();
    let vm = vm.finish();
    vm.assert_code(4);
    assert_eq!(vm.report().text("/outcome"), "source-lost");
}
