//! How often a tracepoint of the kernel was passed, by thread. KVM's own statistics know nothing of asynchronous page faults.
//!
//! `perf_event_open(2)`; a tracepoint's number is in tracefs, which need not be mounted anywhere.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
use rustix::process::Pid;

/// Where tracefs usually is.
const MOUNTED: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// The first version of `struct perf_event_attr`, for a counter.
#[derive(Default)]
#[repr(C)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    /// Sampling, what is read, flags, and what the kernel has no use for here.
    _zero: [u64; 6],
}

const PERF_TYPE_TRACEPOINT: u32 = 2;
const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;

/// The counter of a tracepoint in one thread. It counts until it is dropped, whoever reads it.
#[derive(Debug)]
struct Counter(File);

impl Counter {
    /// Counts in a thread of this process. `None`: not here, or not for us.
    fn start(tracefs: &OwnedFd, event: &str, thread: Pid) -> Option<Self> {
        let path = format!("events/kvm/{event}/id");
        let id = openat(tracefs, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        let mut text = String::new();
        File::from(id).read_to_string(&mut text).ok()?;
        let attributes = Attributes {
            kind: PERF_TYPE_TRACEPOINT,
            size: size_of::<Attributes>() as u32,
            config: text.trim().parse().ok()?,
            ..Default::default()
        };
        // SAFETY: `attributes` is a valid structure of the size that it names; the kernel reads it.
        let fd = unsafe {
            let (any_cpu, no_group) = (-1, -1);
            libc::syscall(
                libc::SYS_perf_event_open,
                &raw const attributes,
                thread.as_raw_nonzero().get(),
                any_cpu,
                no_group,
                PERF_FLAG_FD_CLOEXEC,
            )
        };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
        // SAFETY: a new descriptor that belongs to nobody else.
        Some(Self(File::from(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    fn read(&self) -> Option<u64> {
        let mut count = [0; 8];
        (&self.0).read_exact(&mut count).ok()?;
        Some(u64::from_ne_bytes(count))
    }
}

/// The events of asynchronous page faults that KVM sent to one vCPU.
#[derive(Debug)]
pub struct AsyncPageFaultCounter {
    not_present: Counter,
    ready: Counter,
}

impl AsyncPageFaultCounter {
    /// Counts in `thread` of this process, which runs a vCPU, from now on. `None`: it cannot be counted here, or this process may
    /// not. The first counter of a tracepoint can take 20 ms: the kernel changes its code.
    pub fn start(thread: Pid) -> Option<Self> {
        let tracefs = tracefs()?;
        Some(Self {
            not_present: Counter::start(&tracefs, "kvm_async_pf_not_present", thread)?,
            ready: Counter::start(&tracefs, "kvm_async_pf_ready", thread)?,
        })
    }

    /// Events so far: pages not present, and pages ready. (Also read when the thread has ended.)
    pub fn read(&self) -> Option<(u64, u64)> {
        Some((self.not_present.read()?, self.ready.read()?))
    }
}

/// The directory of tracefs: where it is mounted, or else a mount of it that nobody else sees.
fn tracefs() -> Option<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mounted = MOUNTED.into_iter().find_map(|path| {
        let directory = openat(CWD, path, flags, Mode::empty()).ok()?;
        rustix::fs::accessat(
            &directory,
            "events/kvm",
            rustix::fs::Access::EXISTS,
            rustix::fs::AtFlags::empty(),
        )
        .ok()?;
        Some(directory)
    });
    mounted.or_else(|| {
        let context = fsopen("tracefs", FsOpenFlags::FSOPEN_CLOEXEC).ok()?;
        fsconfig_create(context.as_fd()).ok()?;
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY;
        fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_runs_no_vcpu_has_no_events() {
        if let Some(counter) = AsyncPageFaultCounter::start(rustix::thread::gettid()) {
            assert_eq!(counter.read(), Some((0, 0)));
        } else {
            // Only root may always.
            assert!(!rustix::process::geteuid().is_root() || tracefs().is_none());
        }
    }
}
