//! The registers by which a kernel switches the machine off: hardware-reduced ACPI, specification 6.5, 4.8.3.7.

use crate::ending::Ending;

/// The sleep control register, and the sleep status register beside it.
#[derive(Debug)]
pub struct SleepControl;

impl SleepControl {
    /// Where the control register is. 0x600 to 0x7ff is what no ISA device of a PC decodes.
    pub const PORT: u16 = 0x600;
    /// Where the status register is.
    pub const STATUS_PORT: u16 = 0x601;
    /// The type of sleep that switches the machine off, which the ACPI object `_S5` says.
    pub const OFF: u8 = 5;

    /// SLP_TYP, bits 4:2, and SLP_EN.
    const TYPE_SHIFT: u8 = 2;
    const TYPE_MASK: u8 = 7;
    const ENABLE: u8 = 1 << 5;

    pub(super) fn write(value: u8) -> Option<Ending> {
        let off = value >> Self::TYPE_SHIFT & Self::TYPE_MASK == Self::OFF;
        (off && value & Self::ENABLE != 0).then_some(Ending::PowerOff)
    }

    /// Of both registers: never asleep, never just woken.
    pub(super) fn read() -> u8 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_switched_off_by_its_type_and_the_enable_bit() {
        assert_eq!(SleepControl::write(0x34), Some(Ending::PowerOff));
        assert_eq!(SleepControl::write(0x14), None);
        assert_eq!(SleepControl::write(0x20), None, "another type");
    }
}
