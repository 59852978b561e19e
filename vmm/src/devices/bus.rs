//! Which device answers at which port.
//!
//! The set is fixed and small, so it is a match: no registration, nothing to look up. Where there is no device, reads give
//! all ones, as on a bus that nobody drives, and writes are lost. There is no device in guest-physical memory.

use std::sync::Arc;

use super::{
    exit_port,
    power::SleepControl,
    reset::{KeyboardController, ResetControl},
    serial::{self, SerialPort},
};
use crate::{ending::Ending, kvm::Bus};

/// The devices on the ports.
#[derive(Debug)]
pub struct DeviceBus {
    serial: Arc<SerialPort>,
    reset: ResetControl,
}

impl DeviceBus {
    /// The platform's devices, of which the serial port is shared with the console.
    pub fn new(serial: Arc<SerialPort>) -> Self {
        Self {
            serial,
            reset: ResetControl::default(),
        }
    }

    fn write(&self, port: u16, data: &[u8]) -> Option<Ending> {
        match (port, data) {
            (serial::FIRST_PORT..=serial::LAST_PORT, _) => {
                for (port, byte) in (port..).zip(data) {
                    self.serial.write(port, *byte);
                }
                None
            }
            (exit_port::PORT, _) => Some(exit_port::written(data)),
            (KeyboardController::DATA | KeyboardController::COMMAND, [byte]) => {
                KeyboardController::write(port, *byte)
            }
            // A wider access here belongs to the PCI configuration address at 0xcf8.
            (ResetControl::PORT, [byte]) => self.reset.write(*byte),
            (SleepControl::PORT, [byte]) => SleepControl::write(*byte),
            _ => None,
        }
    }
}

impl Bus for DeviceBus {
    fn read_port(&self, port: u16, data: &mut [u8]) {
        match (port, data) {
            (serial::FIRST_PORT..=serial::LAST_PORT, data) => {
                for (port, byte) in (port..).zip(data) {
                    *byte = self.serial.read(port);
                }
            }
            (KeyboardController::DATA | KeyboardController::COMMAND, [byte]) => {
                *byte = KeyboardController::read(port);
            }
            (ResetControl::PORT, [byte]) => *byte = self.reset.read(),
            (SleepControl::PORT | SleepControl::STATUS_PORT, [byte]) => *byte = SleepControl::read(),
            (_, data) => data.fill(0xff),
        }
    }

    fn write_port(&self, port: u16, data: &[u8]) -> Option<Ending> {
        let ending = self.write(port, data);
        if ending.is_some() {
            self.serial.flush();
        }
        ending
    }
}
