//! The console: standard input and output of this program at the other end of the guest's serial line.
//!
//! Input is read only as fast as the guest takes it. When the port's FIFO is full, input is not listened to until the guest
//! has emptied it, so nothing is lost, and whoever writes into a pipe waits. The end of input does not end the VM.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::Arc,
};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::io::Errno;
use thiserror::Error;
use tracing::warn;
use vmm_sys_util::{errno, eventfd::EventFd};

use super::{
    input::{Input, Read},
    output::Output,
    serial::{SerialPort, SerialRegisters},
    tick::Tick,
};

/// As much as the FIFO holds.
const CHUNK: usize = 64;

/// Why there is no console.
#[derive(Debug, Error)]
pub enum ConsoleError {
    /// Standard input or output cannot be used.
    #[error("cannot use standard {0}; is it closed?")]
    Standard(&'static str, #[source] io::Error),
    /// The terminal refuses raw mode.
    #[error("cannot switch the terminal to raw mode; redirect standard input, for example from /dev/null")]
    Terminal(#[source] Errno),
    /// No event descriptor.
    #[error("cannot create an event descriptor")]
    Event(#[source] io::Error),
    /// No timer.
    #[error("cannot create a timer")]
    Timer(#[source] errno::Error),
}

/// The part of the console that lives on the event loop.
#[derive(Debug)]
pub struct Console {
    serial: Arc<SerialPort>,
    /// `None` when there is no more.
    input: Option<Input>,
    /// Read, but not yet taken by the serial port.
    pending: Vec<u8>,
    drained: EventFd,
    tick: Arc<Tick>,
}

impl Console {
    /// Puts standard input and output at the other end of a serial port that raises `interrupt`.
    ///
    /// The port has these registers, or those after reset.
    pub fn on_standard_streams(
        interrupt: EventFd,
        registers: Option<&SerialRegisters>,
    ) -> Result<Self, ConsoleError> {
        let input = io::stdin()
            .as_fd()
            .try_clone_to_owned()
            .map_err(|error| ConsoleError::Standard("input", error))?;
        let output = io::stdout()
            .as_fd()
            .try_clone_to_owned()
            .map_err(|error| ConsoleError::Standard("output", error))?;
        Self::open(Some(input), output, interrupt, registers)
    }

    /// The same with other streams, and a port as after reset.
    pub fn new(input: Option<OwnedFd>, output: OwnedFd, interrupt: EventFd) -> Result<Self, ConsoleError> {
        Self::open(input, output, interrupt, None)
    }

    /// The same with other streams and these registers.
    pub(crate) fn open(
        input: Option<OwnedFd>,
        output: OwnedFd,
        interrupt: EventFd,
        registers: Option<&SerialRegisters>,
    ) -> Result<Self, ConsoleError> {
        let drained = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(ConsoleError::Event)?;
        let tick = Arc::new(Tick::new().map_err(ConsoleError::Timer)?);
        let input = match input {
            Some(input) => Input::open(input).map_err(ConsoleError::Terminal)?,
            None => None,
        };
        let serial = SerialPort::new(
            interrupt,
            drained.try_clone().map_err(ConsoleError::Event)?,
            Output::new(output, Arc::clone(&tick)),
            registers,
        );
        Ok(Self {
            serial: Arc::new(serial.map_err(ConsoleError::Event)?),
            input,
            pending: Vec::with_capacity(CHUNK),
            drained,
            tick,
        })
    }

    /// The serial port, for the bus.
    pub fn serial(&self) -> Arc<SerialPort> {
        Arc::clone(&self.serial)
    }

    /// Gives the terminal back before the console is dropped, which also does. May be called again.
    pub fn restore_terminal(&mut self) {
        if let Some(input) = &mut self.input {
            input.restore_terminal();
        }
    }

    /// Hands on what is pending. If all is taken, more may be read.
    fn hand_on(&mut self) -> bool {
        while !self.pending.is_empty() {
            match self.serial.try_enqueue(&self.pending) {
                Ok(0) => return false,
                Ok(taken) => drop(self.pending.drain(..taken)),
                Err(_busy) => {
                    self.tick.arm();
                    return false;
                }
            }
        }
        true
    }

    /// Reads once.
    fn read(&mut self, ops: &mut EventOps) {
        let Some(input) = &mut self.input else { return };
        self.pending.resize(CHUNK, 0);
        match input.read(&mut self.pending) {
            Read::Bytes(length) => self.pending.truncate(length),
            Read::Nothing => self.pending.clear(),
            Read::End => {
                self.pending.clear();
                // Out of the loop before it is closed.
                input.pause(ops);
                self.input = None;
            }
        }
    }

    /// Moves input on as far as it goes, and waits for what hinders it.
    fn pump(&mut self, ops: &mut EventOps) {
        loop {
            let room = self.hand_on();
            let Some(input) = &mut self.input else { return };
            if !room {
                // `drained` or the tick goes on.
                input.pause(ops);
                return;
            }
            input.listen(ops);
            if !input.is_file() {
                return;
            }
            self.read(ops);
        }
    }
}

impl MutEventSubscriber for Console {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let fd = events.fd();
        if fd == self.tick.as_raw_fd() {
            self.tick.expired();
            if !self.serial.try_flush() {
                self.tick.arm();
            }
            self.pump(ops);
        } else if fd == self.drained.as_raw_fd() {
            // Only fails if it is not readable after all.
            let _ = self.drained.read();
            self.pump(ops);
        } else if self.input.as_ref().is_some_and(|input| input.is(fd)) {
            if self.hand_on() {
                self.read(ops);
            }
            self.pump(ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        for fd in [self.tick.as_raw_fd(), self.drained.as_raw_fd()] {
            if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                warn!(%error, "the console is not served");
            }
        }
        self.pump(ops);
    }
}
