//! What there is to a device.

use std::ffi::{CStr, c_int, c_void};
use std::os::fd::RawFd;
use std::sync::Arc;

use crate::{umem, ummunotify};

/// An errno.
pub(crate) type Errno = c_int;

/// What mmap was asked for.
#[derive(Clone, Copy)]
pub(crate) struct MapRequest {
    pub(crate) address: *mut c_void,
    pub(crate) length: usize,
    pub(crate) protection: c_int,
    pub(crate) flags: c_int,
    pub(crate) offset: i64,
}

/// How that is answered.
pub(crate) enum Mapped {
    /// By the mapping of another file, with other flags.
    File(RawFd, c_int),
    /// It is done.
    At(*mut c_void),
}

/// An open file of a device.
pub(crate) trait Device: Send + Sync {
    /// What poll and its like can wait for, and what a program's own descriptor is a duplicate of.
    fn descriptor(&self) -> Result<RawFd, Errno>;

    /// The status flags, as F_GETFL gives them. `native`: those of the descriptor.
    fn flags(&self, native: c_int) -> c_int;

    /// As F_SETFL. `None`: the descriptor's own flags are the device's.
    fn set_flags(&self, fd: c_int, flags: c_int) -> Option<Result<(), Errno>>;

    /// `None`: as any file does.
    fn ioctl(&self, fd: c_int, request: u64, argument: *mut c_void) -> Option<Result<c_int, Errno>>;

    fn read(&self, buffer: *mut c_void, length: usize) -> Result<usize, Errno>;

    fn write(&self, buffer: *const c_void, length: usize) -> Result<usize, Errno>;

    fn mmap(&self, request: MapRequest) -> Result<Mapped, Errno>;
}

/// Opens the device of this name. `None`: it is a file like any other.
pub(crate) fn open(path: &CStr, flags: c_int) -> Option<Result<Arc<dyn Device>, Errno>> {
    let device: Result<Arc<dyn Device>, Errno> = match path.to_bytes() {
        b"/dev/umem" => umem::Device::open(flags).map(|device| Arc::new(device) as _),
        b"/dev/ummunotify" => ummunotify::Device::open(flags).map(|device| Arc::new(device) as _),
        _ => return None,
    };
    Some(device)
}

/// Says why a device cannot be had.
pub(crate) fn complain(device: &str, error: &dyn std::error::Error) {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    eprintln!("{device}: {text}");
}
