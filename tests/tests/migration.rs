//! A VM moves from one instance to another while its guest works, in every mode, and nothing of it is lost or there twice.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::time::Duration;

use tests::certificates::Authority;
use tests::moving::{
    Instance, MODES, assert_migrated, assert_not_moved, assert_one_guest, guest_output, listen, worst_gap_us,
};
use tests::need;
use tests::program::Program;
use tests::proxy::{Plan, Proxy};
use tests::scratch::Scratch;
use tests::server::Server;
use tests::vm::{FinishedVm, Vm};

/// Of 8 MiB of 32.
const PAGES: u64 = 2048;

fn small(cpus: u32) -> Vm {
    Vm::with_memory("32M").cpus(cpus)
}

/// A guest that comes to its end a few seconds later. Two vCPUs wait for each other at the end of each round, which takes as long as ten
/// rounds of one where there are not two CPUs for them.
fn ending(vm: Vm, cpus: u32) -> Instance {
    Instance::dirty(vm.cpus(cpus), PAGES, if cpus == 1 { "600" } else { "120" })
}

/// Checks a guest that ended well where it arrived.
#[track_caller]
fn assert_arrived(vm: &FinishedVm, mode: &str) {
    vm.assert_code(0);
    vm.line("result=ok");
    let report = vm.report();
    assert_eq!(report.text("/outcome"), "guest-exit", "{report}");
    assert_eq!(report.text("/migration/mode"), mode, "{report}");
    assert!(report.number("/migration/downtime_ms") > 0.0, "{report}");
    assert_eq!(report.arrivals(), report.count("/pages/total"), "{report}");
    if mode == "precopy" {
        assert_eq!(report.count("/pages/demand"), 0, "{report}");
    }
}

/// Moves a VM to an instance that waits at `listen`, to the guest's end there.
#[track_caller]
fn move_and_end(source: Instance, destination: Instance, mode: &str, options: &str) -> FinishedVm {
    let sent = source
        .send(&destination.url, &format!(",memory_mode={mode}{options}"))
        .finish();
    sent.assert_code(0);
    let source = source.finish();
    assert_migrated(&source, mode);
    destination.wait_for_progress();
    let destination = destination.finish();
    assert_arrived(&destination, mode);
    assert_one_guest(&[guest_output(&source.stdout), guest_output(&destination.stdout)]);
    destination
}

fn every_mode(transport: &str) {
    let scratch = Scratch::new();
    for mode in MODES {
        for cpus in [1, 2] {
            println!("{mode}, {cpus} vCPUs");
            let source = ending(Vm::with_memory("32M"), cpus);
            let destination = Instance::waiting(&listen(&scratch, transport, &format!("{mode}-{cpus}")));
            let options = if cpus == 2 { ",connections=3" } else { "" };
            move_and_end(source, destination, mode, options);
        }
    }
}

#[test]
fn every_mode_over_unix_sockets() {
    need!(tests::host::kvm());
    every_mode("unix");
}

#[test]
fn every_mode_over_tcp() {
    need!(tests::host::kvm());
    every_mode("tcp");
}

#[test]
fn into_anonymous_memory() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    for mode in MODES {
        let source = ending(Vm::with_memory("32M").memory("backing=anonymous"), 1);
        let waiting = Vm::arriving(&listen(&scratch, "unix", mode)).memory("backing=anonymous");
        move_and_end(source, Instance::waiting_with(waiting), mode, "");
    }
}

#[test]
fn onto_huge_pages() {
    need!(tests::host::kvm());
    // Two VMs at most at a time, one of them on huge pages.
    if tests::host::free_huge_pages() < 32 {
        tests::skip!("fewer than 32 huge pages are free");
    }
    let scratch = Scratch::new();
    for mode in MODES {
        let source = ending(Vm::with_memory("32M"), 2);
        let waiting = Vm::arriving(&listen(&scratch, "unix", mode)).memory("hugepages=on");
        move_and_end(source, Instance::waiting_with(waiting), mode, "");
    }
}

