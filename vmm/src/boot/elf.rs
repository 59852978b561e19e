//! Loading an ELF kernel that has a PVH entry.
//!
//! The loader of `linux-loader` looks at little more than the magic number, so everything that would make a kernel fail
//! later and silently is checked here before: System V ABI, chapters 4 and 5; Xen's `docs/misc/pvh.pandoc`.

use std::{
    io::{self, Read, Seek, SeekFrom},
    ops::Range,
};

use linux_loader::{
    elf::{
        EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, ELFDATA2MSB, Elf64_Ehdr, Elf64_Phdr, PT_LOAD, PT_NOTE,
    },
    loader::{self, KernelLoader, elf::Elf},
};
use thiserror::Error;
use vm_memory::{Address, ByteValued, GuestAddress, ReadVolatile};

use super::{
    kernel::{LoadedKernel, Start, read_from},
    layout::ScratchMemory,
};
use crate::address_map::BOOT_STRUCTURES;

/// Why a file is not a kernel that can be booted.
#[derive(Debug, Error)]
pub enum ElfError {
    /// It cannot be read.
    #[error("the file cannot be read")]
    Read(#[source] io::Error),
    /// It is something else.
    #[error("it is neither a bzImage (vmlinuz) nor an ELF file (vmlinux with a PVH note)")]
    NotElf,
    /// It is for another processor.
    #[error("it is for {0}, not for x86-64")]
    WrongMachine(String),
    /// It uses the 32-bit format.
    #[error("it is a 32-bit ELF file; pass a 64-bit one")]
    Not64Bit,
    /// Its bytes are in the other order.
    #[error("it is a big-endian ELF file; x86-64 is little-endian")]
    BigEndian,
    /// It is not linked to fixed addresses.
    #[error("it is {0}, not an executable linked to fixed addresses (ET_EXEC)")]
    NotExecutable(String),
    /// It has no program headers, or ones of another size.
    #[error("its ELF header is damaged: {0}")]
    BadHeader(&'static str),
    /// The file ends too early.
    #[error("it is truncated: {what} ends at byte {end}, the file at {size}")]
    Truncated {
        /// What is cut off.
        what: &'static str,
        /// Where it should end.
        end: u64,
        /// Where the file ends.
        size: u64,
    },
    /// A segment does not fit.
    #[error(
        "its segment at guest-physical {start:#x} with {size:#x} bytes is beyond the RAM below {ram_end:#x}; give the VM \
         more memory"
    )]
    BeyondRam {
        /// Where it starts.
        start: u64,
        /// Its size in memory.
        size: u64,
        /// Where RAM ends.
        ram_end: u64,
    },
    /// A segment lies where the boot structures go.
    #[error(
        "its segment at guest-physical {start:#x} with {size:#x} bytes overlaps the boot structures \
         ({:#x} to {:#x}); link it elsewhere, usually at 1 MiB or above", BOOT_STRUCTURES.start, BOOT_STRUCTURES.end
    )]
    OverlapsBootStructures {
        /// Where it starts.
        start: u64,
        /// Its size in memory.
        size: u64,
    },
    /// Nothing to load.
    #[error("it has no segments to load")]
    NoSegments,
    /// It cannot be entered.
    #[error(
        "it has no PVH entry (ELF note XEN_ELFNOTE_PHYS32_ENTRY); build Linux with CONFIG_PVH=y and take `vmlinux`"
    )]
    NoPvhEntry,
    /// It would be entered where nothing is.
    #[error("its PVH entry {0:#x} is in none of its segments")]
    EntryOutside(u64),
    /// The loader found something else.
    #[error("it cannot be loaded")]
    Load(#[source] loader::Error),
}

/// More than any kernel's notes take.
const NOTES_MAX: u64 = 64 << 10;
/// XEN_ELFNOTE_PHYS32_ENTRY.
const XEN_PHYS32_ENTRY: u32 = 18;

