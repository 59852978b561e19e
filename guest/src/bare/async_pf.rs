//! KVM's asynchronous page faults: a CPU that touches a page which the host does not have yet is told so by a #PF with a token,
//! and by an interrupt with the same token when the page is there.
//!
//! Ring 0 does as little as it can, for where it is emulated it is dear. The #PF handler lets the interrupted task go on in
//! [`park_upcall`], on its own stack, in ring 3 and with interrupts on. The interrupt handler puts the token into a ring that
//! the CPU's scheduler, in ring 3 too, reads when it likes. So a token can neither be lost nor be handled in the middle of
//! something else.
//!
//! Only a task at its own work is parked. What runs in between (the scheduler, the parking itself) may touch an absent page too,
//! after the guest was restored from a snapshot even one of its code; it cannot be parked in the middle of that, so it touches
//! the page again, and then KVM makes the CPU wait.
//!
//! Linux `Documentation/virt/kvm/x86/msr.rst`, `MSR_KVM_ASYNC_PF_EN` and the two after it.

use core::arch::x86_64::__cpuid;
use core::arch::{asm, global_asm};
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};

use guest::tables::{self, MAX_CPUS};
use x86_64::instructions::port::PortWriteOnly;
use x86_64::registers::model_specific::Msr;

use super::entry;
use super::stacks::{self, Fibers};

const LEAF_SIGNATURE: u32 = 0x4000_0000;
const LEAF_FEATURES: u32 = 0x4000_0001;
/// "KVMKVMKVM" in EBX, ECX and EDX.
const SIGNATURE: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x4d];
/// `KVM_FEATURE_ASYNC_PF` and `KVM_FEATURE_ASYNC_PF_INT`.
const FEATURES: u32 = 1 << 4 | 1 << 14;

const MSR_ENABLE: u32 = 0x4b56_4d02;
const MSR_INTERRUPT: u32 = 0x4b56_4d06;
const MSR_ACKNOWLEDGE: u32 = 0x4b56_4d07;
/// Bit 0, enabled, and bit 3, ready by interrupt. Not bit 1, events in ring 0: what ring 0 touches is there.
const ENABLE: u64 = 1 | 1 << 3;

const APIC_BASE: u32 = 0x1b;
const APIC_ENABLE_X2APIC: u64 = 3 << 10;
const X2APIC_EOI: u32 = 0x80b;
const X2APIC_SPURIOUS: u32 = 0x80f;
const APIC_SOFTWARE_ENABLE: u64 = 1 << 8;
const X2APIC_TIMER: u32 = 0x832;
const TIMER_PERIODIC: u64 = 1 << 17;
const X2APIC_LINT0: u32 = 0x835;
const LVT_MASKED: u64 = 1 << 16;
const X2APIC_TIMER_INITIAL: u32 = 0x838;
const X2APIC_TIMER_DIVIDE: u32 = 0x83e;
const DIVIDE_BY_1: u64 = 0b1011;
/// The masks of the two legacy interrupt controllers.
const PIC_MASKS: [u16; 2] = [0x21, 0xa1];

/// KVM's APIC timer counts nanoseconds.
const TIMER_PERIOD: u64 = 100_000_000;
/// How often the clock ticks.
pub(super) const TICKS_HZ: u32 = 10;

/// Tokens that a ring holds: KVM has at most 64 on their way, and sends no more before one of them was followed by another fault,
/// before which the ring is read.
const RING: usize = 128;
const AREA_SIZE_LOG2: u32 = 10;

/// What ring 0 does for ring 3, by number, at [`ring0_call`].
const CALL_WAIT: u64 = 0;
const CALL_ENABLE: u64 = 1;

/// One CPU's.
#[repr(C, align(1024))]
pub(super) struct Area {
    /// KVM's: 1 says that a #PF is one of these events.
    flags: AtomicU32,
    /// KVM's: what is ready, 0 if nothing.
    token: AtomicU32,
    _kvm: [u32; 14],
    /// Tokens read and written so far, modulo 2^32.
    head: AtomicU32,
    tail: AtomicU32,
    ticks: AtomicU32,
    /// 1 while a task is at its own work, and can be parked. Not while it is being parked, and not in the scheduler.
    parkable: AtomicU32,
    /// The CPU's tasks, while it has any.
    pub(super) fibers: AtomicPtr<Fibers<'static>>,
    ring: [AtomicU32; RING],
}

const _: () = assert!(size_of::<Area>() == 1 << AREA_SIZE_LOG2);

static AREAS: [Area; MAX_CPUS] = [const {
    Area {
        flags: AtomicU32::new(0),
        token: AtomicU32::new(0),
        _kvm: [0; 14],
        head: AtomicU32::new(0),
        tail: AtomicU32::new(0),
        ticks: AtomicU32::new(0),
        parkable: AtomicU32::new(0),
        fibers: AtomicPtr::new(ptr::null_mut()),
        ring: [const { AtomicU32::new(0) }; RING],
    }
}; MAX_CPUS];

