//! The structures and numbers of the interface, as in `include/linux/ummunotify.h`.
//!
//! Source: the ummunotify v2 patch, R. Dreier and E. Munson 2010.

/// What `UMMUNOTIFY_REGISTER_REGION` takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Register {
    /// The first address.
    pub start: u64,
    /// The address after the last.
    pub end: u64,
    /// The caller's name for the range.
    pub user_cookie: u64,
    /// 0.
    pub flags: u32,
    /// 0.
    pub reserved: u32,
}

/// What `read` gives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct RawEvent {
    /// [`EVENT_TYPE_INVAL`] or [`EVENT_TYPE_LAST`].
    pub kind: u32,
    /// [`EVENT_FLAG_HINT`] or nothing.
    pub flags: u32,
    /// The first address that was invalidated, or of the range.
    pub hint_start: u64,
    /// The address after the last.
    pub hint_end: u64,
    /// The cookie of the range, or (in the last event) the counter.
    pub user_cookie_counter: u64,
}

/// `_IOWR('U', 1, __u32)`.
pub const EXCHANGE_FEATURES: u32 = number(READ | WRITE, 1, size_of::<u32>());
/// `_IOW('U', 2, struct ummunotify_register_ioctl)`.
pub const REGISTER_REGION: u32 = number(WRITE, 2, size_of::<Register>());
/// `_IOW('U', 3, __u64)`.
pub const UNREGISTER_REGION: u32 = number(WRITE, 3, size_of::<u64>());

/// Something in a range was invalidated.
pub const EVENT_TYPE_INVAL: u32 = 0;
/// There are no more events.
pub const EVENT_TYPE_LAST: u32 = 1;

/// The hint is the part that was invalidated, not the whole range.
pub const EVENT_FLAG_HINT: u32 = 1;

/// A read gives no more than this, in bytes: the driver works through a page.
pub const READ_LIMIT: usize = 4096;

const WRITE: u32 = 1;
const READ: u32 = 2;

/// As `_IOC` of `asm-generic/ioctl.h` does.
const fn number(direction: u32, number: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | (b'U' as u32) << 8 | number
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn structures_are_laid_out_as_in_the_header() {
        assert_eq!(size_of::<Register>(), 32);
        assert_eq!(offset_of!(Register, start), 0);
        assert_eq!(offset_of!(Register, end), 8);
        assert_eq!(offset_of!(Register, user_cookie), 16);
        assert_eq!(offset_of!(Register, flags), 24);
        assert_eq!(offset_of!(Register, reserved), 28);
        assert_eq!(size_of::<RawEvent>(), 32);
        assert_eq!(offset_of!(RawEvent, kind), 0);
        assert_eq!(offset_of!(RawEvent, flags), 4);
        assert_eq!(offset_of!(RawEvent, hint_start), 8);
        assert_eq!(offset_of!(RawEvent, hint_end), 16);
        assert_eq!(offset_of!(RawEvent, user_cookie_counter), 24);
    }

    #[test]
    fn requests_have_the_numbers_of_the_header() {
        assert_eq!(EXCHANGE_FEATURES, 0xc004_5501);
        assert_eq!(REGISTER_REGION, 0x4020_5502);
        assert_eq!(UNREGISTER_REGION, 0x4008_5503);
    }
}
