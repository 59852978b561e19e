//! The reset-vector firmware. Built for a host it is a stub, so that the workspace builds as one.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod rom;

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("firmware: build it with --target x86_64-unknown-none; the result is a ROM image");
    std::process::exit(2);
}
