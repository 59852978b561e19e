//! The bare-metal test guest. Built for a host it is a stub, so that the workspace builds as one.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod bare;

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("guest: build it with --target x86_64-unknown-none and boot it as a PVH kernel");
    std::process::exit(2);
}
