//! A VM: its memory slots, interrupt controllers and timer.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY, KVMIO, kvm_clear_dirty_log, kvm_enable_cap, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use thiserror::Error;
use vm_memory::GuestAddress;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::{errno, eventfd::EventFd, ioctl_iowr_nr};

use super::Host;
use crate::address_map::{KVM_IDENTITY_MAP, KVM_TSS, PAGE_SIZE};

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// APIC IDs are 8 bits wide in the tables and in CPUID leaf 1, and 0xff addresses all (Intel SDM volume 3, 12.6.2.1).
const VCPUS_MAX: usize = 255;

/// Why a VM could not be set up.
#[derive(Debug, Error)]
pub enum VmError {
    /// `KVM_CREATE_VM` failed.
    #[error("KVM cannot create a VM")]
    Create(#[source] errno::Error),
    /// A part of the chipset is refused.
    #[error("KVM cannot give the VM its {part}")]
    Chipset {
        /// Which part.
        part: &'static str,
        /// What KVM answered.
        source: errno::Error,
    },
    /// A memory slot is refused.
    #[error("KVM cannot map {size:#x} bytes at guest-physical {guest:#x} as memory slot {slot}")]
    Map {
        /// The slot.
        slot: u32,
        /// Where the guest would see it.
        guest: u64,
        /// Bytes to map.
        size: u64,
        /// What KVM answered.
        source: errno::Error,
    },
    /// There is nothing in a memory slot.
    #[error("the VM has no memory slot {0}")]
    NoSlot(u32),
    /// Writes to a slot are not logged.
    #[error("KVM cannot {act} the writes to memory slot {slot}")]
    DirtyLog {
        /// What it was to do.
        act: &'static str,
        /// The slot.
        slot: u32,
        /// What KVM answered.
        source: errno::Error,
    },
    /// An interrupt line cannot be tied to an event.
    #[error("KVM cannot tie an event to interrupt line {line}")]
    Irqfd {
        /// The line.
        line: u32,
        /// What KVM answered.
        source: errno::Error,
    },
}

/// A VM with in-kernel interrupt controllers and timer, and no memory yet.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    max_vcpus: usize,
    /// What is in each slot.
    slots: Mutex<BTreeMap<u32, kvm_userspace_memory_region>>,
    /// Reading a dirty log does not clear it: `KVM_CLEAR_DIRTY_LOG` does.
    cleared_apart: bool,
}

