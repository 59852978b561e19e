//! How the guest ends.

use core::arch::{asm, global_asm};

use guest::EXIT_PORT;
use guest::exit_code::ExitCode;
use x86_64::instructions::port::Port;

/// The keyboard controller, whose command 0xfe resets the machine.
const KEYBOARD_COMMAND_PORT: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;

unsafe extern "C" {
    safe fn parking_hlt() -> !;
}

global_asm!(
    ".section .text.park, \"ax\", @progbits",
    ".global parking_hlt",
    "parking_hlt:",
    "hlt",
    "jmp parking_hlt",
    ".text",
);

/// Ends the VM with `code`, on every machine: by isa-debug-exit; where there is none (Firecracker), by a reset; and where that
/// does nothing either, this CPU stops.
pub(super) fn exit(code: ExitCode) -> ! {
    // SAFETY: these ports end the VM or do nothing; they have no effect on memory.
    unsafe {
        Port::new(EXIT_PORT).write(code as u32);
        Port::new(KEYBOARD_COMMAND_PORT).write(KEYBOARD_RESET);
    }
    park()
}

/// Stops this CPU for good, from either ring: in ring 3 `hlt` is a #GP, whose handler knows the place and halts for it.
pub(super) fn park() -> ! {
    parking_hlt()
}

/// The address of the `hlt` that [`park`] runs into.
pub(super) fn parking_place() -> u64 {
    parking_hlt as *const () as u64
}

/// Stops this CPU for good, from ring 0.
pub(super) fn halt() -> ! {
    loop {
        // SAFETY: with interrupts off nothing follows a hlt, and nothing needs to.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}
