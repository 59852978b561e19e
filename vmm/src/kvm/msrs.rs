//! The MSRs with which KVM and a guest that knows it talk, as a part of a vCPU's state.
//!
//! Linux `Documentation/virt/kvm/x86/msr.rst`: clock, steal time, end of interrupt, asynchronous page faults, polling.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vmm_sys_util::errno;

use super::Host;

const RANGE: std::ops::RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4dff;

/// Those that say where in guest memory KVM writes.
const AREAS: std::ops::RangeInclusive<u32> = 0x4b56_4d01..=0x4b56_4d04;

/// Asynchronous page faults: on or off and where the guest looks.
pub const ASYNC_PF_ENABLE: u32 = 0x4b56_4d02;
/// With which interrupt a page is ready.
pub const ASYNC_PF_INTERRUPT: u32 = 0x4b56_4d06;
/// No state, but acts: to have the time written into guest memory, and to say that an interrupt was taken.
const ACTS: [u32; 2] = [0x4b56_4d00, 0x4b56_4d07];

/// Why these MSRs could not be saved or restored.
#[derive(Debug, Error)]
pub enum MsrError {
    /// KVM does not list its MSRs.
    #[error("KVM does not say which MSRs it saves")]
    List(#[source] errno::Error),
    /// It does not read or write one of those that it has listed.
    #[error("KVM cannot {act} MSR {msr:#x}")]
    Refused {
        /// To read or to write.
        act: &'static str,
        /// The MSR.
        msr: u32,
    },
    /// It does not read or write any.
    #[error("KVM cannot {act} MSRs")]
    Failed {
        /// To read or to write.
        act: &'static str,
        /// What KVM answered.
        source: errno::Error,
    },
    /// More than one call takes.
    #[error("{0} MSRs are more than KVM takes at a time")]
    TooMany(usize),
}

/// Which of these MSRs are state that the host's KVM saves.
pub fn paravirtual_msrs(host: &Host) -> Result<Vec<u32>, MsrError> {
    let list = host.kvm().get_msr_index_list().map_err(MsrError::List)?;
    let listed = list.as_slice().iter().copied();
    Ok(listed
        .filter(|msr| RANGE.contains(msr) && !ACTS.contains(msr))
        .collect())
}

/// What they hold, in the order in which they are to be restored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParavirtualMsrs {
    values: Vec<(u32, u64)>,
}

impl ParavirtualMsrs {
    /// Reads `msrs` of a vCPU that does not run.
    pub fn save(vcpu: &VcpuFd, msrs: &[u32]) -> Result<Self, MsrError> {
        let act = "read";
        let entries: Vec<_> = msrs
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut read = Msrs::from_entries(&entries).map_err(|_| MsrError::TooMany(msrs.len()))?;
        let done = vcpu
            .get_msrs(&mut read)
            .map_err(|source| MsrError::Failed { act, source })?;
        if let Some(&msr) = msrs.get(done) {
            return Err(MsrError::Refused { act, msr });
        }
        let values = read.as_slice().iter().map(|entry| (entry.index, entry.data));
        Ok(Self::in_order(values.collect()))
    }

    /// The vector before what switches the events on, and that last of all.
    fn in_order(mut values: Vec<(u32, u64)>) -> Self {
        values.sort_by_key(|(msr, _)| match *msr {
            ASYNC_PF_ENABLE => 2,
            ASYNC_PF_INTERRUPT => 1,
            _ => 0,
        });
        Self { values }
    }

    /// What one of them holds.
    pub fn get(&self, msr: u32) -> Option<u64> {
        let mut values = self.values.iter();
        values.find(|(index, _)| *index == msr).map(|(_, value)| *value)
    }

    /// Guest-physical addresses that KVM writes to for a guest that has asked for it, each with bit 0: clock, asynchronous page
    /// faults, steal time, end of interrupt.
    pub(super) fn areas(&self) -> impl Iterator<Item = u64> {
        let areas = self.values.iter().filter(|(msr, _)| AREAS.contains(msr));
        areas
            .filter(|(_, value)| value & 1 == 1)
            .map(|(_, value)| value & !63)
    }

    /// Writes them to a vCPU that does not run yet. Memory slots, CPUID, local APIC and system registers come before, and the pager
    /// serves: KVM touches guest memory. If asynchronous page faults are on, the guest gets 'wake all', by which every task that
    /// waits for a page looks for it again: page faults that were on their way need no transfer.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<(), MsrError> {
        let act = "write";
        let entries: Vec<_> = self
            .values
            .iter()
            .map(|&(index, data)| kvm_msr_entry {
                index,
                data,
                ..Default::default()
            })
            .collect();
        let entries = Msrs::from_entries(&entries).map_err(|_| MsrError::TooMany(self.values.len()))?;
        let done = vcpu
            .set_msrs(&entries)
            .map_err(|source| MsrError::Failed { act, source })?;
        match self.values.get(done) {
            Some(&(msr, _)) => Err(MsrError::Refused { act, msr }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_switched_on_last() {
        let msrs = ParavirtualMsrs::in_order(vec![
            (ASYNC_PF_ENABLE, 9),
            (0x4b56_4d01, 3),
            (ASYNC_PF_INTERRUPT, 32),
            (0x4b56_4d00, 4),
        ]);
        let order: Vec<u32> = msrs.values.iter().map(|(msr, _)| *msr).collect();
        assert_eq!(
            order,
            [0x4b56_4d01, 0x4b56_4d00, ASYNC_PF_INTERRUPT, ASYNC_PF_ENABLE]
        );
    }

    #[test]
    fn the_acknowledgement_is_no_state() {
        let msrs = paravirtual_msrs(&Host::open().unwrap()).unwrap();
        assert!(msrs.contains(&ASYNC_PF_ENABLE) && msrs.contains(&ASYNC_PF_INTERRUPT));
        assert!(!ACTS.iter().any(|msr| msrs.contains(msr)));
    }
}
