//! A vCPU: its first state, and running it.

use std::sync::Arc;

use firmware::boot_info::{BootInfo, Protocol};
use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
    Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use thiserror::Error;
use vm_memory::GuestAddress;
use vmm_sys_util::errno;

use super::{CpuModel, CpuModelError, ExitCounts, ExitReason, KickError, VcpuKick, Vm};
use crate::ending::Ending;

/// Where a vCPU's accesses to ports, and to guest-physical addresses without memory, end up.
pub trait Bus: Sync {
    /// Fills `data` with what `port` reads as.
    fn read_port(&self, port: u16, data: &mut [u8]);

    /// Writes `data` to `port`; an answer ends the VM.
    fn write_port(&self, port: u16, data: &[u8]) -> Option<Ending>;

    /// Fills `data` with what there is at `address`: nothing, unless there is a device.
    fn read_memory(&self, _address: GuestAddress, data: &mut [u8]) {
        data.fill(0xff);
    }

    /// Writes `data` to `address`; an answer ends the VM.
    fn write_memory(&self, _address: GuestAddress, _data: &[u8]) -> Option<Ending> {
        None
    }
}

/// Why a vCPU returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Something was done for it; it can run on.
    Continue,
    /// It was kicked, or woke up with nothing to do. Look at requests, then run it again.
    Interrupted,
    /// The VM has ended.
    Ended(Ending),
}

/// Why a vCPU could not be set up.
#[derive(Debug, Error)]
pub enum VcpuSetupError {
    /// `KVM_CREATE_VCPU` failed.
    #[error("KVM cannot create vCPU {index}")]
    Create {
        /// Which vCPU.
        index: u32,
        /// What KVM answered.
        source: errno::Error,
    },
    /// Its CPUID could not be made.
    #[error("cannot make the CPUID of vCPU {index}")]
    CpuModel {
        /// Which vCPU.
        index: u32,
        /// Why.
        source: CpuModelError,
    },
    /// KVM refuses a part of its state.
    #[error("KVM cannot get or set {state} of vCPU {index}")]
    State {
        /// Which vCPU.
        index: u32,
        /// Which part.
        state: &'static str,
        /// What KVM answered.
        source: errno::Error,
    },
    /// It cannot be interrupted from other threads.
    #[error("cannot prepare vCPU {index} for being interrupted")]
    Kick {
        /// Which vCPU.
        index: u32,
        /// Why.
        source: KickError,
    },
}

/// Why a vCPU cannot go on.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum VcpuError {
    /// `KVM_RUN` failed.
    #[error("vCPU {index} cannot run on at {rip:#x}")]
    Run {
        /// Which vCPU.
        index: u32,
        /// Its instruction pointer.
        rip: u64,
        /// What KVM answered.
        source: errno::Error,
    },
    /// The processor refused the vCPU's state.
    #[error("vCPU {index} cannot enter the guest at {rip:#x}: hardware reason {reason:#x} on CPU {cpu}")]
    EntryRefused {
        /// Which vCPU.
        index: u32,
        /// Its instruction pointer.
        rip: u64,
        /// As in the processor's manual.
        reason: u64,
        /// The host's CPU.
        cpu: u32,
    },
    /// The guest executed an instruction that KVM had to emulate and does not know.
    #[error("vCPU {index}: KVM cannot emulate the instruction at {rip:#x} (bytes: {bytes})")]
    Emulation {
        /// Which vCPU.
        index: u32,
        /// Its instruction pointer.
        rip: u64,
        /// The instruction, in hexadecimal, as far as KVM knows it.
        bytes: String,
    },
    /// KVM gave up.
    #[error("vCPU {index}: KVM reports internal error {suberror} at {rip:#x} (data: {data:x?})")]
    Internal {
        /// Which vCPU.
        index: u32,
        /// Its instruction pointer.
        rip: u64,
        /// `KVM_INTERNAL_ERROR_…`.
        suberror: u32,
        /// What KVM adds to it.
        data: Vec<u64>,
    },
    /// The memory behind a guest-physical address could not be accessed.
    #[error(
        "vCPU {index}: no access to the memory behind guest-physical {address:#x} (instruction at {rip:#x})"
    )]
    MemoryFault {
        /// Which vCPU.
        index: u32,
        /// Its instruction pointer.
        rip: u64,
        /// What it accessed.
        address: u64,
    },
    /// An exit that nobody asked KVM for.
    #[error("vCPU {index}: KVM returned for a reason that is not handled, at {rip:#x}: {exit}")]
    Unexpected {
        /// Which vCPU.
        index: u32,
        /// Its instruction pointer.
        rip: u64,
        /// The exit.
        exit: String,
    },
}

