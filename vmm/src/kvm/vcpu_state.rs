//! All that KVM holds for a vCPU, saved and restored.
//!
//! The order of restoring, each for a reason: CPUID is there before (it decides what the registers may hold); registers, then
//! system registers, which say where and in which mode the local APIC is; then extended registers; the local APIC before the
//! MSRs, of which the deadline of its timer is one; the TSC before that deadline; KVM's own MSRs last of the MSRs, with the one
//! that switches asynchronous page faults on at the end ([`ParavirtualMsrs`]); then events, which nothing may overwrite.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    KVMIO, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_sregs2, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, VcpuFd};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{errno, ioctl_ior_nr, ioctl_iow_nr};

use super::page_walk::{Paging, Pointers};
use super::plain::{self, Blob};
use super::{Host, MsrError, ParavirtualMsrs, Vcpu, paravirtual_msrs};
use crate::address_map::PAGE_SIZE;

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);

/// `KVM_CAP_SREGS2`.
const CAP_SREGS2: u64 = 200;

const MSR_TSC: u32 = 0x10;
/// No state, but an act: to have the time written into guest memory.
const MSR_OLD_WALL_CLOCK: u32 = 0x11;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Where a system call enters the kernel.
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;
/// Of Hyper-V's interface, which no guest here is offered: some of them are clocks.
const HYPER_V_MSRS: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_0fff;
const PARAVIRTUAL_MSRS: std::ops::RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4dff;

/// As many MSRs as one call takes.
const MSRS_AT_A_TIME: usize = 256;

/// How far frequencies of time stamp counters may be apart and be taken for the same, as by KVM (`tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;

/// `KVM_STATE_NESTED_FORMAT_VMX`.
const NESTED_FORMAT_VMX: u16 = 0;

/// `KVM_STATE_NESTED_GUEST_MODE`.
const NESTED_GUEST_MODE: u16 = 1;

/// Why a vCPU's state could not be saved or restored.
#[derive(Debug, Error)]
pub enum VcpuStateError {
    /// KVM refuses a part of it.
    #[error("KVM cannot {act} {part} of vCPU {index}")]
    Part {
        /// To get or to set.
        act: &'static str,
        /// Which part.
        part: &'static str,
        /// Which vCPU.
        index: u32,
        /// What KVM answered.
        source: errno::Error,
    },
    /// KVM refuses an MSR.
    #[error("cannot {act} the MSRs of vCPU {index}")]
    Msr {
        /// To get or to set.
        act: &'static str,
        /// Which vCPU.
        index: u32,
        /// Why.
        source: MsrError,
    },
    /// It runs a guest of its own.
    #[error("vCPU {0} runs a virtual machine of its own, whose state is not saved")]
    Nested(u32),
    /// The guest's time would go at another speed.
    #[error(
        "the time stamp counter of this host runs at {here} kHz, that of the snapshot at {there} kHz, and KVM cannot scale it here"
    )]
    TscFrequency {
        /// This host's.
        here: u32,
        /// The snapshot's.
        there: u32,
    },
    /// More extended registers than this host's CPUs have.
    #[error("the extended registers of vCPU {index} are {size} bytes, this host has {most}")]
    Xsave {
        /// Which vCPU.
        index: u32,
        /// The state's size.
        size: usize,
        /// This host's.
        most: usize,
    },
}

/// What this host's KVM saves of a vCPU.
#[derive(Clone, Debug)]
pub struct StateList {
    msrs: Vec<u32>,
    paravirtual: Vec<u32>,
    xsave_size: usize,
    sregs2: bool,
}

