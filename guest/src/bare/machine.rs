//! The machine as the workloads see it.

use core::fmt;
use core::hint;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use guest::fingerprint::PAGE_SIZE;
use guest::machine::{Combine, Machine};
use guest::tables::MAX_CPUS;

use super::{Plan, clock, serial};

/// One CPU of this machine, with physical memory mapped one to one.
pub(super) struct PhysicalMachine {
    pub(super) plan: &'static Plan,
    pub(super) cpu: u64,
}

/// What each CPU brings to [`Machine::combine`].
static VALUES: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];
/// How many CPUs have come to the barrier, and how often it has opened.
static ARRIVED: AtomicU32 = AtomicU32::new(0);
static OPENED: AtomicU32 = AtomicU32::new(0);

impl PhysicalMachine {
    fn barrier(&self) {
        let opened = OPENED.load(Ordering::Acquire);
        if u64::from(ARRIVED.fetch_add(1, Ordering::AcqRel)) + 1 == self.plan.cpus {
            // Reset before it opens: whoever comes to the next barrier has seen this one open.
            ARRIVED.store(0, Ordering::Relaxed);
            OPENED.store(opened.wrapping_add(1), Ordering::Release);
        } else {
            while OPENED.load(Ordering::Acquire) == opened {
                hint::spin_loop();
            }
        }
    }
}

impl Machine for PhysicalMachine {
    fn cpu(&self) -> u64 {
        self.cpu
    }

    fn cpus(&self) -> u64 {
        self.plan.cpus
    }

    fn ram_bytes(&self) -> u64 {
        self.plan.ram_bytes
    }

    #[inline]
    fn read(&self, frame: u64, word: usize) -> u64 {
        // SAFETY: workloads take their frames from the memory map: RAM that is mapped and belongs to nobody else.
        unsafe { address(frame, word).read_volatile() }
    }

    #[inline]
    fn write(&self, frame: u64, word: usize, value: u64) {
        // SAFETY: as in `read`.
        unsafe { address(frame, word).write_volatile(value) }
    }

    #[inline]
    fn ticks(&self) -> u64 {
        clock::ticks()
    }

    fn microseconds(&self, ticks: u64) -> u64 {
        (u128::from(ticks) * 1000 / u128::from(self.plan.ticks_per_millisecond)) as u64
    }

    fn print(&self, line: fmt::Arguments<'_>) {
        serial::println(line);
    }

    fn combine(&self, value: u64, how: Combine) -> u64 {
        VALUES[self.cpu as usize].store(value, Ordering::Relaxed);
        self.barrier();
        let values = VALUES.iter().take(self.plan.cpus as usize);
        let result = how.fold(values.map(|value| value.load(Ordering::Relaxed)));
        // Nobody may bring the next value before all have read this one.
        self.barrier();
        result
    }
}

fn address(frame: u64, word: usize) -> *mut u64 {
    ((frame * PAGE_SIZE as u64) as usize + word * 8) as *mut u64
}
