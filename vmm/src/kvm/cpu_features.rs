//! Whether one CPU can stand in for another: the same vendor, and every feature that the guest may have found.
//!
//! Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E; Linux `Documentation/virt/kvm/x86/cpuid.rst`. The names are those of
//! Linux' `/proc/cpuinfo`.

use kvm_bindings::kvm_cpuid_entry2;
use thiserror::Error;

use super::CpuModel;

/// Why a guest that has run on one CPU cannot run on another.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum CpuMismatch {
    /// Another maker's.
    #[error("it was made on a CPU of {there}, and this host has one of {here}")]
    Vendor {
        /// The guest's.
        there: String,
        /// This host's.
        here: String,
    },
    /// The guest may use what is not there.
    #[error("this host lacks CPU features that its guest may use: {}", .0.join(", "))]
    Missing(Vec<String>),
}

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    fn of(self, leaf: &kvm_cpuid_entry2) -> u32 {
        match self {
            Self::Eax => leaf.eax,
            Self::Ebx => leaf.ebx,
            Self::Ecx => leaf.ecx,
            Self::Edx => leaf.edx,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Eax => "EAX",
            Self::Ebx => "EBX",
            Self::Ecx => "ECX",
            Self::Edx => "EDX",
        }
    }
}

/// A register of features: leaf, subleaf, and the names of its bits from bit 0 on, divided by spaces; `-` has none.
type Word = (u32, u32, Register, &'static str);

const WORDS: [Word; 16] = [
    (
        1,
        0,
        Register::Ecx,
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 sse4_2 x2apic \
         movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    ),
    (
        1,
        0,
        Register::Edx,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - ds acpi mmx fxsr sse sse2 ss ht tm \
         ia64 pbe",
    ),
    (
        7,
        0,
        Register::Ebx,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a avx512f \
         avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    ),
    (
        7,
        0,
        Register::Ecx,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme \
         avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    ),
    (
        7,
        0,
        Register::Edx,
        "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort - - serialize \
         hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d \
         arch_capabilities core_capabilities spec_ctrl_ssbd",
    ),
    (
        7,
        1,
        Register::Eax,
        "- - - rao_int avx_vnni avx512_bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - - - - - amx_fp16 - avx_ifma",
    ),
    (
        7,
        1,
        Register::Edx,
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchi - - - - avx10",
    ),
    (
        7,
        2,
        Register::Edx,
        "psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no",
    ),
    // Parts of the extended state: XCR0.
    (
        0xd,
        0,
        Register::Eax,
        "xcr0_x87 xcr0_sse xcr0_avx xcr0_bndregs xcr0_bndcsr xcr0_opmask xcr0_zmm_hi256 xcr0_hi16_zmm - xcr0_pkru",
    ),
    (0xd, 1, Register::Eax, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    (
        0x8000_0001,
        0,
        Register::Ecx,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp fma4 tce - \
         nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    (
        0x8000_0001,
        0,
        Register::Edx,
        "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - mp nx - mmxext mmx fxsr fxsr_opt pdpe1gb \
         rdtscp - lm 3dnowext 3dnow",
    ),
    (0x8000_0007, 0, Register::Edx, "- - - - - - - - constant_tsc"),
    (
        0x8000_0008,
        0,
        Register::Ebx,
        "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - - - - - - - - amd_ssbd virt_ssbd \
         amd_ssb_no",
    ),
    (
        0x8000_0021,
        0,
        Register::Eax,
        "no_nested_data_bp - lfence_rdtsc - - - null_sel_clr_base - autoibrs",
    ),
    (
        0x4000_0001,
        0,
        Register::Eax,
        "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_async_pf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt - \
         kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield kvm_async_pf_int \
         kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - - - - - kvm_clocksource_stable",
    ),
];

impl CpuModel {
    /// Who made it.
    pub fn vendor(&self) -> String {
        let leaf = self.leaf(0, 0);
        let words = leaf.map_or([0; 3], |leaf| [leaf.ebx, leaf.edx, leaf.ecx]);
        let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Whether a guest that has seen this CPU can run where there is `here`, which is made for as many vCPUs.
    pub fn check_on(&self, here: &Self) -> Result<(), CpuMismatch> {
        if self.vendor() != here.vendor() {
            return Err(CpuMismatch::Vendor {
                there: self.vendor(),
                here: here.vendor(),
            });
        }
        let missing: Vec<String> = WORDS.iter().flat_map(|word| self.missing(here, word)).collect();
        if missing.is_empty() {
            Ok(())
        } else {
            Err(CpuMismatch::Missing(missing))
        }
    }

    /// The names of what is set here and not there.
    fn missing(&self, there: &Self, word: &Word) -> Vec<String> {
        let (function, index, register, names) = *word;
        let value = |model: &Self| model.leaf(function, index).map_or(0, |leaf| register.of(leaf));
        let missing = value(self) & !value(there);
        let names: Vec<&str> = names.split_whitespace().collect();
        (0..u32::BITS)
            .filter(|bit| missing >> bit & 1 != 0)
            .map(|bit| match names.get(bit as usize) {
                Some(name) if *name != "-" => (*name).to_owned(),
                _ => format!("CPUID {function:#x}.{index} {} bit {bit}", register.name()),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::{AsyncPageFaults, Host};

    fn model() -> CpuModel {
        CpuModel::new(&Host::open().unwrap(), 1, AsyncPageFaults::IfThere).unwrap()
    }

    #[test]
    fn no_register_has_more_than_32_names() {
        for (function, _, register, names) in WORDS {
            let count = names.split_whitespace().count();
            assert!(count <= 32, "{function:#x} {}: {count}", register.name());
        }
    }

    #[test]
    fn a_cpu_stands_in_for_itself_and_for_one_with_less() {
        let (guest, mut host) = (model(), model());
        assert_eq!(guest.check_on(&host), Ok(()));
        host.change(7, 0, |leaf| leaf.ebx |= 1 << 31);
        host.change(1, 0, |leaf| leaf.ecx |= 1 << 5);
        assert_eq!(guest.check_on(&host), Ok(()));
    }

    #[test]
    fn what_is_missing_is_named() {
        let (mut guest, mut host) = (model(), model());
        host.change(1, 0, |leaf| leaf.edx &= !(1 << 26));
        host.change(1, 0, |leaf| leaf.ecx &= !(1 << 16));
        guest.change(1, 0, |leaf| leaf.ecx |= 1 << 16);
        assert_eq!(
            guest.check_on(&host),
            Err(CpuMismatch::Missing(vec![
                "CPUID 0x1.0 ECX bit 16".into(),
                "sse2".into()
            ]))
        );
    }

    /// Of each word that is compared, a bit that the guest has found and this host has not is a reason to refuse.
    #[test]
    fn every_word_counts() {
        for (function, index, register, names) in WORDS {
            let names: Vec<&str> = names.split_whitespace().collect();
            let bit = names.iter().position(|name| *name != "-").unwrap();
            let with = |leaf: Option<u32>| {
                let mut leaves: Vec<[u32; 7]> = model().into();
                leaves.retain(|leaf| leaf[..2] != [function, index]);
                if let Some(value) = leaf {
                    let mut leaf = [function, index, 0, 0, 0, 0, 0];
                    leaf[3 + register as usize] = value;
                    leaves.push(leaf);
                }
                CpuModel::try_from(leaves).unwrap()
            };
            let guest = with(Some(1 << bit));
            for host in [with(None), with(Some(!(1 << bit)))] {
                let missing = CpuMismatch::Missing(vec![names[bit].into()]);
                assert_eq!(guest.check_on(&host), Err(missing), "{function:#x}.{index}");
            }
            assert_eq!(guest.check_on(&with(Some(u32::MAX))), Ok(()));
        }
    }

    #[test]
    fn another_vendor_is_named() {
        let (mut guest, host) = (model(), model());
        guest.change(0, 0, |leaf| leaf.ebx = u32::from_le_bytes(*b"Cent"));
        let error = guest.check_on(&host).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("Cent") && text.contains(&host.vendor()), "{text}");
    }

    #[test]
    fn survives_being_stored() {
        let model = model();
        let text = serde_json::to_string(&model).unwrap();
        let read: CpuModel = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_string(&read).unwrap(), text);
        assert_eq!(read.check_on(&model), Ok(()));
        let many = format!("[{}]", ["[0,0,0,0,0,0,0]"; 1000].join(","));
        assert!(serde_json::from_str::<CpuModel>(&many).is_err());
    }
}
