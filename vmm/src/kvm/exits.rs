//! How often vCPUs left the guest, by reason.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Why `KVM_RUN` returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest reads a port.
    PortRead = 0,
    /// It writes one.
    PortWrite = 1,
    /// It reads where there is no memory.
    MemoryRead = 2,
    /// It writes there.
    MemoryWrite = 3,
    /// It was kicked, or woke up with nothing to do.
    Interrupted = 4,
    /// It ended the VM, or cannot go on.
    Final = 5,
}

impl ExitReason {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::PortRead,
        Self::PortWrite,
        Self::MemoryRead,
        Self::MemoryWrite,
        Self::Interrupted,
        Self::Final,
    ];

    /// Its name for people and programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PortRead => "port-read",
            Self::PortWrite => "port-write",
            Self::MemoryRead => "memory-read",
            Self::MemoryWrite => "memory-write",
            Self::Interrupted => "interrupted",
            Self::Final => "final",
        }
    }
}

/// One vCPU's count. Written by its thread, read by any.
#[derive(Debug, Default)]
pub struct ExitCounts([AtomicU64; ExitReason::ALL.len()]);

impl ExitCounts {
    pub(super) fn count(&self, reason: ExitReason) {
        self.0[reason as usize].fetch_add(1, Relaxed);
    }

    /// How often so far.
    pub fn get(&self, reason: ExitReason) -> u64 {
        self.0[reason as usize].load(Relaxed)
    }
}
