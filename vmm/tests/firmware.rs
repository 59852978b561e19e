//! The firmware on a real vCPU: from the reset vector to both kinds of entry, and to each of its refusals.
//!
//! The vCPU is as KVM_CREATE_VCPU made it; no register is set.

#![allow(clippy::unwrap_used)] // The helpers of a test are tests too.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use firmware::boot_info::{self, BootInfo, Protocol, offset};
use firmware::{EXIT_PORT, ROM_ADDRESS, Refusal, SERIAL_PORT};
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, kvm_regs, kvm_sregs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

/// As `vmm::boot` has it; the build script tells tests as well where it is.
const ROM: &[u8; firmware::ROM_SIZE] = include_bytes!(env!("UMEM_FIRMWARE_ROM"));

const PAGE_SIZE: usize = 4096;
const RAM_PAGES: usize = 16;

/// Where the test's own code lies.
const CODE: u64 = 0x1000;
const PAGE_TABLES: u64 = 0x2000;

/// Far more exits than the longest message takes.
const MAX_EXITS: usize = 1000;
const TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Clone)]
#[repr(align(4096))]
struct Page([u8; PAGE_SIZE]);

/// What a run of the machine came to.
struct Outcome {
    serial: String,
    /// What was written to the exit port until the vCPU halted.
    exit_codes: Vec<u32>,
    /// The state at the first of those writes.
    regs: kvm_regs,
    sregs: kvm_sregs,
}

struct Machine {
    ram: Vec<Page>,
    boot_info: Vec<Page>,
    has_cpuid: bool,
}

impl Machine {
    fn new(boot_info: BootInfo) -> Self {
        Self {
            ram: vec![Page([0; PAGE_SIZE]); RAM_PAGES],
            boot_info: vec![Page(boot_info.to_page())],
            has_cpuid: true,
        }
    }

    fn with_code(mut self, code: &[u8]) -> Self {
        self.write(CODE, code);
        self
    }

    fn write(&mut self, address: u64, bytes: &[u8]) {
        let page = &mut self.ram[address as usize / PAGE_SIZE].0;
        let at = address as usize % PAGE_SIZE;
        page[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// The first 2 MiB and the last 2 MiB below 4 GiB one to one, and nothing between.
    fn with_page_tables(mut self) -> Self {
        const PRESENT_WRITABLE: u64 = 3;
        const LARGE: u64 = 1 << 7;
        let [pdpt, low, high] = [1, 2, 3].map(|page| PAGE_TABLES + page * PAGE_SIZE as u64);
        for (table, index, entry) in [
            (PAGE_TABLES, 0, pdpt),
            (pdpt, 0, low),
            (pdpt, 3, high),
            (low, 0, LARGE),
            (high, 511, 0xffe0_0000 | LARGE),
        ] {
            self.write(table + index * 8, &(entry | PRESENT_WRITABLE).to_le_bytes());
        }
        self
    }

    /// Runs until the vCPU halts.
    fn run(self) -> Box<Outcome> {
        let (sender, receiver) = mpsc::channel();
        // In a thread of its own, because a firmware that goes astray need not come back.
        thread::spawn(move || sender.send(Box::new(self.run_here())));
        receiver.recv_timeout(TIMEOUT).expect("the vCPU halts")
    }

    fn run_here(mut self) -> Outcome {
        let kvm = Kvm::new().expect("/dev/kvm opens");
        let vm = kvm.create_vm().unwrap();
        vm.set_tss_address(0xfffb_d000).unwrap();
        let mut rom = vec![Page(*ROM)];
        add_slot(&vm, 0, 0, &mut self.ram, 0);
        add_slot(&vm, 1, boot_info::ADDRESS, &mut self.boot_info, KVM_MEM_READONLY);
        add_slot(&vm, 2, ROM_ADDRESS, &mut rom, KVM_MEM_READONLY);
        let vcpu = vm.create_vcpu(0).unwrap();
        if self.has_cpuid {
            let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
            vcpu.set_cpuid2(&cpuid).unwrap();
        }
        let outcome = run_until_halt(vcpu);
        // Until here the guest had this memory.
        drop((vm, self, rom));
        outcome
    }
}

fn add_slot(vm: &VmFd, slot: u32, guest_address: u64, pages: &mut [Page], flags: u32) {
    let region = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: guest_address,
        memory_size: (pages.len() * PAGE_SIZE) as u64,
        userspace_addr: pages.as_mut_ptr() as u64,
    };
    // SAFETY: the pages outlive the VM, and nothing else looks at them while it runs.
    unsafe { vm.set_user_memory_region(region).unwrap() };
}

fn run_until_halt(mut vcpu: VcpuFd) -> Outcome {
    let mut outcome = Outcome {
        serial: String::new(),
        exit_codes: Vec::new(),
        regs: kvm_regs::default(),
        sregs: kvm_sregs::default(),
    };
    for _ in 0..MAX_EXITS {
        match vcpu.run().unwrap() {
            VcpuExit::IoOut(SERIAL_PORT, data) => {
                outcome.serial.extend(data.iter().map(|&byte| char::from(byte)));
            }
            VcpuExit::IoOut(EXIT_PORT, data) => {
                let code = u32::from_le_bytes(data.try_into().expect("exit codes have 32 bits"));
                outcome.exit_codes.push(code);
                if outcome.exit_codes.len() == 1 {
                    outcome.regs = vcpu.get_regs().unwrap();
                    outcome.sregs = vcpu.get_sregs().unwrap();
                }
            }
            VcpuExit::Hlt => return outcome,
            other => panic!("unexpected exit {other:?} after {:?}", outcome.serial),
        }
    }
    panic!("no end after {MAX_EXITS} exits and {:?}", outcome.serial);
}

fn pvh() -> BootInfo {
    BootInfo {
        protocol: Protocol::Pvh,
        entry: CODE,
        argument: 0x89ab_cdef,
        page_table_root: 0,
    }
}

fn long_mode() -> BootInfo {
    BootInfo {
        protocol: Protocol::LongMode,
        entry: CODE,
        argument: 0x1234_5678_9abc_def0,
        page_table_root: PAGE_TABLES,
    }
}

const INTERRUPTS_TRAP_AND_VM86: u64 = 1 << 9 | 1 << 8 | 1 << 17;

#[test]
fn pvh_entry_is_reached_in_the_state_that_xen_describes() {
    // mov eax, ebx; out 0xf4, eax; hlt
    let outcome = Machine::new(pvh())
        .with_code(&[0x89, 0xd8, 0xe7, 0xf4, 0xf4])
        .run();
    assert_eq!(outcome.serial, "");
    assert_eq!(outcome.exit_codes, [0x89ab_cdef]);
    let sregs = outcome.sregs;
    // ET is always set; the other writable bits are clear.
    assert_eq!(sregs.cr0 & !(1 << 4), 1, "CR0.PE alone");
    assert_eq!((sregs.cr4, sregs.efer), (0, 0));
    assert_eq!(outcome.regs.rflags & INTERRUPTS_TRAP_AND_VM86, 0);
    assert_eq!(
        (sregs.cs.base, sregs.cs.limit, sregs.cs.db, sregs.cs.l),
        (0, u32::MAX, 1, 0)
    );
    for data in [sregs.ds, sregs.es, sregs.ss] {
        assert_eq!((data.base, data.limit, data.type_ & 2), (0, u32::MAX, 2));
    }
    // A busy 32-bit TSS.
    assert_eq!((sregs.tr.base, sregs.tr.type_), (0, 11));
}

#[test]
fn long_mode_entry_is_reached_in_the_state_that_linux_describes() {
    // mov rax, rsi; out 0xf4, eax; shr rax, 32; out 0xf4, eax; hlt
    let code = [
        0x48, 0x89, 0xf0, 0xe7, 0xf4, 0x48, 0xc1, 0xe8, 0x20, 0xe7, 0xf4, 0xf4,
    ];
    let outcome = Machine::new(long_mode())
        .with_code(&code)
        .with_page_tables()
        .run();
    assert_eq!(outcome.serial, "");
    assert_eq!(outcome.exit_codes, [0x9abc_def0, 0x1234_5678]);
    let sregs = outcome.sregs;
    assert_eq!(sregs.efer & (1 << 8 | 1 << 10), 1 << 8 | 1 << 10, "LME and LMA");
    assert_eq!(sregs.cr0 & (1 << 31 | 1), 1 << 31 | 1);
    assert_eq!(sregs.cr3, PAGE_TABLES);
    assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.cs.db), (0x10, 1, 0));
    for data in [sregs.ds, sregs.es, sregs.ss] {
        assert_eq!(data.selector, 0x18);
    }
    assert_eq!(outcome.regs.rflags & INTERRUPTS_TRAP_AND_VM86, 0);
}

