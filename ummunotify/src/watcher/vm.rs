//! An empty VM, for the MMU notifier that KVM registers on the address space of who makes one.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Pid, getpid};

/// `_IO(KVMIO, 0x01)`.
const KVM_CREATE_VM: libc::Ioctl = 0xae01;

/// This process' VM, if a notifier that uses it is open. With several, each invalidation would be noticed several times.
static VM: Mutex<Option<(Pid, Weak<OwnedFd>)>> = Mutex::new(None);

/// The VM of this process.
pub(crate) fn get() -> io::Result<Arc<OwnedFd>> {
    let mut current = VM.lock().unwrap_or_else(PoisonError::into_inner);
    // That of the process from which this one was forked hears nothing of this one.
    if let Some((owner, vm)) = &*current
        && *owner == getpid()
        && let Some(vm) = vm.upgrade()
    {
        return Ok(vm);
    }
    let vm = Arc::new(create()?);
    *current = Some((getpid(), Arc::downgrade(&vm)));
    Ok(vm)
}

fn create() -> io::Result<OwnedFd> {
    let kvm = open("/dev/kvm", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    // SAFETY: takes a number, the type of the VM.
    let vm = unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, 0) };
    if vm < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened it (close-on-exec, as all that KVM opens).
    Ok(unsafe { OwnedFd::from_raw_fd(vm) })
}
