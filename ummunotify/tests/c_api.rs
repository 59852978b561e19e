//! The library and its header, by a program in C.

#![allow(clippy::unwrap_used)] // a test's helpers panic as its tests do

mod common;

use std::path::Path;
use std::process::Command;

use ummunotify::WatcherKind;

#[test]
fn every_function_works() {
    let test = "c_api::every_function_works";
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("api");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // Beside this program or a directory above: cargo puts it into either.
    let here = std::env::current_exe().unwrap();
    let mut directories = here.ancestors().skip(1).take(2);
    let library = directories
        .find(|directory| directory.join("libummunotify.so").exists())
        .unwrap();
    let output = Command::new("gcc")
        .args(["-std=c17", "-Wall", "-Wextra", "-Werror", "-O2", "-I"])
        .arg(root.join("include"))
        .arg(root.join("tests/c/api.c"))
        .arg("-o")
        .arg(&program)
        .arg("-L")
        .arg(library)
        .arg(format!("-Wl,-rpath,{}", library.display()))
        .arg("-lummunotify")
        .output();
    let output = match output {
        Ok(output) => output,
        Err(error) => {
            println!("skipped: {test}: no gcc: {error}");
            return;
        }
    };
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    for kind in [WatcherKind::Kvm, WatcherKind::Perf, WatcherKind::Userfaultfd] {
        if common::open(test, kind).is_none() {
            continue;
        }
        let output = Command::new(&program).arg(kind.to_string()).output().unwrap();
        assert!(
            output.status.success(),
            "{kind}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
