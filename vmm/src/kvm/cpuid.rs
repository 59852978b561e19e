//! What CPUID tells the guest: the host's CPU as far as KVM supports it, as one package of cores without threads.
//!
//! Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E; Linux `Documentation/virt/kvm/x86/cpuid.rst`; the timing leaf
//! 0x4000_0010 is VMware's, read by Linux' `arch/x86/kernel/cpu/vmware.c` and offered by QEMU as `vmware-cpuid-freq`.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Cap;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vmm_sys_util::errno;

use super::Host;

/// Leaf 1.
mod leaf_1 {
    pub(super) const ECX_X2APIC: u32 = 1 << 21;
    pub(super) const ECX_TSC_DEADLINE: u32 = 1 << 24;
    pub(super) const ECX_HYPERVISOR: u32 = 1 << 31;
    pub(super) const EDX_HTT: u32 = 1 << 28;
}

/// EAX of KVM's feature leaf: `KVM_FEATURE_ASYNC_PF`, `KVM_FEATURE_ASYNC_PF_VMEXIT` and `KVM_FEATURE_ASYNC_PF_INT`.
const ASYNC_PAGE_FAULTS: u32 = 1 << 4 | 1 << 10 | 1 << 14;
/// What a guest needs of them. Without the interrupt, nothing is ever delivered (since Linux 5.8).
const ASYNC_PAGE_FAULTS_BY_INTERRUPT: u32 = 1 << 4 | 1 << 14;

const LEAF_CACHES: u32 = 4;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_HYPERVISOR: u32 = 0x4000_0000;
const LEAF_KVM_FEATURES: u32 = 0x4000_0001;
const LEAF_TIMING: u32 = 0x4000_0010;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_CACHES: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

/// Level types of the topology leaves, in ECX bits 15:8.
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// KVM's local APIC timer runs at 1 GHz (`APIC_BUS_CYCLE_NS_DEFAULT` in `arch/x86/kvm/lapic.h`).
const APIC_BUS_KHZ: u32 = 1_000_000;

/// Why CPUID of a guest could not be made.
#[derive(Debug, Error)]
pub enum CpuModelError {
    /// `KVM_GET_SUPPORTED_CPUID` failed.
    #[error("KVM does not say which CPUID leaves it supports")]
    Supported(#[source] errno::Error),
    /// More leaves than KVM takes.
    #[error("the guest would have {0} CPUID leaves, KVM takes {KVM_MAX_CPUID_ENTRIES}")]
    TooManyLeaves(usize),
    /// They were asked for, and KVM has none.
    #[error(
        "this host's KVM has no asynchronous page faults with an interrupt; run Linux 5.8 or newer, or leave --cpus async_pf=on away"
    )]
    NoAsyncPageFaults,
}

/// Whether the guest is told of KVM's asynchronous page faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AsyncPageFaults {
    /// It is not.
    Off,
    /// It is, if KVM has them.
    IfThere,
    /// It is, and KVM must have them.
    Required,
}

/// The CPU that all vCPUs of a VM are. It is stored as a list of leaves: function, index, flags, EAX, EBX, ECX, EDX.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "Vec<[u32; 7]>", try_from = "Vec<[u32; 7]>")]
pub struct CpuModel {
    leaves: Leaves,
}

impl From<CpuModel> for Vec<[u32; 7]> {
    fn from(model: CpuModel) -> Self {
        let leaves = model.leaves.0.into_iter();
        leaves
            .map(|leaf| {
                let registers = [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx];
                let [eax, ebx, ecx, edx] = registers;
                [leaf.function, leaf.index, leaf.flags, eax, ebx, ecx, edx]
            })
            .collect()
    }
}

impl TryFrom<Vec<[u32; 7]>> for CpuModel {
    type Error = CpuModelError;

    fn try_from(leaves: Vec<[u32; 7]>) -> Result<Self, CpuModelError> {
        if leaves.len() > KVM_MAX_CPUID_ENTRIES {
            return Err(CpuModelError::TooManyLeaves(leaves.len()));
        }
        let leaves = leaves
            .into_iter()
            .map(|[function, index, flags, eax, ebx, ecx, edx]| kvm_cpuid_entry2 {
                function,
                index,
                flags,
                eax,
                ebx,
                ecx,
                edx,
                ..Default::default()
            });
        Ok(Self {
            leaves: Leaves(leaves.collect()),
        })
    }
}

