//! The port through which a guest ends with a code, as QEMU's `isa-debug-exit` device, but with the code as it is.

use crate::ending::Ending;

/// Where it is.
pub(super) const PORT: u16 = guest::EXIT_PORT;

/// What a write of 1, 2 or 4 bytes does.
pub(super) fn written(data: &[u8]) -> Ending {
    let mut code = [0; 4];
    for (byte, written) in code.iter_mut().zip(data) {
        *byte = *written;
    }
    Ending::GuestExit(u32::from_le_bytes(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_may_be_written_in_any_width() {
        assert_eq!(written(&[7]), Ending::GuestExit(7));
        assert_eq!(written(&[7, 1]), Ending::GuestExit(0x107));
        assert_eq!(written(&[1, 2, 3, 4]), Ending::GuestExit(0x0403_0201));
    }
}
