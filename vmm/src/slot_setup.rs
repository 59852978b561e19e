//! The floor of a VM's start: what KVM itself takes for a VM and its memory slots, without anything of umem.

use std::time::{Duration, Instant};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::address_map::RamMap;
use crate::kvm::{Host, Vm};

/// What KVM took.
#[derive(Clone, Copy, Debug)]
pub struct SlotSetup {
    /// To create a VM with interrupt controllers.
    pub vm: Duration,
    /// To set its slots.
    pub slots: Duration,
}

/// Creates a VM and sets slots of `size` bytes in all over plain anonymous memory that nobody has touched.
pub fn measure(size: u64) -> Result<SlotSetup, Box<dyn std::error::Error + Send + Sync>> {
    let ram = RamMap::new(size)?;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let memory = unsafe { mmap_anonymous(std::ptr::null_mut(), size as usize, protection, flags) }?;
    let started = Instant::now();
    let vm = Vm::new(&Host::open()?)?;
    let made = Instant::now();
    for (slot, range) in (0..).zip(ram.ranges()) {
        // SAFETY: the memory stays mapped until the VM is gone, and no guest runs.
        unsafe {
            let host = memory.cast::<u8>().add(range.offset as usize);
            vm.map(slot, range.guest, host, range.size, false)
        }?;
    }
    let setup = SlotSetup {
        vm: made - started,
        slots: made.elapsed(),
    };
    drop(vm);
    // SAFETY: the VM is gone, and nobody else has the memory.
    unsafe { munmap(memory, size as usize) }?;
    Ok(setup)
}
