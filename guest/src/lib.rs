//! What the bare-metal test guest computes, free of the machine it runs on.
//!
//! The guest itself (`main.rs`, built for `x86_64-unknown-none`) is a small ring-0 kernel with its workloads in ring 3. The
//! workloads' logic lives here so that the host can test it, and so that the program that makes RAM images writes the
//! very bytes that the guest later expects.

#![cfg_attr(not(test), no_std)]

pub mod balloon;
pub mod command_line;
pub mod exit_code;
pub mod fingerprint;
pub mod machine;
pub mod memory_map;
pub mod order;
pub mod parking;
pub mod permutation;
pub mod start_info;
pub mod tables;
pub mod workload;

/// The port of the isa-debug-exit device. Writing `n` ends the VM with guest exit code `n`.
pub const EXIT_PORT: u16 = 0xf4;
