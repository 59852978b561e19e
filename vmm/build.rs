//! Builds the bare-metal guest and the firmware, which the program carries in itself (`src/boot/builtin.rs`).
//!
//! They are members of this workspace, but for another target than the one being built, so a second cargo builds them, into a
//! directory of its own because the first holds the lock on the usual one.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{self, Command};

const TARGET: &str = "x86_64-unknown-none";

fn main() {
    let manifest = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let workspace = manifest.parent().expect("vmm/ lies in the workspace");
    for input in ["guest", "firmware", ".cargo/config.toml", "Cargo.lock"] {
        println!("cargo:rerun-if-changed={}", workspace.join(input).display());
    }
    println!("cargo:rerun-if-changed=build.rs");

    check_target();
    let target_directory = PathBuf::from(variable("OUT_DIR")).join("bare-metal");
    build(workspace, &target_directory);
    let built = target_directory.join(TARGET).join("release");
    for (variable, file) in [("UMEM_GUEST_ELF", "guest"), ("UMEM_FIRMWARE_ROM", "firmware")] {
        println!("cargo:rustc-env={variable}={}", built.join(file).display());
    }
}

fn variable(name: &str) -> OsString {
    env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"))
}

/// Ends the build with the remedy if the target's libraries are not there. (cargo's own message for that is "can't find crate for
/// `core`".)
fn check_target() {
    let rustc = variable("RUSTC");
    let output = Command::new(&rustc)
        .args(["--print", "target-libdir", "--target", TARGET])
        .output()
        .unwrap_or_else(|error| panic!("running {}: {error}", rustc.display()));
    let directory = String::from_utf8_lossy(&output.stdout);
    if !(output.status.success() && Path::new(directory.trim()).is_dir()) {
        println!(
            "cargo::error=the Rust target of the built-in guest and firmware is not installed; \
             install it with: rustup target add {TARGET}"
        );
        process::exit(1);
    }
}

fn build(workspace: &Path, target_directory: &Path) {
    let mut cargo = Command::new(variable("CARGO"));
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(belongs_to_the_outer_build) {
            cargo.env_remove(name);
        }
    }
    let status = cargo
        // Where .cargo/config.toml is found.
        .current_dir(workspace)
        // --locked: the outer cargo has just brought the lock file up to date, this one must not write to it.
        .args(["build", "--release", "--locked", "--target", TARGET])
        .args(["-p", "guest", "-p", "firmware", "--bins", "--target-dir"])
        .arg(target_directory)
        // Line tables of the whole core library are not worth carrying around.
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
        .status()
        .unwrap_or_else(|error| panic!("running {}: {error}", cargo.get_program().display()));
    assert!(
        status.success(),
        "building guest and firmware for {TARGET} failed: {status}"
    );
}

/// What the outer cargo says about the crate, the target and the flags of this build, none of which holds for the inner one.
/// What the user says about the network or the registry (CARGO_NET_OFFLINE, CARGO_HOME) holds for both.
fn belongs_to_the_outer_build(name: &str) -> bool {
    let prefixes = [
        "CARGO_CFG_",
        "CARGO_FEATURE_",
        "CARGO_PKG_",
        "CARGO_MANIFEST_",
        "CARGO_PROFILE_",
        "DEP_",
    ];
    let names = [
        "CARGO_BUILD_RUSTFLAGS",
        "CARGO_BUILD_TARGET",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_TARGET_DIR",
        "CARGO_BUILD_TARGET_DIR",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTC_WRAPPER",
        "RUSTFLAGS",
    ];
    prefixes.iter().any(|prefix| name.starts_with(prefix)) || names.contains(&name)
}
