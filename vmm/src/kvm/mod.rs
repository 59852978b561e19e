//! KVM: what the host offers, a VM, its vCPUs, and what CPUID tells the guest.

mod chipset_state;
mod cpu_features;
mod cpuid;
mod exits;
mod host;
mod kick;
mod msrs;
mod page_walk;
mod plain;
mod tracepoints;
mod vcpu;
mod vcpu_state;
mod vm;

pub use chipset_state::{ChipsetState, ChipsetStateError};
pub use cpu_features::CpuMismatch;
pub use cpuid::{AsyncPageFaults, CpuModel, CpuModelError};
pub use exits::{ExitCounts, ExitReason};
pub use host::{Host, HostError};
pub use kick::{Attachment, KickError, VcpuKick};
pub use msrs::{ASYNC_PF_ENABLE, ASYNC_PF_INTERRUPT, MsrError, ParavirtualMsrs, paravirtual_msrs};
pub(crate) use page_walk::pages_at_hand;
pub use plain::Blob;
pub use tracepoints::AsyncPageFaultCounter;
pub use vcpu::{Bus, Exit, Vcpu, VcpuError, VcpuSetupError};
pub use vcpu_state::{StateList, VcpuState, VcpuStateError};
pub use vm::{Vm, VmError};
