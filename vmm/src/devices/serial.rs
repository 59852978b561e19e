//! The first serial port, a 16550A, shared by the vCPUs that drive it and the console behind it.

use std::{
    io,
    ops::RangeInclusive,
    sync::{Mutex, MutexGuard, PoisonError, TryLockError},
};

use serde::{Deserialize, Serialize};
use tracing::warn;
use vm_superio::{
    Serial, SerialState, Trigger,
    serial::{Error, SerialEvents},
};
use vmm_sys_util::eventfd::EventFd;

use super::output::Output;

/// Its first port.
pub(super) const FIRST_PORT: u16 = 0x3f8;
/// Its last port.
pub(super) const LAST_PORT: u16 = FIRST_PORT + 7;
/// All its ports.
pub const SERIAL_PORTS: RangeInclusive<u16> = FIRST_PORT..=LAST_PORT;
/// Its interrupt line.
pub const SERIAL_IRQ: u32 = 4;

/// The serial port.
#[derive(Debug)]
pub struct SerialPort {
    uart: Mutex<Uart>,
}

type Uart = Serial<Interrupt, Drained, Output>;

/// The port's registers and what is in its FIFO.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialRegisters {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    input: Vec<u8>,
}

impl SerialRegisters {
    /// Interrupt enable, bit 0: input has come; identification, bit 2: that it has. The same for 'can send': bits 1 and 1.
    const INPUT: (u8, u8) = (1 << 0, 1 << 2);
    const SENT: (u8, u8) = (1 << 1, 1 << 1);

    /// Whether it can be what the port had.
    pub(crate) fn is_possible(&self) -> bool {
        self.input.len() <= FIFO_SIZE
    }

    fn interrupts(&self) -> bool {
        [Self::INPUT, Self::SENT]
            .into_iter()
            .any(|(enabled, identified)| {
                self.interrupt_enable & enabled != 0 && self.interrupt_identification & identified != 0
            })
    }
}

impl From<SerialState> for SerialRegisters {
    fn from(state: SerialState) -> Self {
        Self {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
        }
    }
}

impl From<&SerialRegisters> for SerialState {
    fn from(registers: &SerialRegisters) -> Self {
        Self {
            baud_divisor_low: registers.divisor[0],
            baud_divisor_high: registers.divisor[1],
            interrupt_enable: registers.interrupt_enable,
            interrupt_identification: registers.interrupt_identification,
            line_control: registers.line_control,
            line_status: registers.line_status,
            modem_control: registers.modem_control,
            modem_status: registers.modem_status,
            scratch: registers.scratch,
            in_buffer: registers.input.clone(),
        }
    }
}

/// What the FIFO holds.
const FIFO_SIZE: usize = 64;

/// The port cannot take input at the moment; ask again a little later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Busy;

impl SerialPort {
    /// A port that raises `interrupt`, writes `drained` whenever the guest has read all input, and sends to `output`. It begins
    /// as after reset, or with these registers.
    pub(super) fn new(
        interrupt: EventFd,
        drained: EventFd,
        output: Output,
        registers: Option<&SerialRegisters>,
    ) -> io::Result<Self> {
        let state = registers.map_or_else(SerialState::default, SerialState::from);
        let uart = Serial::from_state(&state, Interrupt(interrupt), Drained(drained), output);
        let uart = uart.map_err(|error| match error {
            Error::Trigger(error) | Error::IOError(error) => error,
            Error::FullFifo => io::ErrorKind::InvalidInput.into(),
        })?;
        Ok(Self {
            uart: Mutex::new(uart),
        })
    }

    /// Does `work` with its registers, which do not change meanwhile: no input comes and no interrupt is raised.
    ///
    /// What the guest has said is out by then, if somebody takes it: where it goes on, nobody knows of it, and this process may be
    /// killed as soon as it goes on there.
    pub(super) fn hold_still<T>(&self, work: impl FnOnce(SerialRegisters) -> T) -> T {
        let mut uart = self.lock();
        uart.writer_mut().try_flush();
        work(uart.state().into())
    }

    /// Raises its interrupt once more if it has one to raise: the first may have been on its way to the interrupt controller
    /// while that was saved. One too many does no harm.
    pub(super) fn repeat_interrupt(&self) {
        let uart = self.lock();
        let registers = SerialRegisters::from(uart.state());
        if registers.interrupts()
            && let Err(error) = uart.interrupt_evt().trigger()
        {
            warn!(%error, "serial port: no interrupt");
        }
    }

    /// What `port` reads as.
    pub(super) fn read(&self, port: u16) -> u8 {
        self.lock().read((port - FIRST_PORT) as u8)
    }

    /// Writes to `port`.
    pub(super) fn write(&self, port: u16, value: u8) {
        // Output swallows its own errors, so what is left is the interrupt.
        if let Err(error) = self.lock().write((port - FIRST_PORT) as u8, value) {
            warn!(%error, "serial port");
        }
    }

    /// Gives the guest as much of `input` as fits, and says how much that was: less than all means that the FIFO is full, and
    /// that `drained` will be written when it is empty again.
    ///
    /// Never waits, not even for a vCPU that waits for a slow reader of its output.
    pub(super) fn try_enqueue(&self, input: &[u8]) -> Result<usize, Busy> {
        let mut uart = self.try_lock().ok_or(Busy)?;
        let capacity = uart.fifo_capacity();
        if capacity == 0 {
            return Ok(0);
        }
        match uart.enqueue_raw_bytes(input) {
            // In loop-back mode the port is cut off from the line. Drivers use that for moments, to find out what it is.
            Ok(0) if !input.is_empty() => Err(Busy),
            Ok(taken) => Ok(taken),
            // The bytes are in the FIFO all the same.
            Err(Error::Trigger(error)) => {
                warn!(%error, "serial port: no interrupt");
                Ok(input.len().min(capacity))
            }
            Err(Error::FullFifo | Error::IOError(_)) => Ok(0),
        }
    }

    /// Writes out what is left of the guest's last line.
    pub fn flush(&self) {
        self.lock().writer_mut().flush_now();
    }

    /// The same without waiting; false if there is something left.
    pub(super) fn try_flush(&self) -> bool {
        self.try_lock()
            .is_some_and(|mut uart| uart.writer_mut().try_flush())
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn try_lock(&self) -> Option<MutexGuard<'_, Uart>> {
        match self.uart.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

/// The port's interrupt line.
#[derive(Debug)]
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells that the guest has read all input.
#[derive(Debug)]
struct Drained(EventFd);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}

    fn out_byte(&self) {}

    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        // Only fails if it was written very often and not read, and then it is readable already.
        let _ = self.0.write(1);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::sync::Arc;

    use super::super::tick::Tick;
    use super::*;

    #[test]
    fn what_the_guest_has_said_is_out_when_its_state_is_taken() {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let output = Output::new(writer, Arc::new(Tick::new().unwrap()));
        let port = SerialPort::new(event(), event(), output, None).unwrap();
        for byte in b"login: " {
            port.write(FIRST_PORT, *byte);
        }
        let mut said = [0; 16];
        let mut reader = File::from(reader);
        assert_eq!(
            reader.read(&mut said).unwrap_err().kind(),
            io::ErrorKind::WouldBlock,
            "a line without an end waits"
        );
        let length = port.hold_still(|_| reader.read(&mut said).unwrap());
        assert_eq!(&said[..length], b"login: ");
    }
}
