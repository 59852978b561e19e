//! The functions that were replaced.

use std::ffi::{CStr, c_void};
use std::sync::atomic::AtomicPtr;
use std::sync::atomic::Ordering::{Acquire, Release};

/// A function of the next library that has one of this name: the C library, or another one that is preloaded.
pub(crate) struct Next {
    name: &'static CStr,
    found: AtomicPtr<c_void>,
}

impl Next {
    pub(crate) const fn new(name: &'static CStr) -> Self {
        Self {
            name,
            found: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    /// Where it is. A C library without it has no program that could have called it.
    pub(crate) fn find(&self) -> *mut c_void {
        let mut found = self.found.load(Acquire);
        if found.is_null() {
            // SAFETY: a name that ends in 0.
            found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
            self.found.store(found, Release);
        }
        if found.is_null() {
            // SAFETY: ends the process.
            unsafe { libc::abort() };
        }
        found
    }
}

/// Calls the function that was replaced, with its own type.
macro_rules! next {
    ($name:ident($($argument:expr),*) as $type:ty) => {{
        static NEXT: $crate::next::Next = match std::ffi::CStr::from_bytes_with_nul(
            concat!(stringify!($name), "\0").as_bytes(),
        ) {
            Ok(name) => $crate::next::Next::new(name),
            Err(_) => unreachable!(),
        };
        // SAFETY: the function of this name has this type, and the arguments are those that the caller meant for it.
        unsafe { std::mem::transmute::<*mut std::ffi::c_void, $type>(NEXT.find())($($argument),*) }
    }};
}
pub(crate) use next;
