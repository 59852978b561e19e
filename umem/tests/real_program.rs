//! A program that knows nothing of umem, with its heap in memory that another process serves.

#![allow(clippy::unwrap_used)] // a test's helpers panic as its tests do

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use umem::uffd::Userfaultfd;

/// A database in memory: rows, an index, an update, a join, and SQLite's own check of it all.
const WORK: &str = "
PRAGMA cache_size = -500000;
CREATE TABLE item (id INTEGER PRIMARY KEY, part INTEGER, name TEXT, weight REAL);
WITH RECURSIVE count(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM count WHERE n < 60000)
  INSERT INTO item SELECT n, n * 7919 % 1009, hex(n * 2654435761 % 4294967296) || '-' || n, n * 0.5 FROM count;
CREATE INDEX by_part ON item (part, name);
UPDATE item SET weight = weight + part WHERE id % 3 = 0;
DELETE FROM item WHERE part = 17;
SELECT count(*), sum(part), round(sum(weight), 1), max(name), min(name) FROM item;
SELECT part, count(*), group_concat(substr(name, 1, 2)) FROM (SELECT * FROM item ORDER BY id) WHERE part < 5 GROUP BY part;
SELECT count(*) FROM item a JOIN item b ON a.part = b.part AND a.id < b.id WHERE a.part < 100;
VACUUM;
PRAGMA integrity_check;
";

fn sqlite(environment: &[(&str, &Path)]) -> Option<Output> {
    let mut command = Command::new("timeout");
    command.args(["250", "env"]);
    for (name, value) in environment {
        command.arg(format!("{name}={}", value.display()));
    }
    command.args(["sqlite3", "-batch", ":memory:", WORK]);
    let output = command.output().ok()?;
    (output.status.code() != Some(127)).then_some(output)
}

#[test]
fn sqlite_works_in_memory_that_is_served() {
    let test = "real_program::sqlite_works_in_memory_that_is_served";
    if let Err(error) = Userfaultfd::probe() {
        println!("skipped: {test}: {error}");
        return;
    }
    let Some(expected) = sqlite(&[]) else {
        println!("skipped: {test}: there is no sqlite3");
        return;
    };
    assert!(expected.status.success());
    let directory = tempfile::tempdir().unwrap();
    let heap = directory.path().join("heap.so");
    // Beside this program or a directory above: cargo puts it into either.
    let here = std::env::current_exe().unwrap();
    let mut directories = here.ancestors().skip(1).take(2);
    let library = directories
        .find(|directory| directory.join("libumem.so").exists())
        .unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let gcc = Command::new("gcc")
        .args([
            "-std=c17",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-O2",
            "-shared",
            "-fPIC",
            "-fno-builtin",
        ])
        .args(["-ftls-model=initial-exec", "-I"])
        .arg(root.join("include"))
        .arg(root.join("tests/c/heap.c"))
        .arg("-o")
        .arg(&heap)
        .arg("-L")
        .arg(library)
        .arg(format!("-Wl,-rpath,{}", library.display()))
        .arg("-lumem")
        .output();
    let gcc = match gcc {
        Ok(gcc) => gcc,
        Err(error) => {
            println!("skipped: {test}: no gcc: {error}");
            return;
        }
    };
    assert!(gcc.status.success(), "{}", String::from_utf8_lossy(&gcc.stderr));
    let served: PathBuf = directory.path().join("served");
    let output = sqlite(&[("LD_PRELOAD", &heap), ("HEAP_SERVED", &served)]).unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{:?}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(text, String::from_utf8_lossy(&expected.stdout));
    assert!(text.ends_with("ok\n"), "{text}");
    let pages: u64 = std::fs::read_to_string(&served).unwrap().trim().parse().unwrap();
    println!("{pages} pages of SQLite's heap were served");
    assert!(pages > 1000, "{pages}");
}
