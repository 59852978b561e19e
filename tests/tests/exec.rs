//! `umem exec`: programs in C that open `/dev/ummunotify` or `/dev/umem` and know of nothing else.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::path::{Path, PathBuf};

use tests::need;
use tests::program::Program;
use tests::scratch::Scratch;

/// Compiles the program for a device.
fn compile(scratch: &Scratch, device: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let program = scratch.path(device);
    let gcc = Program::new("gcc")
        .arg("-I")
        .arg(root.join(device).join("include"))
        .arg(root.join("preload/tests").join(format!("{device}.c")))
        .arg("-o")
        .arg(&program)
        .arg("-pthread")
        .run();
    gcc.assert_code(0);
    program
}

#[test]
fn a_program_for_the_device_runs_unmodified() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let device = compile(&scratch, "ummunotify");
    for watcher in ["auto", "kvm", "userfaultfd"] {
        let run = Program::umem(["exec", "--watcher", watcher, "--"])
            .arg(&device)
            .run();
        run.assert_code(0);
        assert_eq!(run.stdout.matches(": ok").count(), 12, "{run}");
    }
    // Its exit code is the command's; the watcher need not be named; and options after the program are its own.
    let run = Program::umem(["exec", "sh", "-c", "exit 7"]).run();
    run.assert_code(7);
}

#[test]
fn a_program_for_the_memory_device_runs_unmodified() {
    let scratch = Scratch::new();
    let device = compile(&scratch, "umem");
    let run = Program::umem(["exec"]).arg(&device).run();
    run.assert_code(0);
    assert_eq!(run.stdout.matches(": ok").count(), 14, "{run}");
}

#[test]
fn what_cannot_be_run_is_named() {
    let run = Program::umem(["exec", "--watcher", "telepathy", "true"]).run();
    run.assert_code(2);
    assert!(run.stderr.contains("there is no watcher \"telepathy\""), "{run}");
    let run = Program::umem(["exec", "--watcher", "userfaultfd", "/there/is/no/such/program"]).run();
    run.assert_code(2);
    assert!(run.stderr.contains("/there/is/no/such/program"), "{run}");
}
