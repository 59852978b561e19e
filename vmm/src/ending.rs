//! Why a VM stopped.

use crate::kvm::VcpuError;

/// The reason that ends the run of a VM. The first one counts: what other vCPUs do after it is of no interest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest wrote this code to the exit port.
    GuestExit(u32),
    /// The guest switched the machine off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// A vCPU shut down: an exception while delivering a double fault (Intel SDM volume 3, 7.15, interrupt 8).
    TripleFault,
    /// The guest reported that it crashed.
    Panic,
    /// Somebody outside asked the VM to stop.
    Stopped,
    /// It runs somewhere else.
    Migrated,
    /// A vCPU cannot go on.
    Error(VcpuError),
}
