//! The processor's tables, computed at compile time.
//!
//! Ring 0 is dear where the guest runs emulated, so nothing of this is built at run time: the page tables of the first GiB, GDT, IDT
//! and TSSs are data in the ELF file, at addresses that the linker script fixes.

use core::mem::{offset_of, size_of};

/// Where [`Tables`] are, and with them the guest begins.
pub const ADDRESS: u64 = 0x10_0000;

/// Where the code of the exception stubs is: directly behind the tables.
pub const STUBS_ADDRESS: u64 = ADDRESS + size_of::<Tables>() as u64;

/// Bytes from one exception stub to the next.
pub const STUB_SIZE: u64 = 16;

/// Exceptions of the processor.
pub const EXCEPTIONS: usize = 32;

/// The interrupts that there can be when a workload lets them in: a page that was waited for is ready.
pub const PAGE_READY: usize = 32;
/// The local APIC's timer has run out.
pub const TIMER: usize = 33;
/// The local APIC has lost an interrupt.
pub const SPURIOUS: usize = 34;

/// Vectors in the IDT.
pub const VECTORS: usize = 35;

/// The most CPUs that the guest uses.
pub const MAX_CPUS: usize = 64;

/// Bytes that one 1 GiB page directory maps with each entry.
pub const LARGE_PAGE_SIZE: u64 = 2 << 20;

/// Entries in a page table of any level.
pub const PAGE_TABLE_ENTRIES: usize = 512;

/// Ring-0 code selectors: 32-bit on the way up, 64-bit from then on.
pub const KERNEL_CODE_32: u16 = 0x08;
/// See [`KERNEL_CODE_32`].
pub const KERNEL_CODE: u16 = 0x10;
/// Ring-0 data selector.
pub const KERNEL_DATA: u16 = 0x18;
/// Ring-3 stack and data selector.
pub const USER_DATA: u16 = 0x20 | 3;
/// Ring-3 code selector.
pub const USER_CODE: u16 = 0x28 | 3;
/// The TSS selector of CPU 0; the next CPU's is 16 higher.
pub const TASK_STATE: u16 = 0x30;

const SEGMENTS: usize = TASK_STATE as usize / 8;

/// An entry of a page table: present, writable, for ring 3 too.
pub const PRESENT_WRITABLE_USER: u64 = 1 | 1 << 1 | 1 << 2;

/// An entry of a page directory that maps 2 MiB.
const LARGE: u64 = 1 << 7;

/// One CPU's 64-bit task state segment. `rsp0` and `ist1` are set when the CPU starts.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(128))]
pub struct TaskState {
    reserved0: u32,
    /// RSP0 to RSP2, each as two halves, for the format wants them at multiples of 4.
    rsp: [u32; 6],
    reserved1: [u32; 2],
    /// IST1 to IST7.
    ist: [u32; 14],
    reserved2: [u32; 2],
    reserved3: u16,
    io_bitmap: u16,
}

/// Offset of RSP0, the stack on which ring 3 exceptions arrive.
pub const TASK_STATE_RSP0: usize = offset_of!(TaskState, rsp);
/// Offset of IST1, the stack of exceptions that cannot trust any other.
pub const TASK_STATE_IST1: usize = offset_of!(TaskState, ist);
/// Bytes from one CPU's TSS to the next.
pub const TASK_STATE_SIZE: usize = size_of::<TaskState>();

/// All tables in the order in which they lie in memory.
#[repr(C, align(4096))]
pub struct Tables {
    pml4: [u64; PAGE_TABLE_ENTRIES],
    pdpt: [u64; PAGE_TABLE_ENTRIES],
    page_directory: [u64; PAGE_TABLE_ENTRIES],
    idt: [[u64; 2]; VECTORS],
    gdt: [u64; SEGMENTS + 2 * MAX_CPUS],
    task_states: [TaskState; MAX_CPUS],
    /// One bit a port, 0 = allowed to ring 3, common to all TSSs; the format wants a byte of ones behind it.
    io_bitmap: [u8; 65536 / 8 + 1],
}