impl CpuModel {
    /// The host's CPU, `count` times, at least once.
    pub fn new(host: &Host, count: u32, async_pf: AsyncPageFaults) -> Result<Self, CpuModelError> {
        let supported = host
            .kvm()
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(CpuModelError::Supported)?;
        let count = count.max(1);
        let tsc_deadline = host.kvm().check_extension(Cap::TscDeadlineTimer);
        let mut leaves = Leaves(supported.as_slice().to_vec());
        leaves.set_processor(count, tsc_deadline);
        leaves.set_topology(count);
        leaves.set_amd_topology(count);
        leaves.set_async_page_faults(async_pf)?;
        Ok(Self { leaves })
    }

    /// Whether the guest is told of KVM's asynchronous page faults.
    pub fn has_async_page_faults(&self) -> bool {
        let features = self.leaf(LEAF_KVM_FEATURES, 0).map_or(0, |leaf| leaf.eax);
        features & ASYNC_PAGE_FAULTS_BY_INTERRUPT == ASYNC_PAGE_FAULTS_BY_INTERRUPT
    }

    pub(super) fn leaf(&self, function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
        let mut leaves = self.leaves.0.iter();
        leaves.find(|leaf| leaf.function == function && leaf.index == index)
    }

    #[cfg(test)]
    pub(super) fn change(&mut self, function: u32, index: u32, change: impl FnOnce(&mut kvm_cpuid_entry2)) {
        let leaves = self.leaves.0.iter_mut();
        let mut found = leaves.filter(|leaf| leaf.function == function && leaf.index == index);
        change(found.next().unwrap());
    }

    /// CPUID of the vCPU with this index, which is its APIC ID, and this time stamp counter frequency, if known.
    pub fn for_vcpu(&self, index: u32, tsc_khz: Option<u32>) -> Result<CpuId, CpuModelError> {
        let mut leaves = self.leaves.clone();
        leaves.set_apic_id(index);
        if let Some(tsc_khz) = tsc_khz {
            leaves.set_timing(tsc_khz);
        }
        CpuId::from_entries(&leaves.0).map_err(|_| CpuModelError::TooManyLeaves(leaves.0.len()))
    }
}

/// A list of leaves under change.
#[derive(Clone, Debug, PartialEq)]
struct Leaves(Vec<kvm_cpuid_entry2>);

impl Leaves {
    /// All subleaves of `function`.
    fn of(&mut self, function: u32) -> impl Iterator<Item = &mut kvm_cpuid_entry2> {
        self.0.iter_mut().filter(move |leaf| leaf.function == function)
    }

    fn replace(&mut self, function: u32, with: impl IntoIterator<Item = kvm_cpuid_entry2>) {
        self.0.retain(|leaf| leaf.function != function);
        self.0.extend(with);
    }

    /// Makes the highest leaf of the range that starts at `base` at least `to`.
    fn raise_maximum(&mut self, base: u32, to: u32) {
        for leaf in self.of(base) {
            leaf.eax = leaf.eax.max(to);
        }
    }

    fn set_processor(&mut self, count: u32, tsc_deadline: bool) {
        for leaf in self.of(1) {
            leaf.ecx |= leaf_1::ECX_X2APIC | leaf_1::ECX_HYPERVISOR;
            if tsc_deadline {
                leaf.ecx |= leaf_1::ECX_TSC_DEADLINE;
            }
            // EBX: logical processors in 23:16, meaningful with HTT.
            leaf.ebx = leaf.ebx & 0xff00_ffff | count.min(255) << 16;
            if count > 1 {
                leaf.edx |= leaf_1::EDX_HTT;
            } else {
                leaf.edx &= !leaf_1::EDX_HTT;
            }
        }
    }

    fn set_topology(&mut self, count: u32) {
        // Leaf 4, of every cache: core IDs in the package less one in EAX 31:26, IDs that share it less one in 25:14. As on
        // most CPUs the third level is shared by the package, and the others by nobody.
        let ids = count.next_power_of_two();
        for leaf in self.of(LEAF_CACHES).filter(|leaf| leaf.eax & 0x1f != 0) {
            let sharing = cache_sharing(leaf.eax, ids);
            leaf.eax = leaf.eax & 0x3fff | sharing << 14 | (ids.min(64) - 1) << 26;
        }
        self.replace(LEAF_TOPOLOGY, topology(LEAF_TOPOLOGY, count));
        self.raise_maximum(0, LEAF_TOPOLOGY);
        if self.of(LEAF_TOPOLOGY_V2).next().is_some() {
            self.replace(LEAF_TOPOLOGY_V2, topology(LEAF_TOPOLOGY_V2, count));
        }
    }

