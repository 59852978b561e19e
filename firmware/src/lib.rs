//! What the reset-vector firmware and the VMM agree on.
//!
//! The firmware itself (`main.rs`, built for `x86_64-unknown-none` into a flat binary) is a ROM that ends at 4 GiB. The vCPU
//! starts in it at the architectural reset vector, in real mode, with no register set by the VMM.

#![cfg_attr(not(test), no_std)]

pub mod boot_info;

/// Size of the ROM in bytes; it is mapped read-only so that its last byte lies just below 4 GiB.
pub const ROM_SIZE: usize = 4096;
