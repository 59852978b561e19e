//! The kernel's command line.

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::ScratchMemory;

/// Linux keeps 2,048 bytes on x86, the final zero included (`COMMAND_LINE_SIZE`).
pub(super) const LENGTH_MAX: usize = 2047;

/// By this, Linux resets the machine at once when it panics, which ends the VM; by default it would stand still for ever.
const RESET_ON_PANIC: &str = "panic=-1";

/// Why a kernel cannot be given a command line.
#[derive(Debug, Error)]
pub enum CommandLineError {
    /// Longer than the kernel would read.
    #[error("the command line has {0} bytes; a kernel takes {LENGTH_MAX}")]
    TooLong(usize),
    /// It would end there.
    #[error("the command line has a zero byte at {0}")]
    HasZero(usize),
    /// Memory refuses.
    #[error("the command line cannot be written")]
    Write(#[source] GuestMemoryError),
}

/// What Linux is given for `given`: the same, after what makes a panic end the VM, unless it says itself what a panic does.
pub(super) fn for_linux(given: &str) -> String {
    // What follows a lone `--` is for the first process.
    let says = given
        .split_ascii_whitespace()
        .take_while(|word| *word != "--")
        .any(|word| word.starts_with("panic="));
    if says {
        given.to_owned()
    } else {
        format!("{RESET_ON_PANIC} {given}").trim_end().to_owned()
    }
}

/// Writes the command line, with the zero byte at its end, to `at`.
pub(super) fn write(memory: &ScratchMemory, at: GuestAddress, text: &str) -> Result<(), CommandLineError> {
    if text.len() > LENGTH_MAX {
        return Err(CommandLineError::TooLong(text.len()));
    }
    if let Some(at) = text.bytes().position(|byte| byte == 0) {
        return Err(CommandLineError::HasZero(at));
    }
    // An empty one is written too, as it may replace another.
    let bytes: Vec<u8> = text.bytes().chain([0]).collect();
    memory.write_slice(&bytes, at).map_err(CommandLineError::Write)
}

#[cfg(test)]
mod tests {
    use super::super::layout::scratch_memory;
    use super::*;

    #[test]
    fn linux_resets_on_a_panic_unless_told_otherwise() {
        assert_eq!(for_linux(""), "panic=-1");
        assert_eq!(for_linux("console=ttyS0"), "panic=-1 console=ttyS0");
        assert_eq!(for_linux("quiet panic=10"), "quiet panic=10");
        assert_eq!(for_linux("quiet -- panic=10"), "panic=-1 quiet -- panic=10");
        assert_eq!(for_linux("oops=panic"), "panic=-1 oops=panic");
    }

    #[test]
    fn what_no_kernel_would_read_is_refused() {
        let memory = scratch_memory(1 << 20).unwrap();
        let longest = "x".repeat(LENGTH_MAX);
        write(&memory, GuestAddress(0x1000), &longest).unwrap();
        assert!(matches!(
            write(&memory, GuestAddress(0x1000), &(longest + "x")),
            Err(CommandLineError::TooLong(2048))
        ));
        assert!(matches!(
            write(&memory, GuestAddress(0x1000), "a\0b"),
            Err(CommandLineError::HasZero(1))
        ));
    }
}
