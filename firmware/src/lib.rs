//! What the reset-vector firmware and the VMM agree on.
//!
//! The firmware itself (`main.rs`, built for `x86_64-unknown-none` into a flat binary) is a ROM that ends at 4 GiB. The vCPU
//! starts in it at the architectural reset vector, in real mode, with no register set by the VMM.
//!
//! The firmware uses no RAM and no stack, and writes to no memory. What it cannot do it says in one line on the serial port, ends the
//! VM through [`EXIT_PORT`] with a code of [`Refusal`], and halts.

#![cfg_attr(not(test), no_std)]

pub mod boot_info;

/// Size of the ROM in bytes; it is mapped read-only so that its last byte lies just below 4 GiB.
pub const ROM_SIZE: usize = 4096;

/// Guest-physical address of the ROM's first byte.
pub const ROM_ADDRESS: u64 = (1 << 32) - ROM_SIZE as u64;

/// The serial port that a refusal is printed to.
pub const SERIAL_PORT: u16 = 0x3f8;

/// The port of the isa-debug-exit device. Writing `n` ends the VM with guest exit code `n`.
pub const EXIT_PORT: u16 = 0xf4;

/// Why the firmware ends the VM instead of starting the guest; the number is the exit code. The guest's own codes are smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Refusal {
    /// The boot-information page does not begin with [`boot_info::MAGIC`].
    BadMagic = 16,
    /// Its version is not [`boot_info::VERSION`].
    BadVersion = 17,
    /// Its protocol is none of [`boot_info::Protocol`].
    BadProtocol = 18,
    /// Entry or argument of a PVH kernel, or the page tables of a long-mode one, lie above 4 GiB.
    BadAddress = 19,
    /// The CPU does not offer long mode.
    NoLongMode = 20,
}

impl Refusal {
    /// Every refusal, in the order of the codes.
    pub const ALL: [Self; 5] = [
        Self::BadMagic,
        Self::BadVersion,
        Self::BadProtocol,
        Self::BadAddress,
        Self::NoLongMode,
    ];

    /// The line that the firmware prints, without the newline.
    pub const fn message(self) -> &'static str {
        match self {
            Self::BadMagic => "firmware: bad magic in the boot-information page",
            Self::BadVersion => "firmware: unknown version of the boot-information page",
            Self::BadProtocol => "firmware: unknown protocol in the boot-information page",
            Self::BadAddress => "firmware: an address in the boot-information page is above 4 GiB",
            Self::NoLongMode => "firmware: this CPU has no long mode",
        }
    }
}
