//! A driver for a virtio balloon at a register block (virtio 1.2, 4.2 and 5.5): what of it needs no machine.

/// Where the VMM of this project has the registers of its balloon. Between RAM and the interrupt controllers.
pub const REGISTERS: u64 = 0xfeb0_0000;

/// Offsets of registers.
pub mod register {
    /// [`MAGIC`](super::MAGIC).
    pub const MAGIC: u64 = 0x000;
    /// 2.
    pub const VERSION: u64 = 0x004;
    /// [`DEVICE`](super::DEVICE).
    pub const DEVICE: u64 = 0x008;
    /// What the device offers, 32 bits of it.
    pub const DEVICE_FEATURES: u64 = 0x010;
    /// Which 32.
    pub const DEVICE_FEATURES_SELECT: u64 = 0x014;
    /// What the driver takes of it.
    pub const DRIVER_FEATURES: u64 = 0x020;
    /// Which 32 bits.
    pub const DRIVER_FEATURES_SELECT: u64 = 0x024;
    /// Which queue the following are of.
    pub const QUEUE_SELECT: u64 = 0x030;
    /// Descriptors that a queue may have; 0: there is no such queue.
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    /// Descriptors that it has.
    pub const QUEUE_SIZE: u64 = 0x038;
    /// It is set up.
    pub const QUEUE_READY: u64 = 0x044;
    /// There is something in this queue.
    pub const QUEUE_NOTIFY: u64 = 0x050;
    /// How far the driver is with the device.
    pub const STATUS: u64 = 0x070;
    /// Where descriptors are; the upper half is behind it.
    pub const QUEUE_DESCRIPTORS: u64 = 0x080;
    /// Where the ring of available descriptors is.
    pub const QUEUE_AVAILABLE: u64 = 0x090;
    /// Where the ring of used descriptors is.
    pub const QUEUE_USED: u64 = 0x0a0;
    /// How many pages the balloon is to hold.
    pub const TARGET: u64 = 0x100;
    /// How many it holds.
    pub const ACTUAL: u64 = 0x104;
}

/// `virt`.
pub const MAGIC: u32 = 0x7472_6976;
/// A balloon.
pub const DEVICE: u32 = 5;

/// Status: the driver knows what it is, and how to drive it.
pub const ACKNOWLEDGE_AND_DRIVER: u32 = 1 | 2;
/// Status: the features are agreed on.
pub const FEATURES_OK: u32 = 8;
/// Status: the driver is ready.
pub const DRIVER_OK: u32 = 4;

/// Feature: free pages may be reported.
pub const PAGE_REPORTING: u32 = 1 << 5;
/// Feature in the upper half: virtio 1.
pub const VERSION_1: u32 = 1;

/// The queues.
pub const INFLATE: usize = 0;
/// See [`INFLATE`].
pub const DEFLATE: usize = 1;
/// See [`INFLATE`].
pub const REPORT: usize = 2;

/// Descriptors in a queue of this driver's.
pub const QUEUE_SIZE: usize = 32;

/// Page numbers that are given at a time.
pub const PAGES_AT_A_TIME: usize = 256;

/// A descriptor.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Descriptor {
    /// Where the buffer is.
    pub address: u64,
    /// How long.
    pub length: u32,
    /// [`NEXT`], [`DEVICE_WRITES`].
    pub flags: u16,
    /// The next one of the chain.
    pub next: u16,
}

/// Another descriptor follows.
pub const NEXT: u16 = 1;
/// The device may write to it.
pub const DEVICE_WRITES: u16 = 2;

/// A queue in memory, and what is given in it.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct Queue {
    /// The descriptors.
    pub descriptors: [Descriptor; QUEUE_SIZE],
    /// Flags, index, and the heads of available chains.
    pub available: [u16; 2 + QUEUE_SIZE],
    /// Flags and index in the first word, then two words for each used chain.
    pub used: [u32; 1 + 2 * QUEUE_SIZE],
    /// Page numbers.
    pub pages: [u32; PAGES_AT_A_TIME],
}

impl Queue {
    /// One with nothing in it.
    pub const fn new() -> Self {
        Self {
            descriptors: [Descriptor {
                address: 0,
                length: 0,
                flags: 0,
                next: 0,
            }; QUEUE_SIZE],
            available: [0; 2 + QUEUE_SIZE],
            used: [0; 1 + 2 * QUEUE_SIZE],
            pages: [0; PAGES_AT_A_TIME],
        }
    }
}

impl Default for Queue {
    fn default() -> Self {
        Self::new()
    }
}

/// A balloon as a workload sees it. Pages are named by their frame.
pub trait Balloon {
    /// Gives pages, at most [`PAGES_AT_A_TIME`], and waits until they are taken.
    fn inflate(&mut self, frames: &[u32]);

    /// Takes pages back, at most [`PAGES_AT_A_TIME`].
    fn deflate(&mut self, frames: &[u32]);

    /// Reports pages as free, at most [`QUEUE_SIZE`], and waits until they are taken.
    fn report(&mut self, frames: &[u32]);

    /// How many pages it is to hold.
    fn target(&self) -> u32;

    /// Says how many it holds.
    fn set_actual(&mut self, pages: u32);
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::offset_of;

    #[test]
    fn rings_are_where_they_may_be() {
        assert_eq!(offset_of!(Queue, descriptors) % 16, 0);
        assert_eq!(offset_of!(Queue, available) % 2, 0);
        assert_eq!(offset_of!(Queue, used) % 4, 0);
        assert_eq!(size_of::<Descriptor>(), 16);
        assert!(QUEUE_SIZE.is_power_of_two());
    }
}
