//! The C API: `include/ummunotify.h` says what these functions do.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int};
use std::os::fd::AsRawFd;

use crate::abi::{RawEvent, Register};
use crate::choice::{Choice, WatcherKind};
use crate::notifier::{Notifier, ReadError};
use crate::ranges::{AddressRange, Cookie};

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// An error with its causes, as one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// # Safety
///
/// `watcher` is null or a string; `notifier` may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ummunotify_open(watcher: *const c_char, notifier: *mut *mut Notifier) -> c_int {
    let name = if watcher.is_null() {
        "auto".into()
    } else {
        // SAFETY: by this function's own condition.
        unsafe { CStr::from_ptr(watcher) }.to_string_lossy()
    };
    let failed = |error: &dyn std::error::Error, errno: c_int| {
        LAST_ERROR.set(CString::new(chain(error)).unwrap_or_default());
        -errno
    };
    let choice: Choice = match name.parse() {
        Ok(choice) => choice,
        Err(error) => return failed(&error, libc::EINVAL),
    };
    match Notifier::open(choice) {
        Ok(opened) => {
            // SAFETY: by this function's own condition.
            unsafe { *notifier = Box::into_raw(Box::new(opened)) };
            0
        }
        Err(error) => failed(&error, libc::ENODEV),
    }
}

/// # Safety
///
/// `notifier` is null or came from [`ummunotify_open`], and nobody uses it any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ummunotify_close(notifier: *mut Notifier) {
    if !notifier.is_null() {
        // SAFETY: made by Box::into_raw, and by this function's own condition not used again.
        drop(unsafe { Box::from_raw(notifier) });
    }
}

/// Valid until the next call of [`ummunotify_open`] in this thread.
#[unsafe(no_mangle)]
pub extern "C" fn ummunotify_last_error() -> *const c_char {
    LAST_ERROR.with_borrow(|error| error.as_ptr())
}

/// # Safety
///
/// As for all functions from here on: `notifier` is open, and what other pointers point to is there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ummunotify_watcher(notifier: *const Notifier) -> *const c_char {
    // SAFETY: by this function's own condition.
    match unsafe { &*notifier }.watcher() {
        WatcherKind::Kvm => c"kvm",
        WatcherKind::Perf => c"perf",
        WatcherKind::Userfaultfd => c"userfaultfd",
        WatcherKind::Hand => c"hand",
    }
    .as_ptr()
}

/// # Safety
///
/// As for [`ummunotify_watcher`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ummunotify_exchange_features(notifier: *mut Notifier, features: *mut u32) -> c_int {
    // SAFETY: by this function's own condition.
    match unsafe { &*notifier }.exchange_features(unsafe { *features }) {
        Ok(there) => {
            // SAFETY: by this function's own condition.
            unsafe { *features = there };
            0
        }
        Err(error) => -error.errno(),
    }
}

/// # Safety
///
/// As for [`ummunotify_watcher`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ummunotify_register(notifier: *mut Notifier, range: *const Register) -> c_int {
    // SAFETY: by this function's own condition.
    let (notifier, range) = unsafe { (&*notifier, *range) };
    match notifier.register(
        AddressRange::new(range.start, range.end),
        Cookie(range.user_cookie),
    ) {
        Ok(()) => 0,
        Err(error) => -error.errno(),
    }
}

/// # Safety
///
/// As for [`ummunotify_watcher`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ummunotify_unregister(notifier: *mut Notifier, cookie: u64) -> c_int {
    // SAFETY: by this function's own condition.
    match unsafe { &*notifier }.unregister(Cookie(cookie)) {
        Ok(()) => 0,
        Err(error) => -error.errno(),
    }
}

/// # Safety
///
/// As for [`ummunotify_watcher`]; at `events` there is room for `count` of them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ummunotify_read(
    notifier: *mut Notifier,
    events: *mut RawEvent,
    count: usize,
    wait: c_int,
) -> isize {
    // SAFETY: by this function's own condition.
    let notifier = unsafe { &*notifier };
    let read = if wait == 0 {
        notifier.try_read_or_none(count).map_err(ReadError::from)
    } else {
        notifier.read(count).map(Some)
    };
    match read {
        Ok(Some(read)) => {
            for (at, event) in read.iter().enumerate() {
                // SAFETY: no more than `count` were read.
                unsafe { events.add(at).write((*event).into()) };
            }
            read.len() as isize
        }
        Ok(None) => -(libc::EAGAIN as isize),
        Err(error) => -(error.errno() as isize),
    }
}

/// # Safety
///
/// As for [`ummunotify_watcher`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ummunotify_fd(notifier: *mut Notifier) -> c_int {
    // SAFETY: by this function's own condition.
    unsafe { &*notifier }
        .descriptor()
        .map_or(-libc::ENODEV, |descriptor| descriptor.as_raw_fd())
}

/// # Safety
///
/// As for [`ummunotify_watcher`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ummunotify_count(notifier: *const Notifier) -> u64 {
    // SAFETY: by this function's own condition.
    unsafe { &*notifier }.counter().load()
}

/// # Safety
///
/// As for [`ummunotify_watcher`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ummunotify_counter(notifier: *const Notifier) -> *const u64 {
    // SAFETY: by this function's own condition.
    let page = unsafe { &*notifier }.counter().page();
    page.map_or(std::ptr::null(), |page| page.start().as_ptr())
}

/// # Safety
///
/// As for [`ummunotify_watcher`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ummunotify_counter_fd(notifier: *const Notifier) -> c_int {
    // SAFETY: by this function's own condition.
    let page = unsafe { &*notifier }.counter().page();
    page.map_or(-libc::ENODEV, |page| page.file().as_raw_fd())
}
