//! The signal mask of the calling thread.

use vmm_sys_util::{errno, signal::create_sigset};

/// Keeps `signals` pending instead of delivering them, in this thread and those that it starts.
pub(crate) fn block(signals: &[libc::c_int]) -> Result<(), errno::Error> {
    change_mask(libc::SIG_BLOCK, signals)
}

/// Lets `signals` be delivered to this thread.
pub(crate) fn unblock(signals: &[libc::c_int]) -> Result<(), errno::Error> {
    change_mask(libc::SIG_UNBLOCK, signals)
}

/// What ends a VM.
pub(crate) const ENDING: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT, libc::SIGHUP];

/// Does `work` with the signals that end a VM held back, so that threads that it starts never take one of them: they are for
/// the event loop, and one that another thread takes kills the program.
pub(crate) fn with_ending_held_back<T>(work: impl FnOnce() -> T) -> Result<T, errno::Error> {
    block(&ENDING)?;
    let result = work();
    unblock(&ENDING)?;
    Ok(result)
}

/// Whether whoever started this program wants it to ignore `signal`.
pub(crate) fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: nothing is set, and `action` is a place for the answer.
    let answer = unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: zeroes are a valid value, and the call has written another.
    answer == 0 && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}

/// Whether one of `signals`, which are blocked, is pending.
pub(crate) fn is_pending(signals: &[libc::c_int]) -> bool {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: `set` is a place for the answer.
    if unsafe { libc::sigpending(set.as_mut_ptr()) } != 0 {
        return false;
    }
    // SAFETY: the call has written it, and no number is one that there is not.
    let is_in = |signal: &libc::c_int| unsafe { libc::sigismember(set.as_ptr(), *signal) == 1 };
    signals.iter().any(is_in)
}

/// Waits until one of `signals`, which are blocked, is pending, and takes it.
pub(crate) fn wait_for(signals: &[libc::c_int]) {
    let Ok(set) = create_sigset(signals) else { return };
    let mut taken = 0;
    // SAFETY: `set` is an initialised set, `taken` a place for the answer.
    unsafe { libc::sigwait(&raw const set, &raw mut taken) };
}

fn change_mask(how: libc::c_int, signals: &[libc::c_int]) -> Result<(), errno::Error> {
    let set = create_sigset(signals)?;
    // SAFETY: `set` is an initialised set; the old mask is not asked for.
    match unsafe { libc::pthread_sigmask(how, &raw const set, std::ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(errno::Error::new(error)),
    }
}
