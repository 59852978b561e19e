//! Making a vCPU leave `KVM_RUN`, from any thread.
//!
//! The other thread writes its request where the vCPU thread will look, sets `immediate_exit` in the vCPU's shared page,
//! and then sends the vCPU thread a signal whose handler does nothing. Whatever the vCPU thread is doing, no request is
//! missed:
//!
//! - *on its way to `KVM_RUN`*: KVM finds `immediate_exit` set and returns EINTR before it enters the guest. The signal is
//!   taken earlier, or is pending when KVM looks for one, which is the next case;
//! - *in `KVM_RUN`, beyond the check of `immediate_exit`*: the signal is pending or interrupts the CPU, and KVM looks for
//!   pending signals with interrupts off, right before it enters the guest;
//! - *back from `KVM_RUN`, not yet acknowledged*: the acknowledgement clears `immediate_exit` and reads its old value in
//!   one step. Either that value was 1, and then the request that was written before is visible, or it was 0, and the
//!   store comes later and makes the next `KVM_RUN` return.
//!
//! An acknowledgement comes *before* the vCPU thread looks at requests. The price is a spurious return now and then.
//!
//! A kick does not wait. A vCPU that is blocked on an absent page may stay in the kernel until the page comes.

use std::{
    marker::PhantomData,
    os::fd::{AsRawFd, BorrowedFd},
    ptr::NonNull,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use thiserror::Error;
use vmm_sys_util::{
    errno,
    signal::{SIGRTMIN, register_signal_handler},
};

use crate::signals;

/// Why a vCPU could not be made kickable.
#[derive(Debug, Error)]
pub enum KickError {
    /// The page that KVM shares with its user cannot be mapped.
    #[error("cannot map the vCPU's shared page")]
    Map(#[source] rustix::io::Errno),
    /// No handler for the kick signal.
    #[error("cannot install a handler for real-time signal {number}", number = SIGRTMIN())]
    Handler(#[source] errno::Error),
    /// The signal stays blocked.
    #[error("cannot unblock real-time signal {number} in the vCPU's thread", number = SIGRTMIN())]
    Unblock(#[source] errno::Error),
}

/// Makes one vCPU leave `KVM_RUN`. Clones are for the same vCPU.
#[derive(Clone, Debug)]
pub struct VcpuKick {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    page: RunPage,
    /// The thread that runs the vCPU. The lock is held while it is signalled, so that it cannot end meanwhile.
    thread: Mutex<Option<libc::pthread_t>>,
}

impl VcpuKick {
    pub(super) fn new(vcpu: &VcpuFd) -> Result<Self, KickError> {
        // Without SA_RESTART, so that it also interrupts a system call that the thread waits in for other reasons.
        register_signal_handler(SIGRTMIN(), do_nothing).map_err(KickError::Handler)?;
        Ok(Self {
            shared: Arc::new(Shared {
                page: RunPage::map(vcpu)?,
                thread: Mutex::new(None),
            }),
        })
    }

    /// Lets kicks interrupt the calling thread until the answer is dropped. The thread that runs the vCPU calls it first.
    pub fn attach(&self) -> Result<Attachment<'_>, KickError> {
        signals::unblock(&[SIGRTMIN()]).map_err(KickError::Unblock)?;
        // SAFETY: always succeeds, has no preconditions.
        self.set_thread(Some(unsafe { libc::pthread_self() }));
        Ok(Attachment {
            kick: self,
            not_send: PhantomData,
        })
    }

    /// Makes the vCPU return from `KVM_RUN`, or not enter the guest the next time. Returns at once.
    pub fn kick(&self) {
        self.shared.page.immediate_exit().store(1, Ordering::SeqCst);
        let thread = self.shared.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = *thread {
            // SAFETY: the thread is alive: it clears this entry, under the lock, before it ends.
            let result = unsafe { libc::pthread_kill(thread, SIGRTMIN()) };
            debug_assert_eq!(result, 0);
        }
    }

    /// To be called by the vCPU's thread: the next `KVM_RUN` completes what is pending and returns without entering the guest.
    pub(super) fn hold_back(&self) {
        self.shared.page.immediate_exit().store(1, Ordering::SeqCst);
    }

    /// To be called by the vCPU's thread after `KVM_RUN` was interrupted, before it looks at requests.
    pub(super) fn acknowledge(&self) {
        self.shared.page.immediate_exit().swap(0, Ordering::SeqCst);
    }

    /// Bytes of one port access, of which a string instruction may make several in one exit.
    ///
    /// To be called by the vCPU's thread after an exit for port access.
    pub(super) fn port_access_size(&self) -> usize {
        // SAFETY: the page is mapped and initialised by KVM, which does not write to it while the vCPU does not run;
        // for an exit for port access `io` is the valid member, and bytes of any value are a valid `kvm_run`.
        let io = unsafe { (&raw const (*self.shared.page.0.as_ptr()).__bindgen_anon_1.io).read() };
        usize::from(io.size)
    }

    fn set_thread(&self, thread: Option<libc::pthread_t>) {
        *self.shared.thread.lock().unwrap_or_else(PoisonError::into_inner) = thread;
    }
}

/// The time in which kicks interrupt a thread.
#[derive(Debug)]
pub struct Attachment<'a> {
    kick: &'a VcpuKick,
    /// Must be dropped in the thread that it stands for.
    not_send: PhantomData<*const ()>,
}

impl Drop for Attachment<'_> {
    fn drop(&mut self) {
        self.kick.set_thread(None);
    }
}

extern "C" fn do_nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// A mapping of its own of the page that KVM shares with its user, so that it is there for as long as somebody may kick.
#[derive(Debug)]
struct RunPage(NonNull<kvm_run>);

// SAFETY: the mapping belongs to the process, not to a thread. `immediate_exit` is accessed atomically, everything else by
// the vCPU's thread alone.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// `kvm_run` is smaller than a page; what follows it is data that its fields point to.
    const SIZE: usize = 4096;

    fn map(vcpu: &VcpuFd) -> Result<Self, KickError> {
        const { assert!(size_of::<kvm_run>() <= RunPage::SIZE) };
        // SAFETY: the descriptor is open for as long as `vcpu` is borrowed. A new mapping is made where nothing else is.
        let address = unsafe {
            mmap(
                std::ptr::null_mut(),
                Self::SIZE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                BorrowedFd::borrow_raw(vcpu.as_raw_fd()),
                0,
            )
        }
        .map_err(KickError::Map)?;
        NonNull::new(address.cast())
            .map(Self)
            .ok_or(KickError::Map(rustix::io::Errno::FAULT))
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte is mapped for as long as `self`, and all of this program accesses it as an atomic.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.0.as_ptr()).immediate_exit) }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`; no reference into it outlives `self`.
        let result = unsafe { munmap(self.0.as_ptr().cast(), Self::SIZE) };
        debug_assert!(result.is_ok());
    }
}
