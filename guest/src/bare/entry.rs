//! From the PVH entry, and from the trampoline of the secondary CPUs, to ring 3.
//!
//! Every instruction in here costs when ring 0 is emulated: tables are ready in the file, each CPU sets nothing but its
//! own stacks, and only CPU 0 calls Rust code in ring 0.

use core::arch::{asm, global_asm};

use guest::tables;

/// Bytes of stack that one CPU has: from below, IST1, then ring 0, then ring 3.
pub(super) const STACK_SIZE_LOG2: u64 = 14;
const STACK_SIZE: u64 = 1 << STACK_SIZE_LOG2;
const IST1_TOP: u64 = 0x1000;
const RING0_TOP: u64 = 0x2000;

const CR0: u64 = 1 << 31 | 1 << 5 | 1 << 4 | 1; // PG, NE, ET, PE
const CR0_PROTECTED: u64 = 1 << 4 | 1; // ET, PE
const CR4: u64 = 1 << 5; // PAE
const EFER: u64 = 0xc000_0080;
const EFER_LME: u64 = 1 << 8;
/// IOPL 3, and the bit that is always set.
const USER_FLAGS: u64 = 3 << 12 | 1 << 1;

/// The guest-physical address that the trampoline is copied to: where a startup IPI with this vector begins.
pub(super) const TRAMPOLINE_ADDRESS: u64 = 0x8000;
/// See [`TRAMPOLINE_ADDRESS`].
pub(super) const TRAMPOLINE_VECTOR: u64 = TRAMPOLINE_ADDRESS >> 12;
/// Eight-byte words of the trampoline.
pub(super) const TRAMPOLINE_WORDS: usize = 6;

unsafe extern "C" {
    /// The code that the secondary CPUs start in, to be copied.
    pub(super) static secondary_trampoline: [u64; TRAMPOLINE_WORDS];
    /// The stacks of all CPUs.
    static stacks: [u8; 0];
    /// The first byte that belongs to the guest, and the first behind it.
    static guest_start: [u8; 0];
    static guest_end: [u8; 0];
    /// The first byte behind what was loaded: code and data.
    static guest_loaded_end: [u8; 0];
}

/// The memory that the guest keeps for itself, as start and size.
pub(super) fn own_memory() -> (u64, u64) {
    let start = (&raw const guest_start).addr() as u64;
    let end = (&raw const guest_end).addr() as u64;
    (start, end - start)
}

/// Code and data, as start and size.
pub(super) fn own_loaded_memory() -> (u64, u64) {
    let start = (&raw const guest_start).addr() as u64;
    let end = (&raw const guest_loaded_end).addr() as u64;
    (start, end - start)
}

/// The number of the CPU that this runs on, by its stack; on a task's stack it means nothing.
pub(super) fn current_cpu() -> u64 {
    let stack: u64;
    // SAFETY: copies a register.
    unsafe { asm!("mov {}, rsp", out(reg) stack, options(nomem, nostack, preserves_flags)) };
    stack.wrapping_sub((&raw const stacks).addr() as u64) >> STACK_SIZE_LOG2
}