/// Checks and loads the kernel in `file`. `memory` starts at 0 and is zero where the kernel goes.
pub(super) fn load<F: Read + Seek + ReadVolatile>(
    file: &mut F,
    memory: &ScratchMemory,
    ram_end: u64,
) -> Result<LoadedKernel, ElfError> {
    let size = file.seek(SeekFrom::End(0)).map_err(ElfError::Read)?;
    let header = check_header(file, size)?;
    let headers = program_headers(file, &header, size)?;
    let segments = check_segments(&headers, size, ram_end)?;
    let notes = Notes::read(file, &headers)?;
    let pvh_entry = notes.pvh_entry.ok_or(ElfError::NoPvhEntry)?;
    Elf::load(memory, None, file, None).map_err(ElfError::Load)?;
    if !segments.iter().any(|segment| segment.contains(&pvh_entry)) {
        return Err(ElfError::EntryOutside(pvh_entry));
    }
    Ok(LoadedKernel {
        start: Start::Pvh(pvh_entry),
        segments,
        linux: notes.linux,
    })
}

/// What the notes say. A kernel may have several segments of them, as linkers make them for notes that are aligned
/// differently, so all are looked at (linux-loader believes the last one).
#[derive(Debug, Default, PartialEq, Eq)]
struct Notes {
    /// The first entry that a PVH note names.
    pvh_entry: Option<u64>,
    /// Whether one is Linux' own: `BUILD_SALT` in its `init/version.c` is in every kernel since 4.19.
    linux: bool,
}

impl Notes {
    fn read<F: Read + Seek>(file: &mut F, headers: &[Elf64_Phdr]) -> Result<Self, ElfError> {
        let mut all = Self::default();
        for header in headers.iter().filter(|header| header.p_type == PT_NOTE) {
            // A kernel's notes are a few hundred bytes.
            let mut notes = vec![0; header.p_filesz.min(NOTES_MAX) as usize];
            let present = read_from(file, header.p_offset, &mut notes).map_err(ElfError::Read)?;
            // Notes of 8 bytes' alignment are laid out by it, all others by 4.
            all.add(&notes[..present], if header.p_align == 8 { 8 } else { 4 });
        }
        Ok(all)
    }

    /// Reads notes as far as they make sense.
    fn add(&mut self, notes: &[u8], alignment: usize) {
        let mut rest = Some(notes);
        while let Some((note, next)) = rest.and_then(|notes| Note::first(notes, alignment)) {
            self.linux |= note.name == b"Linux\0";
            self.pvh_entry = self.pvh_entry.or_else(|| note.pvh_entry());
            rest = next;
        }
    }
}

/// One note.
struct Note<'notes> {
    name: &'notes [u8],
    kind: u32,
    value: &'notes [u8],
}

impl<'notes> Note<'notes> {
    /// The first of `notes`, and what follows it.
    fn first(notes: &'notes [u8], alignment: usize) -> Option<(Self, Option<&'notes [u8]>)> {
        let (header, rest) = notes.split_first_chunk::<12>()?;
        let field = |index: usize| u32::from_le_bytes(std::array::from_fn(|byte| header[index * 4 + byte]));
        let (name_size, value_size, kind) = (field(0) as usize, field(1) as usize, field(2));
        let value_at = (12 + name_size).next_multiple_of(alignment) - 12;
        let note = Self {
            name: rest.get(..name_size)?,
            kind,
            value: rest.get(value_at..value_at + value_size)?,
        };
        let next = (12 + value_at + value_size).next_multiple_of(alignment) - 12;
        Some((note, rest.get(next..)))
    }

    /// The value of the note XEN_ELFNOTE_PHYS32_ENTRY: type 18, name "Xen", 4 or 8 bytes.
    fn pvh_entry(&self) -> Option<u64> {
        if self.kind != XEN_PHYS32_ENTRY || self.name != b"Xen\0" {
            return None;
        }
        match *self.value {
            [a, b, c, d, ref more @ ..] if more.is_empty() || more == [0; 4] => {
                Some(u32::from_le_bytes([a, b, c, d]).into())
            }
            _ => None,
        }
    }
}

