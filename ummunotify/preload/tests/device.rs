//! A program in C that opens `/dev/ummunotify` and knows of nothing else, with this library before it.

#![allow(clippy::unwrap_used)] // a test's helpers panic as its tests do

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ummunotify::{Choice, Notifier, WatcherKind};

const ENODEV: i32 = 19;

/// The library, beside this program or a directory above: cargo puts it into either.
fn library() -> PathBuf {
    let program = std::env::current_exe().unwrap();
    let mut directories = program.ancestors().skip(1).take(2);
    directories
        .find_map(|directory| {
            let library = directory.join("libummunotify_preload.so");
            library.exists().then_some(library)
        })
        .unwrap()
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Compiles a program, unless there is no compiler.
fn compile(test: &str, directory: &Path) -> Option<PathBuf> {
    let program = directory.join("device");
    let output = Command::new("gcc")
        .args([
            "-std=c17",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-O2",
            "-D_FORTIFY_SOURCE=2",
            "-pthread",
        ])
        .arg("-I")
        .arg(source("../include"))
        .arg(source("tests/device.c"))
        .arg("-o")
        .arg(&program)
        .output();
    match output {
        Ok(output) => {
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
            Some(program)
        }
        Err(error) => {
            println!("skipped: {test}: no gcc: {error}");
            None
        }
    }
}

fn run(program: &Path, watcher: &str, arguments: &[&str]) -> Output {
    Command::new("timeout")
        .arg("60")
        .arg("env")
        .arg(format!("LD_PRELOAD={}", library().display()))
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
    let Some(program) = compile(test, directory.path()) else {
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
    every_part_works("device::every_part_works_with_kvm", WatcherKind::Kvm);
}

#[test]
fn every_part_works_with_userfaultfd() {
    every_part_works(
        "device::every_part_works_with_userfaultfd",
        WatcherKind::Userfaultfd,
    );
}

/// There is no page to map, and the program is told so; everything else works.
#[test]
fn every_part_works_with_perf_but_the_page() {
    let test = "device::every_part_works_with_perf_but_the_page";
    if let Err(error) = Notifier::open(Choice::Only(WatcherKind::Perf)) {
        println!("skipped: {test}: {error}");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let Some(program) = compile(test, directory.path()) else {
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
    let Some(program) = compile("device::a_watcher_that_there_is_not_is_named", directory.path()) else {
        return;
    };
    let output = run(&program, "telepathy", &["registering"]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("there is no watcher \"telepathy\""), "{text}");
}
