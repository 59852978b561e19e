//! Unexpected exceptions: one line that says what and where, then the end. Nothing returns from here. #GP and #PF come here by way
//! of [`async_pf`](super::async_pf), which expects some of them.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, Ordering};

use guest::exit_code::ExitCode;
use guest::tables;
use x86_64::registers::control::Cr2;

use super::entry;
use super::exit;
use super::serial::println;

/// What is on the stack when `report` is called: the stub's words, then the processor's.
#[repr(C)]
struct Frame {
    vector: u64,
    error_code: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

/// Names as in Intel's manual, volume 3, section 6.3.1.
const NAMES: [&str; tables::EXCEPTIONS] = [
    "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "9", "#TS", "#NP", "#SS", "#GP", "#PF",
    "15", "#MF", "#AC", "#MC", "#XM", "#VE", "#CP", "22", "23", "24", "25", "26", "27", "28", "29", "30",
    "31",
];

/// The vectors with which the processor pushes an error code.
const WITH_ERROR_CODE: u64 =
    1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 17 | 1 << 21 | 1 << 29 | 1 << 30;

/// Set while a report is being made, so that an exception in it does not begin another.
static REPORTING: AtomicBool = AtomicBool::new(false);

global_asm!(
    r#"
    .section .text.stubs, "ax", @progbits
    .balign 16
    .global exception_stubs
exception_stubs:
    vector = 0
    .rept {exceptions}
    .balign {stub_size}, 0xcc
    .if vector == {general_protection}
    jmp general_protection
    .elseif vector == {page_fault}
    jmp page_fault
    .else
    .ifeq ({with_error_code} >> vector) & 1
    push $0
    .endif
    push $vector
    jmp exception_common
    .endif
    vector = vector + 1
    .endr
    .balign {stub_size}, 0xcc       # PAGE_READY
    jmp page_ready
    .balign {stub_size}, 0xcc       # TIMER
    jmp timer_tick
    .balign {stub_size}, 0xcc       # SPURIOUS
    iretq
    .balign {stub_size}, 0xcc

    .global exception_common
exception_common:
    cld
    mov %rsp, %rdi
    and $-16, %rsp
    call {report}

    .global exception_stubs_expected_address
    .set exception_stubs_expected_address, {stubs_address}
    .text
    "#,
    exceptions = const tables::EXCEPTIONS,
    stub_size = const tables::STUB_SIZE,
    stubs_address = const tables::STUBS_ADDRESS,
    with_error_code = const WITH_ERROR_CODE,
    general_protection = const 13,
    page_fault = const 14,
    report = sym report,
    options(att_syntax),
);

/// Reports an exception and ends the VM. Runs in ring 0.
extern "C" fn report(frame: &Frame) -> ! {
    if frame.rip == exit::parking_place() {
        exit::halt();
    }
    let ring = frame.cs & 3;
    if REPORTING.swap(true, Ordering::Relaxed) && ring == 0 {
        exit::exit(ExitCode::Exception);
    }
    let name = NAMES.get(frame.vector as usize).copied().unwrap_or("?");
    println(format_args!(
        "exception={name} vector={} error_code={:#x} rip={:#x} cr2={:#x} cpu={} cs={:#x} rflags={:#x} rsp={:#x}",
        frame.vector,
        frame.error_code,
        frame.rip,
        Cr2::read_raw(),
        entry::current_cpu(),
        frame.cs,
        frame.rflags,
        frame.rsp,
    ));
    exit::exit(ExitCode::Exception)
}

/// Reads the last page of the lower half of the address space, which is never mapped.
pub(super) fn provoke_page_fault() {
    // SAFETY: the read faults, and its handler does not return.
    unsafe { asm!("mov {0}, qword ptr [{0}]", inout(reg) 0x7fff_ffff_f000_u64 => _, options(nostack)) };
}

/// Executes an instruction that is none.
pub(super) fn provoke_invalid_opcode() {
    // SAFETY: the instruction faults, and its handler does not return.
    unsafe { asm!("ud2", options(nostack)) };
}

/// Takes away the stack that ring 3's exceptions arrive on, then has one.
pub(super) fn provoke_double_fault() {
    let rsp0 = (tables::TASK_STATE_ADDRESS as usize + tables::TASK_STATE_RSP0) as *mut u64;
    // SAFETY: the tables are mapped writable, CPU 0 owns this field, and after the next exception nothing else runs.
    unsafe { rsp0.write_unaligned(0x7fff_ffff_f000) };
    provoke_invalid_opcode();
}
