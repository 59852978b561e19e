//! The library and its headers, by programs in C.

#![allow(clippy::unwrap_used)] // a test's helpers panic as its tests do

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::mem::offset_of;
use std::path::{Path, PathBuf};
use std::process::Command;

use umem::abi::{INIT, Init, MAKE_VMA_ANONYMOUS};
use umem::uffd::Userfaultfd;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs gcc with these arguments. False: there is none.
fn gcc(test: &str, arguments: &[&Path]) -> bool {
    let output = Command::new("gcc")
        .args(["-std=c17", "-Wall", "-Wextra", "-Werror", "-O2", "-pthread", "-I"])
        .arg(root().join("include"))
        .args(arguments)
        .output();
    match output {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{text}");
            true
        }
        Err(error) => {
            println!("skipped: {test}: no gcc: {error}");
            false
        }
    }
}

/// The functions and constants of the library, as cbindgen reads them from the source.
fn generated() -> String {
    let config = cbindgen::Config {
        language: cbindgen::Language::C,
        // A type of another file, of which C knows nothing but the name.
        after_includes: Some("typedef struct umem_device Device;".to_owned()),
        ..cbindgen::Config::default()
    };
    let bindings = cbindgen::Builder::new()
        .with_config(config)
        .with_src(root().join("src/capi.rs"))
        .generate()
        .unwrap();
    let mut text = Vec::new();
    bindings.write(&mut text);
    String::from_utf8(text).unwrap()
}

/// The header declares what the library has: all of it, and in the same way, or one of the two would not compile after the other.
#[test]
fn the_header_is_what_the_library_has() {
    let declared = generated();
    let functions: BTreeSet<&str> = declared
        .split(|character: char| !character.is_ascii_alphanumeric() && character != '_')
        .filter(|word| word.starts_with("umem_") && *word != "umem_device")
        .collect();
    assert!(functions.len() >= 15, "{declared}");
    let mut text = "#include <stddef.h>\n#include <umem.h>\n#include <linux/umem.h>\n".to_owned();
    for function in functions {
        writeln!(text, "void *const pointer_to_{function} = (void *){function};").unwrap();
    }
    text.push_str(&declared);
    let equal = [
        ("sizeof(struct umem_init)", size_of::<Init>()),
        ("offsetof(struct umem_init, size)", offset_of!(Init, size)),
        ("offsetof(struct umem_init, shmem_fd)", offset_of!(Init, shmem_fd)),
        ("offsetof(struct umem_init, padding)", offset_of!(Init, padding)),
        ("UMEM_INIT", INIT as usize),
        ("UMEM_MAKE_VMA_ANONYMOUS", MAKE_VMA_ANONYMOUS as usize),
    ];
    for (in_c, in_rust) in equal {
        writeln!(text, "_Static_assert({in_c} == {in_rust}, \"{in_c}\");").unwrap();
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("header.c");
    std::fs::write(&file, text).unwrap();
    gcc(
        "device_c_api::the_header_is_what_the_library_has",
        &[Path::new("-fsyntax-only"), &file],
    );
}

#[test]
fn every_function_works() {
    let test = "device_c_api::every_function_works";
    if let Err(error) = Userfaultfd::probe() {
        println!("skipped: {test}: {error}");
        return;
    }
    // Beside this program or a directory above: cargo puts it into either.
    let here = std::env::current_exe().unwrap();
    let mut directories = here.ancestors().skip(1).take(2);
    let library = directories
        .find(|directory| directory.join("libumem.so").exists())
        .unwrap();
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("api");
    let rpath = PathBuf::from(format!("-Wl,-rpath,{}", library.display()));
    let arguments = [
        root().join("tests/c/api.c"),
        "-o".into(),
        program.clone(),
        "-L".into(),
        library.into(),
        rpath,
        "-lumem".into(),
    ];
    let arguments: Vec<&Path> = arguments.iter().map(PathBuf::as_path).collect();
    if !gcc(test, &arguments) {
        return;
    }
    let output = Command::new(&program).output().unwrap();
    assert!(
        output.status.success(),
        "{:?}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}
