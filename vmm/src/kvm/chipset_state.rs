//! What KVM holds for a VM beside its vCPUs: interrupt controllers, timer, clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vmm_sys_util::errno;

use super::Vm;
use super::plain;
use super::vcpu_state::{now_ns, passed_since};

/// Why that could not be saved or restored.
#[derive(Debug, Error)]
#[error("KVM cannot {act} the VM's {part}")]
pub struct ChipsetStateError {
    /// To get or to set.
    act: &'static str,
    /// Which part.
    part: &'static str,
    /// What KVM answered.
    source: errno::Error,
}

/// The state of what all vCPUs share.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChipsetState {
    /// Nanoseconds since 1970 when the clock was read.
    saved_at_ns: u64,
    /// The guest's monotonic clock, in nanoseconds.
    clock_ns: u64,
    #[serde(with = "plain")]
    first_pic: kvm_irqchip,
    #[serde(with = "plain")]
    second_pic: kvm_irqchip,
    #[serde(with = "plain")]
    io_apic: kvm_irqchip,
    #[serde(with = "plain")]
    timer: kvm_pit_state2,
}

impl ChipsetState {
    /// Reads the state of a VM no vCPU of which runs.
    pub fn save(vm: &Vm) -> Result<Self, ChipsetStateError> {
        let act = "get";
        let part = |part| move |source| ChipsetStateError { act, part, source };
        let chip = |chip_id, name| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.fd().get_irqchip(&mut chip).map_err(part(name))?;
            Ok(chip)
        };
        let clock = vm.fd().get_clock().map_err(part("clock"))?;
        Ok(Self {
            saved_at_ns: now_ns(),
            clock_ns: clock.clock,
            first_pic: chip(KVM_IRQCHIP_PIC_MASTER, "first PIC")?,
            second_pic: chip(KVM_IRQCHIP_PIC_SLAVE, "second PIC")?,
            io_apic: chip(KVM_IRQCHIP_IOAPIC, "I/O APIC")?,
            timer: vm.fd().get_pit2().map_err(part("timer"))?,
        })
    }

    /// How long ago it was read, by the hosts' clocks.
    pub fn age(&self) -> std::time::Duration {
        passed_since(self.saved_at_ns)
    }

    /// Writes it to a VM whose vCPUs have their state and do not run yet: an interrupt that is pending at a controller goes on to
    /// a local APIC, which must not be written after that.
    ///
    /// Time has passed since the state was saved, and the clock says so.
    pub fn restore(&self, vm: &Vm) -> Result<(), ChipsetStateError> {
        let act = "set";
        let part = |part| move |source| ChipsetStateError { act, part, source };
        let clock = kvm_clock_data {
            clock: self
                .clock_ns
                .saturating_add(passed_since(self.saved_at_ns).as_nanos() as u64),
            ..Default::default()
        };
        vm.fd().set_clock(&clock).map_err(part("clock"))?;
        for (chip, name) in [
            (&self.first_pic, "first PIC"),
            (&self.second_pic, "second PIC"),
            (&self.io_apic, "I/O APIC"),
        ] {
            vm.fd().set_irqchip(chip).map_err(part(name))?;
        }
        vm.fd().set_pit2(&self.timer).map_err(part("timer"))
    }
}