/// A vCPU.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    index: u32,
    kick: VcpuKick,
    exits: Arc<ExitCounts>,
}

impl Vcpu {
    /// Creates a vCPU in the state of a processor after reset (Intel SDM volume 3, 11.1): the first one, index 0, starts at
    /// the reset vector, the others wait for INIT and SIPI.
    pub fn new(vm: &Vm, index: u32, model: &CpuModel) -> Result<Self, VcpuSetupError> {
        // KVM does not know it where the host's TSC is unstable. The guest then has to measure.
        let frequency = |fd: &VcpuFd| fd.get_tsc_khz().ok().filter(|khz| *khz > 0);
        Self::create(vm, index, model, frequency)
    }

    /// The same for a state that is to be restored: its CPUID says the frequency of the time stamp counter as it did before, if that was
    /// known.
    pub fn for_state(
        vm: &Vm,
        index: u32,
        model: &CpuModel,
        tsc_khz: Option<u32>,
    ) -> Result<Self, VcpuSetupError> {
        Self::create(vm, index, model, |_| tsc_khz)
    }

    fn create(
        vm: &Vm,
        index: u32,
        model: &CpuModel,
        tsc_khz: impl FnOnce(&VcpuFd) -> Option<u32>,
    ) -> Result<Self, VcpuSetupError> {
        let fd = vm
            .fd()
            .create_vcpu(u64::from(index))
            .map_err(|source| VcpuSetupError::Create { index, source })?;
        let tsc_khz = tsc_khz(&fd);
        let cpuid = model
            .for_vcpu(index, tsc_khz)
            .map_err(|source| VcpuSetupError::CpuModel { index, source })?;
        fd.set_cpuid2(&cpuid).map_err(|source| VcpuSetupError::State {
            index,
            state: "CPUID",
            source,
        })?;
        set_memory_types(&fd).map_err(|source| VcpuSetupError::State {
            index,
            state: "the memory types",
            source,
        })?;
        let kick = VcpuKick::new(&fd).map_err(|source| VcpuSetupError::Kick { index, source })?;
        Ok(Self {
            fd,
            index,
            kick,
            exits: Arc::default(),
        })
    }

    /// Which vCPU of its VM it is.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The frequency of its time stamp counter, if KVM knows it.
    pub fn tsc_khz(&self) -> Option<u32> {
        self.fd.get_tsc_khz().ok().filter(|khz| *khz > 0)
    }

    /// What makes it return.
    pub fn kick_handle(&self) -> VcpuKick {
        self.kick.clone()
    }

    /// How often it left the guest.
    pub fn exits(&self) -> Arc<ExitCounts> {
        Arc::clone(&self.exits)
    }

    /// The vCPU itself, for what [`Vcpu`] has no word for.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Puts it where the firmware would have brought it, without firmware.
    pub fn enter_directly(&mut self, boot: &BootInfo) -> Result<(), VcpuSetupError> {
        let index = self.index;
        let failed = |state| move |source| VcpuSetupError::State { index, state, source };
        let mut sregs = self
            .fd
            .get_sregs()
            .map_err(failed("the segment and control registers"))?;
        let regs = match boot.protocol {
            Protocol::Pvh => enter_pvh(&mut sregs, boot),
            Protocol::LongMode => enter_long_mode(&mut sregs, boot),
        };
        self.fd
            .set_sregs(&sregs)
            .map_err(failed("the segment and control registers"))?;
        self.fd.set_regs(&regs).map_err(failed("the registers"))
    }