/// Whether KVM offers it; written by ring 0 before ring 3 begins.
static OFFERED: AtomicBool = AtomicBool::new(false);

unsafe extern "C" {
    /// Calls ring 0: the first argument says what for.
    fn ring0_call(call: u64);
}

global_asm!(
    r#"
    .macro area register
    mov %rsp, \register
    sub $stacks, \register
    shr ${stack_size_log2}, \register
    shl ${area_size_log2}, \register
    add ${areas}, \register
    .endm

    .macro end_of_interrupt
    mov ${eoi}, %ecx
    xor %eax, %eax
    xor %edx, %edx
    wrmsr
    .endm

    .section .text.async_pf, "ax", @progbits
    "#,
    // A #PF: error code, RIP, CS, RFLAGS, RSP, SS on the stack.
    r#"
    .global page_fault
page_fault:
    push %rax
    area %rax
    cmpl $1, {flags}(%rax)
    jne not_ours
    testb $3, 24(%rsp)              # only in ring 3
    jz not_ours
    movl $0, {flags}(%rax)
    cmpl $1, {parkable}(%rax)
    jne again
    movl $0, {parkable}(%rax)
    push %rdx
    # The task goes on in park_upcall, as if it had called it with: the token, this area.
    mov 48(%rsp), %rdx
    sub $24, %rdx
    mov %rdx, 48(%rsp)
    mov %rax, 8(%rdx)
    mov %cr2, %rax
    mov %rax, (%rdx)
    mov 24(%rsp), %rax
    mov %rax, 16(%rdx)
    movq $park_upcall, 24(%rsp)
    pop %rdx
    pop %rax
    add $8, %rsp
    iretq
again:
    # What cannot be parked touches the page once more, and KVM makes it wait.
    pop %rax
    add $8, %rsp
    iretq
not_ours:
    pop %rax
    push $14
    jmp exception_common
    "#,
    // A #GP: in ring 3, the hlt of ring0_call makes one.
    r#"
    .global general_protection
general_protection:
    cmpq $ring0_call, 8(%rsp)
    je 1f
    push $13
    jmp exception_common
1:
    incq 8(%rsp)                    # behind the hlt
    cmp ${call_enable}, %rdi
    je 3f
    # Interrupts are off, so nothing comes between the look and the hlt.
    area %rax
    mov {head}(%rax), %ecx
    cmp {tail}(%rax), %ecx
    jne 2f
    sti
    hlt
    cli
2:
    add $8, %rsp
    iretq
3:
    orl $0x200, 24(%rsp)            # from now on with interrupts
    push %rbx
    mov %rsp, %rbx
    and $-16, %rsp
    call {enable}
    mov %rbx, %rsp
    pop %rbx
    add $8, %rsp
    iretq

    .global page_ready
page_ready:
    push %rax
    push %rcx
    push %rdx
    area %rdx
    mov {token}(%rdx), %eax
    test %eax, %eax
    jz 1f
    movl $0, {token}(%rdx)
    mov {tail}(%rdx), %ecx
    and ${ring_mask}, %ecx
    mov %eax, {ring}(%rdx,%rcx,4)
    incl {tail}(%rdx)
1:
    mov ${acknowledge}, %ecx
    mov $1, %eax
    xor %edx, %edx
    wrmsr
    end_of_interrupt
    pop %rdx
    pop %rcx
    pop %rax
    iretq

    .global timer_tick
timer_tick:
    push %rax
    push %rcx
    push %rdx
    area %rdx
    incl {ticks}(%rdx)
    end_of_interrupt
    pop %rdx
    pop %rcx
    pop %rax
    iretq
    "#,
    // Ring 3. On the stack: the token, the area, where the task was interrupted.
    r#"
park_upcall:
    pushfq
    push %rax
    push %rcx
    push %rdx
    push %rsi
    push %rdi
    push %r8
    push %r9
    push %r10
    push %r11
    push %rbx
    mov 88(%rsp), %rdi
    mov 96(%rsp), %rsi
    mov %rsp, %rbx
    and $-16, %rsp
    cld
    call {park}
    mov %rbx, %rsp
    mov 96(%rsp), %rsi
    movl $1, {parkable}(%rsi)
    pop %rbx
    pop %r11
    pop %r10
    pop %r9
    pop %r8
    pop %rdi
    pop %rsi
    pop %rdx
    pop %rcx
    pop %rax
    popfq
    lea 16(%rsp), %rsp
    ret

    .global ring0_call
ring0_call:
    hlt
    ret
    .text
    "#,
    stack_size_log2 = const entry::STACK_SIZE_LOG2,
    area_size_log2 = const AREA_SIZE_LOG2,
    areas = sym AREAS,
    flags = const core::mem::offset_of!(Area, flags),
    token = const core::mem::offset_of!(Area, token),
    head = const core::mem::offset_of!(Area, head),
    tail = const core::mem::offset_of!(Area, tail),
    ticks = const core::mem::offset_of!(Area, ticks),
    parkable = const core::mem::offset_of!(Area, parkable),
    ring = const core::mem::offset_of!(Area, ring),
    ring_mask = const RING - 1,
    call_enable = const CALL_ENABLE,
    acknowledge = const MSR_ACKNOWLEDGE,
    eoi = const X2APIC_EOI,
    enable = sym enable_in_ring0,
    park = sym park,
    options(att_syntax),
);

