//! The devices of the platform, a fixed set, and the event loop that serves them.

mod bus;
mod console;
mod event_loop;
mod exit_port;
mod input;
mod output;
mod power;
mod reset;
mod serial;
mod terminal;
mod tick;

pub use bus::{DeviceBus, DeviceState};
pub use console::{Console, ConsoleError};
pub use event_loop::{EventLoop, EventLoopError, Stopper};
pub use power::SleepControl;
pub use reset::ResetControl;
pub use serial::{SERIAL_IRQ, SERIAL_PORTS, SerialPort, SerialRegisters};