/// Pages that the VM has not loaded itself are fetched by the instance that it leaves, and by no other.
#[test]
fn with_pages_of_its_first_image_absent() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let created = scratch
        .create("image", "32M")
        .args(["--fill", "pattern:3", "--cmdline"])
        .arg(format!("workload=dirty pages={PAGES} rounds=600"))
        .run();
    created.assert_code(0);
    let image = scratch.path("image");
    let server = Server::start(&listen(&scratch, "unix", "server"), &[("base", &image)]);
    for mode in MODES {
        for url in [format!("file:{}", image.display()), server.url().to_owned()] {
            let source = Instance::running(Vm::default().memory(&format!("source={url},fill=off")));
            let pages = source.info().unwrap();
            let absent = pages["pages"]["absent"].as_u64();
            assert!(absent.is_none_or(|absent| absent > 1000), "{pages:#}");
            let waiting = Vm::arriving("tcp:127.0.0.1:0");
            let destination = move_and_end(source, Instance::waiting_with(waiting), mode, "");
            // All of RAM has come, what no guest has touched too.
            let report = destination.report();
            assert!(
                report.arrivals() - report.count("/pages/zero") > 3 * PAGES,
                "{report}"
            );
        }
    }
    server.stop();
}

/// To and fro, in each mode in turn, without a restart of the guest. `UMEM_TEST_ROUNDS` is how often.
#[test]
fn to_and_fro() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let mut instance = Instance::dirty(small(2), PAGES, "forever");
    let mut outputs = Vec::new();
    for round in 0..tests::random::rounds(6) {
        let mode = MODES[(round % 3) as usize];
        let transport = ["unix", "tcp"][(round / 3 % 2) as usize];
        let next = Instance::waiting(&listen(&scratch, transport, &format!("{round}")));
        let options = format!(",memory_mode={mode},wait=on");
        instance.send(&next.url, &options).finish().assert_code(0);
        let left = instance.finish();
        assert_migrated(&left, mode);
        outputs.push(guest_output(&left.stdout));
        next.wait_for_progress();
        instance = next;
    }
    outputs.push(guest_output(&instance.stop().stdout));
    assert_one_guest(&outputs);
}

/// Half of its memory is written to as fast as can be, while it moves over and over again: 32 MiB a few times, or, where
/// `UMEM_TEST_ROUNDS` says how often in each mode, 512 MiB. What the guest saw of it is shown beside what the program says.
#[test]
fn at_full_speed() {
    need!(tests::host::kvm());
    let times = tests::random::number("UMEM_TEST_ROUNDS");
    let (memory, pages) = if times.is_some() {
        ("1G", 131_072)
    } else {
        ("64M", 8192)
    };
    let scratch = Scratch::new();
    for mode in MODES {
        for cpus in [1, 2] {
            // On an emulated CPU a GiB takes its time.
            let patient = |vm: Vm| vm.patience(Duration::from_mins(10));
            // Nothing is in its memory in the beginning.
            let vm = patient(Vm::with_memory(memory).memory("fill=sequential").cpus(cpus));
            let mut instance = Instance::dirty(vm, pages, "forever");
            let mut outputs = Vec::new();
            let mut figures: [Vec<f64>; 4] = Default::default();
            for _ in 0..times.unwrap_or(2) {
                let next = Instance::waiting_with(patient(Vm::arriving(&listen(&scratch, "tcp", ""))));
                let options = format!(",memory_mode={mode},timeout_s=20,wait=on");
                instance.send(&next.url, &options).finish().assert_code(0);
                let left = instance.finish();
                assert_migrated(&left, mode);
                outputs.push(guest_output(&left.stdout));
                // Those of pages that came after the switch are in it.
                next.wait_for_phase("complete");
                next.wait_for_progress();
                let report = left.report();
                let gaps = worst_gap_us(&next.guest_output()).map(|gap| gap as f64 / 1e3);
                let [downtime, total] =
                    ["downtime_ms", "total_ms"].map(|figure| report.number(&format!("/migration/{figure}")));
                for (figures, figure) in figures.iter_mut().zip([gaps[0], gaps[1], downtime, total]) {
                    figures.push(figure);
                }
                instance = next;
            }
            outputs.push(guest_output(&instance.stop().stdout));
            assert_one_guest(&outputs);
            let [gap, in_round, downtime, total] = figures.map(|mut figures| {
                figures.sort_by(f64::total_cmp);
                let at = |part: f64| figures[((figures.len() - 1) as f64 * part) as usize];
                format!("{:.1} ({:.1}-{:.1})", at(0.5), at(0.0), at(1.0))
            });
            println!(
                "{mode}, vcpus={cpus}, memory={memory}: moves={} worst_gap_ms={gap} in_round_ms={in_round} downtime_ms={downtime} total_ms={total}",
                times.unwrap_or(2)
            );
        }
    }
}

