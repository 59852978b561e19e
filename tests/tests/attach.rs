//! VMs whose memory is served by a pager in another process (`umem serve --attach`).

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use tests::api::Api;
use tests::need;
use tests::program::{Finished, Program, Running};
use tests::random::Random;
use tests::scratch::Scratch;
use tests::served::{NOT_VERIFIED, PAGES, SEED, assert_source_lost, wait_for_ram};
use tests::vm::{FinishedVm, Vm};

/// Starts a pager at `socket`, and waits until it takes memory.
fn pager(socket: &Path, image: &Path) -> Running {
    let images = format!("base={}", image.display());
    let attach = format!("unix:{}", socket.display());
    let running = Program::umem(["serve", "--attach", &attach, "--image", &images]).start();
    running.wait_until("it takes memory", |running| {
        running.stdout().contains("attaching at unix:")
    });
    running
}

fn stop(pager: Running) {
    pager.signal(Signal::TERM);
    pager.finish().assert_code(0);
}

fn attached(socket: &Path, timeout: &str) -> Vm {
    Vm::default().memory(&format!(
        "source=attach:{}#base,source-timeout={timeout}",
        socket.display()
    ))
}

#[track_caller]
fn assert_right(vm: &FinishedVm, mib: u64) {
    vm.assert_code(0);
    vm.line("result=ok");
    let verified = vm.line("verified=");
    assert!(verified.contains(" wrong=0 "), "{verified}");
    let report = vm.report();
    report.assert_sound();
    assert_eq!(report.count("/pages/total"), mib * PAGES);
    assert_eq!(report.count("/pages/populated_at_start"), 0);
    assert_eq!(report.count("/pages/duplicate"), 0, "{report}");
    assert!(report.arrivals() >= mib * PAGES - NOT_VERIFIED, "{report}");
    assert!(report.text("/source/url").starts_with("attach:"), "{report}");
}

fn umem(args: &[&str]) -> Finished {
    Program::umem(args).run()
}

#[test]
fn every_page_from_a_pager_in_another_process() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("64M", SEED, "order=random");
    let socket = scratch.path("pager");
    let pager = pager(&socket, &image);
    for memory in [
        "fill=off",
        "fill=sequential",
        "fill=near-faults",
        "stripes=3",
        "backing=anonymous",
        "backing=anonymous,stripes=2,fill=near-faults",
    ] {
        println!("{memory}");
        let vm = attached(&socket, "300s").memory(memory).cpus(2).run();
        vm.assert_ended_well();
        assert_right(&vm, 64);
        assert!(vm.report().count("/demand_fault_us/count") > 0, "{}", vm.report());
    }
    stop(pager);
}

#[test]
fn another_command_line_is_laid_over_what_the_pager_has() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("32M", SEED, "order=random");
    let socket = scratch.path("pager");
    let pager = pager(&socket, &image);
    let vm = attached(&socket, "300s")
        .command_line(&format!("workload=verify pages=all order=seq seed={SEED}"))
        .run();
    vm.assert_ended_well();
    assert_right(&vm, 32);
    stop(pager);
}

/// Killed at any moment and started again, many times: the guest never sees it.
#[test]
fn a_pager_killed_and_restarted_at_any_moment() {
    need!(tests::host::kvm());
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("128M", SEED, "order=random");
    let socket = scratch.path("pager");
    for memory in [
        "fill=off",
        "fill=near-faults",
        "backing=anonymous,fill=sequential,stripes=2",
    ] {
        let in_time = (0..10).any(|_| {
            let mut running = pager(&socket, &image);
            let vm = attached(&socket, "300s").memory(memory).cpus(2).start();
            // Of either backing; the process itself takes less.
            vm.wait_until("pages arrive", |vm| {
                let kib = |key| vm.status_kib(key).unwrap_or(0);
                kib("RssShmem") + kib("RssAnon") >= 12 << 10
            });
            let mut kills = 0;
            while kills < 8 {
                let moment = random.moment(Duration::from_millis(100));
                if vm.wait_for_exit(moment) {
                    break;
                }
                running.signal(Signal::KILL);
                running.finish();
                vm.wait_for_exit(random.moment(Duration::from_millis(20)));
                running = pager(&socket, &image);
                kills += 1;
                println!("{memory}: killed after {moment:?}");
            }
            let vm = vm.finish();
            assert_right(&vm, 128);
            stop(running);
            kills > 1 && vm.report().count("/source/reconnects") > 1
        });
        assert!(in_time, "{memory}: every moment was too late");
    }
}