fn check_header<F: Read + Seek>(file: &mut F, size: u64) -> Result<Elf64_Ehdr, ElfError> {
    let mut header = Elf64_Ehdr::default();
    let present = read_from(file, 0, header.as_mut_slice()).map_err(ElfError::Read)?;
    if present < 4 || header.e_ident[..4] != *b"\x7fELF" {
        return Err(ElfError::NotElf);
    }
    if present < size_of::<Elf64_Ehdr>() {
        return Err(ElfError::Truncated {
            what: "the ELF header",
            end: size_of::<Elf64_Ehdr>() as u64,
            size,
        });
    }
    let big_endian = header.e_ident[EI_DATA] == ELFDATA2MSB;
    let machine = if big_endian {
        header.e_machine.swap_bytes()
    } else {
        header.e_machine
    };
    if machine != EM_X86_64 {
        return Err(ElfError::WrongMachine(machine_name(machine)));
    }
    if header.e_ident[EI_CLASS] != ELFCLASS64 {
        return Err(ElfError::Not64Bit);
    }
    if header.e_ident[EI_DATA] != ELFDATA2LSB {
        return Err(ElfError::BigEndian);
    }
    if header.e_type != ET_EXEC {
        return Err(ElfError::NotExecutable(type_name(header.e_type)));
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
        return Err(ElfError::BadHeader("program headers of an unknown size"));
    }
    Ok(header)
}

fn program_headers<F: Read + Seek>(
    file: &mut F,
    header: &Elf64_Ehdr,
    size: u64,
) -> Result<Vec<Elf64_Phdr>, ElfError> {
    let length = u64::from(header.e_phnum) * size_of::<Elf64_Phdr>() as u64;
    let end = header.e_phoff.saturating_add(length);
    if end > size {
        return Err(ElfError::Truncated {
            what: "the list of segments",
            end,
            size,
        });
    }
    file.seek(SeekFrom::Start(header.e_phoff))
        .map_err(ElfError::Read)?;
    (0..header.e_phnum)
        .map(|_| {
            let mut segment = Elf64_Phdr::default();
            file.read_exact(segment.as_mut_slice()).map_err(ElfError::Read)?;
            Ok(segment)
        })
        .collect()
}

fn check_segments(headers: &[Elf64_Phdr], size: u64, ram_end: u64) -> Result<Vec<Range<u64>>, ElfError> {
    let mut segments = Vec::new();
    for header in headers {
        let end = header.p_offset.saturating_add(header.p_filesz);
        if end > size {
            return Err(ElfError::Truncated {
                what: "a segment",
                end,
                size,
            });
        }
        if header.p_type != PT_LOAD {
            continue;
        }
        if header.p_filesz > header.p_memsz {
            return Err(ElfError::BadHeader(
                "a segment that is larger in the file than in memory",
            ));
        }
        if header.p_memsz == 0 {
            continue;
        }
        let (start, size) = (header.p_paddr, header.p_memsz);
        let end = GuestAddress(start)
            .checked_add(size)
            .filter(|end| end.0 <= ram_end)
            .ok_or(ElfError::BeyondRam { start, size, ram_end })?
            .0;
        if start < BOOT_STRUCTURES.end && end > BOOT_STRUCTURES.start {
            return Err(ElfError::OverlapsBootStructures { start, size });
        }
        segments.push(start..end);
    }
    if segments.is_empty() {
        return Err(ElfError::NoSegments);
    }
    Ok(segments)
}

const EM_X86_64: u16 = 62;
const ET_EXEC: u16 = 2;

