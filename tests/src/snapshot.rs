//! Snapshots restored by the program under test.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use umem::image::Image;

use crate::program::Program;
use crate::scratch::Scratch;

/// A guest that writes to many pages, checks them, and says so, for ever.
pub const DIRTY: &str = "workload=dirty pages=512 order=random seed=5 rounds=forever";

/// An image every page of which holds something, whose guest is told `command_line`.
pub fn make_image(scratch: &Scratch, memory: &str, command_line: &str) -> PathBuf {
    let options = ["--fill", "pattern:7", "--cmdline", command_line];
    scratch.create("image", memory).args(options).run().assert_code(0);
    scratch.path("image")
}

/// `umem run --snapshot`.
pub fn restore(location: impl AsRef<OsStr>, options: &[&str]) -> Program {
    Program::umem(["run", "--snapshot"]).arg(location).args(options)
}

/// Checks every page of a snapshot and its state.
#[track_caller]
pub fn assert_whole(file: &Path) {
    let verified = Image::open(file).unwrap().verify(|_| {}).unwrap();
    assert!(verified.is_sound(), "{}: {verified:?}", file.display());
}

/// Checks that the guest in a snapshot, which is [`DIRTY`] or the like, goes on where it was and finds what it wrote.
#[track_caller]
pub fn assert_goes_on(location: impl AsRef<OsStr>, options: &[&str]) {
    let vm = restore(location, options).start();
    vm.wait_until("several rounds", |vm| rounds_in(&vm.stdout()).len() > 3);
    vm.signal(Signal::TERM);
    let vm = vm.finish();
    vm.assert_code(0);
    assert_eq!(vm.stderr, "", "{vm}");
    assert!(!vm.stdout.contains("wrong"), "{vm}");
    let rounds = rounds_in(&vm.stdout);
    // The first is a half line's, and the last is maybe not whole.
    let whole = &rounds[1..rounds.len() - 1];
    assert!(whole.windows(2).all(|two| two[0] + 1 == two[1]), "{vm}");
}

/// The numbers of the whole lines that say which round it is.
fn rounds_in(stdout: &str) -> Vec<u64> {
    // What the line was that the guest was in the middle of, nobody knows.
    let lines = stdout
        .lines()
        .filter(|line| line.ends_with(|last: char| last.is_ascii_digit()));
    let numbers = lines.filter_map(|line| line.strip_prefix("round=")?.split(' ').next()?.parse().ok());
    numbers.collect()
}
