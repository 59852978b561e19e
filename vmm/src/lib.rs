//! The machine: KVM, boot, devices, and the command line.
//!
//! - [`address_map`]: what lies where in guest-physical memory;
//! - [`kvm`]: the host's KVM, a VM, its vCPUs, and what CPUID tells the guest;
//! - [`devices`]: the fixed set of devices on the ports, and the one event loop that serves them;
//! - [`boot`]: what RAM holds before the first instruction, and the read-only pages outside RAM that lead to it;
//! - [`memory`], [`ram_source`]: a umem region as guest memory, and who fills it;
//! - [`dirty`]: which pages of it change; [`removal`]: pages that are given back; [`invalidations`]: who is told of that;
//! - [`machine`]: all of it put together and run;
//! - [`thread_placement`]: on which CPUs vCPUs and pager run;
//! - [`control`]: a VM that runs, in the hands of other threads;
//! - [`api`], [`events`], [`metrics`]: those hands, and what people and programs outside are told;
//! - [`ending`]: why a VM stopped;
//! - [`snapshot`]: a VM in a file;
//! - [`migration`]: a VM that moves;
//! - [`report`], [`working_set`]: what a run leaves behind;
//! - [`slot_setup`], [`plot`]: what KVM alone takes, and pictures of what was measured;
//! - [`cli`]: the command line.

pub mod address_map;
pub mod api;
pub mod boot;
pub mod cli;
pub mod control;
pub mod devices;
pub mod dirty;
pub mod ending;
pub mod events;
mod http;
pub mod invalidations;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod migration;
pub mod plot;
pub mod ram_source;
pub mod removal;
pub mod report;
mod signals;
pub mod slot_setup;
pub mod snapshot;
pub mod thread_placement;
pub mod working_set;
