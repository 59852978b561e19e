//! The ROM: from the reset vector to the guest's entry, in assembly, since there is neither a stack nor memory to write to.

use core::arch::global_asm;
use core::panic::PanicInfo;

use firmware::boot_info::{self, Protocol, offset};
use firmware::{EXIT_PORT, ROM_ADDRESS, Refusal, SERIAL_PORT};

/// The real-mode segment base at reset is 64 KiB below 4 GiB; this is what the ROM's addresses are relative to it.
const REAL_MODE_BASE: u64 = 0xffff_0000;

// The boot-information page's magic as its two 32-bit words.
const MAGIC_LOW: u32 = u32::from_le_bytes([
    boot_info::MAGIC[0],
    boot_info::MAGIC[1],
    boot_info::MAGIC[2],
    boot_info::MAGIC[3],
]);
const MAGIC_HIGH: u32 = u32::from_le_bytes([
    boot_info::MAGIC[4],
    boot_info::MAGIC[5],
    boot_info::MAGIC[6],
    boot_info::MAGIC[7],
]);

const CR0_PROTECTED: u32 = 1 << 4 | 1; // ET, PE
const CR0_PAGING: u32 = 1 << 31;
const CR4_PAE: u32 = 1 << 5;
const EFER: u32 = 0xc000_0080;
const EFER_LME: u32 = 1 << 8;
const CPUID_EXTENDED: u32 = 0x8000_0000;
const CPUID_LONG_MODE_BIT: u32 = 29;

const CODE_32: u16 = 0x08;
/// Linux' `__BOOT_CS` and `__BOOT_DS`.
const CODE_64: u16 = 0x10;
const DATA: u16 = 0x18;