global_asm!(
    // The ELF note by which a PVH loader knows the entry. QEMU reads eight bytes of value.
    r#"
    .section .note.Xen, "a", @note
    .balign 4
    .long 4
    .long 8
    .long 18                        # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .balign 4
    .quad pvh_entry
    "#,
    // 32-bit, paging off, flat segments, EBX = start_info.
    r#"
    .section .text.entry, "ax", @progbits
    .code32
    .global pvh_entry
pvh_entry:
    cli
    cld
    xor %esi, %esi                  # this is CPU 0

enter_long_mode:                    # ESI = number of this CPU
    lgdt gdt_pointer
    mov ${cr4}, %eax
    mov %eax, %cr4
    mov ${pml4}, %eax
    mov %eax, %cr3
    mov ${efer}, %ecx
    rdmsr
    or ${lme}, %eax
    wrmsr
    mov ${cr0}, %eax
    mov %eax, %cr0
    ljmp ${kernel_code}, $long_mode

    .global secondary_entry
secondary_entry:
    mov ${kernel_data}, %eax
    mov %eax, %ds
    mov $1, %esi
    lock xadd %esi, next_cpu
    jmp enter_long_mode
    "#,
    r#"
    .code64
long_mode:
    xor %eax, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss

    # The stacks of this CPU, RBP being the lowest byte of them.
    mov %esi, %ebp
    shl ${stack_size_log2}, %ebp
    add $stacks, %rbp
    mov %esi, %edi
    shl ${task_state_size_log2}, %edi
    add ${task_state_address}, %edi
    lea {ist1_top}(%rbp), %rax
    mov %rax, {ist1}(%rdi)
    lea {ring0_top}(%rbp), %rsp
    mov %rsp, {rsp0}(%rdi)

    lidt idt_pointer
    mov %esi, %eax
    shl $4, %eax
    add ${task_state}, %eax
    ltr %ax

    mov $secondary_main, %edx
    test %esi, %esi
    jnz 1f
    push %rbx                       # keeps the stack aligned as well
    push %rsi
    call {prepare}
    pop %rsi
    pop %rbx
    mov ${main}, %edx
1:
    # To ring 3 with interrupts off. The stack is as after a call. Every port is allowed twice over, by the I/O map of the task
    # state segment and by IOPL 3: some machines show ring 3 an IOPL of 0, and QEMU's emulated CPU looks for the map only in a
    # segment that is not busy, as KVM has it after a restore on that CPU.
    mov %esi, %edi
    mov %rbx, %rsi
    lea {ring3_top}(%rbp), %rax
    push ${user_data}
    push %rax
    push ${user_flags}
    push ${user_code}
    push %rdx
    iretq
    "#,
    // Real mode at TRAMPOLINE_ADDRESS, CS being its segment.
    r#"
    .section .rodata.trampoline, "a", @progbits
    .balign 8
    .code16
    .global secondary_trampoline
secondary_trampoline:
    cli
    lgdtl %cs:trampoline_gdt_pointer - secondary_trampoline
    mov ${cr0_protected}, %eax
    mov %eax, %cr0
    ljmpl ${kernel_code_32}, $secondary_entry
    .balign 8
trampoline_gdt_pointer:
    .word {gdt_limit}
    .long {gdt_address}
    .org secondary_trampoline + {trampoline_size}
    .code64
    "#,
    r#"
    .section .rodata.pointers, "a", @progbits
    .balign 8
gdt_pointer:
    .word {gdt_limit}
    .long {gdt_address}
    .balign 8
idt_pointer:
    .word {idt_limit}
    .quad {idt_address}

    .section .data.next_cpu, "aw", @progbits
    .balign 4
next_cpu:
    .long 1

    .section .noinit, "aw", @nobits
    .balign 4096
    .global stacks
stacks:
    .skip {all_stacks}

    .text
    "#,
    cr0 = const CR0,
    cr0_protected = const CR0_PROTECTED,
    cr4 = const CR4,
    efer = const EFER,
    lme = const EFER_LME,
    pml4 = const tables::PML4_ADDRESS,
    kernel_code_32 = const tables::KERNEL_CODE_32,
    kernel_code = const tables::KERNEL_CODE,
    kernel_data = const tables::KERNEL_DATA,
    user_code = const tables::USER_CODE,
    user_flags = const USER_FLAGS,
    user_data = const tables::USER_DATA,
    task_state = const tables::TASK_STATE,
    task_state_address = const tables::TASK_STATE_ADDRESS,
    task_state_size_log2 = const tables::TASK_STATE_SIZE.ilog2(),
    ist1 = const tables::TASK_STATE_IST1,
    rsp0 = const tables::TASK_STATE_RSP0,
    stack_size_log2 = const STACK_SIZE_LOG2,
    ist1_top = const IST1_TOP,
    ring0_top = const RING0_TOP,
    ring3_top = const STACK_SIZE - 8,
    all_stacks = const STACK_SIZE * tables::MAX_CPUS as u64,
    trampoline_size = const TRAMPOLINE_WORDS * 8,
    gdt_limit = const tables::GDT_LIMIT,
    gdt_address = const tables::GDT_ADDRESS,
    idt_limit = const tables::IDT_LIMIT,
    idt_address = const tables::IDT_ADDRESS,
    prepare = sym super::prepare,
    main = sym super::main,
    options(att_syntax),
);

/// The processor's tables at the address that they were computed for. Nothing reaches them by this name: the processor and
/// [`paging`](super::paging) know the addresses.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".tables")]
#[used]
static mut tables_address: tables::Tables = tables::Tables::new();

global_asm!(
    ".global tables_expected_address",
    ".set tables_expected_address, {}",
    const tables::ADDRESS,
);