    fn set_amd_topology(&mut self, count: u32) {
        // ECX: cores in the package less one in 7:0, bits of an APIC ID for them in 15:12.
        for leaf in self.of(LEAF_AMD_SIZES) {
            leaf.ecx = leaf.ecx & 0xffff_0f00 | core_id_bits(count) << 12 | (count.min(256) - 1);
        }
        let ids = count.next_power_of_two();
        for leaf in self.of(LEAF_AMD_CACHES).filter(|leaf| leaf.eax & 0x1f != 0) {
            let sharing = cache_sharing(leaf.eax, ids);
            leaf.eax = leaf.eax & 0x3fff | sharing << 14;
        }
        // EBX: threads per core less one in 15:8; ECX: nodes per processor less one in 10:8, node in 7:0.
        for leaf in self.of(LEAF_AMD_TOPOLOGY) {
            leaf.ebx &= !0xff00;
            leaf.ecx = 0;
        }
    }

    fn set_apic_id(&mut self, id: u32) {
        for leaf in self.of(1) {
            leaf.ebx = leaf.ebx & 0x00ff_ffff | id << 24;
        }
        for function in [LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2] {
            for leaf in self.of(function) {
                leaf.edx = id;
            }
        }
        for leaf in self.of(LEAF_AMD_TOPOLOGY) {
            leaf.eax = id;
            leaf.ebx = leaf.ebx & !0xff | id & 0xff;
        }
    }

    fn set_async_page_faults(&mut self, wanted: AsyncPageFaults) -> Result<(), CpuModelError> {
        let needed = ASYNC_PAGE_FAULTS_BY_INTERRUPT;
        let there = self.of(LEAF_KVM_FEATURES).any(|leaf| leaf.eax & needed == needed);
        match (wanted, there) {
            (AsyncPageFaults::Required, false) => return Err(CpuModelError::NoAsyncPageFaults),
            (AsyncPageFaults::Required | AsyncPageFaults::IfThere, true) => return Ok(()),
            (AsyncPageFaults::Off, _) | (AsyncPageFaults::IfThere, false) => {}
        }
        for leaf in self.of(LEAF_KVM_FEATURES) {
            leaf.eax &= !ASYNC_PAGE_FAULTS;
        }
        Ok(())
    }

    fn set_timing(&mut self, tsc_khz: u32) {
        let timing = kvm_cpuid_entry2 {
            function: LEAF_TIMING,
            eax: tsc_khz,
            ebx: APIC_BUS_KHZ,
            ..Default::default()
        };
        self.replace(LEAF_TIMING, [timing]);
        self.raise_maximum(LEAF_HYPERVISOR, LEAF_TIMING);
    }
}

/// How many APIC IDs share the cache that `eax` describes, less one; its level is in bits 7:5.
fn cache_sharing(eax: u32, ids: u32) -> u32 {
    if eax >> 5 & 7 >= 3 { ids.min(4096) - 1 } else { 0 }
}

/// Bits of an APIC ID that tell cores apart.
fn core_id_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