global_asm!(
    // The processor starts here: real mode, CS base 0xffff0000, IP 0xfff0.
    r#"
    .section .reset, "ax", @progbits
    .code16
    .global reset_vector
reset_vector:
    jmp real_mode
    "#,
    r#"
    .section .rom, "ax", @progbits
rom:
real_mode:
    cli
    cld
    # The GDT's address as an offset from CS.
    lgdtl %cs:gdt_pointer - rom + {rom_offset}
    mov ${cr0_protected}, %eax
    mov %eax, %cr0
    ljmpl ${code_32}, $protected_mode

    .code32
protected_mode:
    mov ${data}, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    xor %eax, %eax
    mov %eax, %fs
    mov %eax, %gs

    # Is the page what it should be?
    mov ${bad_magic_code}, %ebx
    cmpl ${magic_low}, {boot_info} + {magic}
    jne refuse
    cmpl ${magic_high}, {boot_info} + {magic} + 4
    jne refuse
    mov ${bad_version_code}, %ebx
    cmpl ${version_expected}, {boot_info} + {version}
    jne refuse
    mov {boot_info} + {protocol}, %eax
    cmp ${pvh}, %eax
    je enter_pvh
    cmp ${long_mode}, %eax
    je enter_long_mode
    mov ${bad_protocol_code}, %ebx

    # Prints the line that belongs to code EBX, and ends with it.
refuse:
    imul ${line_size}, %ebx, %esi
    add ${lines} - {first_code} * {line_size}, %esi
    mov ${serial_port}, %edx
1:
    lodsb
    test %al, %al
    jz 2f
    outb %al, %dx
    jmp 1b
2:
    mov %ebx, %eax
    outl %eax, ${exit_port}
3:
    hlt
    jmp 3b

    # Xen's docs/misc/pvh.pandoc: flat 32-bit segments, CR0.PE alone, EBX = start_info. TR is as reset left it, a busy TSS at 0.
enter_pvh:
    mov ${bad_address_code}, %ebx
    mov {boot_info} + {entry} + 4, %eax
    or {boot_info} + {argument} + 4, %eax
    jnz refuse
    mov {boot_info} + {argument}, %ebx
    jmp *{boot_info} + {entry}

    # Linux' Documentation/arch/x86/boot.rst, 64-bit boot protocol: RSI = boot_params. The page tables need not map the
    # boot-information page, so all of it is read before they are in force.
enter_long_mode:
    mov ${cpuid_extended}, %eax
    cpuid                           # changes EBX
    mov ${no_long_mode_code}, %ebx
    cmp ${cpuid_extended}, %eax
    jbe refuse
    mov ${cpuid_extended} + 1, %eax
    cpuid
    mov ${no_long_mode_code}, %ebx
    bt ${cpuid_long_mode_bit}, %edx
    jnc refuse
    mov ${bad_address_code}, %ebx
    cmpl $0, {boot_info} + {page_table_root} + 4
    jne refuse

    mov ${cr4_pae}, %eax
    mov %eax, %cr4
    mov {boot_info} + {page_table_root}, %eax
    mov %eax, %cr3
    mov ${efer}, %ecx
    rdmsr
    or ${efer_lme}, %eax
    wrmsr
    mov {boot_info} + {entry}, %edi
    mov {boot_info} + {entry} + 4, %ebp
    mov {boot_info} + {argument}, %esi
    mov {boot_info} + {argument} + 4, %ebx
    mov %cr0, %eax
    or ${cr0_paging}, %eax
    mov %eax, %cr0
    ljmp ${code_64}, $in_long_mode

    .code64
in_long_mode:
    # The upper halves of the registers are not defined before the first 32-bit write in 64-bit mode.
    mov %edi, %edi
    mov %esi, %esi
    shl $32, %rbp
    or %rbp, %rdi
    shl $32, %rbx
    or %rbx, %rsi
    xor %eax, %eax
    xor %ebx, %ebx
    xor %ecx, %ecx
    xor %edx, %edx
    xor %ebp, %ebp
    jmp *%rdi

    # The accessed bits are set, because the processor could not set them here.
    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        # 0x08: 32-bit code, flat
    .quad 0x00af9b000000ffff        # 0x10: 64-bit code
    .quad 0x00cf93000000ffff        # 0x18: data, flat
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
    "#,
    rom_offset = const ROM_ADDRESS - REAL_MODE_BASE,
    cr0_protected = const CR0_PROTECTED,
    cr0_paging = const CR0_PAGING,
    cr4_pae = const CR4_PAE,
    efer = const EFER,
    efer_lme = const EFER_LME,
    cpuid_extended = const CPUID_EXTENDED,
    cpuid_long_mode_bit = const CPUID_LONG_MODE_BIT,
    code_32 = const CODE_32,
    code_64 = const CODE_64,
    data = const DATA,
    serial_port = const SERIAL_PORT,
    exit_port = const EXIT_PORT,
    lines = sym LINES,
    line_size = const LINE_SIZE,
    first_code = const FIRST_CODE,
    bad_magic_code = const Refusal::BadMagic as u32,
    bad_version_code = const Refusal::BadVersion as u32,
    bad_protocol_code = const Refusal::BadProtocol as u32,
    bad_address_code = const Refusal::BadAddress as u32,
    no_long_mode_code = const Refusal::NoLongMode as u32,
    pvh = const Protocol::Pvh as u32,
    long_mode = const Protocol::LongMode as u32,
    magic_low = const MAGIC_LOW,
    magic_high = const MAGIC_HIGH,
    version_expected = const boot_info::VERSION,
    boot_info = const boot_info::ADDRESS,
    magic = const offset::MAGIC,
    version = const offset::VERSION,
    protocol = const offset::PROTOCOL,
    entry = const offset::ENTRY,
    argument = const offset::ARGUMENT,
    page_table_root = const offset::PAGE_TABLE_ROOT,
    options(att_syntax),
);

global_asm!(
    ".global rom_address",
    ".set rom_address, {}",
    const ROM_ADDRESS,
);

/// Bytes of a line in [`LINES`].
const LINE_SIZE: usize = 72;
const FIRST_CODE: u32 = Refusal::ALL[0] as u32;

/// What is printed on each refusal, ending in a newline and a zero.
static LINES: [[u8; LINE_SIZE]; Refusal::ALL.len()] = {
    let mut lines = [[0; LINE_SIZE]; Refusal::ALL.len()];
    let mut i = 0;
    while i < lines.len() {
        assert!(Refusal::ALL[i] as usize == FIRST_CODE as usize + i);
        let message = Refusal::ALL[i].message().as_bytes();
        let (start, _) = lines[i].split_at_mut(message.len());
        start.copy_from_slice(message);
        lines[i][message.len()] = b'\n';
        assert!(message.len() + 2 <= LINE_SIZE);
        i += 1;
    }
    lines
};

/// Nothing in the ROM panics; the language wants this all the same.
#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    loop {}
}