/// A VM that is still arriving is not sent on, or only when it has all pages.
#[test]
fn a_vm_that_is_still_arriving() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let first = Instance::dirty(small(1), PAGES, "forever");
    let second = Instance::waiting_with(Vm::arriving(&listen(&scratch, "unix", "second")).memory("fill=off"));
    let third = Instance::waiting(&listen(&scratch, "unix", "third"));
    let proxy = Proxy::start(&listen(&scratch, "unix", "proxy"), &second.url, Plan::NONE);
    // Pages that the guest does not touch are never asked for.
    let sent = first.send(proxy.url(), ",memory_mode=postcopy");
    second.wait_until("it runs there", |second| second.stdout().contains("round="));
    second.wait_for_progress();
    assert_not_moved(
        second.send(&third.url, ""),
        &["still arriving", "pages are missing"],
    );
    assert_not_moved(
        second.send(&third.url, ",wait=on,timeout_s=1"),
        &["still arriving", "pages are missing"],
    );
    second.wait_for_progress();
    drop(sent);
    let first = first.stop();
    let second = second.stop();
    third.stop();
    assert_one_guest(&[guest_output(&first.stdout), guest_output(&second.stdout)]);
}

#[test]
fn a_vm_that_is_sent_on_when_it_has_arrived() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let first = Instance::dirty(small(1), PAGES, "forever");
    let second = Instance::waiting(&listen(&scratch, "unix", "second"));
    let third = Instance::waiting(&listen(&scratch, "unix", "third"));
    let proxy = Proxy::start(&listen(&scratch, "unix", "proxy"), &second.url, Plan::NONE);
    // Slowly enough that it is sent on while it arrives.
    proxy.throttle(Some(2 << 20));
    let sent = first.send(proxy.url(), ",memory_mode=postcopy");
    second.wait_for_phase("postcopy");
    let on = second.send(&third.url, ",wait=on");
    second.wait_until("it waits for the pages that are missing", |_| {
        second.phase() == "waiting"
    });
    proxy.throttle(None);
    sent.finish().assert_code(0);
    on.finish().assert_code(0);
    third.wait_for_progress();
    let outputs = [first.finish(), second.finish(), third.stop()].map(|vm| guest_output(&vm.stdout));
    assert_one_guest(&outputs);
}

/// A link on which a guest that dirties 8 MiB a few milliseconds long writes more than passes.
fn slow_link(scratch: &Scratch, destination: &Instance) -> Proxy {
    let proxy = Proxy::start(&listen(scratch, "unix", "proxy"), &destination.url, Plan::NONE);
    proxy.throttle(Some(16 << 20));
    proxy
}

#[test]
fn cancelled_before_the_switch() {
    need!(tests::host::kvm());
    for mode in ["precopy", "hybrid"] {
        let scratch = Scratch::new();
        let source = Instance::dirty(small(2), PAGES, "forever");
        let destination = Instance::waiting(&listen(&scratch, "unix", "destination"));
        let proxy = slow_link(&scratch, &destination);
        proxy.throttle(Some(1 << 20));
        let sent = source.send(proxy.url(), &format!(",memory_mode={mode}"));
        source.wait_for_phase("precopy");
        source.api.ctl(&["cancel-migration"]).assert_code(0);
        assert_not_moved(sent, &["was cancelled"]);
        source.wait_for_progress();
        let gone = destination.finish_within(Duration::from_secs(5));
        gone.assert_code(5);
        assert!(gone.stderr.contains("was cancelled"), "{}", gone.stderr);
        assert_eq!(guest_output(&gone.stdout), "");
        // As if nothing had been: it moves.
        let next = Instance::waiting(&listen(&scratch, "unix", "next"));
        source.send(&next.url, "").finish().assert_code(0);
        next.wait_for_progress();
        let outputs = [source.finish(), next.stop()].map(|vm| guest_output(&vm.stdout));
        assert_one_guest(&outputs);
    }
}

#[test]
fn a_guest_that_writes_faster_than_the_link() {
    need!(tests::host::kvm());
    for strategy in ["cancel", "switch"] {
        let scratch = Scratch::new();
        let source = Instance::dirty(small(1), PAGES, "forever");
        let destination = Instance::waiting(&listen(&scratch, "unix", "destination"));
        let proxy = slow_link(&scratch, &destination);
        let options = format!(",memory_mode=precopy,downtime_ms=1,timeout_s=2,timeout_strategy={strategy}");
        let sent = source.send(proxy.url(), &options);
        if strategy == "cancel" {
            assert_not_moved(sent, &["writes faster", "pages were left"]);
            source.wait_for_progress();
            destination.finish_within(Duration::from_secs(5)).assert_code(5);
            assert_one_guest(&[guest_output(&source.stop().stdout)]);
        } else {
            sent.finish().assert_code(0);
            destination.wait_for_progress();
            let source = source.finish();
            assert_migrated(&source, "precopy");
            assert!(
                source.report().count("/migration/rounds") > 1,
                "{}",
                source.report()
            );
            assert_one_guest(&[
                guest_output(&source.stdout),
                guest_output(&destination.stop().stdout),
            ]);
        }
    }
}

