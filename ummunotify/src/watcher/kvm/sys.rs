//! The few bpf(2) calls that are needed, as in the kernel's `include/uapi/linux/bpf.h`.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::assembler::Instruction;
use crate::signals;

/// Kinds of maps.
#[derive(Clone, Copy, Debug)]
pub(crate) enum MapKind {
    Array = 2,
    ArrayOfMaps = 12,
    Ring = 27,
}

/// The values of an array can be mapped.
pub(crate) const MAPPABLE: u32 = 1 << 10;
/// An array that, inside a map of maps, may be replaced by one of another length.
pub(crate) const REPLACEABLE: u32 = 1 << 12;

const MAP_CREATE: u32 = 0;
const MAP_UPDATE: u32 = 2;
const PROGRAM_LOAD: u32 = 5;
const RAW_TRACEPOINT_OPEN: u32 = 17;
const MAP_FREEZE: u32 = 22;
const PROGRAM_KIND_RAW_TRACEPOINT: u32 = 17;
const NAME: [u8; 16] = *b"ummunotify\0\0\0\0\0\0";

/// A map to be made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Map<'a> {
    pub(crate) kind: MapKind,
    pub(crate) value_size: u32,
    pub(crate) entries: u32,
    pub(crate) flags: u32,
    /// Of a map of maps: what those are like.
    pub(crate) inner: Option<BorrowedFd<'a>>,
}

#[derive(Default)]
#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
    flags: u32,
    inner: u32,
    numa_node: u32,
    name: [u8; 16],
}

impl Map<'_> {
    /// Makes it.
    pub(crate) fn create(self) -> io::Result<OwnedFd> {
        let mut attributes = MapCreate {
            kind: self.kind as u32,
            // A ring has no keys.
            key_size: if matches!(self.kind, MapKind::Ring) { 0 } else { 4 },
            value_size: self.value_size,
            entries: self.entries,
            flags: self.flags,
            inner: self.inner.map_or(0, |inner| inner.as_raw_fd() as u32),
            numa_node: 0,
            name: NAME,
        };
        // SAFETY: the structure of this command.
        unsafe { descriptor(MAP_CREATE, &mut attributes) }
    }
}

#[repr(C)]
struct MapUpdate {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Puts a map into the first place of a map of maps. When this returns, no program uses the one that was there.
pub(crate) fn put_map(outer: BorrowedFd<'_>, inner: BorrowedFd<'_>) -> io::Result<()> {
    let (key, value) = (0_u32, inner.as_raw_fd());
    let mut attributes = MapUpdate {
        map: outer.as_raw_fd() as u32,
        padding: 0,
        key: &raw const key as u64,
        value: &raw const value as u64,
        flags: 0,
    };
    // SAFETY: the structure of this command; both numbers outlive the call.
    unsafe { bpf(MAP_UPDATE, &mut attributes) }.map(|_| ())
}

/// From now on programs alone write to a map: user space can only read it, and map it for reading.
pub(crate) fn freeze(map: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = map.as_raw_fd() as u32;
    // SAFETY: this command takes one number.
    unsafe { bpf(MAP_FREEZE, &mut attributes) }.map(|_| ())
}

#[repr(C)]
struct ProgramLoad {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
}

/// Has a program for a raw tracepoint checked, and loads it.
pub(crate) fn load(instructions: &[Instruction]) -> io::Result<OwnedFd> {
    /// It calls nothing that asks for another.
    const LICENSE: &CStr = c"Apache-2.0 OR MIT";
    let mut attributes = ProgramLoad {
        kind: PROGRAM_KIND_RAW_TRACEPOINT,
        instruction_count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: LICENSE.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: NAME,
    };
    // The kernel stops checking a program when a signal comes.
    signals::without(|| {
        // SAFETY: the structure of this command; the instructions outlive the call.
        unsafe { descriptor(PROGRAM_LOAD, &mut attributes) }
    })
}

#[repr(C)]
struct RawTracepointOpen {
    name: u64,
    program: u32,
    padding: u32,
}

/// Has a program run at a tracepoint as long as what is returned is open.
pub(crate) fn attach(program: BorrowedFd<'_>, tracepoint: &CStr) -> io::Result<OwnedFd> {
    let mut attributes = RawTracepointOpen {
        name: tracepoint.as_ptr() as u64,
        program: program.as_raw_fd() as u32,
        padding: 0,
    };
    // SAFETY: the structure of this command; the name outlives the call.
    unsafe { descriptor(RAW_TRACEPOINT_OPEN, &mut attributes) }
}

/// # Safety
///
/// `T` is the structure that the command takes, and the command returns a descriptor.
unsafe fn descriptor<T>(command: u32, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: by this function's own condition.
    let descriptor = unsafe { bpf(command, attributes) }?;
    // SAFETY: the kernel has just opened it (close-on-exec, as all that bpf(2) opens).
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// # Safety
///
/// `T` is the structure that the command takes.
unsafe fn bpf<T>(command: u32, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: by this function's own condition; the kernel takes structures shorter than its own for ones that end in zeros.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result as i32)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const PROGRAM_TEST_RUN: u32 = 10;

    #[derive(Default)]
    #[repr(C)]
    struct TestRun {
        program: u32,
        result: u32,
        data_sizes: [u32; 2],
        data: [u64; 2],
        repeat: u32,
        duration: u32,
        context_size: u32,
        context_size_out: u32,
        context: u64,
        context_out: u64,
        flags: u32,
        cpu: u32,
        batch_size: u32,
        padding: u32,
    }

    /// Runs a program as if its tracepoint had been hit with these arguments.
    pub(crate) fn run(program: BorrowedFd<'_>, arguments: &[u64]) -> io::Result<u32> {
        let mut attributes = TestRun {
            program: program.as_raw_fd() as u32,
            context_size: size_of_val(arguments) as u32,
            context: arguments.as_ptr() as u64,
            ..TestRun::default()
        };
        // SAFETY: the structure of this command; the arguments outlive the call.
        unsafe { bpf(PROGRAM_TEST_RUN, &mut attributes) }?;
        Ok(attributes.result)
    }
}