impl StateList {
    /// As KVM lists it.
    pub fn new(host: &Host) -> Result<Self, MsrError> {
        let list = host.kvm().get_msr_index_list().map_err(MsrError::List)?;
        let ordinary = |msr: &u32| {
            !HYPER_V_MSRS.contains(msr) && !PARAVIRTUAL_MSRS.contains(msr) && *msr != MSR_OLD_WALL_CLOCK
        };
        let mut msrs: Vec<u32> = list.as_slice().iter().copied().filter(ordinary).collect();
        // KVM holds the MTRRs and does not list them: eight pairs, the fixed ranges, the default type.
        msrs.extend(
            (0x200..=0x20f)
                .chain([0x250, 0x258, 0x259])
                .chain(0x268..=0x26f)
                .chain([0x2ff]),
        );
        msrs.sort_unstable();
        msrs.dedup();
        // The counter first, so that it stands still for as short as can be; the deadline, which is counted by it, last.
        msrs.sort_by_key(|msr| match *msr {
            MSR_TSC => 0,
            MSR_TSC_DEADLINE => 2,
            _ => 1,
        });
        let kvm = host.kvm();
        let xsave2 = usize::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(Self {
            msrs,
            paravirtual: paravirtual_msrs(host)?,
            xsave_size: xsave2.max(size_of::<kvm_xsave>()),
            sregs2: kvm.check_extension_raw(CAP_SREGS2) > 0,
        })
    }
}

/// A vCPU's state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    /// Nanoseconds since 1970 when the time stamp counter was read.
    saved_at_ns: u64,
    /// The counter's frequency, if KVM knows it.
    tsc_khz: Option<u32>,
    #[serde(with = "plain")]
    registers: kvm_regs,
    #[serde(with = "plain")]
    system_registers: kvm_sregs2,
    #[serde(with = "plain")]
    debug_registers: kvm_debugregs,
    #[serde(with = "plain")]
    extended_control_registers: kvm_xcrs,
    extended_registers: Blob,
    #[serde(with = "plain")]
    local_apic: kvm_lapic_state,
    #[serde(with = "plain")]
    events: kvm_vcpu_events,
    /// Running, halted, waiting for INIT or SIPI: `KVM_MP_STATE_…`.
    activity: u32,
    msrs: Vec<(u32, u64)>,
    paravirtual_msrs: ParavirtualMsrs,
}

impl VcpuState {
    /// Reads the state of a vCPU that does not run, and of which no access is pending ([`Vcpu::complete_access`]).
    pub fn save(vcpu: &Vcpu, list: &StateList) -> Result<Self, VcpuStateError> {
        let (fd, index) = (vcpu.fd(), vcpu.index());
        let get = Attempt { act: "get", index };
        refuse_nested(fd, index)?;
        // Before the local APIC and the events: it settles an INIT or SIPI that has come.
        let activity = get.part("the activity state", fd.get_mp_state())?.mp_state;
        // Before the registers: a page fault that is about to be delivered, as the token of an asynchronous one is, puts its
        // address into CR2 (and a debug exception what it has into DR6) when it is asked for here.
        let events = get.part("the events", fd.get_vcpu_events())?;
        let msrs = get.msrs(read_msrs(fd, &list.msrs))?;
        let saved_at_ns = now_ns();
        Ok(Self {
            saved_at_ns,
            tsc_khz: vcpu.tsc_khz(),
            registers: get.part("the registers", fd.get_regs())?,
            system_registers: get.part("the system registers", get_sregs(fd, list))?,
            debug_registers: get.part("the debug registers", fd.get_debug_regs())?,
            extended_control_registers: get.part("the extended control registers", fd.get_xcrs())?,
            extended_registers: get.part("the extended registers", get_xsave(fd, list))?,
            local_apic: get.part("the local APIC", fd.get_lapic())?,
            events,
            activity,
            msrs,
            paravirtual_msrs: get.msrs(ParavirtualMsrs::save(fd, &list.paravirtual))?,
        })
    }

    /// The frequency of its time stamp counter, if KVM knew it.
    pub fn tsc_khz(&self) -> Option<u32> {
        self.tsc_khz
    }

    /// Writes it to a new vCPU that has its CPUID. Memory slots are there and the pager serves: KVM touches guest memory.
    ///
    /// Time has passed since the state was saved, and the time stamp counter says so.
    pub fn restore(&self, vcpu: &Vcpu, list: &StateList) -> Result<(), VcpuStateError> {
        let (fd, index) = (vcpu.fd(), vcpu.index());
        let set = Attempt { act: "set", index };
        self.restore_tsc_frequency(fd)?;
        let activity = kvm_mp_state {
            mp_state: self.activity,
        };
        set.part("the activity state", fd.set_mp_state(activity))?;
        set.part("the registers", fd.set_regs(&self.registers))?;
        set.part(
            "the system registers",
            set_sregs(fd, &self.system_registers, list),
        )?;
        self.check_size(index, list)?;
        set.part(
            "the extended registers",
            set_xsave(fd, &self.extended_registers, list),
        )?;
        set.part(
            "the extended control registers",
            fd.set_xcrs(&self.extended_control_registers),
        )?;
        set.part("the debug registers", fd.set_debug_regs(&self.debug_registers))?;
        set.part("the local APIC", fd.set_lapic(&self.local_apic))?;
        set.msrs(self.restore_msrs(fd))?;
        set.msrs(self.paravirtual_msrs.restore(fd))?;
        set.part("the events", fd.set_vcpu_events(&self.events))?;
        vcpu.excuse_pause();
        Ok(())
    }

