//! What the fuzz targets share: an allocator that knows when nothing may be allocated.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static FORBIDDEN: Cell<bool> = const { Cell::new(false) };
}

struct Watched;

#[global_allocator]
static ALLOCATOR: Watched = Watched;

fn check() {
    if FORBIDDEN.replace(false) {
        panic!("memory was allocated while decoding");
    }
}

// SAFETY: everything is left to `System`.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        check();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on, and `at` came from `System`.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        check();
        // SAFETY: the caller's promises are passed on, and `at` came from `System`.
        unsafe { System.realloc(at, layout, size) }
    }
}

/// Runs `decode`, which panics if it allocates.
pub fn without_allocation<T>(decode: impl FnOnce() -> T) -> T {
    FORBIDDEN.set(true);
    let result = decode();
    FORBIDDEN.set(false);
    result
}
