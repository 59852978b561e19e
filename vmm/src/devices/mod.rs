//! The devices of the platform, a fixed set, and the event loop that serves them.

mod balloon;
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
mod virtio_mmio;

pub use balloon::{Balloon, BalloonOptions, BalloonState, BalloonStatus};
pub use bus::{DeviceBus, DeviceState};
pub use console::{Console, ConsoleError};
pub use event_loop::{EventLoop, EventLoopError, Stopper};
pub use power::SleepControl;
pub use reset::ResetControl;
pub use serial::{SERIAL_IRQ, SERIAL_PORTS, SerialPort, SerialRegisters};
pub use virtio_mmio::BLOCK_SIZE as VIRTIO_BLOCK_SIZE;

/// The balloon's interrupt line.
pub const BALLOON_IRQ: u32 = 5;
