//! The C API: `include/umem.h` says what these functions do.

use std::cell::RefCell;
use std::ffi::{CString, c_char, c_int, c_void};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::causes::chain;
use crate::device::{
    Client, DRIVER_REQUESTS, Device, DeviceError, DeviceOptions, PageBuffer, Server, Serving,
};
use crate::units::{PAGE_SIZE, PageIndex};

/// The half that serves.
pub const UMEM_SERVER: u32 = 1;
/// The half that is mapped.
pub const UMEM_CLIENT: u32 = 2;
/// [`Serving::InPlace`].
pub const UMEM_IN_PLACE: u32 = 1;
/// [`DRIVER_REQUESTS`].
pub const UMEM_DRIVER_REQUESTS: u32 = 16384;

const _: () = assert!(UMEM_DRIVER_REQUESTS == DRIVER_REQUESTS);

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// A negative errno, and why, for [`umem_last_error`].
fn refuse(error: &DeviceError) -> c_int {
    LAST_ERROR.set(CString::new(chain(error)).unwrap_or_default());
    -error.errno()
}

fn answer(result: Result<(), DeviceError>) -> c_int {
    result.err().map_or(0, |error| refuse(&error))
}

fn count(result: Result<usize, DeviceError>) -> isize {
    result.map_or_else(|error| refuse(&error) as isize, |count| count as isize)
}

/// Puts a device where the caller wants it.
///
/// # Safety
///
/// `device` may be written to.
unsafe fn hand_out(made: Result<Device, DeviceError>, device: *mut *mut Device) -> c_int {
    answer(made.map(|made| {
        // SAFETY: by this function's own condition.
        unsafe { *device = Box::into_raw(Box::new(made)) };
    }))
}

/// # Safety
///
/// `device` may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_create(
    size: u64,
    max_requests: u32,
    flags: u32,
    device: *mut *mut Device,
) -> c_int {
    let serving = match flags {
        0 => Serving::Copied,
        UMEM_IN_PLACE => Serving::InPlace,
        _ => return -libc::EINVAL,
    };
    let options = DeviceOptions {
        size,
        max_requests,
        serving,
    };
    // SAFETY: by this function's own condition.
    unsafe { hand_out(Device::create(options), device) }
}

/// # Safety
///
/// `device` is null or came from this library, and nobody uses it any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_close(device: *mut Device) {
    if !device.is_null() {
        // SAFETY: made by Box::into_raw, and by this function's own condition not used again.
        drop(unsafe { Box::from_raw(device) });
    }
}

/// # Safety
///
/// `device` is open, and nobody else uses it meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_drop(device: *mut Device, halves: u32) {
    // SAFETY: by this function's own condition.
    let device = unsafe { &mut *device };
    let both = std::mem::replace(device, Device::from_halves(None, None));
    let (server, client) = both.into_halves();
    *device = Device::from_halves(
        server.filter(|_| halves & UMEM_SERVER == 0),
        client.filter(|_| halves & UMEM_CLIENT == 0),
    );
}

/// # Safety
///
/// As for all functions from here on: `device` is open, and what other pointers point to is there. `socket` is open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_send(device: *const Device, socket: c_int, half: u32) -> c_int {
    // SAFETY: by this function's own condition.
    let (device, socket) = unsafe { (&*device, BorrowedFd::borrow_raw(socket)) };
    answer(match half {
        UMEM_SERVER => device.server().and_then(|server| server.send(socket)),
        UMEM_CLIENT => match &*device.client() {
            Some(client) => client.send(socket),
            None => Err(DeviceError::NotHere),
        },
        _ => return -libc::EINVAL,
    })
}

/// # Safety
///
/// `device` may be written to. `socket` is open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_receive(socket: c_int, half: u32, device: *mut *mut Device) -> c_int {
    // SAFETY: by this function's own condition.
    let socket = unsafe { BorrowedFd::borrow_raw(socket) };
    let received = match half {
        UMEM_SERVER => Server::receive(socket).map(|server| Device::from_halves(Some(server), None)),
        UMEM_CLIENT => Client::receive(socket).map(|client| Device::from_halves(None, Some(client))),
        _ => return -libc::EINVAL,
    };
    // SAFETY: by this function's own condition.
    unsafe { hand_out(received, device) }
}

