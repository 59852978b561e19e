//! The balloon's driver. It polls: there are no interrupts in ring 3.

use core::cell::UnsafeCell;
use core::hint;
use core::sync::atomic::{Ordering, fence};

use guest::balloon::{
    self, ACKNOWLEDGE_AND_DRIVER, Balloon, DEFLATE, DEVICE, DEVICE_WRITES, DRIVER_OK, Descriptor,
    FEATURES_OK, INFLATE, MAGIC, NEXT, PAGE_REPORTING, QUEUE_SIZE, Queue, REGISTERS, REPORT, VERSION_1,
    register,
};
use guest::fingerprint::PAGE_SIZE;

use super::{Refusal, paging, refuse};

/// The queues. CPU 0 alone uses them, and the device.
struct Queues(UnsafeCell<[Queue; 3]>);
// SAFETY: see there.
unsafe impl Sync for Queues {}

static QUEUES: Queues = Queues(UnsafeCell::new([const { Queue::new() }; 3]));

/// A balloon whose driver is ready.
pub(super) struct Driver {
    /// How many chains were given in each queue, modulo 2^16.
    given: [u16; 3],
    reports: bool,
}

impl Driver {
    /// Maps and finds the device, and gets it ready; CPU 0 does that, once.
    pub(super) fn start() -> Result<Self, Refusal> {
        paging::map_device(REGISTERS);
        if read(register::MAGIC) != MAGIC || read(register::VERSION) != 2 || read(register::DEVICE) != DEVICE
        {
            return Err(refuse!(Machine, "error=no_balloon registers={REGISTERS:#x}"));
        }
        write(register::STATUS, 0);
        write(register::STATUS, ACKNOWLEDGE_AND_DRIVER);
        write(register::DEVICE_FEATURES_SELECT, 0);
        let features = read(register::DEVICE_FEATURES) & PAGE_REPORTING;
        for (half, features) in [(0, features), (1, VERSION_1)] {
            write(register::DRIVER_FEATURES_SELECT, half);
            write(register::DRIVER_FEATURES, features);
        }
        write(register::STATUS, ACKNOWLEDGE_AND_DRIVER | FEATURES_OK);
        if read(register::STATUS) & FEATURES_OK == 0 {
            return Err(refuse!(Machine, "error=balloon_refuses_features"));
        }
        let driver = Self {
            given: [0; 3],
            reports: features != 0,
        };
        for index in 0..if driver.reports { 3 } else { 2 } {
            Self::set_up(index)?;
        }
        write(register::STATUS, ACKNOWLEDGE_AND_DRIVER | FEATURES_OK | DRIVER_OK);
        Ok(driver)
    }

    /// Whether pages can be reported as free.
    pub(super) fn reports(&self) -> bool {
        self.reports
    }

    fn set_up(index: usize) -> Result<(), Refusal> {
        write(register::QUEUE_SELECT, index as u32);
        let most = read(register::QUEUE_SIZE_MAX);
        if (most as usize) < QUEUE_SIZE {
            return Err(refuse!(
                Machine,
                "error=balloon_queue_too_small queue={index} size={most}"
            ));
        }
        write(register::QUEUE_SIZE, QUEUE_SIZE as u32);
        let queue = queue(index);
        // SAFETY: the addresses of parts of a static, of which no reference is made.
        let parts = unsafe {
            [
                (
                    register::QUEUE_DESCRIPTORS,
                    (&raw const (*queue).descriptors).addr(),
                ),
                (register::QUEUE_AVAILABLE, (&raw const (*queue).available).addr()),
                (register::QUEUE_USED, (&raw const (*queue).used).addr()),
            ]
        };
        for (register, address) in parts {
            write(register, address as u32);
            write(register + 4, (address >> 32) as u32);
        }
        write(register::QUEUE_READY, 1);
        Ok(())
    }

    /// Gives the first descriptors of a queue as one chain, and waits until it comes back.
    fn give(&mut self, index: usize, count: usize, descriptor: impl Fn(usize) -> Descriptor) {
        let queue = queue(index);
        let given = self.given[index];
        // SAFETY: within the static, which this CPU alone writes to while the device has given everything back. Reads of what the
        // device writes are volatile.
        unsafe {
            for at in 0..count {
                let last = at + 1 == count;
                let one = descriptor(at);
                let linked = Descriptor {
                    flags: one.flags | if last { 0 } else { NEXT },
                    next: at as u16 + 1,
                    ..one
                };
                (&raw mut (*queue).descriptors[at]).write_volatile(linked);
            }
            // The head is descriptor 0, which the ring says everywhere.
            fence(Ordering::SeqCst);
            (&raw mut (*queue).available[1]).write_volatile(given.wrapping_add(1));
            fence(Ordering::SeqCst);
            write(register::QUEUE_NOTIFY, index as u32);
            // The upper half of the first word is the index.
            while (&raw const (*queue).used[0]).read_volatile() >> 16 == u32::from(given) {
                hint::spin_loop();
            }
            fence(Ordering::SeqCst);
        }
        self.given[index] = given.wrapping_add(1);
    }

    fn give_numbers(&mut self, index: usize, frames: &[u32]) {
        let queue = queue(index);
        // SAFETY: as in `give`; there is room for as many as are given at a time.
        let address = unsafe {
            for (at, frame) in frames.iter().enumerate() {
                (&raw mut (*queue).pages[at]).write_volatile(*frame);
            }
            (&raw const (*queue).pages).addr()
        };
        self.give(index, 1, |_| Descriptor {
            address: address as u64,
            length: size_of_val(frames) as u32,
            ..Descriptor::default()
        });
    }
}

impl Balloon for Driver {
    fn inflate(&mut self, frames: &[u32]) {
        self.give_numbers(INFLATE, frames);
    }

    fn deflate(&mut self, frames: &[u32]) {
        self.give_numbers(DEFLATE, frames);
    }

    fn report(&mut self, frames: &[u32]) {
        self.give(REPORT, frames.len(), |at| Descriptor {
            address: u64::from(frames[at]) * PAGE_SIZE as u64,
            length: PAGE_SIZE as u32,
            flags: DEVICE_WRITES,
            next: 0,
        });
    }

    fn target(&self) -> u32 {
        read(register::TARGET)
    }

    fn set_actual(&mut self, pages: u32) {
        write(register::ACTUAL, pages);
    }
}

fn queue(index: usize) -> *mut Queue {
    // SAFETY: the address of an element; the index is below 3.
    unsafe { &raw mut (*QUEUES.0.get())[index] }
}

fn read(offset: u64) -> u32 {
    // SAFETY: the registers are mapped, or were found not to be there.
    unsafe { ((balloon::REGISTERS + offset) as *const u32).read_volatile() }
}

fn write(offset: u64, value: u32) {
    // SAFETY: as in `read`.
    unsafe { ((balloon::REGISTERS + offset) as *mut u32).write_volatile(value) }
}
