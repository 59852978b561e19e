//! The examples of docs/umem.md, as they are written there.

#![allow(clippy::unwrap_used)] // a test's helpers panic as its tests do

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use umem::uffd::Userfaultfd;

const PAGE: &str = include_str!("../../docs/umem.md");

/// The example in that language.
fn example(language: &str) -> &'static str {
    let (_, from) = PAGE.split_once(&format!("```{language}\n")).unwrap();
    from.split_once("```\n").unwrap().0
}

/// The directory where cargo puts what it makes.
fn made() -> PathBuf {
    let here = std::env::current_exe().unwrap();
    here.ancestors().nth(2).unwrap().to_path_buf()
}

/// Runs it with the library in reach. `None`: there is no such program.
fn run(program: &Path, arguments: &[&Path]) -> Option<Output> {
    let mut command = Command::new("timeout");
    command.arg("60").arg(program).args(arguments);
    let libraries = format!("{}:{}", made().join("deps").display(), made().display());
    command.env("LD_LIBRARY_PATH", libraries);
    let output = command.output().unwrap();
    (output.status.code() != Some(127)).then_some(output)
}

/// The first byte of each of 16 pages.
fn assert_right(output: &Output) {
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?} {text} {error}", output.status);
    let numbers: Vec<u8> = text
        .split(|character: char| !character.is_ascii_digit())
        .filter_map(|word| word.parse().ok())
        .collect();
    assert_eq!(numbers, (0..16).collect::<Vec<u8>>(), "{text} {error}");
}

#[test]
fn the_examples_work_as_written() {
    let test = "umem_documentation::the_examples_work_as_written";
    if let Err(error) = Userfaultfd::probe() {
        println!("skipped: {test}: {error}");
        return;
    }
    assert_eq!(example("rust"), include_str!("../examples/page_source.rs"));
    let built = run(&made().join("examples/page_source"), &[]);
    assert_right(&built.expect("cargo test builds the examples, unless it is told which tests to build"));

    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name);
    std::fs::write(file("page_source.c"), example("c")).unwrap();
    std::fs::write(file("page_source.py"), example("python")).unwrap();
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("include");
    let program = file("page_source");
    let (made, deps) = (made(), made().join("deps"));
    let arguments = [
        Path::new("-I"),
        &include,
        &file("page_source.c"),
        Path::new("-o"),
        &program,
        Path::new("-L"),
        &deps,
        Path::new("-L"),
        &made,
        Path::new("-lumem"),
    ];
    match run(Path::new("gcc"), &arguments) {
        Some(gcc) => {
            assert!(gcc.status.success(), "{}", String::from_utf8_lossy(&gcc.stderr));
            assert_right(&run(&program, &[]).unwrap());
        }
        None => println!("skipped: {test}: no gcc"),
    }
    match run(Path::new("python3"), &[&file("page_source.py")]) {
        Some(output) => assert_right(&output),
        None => println!("skipped: {test}: no python3"),
    }
}
