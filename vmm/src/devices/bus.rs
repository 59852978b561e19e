//! Which device answers at which port.
//!
//! The set is fixed and small, so it is a match: no registration, nothing to look up. Where there is no device, reads give
//! all ones, as on a bus that nobody drives, and writes are lost. In guest-physical memory there is the balloon, if the machine has
//! one.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use super::virtio_mmio::BLOCK_SIZE;
use super::{
    balloon::{Balloon, BalloonState},
    exit_port,
    power::SleepControl,
    reset::{KeyboardController, ResetControl},
    serial::{self, SerialPort, SerialRegisters},
};
use crate::{address_map::BALLOON, ending::Ending, kvm::Bus};

/// The state of the devices; those that are not in it have none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceState {
    pub(crate) serial: SerialRegisters,
    reset_control: u8,
    /// Of a machine that has a balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) balloon: Option<BalloonState>,
}

/// The devices on the ports.
#[derive(Debug)]
pub struct DeviceBus {
    serial: Arc<SerialPort>,
    reset: ResetControl,
    balloon: Option<Balloon>,
}

impl DeviceBus {
    /// The platform's devices, of which the serial port is shared with the console.
    pub fn new(serial: Arc<SerialPort>, balloon: Option<Balloon>) -> Self {
        Self {
            serial,
            reset: ResetControl::default(),
            balloon,
        }
    }

    /// The same with the state that devices had. The serial port and the balloon have their own already.
    pub fn restored(serial: Arc<SerialPort>, balloon: Option<Balloon>, state: &DeviceState) -> Self {
        Self {
            serial,
            reset: ResetControl::restored(state.reset_control),
            balloon,
        }
    }

    /// The balloon, if there is one.
    pub fn balloon(&self) -> Option<&Balloon> {
        self.balloon.as_ref()
    }

    /// Makes those that do something by themselves stand still; no vCPU runs. False: one does not within this time, and all go on.
    pub(crate) fn stand_still(&self, patience: Duration) -> bool {
        self.balloon
            .as_ref()
            .is_none_or(|balloon| balloon.stand_still(patience))
    }

    /// Lets them go on.
    pub(crate) fn go_on(&self) {
        if let Some(balloon) = &self.balloon {
            balloon.go_on();
        }
    }

    /// Does `work` with the devices' state, which does not change meanwhile: no vCPU runs, all stand still, and nothing comes from
    /// outside.
    pub fn hold_still<T>(&self, work: impl FnOnce(DeviceState) -> T) -> T {
        self.serial.hold_still(|serial| {
            work(DeviceState {
                serial,
                reset_control: self.reset.read(),
                balloon: self.balloon.as_ref().map(Balloon::save),
            })
        })
    }

    /// To be called when the interrupt controllers have their state: raises what devices have to raise.
    pub fn repeat_interrupts(&self) {
        self.serial.repeat_interrupt();
        if let Some(balloon) = &self.balloon {
            balloon.repeat_interrupt();
        }
    }

    /// The balloon, and the offset in its registers, at a guest-physical address.
    fn balloon_at(&self, address: GuestAddress) -> Option<(&Balloon, u64)> {
        let offset = address
            .0
            .checked_sub(BALLOON.0)
            .filter(|offset| *offset < BLOCK_SIZE)?;
        Some((self.balloon.as_ref()?, offset))
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

    fn read_memory(&self, address: GuestAddress, data: &mut [u8]) {
        match self.balloon_at(address) {
            Some((balloon, offset)) => balloon.read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn write_memory(&self, address: GuestAddress, data: &[u8]) -> Option<Ending> {
        if let Some((balloon, offset)) = self.balloon_at(address) {
            balloon.write(offset, data);
        }
        None
    }
}
