//! VMs whose RAM comes from page servers, and what must hold of their endings.

use std::time::Duration;

use crate::scratch::{PAGE_SIZE, Scratch};
use crate::vm::{FinishedVm, Report, RunningVm, Vm};

/// The seed of the images' pattern.
pub const SEED: u64 = 41;

/// Pages of 4 KiB in a MiB.
pub const PAGES: u64 = 256;

/// The most that the guest and what is loaded with it take of RAM that the guest does not verify.
pub const NOT_VERIFIED: u64 = 4 * PAGES;

/// What is granted to a slow machine with other work to do, beyond the time that something takes by its nature.
pub const MARGIN: Duration = Duration::from_secs(10);

/// Ways to fill RAM.
pub const FILLS: [&str; 2] = ["off", "sequential"];

/// A VM whose RAM comes from these servers, which it looks for longer than any test takes.
pub fn served(urls: &[&str]) -> Vm {
    let vm = urls
        .iter()
        .fold(Vm::default(), |vm, url| vm.memory(&format!("source={url}")));
    vm.memory("source-timeout=300s")
}

/// A Unix socket in the directory.
pub fn socket(scratch: &Scratch) -> String {
    format!("unix:{}", scratch.path("socket").display())
}

/// Checks that the guest has verified nearly all of RAM and found every page right, each of which came once. The VM may have
/// said that it lost its server.
#[track_caller]
pub fn assert_right(vm: &FinishedVm, mib: u64) {
    vm.assert_code(0);
    vm.line("result=ok");
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
    assert_eq!(report.text("/outcome"), "guest-exit");
    report.assert_sound();
    assert_eq!(report.count("/pages/total"), total);
    assert_eq!(report.count("/pages/duplicate"), 0, "{report}");
    assert_eq!(report.count("/pages/pushed"), 0, "{report}");
    assert!(report.arrivals() >= verified, "{report}");
    assert!(report.count("/source/bytes") >= verified * PAGE_SIZE, "{report}");
    assert!(report.count("/source/requests") > 0, "{report}");
}

/// The same, where no connection was lost and nothing is to be said.
#[track_caller]
pub fn assert_right_and_quiet(vm: &FinishedVm, mib: u64) {
    vm.assert_ended_well();
    assert_right(vm, mib);
    let report = vm.report();
    assert_eq!(report.count("/source/reconnects"), 0, "{report}");
    assert_nothing_twice(report, mib);
}

/// Checks that of `mib` MiB nothing came twice, but for pages that somebody waited for while a fill was fetching them.
#[track_caller]
pub fn assert_nothing_twice(report: &Report, mib: u64) {
    let joined = "/fault_classes_us/joined/count";
    let again = if report.has(joined) {
        report.count(joined)
    } else {
        0
    };
    assert!(
        report.count("/source/bytes") <= (mib * PAGES + again) * PAGE_SIZE,
        "something came twice: {report}"
    );
}

/// Checks that the VM ended because its source was lost, and that no page was a wrong one.
#[track_caller]
pub fn assert_source_lost(vm: &FinishedVm, words: &[&str]) {
    assert_eq!(vm.code(), Some(4), "{}{}", vm.stdout, vm.stderr);
    let last = vm.stderr.lines().last().unwrap_or_default();
    for word in words {
        assert!(last.contains(word), "'{word}' is not in the message: {last}");
    }
    assert!(!vm.stdout.contains("wrong_page="), "{}", vm.stdout);
    assert!(!vm.stdout.contains("verified="), "{}", vm.stdout);
    let report = vm.report();
    assert_eq!(report.text("/outcome"), "source-lost");
    assert!(report.text("/error").contains(words[0]), "{report}");
    assert_eq!(report.count("/pages/duplicate"), 0, "{report}");
}

/// Waits until a VM has this much of its RAM.
pub fn wait_for_ram(vm: &RunningVm, mib: u64) {
    vm.wait_until("pages arrive", |vm| {
        vm.status_kib("RssShmem").is_some_and(|kib| kib >= mib << 10)
    });
}
