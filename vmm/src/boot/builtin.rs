//! The guest and the firmware that the program carries in itself; `build.rs` builds them.

/// The built-in guest, a PVH ELF file (crate `guest`).
pub const GUEST_ELF: &[u8] = include_bytes!(env!("UMEM_GUEST_ELF"));

/// The reset-vector firmware, [`firmware::ROM_SIZE`] bytes that belong directly below 4 GiB (crate `firmware`).
pub const FIRMWARE_ROM: &[u8] = include_bytes!(env!("UMEM_FIRMWARE_ROM"));

const _: () = assert!(FIRMWARE_ROM.len() == firmware::ROM_SIZE);