    /// What of it points to memory.
    pub(super) fn pointers(&self) -> Pointers {
        const PAGING: u64 = 1 << 31;
        const FIVE_LEVELS: u64 = 1 << 12;
        const LONG_MODE_ACTIVE: u64 = 1 << 10;
        let (registers, system) = (&self.registers, &self.system_registers);
        let paging = match (system.cr0 & PAGING, system.efer & LONG_MODE_ACTIVE) {
            (0, _) => Paging::Off,
            (_, 0) => Paging::Other,
            _ if system.cr4 & FIVE_LEVELS != 0 => Paging::Levels(5),
            _ => Paging::Levels(4),
        };
        let code = system.cs.base.wrapping_add(registers.rip);
        let stack = system.ss.base.wrapping_add(registers.rsp);
        let mut linear = vec![
            code,
            code.wrapping_add(PAGE_SIZE),
            stack,
            stack.wrapping_sub(PAGE_SIZE),
            system.idt.base,
            system.gdt.base,
            system.tr.base,
            system.fs.base,
            system.gs.base,
        ];
        let kernel = [MSR_LSTAR, MSR_KERNEL_GS_BASE];
        linear.extend(
            self.msrs
                .iter()
                .filter(|(msr, _)| kernel.contains(msr))
                .map(|(_, value)| value),
        );
        let r = registers;
        let general = [
            r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14,
            r.r15,
        ];
        // What walks through memory is about to come to the next page.
        linear.extend(
            general
                .into_iter()
                .flat_map(|value| [value, value.wrapping_add(PAGE_SIZE)]),
        );
        Pointers {
            paging,
            root: system.cr3,
            linear,
            physical: self.paravirtual_msrs.areas().collect(),
        }
    }

    fn restore_tsc_frequency(&self, fd: &VcpuFd) -> Result<(), VcpuStateError> {
        let here = fd.get_tsc_khz().ok().filter(|khz| *khz > 0);
        let (Some(here), Some(there)) = (here, self.tsc_khz) else {
            return Ok(());
        };
        let tolerance = u64::from(there) * TSC_TOLERANCE_PPM / 1_000_000;
        if u64::from(here.abs_diff(there)) <= tolerance || fd.set_tsc_khz(there).is_ok() {
            return Ok(());
        }
        Err(VcpuStateError::TscFrequency { here, there })
    }

    /// Whether this host has as many extended registers.
    fn check_size(&self, index: u32, list: &StateList) -> Result<(), VcpuStateError> {
        let (size, most) = (self.extended_registers.used().len(), list.xsave_size);
        if size > most {
            return Err(VcpuStateError::Xsave { index, size, most });
        }
        Ok(())
    }

    fn restore_msrs(&self, fd: &VcpuFd) -> Result<(), MsrError> {
        let mut values = self.msrs.clone();
        if let (Some(tsc), Some(khz)) = (values.iter_mut().find(|(msr, _)| *msr == MSR_TSC), self.tsc_khz) {
            let passed = passed_since(self.saved_at_ns).as_nanos() * u128::from(khz) / 1_000_000;
            tsc.1 = tsc.1.wrapping_add(passed as u64);
        }
        write_msrs(fd, &values)
    }
}

/// Getting or setting the state of a vCPU, for who says what went wrong.
#[derive(Clone, Copy)]
struct Attempt {
    act: &'static str,
    index: u32,
}