    /// Runs the guest until it needs something from outside, and does that.
    pub fn run(&mut self, bus: &dyn Bus) -> Exit {
        let exits = &self.exits;
        let ending = match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                exits.count(ExitReason::PortRead);
                for access in data.chunks_mut(self.kick.port_access_size().max(1)) {
                    bus.read_port(port, access);
                }
                return Exit::Continue;
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                exits.count(ExitReason::PortWrite);
                data.chunks(self.kick.port_access_size().max(1))
                    .find_map(|access| bus.write_port(port, access))
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                exits.count(ExitReason::MemoryRead);
                bus.read_memory(GuestAddress(address), data);
                return Exit::Continue;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                exits.count(ExitReason::MemoryWrite);
                bus.write_memory(GuestAddress(address), data)
            }
            Ok(VcpuExit::Intr) => return self.interrupted(),
            // EAGAIN: a vCPU that waits for INIT or SIPI was woken, possibly by one of them.
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return self.interrupted(),
            Ok(VcpuExit::Shutdown) => Some(Ending::TripleFault),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => Some(Ending::PowerOff),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => Some(Ending::Reset),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => Some(Ending::Panic),
            Ok(VcpuExit::FailEntry(reason, cpu)) => Some(self.entry_refused(reason, cpu)),
            Ok(VcpuExit::InternalError) => Some(self.internal_error()),
            Ok(VcpuExit::MemoryFault { gpa, .. }) => Some(self.memory_fault(gpa)),
            Ok(exit) => {
                let exit = format!("{exit:?}");
                Some(self.unexpected(exit))
            }
            Err(source) => Some(self.failed(source)),
        };
        match ending {
            None => Exit::Continue,
            Some(ending) => {
                self.exits.count(ExitReason::Final);
                Exit::Ended(ending)
            }
        }
    }

    /// Completes an access to a port, or to an address without memory, of which the guest has not got the result yet: KVM does
    /// that on its way into the guest, which is not entered here. Its state is whole then. An answer ends the VM.
    ///
    /// Where the guest's instruction touches an absent page as well, this waits for the page.
    pub fn complete_access(&mut self, bus: &dyn Bus) -> Option<Ending> {
        loop {
            self.kick.hold_back();
            match self.run(bus) {
                Exit::Interrupted => return None,
                Exit::Ended(ending) => return Some(ending),
                // One more access of the same instruction.
                Exit::Continue => {}
            }
        }
    }

    /// Lets the guest know that it stood still for a while, so that it does not take that for a lock-up.
    pub fn excuse_pause(&self) {
        // Refused where the guest does not use KVM's clock, through which it would be told.
        let _ = self.fd.kvmclock_ctrl();
    }

    fn interrupted(&self) -> Exit {
        self.exits.count(ExitReason::Interrupted);
        self.kick.acknowledge();
        Exit::Interrupted
    }

    fn failed(&self, source: errno::Error) -> Ending {
        Ending::Error(VcpuError::Run {
            index: self.index,
            rip: self.instruction_pointer(),
            source,
        })
    }

    fn entry_refused(&self, reason: u64, cpu: u32) -> Ending {
        Ending::Error(VcpuError::EntryRefused {
            index: self.index,
            rip: self.instruction_pointer(),
            reason,
            cpu,
        })
    }

    fn memory_fault(&self, address: u64) -> Ending {
        Ending::Error(VcpuError::MemoryFault {
            index: self.index,
            rip: self.instruction_pointer(),
            address,
        })
    }

    fn unexpected(&self, exit: String) -> Ending {
        Ending::Error(VcpuError::Unexpected {
            index: self.index,
            rip: self.instruction_pointer(),
            exit,
        })
    }

    fn internal_error(&mut self) -> Ending {
        let rip = self.instruction_pointer();
        // SAFETY: called for KVM_EXIT_INTERNAL_ERROR, for which `internal` is the valid member.
        let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let data = &internal.data[..internal.data.len().min(internal.ndata as usize)];
        Ending::Error(if internal.suberror == KVM_INTERNAL_ERROR_EMULATION {
            VcpuError::Emulation {
                index: self.index,
                rip,
                bytes: instruction_bytes(data),
            }
        } else {
            VcpuError::Internal {
                index: self.index,
                rip,
                suberror: internal.suberror,
                data: data.to_vec(),
            }
        })
    }

    /// For messages: 0 where KVM does not say.
    fn instruction_pointer(&self) -> u64 {
        self.fd.get_regs().map_or(0, |regs| regs.rip)
    }
}

