//! Ends that come from outside, at any moment: nothing may be left behind, and nothing may be half there.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tests::need;
use tests::program::Program;
use tests::random::Random;
use tests::scratch::Scratch;
use tests::vm::Vm;

const ROUNDS: usize = 25;

fn elapsed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

fn assert_sound(image: &Path) {
    Program::umem(["image", "verify"]).arg(image).run().assert_code(0);
}

#[test]
fn image_create_killed_at_any_moment_leaves_a_whole_image_or_none() {
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    // Where a program that makes temporary files would make them.
    let temporary = Scratch::new();
    let create = || {
        scratch
            .create("image", "64M")
            .args(["--fill", "pattern:1"])
            .current_dir(temporary.directory())
            .env("TMPDIR", temporary.directory())
    };
    let longest = elapsed(|| create().run().assert_code(0));
    std::fs::remove_file(scratch.path("image")).unwrap();
    let mut killed = 0;
    for _ in 0..ROUNDS {
        let moment = random.moment(longest);
        println!("after {moment:?}");
        let running = create().start();
        running.wait_for_exit(moment);
        running.signal(Signal::KILL);
        let finished = running.finish();
        match scratch.names().as_slice() {
            [] => {
                assert_eq!(finished.signal(), Some(Signal::KILL.as_raw()), "{finished}");
                killed += 1;
            }
            [name] if name == "image" => {
                assert_sound(&scratch.path("image"));
                std::fs::remove_file(scratch.path("image")).unwrap();
            }
            names => panic!("left behind: {names:?}"),
        }
        assert_eq!(temporary.names(), [""; 0]);
    }
    assert!(killed > 0, "every moment was too late");
}

/// The old image, the new one, or (for the length of one system call) none; never a part of one.
#[test]
fn image_create_force_killed_at_any_moment_leaves_a_whole_image() {
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let create = || {
        scratch
            .create("image", "32M")
            .args(["--force", "--fill", "pattern:1"])
    };
    let longest = elapsed(|| create().run().assert_code(0));
    let mut killed = 0;
    for _ in 0..ROUNDS {
        let moment = random.moment(longest);
        println!("after {moment:?}");
        let running = create().start();
        running.wait_for_exit(moment);
        running.signal(Signal::KILL);
        killed += u32::from(running.finish().signal().is_some());
        let names = scratch.names();
        assert!(names.is_empty() || names == ["image"], "left behind: {names:?}");
        if !names.is_empty() {
            assert_sound(&scratch.path("image"));
        }
    }
    assert!(killed > 0, "every moment was too late");
}

#[test]
fn a_vm_killed_at_any_moment_leaves_nothing() {
    need!(tests::host::kvm());
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("64M", 4, "order=random");
    let temporary = Scratch::new();
    let longest = elapsed(|| Vm::from_image(&image).run().assert_ended_well());
    let mut killed = 0;
    for round in 0..ROUNDS {
        let backing = ["memfd", "anonymous"][round % 2];
        let fill = ["off", "sequential"][round / 2 % 2];
        let moment = random.moment(longest);
        println!("{backing}, {fill}, after {moment:?}");
        let vm = Vm::from_image(&image)
            .memory(&format!("backing={backing},fill={fill}"))
            .cpus(2)
            .start_with(|program| {
                program
                    .current_dir(temporary.directory())
                    .env("TMPDIR", temporary.directory())
            });
        vm.wait_for_exit(moment);
        vm.signal(Signal::KILL);
        // It finds no process, and beside the report nothing.
        let vm = vm.finish();
        if vm.signal().is_some() {
            killed += 1;
        } else {
            vm.assert_ended_well();
        }
        assert_eq!(scratch.names(), ["image"]);
        assert_eq!(temporary.names(), [""; 0]);
    }
    assert!(killed > 0, "every moment was too late");
    assert_sound(&image);
}

/// A clean stop, whatever the VM is doing: starting, waiting for pages, ending.
#[test]
fn a_vm_stopped_at_any_moment_ends_cleanly() {
    need!(tests::host::kvm());
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("64M", 4, "order=random");
    let longest = elapsed(|| Vm::from_image(&image).run().assert_ended_well());
    let mut stopped = 0;
    for round in 0..ROUNDS {
        let signal = [Signal::TERM, Signal::INT][round % 2];
        let memory = ["fill=off", "fill=sequential", "backing=anonymous"][round % 3];
        let moment = random.moment(longest);
        println!("{signal:?}, {memory}, after {moment:?}");
        let vm = Vm::from_image(&image).memory(memory).cpus(2).start();
        vm.wait_for_exit(moment);
        vm.signal(signal);
        let vm = vm.finish();
        if vm.signal().is_some() {
            // Before it had prepared for it: then the signal does what it always does.
            assert_eq!(vm.signal(), Some(signal.as_raw()), "{}", vm.stderr);
            assert!(!vm.has_report() && vm.stdout.is_empty(), "{}", vm.stdout);
            continue;
        }
        vm.assert_code(0);
        assert_eq!(vm.stderr, "");
        match vm.report().text("/outcome") {
            "stopped" => stopped += 1,
            "guest-exit" => vm.assert_ended_well(),
            other => panic!("{other}"),
        }
    }
    assert!(stopped > 0, "every moment was too early or too late");
}

#[test]
fn signals_stop_a_vm_that_would_run_for_ever() {
    need!(tests::host::kvm());
    for signal in [Signal::TERM, Signal::INT] {
        for cpus in [1, 4] {
            let vm = Vm::with_memory("64M")
                .cpus(cpus)
                .command_line("workload=dirty pages=512 rounds=forever")
                .start();
            vm.wait_for_output("round=10 ");
            vm.signal(signal);
            let vm = vm.finish();
            vm.assert_code(0);
            assert_eq!(vm.stderr, "");
            let report = vm.report();
            assert_eq!(report.text("/outcome"), "stopped");
            assert!(!report.has("/guest_exit"), "{report}");
            report.assert_sound();
        }
    }
}

/// Whoever cannot wait for a clean stop repeats the signal. It must not hang.
#[test]
fn many_signals_are_as_good_as_one() {
    need!(tests::host::kvm());
    let vm = Vm::with_memory("64M")
        .command_line("workload=dirty pages=512 rounds=forever")
        .start();
    vm.wait_for_output("round=3 ");
    for _ in 0..20 {
        vm.signal(Signal::INT);
        vm.signal(Signal::TERM);
    }
    let vm = vm.finish();
    vm.assert_code(0);
    assert_eq!(vm.report().text("/outcome"), "stopped");
}

#[test]
fn a_report_replaces_an_old_one() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let report = scratch.file("report.json", b"old");
    Program::umem(["run", "--report"])
        .arg(&report)
        .run()
        .assert_code(0);
    let text = std::fs::read_to_string(report).unwrap();
    assert!(text.contains("\"guest-exit\""), "{text}");
}
