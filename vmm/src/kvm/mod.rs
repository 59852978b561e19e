//! KVM: what the host offers, a VM, its vCPUs, and what CPUID tells the guest.

mod cpuid;
mod host;
mod kick;
mod vcpu;
mod vm;

pub use cpuid::{CpuModel, CpuModelError};
pub use host::{Host, HostError};
pub use kick::{Attachment, KickError, VcpuKick};
pub use vcpu::{Bus, Exit, Vcpu, VcpuError, VcpuSetupError};
pub use vm::{Vm, VmError};
