//! The part of perf_event_open(2) that is needed, as in the kernel's `include/uapi/linux/perf_event.h`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// The first version of `struct perf_event_attr`, which has all that is needed.
#[derive(Debug, Default)]
#[repr(C)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_kind: u64,
    read_format: u64,
    flags: u64,
    wakeup: u32,
    breakpoint_kind: u32,
    config1: u64,
}

const KIND_TRACEPOINT: u32 = 2;

/// Records begin with the number of their event, and have what the tracepoint tells.
const SAMPLE_RAW: u64 = 1 << 10;
const SAMPLE_IDENTIFIER: u64 = 1 << 16;

const FLAG_DISABLED: u64 = 1;
/// `wakeup` is in bytes of the ring. Otherwise it is in records.
const FLAG_WATERMARK: u64 = 1 << 14;

const OPEN_CLOEXEC: u64 = 1 << 3;

// _IO('$', 0), _IO('$', 1), _IO('$', 5).
const ENABLE: libc::Ioctl = 0x2400;
const DISABLE: libc::Ioctl = 0x2401;
const SET_OUTPUT: libc::Ioctl = 0x2405;

/// When who waits for records of an event is woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wakes {
    /// Once in so many bytes.
    After(u32),
    /// By each record, once the event is switched on.
    Always,
}

/// A tracepoint's event: a record for each time that one CPU passes it.
#[derive(Debug)]
pub(super) struct Event(OwnedFd);

impl Event {
    /// Opens it, on whatever address space and by whomever the tracepoint is passed.
    pub(super) fn open(tracepoint: u64, cpu: u32, wakes: Wakes) -> io::Result<Self> {
        let (flags, wakeup) = match wakes {
            Wakes::After(bytes) => (FLAG_WATERMARK, bytes),
            Wakes::Always => (FLAG_DISABLED, 1),
        };
        let attributes = Attributes {
            kind: KIND_TRACEPOINT,
            size: size_of::<Attributes>() as u32,
            config: tracepoint,
            sample_period: 1,
            sample_kind: SAMPLE_IDENTIFIER | SAMPLE_RAW,
            flags,
            wakeup,
            ..Attributes::default()
        };
        let (all_processes, no_group) = (-1, -1);
        // SAFETY: takes the structure, and numbers.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                &raw const attributes,
                all_processes,
                cpu,
                no_group,
                OPEN_CLOEXEC,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just opened it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    /// From now on its records go into the ring of another event of the same CPU.
    pub(super) fn write_to_ring_of(&self, other: &Self) -> io::Result<()> {
        self.control(SET_OUTPUT, other.0.as_raw_fd())
    }

    /// From now on there are records.
    pub(super) fn enable(&self) -> io::Result<()> {
        self.control(ENABLE, 0)
    }

    /// From now on there are none.
    pub(super) fn disable(&self) -> io::Result<()> {
        self.control(DISABLE, 0)
    }

    fn control(&self, request: libc::Ioctl, argument: i32) -> io::Result<()> {
        // SAFETY: these requests take a number.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until what every CPU is doing in the kernel without being interruptible by others is done.
pub(super) fn wait_for_all_cpus() {
    /// `MEMBARRIER_CMD_GLOBAL`.
    const GLOBAL: i32 = 1;
    // SAFETY: takes numbers.
    unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) };
}

/// The CPUs that are online.
pub(super) fn cpus() -> io::Result<Vec<u32>> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/online")?;
    parse_cpus(&text).ok_or_else(|| io::Error::other("the list of CPUs is not one that is known"))
}

/// Of a list like "0-3,8".
fn parse_cpus(text: &str) -> Option<Vec<u32>> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        cpus.extend(first.parse().ok()?..=last.parse::<u32>().ok()?);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_cpus() {
        assert_eq!(parse_cpus("0-3,8,10-11\n"), Some(vec![0, 1, 2, 3, 8, 10, 11]));
        assert_eq!(parse_cpus("0\n"), Some(vec![0]));
        assert_eq!(parse_cpus("\n"), None);
        assert_eq!(size_of::<Attributes>(), 64);
    }
}
