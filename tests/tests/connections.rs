//! VMs with several connections to their page server, and what becomes of them when servers fail in odd ways.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tests::need;
use tests::program::Program;
use tests::random::Random;
use tests::scratch::Scratch;
use tests::served::assert_nothing_twice;
use tests::server::Server;
use tests::vm::{FinishedVm, RunningVm, Vm};

const SEED: u64 = 47;

/// Pages of 4 KiB in a MiB.
const PAGES: u64 = 256;

/// What is granted to a slow machine with other work to do, beyond the time that something takes by its nature.
const MARGIN: Duration = Duration::from_secs(10);

fn socket(scratch: &Scratch) -> String {
    format!("unix:{}", scratch.path("socket").display())
}

#[track_caller]
fn assert_right(vm: &FinishedVm, mib: u64) {
    vm.assert_code(0);
    vm.line("result=ok");
    let line = vm.line("verified=");
    assert!(line.contains(" wrong=0 "), "{line}");
    let report = vm.report();
    report.assert_sound();
    assert_eq!(report.count("/pages/total"), mib * PAGES);
    assert_eq!(report.count("/pages/duplicate"), 0, "{report}");
}

/// Waits until a VM has this much of its RAM.
fn wait_for_ram(vm: &RunningVm, mib: u64) {
    vm.wait_until("pages arrive", |vm| {
        vm.status_kib("RssShmem").is_some_and(|kib| kib >= mib << 10)
    });
}

#[test]
fn every_page_over_many_connections() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("64M", SEED, "order=random");
    for listen in [&socket(&scratch), "tcp:127.0.0.1:0"] {
        let server = Server::start(listen, &[("base", &image)]);
        for connections in [1, 2, 16] {
            let vm = Vm::default()
                .memory(&format!("source={},fill=sequential", server.url()))
                .memory(&format!("connections={connections},lz4=on"))
                .cpus(2)
                .run();
            vm.assert_ended_well();
            assert_right(&vm, 64);
            let report = vm.report();
            assert_eq!(report.count("/source/reconnects"), 0, "{report}");
            assert_nothing_twice(report, 64);
        }
        let served = server.stop();
        assert_eq!(served.stderr, "");
        // One for demand each, and as many as were asked for. A VM may end before the last is made.
        assert!((3 + 3..=3 + 19).contains(&served.count("channels")), "{served}");
    }
}

#[test]
fn numbers_that_make_no_sense() {
    for (memory, words) in [
        ("connections=0", &["connections=0", "1 to 16"][..]),
        ("connections=17", &["connections=17", "1 to 16"]),
        ("connections=many", &["connections=many"]),
        ("connections=1,connections=2", &["connections", "more than once"]),
        ("lz4=yes", &["lz4=yes", "on or off"]),
    ] {
        Vm::default()
            .memory(&format!("source=unix:a,{memory}"))
            .run()
            .assert_error(2, words);
    }
    Program::umem(["run", "--memory", "tls-dir="])
        .run()
        .assert_error(2, &["tls-dir"]);
}

#[test]
fn many_connections_to_a_server_killed_and_restarted_at_any_moment() {
    need!(tests::host::kvm());
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("128M", SEED, "order=random");
    let in_time = (0..10).any(|_| {
        let mut server = Server::start(&socket(&scratch), &[("base", &image)]);
        let vm = Vm::default()
            .memory(&format!("source={},source-timeout=300s", server.url()))
            .memory("fill=sequential,connections=8")
            .cpus(2)
            .start();
        wait_for_ram(&vm, 4);
        for _ in 0..4 {
            let moment = random.moment(Duration::from_millis(100));
            println!("killed after {moment:?}");
            if vm.wait_for_exit(moment) {
                break;
            }
            let url = server.url().to_owned();
            // Every other time in order, with what was asked still answered.
            if random.below(2) == 0 {
                server.kill();
            } else {
                server.stop();
            }
            server = Server::start(&url, &[("base", &image)]);
        }
        let vm = vm.finish();
        assert_right(&vm, 128);
        let reconnects = vm.report().count("/source/reconnects");
        println!("connected anew {reconnects} times");
        reconnects > 8
    });
    assert!(in_time, "every moment was too late");
}

