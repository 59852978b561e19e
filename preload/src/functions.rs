//! The functions of the C library that are replaced.
//!
//! Their last arguments are variable in C; on x86-64 those come in the same registers as others do, so that reading one that
//! was not given reads what nobody will use.

#![allow(clippy::missing_safety_doc)] // the C library's manual pages say what their callers see to

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_void};

use crate::device::{self, Device, Errno, MapRequest, Mapped};
use crate::next::next;
use crate::table;

type Open = unsafe extern "C" fn(*const c_char, c_int, c_uint) -> c_int;
type OpenAt = unsafe extern "C" fn(c_int, *const c_char, c_int, c_uint) -> c_int;
type OpenChecked = unsafe extern "C" fn(*const c_char, c_int) -> c_int;
type OpenAtChecked = unsafe extern "C" fn(c_int, *const c_char, c_int) -> c_int;
type Mmap = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, c_int, i64) -> *mut c_void;
type Fcntl = unsafe extern "C" fn(c_int, c_int, *mut c_void) -> c_int;

/// What a system call returns.
fn answer<T: From<i8>>(result: Result<T, Errno>) -> T {
    result.unwrap_or_else(|errno| {
        // SAFETY: this thread's errno.
        unsafe { *libc::__errno_location() = errno };
        T::from(-1)
    })
}

/// Opens a device, if it is one.
///
/// # Safety
///
/// `path` is null or a string.
unsafe fn open_device(path: *const c_char, flags: c_int) -> Option<c_int> {
    if path.is_null() {
        return None;
    }
    // SAFETY: by this function's own condition.
    let device = device::open(unsafe { CStr::from_ptr(path) }, flags)?;
    Some(answer(device.and_then(|device| {
        let duplicate = if flags & libc::O_CLOEXEC != 0 {
            libc::F_DUPFD_CLOEXEC
        } else {
            libc::F_DUPFD
        };
        // SAFETY: duplicates a descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_fcntl, device.descriptor()?, duplicate, 0) } as c_int;
        if fd < 0 {
            return Err(libc::EMFILE);
        }
        if !table::set(fd, Some(device)) {
            // SAFETY: the descriptor made above, of which nobody knows.
            unsafe { libc::syscall(libc::SYS_close, fd) };
            return Err(libc::EMFILE);
        }
        Ok(fd)
    })))
}

/// A replacement for a function that opens a file.
macro_rules! opens {
    ($($name:ident([$($before:ident: $type:ty)?] path, flags $(, $mode:ident)?) as $next:ty;)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(
            $($before: $type,)?
            path: *const c_char,
            flags: c_int
            $(, $mode: c_uint)?
        ) -> c_int {
            // SAFETY: as for the function that this replaces.
            if let Some(fd) = unsafe { open_device(path, flags) } {
                return fd;
            }
            next!($name($($before,)? path, flags $(, $mode)?) as $next)
        }
    )*};
}

opens! {
    open([] path, flags, mode) as Open;
    open64([] path, flags, mode) as Open;
    openat([directory: c_int] path, flags, mode) as OpenAt;
    openat64([directory: c_int] path, flags, mode) as OpenAt;
    __open_2([] path, flags) as OpenChecked;
    __open64_2([] path, flags) as OpenChecked;
    __openat_2([directory: c_int] path, flags) as OpenAtChecked;
    __openat64_2([directory: c_int] path, flags) as OpenAtChecked;
}