/// Addresses of the single tables.
pub const PML4_ADDRESS: u64 = ADDRESS + offset_of!(Tables, pml4) as u64;
/// Of the page-directory-pointer table: entry `i` maps GiB `i`.
pub const PDPT_ADDRESS: u64 = ADDRESS + offset_of!(Tables, pdpt) as u64;
const PAGE_DIRECTORY_ADDRESS: u64 = ADDRESS + offset_of!(Tables, page_directory) as u64;
/// Of the interrupt descriptor table.
pub const IDT_ADDRESS: u64 = ADDRESS + offset_of!(Tables, idt) as u64;
/// Of the global descriptor table.
pub const GDT_ADDRESS: u64 = ADDRESS + offset_of!(Tables, gdt) as u64;
/// Of CPU 0's task state segment.
pub const TASK_STATE_ADDRESS: u64 = ADDRESS + offset_of!(Tables, task_states) as u64;
const IO_BITMAP_ADDRESS: u64 = ADDRESS + offset_of!(Tables, io_bitmap) as u64;

/// The IDT's limit, as `lidt` takes it.
pub const IDT_LIMIT: usize = size_of::<[[u64; 2]; VECTORS]>() - 1;
/// The GDT's limit, as `lgdt` takes it.
pub const GDT_LIMIT: usize = size_of::<[u64; SEGMENTS + 2 * MAX_CPUS]>() - 1;

impl Tables {
    /// The tables as they are at start.
    pub const fn new() -> Self {
        let mut pml4 = [0; PAGE_TABLE_ENTRIES];
        pml4[0] = PDPT_ADDRESS | PRESENT_WRITABLE_USER;
        let mut pdpt = [0; PAGE_TABLE_ENTRIES];
        pdpt[0] = PAGE_DIRECTORY_ADDRESS | PRESENT_WRITABLE_USER;
        let mut page_directory = [0; PAGE_TABLE_ENTRIES];
        let mut i = 0;
        while i < PAGE_TABLE_ENTRIES {
            page_directory[i] = large_page_entry(0, i);
            i += 1;
        }
        let mut idt = [[0; 2]; VECTORS];
        let mut vector = 0;
        while vector < VECTORS {
            idt[vector] = interrupt_gate(vector);
            vector += 1;
        }
        Self {
            pml4,
            pdpt,
            page_directory,
            idt,
            gdt: gdt(),
            task_states: task_states(),
            io_bitmap: {
                let mut bitmap = [0; 65536 / 8 + 1];
                bitmap[65536 / 8] = 0xff;
                bitmap
            },
        }
    }
}

impl Default for Tables {
    fn default() -> Self {
        Self::new()
    }
}

/// Entry `index` of the page directory of GiB `gib`: 2 MiB mapped one to one for both rings.
pub const fn large_page_entry(gib: u64, index: usize) -> u64 {
    ((gib << 30) + index as u64 * LARGE_PAGE_SIZE) | PRESENT_WRITABLE_USER | LARGE
}

const fn gdt() -> [u64; SEGMENTS + 2 * MAX_CPUS] {
    let mut gdt = [0; SEGMENTS + 2 * MAX_CPUS];
    // Flat segments with base 0; their accessed bits are set, which spares the processor the write.
    gdt[KERNEL_CODE_32 as usize / 8] = 0x00cf_9b00_0000_ffff;
    gdt[KERNEL_CODE as usize / 8] = 0x00af_9b00_0000_ffff;
    gdt[KERNEL_DATA as usize / 8] = 0x00cf_9300_0000_ffff;
    gdt[USER_DATA as usize / 8] = 0x00cf_f300_0000_ffff;
    gdt[USER_CODE as usize / 8] = 0x00af_fb00_0000_ffff;
    let mut cpu = 0;
    while cpu < MAX_CPUS {
        const AVAILABLE_TSS: u64 = 0x89;
        let base = TASK_STATE_ADDRESS + (cpu * TASK_STATE_SIZE) as u64;
        let limit = IO_BITMAP_ADDRESS + size_of::<[u8; 65536 / 8]>() as u64 - base;
        gdt[SEGMENTS + 2 * cpu] = limit & 0xffff
            | (base & 0x00ff_ffff) << 16
            | AVAILABLE_TSS << 40
            | (limit >> 16 & 0xf) << 48
            | (base >> 24 & 0xff) << 56;
        gdt[SEGMENTS + 2 * cpu + 1] = base >> 32;
        cpu += 1;
    }
    gdt
}

