//! KVM: what the host offers, a VM, its vCPUs, and what CPUID tells the guest.

mod cpuid;
mod exits;
mod host;
mod kick;
mod msrs;
mod tracepoints;
mod vcpu;
mod vm;

pub use cpuid::{AsyncPageFaults, CpuModel, CpuModelError};
pub use exits::{ExitCounts, ExitReason};
pub use host::{Host, HostError};
pub use kick::{Attachment, KickError, VcpuKick};
pub use msrs::{ASYNC_PF_ENABLE, ASYNC_PF_INTERRUPT, MsrError, ParavirtualMsrs, paravirtual_msrs};
pub use tracepoints::AsyncPageFaultCounter;
pub use vcpu::{Bus, Exit, Vcpu, VcpuError, VcpuSetupError};
pub use vm::{Vm, VmError};