/// Stops a server's process, which keeps its connections and says nothing, when the VM has this much of its RAM.
fn freeze(servers: &[&Server], timeout: Duration) -> (FinishedVm, Duration) {
    let vm = servers
        .iter()
        .fold(Vm::default(), |vm, server| {
            vm.memory(&format!("source={}", server.url()))
        })
        .memory(&format!(
            "source-timeout={}ms,fill=sequential",
            timeout.as_millis()
        ))
        .cpus(2)
        .start();
    wait_for_ram(&vm, 8);
    servers[0].signal(Signal::STOP);
    let since = Instant::now();
    let vm = vm.finish();
    servers[0].signal(Signal::CONT);
    (vm, since.elapsed())
}

#[test]
fn a_frozen_server_is_noticed_within_the_time_out() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("256M", SEED, "order=random");
    let timeout = Duration::from_secs(1);
    let in_time = (0..10).any(|_| {
        let server = Server::start(&socket(&scratch), &[("base", &image)]);
        let (vm, elapsed) = freeze(&[&server], timeout);
        if vm.code() == Some(0) {
            return false;
        }
        assert_eq!(vm.code(), Some(4), "{}{}", vm.stdout, vm.stderr);
        assert_eq!(vm.report().text("/outcome"), "source-lost");
        let last = vm.stderr.lines().last().unwrap_or_default();
        assert!(
            last.contains("no page server was reached") && last.contains("for 1 s"),
            "{last}"
        );
        assert!(elapsed < 3 * timeout + MARGIN / 2, "{elapsed:?}");
        true
    });
    assert!(in_time, "the server was stopped too late each time");
}

#[test]
fn another_server_takes_over_from_a_frozen_one() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("256M", SEED, "order=random");
    let in_time = (0..10).any(|_| {
        let first = Server::start(&socket(&scratch), &[("base", &image)]);
        let second = Server::start("tcp:127.0.0.1:0", &[("base", &image)]);
        let (vm, elapsed) = freeze(&[&first, &second], Duration::from_secs(2));
        assert_right(&vm, 256);
        println!("{elapsed:?}");
        second.stop().count("pages") > 0
    });
    assert!(in_time, "the server was stopped too late each time");
}

/// A page that is damaged at one server comes from the other one.
#[test]
fn a_damaged_image_is_made_good_by_another_server() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let good = scratch.fingerprinted("32M", SEED, "order=random");
    let copy = scratch.path("copy");
    std::fs::copy(&good, &copy).unwrap();
    tests::scratch::flip_bit(&copy, 20 << 20, 3);
    let damaged = Server::start(&socket(&scratch), &[("base", &copy)]);
    let sound = Server::start("tcp:127.0.0.1:0", &[("base", &good)]);
    for fill in ["off", "sequential"] {
        let vm = Vm::default()
            .memory(&format!(
                "source={},source={},fill={fill}",
                damaged.url(),
                sound.url()
            ))
            .run();
        assert_right(&vm, 32);
        assert!(
            vm.stderr.contains("checksum") || vm.stderr.contains("corrupt"),
            "{}",
            vm.stderr
        );
    }
    damaged.stop();
    sound.stop();
}

/// `#` separates the image's name, and may be in the path all the same.
#[test]
fn a_socket_path_may_have_any_character() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("16M", SEED, "order=random");
    let path = scratch.path("a#b");
    let listen = format!("unix:{}", path.display());
    let server = Server::start(&listen, &[("base", &image)]);
    for name in ["", "base"] {
        let vm = Vm::default().memory(&format!("source={listen}#{name}")).run();
        vm.assert_ended_well();
        assert_right(&vm, 16);
    }
    let served = server.stop();
    assert!(!Path::new(&path).exists(), "the socket stayed");
    assert_eq!(served.count("refused"), 0, "{served}");
}