impl Vm {
    /// Creates a VM. What must precede the first vCPU is done here: the pages that KVM wants for real mode on older
    /// Intel CPUs, the PICs, the I/O APIC, local APICs, and the PIT.
    pub fn new(host: &Host) -> Result<Self, VmError> {
        let fd = create_vm(host)?;
        let chipset = |part| move |source| VmError::Chipset { part, source };
        fd.set_identity_map_address(KVM_IDENTITY_MAP.0)
            .map_err(chipset("identity-mapped page table"))?;
        fd.set_tss_address(KVM_TSS.0 as usize)
            .map_err(chipset("task state segment"))?;
        fd.create_irq_chip().map_err(chipset("interrupt controllers"))?;
        // Port 0x61 is then answered by KVM as well; Linux calibrates the TSC with it.
        fd.create_pit2(kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        })
        .map_err(chipset("interval timer"))?;
        let cleared_apart = clear_dirty_log_apart(&fd);
        Ok(Self {
            fd,
            max_vcpus: Self::max_vcpus_on(host),
            slots: Mutex::default(),
            cleared_apart,
        })
    }

    /// How many vCPUs a VM can have on this host.
    pub fn max_vcpus_on(host: &Host) -> usize {
        host.kvm().get_max_vcpus().min(VCPUS_MAX)
    }

    /// Shows the guest `size` bytes of this process at guest-physical `guest`. A slot that is in use is changed; a size of 0
    /// removes it.
    ///
    /// # Safety
    ///
    /// The guest writes (unless `read_only`) and KVM reads through this mapping at any time, so for as long as the VM or
    /// one of its vCPUs exists and the slot is not removed:
    /// - `host..host + size` is memory that belongs to the caller and stays mapped;
    /// - no reference to it is held across a moment in which the guest may run, and no Rust object lives in it.
    pub unsafe fn map(
        &self,
        slot: u32,
        guest: GuestAddress,
        host: *mut u8,
        size: u64,
        read_only: bool,
    ) -> Result<(), VmError> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: if read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: guest.0,
            memory_size: size,
            userspace_addr: host as u64,
        };
        let mut slots = self.slots();
        // SAFETY: the caller vouches for the memory; the structure is a valid one.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(|source| VmError::Map {
            slot,
            guest: guest.0,
            size,
            source,
        })?;
        if size == 0 {
            slots.remove(&slot);
        } else {
            slots.insert(slot, region);
        }
        Ok(())
    }

    /// Logs writes to a slot from now on, or does not any more. The log begins empty.
    pub fn log_dirty_pages(&self, slot: u32, on: bool) -> Result<(), VmError> {
        let mut slots = self.slots();
        let region = slots.get_mut(&slot).ok_or(VmError::NoSlot(slot))?;
        let mut changed = *region;
        if on {
            changed.flags |= KVM_MEM_LOG_DIRTY_PAGES;
        } else {
            changed.flags &= !KVM_MEM_LOG_DIRTY_PAGES;
        }
        // SAFETY: but for the flag it is what the slot is already, for which whoever mapped it vouches.
        unsafe { self.fd.set_user_memory_region(changed) }.map_err(|source| VmError::DirtyLog {
            act: if on { "log" } else { "stop logging" },
            slot,
            source,
        })?;
        *region = changed;
        Ok(())
    }

    /// The pages of a slot that were written to since it is logged or since they were last asked for: one bit a page, the lowest
    /// first. A page that is written to while it is asked for is in this answer or in the next, or in both.
    pub fn take_dirty_log(&self, slot: u32) -> Result<Vec<u64>, VmError> {
        let mut log = self.dirty_log(slot)?;
        if log.iter().any(|word| *word != 0) {
            self.clear_dirty_log(slot, 0, &mut log)?;
        }
        Ok(log)
    }

    /// The same without forgetting it, where KVM can ([`Self::clear_dirty_log`]).
    pub fn dirty_log(&self, slot: u32) -> Result<Vec<u64>, VmError> {
        let size = self.slot_pages(slot)? * PAGE_SIZE;
        let log = self.fd.get_dirty_log(slot, size as usize);
        log.map_err(|source| VmError::DirtyLog {
            act: "tell",
            slot,
            source,
        })
    }

    /// Forgets that pages of a slot were written to, those with a bit in `log`, of which the lowest is that of page `first`, a multiple
    /// of 64. Nothing is to be done where KVM forgets what it has told.
    pub fn clear_dirty_log(&self, slot: u32, first: u64, log: &mut [u64]) -> Result<(), VmError> {
        if !self.cleared_apart {
            return Ok(());
        }
        let rest = self.slot_pages(slot)?.saturating_sub(first);
        let clear = kvm_clear_dirty_log {
            slot,
            num_pages: rest.min(log.len() as u64 * 64) as u32,
            first_page: first,
            __bindgen_anon_1: kvm_bindings::kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: log.as_mut_ptr().cast(),
            },
        };
        // SAFETY: KVM reads a bit for each of these pages, and `log` has as many.
        if unsafe { ioctl_with_ref(&self.fd, KVM_CLEAR_DIRTY_LOG(), &clear) } != 0 {
            return Err(VmError::DirtyLog {
                act: "forget",
                slot,
                source: errno::Error::last(),
            });
        }
        Ok(())
    }

    fn slot_pages(&self, slot: u32) -> Result<u64, VmError> {
        let slots = self.slots();
        Ok(slots.get(&slot).ok_or(VmError::NoSlot(slot))?.memory_size / PAGE_SIZE)
    }

    fn slots(&self) -> MutexGuard<'_, BTreeMap<u32, kvm_userspace_memory_region>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on every write to `event` raises interrupt line `line` once (edge).
    pub fn irqfd(&self, event: &EventFd, line: u32) -> Result<(), VmError> {
        self.fd
            .register_irqfd(event, line)
            .map_err(|source| VmError::Irqfd { line, source })
    }

    /// How many vCPUs a VM can have here.
    pub fn max_vcpus(&self) -> usize {
        self.max_vcpus
    }

    /// The VM itself, for what [`Vm`] has no word for.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }
}

/// Has pages that are taken from a dirty log write-protected page by page when they are taken, and not all of them at once before
/// (Linux 5.0). Says whether it is so now.
fn clear_dirty_log_apart(fd: &VmFd) -> bool {
    let offered = fd.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
    let mut wanted = kvm_enable_cap {
        cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        ..Default::default()
    };
    wanted.args[0] = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.into();
    offered > 0 && fd.enable_cap(&wanted).is_ok()
}

/// `KVM_CREATE_VM` waits interruptibly (for a kernel thread of its own), so a signal at the wrong moment is no failure.
fn create_vm(host: &Host) -> Result<VmFd, VmError> {
    loop {
        match host.kvm().create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result.map_err(VmError::Create),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{MmapRegion, VolatileMemory};

    #[test]
    fn overlapping_slots_are_refused_with_what_was_asked_for() {
        let vm = Vm::new(&Host::open().unwrap()).unwrap();
        let memory = MmapRegion::<()>::new(0x2000).unwrap();
        assert_eq!(memory.len(), 0x2000);
        // SAFETY: `memory` outlives `vm`'s use here, no vCPU runs.
        let map = |slot, guest| unsafe { vm.map(slot, GuestAddress(guest), memory.as_ptr(), 0x2000, false) };
        map(0, 0).unwrap();
        let error = map(1, 0x1000).unwrap_err();
        assert_eq!(
            error.to_string(),
            "KVM cannot map 0x2000 bytes at guest-physical 0x1000 as memory slot 1"
        );
    }

    #[test]
    fn an_interrupt_line_takes_an_event() {
        let vm = Vm::new(&Host::open().unwrap()).unwrap();
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        vm.irqfd(&event, 4).unwrap();
        assert!(matches!(vm.irqfd(&event, 4), Err(VmError::Irqfd { line: 4, .. })));
        assert!(vm.max_vcpus() > 0);
    }
}