/// What a hybrid migration finds to be no use it leaves for after the switch, however fast the guest writes.
#[test]
fn hybrid_always_comes_to_its_end() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let source = Instance::dirty(small(1), PAGES, "forever");
    let destination = Instance::waiting(&listen(&scratch, "unix", "destination"));
    let proxy = slow_link(&scratch, &destination);
    source.send(proxy.url(), "").finish().assert_code(0);
    destination.wait_for_progress();
    let source = source.finish();
    assert_migrated(&source, "hybrid");
    let report = source.report();
    assert!(report.count("/migration/postcopy_bytes") > 0, "{report}");
    assert_one_guest(&[
        guest_output(&source.stdout),
        guest_output(&destination.stop().stdout),
    ]);
}

#[test]
fn over_tls_and_only_with_the_right_certificate() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let authority = Authority::new("CA");
    let here = authority.issue(scratch.path("here"), "127.0.0.1");
    let there = authority.issue(scratch.path("there"), "127.0.0.1");
    let stranger = Authority::new("another CA").issue(scratch.path("stranger"), "127.0.0.1");
    let source = ending(Vm::with_memory("32M"), 2);
    let waiting = Vm::arriving("tcp:127.0.0.1:0").option("--tls-dir", &there);
    let destination = Instance::waiting_with(waiting);
    // Without one, and with one of somebody else's.
    let plain = assert_not_moved(source.send(&destination.url, ""), &[&destination.url]);
    assert!(!plain.stderr.contains("panicked"), "{plain}");
    let options = format!(",tls_dir={}", stranger.display());
    assert_not_moved(source.send(&destination.url, &options), &[&destination.url]);
    source.wait_for_progress();
    // It still waits, for the right one.
    let options = format!(",tls_dir={}", here.display());
    move_and_end(source, destination, "hybrid", &options);
}

#[test]
fn two_senders_at_once() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let first = Instance::dirty(small(1), PAGES, "forever");
    let second = Instance::dirty(small(1), PAGES, "forever");
    let destination = Instance::waiting(&listen(&scratch, "unix", "destination"));
    let proxy = slow_link(&scratch, &destination);
    let sent = first.send(proxy.url(), "");
    first.wait_for_phase("precopy");
    assert_not_moved(second.send(&destination.url, ""), &["busy", "another VM"]);
    second.wait_for_progress();
    proxy.throttle(None);
    sent.finish().assert_code(0);
    destination.wait_for_progress();
    second.wait_for_progress();
    let outputs = [first.finish(), destination.stop()].map(|vm| guest_output(&vm.stdout));
    assert_one_guest(&outputs);
    assert_one_guest(&[guest_output(&second.stop().stdout)]);
}

/// What a VM that is not there, or does not run, is answered.
#[test]
fn what_cannot_be_sent_is_refused() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let source = Instance::dirty(small(1), PAGES, "forever");
    let nobody = format!("unix:{}", scratch.path("nobody").display());
    assert_not_moved(source.send(&nobody, ""), &["cannot connect to", &nobody]);
    source.wait_for_progress();
    // A page server, which speaks the same protocol.
    let image = scratch.image("32M", "workload=hello");
    let server = Server::start(&listen(&scratch, "unix", "server"), &[("base", &image)]);
    assert_not_moved(source.send(server.url(), ""), &["refused"]);
    source.wait_for_progress();
    server.stop();
    source.api.pause();
    let destination = Instance::waiting(&listen(&scratch, "unix", "destination"));
    assert_not_moved(source.send(&destination.url, ""), &["paused"]);
    source.api.resume();
    let no_token = source.api.ctl(&["take-back", "token=0123"]);
    no_token.assert_code(1);
    source.api.ctl(&["cancel-migration"]).assert_code(1);
    // A VM's pages are not for a client of the page service.
    let vm = Program::umem(["run", "--memory"])
        .arg(format!("source={}", destination.url))
        .run();
    assert_ne!(vm.code(), Some(0), "{vm}");
    // Nobody was kept by that.
    source.send(&destination.url, "").finish().assert_code(0);
    destination.wait_for_progress();
    let outputs = [source.finish(), destination.stop()].map(|vm| guest_output(&vm.stdout));
    assert_one_guest(&outputs);
}