/// # Safety
///
/// As for [`umem_send`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_size(device: *const Device) -> u64 {
    // SAFETY: by this function's own condition.
    let device = unsafe { &*device };
    match device.server() {
        Ok(server) => server.size(),
        Err(_) => device.client().as_ref().map_or(0, Client::size),
    }
}

/// # Safety
///
/// As for [`umem_send`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_fd(device: *const Device) -> c_int {
    // SAFETY: by this function's own condition.
    let server = unsafe { &*device }.server();
    server.map_or_else(|error| refuse(&error), |server| server.as_fd().as_raw_fd())
}

/// # Safety
///
/// As for [`umem_send`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_window_fd(device: *const Device) -> c_int {
    // SAFETY: by this function's own condition.
    let server = unsafe { &*device }.server();
    server.map_or_else(|error| refuse(&error), |server| server.window_file().as_raw_fd())
}

/// # Safety
///
/// As for [`umem_send`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_window(device: *const Device) -> *mut c_void {
    // SAFETY: by this function's own condition.
    let window = unsafe { &*device }.server().and_then(Server::window);
    window.map_or_else(
        |error| {
            refuse(&error);
            std::ptr::null_mut()
        },
        <*mut u8>::cast,
    )
}

/// # Safety
///
/// As for [`umem_send`]; at `pages` there is room for `room` indices.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_read(device: *mut Device, pages: *mut u64, room: usize) -> isize {
    let bytes = room.saturating_mul(size_of::<u64>());
    // SAFETY: by this function's own condition.
    let read = unsafe { (*device).read_to(pages.cast(), bytes) };
    count(read.map(|bytes| bytes / size_of::<u64>()))
}

/// # Safety
///
/// As for [`umem_send`]; at `pages` there are `number` indices.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_write(device: *mut Device, pages: *const u64, number: usize) -> isize {
    if number == 0 {
        return -(libc::EINVAL as isize);
    }
    // SAFETY: by this function's own condition; an index is a u64.
    let (device, pages) = unsafe {
        (
            &*device,
            std::slice::from_raw_parts(pages.cast::<PageIndex>(), number),
        )
    };
    count(device.write(pages))
}

/// # Safety
///
/// As for [`umem_send`]; at `content` there are `number` pages.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_write_from(
    device: *mut Device,
    first: u64,
    content: *const c_void,
    number: usize,
) -> c_int {
    let Some(length) = number.checked_mul(PAGE_SIZE).filter(|length| *length > 0) else {
        return -libc::EINVAL;
    };
    // SAFETY: by this function's own condition.
    let (device, content) = unsafe { (&*device, std::slice::from_raw_parts(content.cast::<u8>(), length)) };
    let server = device.server();
    answer(server.and_then(|server| server.write_from(PageIndex(first), content)))
}

/// # Safety
///
/// As for [`umem_send`]; at `content` there are `number` pages of private memory, aligned to a page, that nobody uses meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_donate(
    device: *mut Device,
    first: u64,
    content: *mut c_void,
    number: usize,
) -> c_int {
    // SAFETY: by this function's own condition.
    let buffer = unsafe { PageBuffer::from_raw(content.cast(), number as u64) };
    let Some(buffer) = buffer else {
        return -libc::EINVAL;
    };
    // It stays the caller's memory.
    let mut buffer = std::mem::ManuallyDrop::new(buffer);
    // SAFETY: by this function's own condition.
    let device = unsafe { &*device };
    answer(
        device
            .server()
            .and_then(|server| server.donate(PageIndex(first), &mut buffer)),
    )
}

/// # Safety
///
/// As for [`umem_send`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_map(device: *mut Device, start: *mut *mut c_void) -> c_int {
    // SAFETY: by this function's own condition.
    let device = unsafe { &*device };
    answer(device.map_all().map(|mapping| {
        // SAFETY: by this function's own condition.
        unsafe { *start = mapping.into_raw().cast() };
    }))
}

/// # Safety
///
/// As for [`umem_send`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_make_anonymous(device: *mut Device) -> c_int {
    // SAFETY: by this function's own condition.
    answer(unsafe { &*device }.make_anonymous())
}

/// Valid until the next function that fails in this thread.
#[unsafe(no_mangle)]
pub extern "C" fn umem_last_error() -> *const c_char {
    LAST_ERROR.with_borrow(|error| error.as_ptr())
}