/// The subleaves of a topology leaf: one thread in a core, `count` cores, and the end. EDX gets the APIC ID later.
fn topology(function: u32, count: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index, shift, processors, kind| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: kind | index,
        ..Default::default()
    };
    [
        level(0, 0, 1, LEVEL_THREAD),
        level(1, core_id_bits(count), count, LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid
            .as_slice()
            .iter()
            .find(|leaf| leaf.function == function && leaf.index == index)
            .unwrap()
    }

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            ..Default::default()
        }
    }

    #[test]
    fn every_vcpu_has_its_apic_id_everywhere() {
        let model = CpuModel::new(&Host::open().unwrap(), 3, AsyncPageFaults::IfThere).unwrap();
        for index in 0..3 {
            let cpuid = model.for_vcpu(index, Some(2_000_000)).unwrap();
            assert_eq!(find(&cpuid, 1, 0).ebx >> 24, index);
            for subleaf in 0..3 {
                assert_eq!(find(&cpuid, LEAF_TOPOLOGY, subleaf).edx, index);
            }
        }
    }

    #[test]
    fn the_guest_can_count_its_cpus() {
        let host = Host::open().unwrap();
        for (count, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (255, 8)] {
            let cpuid = CpuModel::new(&host, count, AsyncPageFaults::IfThere)
                .unwrap()
                .for_vcpu(0, None)
                .unwrap();
            assert!(find(&cpuid, 0, 0).eax >= LEAF_TOPOLOGY);
            let core = find(&cpuid, LEAF_TOPOLOGY, 1);
            assert_eq!((core.eax, core.ebx, core.ecx), (bits, count, LEVEL_CORE | 1));
            let processor = find(&cpuid, 1, 0);
            assert_eq!(processor.ebx >> 16 & 0xff, count);
            assert_eq!(processor.edx & leaf_1::EDX_HTT != 0, count > 1);
        }
    }

    #[test]
    fn the_timing_leaf_is_within_the_range() {
        let model = CpuModel::new(&Host::open().unwrap(), 1, AsyncPageFaults::IfThere).unwrap();
        let cpuid = model.for_vcpu(0, Some(2_445_404)).unwrap();
        assert!(find(&cpuid, LEAF_HYPERVISOR, 0).eax >= LEAF_TIMING);
        let timing = find(&cpuid, LEAF_TIMING, 0);
        assert_eq!((timing.eax, timing.ebx), (2_445_404, 1_000_000));
    }

    #[test]
    fn async_page_faults_are_hidden_and_nothing_else() {
        let host = Host::open().unwrap();
        let features = |async_pf| {
            let model = CpuModel::new(&host, 1, async_pf).unwrap();
            find(&model.for_vcpu(0, None).unwrap(), LEAF_KVM_FEATURES, 0).eax
        };
        let (off, on) = (AsyncPageFaults::Off, AsyncPageFaults::Required);
        assert_eq!(features(off), features(on) & !ASYNC_PAGE_FAULTS);
        assert_ne!(features(off), features(on), "this host's KVM has them");
        assert_eq!(features(AsyncPageFaults::IfThere), features(on));
    }

    #[test]
    fn async_page_faults_without_their_interrupt_are_none() {
        const OTHERS: u32 = 1 | 1 << 3;
        let old = || {
            Leaves(vec![kvm_cpuid_entry2 {
                eax: OTHERS | 1 << 4 | 1 << 10,
                ..leaf(LEAF_KVM_FEATURES, 0)
            }])
        };
        for wanted in [AsyncPageFaults::Off, AsyncPageFaults::IfThere] {
            let mut leaves = old();
            leaves.set_async_page_faults(wanted).unwrap();
            assert_eq!(leaves.of(LEAF_KVM_FEATURES).next().unwrap().eax, OTHERS);
        }
        let error = old()
            .set_async_page_faults(AsyncPageFaults::Required)
            .unwrap_err();
        assert!(error.to_string().contains("--cpus async_pf=on"), "{error}");
    }

    #[test]
    fn the_guest_knows_that_it_is_one_and_has_x2apic() {
        let model = CpuModel::new(&Host::open().unwrap(), 1, AsyncPageFaults::IfThere).unwrap();
        let ecx = find(&model.for_vcpu(0, None).unwrap(), 1, 0).ecx;
        assert_eq!(ecx >> 31, 1);
        assert_eq!(ecx >> 21 & 1, 1);
    }

    #[test]
    fn caches_are_shared_by_the_package_from_level_three_on() {
        let cache = |level: u32| kvm_cpuid_entry2 {
            eax: 0xffff_c001 | level << 5,
            ..leaf(LEAF_CACHES, level)
        };
        let mut leaves = Leaves(vec![cache(1), cache(3), leaf(LEAF_CACHES, 4)]);
        leaves.set_topology(6);
        let eax: Vec<_> = leaves.of(LEAF_CACHES).map(|leaf| leaf.eax).collect();
        assert_eq!(eax[0], 1 | 1 << 5 | 7 << 26);
        assert_eq!(eax[1], 1 | 3 << 5 | 7 << 14 | 7 << 26);
        assert_eq!(eax[2], 0, "the end of the list stays the end");
    }

    #[test]
    fn amd_leaves_count_cores_without_threads() {
        let mut leaves = Leaves(vec![
            kvm_cpuid_entry2 {
                ecx: 0x0001_f0ff,
                ..leaf(LEAF_AMD_SIZES, 0)
            },
            kvm_cpuid_entry2 {
                ebx: 0x0000_0103,
                ecx: 0x0000_0301,
                ..leaf(LEAF_AMD_TOPOLOGY, 0)
            },
        ]);
        leaves.set_amd_topology(3);
        leaves.set_apic_id(2);
        assert_eq!(leaves.of(LEAF_AMD_SIZES).next().unwrap().ecx, 0x0001_2002);
        let topology = *leaves.of(LEAF_AMD_TOPOLOGY).next().unwrap();
        assert_eq!((topology.eax, topology.ebx, topology.ecx), (2, 2, 0));
    }
}