impl Attempt {
    fn part<T>(self, part: &'static str, result: Result<T, errno::Error>) -> Result<T, VcpuStateError> {
        let Self { act, index } = self;
        result.map_err(|source| VcpuStateError::Part {
            act,
            part,
            index,
            source,
        })
    }

    fn msrs<T>(self, result: Result<T, MsrError>) -> Result<T, VcpuStateError> {
        let Self { act, index } = self;
        result.map_err(|source| VcpuStateError::Msr { act, index, source })
    }
}

/// Nanoseconds since 1970.
pub(super) fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos() as u64)
}

/// How long ago that was. Never negative, so that no guest's clock goes back because the host's was.
pub(super) fn passed_since(saved_at_ns: u64) -> Duration {
    Duration::from_nanos(now_ns().saturating_sub(saved_at_ns))
}

/// Refuses a vCPU that has a guest of its own.
fn refuse_nested(fd: &VcpuFd, index: u32) -> Result<(), VcpuStateError> {
    let mut nested = KvmNestedStateBuffer::empty();
    match fd.nested_state(&mut nested) {
        Ok(_) if has_guest(&nested) => Err(VcpuStateError::Nested(index)),
        // An error: there is no such state.
        _ => Ok(()),
    }
}

/// Whether a vCPU is inside its own guest, or, of VMX, has only begun (`VMXON`): KVM holds where the guest's structures are.
fn has_guest(nested: &KvmNestedStateBuffer) -> bool {
    // SAFETY: every bit pattern is a header of VMX.
    let vmxon = unsafe { nested.hdr.vmx.vmxon_pa };
    let begun = nested.format == NESTED_FORMAT_VMX && vmxon != u64::MAX;
    begun || nested.flags & NESTED_GUEST_MODE != 0
}

fn get_sregs(fd: &VcpuFd, list: &StateList) -> Result<kvm_sregs2, errno::Error> {
    if !list.sregs2 {
        return fd.get_sregs().map(|old| from_old(&old));
    }
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the ioctl takes a place for this structure.
    match unsafe { ioctl_with_mut_ref(fd, KVM_GET_SREGS2(), &mut sregs) } {
        0 => Ok(sregs),
        _ => Err(errno::Error::last()),
    }
}

fn set_sregs(fd: &VcpuFd, sregs: &kvm_sregs2, list: &StateList) -> Result<(), errno::Error> {
    if !list.sregs2 {
        return fd.set_sregs(&to_old(sregs));
    }
    // SAFETY: the ioctl takes this structure.
    match unsafe { ioctl_with_ref(fd, KVM_SET_SREGS2(), sregs) } {
        0 => Ok(()),
        _ => Err(errno::Error::last()),
    }
}

/// Without the page-directory pointers of 32-bit paging, which KVM then reads from memory as the processor does, and without the
/// interrupt that is being delivered, which is among the events.
fn from_old(old: &kvm_sregs) -> kvm_sregs2 {
    kvm_sregs2 {
        cs: old.cs,
        ds: old.ds,
        es: old.es,
        fs: old.fs,
        gs: old.gs,
        ss: old.ss,
        tr: old.tr,
        ldt: old.ldt,
        gdt: old.gdt,
        idt: old.idt,
        cr0: old.cr0,
        cr2: old.cr2,
        cr3: old.cr3,
        cr4: old.cr4,
        cr8: old.cr8,
        efer: old.efer,
        apic_base: old.apic_base,
        ..Default::default()
    }
}

fn to_old(new: &kvm_sregs2) -> kvm_sregs {
    kvm_sregs {
        cs: new.cs,
        ds: new.ds,
        es: new.es,
        fs: new.fs,
        gs: new.gs,
        ss: new.ss,
        tr: new.tr,
        ldt: new.ldt,
        gdt: new.gdt,
        idt: new.idt,
        cr0: new.cr0,
        cr2: new.cr2,
        cr3: new.cr3,
        cr4: new.cr4,
        cr8: new.cr8,
        efer: new.efer,
        apic_base: new.apic_base,
        ..Default::default()
    }
}

