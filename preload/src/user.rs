//! Memory of the program's at addresses that it gave: what the driver would answer with EFAULT must not end the program.

use std::ffi::{c_int, c_void};

/// Copies a value from an address. `Err`: there is none.
pub(crate) fn copy_from<T: Copy + Default>(address: *const c_void) -> Result<T, c_int> {
    let mut value = [T::default()];
    copy_all_from(address, &mut value)?;
    Ok(value[0])
}

/// Copies values from an address. `Err`: there are not as many.
pub(crate) fn copy_all_from<T: Copy>(address: *const c_void, values: &mut [T]) -> Result<(), c_int> {
    let length = size_of_val(values);
    let local = span(values.as_mut_ptr().cast(), length);
    let remote = span(address.cast_mut(), length);
    // SAFETY: writes to `values`, which may have any bits (the interfaces' structures are of numbers).
    let copied =
        unsafe { libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
    answer(copied, length, || {
        // SAFETY: where the call is forbidden, the program's address is believed.
        unsafe { std::ptr::copy_nonoverlapping(address.cast::<u8>(), values.as_mut_ptr().cast(), length) };
    })
}

/// Copies values to an address. `Err`: there is no room for them.
pub(crate) fn copy_to<T: Copy>(address: *mut c_void, values: &[T]) -> Result<(), c_int> {
    let length = size_of_val(values);
    let local = span(values.as_ptr().cast_mut().cast(), length);
    let remote = span(address, length);
    // SAFETY: writes to where the program asked for it to be written.
    let copied =
        unsafe { libc::process_vm_writev(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
    answer(copied, length, || {
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr().cast::<u8>(), address.cast(), length) };
    })
}

fn span(start: *mut c_void, length: usize) -> libc::iovec {
    libc::iovec {
        iov_base: start,
        iov_len: length,
    }
}

fn answer(copied: isize, wanted: usize, forbidden: impl FnOnce()) -> Result<(), c_int> {
    if copied == wanted as isize {
        return Ok(());
    }
    let errno = std::io::Error::last_os_error().raw_os_error();
    if copied < 0 && matches!(errno, Some(libc::ENOSYS | libc::EPERM)) {
        forbidden();
        return Ok(());
    }
    Err(libc::EFAULT)
}