const fn task_states() -> [TaskState; MAX_CPUS] {
    let mut states = [TaskState {
        reserved0: 0,
        rsp: [0; 6],
        reserved1: [0; 2],
        ist: [0; 14],
        reserved2: [0; 2],
        reserved3: 0,
        io_bitmap: 0,
    }; MAX_CPUS];
    let mut cpu = 0;
    while cpu < MAX_CPUS {
        let base = TASK_STATE_ADDRESS + (cpu * TASK_STATE_SIZE) as u64;
        states[cpu].io_bitmap = (IO_BITMAP_ADDRESS - base) as u16;
        cpu += 1;
    }
    states
}

const fn interrupt_gate(vector: usize) -> [u64; 2] {
    const PRESENT_INTERRUPT_GATE: u64 = 0x8e;
    const NMI: usize = 2;
    const DOUBLE_FAULT: usize = 8;
    const MACHINE_CHECK: usize = 18;
    let stack = matches!(vector, NMI | DOUBLE_FAULT | MACHINE_CHECK) as u64;
    let stub = STUBS_ADDRESS + vector as u64 * STUB_SIZE;
    [
        stub & 0xffff
            | (KERNEL_CODE as u64) << 16
            | stack << 32
            | PRESENT_INTERRUPT_GATE << 40
            | (stub >> 16 & 0xffff) << 48,
        stub >> 32,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_tables_map_the_first_gib_one_to_one() {
        let tables = Box::new(Tables::new());
        assert_eq!(tables.pml4[0], PDPT_ADDRESS | 7);
        assert_eq!(tables.pdpt[0], PAGE_DIRECTORY_ADDRESS | 7);
        assert!(tables.pdpt[1..].iter().all(|&entry| entry == 0));
        for (i, entry) in tables.page_directory.iter().enumerate() {
            assert_eq!(*entry, (i as u64) << 21 | 0x87);
        }
        assert_eq!(large_page_entry(3, 511), 0xffe0_0087);
        for address in [PML4_ADDRESS, PDPT_ADDRESS, PAGE_DIRECTORY_ADDRESS, STUBS_ADDRESS] {
            assert_eq!(address % 4096, 0);
        }
    }

    #[test]
    fn every_gate_leads_to_its_stub() {
        let tables = Box::new(Tables::new());
        for (vector, [low, high]) in tables.idt.iter().enumerate() {
            let offset = low & 0xffff | low >> 48 << 16 | high << 32;
            assert_eq!(offset, STUBS_ADDRESS + 16 * vector as u64);
            assert_eq!(low >> 16 & 0xffff, u64::from(KERNEL_CODE));
            assert_eq!(low >> 32 & 7, u64::from([2, 8, 18].contains(&vector)));
            assert_eq!(low >> 40 & 0xff, 0x8e);
        }
    }

    #[test]
    fn every_cpu_has_a_task_state_that_ends_with_the_common_bitmap() {
        let tables = Box::new(Tables::new());
        for (cpu, state) in tables.task_states.iter().enumerate() {
            let low = tables.gdt[SEGMENTS + 2 * cpu];
            let base = low >> 16 & 0xff_ffff | low >> 56 << 24;
            let limit = low & 0xffff | (low >> 48 & 0xf) << 16;
            assert_eq!(base, TASK_STATE_ADDRESS + 128 * cpu as u64);
            assert_eq!(base + u64::from(state.io_bitmap), IO_BITMAP_ADDRESS);
            assert_eq!(
                base + limit,
                IO_BITMAP_ADDRESS + 8192,
                "the byte of ones is the last"
            );
        }
        assert!(tables.io_bitmap[..8192].iter().all(|&bits| bits == 0));
        assert_eq!(tables.io_bitmap[8192], 0xff);
        assert_eq!(TASK_STATE_RSP0, 4);
        assert_eq!(TASK_STATE_IST1, 36);
        assert_eq!(offset_of!(TaskState, io_bitmap), 102);
    }
}