fn get_xsave(fd: &VcpuFd, list: &StateList) -> Result<Blob, errno::Error> {
    if list.xsave_size == size_of::<kvm_xsave>() {
        return fd.get_xsave().map(|xsave| Blob::new(&to_bytes(&xsave.region)));
    }
    let mut words = vec![0_u32; list.xsave_size.div_ceil(4)];
    // SAFETY: KVM writes as many bytes as it has said, and there are as many.
    match unsafe { ioctl_with_mut_ref(fd, KVM_GET_XSAVE2(), &mut words[0]) } {
        0 => Ok(Blob::new(&to_bytes(&words))),
        _ => Err(errno::Error::last()),
    }
}

fn set_xsave(fd: &VcpuFd, blob: &Blob, list: &StateList) -> Result<(), errno::Error> {
    // KVM reads as many bytes as it has said, also by the older call.
    let mut words = vec![0_u32; list.xsave_size.div_ceil(4)];
    for (word, bytes) in words.iter_mut().zip(blob.used().chunks(4)) {
        let mut padded = [0; 4];
        padded[..bytes.len()].copy_from_slice(bytes);
        *word = u32::from_le_bytes(padded);
    }
    // SAFETY: as above.
    match unsafe { ioctl_with_ref(fd, KVM_SET_XSAVE(), &words[0]) } {
        0 => Ok(()),
        _ => Err(errno::Error::last()),
    }
}

ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);
ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);

fn to_bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// What can be read of `msrs`: KVM lists some that this CPU or this vCPU's CPUID does not have.
fn read_msrs(fd: &VcpuFd, msrs: &[u32]) -> Result<Vec<(u32, u64)>, MsrError> {
    let act = "read";
    let mut values = Vec::with_capacity(msrs.len());
    let mut rest = msrs;
    while !rest.is_empty() {
        let step = &rest[..rest.len().min(MSRS_AT_A_TIME)];
        let entries: Vec<_> = step.iter().map(|&msr| entry(msr, 0)).collect();
        let mut entries = Msrs::from_entries(&entries).map_err(|_| MsrError::TooMany(step.len()))?;
        let done = fd
            .get_msrs(&mut entries)
            .map_err(|source| MsrError::Failed { act, source })?;
        let read = &entries.as_slice()[..done];
        values.extend(read.iter().map(|entry| (entry.index, entry.data)));
        // The one that KVM stopped at is left out.
        rest = &rest[(done + usize::from(done < step.len()))..];
    }
    Ok(values)
}

/// Writes all. One that KVM does not take but that holds the value already is as good.
fn write_msrs(fd: &VcpuFd, values: &[(u32, u64)]) -> Result<(), MsrError> {
    let act = "write";
    let mut rest = values;
    while !rest.is_empty() {
        let step = &rest[..rest.len().min(MSRS_AT_A_TIME)];
        let entries: Vec<_> = step.iter().map(|&(msr, value)| entry(msr, value)).collect();
        let entries = Msrs::from_entries(&entries).map_err(|_| MsrError::TooMany(step.len()))?;
        let done = fd
            .set_msrs(&entries)
            .map_err(|source| MsrError::Failed { act, source })?;
        rest = &rest[done..];
        if done < step.len() {
            let (msr, value) = rest[0];
            if read_msrs(fd, &[msr])? != [(msr, value)] {
                return Err(MsrError::Refused { act, msr });
            }
            rest = &rest[1..];
        }
    }
    Ok(())
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As KVM fills it in (Linux: `vmx_get_nested_state`, `svm_get_nested_state`).
    #[test]
    fn a_vcpu_with_a_guest_is_told_from_one_without() {
        let state = |format, flags, vmxon| {
            let mut state = KvmNestedStateBuffer::empty();
            (state.format, state.flags) = (format, flags);
            state.hdr.vmx.vmxon_pa = vmxon;
            state
        };
        let svm = 1;
        assert!(!has_guest(&state(NESTED_FORMAT_VMX, 0, u64::MAX)), "before VMXON");
        assert!(has_guest(&state(NESTED_FORMAT_VMX, 0, 0x1000)), "after VMXON");
        assert!(has_guest(&state(NESTED_FORMAT_VMX, NESTED_GUEST_MODE, 0x1000)));
        // There is the address of the guest's control block instead, and the global interrupt flag among the flags.
        assert!(!has_guest(&state(svm, 1 << 8, 0)));
        assert!(has_guest(&state(svm, 1 << 8 | NESTED_GUEST_MODE, 0x1000)));
    }
}
