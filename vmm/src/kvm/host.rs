//! The host's KVM.

use std::ffi::CStr;

use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};
use thiserror::Error;
use vmm_sys_util::errno;

/// The capabilities without which no VM is made here: name, what for, and the first Linux that has it on x86.
const REQUIRED: [(Cap, &str, &str, &str); 9] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY", "for guest RAM", "2.6.25"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR", "for real mode", "2.6.25"),
    (
        Cap::SetIdentityMapAddr,
        "KVM_CAP_SET_IDENTITY_MAP_ADDR",
        "for real mode",
        "2.6.32",
    ),
    (
        Cap::Irqchip,
        "KVM_CAP_IRQCHIP",
        "for interrupt controllers",
        "2.6.20",
    ),
    (Cap::Irqfd, "KVM_CAP_IRQFD", "for device interrupts", "2.6.32"),
    (Cap::Pit2, "KVM_CAP_PIT2", "for the interval timer", "2.6.31"),
    (
        Cap::ExtCpuid,
        "KVM_CAP_EXT_CPUID",
        "to tell the guest its CPU",
        "2.6.26",
    ),
    (
        Cap::ReadonlyMem,
        "KVM_CAP_READONLY_MEM",
        "for the firmware ROM",
        "3.7",
    ),
    (
        Cap::ImmediateExit,
        "KVM_CAP_IMMEDIATE_EXIT",
        "to stop a vCPU",
        "4.11",
    ),
];

/// What this host lacks for running VMs.
#[derive(Debug, Error)]
pub enum HostError {
    /// No KVM in the running kernel.
    #[error(
        "/dev/kvm is not there; load the module (`modprobe kvm_intel` or `modprobe kvm_amd`), and if that fails, \
         switch virtualisation on in the firmware setup, or nested virtualisation on the host of this machine"
    )]
    NotThere,
    /// The device belongs to somebody else.
    #[error("no permission to open /dev/kvm; join the group that owns it (usually `kvm`), or run as root")]
    NoPermission,
    /// Anything else that hinders opening it.
    #[error("cannot open /dev/kvm")]
    Open(#[source] errno::Error),
    /// Not the interface that is stable since Linux 2.6.22.
    #[error("/dev/kvm speaks API version {0}, not {KVM_API_VERSION}; it is not the KVM of a released Linux")]
    ApiVersion(i32),
    /// A part of KVM is missing.
    #[error("KVM lacks {name}, which is needed {purpose}; run Linux {since} or newer")]
    MissingCapability {
        /// The capability.
        name: &'static str,
        /// What it is needed for.
        purpose: &'static str,
        /// The first Linux that has it.
        since: &'static str,
    },
}

/// The host's KVM, checked to have everything that a VM is built from.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
}

impl Host {
    /// Opens `/dev/kvm` and checks it.
    pub fn open() -> Result<Self, HostError> {
        Self::open_at(c"/dev/kvm")
    }

    fn open_at(path: &CStr) -> Result<Self, HostError> {
        let kvm = Kvm::new_with_path(path).map_err(|error| match error.errno() {
            // The node without its module: ENODEV or ENXIO.
            libc::ENOENT | libc::ENODEV | libc::ENXIO => HostError::NotThere,
            libc::EACCES | libc::EPERM => HostError::NoPermission,
            _ => HostError::Open(error),
        })?;
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION.cast_signed() {
            return Err(HostError::ApiVersion(version));
        }
        for (capability, name, purpose, since) in REQUIRED {
            if !kvm.check_extension(capability) {
                return Err(HostError::MissingCapability { name, purpose, since });
            }
        }
        Ok(Self { kvm })
    }

    /// How many bits a guest-physical address has here (CPUID leaf 0x80000008), at most 52.
    pub fn physical_address_bits(&self) -> u32 {
        let bits = self
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .ok()
            .and_then(|cpuid| {
                let leaf = cpuid
                    .as_slice()
                    .iter()
                    .find(|leaf| leaf.function == 0x8000_0008)?;
                Some(leaf.eax & 0xff)
            });
        // 36 is what a processor without the leaf has (Intel SDM volume 3, 4.1.4).
        bits.filter(|bits| *bits > 0).unwrap_or(36)
    }

    /// The device itself, for what [`Host`] has no word for.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_everything() {
        Host::open().unwrap();
    }

    #[test]
    fn a_missing_device_is_said_to_be_missing() {
        assert!(matches!(
            Host::open_at(c"/dev/no-such-device"),
            Err(HostError::NotThere)
        ));
    }

    #[test]
    fn another_device_is_not_kvm() {
        assert!(matches!(
            Host::open_at(c"/dev/null"),
            Err(HostError::ApiVersion(-1))
        ));
    }

    #[test]
    fn a_directory_cannot_be_opened() {
        assert!(matches!(Host::open_at(c"/dev"), Err(HostError::Open(_))));
    }
}
