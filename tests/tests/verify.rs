//! Guests that prove, page by page, what they received.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use tests::scratch::Scratch;
use tests::vm::{FinishedVm, Vm};
use tests::{need, skip};

const SEED: u64 = 20_26;

/// Pages of 4 KiB in a MiB.
const PAGES: u64 = 256;

/// The most that the guest and what is loaded with it take of RAM that the guest does not verify.
const NOT_VERIFIED: u64 = 4 * PAGES;

/// Checks that the guest has verified nearly all of RAM, and that it got nothing but what was in the image.
#[track_caller]
fn assert_verified(vm: &FinishedVm, mib: u64) {
    vm.assert_ended_well();
    let line = vm.line("verified=");
    assert!(line.contains(" wrong=0 "), "{line}");
    let verified: u64 = line["verified=".len()..]
        .split(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    let total = mib * PAGES;
    assert!(
        verified <= total && verified >= total - NOT_VERIFIED,
        "{verified} of {total}"
    );
    let report = vm.report();
    assert_eq!(report.count("/pages/total"), total);
    assert!(report.arrivals() >= verified, "{report}");
    assert_eq!(report.count("/pages/pushed"), 0, "{report}");
    assert_eq!(report.count("/pages/duplicate"), 0, "{report}");
    // The kernel asks for most pages on behalf of a vCPU that waits.
    assert!(report.count("/source/bytes") >= verified * 4096, "{report}");
}

#[test]
fn every_page_in_random_order() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("256M", SEED, "order=random");
    let vm = Vm::from_image(&image).run();
    assert_verified(&vm, 256);
    let report = vm.report();
    assert_eq!(report.count("/pages/prefetched"), 0, "fill is off: {report}");
    assert_eq!(
        report.count("/demand_fault_us/count"),
        report.count("/pages/demand") + report.count("/pages/zero"),
        "each page was waited for once: {report}"
    );
}

#[test]
fn by_two_and_by_four_cpus() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("64M", SEED, "order=random");
    for cpus in [2, 4] {
        for backing in ["memfd", "anonymous"] {
            let vm = Vm::from_image(&image)
                .memory(&format!("backing={backing}"))
                .cpus(cpus)
                .run();
            assert_verified(&vm, 64);
        }
    }
}

#[test]
fn in_anonymous_memory() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("64M", SEED, "order=seq");
    let vm = Vm::from_image(&image).memory("backing=anonymous").run();
    assert_verified(&vm, 64);
}

#[test]
fn without_firmware() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("64M", SEED, "order=random");
    for cpus in [1, 2, 4] {
        let vm = Vm::from_image(&image)
            .option("--firmware", "none")
            .cpus(cpus)
            .run();
        assert_verified(&vm, 64);
    }
}

#[test]
fn with_checksums_off() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("64M", SEED, "full=off order=random");
    let vm = Vm::from_image(&image).memory("checksums=off").run();
    assert_verified(&vm, 64);
}

#[test]
fn on_huge_pages() {
    need!(tests::host::kvm());
    let free = tests::host::free_huge_pages();
    if free < 32 {
        skip!("needs 32 free huge pages, this host has {free}: sysctl -w vm.nr_hugepages=64");
    }
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("64M", SEED, "order=random");
    // One after the other: together they would need twice as many.
    for backing in ["memfd", "anonymous"] {
        for cpus in [1, 2] {
            let vm = Vm::from_image(&image)
                .memory(&format!("hugepages=on,backing={backing}"))
                .cpus(cpus)
                .run();
            assert_verified(&vm, 64);
            let report = vm.report();
            assert!(
                report.arrivals().is_multiple_of(2 * PAGES),
                "whole huge pages were installed: {report}"
            );
            assert!(
                report.count("/demand_fault_us/count") <= 32 * u64::from(cpus),
                "{report}"
            );
        }
    }
}

#[test]
fn while_the_rest_is_loaded_in_the_background() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("256M", SEED, "order=random");
    for backing in ["memfd", "anonymous"] {
        for cpus in [1, 2] {
            let vm = Vm::from_image(&image)
                .memory(&format!("fill=sequential,backing={backing}"))
                .cpus(cpus)
                .run();
            assert_verified(&vm, 256);
            let report = vm.report();
            assert!(report.count("/pages/prefetched") > 0, "{report}");
            assert_eq!(report.arrivals(), 256 * PAGES, "nothing is missing: {report}");
            assert!(report.number("/time_to_all_pages_ms") > 0.0, "{report}");
        }
    }
}

/// The fill alone completes RAM, under a guest that needs next to nothing of it and goes on running afterwards.
#[test]
fn the_fill_completes_ram_under_an_idle_guest() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("64M", SEED, "");
    let vm = Vm::from_image(&image)
        .command_line("workload=dirty pages=16 rounds=forever")
        .memory("fill=sequential")
        .start();
    // The kernel's figure for memory of this kind that the process has.
    vm.wait_until("all pages are there", |vm| {
        vm.status_kib("RssShmem").is_some_and(|kib| kib >= 60 << 10)
    });
    let rounds = vm.stdout().lines().count();
    vm.wait_until("the guest goes on", |vm| {
        vm.stdout().lines().count() > rounds + 10
    });
    vm.signal(rustix::process::Signal::TERM);
    let vm = vm.finish();
    vm.assert_code(0);
    assert!(vm.report().count("/pages/prefetched") > 60 * PAGES);
}

/// Without any fill, the last page that is touched completes RAM as well.
#[test]
fn a_guest_that_dirties_all_it_can_keeps_what_it_wrote() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("64M", SEED, "");
    for backing in ["memfd", "anonymous"] {
        for fill in ["off", "sequential"] {
            for cpus in [1, 2] {
                let vm = Vm::from_image(&image)
                    .command_line("workload=dirty pages=all order=random seed=5 rounds=3")
                    .memory(&format!("backing={backing},fill={fill}"))
                    .cpus(cpus)
                    .run();
                vm.assert_ended_well();
                assert!(vm.line("pages=").ends_with(" wrong=0"), "{}", vm.stdout);
                vm.line("round=3 worst_gap_us=");
            }
        }
    }
}

#[test]
fn only_what_is_touched_is_fetched() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("64M", SEED, "");
    let run = |pages: u64| {
        let vm = Vm::from_image(&image)
            .command_line(&format!(
                "workload=touch pages={pages} order=random seed=1 rounds=3"
            ))
            .run();
        vm.assert_ended_well();
        vm.report().arrivals()
    };
    let few = run(16);
    assert!(few < 16 + 200, "starting alone fetched {few} pages");
    let many = run(4016);
    assert_eq!(many - few, 4000);
}

#[test]
fn pages_of_zeros_are_counted_as_such() {
    need!(tests::host::kvm());
    for backing in ["memfd", "anonymous"] {
        let vm = Vm::with_memory("64M")
            .memory(&format!("backing={backing}"))
            .command_line("workload=touch pages=all")
            .run();
        vm.assert_ended_well();
        vm.line("round=1 pages=");
        assert!(vm.line("round=1 ").contains(" sum=0x0 "), "{}", vm.stdout);
        let report = vm.report();
        assert!(report.count("/pages/zero") >= 60 * PAGES, "{report}");
        assert!(report.count("/pages/demand") < 4 * PAGES, "{report}");
    }
}

/// The wrong seed: so `verify` can fail, and says where.
#[test]
fn a_guest_that_expects_something_else_says_so() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("64M", SEED, "");
    let vm = Vm::from_image(&image)
        .command_line("workload=verify seed=1")
        .run();
    vm.assert_code(65);
    vm.line("wrong_page=0x");
    vm.line("result=failed");
}
