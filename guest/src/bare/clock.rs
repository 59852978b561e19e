//! How fast the time-stamp counter runs.

use core::arch::x86_64::{__cpuid, _rdtsc};
use core::sync::atomic::{AtomicU64, Ordering};

use x86_64::instructions::port::Port;

use super::{Refusal, refuse};

/// The hypervisor's leaf with the TSC frequency in kHz (as VMware defined it and KVM's VMMs give it).
const HYPERVISOR: u32 = 0x4000_0000;
const HYPERVISOR_FREQUENCY: u32 = HYPERVISOR + 0x10;
const TSC_AND_CRYSTAL: u32 = 0x15;

/// The programmable interval timer.
const TIMER_HZ: u64 = 1_193_182;
const TIMER_CHANNEL_2: u16 = 0x42;
const TIMER_COMMAND: u16 = 0x43;
/// Bit 0 lets channel 2 count, bit 1 is the speaker, bit 5 is the channel's output.
const SPEAKER: u16 = 0x61;
/// Channel 2, low and high byte, mode 0: the output rises when the count has run out.
const COUNT_DOWN_ONCE: u8 = 0b1011_0000;
const CALIBRATION_MS: u64 = 10;
/// No TSC turns so often in a calibration, even if the timer stands still.
const CALIBRATION_BOUND: u64 = 10_000_000_000;

/// The time-stamp counter.
#[inline]
pub(super) fn ticks() -> u64 {
    // SAFETY: every x86-64 CPU has it, and CR4.TSD is clear.
    unsafe { _rdtsc() }
}

/// The frequency of [`ticks`] in kHz as CPUID tells it, or 0; written by ring 0 before ring 3 begins.
static TOLD: AtomicU64 = AtomicU64::new(0);

/// Asks CPUID for the frequency. In ring 0, because a hypervisor that runs ring 3 natively may not see its CPUID, which then is
/// the host's.
pub(super) fn ask_cpuid() {
    if let Some(khz) = from_hypervisor().or_else(from_cpu) {
        TOLD.store(khz, Ordering::Relaxed);
    }
}

/// The frequency of [`ticks`] in kHz: from the hypervisor, from the CPU, or measured with the timer.
pub(super) fn ticks_per_millisecond() -> Result<u64, Refusal> {
    Some(TOLD.load(Ordering::Relaxed))
        .filter(|&khz| khz != 0)
        .or_else(measured)
        .ok_or_else(|| refuse!(Machine, "error=no_clock"))
}

fn from_hypervisor() -> Option<u64> {
    let is_hypervised = __cpuid(1).ecx >> 31 != 0;
    if !is_hypervised {
        return None;
    }
    let greatest = __cpuid(HYPERVISOR).eax;
    // Far more leaves than there are means that this is not the hypervisor's answer.
    if !(HYPERVISOR_FREQUENCY..HYPERVISOR + 0x1_0000).contains(&greatest) {
        return None;
    }
    Some(u64::from(__cpuid(HYPERVISOR_FREQUENCY).eax)).filter(|&khz| khz != 0)
}

fn from_cpu() -> Option<u64> {
    if __cpuid(0).eax < TSC_AND_CRYSTAL {
        return None;
    }
    let leaf = __cpuid(TSC_AND_CRYSTAL);
    let (denominator, numerator, crystal) = (leaf.eax, leaf.ebx, leaf.ecx);
    if denominator == 0 {
        return None;
    }
    Some(u64::from(crystal) * u64::from(numerator) / u64::from(denominator) / 1000).filter(|&khz| khz != 0)
}

fn measured() -> Option<u64> {
    let mut speaker = Port::<u8>::new(SPEAKER);
    let mut command = Port::<u8>::new(TIMER_COMMAND);
    let mut channel = Port::<u8>::new(TIMER_CHANNEL_2);
    let count = (TIMER_HZ * CALIBRATION_MS / 1000) as u16;
    let [low, high] = count.to_le_bytes();
    // SAFETY: the ports of the interval timer; they have no effect on memory.
    unsafe {
        let gate = speaker.read() & !3 | 1;
        speaker.write(gate);
        command.write(COUNT_DOWN_ONCE);
        channel.write(low);
        channel.write(high);
        let start = ticks();
        loop {
            let output = speaker.read() >> 5 & 1;
            let elapsed = ticks().saturating_sub(start);
            // A machine without a timer answers all ones at once.
            if output == 1 {
                return Some(elapsed / CALIBRATION_MS).filter(|&khz| khz > 100_000);
            }
            if elapsed > CALIBRATION_BOUND {
                return None;
            }
        }
    }
}