/// What the firmware makes of a page with `bytes` at offset `at` instead of what belongs there.
fn refusal(boot_info: BootInfo, at: usize, bytes: &[u8]) -> (String, Vec<u32>) {
    let mut machine = Machine::new(boot_info);
    machine.boot_info[0].0[at..at + bytes.len()].copy_from_slice(bytes);
    let outcome = machine.run();
    (outcome.serial, outcome.exit_codes)
}

fn refused(refusal: Refusal) -> (String, Vec<u32>) {
    (format!("{}\n", refusal.message()), vec![refusal as u32])
}

#[test]
fn a_page_that_makes_no_sense_is_refused_with_a_message() {
    let high = &0x1_0000_0000_u64.to_le_bytes();
    for (boot_info, at, bytes, expected) in [
        (pvh(), offset::MAGIC, b"V".as_slice(), Refusal::BadMagic),
        (pvh(), offset::MAGIC + 7, b"T", Refusal::BadMagic),
        (pvh(), offset::VERSION, &[2], Refusal::BadVersion),
        (pvh(), offset::PROTOCOL, &[0], Refusal::BadProtocol),
        (pvh(), offset::PROTOCOL, &[3], Refusal::BadProtocol),
        (pvh(), offset::ENTRY, high, Refusal::BadAddress),
        (pvh(), offset::ARGUMENT, high, Refusal::BadAddress),
        (long_mode(), offset::PAGE_TABLE_ROOT, high, Refusal::BadAddress),
    ] {
        assert_eq!(refusal(boot_info, at, bytes), refused(expected), "{at} {bytes:?}");
    }
    assert_eq!(
        refusal(pvh(), offset::MAGIC, &[0; 8]).0,
        "firmware: bad magic in the boot-information page\n"
    );
}

#[test]
fn a_cpu_without_long_mode_is_refused_with_a_message() {
    let mut machine = Machine::new(long_mode()).with_page_tables();
    machine.has_cpuid = false;
    let outcome = machine.run();
    assert_eq!((outcome.serial, outcome.exit_codes), refused(Refusal::NoLongMode));
}