#[test]
fn a_pager_that_is_gone_for_good_ends_the_vm_in_time() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("128M", SEED, "order=random");
    let socket = scratch.path("pager");
    let running = pager(&socket, &image);
    let vm = attached(&socket, "500ms").start();
    wait_for_ram(&vm, 4);
    running.signal(Signal::KILL);
    running.finish();
    assert_source_lost(&vm.finish(), &["no pager was found at attach:", "for 0.5 s"]);
}

/// It is not gone, so no other may take its place; but nobody waits for it longer than was said.
#[test]
fn a_pager_that_is_frozen_ends_the_vm_in_time() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("128M", SEED, "order=random");
    let socket = scratch.path("pager");
    let running = pager(&socket, &image);
    let vm = attached(&socket, "2s").start();
    wait_for_ram(&vm, 4);
    running.signal(Signal::STOP);
    assert_source_lost(&vm.finish(), &["no pager was found at attach:", "for 2 s"]);
    running.signal(Signal::CONT);
    stop(running);
}

#[test]
fn what_cannot_be_attached_is_said() {
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("32M", SEED, "order=random");
    let socket = scratch.path("pager");
    let at = |rest: &str| format!("source=attach:{}{rest}", socket.display());
    let nobody = umem(&["run", "--memory", &at("")]);
    nobody.assert_code(4);
    assert!(
        nobody.stderr.contains("cannot connect to the pager at attach:"),
        "{nobody}"
    );
    let images = format!("base={}", image.display());
    let tcp = umem(&["serve", "--attach", "tcp:127.0.0.1:0", "--image", &images]);
    tcp.assert_code(2);
    assert!(tcp.stderr.contains("--attach is for Unix sockets"), "{tcp}");
    let running = pager(&socket, &image);
    let unknown = umem(&["run", "--memory", &at("#other")]);
    unknown.assert_code(2);
    assert!(
        unknown.stderr.contains("no image 'other' here; there are: base"),
        "{unknown}"
    );
    let record = scratch.path("set").display().to_string();
    let recorded = umem(&["run", "--memory", &at("#base"), "--record-working-set", &record]);
    recorded.assert_code(2);
    // Somebody who does not know how to talk disturbs nobody.
    let mut garbage = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    std::io::Write::write_all(&mut garbage, &[0xff; 100]).unwrap();
    drop(garbage);
    stop(running);
}

/// This process cannot ask for what only the pager has, so there is a snapshot when all pages are there, and a clear word before.
#[test]
fn a_snapshot_waits_for_all_pages() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = tests::snapshot::make_image(&scratch, "24M", tests::snapshot::DIRTY);
    let socket = scratch.path("pager");
    let pager = pager(&socket, &image);
    let directory = scratch.path("snapshot");
    let destination = format!("destination_url=file:{}", directory.display());

    let (vm, api) = Api::start_until(attached(&socket, "300s").cpus(2), "round=2 ");
    let refused = api.ctl(&["snapshot", &destination]);
    refused.assert_code(1);
    for words in ["pages are not loaded yet", "fill=sequential", "all-pages-present"] {
        assert!(refused.stderr.contains(words), "{refused}");
    }
    assert!(!directory.exists());
    let before = vm.stdout().len();
    vm.wait_until("it goes on", |vm| vm.stdout()[before..].contains("round="));
    api.shutdown();
    vm.finish().assert_code(0);

    let (vm, api) = Api::start(attached(&socket, "300s").memory("fill=sequential").cpus(2));
    let mut events = api.events();
    if api.info()["pages"]["absent"] != 0 {
        events.wait_for("memory", "all-pages-present");
    }
    vm.wait_for_output("round=2 ");
    // Nobody is needed for it any more.
    stop(pager);
    api.ctl(&["snapshot", &format!("{destination},then=stop")])
        .assert_code(0);
    vm.finish().assert_code(0);
    tests::snapshot::assert_goes_on(&directory, &[]);
}
