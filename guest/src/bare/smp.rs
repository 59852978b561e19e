//! The other CPUs: started by CPU 0 in ring 0, because interrupt commands are MSR writes; waited for in ring 3.

use core::arch::x86_64::{__cpuid, __cpuid_count};
use core::cell::UnsafeCell;
use core::hint;
use core::mem::MaybeUninit;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use guest::tables::MAX_CPUS;
use x86_64::registers::model_specific::Msr;

use super::entry::{TRAMPOLINE_ADDRESS, TRAMPOLINE_VECTOR, TRAMPOLINE_WORDS, secondary_trampoline};
use super::{Plan, Refusal, clock, refuse, run};

const APIC_BASE: u32 = 0x1b;
const APIC_ENABLE_X2APIC: u64 = 3 << 10;
const X2APIC_ID: u32 = 0x802;
const X2APIC_COMMAND: u32 = 0x830;
/// Delivery mode in bits 8 to 10, and bit 14, level assert; the destination is in the upper half.
const INIT: u64 = 0x4500;
const STARTUP: u64 = 0x4600;

/// A CPU that is not up after so many turns of the TSC, which is some seconds, does not come.
const PATIENCE: u64 = 10_000_000_000;

type Trampoline = [u64; TRAMPOLINE_WORDS];

/// How many CPUs there are, this one included; written by ring 0 before ring 3 begins.
static EXPECTED: AtomicU64 = AtomicU64::new(1);
/// How many others have left the trampoline.
static STARTED: AtomicU64 = AtomicU64::new(0);
static HAS_X2APIC: AtomicBool = AtomicBool::new(true);
static PUBLISHED: AtomicBool = AtomicBool::new(false);

/// Data that CPU 0 writes while it is alone with it.
struct Lone<T>(UnsafeCell<T>);
// SAFETY: each user states why CPU 0 is alone with it.
unsafe impl<T> Sync for Lone<T> {}

/// What was in the place of the trampoline.
static OVERWRITTEN: Lone<Trampoline> = Lone(UnsafeCell::new([0; TRAMPOLINE_WORDS]));
/// What to do, valid once PUBLISHED is set.
static PLAN: Lone<MaybeUninit<Plan>> = Lone(UnsafeCell::new(MaybeUninit::uninit()));

/// The number of CPUs in this package, or on machines without CPUID leaf 0xb, of this CPU's APIC IDs.
fn cpu_count() -> u64 {
    const EXTENDED_TOPOLOGY: u32 = 0xb;
    const CORE_LEVEL: u32 = 2;
    if __cpuid(0).eax >= EXTENDED_TOPOLOGY {
        for level in 0..3 {
            let leaf = __cpuid_count(EXTENDED_TOPOLOGY, level);
            if leaf.ecx >> 8 & 0xff == CORE_LEVEL && leaf.ebx & 0xffff != 0 {
                return u64::from(leaf.ebx & 0xffff);
            }
        }
    }
    let leaf = __cpuid(1);
    let has_several = leaf.edx >> 28 & 1 != 0;
    if has_several {
        u64::from(leaf.ebx >> 16 & 0xff).max(1)
    } else {
        1
    }
}

/// Starts the other CPUs and does not wait for them. Runs in ring 0, so it is short.
pub(super) fn start_secondaries() {
    let cpus = cpu_count();
    if cpus == 1 {
        return;
    }
    EXPECTED.store(cpus, Ordering::Relaxed);
    if cpus > MAX_CPUS as u64 {
        return;
    }
    let has_x2apic = __cpuid(1).ecx >> 21 & 1 != 0;
    if !has_x2apic {
        HAS_X2APIC.store(false, Ordering::Relaxed);
        return;
    }
    let place = TRAMPOLINE_ADDRESS as *mut Trampoline;
    // SAFETY: ring 0 of CPU 0, alone so far, on a CPU with an x2APIC; the place is below 1 MiB, mapped, and what it held is put
    // back by `wait_for_all`.
    unsafe {
        *OVERWRITTEN.0.get() = place.read_volatile();
        place.write_volatile(secondary_trampoline);
        let mut base = Msr::new(APIC_BASE);
        base.write(base.read() | APIC_ENABLE_X2APIC);
        let own_id = Msr::new(X2APIC_ID).read();
        let mut command = Msr::new(X2APIC_COMMAND);
        for id in (0..cpus).filter(|&id| id != own_id) {
            command.write(id << 32 | INIT);
            command.write(id << 32 | STARTUP | TRAMPOLINE_VECTOR);
        }
    }
}

/// Waits until every CPU is up and puts back what was in the place of the trampoline. CPU 0, ring 3. Returns the number of CPUs.
pub(super) fn wait_for_all() -> Result<u64, Refusal> {
    let cpus = EXPECTED.load(Ordering::Relaxed);
    if cpus == 1 {
        return Ok(1);
    }
    if cpus > MAX_CPUS as u64 {
        return Err(refuse!(
            Machine,
            "error=too_many_cpus cpus={cpus} limit={MAX_CPUS}"
        ));
    }
    if !HAS_X2APIC.load(Ordering::Relaxed) {
        return Err(refuse!(Machine, "error=no_x2apic cpus={cpus}"));
    }
    let start = clock::ticks();
    while STARTED.load(Ordering::Acquire) < cpus - 1 {
        if clock::ticks().saturating_sub(start) > PATIENCE {
            let started = STARTED.load(Ordering::Acquire) + 1;
            return Err(refuse!(
                Machine,
                "error=cpu_did_not_start cpus={cpus} started={started}"
            ));
        }
        hint::spin_loop();
    }
    // SAFETY: all CPUs have left the trampoline, and they wait for the plan.
    unsafe { ptr::write_volatile(TRAMPOLINE_ADDRESS as *mut Trampoline, *OVERWRITTEN.0.get()) };
    Ok(cpus)
}

/// Tells the other CPUs what to do. CPU 0 calls this once.
pub(super) fn publish(plan: Plan) -> &'static Plan {
    // SAFETY: nobody else looks at the plan before PUBLISHED is set, and nobody writes to it afterwards.
    let plan = unsafe { (*PLAN.0.get()).write(plan) };
    PUBLISHED.store(true, Ordering::Release);
    plan
}

/// Every other CPU in ring 3.
#[unsafe(no_mangle)]
extern "C" fn secondary_main(cpu: u64) -> ! {
    STARTED.fetch_add(1, Ordering::AcqRel);
    while !PUBLISHED.load(Ordering::Acquire) {
        hint::spin_loop();
    }
    // SAFETY: PUBLISHED says that the plan is there, and that it changes no more.
    run(unsafe { (*PLAN.0.get()).assume_init_ref() }, cpu)
}
