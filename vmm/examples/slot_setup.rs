//! `slot_setup BYTES` prints the milliseconds that KVM alone takes to create a VM and to set slots of that size.

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let size: u64 = std::env::args().nth(1).ok_or("which size, in bytes?")?.parse()?;
    let setup = vmm::slot_setup::measure(size)?;
    println!(
        "vm_ms={:.3} slots_ms={:.3}",
        setup.vm.as_secs_f64() * 1e3,
        setup.slots.as_secs_f64() * 1e3
    );
    Ok(())
}
