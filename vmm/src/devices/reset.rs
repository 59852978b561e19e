//! The two ways of a PC to reset itself: `reboot=k` and `reboot=p` of Linux, of which ACPI names the second (`reboot=a`).

use std::sync::atomic::{AtomicU8, Ordering};

use vm_superio::{I8042Device, Trigger};

use crate::ending::Ending;

/// The keyboard controller, of which nothing is there but command 0xfe: pulse the CPU's reset line.
#[derive(Debug)]
pub(super) struct KeyboardController;

impl KeyboardController {
    pub(super) const DATA: u16 = 0x60;
    pub(super) const COMMAND: u16 = 0x64;

    pub(super) fn read(port: u16) -> u8 {
        I8042Device::new(ResetLine).read(offset(port))
    }

    pub(super) fn write(port: u16, value: u8) -> Option<Ending> {
        I8042Device::new(ResetLine).write(offset(port), value).err()
    }
}

fn offset(port: u16) -> u8 {
    (port - KeyboardController::DATA) as u8
}

/// Pulled, it does not return to the guest: that is the trigger's error.
struct ResetLine;

impl Trigger for ResetLine {
    type E = Ending;

    fn trigger(&self) -> Result<(), Ending> {
        Err(Ending::Reset)
    }
}

/// The reset control register of the PC's chipset (Intel ICH9 datasheet, 13.7.5): bit 2 resets, bit 1 says how thoroughly.
#[derive(Debug, Default)]
pub struct ResetControl {
    value: AtomicU8,
}

impl ResetControl {
    /// Where it is.
    pub const PORT: u16 = 0xcf9;
    /// What to write to it for a full reset.
    pub const RESET: u8 = 1 << 1 | Self::RESET_CPU;
    const RESET_CPU: u8 = 1 << 2;

    /// The register as it was.
    pub(super) fn restored(value: u8) -> Self {
        Self {
            value: AtomicU8::new(value & !Self::RESET_CPU),
        }
    }

    pub(super) fn read(&self) -> u8 {
        self.value.load(Ordering::Relaxed)
    }

    pub(super) fn write(&self, value: u8) -> Option<Ending> {
        self.value.store(value & !Self::RESET_CPU, Ordering::Relaxed);
        (value & Self::RESET_CPU != 0).then_some(Ending::Reset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keyboard_controller_resets_on_one_command_only() {
        assert_eq!(KeyboardController::write(0x64, 0xfe), Some(Ending::Reset));
        assert_eq!(KeyboardController::write(0x64, 0xff), None);
        assert_eq!(KeyboardController::write(0x60, 0xfe), None);
        assert_eq!(KeyboardController::read(0x64), 0, "never busy");
    }

    #[test]
    fn the_reset_register_resets_on_bit_2() {
        let register = ResetControl::default();
        assert_eq!(register.write(0x02), None);
        assert_eq!(register.read(), 0x02);
        assert_eq!(register.write(ResetControl::RESET), Some(Ending::Reset));
    }
}
