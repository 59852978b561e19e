//! Loading a kernel, whatever its format.

use std::{
    io::{self, Read, Seek, SeekFrom},
    ops::Range,
};

use thiserror::Error;
use vm_memory::ReadVolatile;

use super::{
    bzimage::{self, BzImageError, SetupHeader},
    elf::{self, ElfError},
    layout::ScratchMemory,
    pvh,
};

/// Why a file is not a kernel that can be booted.
#[derive(Debug, Error)]
pub enum KernelError {
    /// It cannot be read.
    #[error("the file cannot be read")]
    Read(#[source] io::Error),
    /// It is a kernel for another processor.
    #[error("it is for {0}, not for x86-64")]
    WrongMachine(&'static str),
    /// It is a bzImage.
    #[error(transparent)]
    BzImage(#[from] BzImageError),
    /// It is an ELF file, or nothing known.
    #[error(transparent)]
    Elf(#[from] ElfError),
}

/// A kernel in memory.
#[derive(Debug)]
pub(super) struct LoadedKernel {
    /// Where and how it is entered.
    pub(super) start: Start,
    /// What it occupies, zeroed parts included: guest-physical addresses.
    pub(super) segments: Vec<Range<u64>>,
    /// Whether it is known to be Linux.
    pub(super) linux: bool,
}

/// The boot protocol.
#[derive(Debug)]
pub(super) enum Start {
    /// PVH, at this address.
    Pvh(u64),
    /// Linux' 64-bit protocol, with the kernel at `address`.
    Linux { address: u64, header: Box<SetupHeader> },
}

impl Start {
    /// The pages of RAM with the structures that it is handed.
    pub(super) fn structures(&self) -> Range<u64> {
        match self {
            Self::Pvh(_) => pvh::PAGES,
            Self::Linux { .. } => bzimage::PAGES,
        }
    }

    /// One past the last address at which the initramfs may have a byte.
    pub(super) fn initramfs_end(&self) -> u64 {
        match self {
            Self::Pvh(_) => u64::MAX,
            Self::Linux { header, .. } => header.initramfs_end(),
        }
    }
}

/// Checks and loads the kernel in `file`. `memory` starts at 0, is zero where the kernel goes, and ends at `ram_end`.
pub(super) fn load<F: Read + Seek + ReadVolatile>(
    file: &mut F,
    memory: &ScratchMemory,
    ram_end: u64,
) -> Result<LoadedKernel, KernelError> {
    let mut start = [0; bzimage::HEADER_END];
    let present = read_from(file, 0, &mut start).map_err(KernelError::Read)?;
    if let Some(header) = SetupHeader::find(&start[..present])? {
        return Ok(bzimage::load(file, header, memory, ram_end)?);
    }
    if let Some(machine) = image_machine(&start[..present]) {
        return Err(KernelError::WrongMachine(machine));
    }
    Ok(elf::load(file, memory, ram_end)?)
}

/// The processor of a flat Linux `Image`, as arm64 and RISC-V have it (`Documentation/arch/{arm64/booting,riscv/boot-image-header}.rst`).
fn image_machine(start: &[u8]) -> Option<&'static str> {
    match start.get(0x38..0x3c)? {
        b"ARM\x64" => Some("aarch64"),
        b"RSC\x05" => Some("RISC-V"),
        _ => None,
    }
}

/// Reads from `offset` as much of `buffer` as the file has.
pub(super) fn read_from<F: Read + Seek>(file: &mut F, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    file.seek(SeekFrom::Start(offset))?;
    let mut present = 0;
    while present < buffer.len() {
        match file.read(&mut buffer[present..]) {
            Ok(0) => break,
            Ok(length) => present += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(present)
}
