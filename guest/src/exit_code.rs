//! How the guest says why it ended.

/// The number that the guest writes to [`EXIT_PORT`](crate::EXIT_PORT) as its last act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ExitCode {
    /// The workload did its work and found nothing wrong.
    Ok = 0,
    /// A check failed: a page did not hold what it should.
    CheckFailed = 1,
    /// The command line asks for what this guest does not know; `error=` names it.
    CommandLine = 2,
    /// An unexpected processor exception; `exception=` names it.
    Exception = 3,
    /// The guest's program panicked.
    Panic = 4,
    /// The machine lacks something that the guest needs (memory map, a CPU that starts, a clock); `error=` names it.
    Machine = 5,
}