/// Asks CPUID whether there are such events. In ring 0, because a hypervisor that runs ring 3 natively may not see its CPUID.
pub(super) fn ask_cpuid() {
    let is_hypervised = __cpuid(1).ecx >> 31 != 0;
    let has_x2apic = __cpuid(1).ecx >> 21 & 1 != 0;
    if !is_hypervised || !has_x2apic {
        return;
    }
    let signature = __cpuid(LEAF_SIGNATURE);
    if [signature.ebx, signature.ecx, signature.edx] == SIGNATURE {
        let offered = __cpuid(LEAF_FEATURES).eax & FEATURES == FEATURES;
        OFFERED.store(offered, Ordering::Relaxed);
    }
}

/// Whether KVM offers such events.
pub(super) fn is_offered() -> bool {
    OFFERED.load(Ordering::Relaxed)
}

/// What belongs to a CPU.
pub(super) fn area(cpu: u64) -> &'static Area {
    &AREAS[cpu as usize]
}

impl Area {
    /// The next token that is ready.
    pub(super) fn next_ready(&self) -> Option<u32> {
        let head = self.head.load(Ordering::Relaxed);
        if head == self.tail.load(Ordering::Acquire) {
            return None;
        }
        let token = self.ring[head as usize % RING].load(Ordering::Relaxed);
        self.head.store(head.wrapping_add(1), Ordering::Release);
        Some(token)
    }

    /// A task begins its own work, or ends it.
    pub(super) fn set_parkable(&self, parkable: bool) {
        self.parkable.store(parkable.into(), Ordering::SeqCst);
    }

    /// Ticks of the clock so far.
    pub(super) fn ticks(&self) -> u32 {
        self.ticks.load(Ordering::Relaxed)
    }
}

/// Lets events and interrupts in, on this CPU and from now on.
pub(super) fn enable() {
    call_ring0(CALL_ENABLE);
}

/// Waits for an interrupt, unless there is a token that was not read.
pub(super) fn wait() {
    call_ring0(CALL_WAIT);
}

fn call_ring0(call: u64) {
    // SAFETY: ring 0 knows the call, keeps what the C ABI wants to be kept (all stacks are this CPU's), and comes back.
    unsafe { ring0_call(call) };
}

/// Ring 0, interrupts off, on a CPU with an x2APIC.
extern "C" fn enable_in_ring0() {
    let area = ptr::from_ref(area(entry::current_cpu())).addr() as u64;
    for mask in PIC_MASKS {
        // SAFETY: masks all lines of a legacy interrupt controller.
        unsafe { PortWriteOnly::<u8>::new(mask).write(0xff) };
    }
    // The interrupt before the area, and interrupts before events: as KVM wants it.
    let base = APIC_BASE;
    // SAFETY: MSRs of the local APIC, which every vector of the IDT is prepared for, and KVM's, which writes to the area only.
    unsafe {
        let mut msr = Msr::new(base);
        msr.write(msr.read() | APIC_ENABLE_X2APIC);
        for (msr, value) in [
            (X2APIC_LINT0, LVT_MASKED),
            (X2APIC_SPURIOUS, APIC_SOFTWARE_ENABLE | tables::SPURIOUS as u64),
            (X2APIC_TIMER, TIMER_PERIODIC | tables::TIMER as u64),
            (X2APIC_TIMER_DIVIDE, DIVIDE_BY_1),
            (X2APIC_TIMER_INITIAL, TIMER_PERIOD),
            (MSR_INTERRUPT, tables::PAGE_READY as u64),
            (MSR_ENABLE, area | ENABLE),
        ] {
            Msr::new(msr).write(value);
        }
    }
}

/// Ring 3, on the stack of the task that touched a page that is not present.
extern "C" fn park(token: u64, area: &Area) {
    stacks::park(area, token as u32);
}

/// Reads a byte of each page of the guest's own code and data, so that the scheduler does not have to wait for them later.
pub(super) fn touch_own_memory() {
    let (start, size) = entry::own_loaded_memory();
    for page in (start..start + size).step_by(guest::fingerprint::PAGE_SIZE) {
        // SAFETY: the guest's own memory, which is mapped; reading has no effect on it.
        unsafe {
            asm!("movb ({}), {}", in(reg) page, out(reg_byte) _, options(att_syntax, nostack, readonly));
        };
    }
}
