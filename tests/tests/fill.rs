//! What is loaded while nobody waits: near the faults, and from recorded working sets.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::path::Path;

use tests::need;
use tests::program::{Finished, Program};
use tests::scratch::Scratch;
use tests::served::{SEED, assert_right_and_quiet, served, socket};
use tests::server::Server;
use tests::vm::Vm;

const TOUCH: &str = "workload=touch pages=1638 order=random seed=7";

/// A VM from `source` whose guest touches a tenth of 64 MiB.
fn toucher(source: &str) -> Vm {
    Vm::default()
        .memory(&format!("source={source}"))
        .command_line(TOUCH)
}

fn umem(args: &[&str]) -> Finished {
    Program::umem(args).run()
}

#[test]
fn every_page_near_the_faults_and_from_a_working_set() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("64M", SEED, "order=random");
    let server = Server::start(&socket(&scratch), &[("base", &image)]);
    let set = scratch.path("set");
    toucher(server.url())
        .option("--record-working-set", &set)
        .run()
        .assert_ended_well();
    let recorded = format!("fill=recorded,working-set={}", set.display());
    for fill in ["fill=near-faults", &recorded, "fill=near-faults,stripes=4"] {
        let vm = served(&[server.url()]).memory(fill).cpus(2).run();
        assert_right_and_quiet(&vm, 64);
        assert!(vm.report().count("/pages/prefetched") > 0, "{}", vm.report());
    }
    server.stop();
}

/// Of what the same work touches again, nearly nothing is waited for.
#[test]
fn a_recorded_working_set_is_there_before_it_is_touched() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("64M", SEED, "order=random");
    let server = Server::start(&socket(&scratch), &[("base", &image)]);
    for source in [format!("file:{}", image.display()), server.url().to_owned()] {
        let set = scratch.path("set");
        let first = toucher(&source).option("--record-working-set", &set).run();
        first.assert_ended_well();
        let touched = first.report().count("/pages/demand");
        assert!(touched > 1600, "{}", first.report());
        let replayed = toucher(&source)
            .memory(&format!("working-set={}", set.display()))
            .run();
        replayed.assert_ended_well();
        let report = replayed.report();
        report.assert_sound();
        // How much is ahead of the guest is a matter of speed, and for a benchmark to say; that the set is loaded, and nothing
        // else, is not.
        assert_eq!(
            report.count("/pages/demand") + report.count("/pages/prefetched"),
            touched,
            "{report}"
        );
        assert!(
            report.count("/pages/prefetched") > report.count("/pages/demand"),
            "{report}"
        );
        std::fs::remove_file(&set).unwrap();
    }
    server.stop();
}

#[test]
fn a_record_ends_in_time_or_with_the_vm() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("32M", SEED, "order=random");
    let set = scratch.path("set");
    // No time at all: a set that is there at once, and has little in it.
    toucher(&format!("file:{}", image.display()))
        .option("--record-working-set", &set)
        .option("--record-for", "0s")
        .run()
        .assert_ended_well();
    let short = std::fs::metadata(&set).unwrap().len();
    toucher(&format!("file:{}", image.display()))
        .option("--record-working-set", &set)
        .run()
        .assert_ended_well();
    assert!(
        std::fs::metadata(&set).unwrap().len() > short.max(1000),
        "after {short}"
    );
}

#[track_caller]
fn refused(args: &[&str], code: i32, words: &str) {
    let finished = umem(&[&["run"], args].concat());
    finished.assert_code(code);
    assert!(finished.stderr.contains(words), "'{words}' is not in: {finished}");
}

#[test]
fn a_working_set_that_does_not_fit_is_refused() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("32M", SEED, "order=random");
    let other = scratch.path("other");
    let set = scratch.path("set");
    let source = |path: &Path| format!("source=file:{}", path.display());
    umem(&[
        "image",
        "create",
        "--memory",
        "32M",
        "--fill",
        "pattern:99",
        "-o",
        &other.display().to_string(),
    ])
    .assert_code(0);
    toucher(&format!("file:{}", image.display()))
        .option("--record-working-set", &set)
        .run()
        .assert_ended_well();
    let replay = |image: &Path, set: &Path| format!("{},working-set={}", source(image), set.display());
    refused(
        &["--memory", &replay(&other, &set)],
        2,
        "was recorded with another image",
    );
    refused(
        &["--memory", &replay(&image, &scratch.path("none"))],
        2,
        "cannot read working set",
    );
    refused(
        &["--memory", &replay(&image, &image)],
        6,
        "this is no working set",
    );
    refused(
        &["--memory", &format!("working-set={}", set.display())],
        2,
        "was recorded with another image",
    );
    let mut bytes = std::fs::read(&set).unwrap();
    bytes[70] ^= 1;
    std::fs::write(&set, &bytes).unwrap();
    refused(
        &["--memory", &replay(&image, &set)],
        6,
        "does not match its checksum",
    );
    std::fs::write(&set, &bytes[..bytes.len() - 5]).unwrap();
    refused(&["--memory", &replay(&image, &set)], 6, "it is damaged");
}

#[test]
fn options_that_do_not_go_together_are_refused() {
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("32M", SEED, "order=random");
    let source = format!("source=file:{}", image.display());
    let set = scratch.path("set").display().to_string();
    let with = |more: &str| format!("{source},{more}");
    refused(&["--memory", &with("fill=recorded")], 2, "needs working-set=FILE");
    refused(
        &["--memory", &with(&format!("fill=sequential,working-set={set}"))],
        2,
        "is for fill=recorded",
    );
    refused(
        &["--memory", &with("stripes=0")],
        2,
        "stripes=0: expected 1 to 64",
    );
    let record = ["--record-working-set", &set];
    refused(
        &[&["--memory", &with("fill=sequential")], &record[..]].concat(),
        2,
        "needs fill=off",
    );
    refused(
        &[&["--memory", &with("hugepages=on")], &record[..]].concat(),
        2,
        "needs hugepages=off",
    );
    refused(&record, 2, "needs an image");
    refused(
        &["--memory", &source, "--record-working-set", "/nonexistent/set"],
        2,
        "cannot write working set '/nonexistent/set'",
    );
}
