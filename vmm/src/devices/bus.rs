//! Which device answers at which port.
//!
//! The set is fixed and small, so it is a match: no registration, nothing to look up. Where there is no device, reads give
//! all ones, as on a bus that nobody drives, and writes are lost. There is no device in guest-physical memory.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{
    exit_port,
    power::SleepControl,
    reset::{KeyboardController, ResetControl},
    serial::{self, SerialPort, SerialRegisters},
};
use crate::{ending::Ending, kvm::Bus};

/// The state of the devices; those that are not in it have none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceState {
    pub(crate) serial: SerialRegisters,
    reset_control: u8,
}

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

    /// The same with the state that devices had. The serial port has its own already.
    pub fn restored(serial: Arc<SerialPort>, state: &DeviceState) -> Self {
        Self {
            serial,
            reset: ResetControl::restored(state.reset_control),
        }
    }

    /// Does `work` with the devices' state, which does not change meanwhile: no vCPU runs, and nothing comes from outside.
    pub fn hold_still<T>(&self, work: impl FnOnce(DeviceState) -> T) -> T {
        self.serial.hold_still(|serial| {
            work(DeviceState {
                serial,
                reset_control: self.reset.read(),
            })
        })
    }

    /// To be called when the interrupt controllers have their state: raises what devices have to raise.
    pub fn repeat_interrupts(&self) {
        self.serial.repeat_interrupt();
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