fn machine_name(machine: u16) -> String {
    match machine {
        3 => "32-bit x86".to_owned(),
        8 => "MIPS".to_owned(),
        20 => "PowerPC".to_owned(),
        21 => "PowerPC64".to_owned(),
        22 => "s390x".to_owned(),
        40 => "32-bit ARM".to_owned(),
        183 => "aarch64".to_owned(),
        243 => "RISC-V".to_owned(),
        258 => "LoongArch".to_owned(),
        other => format!("processor number {other}"),
    }
}

fn type_name(type_: u16) -> String {
    match type_ {
        1 => "a relocatable object (ET_REL)".to_owned(),
        3 => "a shared object or a position-independent executable (ET_DYN)".to_owned(),
        4 => "a core dump (ET_CORE)".to_owned(),
        other => format!("of type {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{layout::scratch_memory, testing::KernelFile};
    use super::*;
    use std::io::Cursor;
    use vm_memory::Bytes;

    const RAM_END: u64 = 16 << 20;

    fn load_bytes(bytes: &[u8]) -> Result<LoadedKernel, ElfError> {
        load(
            &mut Cursor::new(bytes),
            &scratch_memory(RAM_END).unwrap(),
            RAM_END,
        )
    }

    fn error(change: impl FnOnce(&mut KernelFile)) -> ElfError {
        let mut kernel = KernelFile::default();
        change(&mut kernel);
        load_bytes(&kernel.to_bytes()).unwrap_err()
    }

    #[test]
    fn a_good_kernel_is_loaded() {
        let memory = scratch_memory(RAM_END).unwrap();
        let bytes = KernelFile::default().to_bytes();
        let kernel = load(&mut Cursor::new(&bytes), &memory, RAM_END).unwrap();
        assert!(matches!(kernel.start, Start::Pvh(KernelFile::ADDRESS)));
        assert!(!kernel.linux);
        assert_eq!(kernel.segments.len(), 1);
        assert_eq!(
            kernel.segments[0],
            KernelFile::ADDRESS..KernelFile::ADDRESS + 0x3000
        );
        let mut code = [0; 4];
        memory
            .read_slice(&mut code, GuestAddress(KernelFile::ADDRESS))
            .unwrap();
        assert_eq!(code, KernelFile::CODE);
    }

    #[test]
    fn what_is_not_elf_is_told_apart() {
        assert!(matches!(load_bytes(b""), Err(ElfError::NotElf)));
        assert!(matches!(load_bytes(b"#!/bin/sh\n"), Err(ElfError::NotElf)));
    }

    #[test]
    fn kernels_for_other_machines_are_named() {
        for (number, name) in [
            (183, "aarch64"),
            (243, "RISC-V"),
            (3, "32-bit x86"),
            (9999, "9999"),
        ] {
            let error = error(|kernel| kernel.header.e_machine = number);
            assert!(error.to_string().contains(name), "{error}");
        }
        let error = error(|kernel| {
            kernel.header.e_ident[EI_DATA] = ELFDATA2MSB;
            kernel.header.e_machine = 22_u16.swap_bytes();
        });
        assert_eq!(error.to_string(), "it is for s390x, not for x86-64");
    }

    #[test]
    fn other_formats_are_refused() {
        assert!(matches!(
            error(|kernel| kernel.header.e_ident[EI_CLASS] = 1),
            ElfError::Not64Bit
        ));
        assert!(matches!(
            error(|kernel| {
                kernel.header.e_ident[EI_DATA] = ELFDATA2MSB;
                kernel.header.e_machine = EM_X86_64.swap_bytes();
            }),
            ElfError::BigEndian
        ));
        let dynamic = error(|kernel| kernel.header.e_type = 3);
        assert!(dynamic.to_string().contains("ET_DYN"), "{dynamic}");
        assert!(matches!(
            error(|kernel| kernel.header.e_phentsize = 32),
            ElfError::BadHeader(_)
        ));
        assert!(matches!(
            error(|kernel| kernel.load.p_filesz = kernel.load.p_memsz + 1),
            ElfError::BadHeader(_) | ElfError::Truncated { .. }
        ));
    }

    #[test]
    fn every_truncation_is_found() {
        let bytes = KernelFile::default().to_bytes();
        assert!(load_bytes(&bytes).is_ok());
        for length in 4..bytes.len() {
            let error = load_bytes(&bytes[..length]).unwrap_err();
            assert!(
                matches!(error, ElfError::Truncated { .. } | ElfError::NoPvhEntry),
                "{length}: {error}"
            );
            assert!(matches!(error, ElfError::Truncated { .. }), "{length}: {error}");
        }
    }

    #[test]
    fn segments_must_fit() {
        assert!(matches!(
            error(|kernel| kernel.load.p_paddr = RAM_END - 0x1000),
            ElfError::BeyondRam { ram_end: RAM_END, .. }
        ));
        assert!(matches!(
            error(|kernel| kernel.load.p_paddr = u64::MAX - 0xfff),
            ElfError::BeyondRam { .. }
        ));
        assert!(matches!(
            error(|kernel| kernel.load.p_paddr = 0xd_f000),
            ElfError::OverlapsBootStructures { start: 0xd_f000, .. }
        ));
        assert!(matches!(
            error(|kernel| (kernel.load.p_memsz, kernel.load.p_filesz) = (0, 0)),
            ElfError::NoSegments
        ));
    }

    #[test]
    fn a_pvh_entry_is_needed_and_must_be_inside() {
        let error_without = error(|kernel| kernel.note_type = 1);
        assert!(
            error_without.to_string().contains("CONFIG_PVH=y"),
            "{error_without}"
        );
        assert!(matches!(
            error(|kernel| kernel.pvh_entry = 0x20_0000),
            ElfError::EntryOutside(0x20_0000)
        ));
    }

    fn pvh_entry(notes: &[u8], alignment: usize) -> Option<u64> {
        let mut all = Notes::default();
        all.add(notes, alignment);
        all.pvh_entry
    }

    #[test]
    fn the_pvh_note_is_found_among_others() {
        let note = |name: &[u8], kind: u32, value: &[u8], alignment: usize| {
            let mut note = Vec::new();
            for word in [name.len() as u32, value.len() as u32, kind] {
                note.extend(word.to_le_bytes());
            }
            note.extend(name);
            note.resize(note.len().next_multiple_of(alignment), 0);
            note.extend(value);
            note.resize(note.len().next_multiple_of(alignment), 0);
            note
        };
        for alignment in [4, 8] {
            let entry = note(b"Xen\0", 18, &0x10_0000u64.to_le_bytes(), alignment);
            let property = note(b"GNU\0", 5, &[1; 16], alignment);
            let guest_os = note(b"Xen\0", 6, b"Linux\0", alignment);
            let salt = note(b"Linux\0", 0x100, &[0; 4], alignment);
            let find = |notes: &[&[u8]]| pvh_entry(&notes.concat(), alignment);
            let mut notes = Notes::default();
            notes.add(&[&property[..], &entry, &salt].concat(), alignment);
            assert_eq!(
                notes,
                Notes {
                    pvh_entry: Some(0x10_0000),
                    linux: true
                }
            );
            assert_eq!(find(&[&property, &guest_os, &entry]), Some(0x10_0000));
            assert_eq!(find(&[&entry, &property]), Some(0x10_0000));
            assert_eq!(find(&[&property, &guest_os]), None);
            for end in 0..entry.len() {
                assert_eq!(pvh_entry(&entry[..end], alignment), None, "{end}");
            }
        }
        assert_eq!(
            pvh_entry(&note(b"Xen\0", 18, &0x20_0000u32.to_le_bytes(), 4), 4),
            Some(0x20_0000)
        );
    }

    proptest::proptest! {
        #[test]
        fn no_notes_are_a_panic(notes: Vec<u8>) {
            pvh_entry(&notes, 4);
            pvh_entry(&notes, 8);
        }
    }
}
