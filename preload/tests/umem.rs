//! A program in C that opens `/dev/umem` and knows of nothing else, with this library before it.

#![allow(clippy::unwrap_used)] // a test's helpers panic as its tests do

mod common;

use std::process::Command;

use umem::uffd::Userfaultfd;

#[test]
fn every_part_works() {
    let test = "umem::every_part_works";
    if let Err(error) = Userfaultfd::probe() {
        println!("skipped: {test}: {error}");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let Some(program) = common::compile(test, directory.path(), "umem") else {
        return;
    };
    let output = Command::new("timeout")
        .arg("200")
        .arg("env")
        .arg(format!("LD_PRELOAD={}", common::library().display()))
        .arg(program)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{:?}", output.status);
    assert_eq!(text.matches(": ok").count(), 14);
}
