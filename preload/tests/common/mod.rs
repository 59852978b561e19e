//! What the tests share.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The library, beside this program or a directory above: cargo puts it into either.
pub(crate) fn library() -> PathBuf {
    let program = std::env::current_exe().unwrap();
    let mut directories = program.ancestors().skip(1).take(2);
    directories
        .find_map(|directory| {
            let library = directory.join("libumem_preload.so");
            library.exists().then_some(library)
        })
        .unwrap()
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Compiles the program for a device, unless there is no compiler.
pub(crate) fn compile(test: &str, directory: &Path, device: &str) -> Option<PathBuf> {
    let program = directory.join(device);
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
        .arg(source(&format!("../{device}/include")))
        .arg(source(&format!("tests/{device}.c")))
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
