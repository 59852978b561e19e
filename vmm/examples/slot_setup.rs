//! The floor of a VM's start: what KVM itself takes for a VM and its memory slots, without anything of umem.
//!
//! `slot_setup BYTES` prints the milliseconds to create a VM with interrupt controllers and to set its slots over plain
//! anonymous memory that nobody has touched.

use std::time::Instant;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use vmm::address_map::RamMap;
use vmm::kvm::{Host, Vm};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let size: u64 = std::env::args().nth(1).ok_or("which size, in bytes?")?.parse()?;
    let ram = RamMap::new(size)?;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let memory = unsafe {
        mmap_anonymous(
            std::ptr::null_mut(),
            size as usize,
            ProtFlags::READ | ProtFlags::WRITE,
            flags,
        )
    }?;
    let started = Instant::now();
    let vm = Vm::new(&Host::open()?)?;
    let made = Instant::now();
    for (slot, range) in (0..).zip(ram.ranges()) {
        // SAFETY: the memory stays mapped until the process ends, and no guest runs.
        unsafe {
            vm.map(
                slot,
                range.guest,
                memory.cast::<u8>().add(range.offset as usize),
                range.size,
                false,
            )
        }?;
    }
    println!(
        "vm_ms={:.3} slots_ms={:.3}",
        (made - started).as_secs_f64() * 1e3,
        made.elapsed().as_secs_f64() * 1e3
    );
    Ok(())
}
