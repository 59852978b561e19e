//! A kernel file for tests, each part of which can be made wrong.

use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr, PT_LOAD, PT_NOTE};
use vm_memory::ByteValued;

/// An ELF kernel with one loadable segment and one note.
pub(super) struct KernelFile {
    pub(super) header: Elf64_Ehdr,
    pub(super) load: Elf64_Phdr,
    pub(super) note_type: u32,
    pub(super) pvh_entry: u64,
}

impl KernelFile {
    pub(super) const ADDRESS: u64 = 0x10_0000;
    /// `cli; hlt; jmp` to the `hlt`.
    pub(super) const CODE: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];

    const HEADERS: u64 = (size_of::<Elf64_Ehdr>() + 2 * size_of::<Elf64_Phdr>()) as u64;
    const NOTE_SIZE: u64 = 12 + 4 + 8;

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let note = Elf64_Phdr {
            p_type: PT_NOTE,
            p_offset: Self::HEADERS,
            p_filesz: Self::NOTE_SIZE,
            p_memsz: Self::NOTE_SIZE,
            ..Default::default()
        };
        let mut bytes = Vec::new();
        bytes.extend(self.header.as_slice());
        bytes.extend(note.as_slice());
        bytes.extend(self.load.as_slice());
        for word in [4, 8, self.note_type] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(b"Xen\0");
        bytes.extend(self.pvh_entry.to_le_bytes());
        bytes.extend(Self::CODE);
        bytes
    }
}

impl Default for KernelFile {
    fn default() -> Self {
        let mut header = Elf64_Ehdr {
            e_type: 2,
            e_machine: 62,
            e_version: 1,
            e_phoff: size_of::<Elf64_Ehdr>() as u64,
            e_phentsize: size_of::<Elf64_Phdr>() as u16,
            e_phnum: 2,
            ..Default::default()
        };
        header.e_ident[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        Self {
            header,
            load: Elf64_Phdr {
                p_type: PT_LOAD,
                p_offset: Self::HEADERS + Self::NOTE_SIZE,
                p_paddr: Self::ADDRESS,
                p_filesz: Self::CODE.len() as u64,
                p_memsz: 0x3000,
                ..Default::default()
            },
            note_type: 18,
            pvh_entry: Self::ADDRESS,
        }
    }
}

/// A bzImage of boot protocol 2.15 whose kernel is 1,024 bytes long, needs 4 MiB, is linked to 16 MiB and takes 255 bytes of
/// command line.
pub(super) fn bzimage_file() -> Vec<u8> {
    const SETUP: usize = 2 * 512;
    let mut file = vec![0; SETUP + 1024];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &(1024_u32 / 16).to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x230, &0x20_0000_u32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &[0x7f, 0]);
    put(0x238, &255_u32.to_le_bytes());
    put(0x258, &0x100_0000_u64.to_le_bytes());
    put(0x260, &0x40_0000_u32.to_le_bytes());
    file
}
