//! `scripts/nested-kvm`: what goes in and comes out, and every way in which it ends.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::fs;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use tests::need;
use tests::program::{Program, umem};
use tests::scratch::Scratch;

/// What a machine takes that has nothing to do, where this one has much to do.
const PATIENCE: Duration = Duration::from_mins(5);

/// Whether the machine can be emulated here, or else why not.
fn emulator() -> Result<(), String> {
    tests::host::succeeds("qemu-system-x86_64", &["--version"])?;
    tests::host::succeeds("dpkg-deb", &["--version"])
}

/// The script in `scratch`, where its temporary files go too, with the program under test.
fn nested_kvm(scratch: &Scratch, args: &[&str]) -> Program {
    let temporary = scratch.path("temporary");
    let directory = scratch.path("directory");
    for path in [&temporary, &directory] {
        fs::create_dir_all(path).unwrap();
    }
    // A shell cannot take notice of a signal that was ignored when it began, as SIGINT is in what a shell starts in the background.
    Program::new("env")
        .arg("--default-signal=INT")
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/nested-kvm"))
        .arg("--umem")
        .arg(umem())
        .args(args)
        .env("TMPDIR", temporary)
        .current_dir(&directory)
        .patience(PATIENCE)
}

#[track_caller]
fn assert_nothing_left(scratch: &Scratch) {
    let left = fs::read_dir(scratch.path("temporary")).unwrap().count();
    assert_eq!(left, 0, "temporary files are left");
}

/// Every byte value, more than one write's worth, so that nothing on the way may take any of them for its own.
fn all_bytes() -> Vec<u8> {
    (0..=255).cycle().take(300_000).collect()
}

#[test]
fn files_go_in_and_output_files_and_exit_code_come_out() {
    need!(emulator());
    let scratch = Scratch::new();
    let input = scratch.file("a file", &all_bytes());
    let script = r#"
        test "$1" = "it's" || exit 1
        cp 'a file' 'the same'
        (sleep 600 &)
        test -c /dev/kvm && test -c /dev/userfaultfd && umem --version
        echo "on standard error" >&2
        exit 42"#;
    let finished = nested_kvm(&scratch, &["--file", input.to_str().unwrap()])
        .args([
            "--out", "the same", "--out", "missing", "--", "sh", "-c", script, "sh", "it's",
        ])
        .run();
    finished.assert_code(42);
    assert!(finished.stdout.starts_with("umem "), "{finished}");
    assert_eq!(finished.stdout.lines().count(), 1, "{finished}");
    assert!(finished.stderr.contains("on standard error\n"), "{finished}");
    assert!(finished.stderr.contains("left no file missing"), "{finished}");
    let brought = scratch.path("directory/the same");
    assert_eq!(fs::read(brought).unwrap(), all_bytes());
    assert_nothing_left(&scratch);
}

/// A VM there has as many CPUs as asked for, and real nested paging.
#[test]
fn a_vm_runs_in_it() {
    need!(emulator());
    let scratch = Scratch::new();
    let finished = nested_kvm(&scratch, &["--out", "report", "--"])
        .args([
            "sh",
            "-c",
            "cat /sys/module/kvm_amd/parameters/npt && exec umem run --report report",
        ])
        .run();
    finished.assert_code(0);
    assert!(finished.stdout.starts_with("Y\nworkload=hello "), "{finished}");
    assert!(finished.stdout.ends_with("result=ok\n"), "{finished}");
    let report = fs::read_to_string(scratch.path("directory/report")).unwrap();
    assert!(report.contains("guest-exit"), "{report}");
    assert_nothing_left(&scratch);
}

#[test]
fn a_command_that_is_not_there() {
    need!(emulator());
    let scratch = Scratch::new();
    let finished = nested_kvm(&scratch, &["no-such-command"]).run();
    finished.assert_code(127);
    assert!(finished.stderr.contains("no-such-command"), "{finished}");
    assert_nothing_left(&scratch);
}

#[test]
fn a_machine_that_takes_too_long_is_ended() {
    need!(emulator());
    let scratch = Scratch::new();
    let finished = nested_kvm(&scratch, &["--timeout", "1", "true"]).run();
    finished.assert_code(124);
    assert!(finished.stderr.contains("within 1 seconds"), "{finished}");
    assert_nothing_left(&scratch);
}

#[test]
fn a_kernel_that_panics_is_told_from_a_command_that_fails() {
    need!(emulator());
    let scratch = Scratch::new();
    let finished = nested_kvm(
        &scratch,
        &["sh", "-c", "echo before; echo c >/proc/sysrq-trigger; sleep 600"],
    )
    .run();
    finished.assert_code(125);
    assert_eq!(finished.stdout, "before\n");
    assert!(
        finished.stderr.contains("Kernel panic - not syncing: sysrq"),
        "{finished}"
    );
    assert_nothing_left(&scratch);
}

#[test]
fn a_command_that_takes_all_memory_is_named() {
    need!(emulator());
    let scratch = Scratch::new();
    let finished = nested_kvm(&scratch, &["--memory=512M", "tail", "/dev/zero"]).run();
    finished.assert_code(128 + Signal::KILL.as_raw());
    assert!(finished.stderr.contains("out of memory"), "{finished}");
    assert!(finished.stderr.contains("(tail)"), "{finished}");
    assert_nothing_left(&scratch);
}

/// Wherever it is.
#[test]
fn a_signal_ends_it_and_the_machine() {
    need!(emulator());
    let scratch = Scratch::new();
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let running = nested_kvm(&scratch, &["-v", "sleep", "600"]).start();
        // The first line of its kernel.
        running.wait_until("the machine starts", |running| {
            running.to_string().contains("Linux version")
        });
        // A terminal and timeout(1) reach a script more than once.
        running.signal(signal);
        running.signal(signal);
        // With it, its whole process group has to be gone.
        running.finish().assert_code(code);
        assert_nothing_left(&scratch);
    }
}

#[test]
fn what_makes_no_sense_is_refused_before_anything_starts() {
    let scratch = Scratch::new();
    let file = scratch.file("file", b"");
    let file = file.to_str().unwrap();
    for (args, words) in [
        (&["--file", "missing", "true"][..], "missing"),
        (&["--file", file, "--file", file, "true"], "another file"),
        (&["--out", "../escape", "true"], "../escape"),
        (&["--program", "no-such-program", "true"], "no-such-program"),
        (&["--timeout", "soon", "true"], "soon"),
        (&["--cpus", "none", "true"], "none"),
        (&["--memory", "much", "true"], "much"),
        (&["--unknown", "true"], "--unknown"),
        (&["--file"], "--file"),
        (&["--"], "no command"),
    ] {
        let finished = nested_kvm(&scratch, args).run();
        finished.assert_code(2);
        assert!(finished.stderr.contains(words), "{finished}");
        assert_eq!(finished.stdout, "");
    }
    assert!(Path::new(file).exists());
}