#[unsafe(no_mangle)]
unsafe extern "C" fn close(fd: c_int) -> c_int {
    table::set(fd, None);
    next!(close(fd) as unsafe extern "C" fn(c_int) -> c_int)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    // These are the kernel's business for all descriptors alike.
    let of_any = matches!(request, libc::FIOCLEX | libc::FIONCLEX);
    let device = table::get(fd).filter(|_| !of_any);
    match device.and_then(|device| device.ioctl(fd, request, argument)) {
        Some(result) => answer(result),
        None => {
            next!(ioctl(fd, request, argument) as unsafe extern "C" fn(c_int, c_ulong, *mut c_void) -> c_int)
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn read(fd: c_int, buffer: *mut c_void, length: usize) -> isize {
    if let Some(device) = table::get(fd) {
        return read_device(&*device, buffer, length);
    }
    next!(read(fd, buffer, length) as unsafe extern "C" fn(c_int, *mut c_void, usize) -> isize)
}

/// `read` in a program that was compiled with checks of its buffers.
#[unsafe(no_mangle)]
unsafe extern "C" fn __read_chk(fd: c_int, buffer: *mut c_void, length: usize, room: usize) -> isize {
    if let Some(device) = table::get(fd).filter(|_| length <= room) {
        return read_device(&*device, buffer, length);
    }
    next!(__read_chk(fd, buffer, length, room)
        as unsafe extern "C" fn(c_int, *mut c_void, usize, usize) -> isize)
}

fn read_device(device: &dyn Device, buffer: *mut c_void, length: usize) -> isize {
    match device.read(buffer, length) {
        Ok(read) => read as isize,
        Err(errno) => answer(Err(errno)),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn write(fd: c_int, buffer: *const c_void, length: usize) -> isize {
    if let Some(device) = table::get(fd) {
        return match device.write(buffer, length) {
            Ok(written) => written as isize,
            Err(errno) => answer(Err(errno)),
        };
    }
    next!(write(fd, buffer, length) as unsafe extern "C" fn(c_int, *const c_void, usize) -> isize)
}

/// One part after the other, as the kernel does for a driver that has only read and write.
///
/// # Safety
///
/// There are `count` parts.
unsafe fn each_part(
    parts: *const libc::iovec,
    count: c_int,
    transfer: impl Fn(*mut c_void, usize) -> Result<usize, Errno>,
) -> isize {
    let mut total = 0;
    for at in 0..usize::try_from(count).unwrap_or_default() {
        // SAFETY: by this function's own condition.
        let part = unsafe { *parts.add(at) };
        match transfer(part.iov_base, part.iov_len) {
            Ok(length) => {
                total += length as isize;
                if length < part.iov_len {
                    break;
                }
            }
            Err(_) if total > 0 => break,
            Err(errno) => return answer(Err(errno)),
        }
    }
    total
}

type Vectored = unsafe extern "C" fn(c_int, *const libc::iovec, c_int) -> isize;

#[unsafe(no_mangle)]
unsafe extern "C" fn readv(fd: c_int, parts: *const libc::iovec, count: c_int) -> isize {
    if let Some(device) = table::get(fd) {
        // SAFETY: as for the function that this replaces.
        unsafe { each_part(parts, count, |start, length| device.read(start, length)) }
    } else {
        next!(readv(fd, parts, count) as Vectored)
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn writev(fd: c_int, parts: *const libc::iovec, count: c_int) -> isize {
    if let Some(device) = table::get(fd) {
        // SAFETY: as for the function that this replaces.
        unsafe { each_part(parts, count, |start, length| device.write(start, length)) }
    } else {
        next!(writev(fd, parts, count) as Vectored)
    }
}

/// Replacements for the two names of mmap.
macro_rules! maps {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(
            address: *mut c_void,
            length: usize,
            protection: c_int,
            flags: c_int,
            fd: c_int,
            offset: i64,
        ) -> *mut c_void {
            let device = if flags & libc::MAP_ANONYMOUS == 0 { table::get(fd) } else { None };
            let request = MapRequest {
                address,
                length,
                protection,
                flags,
                offset,
            };
            let (fd, flags) = match device.as_ref().map(|device| device.mmap(request)) {
                None => (fd, flags),
                Some(Ok(Mapped::File(file, flags))) => (file, flags),
                Some(Ok(Mapped::At(start))) => return start,
                Some(Err(errno)) => {
                    // SAFETY: this thread's errno.
                    unsafe { *libc::__errno_location() = errno };
                    return libc::MAP_FAILED;
                }
            };
            next!($name(address, length, protection, flags, fd, offset) as Mmap)
        }
    )*};
}

maps!(mmap mmap64);

/// Replacements for the two names of fcntl.
macro_rules! controls {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(fd: c_int, command: c_int, argument: *mut c_void) -> c_int {
            let device = table::get(fd);
            if let (Some(device), libc::F_SETFL) = (&device, command)
                && let Some(result) = device.set_flags(fd, argument as usize as c_int)
            {
                return answer(result.map(|()| 0));
            }
            let result = next!($name(fd, command, argument) as Fcntl);
            if let (Some(device), libc::F_GETFL, 0..) = (&device, command, result) {
                return device.flags(result);
            }
            if result >= 0 && matches!(command, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC) {
                table::set(result, device);
            }
            result
        }
    )*};
}

controls!(fcntl fcntl64);

#[unsafe(no_mangle)]
unsafe extern "C" fn dup(fd: c_int) -> c_int {
    let result = next!(dup(fd) as unsafe extern "C" fn(c_int) -> c_int);
    if result >= 0 {
        table::set(result, table::get(fd));
    }
    result
}

#[unsafe(no_mangle)]
unsafe extern "C" fn dup2(fd: c_int, to: c_int) -> c_int {
    let result = next!(dup2(fd, to) as unsafe extern "C" fn(c_int, c_int) -> c_int);
    if result >= 0 && fd != to {
        table::set(result, table::get(fd));
    }
    result
}

#[unsafe(no_mangle)]
unsafe extern "C" fn dup3(fd: c_int, to: c_int, flags: c_int) -> c_int {
    let result = next!(dup3(fd, to, flags) as unsafe extern "C" fn(c_int, c_int, c_int) -> c_int);
    if result >= 0 {
        table::set(result, table::get(fd));
    }
    result
}
