//! What a VM is started with.
//!
//! A [`Layout`] is RAM as it is before the first instruction: the kernel, the structures that describe the machine to it,
//! the initramfs. It is a source of pages like an image is; making an image means writing it to a file.
//!
//! Outside RAM, the [`ReadOnlyPages`] of the firmware ROM and of the boot-information page lead from the reset vector to the
//! kernel's entry, and ACPI tables describe the machine.

mod acpi;
mod bios;
pub mod builtin;
mod bzimage;
mod command_line;
mod elf;
mod entry;
mod firmware;
mod kernel;
mod layout;
mod memory_map;
mod metadata;
mod page_set;
mod pvh;
mod source;
#[cfg(test)]
mod testing;

pub use self::firmware::{ReadOnlyPages, RomError};
pub use bzimage::BzImageError;
pub use command_line::CommandLineError;
pub use elf::ElfError;
pub use entry::{Entry, EntryProtocol};
pub use kernel::KernelError;
pub use layout::{Kernel, Layout, LayoutConfig, LayoutError};
pub use metadata::{ImageMetadata, MetadataError};
pub use pvh::PvhError;
pub use source::LayoutSource;