/// What a PC's firmware does on every CPU: memory is write-back, and string instructions are fast. After reset all of it is
/// uncached (Intel SDM volume 3, 12.11.2.1), and then Linux does without page attributes too. A KVM without these registers
/// leaves it at that.
fn set_memory_types(fd: &VcpuFd) -> Result<(), errno::Error> {
    let register = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    for register in [
        register(MSR_MTRR_DEF_TYPE, MTRR_ENABLED | MTRR_WRITE_BACK),
        register(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS),
    ] {
        let registers = Msrs::from_entries(&[register]).map_err(|_| errno::Error::new(libc::E2BIG))?;
        fd.set_msrs(&registers)?;
    }
    Ok(())
}

/// The instruction in the data of an emulation failure: flags, of which bit 0 says that it follows, then its size in one
/// byte, then its bytes (`struct kvm_run`, `emulation_failure`, in Linux' `include/uapi/linux/kvm.h`).
fn instruction_bytes(data: &[u64]) -> String {
    let [flags, instruction @ ..] = data else {
        return "unknown".to_owned();
    };
    let bytes: Vec<u8> = instruction.iter().flat_map(|word| word.to_le_bytes()).collect();
    match bytes.split_first() {
        Some((size, bytes)) if flags & 1 != 0 => {
            let size = usize::from(*size).min(bytes.len());
            let hexadecimal: Vec<_> = bytes[..size].iter().map(|byte| format!("{byte:02x}")).collect();
            hexadecimal.join(" ")
        }
        _ => "unknown".to_owned(),
    }
}

/// RFLAGS with nothing set but the bit that always is.
const RFLAGS_RESERVED: u64 = 1 << 1;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1 << 0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// Segment types, Intel SDM volume 3, 3.4.5.1 and 3.5.
const TYPE_CODE: u8 = 0b1011;
const TYPE_DATA: u8 = 0b0011;
const TYPE_BUSY_TSS: u8 = 0b1011;

/// Selectors of the 64-bit boot protocol of Linux.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;

/// The state of Xen's `docs/misc/pvh.pandoc`.
fn enter_pvh(sregs: &mut kvm_sregs, boot: &BootInfo) -> kvm_regs {
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr3 = 0;
    sregs.cr4 = 0;
    sregs.efer = 0;
    set_segments(sregs, false);
    kvm_regs {
        rip: boot.entry,
        rbx: boot.argument,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    }
}

/// The state of Linux' `Documentation/arch/x86/boot.rst`, 64-bit boot protocol.
///
/// The selectors are loaded, but no descriptor table is in memory: that would be a page that the guest did not ask for. A
/// kernel that reloads a segment register before it has its own table (Linux does not) needs the firmware.
fn enter_long_mode(sregs: &mut kvm_sregs, boot: &BootInfo) -> kvm_regs {
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = boot.page_table_root;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    set_segments(sregs, true);
    kvm_regs {
        rip: boot.entry,
        rsi: boot.argument,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    }
}

fn set_segments(sregs: &mut kvm_sregs, long_mode: bool) {
    let flat = |selector, type_, long: bool| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    };
    sregs.cs = flat(BOOT_CS, TYPE_CODE, long_mode);
    let data = flat(BOOT_DS, TYPE_DATA, false);
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = kvm_segment {
        limit: 0x67,
        type_: TYPE_BUSY_TSS,
        present: 1,
        ..Default::default()
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_an_instruction_that_cannot_be_emulated_are_shown() {
        let words = [1, u64::from_le_bytes([3, 0x0f, 0xc7, 0x0f, 0, 0, 0, 0]), 0];
        assert_eq!(instruction_bytes(&words), "0f c7 0f");
        assert_eq!(instruction_bytes(&[0, 7]), "unknown");
        assert_eq!(instruction_bytes(&[]), "unknown");
        assert_eq!(instruction_bytes(&[1, 0xff]), "00 00 00 00 00 00 00");
    }
}
