//! A program in C that opens `/dev/ummunotify` and knows of nothing else, with this library before it.

#![allow(clippy::unwrap_used)] // a test's helpers panic as its tests do

mod common;

use std::path::Path;
use std::process::{Command, Output};

use ummunotify::{Choice, Notifier, WatcherKind};

const ENODEV: i32 = 19;

fn run(program: &Path, watcher: &str, arguments: &[&str]) -> Output {
    Command::new("timeout")
        .arg("60")
        .arg("env")
        .arg(format!("LD_PRELOAD={}", common::library().display()))
        .arg(format!("UMMUNOTIFY_WATCHER={watcher}"))
        .arg(program)
        .args(arguments)
        .output()
        .unwrap()
}

/// Parts of the program.
const PARTS: usize = 12;

fn every_part_works(test: &str, kind: WatcherKind) {
    if let Err(error) = Notifier::open(Choice::Only(kind)) {
        println!("skipped: {test}: {error}");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let Some(program) = common::compile(test, directory.path(), "ummunotify") else {
        return;
    };
    let output = run(&program, &kind.to_string(), &[]);
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{:?}", output.status);
    assert_eq!(text.matches(": ok").count(), PARTS);
}

#[test]
fn every_part_works_with_kvm() {
    every_part_works("ummunotify::every_part_works_with_kvm", WatcherKind::Kvm);
}

#[test]
fn every_part_works_with_userfaultfd() {
    every_part_works(
        "ummunotify::every_part_works_with_userfaultfd",
        WatcherKind::Userfaultfd,
    );
}

/// There is no page to map, and the program is told so; everything else works.
#[test]
fn every_part_works_with_perf_but_the_page() {
    let test = "ummunotify::every_part_works_with_perf_but_the_page";
    if let Err(error) = Notifier::open(Choice::Only(WatcherKind::Perf)) {
        println!("skipped: {test}: {error}");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let Some(program) = common::compile(test, directory.path(), "ummunotify") else {
        return;
    };
    let parts = "registering bad-buffers waiting interrupted signals duplicates many forked";
    for part in parts.split(' ') {
        let output = run(&program, "perf", &[part]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{part}: {text}");
    }
    let output = run(&program, "perf", &["events"]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    let no_device = format!("counter != MAP_FAILED: errno {ENODEV}");
    assert!(text.contains(&no_device), "{text}");
}

#[test]
fn a_watcher_that_there_is_not_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let Some(program) = common::compile(
        "ummunotify::a_watcher_that_there_is_not_is_named",
        directory.path(),
        "ummunotify",
    ) else {
        return;
    };
    let output = run(&program, "telepathy", &["registering"]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("there is no watcher \"telepathy\""), "{text}");
}
