//! vCPUs on the real KVM of this host, running a few instructions each.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use firmware::boot_info::{BootInfo, Protocol};
use kvm_bindings::{Msrs, kvm_msr_entry};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm::{
    boot::ReadOnlyPages,
    ending::Ending,
    kvm::{
        ASYNC_PF_ENABLE, ASYNC_PF_INTERRUPT, AsyncPageFaults, Bus, CpuModel, Exit, Host, ParavirtualMsrs,
        StateList, Vcpu, VcpuError, VcpuState, Vm, paravirtual_msrs,
    },
};

/// Where code goes, and RAM's size: one page of it for each purpose.
const CODE: u64 = 0x10_0000;
const RAM_SIZE: usize = 0x20_0000;

/// Remembers writes; a write to port 0xf4 ends the VM.
#[derive(Default)]
struct Recorder {
    writes: Mutex<Vec<(u16, Vec<u8>)>>,
    memory_writes: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl Bus for Recorder {
    fn read_port(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_port(&self, port: u16, data: &[u8]) -> Option<Ending> {
        self.writes.lock().unwrap().push((port, data.to_vec()));
        let mut code = [0; 4];
        code[..data.len()].copy_from_slice(data);
        (port == 0xf4).then_some(Ending::GuestExit(u32::from_le_bytes(code)))
    }

    fn write_memory(&self, address: GuestAddress, data: &[u8]) -> Option<Ending> {
        self.memory_writes
            .lock()
            .unwrap()
            .push((address.0, data.to_vec()));
        None
    }
}

struct Machine {
    // Dropped in this order: nothing that the guest sees goes before the VM.
    vcpus: Vec<Vcpu>,
    vm: Vm,
    memory: GuestMemoryMmap,
    _rom: Option<ReadOnlyPages>,
}

impl Machine {
    fn new(cpus: u32) -> Self {
        let host = Host::open().unwrap();
        let vm = Vm::new(&host).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM_SIZE)]).unwrap();
        let address = memory.get_host_address(GuestAddress(0)).unwrap();
        // SAFETY: `memory` is dropped after `vm` and is accessed through `vm-memory` only.
        unsafe { vm.map(0, GuestAddress(0), address, RAM_SIZE as u64, false) }.unwrap();
        let model = CpuModel::new(&host, cpus, AsyncPageFaults::IfThere).unwrap();
        let vcpus = (0..cpus)
            .map(|index| Vcpu::new(&vm, index, &model).unwrap())
            .collect();
        Self {
            vcpus,
            vm,
            memory,
            _rom: None,
        }
    }

    /// One vCPU that enters `code` without firmware.
    fn direct(protocol: Protocol, code: &[u8]) -> Self {
        let mut machine = Self::new(1);
        machine.memory.write_slice(code, GuestAddress(CODE)).unwrap();
        machine.write_page_tables();
        let boot = BootInfo {
            protocol,
            entry: CODE,
            argument: 0x1234_5678,
            page_table_root: if protocol == Protocol::LongMode { 0x1000 } else { 0 },
        };
        machine.vcpus[0].enter_directly(&boot).unwrap();
        machine
    }

    /// One vCPU that starts at the reset vector, 16 bytes before the end of a ROM.
    fn reset(code: &[u8]) -> Self {
        let mut rom = vec![0xf4; 4096];
        rom[4096 - 16..][..code.len()].copy_from_slice(code);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), rom).unwrap();
        let rom = ReadOnlyPages::rom_from_file(file.path()).unwrap();
        let machine = Self::new(1);
        // SAFETY: `rom` is moved into the machine and dropped after `vm`.
        unsafe {
            machine
                .vm
                .map(1, rom.guest_address(), rom.host_address(), rom.size(), true)
        }
        .unwrap();
        Self {
            _rom: Some(rom),
            ..machine
        }
    }

    /// The first GiB one to one.
    fn write_page_tables(&self) {
        const PRESENT_WRITABLE: u64 = 3;
        const LARGE: u64 = 1 << 7;
        let write = |value: u64, at| self.memory.write_obj(value, GuestAddress(at)).unwrap();
        write(0x2000 | PRESENT_WRITABLE, 0x1000);
        write(0x3000 | PRESENT_WRITABLE, 0x2000);
        for index in 0..512 {
            write(index << 21 | LARGE | PRESENT_WRITABLE, 0x3000 + index * 8);
        }
    }

    fn run(&mut self, bus: &dyn Bus) -> Ending {
        loop {
            if let Exit::Ended(ending) = self.vcpus[0].run(bus) {
                return ending;
            }
        }
    }
}

#[test]
fn pvh_entry_is_32_bit_with_the_argument_in_ebx() {
    // mov eax, ebx; out 0xf4, eax
    let mut machine = Machine::direct(Protocol::Pvh, &[0x89, 0xd8, 0xe7, 0xf4]);
    assert_eq!(machine.run(&Recorder::default()), Ending::GuestExit(0x1234_5678));
}

#[test]
fn long_mode_entry_is_64_bit_with_the_argument_in_rsi() {
    // mov rax, rsi; shl rax, 4; shr rax, 4; out 0xf4, eax: in 32-bit mode the prefix 0x48 would be `dec eax`.
    let code = [
        0x48, 0x89, 0xf0, 0x48, 0xc1, 0xe0, 0x04, 0x48, 0xc1, 0xe8, 0x04, 0xe7, 0xf4,
    ];
    let mut machine = Machine::direct(Protocol::LongMode, &code);
    assert_eq!(machine.run(&Recorder::default()), Ending::GuestExit(0x1234_5678));
}

#[test]
fn without_a_register_set_the_first_instruction_is_at_the_reset_vector() {
    // mov al, 7; out 0xf4, al
    let mut machine = Machine::reset(&[0xb0, 7, 0xe6, 0xf4]);
    assert_eq!(machine.run(&Recorder::default()), Ending::GuestExit(7));
}

#[test]
fn the_rom_cannot_be_written() {
    // mov byte cs:[0xff00], 0x55; mov al, cs:[0xff00]; out 0xf4, al. CS is at the ROM, and in real mode may be written.
    let mut machine = Machine::reset(&[
        0x2e, 0xc6, 0x06, 0x00, 0xff, 0x55, 0x2e, 0xa0, 0x00, 0xff, 0xe6, 0xf4,
    ]);
    let bus = Recorder::default();
    assert_eq!(machine.run(&bus), Ending::GuestExit(0xf4));
    assert_eq!(*bus.memory_writes.lock().unwrap(), [(0xffff_ff00, vec![0x55])]);
}

#[test]
fn ports_without_a_device_read_all_ones() {
    // mov dx, 0x1234; in ax, dx; out 0xf4, ax
    let mut machine = Machine::reset(&[0xba, 0x34, 0x12, 0xed, 0xe7, 0xf4]);
    assert_eq!(machine.run(&Recorder::default()), Ending::GuestExit(0xffff));
}

#[test]
fn a_string_instruction_is_as_many_accesses() {
    // mov esi, CODE + 0x100; mov ecx, 3; mov edx, 0x3f8; rep outsb; mov ecx, 2; rep outsw; out 0xf4, al
    let mut code = vec![
        0xbe, 0x00, 0x01, 0x10, 0x00, 0xb9, 3, 0, 0, 0, 0xba, 0xf8, 0x03, 0, 0,
    ];
    code.extend([0xf3, 0x6e, 0xb9, 2, 0, 0, 0, 0xf3, 0x66, 0x6f, 0xe6, 0xf4]);
    let mut machine = Machine::direct(Protocol::Pvh, &code);
    machine
        .memory
        .write_slice(b"abcdefg", GuestAddress(CODE + 0x100))
        .unwrap();
    let bus = Recorder::default();
    machine.run(&bus);
    let writes = bus.writes.lock().unwrap();
    let data: Vec<&[u8]> = writes[..writes.len() - 1]
        .iter()
        .map(|(_, data)| &data[..])
        .collect();
    assert_eq!(data, [&b"a"[..], b"b", b"c", b"de", b"fg"]);
    assert!(writes[..5].iter().all(|(port, _)| *port == 0x3f8));
}

#[test]
fn memory_without_a_device_reads_all_ones() {
    // mov eax, [0xd0000000]; out 0xf4, eax
    let mut machine = Machine::direct(Protocol::Pvh, &[0xa1, 0, 0, 0, 0xd0, 0xe7, 0xf4]);
    assert_eq!(machine.run(&Recorder::default()), Ending::GuestExit(u32::MAX));
}

#[test]
fn the_guest_sees_its_cpuid() {
    // mov eax, 0x40000010; cpuid; mov eax, ebx; out 0xf4, eax
    let code = [0xb8, 0x10, 0, 0, 0x40, 0x0f, 0xa2, 0x89, 0xd8, 0xe7, 0xf4];
    let mut machine = Machine::direct(Protocol::Pvh, &code);
    assert_eq!(machine.run(&Recorder::default()), Ending::GuestExit(1_000_000));
}

#[test]
fn an_exception_without_a_handler_is_a_triple_fault() {
    // lidt [CODE + 0x100], which is zero; ud2
    let mut machine = Machine::direct(
        Protocol::Pvh,
        &[0x0f, 0x01, 0x1d, 0x00, 0x01, 0x10, 0x00, 0x0f, 0x0b],
    );
    assert_eq!(machine.run(&Recorder::default()), Ending::TripleFault);
}

#[test]
fn executing_what_is_not_memory_is_an_error_that_says_where() {
    // mov eax, 0xd0000000; jmp eax
    let mut machine = Machine::direct(Protocol::Pvh, &[0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0]);
    let ending = machine.run(&Recorder::default());
    let Ending::Error(error @ VcpuError::Emulation { rip: 0xd000_0000, .. }) = ending else {
        panic!("{ending:?}");
    };
    let message = error.to_string();
    assert!(
        message.starts_with("vCPU 0: KVM cannot emulate the instruction at 0xd0000000"),
        "{message}"
    );
}

/// `jmp` to itself, and `hlt` without interrupts: a vCPU that does not return by itself, running and sleeping.
const SPIN: [u8; 2] = [0xeb, 0xfe];
const SLEEP: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];

/// What a vCPU's thread is asked for, and has done.
#[derive(Default)]
struct Requests {
    asked: AtomicU32,
    served: AtomicU32,
    stop: AtomicBool,
}

/// Runs the vCPU until it is asked to stop; serves requests whenever it is interrupted.
fn serve(vcpu: &mut Vcpu, requests: &Requests) {
    let kick = vcpu.kick_handle();
    let _attached = kick.attach().unwrap();
    while !requests.stop.load(Ordering::SeqCst) {
        match vcpu.run(&Recorder::default()) {
            Exit::Ended(ending) => panic!("{ending:?}"),
            Exit::Interrupted => requests
                .served
                .store(requests.asked.load(Ordering::SeqCst), Ordering::SeqCst),
            Exit::Continue => {}
        }
    }
}

/// Waits in this thread for what happens in another one, which is left behind if it takes too long.
fn wait_for(what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed() < Duration::from_secs(10), "a kick was missed");
        thread::yield_now();
    }
}

#[test]
fn no_kick_is_missed() {
    for code in [&SPIN[..], &SLEEP] {
        let mut machine = Machine::direct(Protocol::Pvh, code);
        let kick = machine.vcpus[0].kick_handle();
        let requests = Arc::new(Requests::default());
        let thread = thread::spawn({
            let requests = Arc::clone(&requests);
            move || serve(&mut machine.vcpus[0], &requests)
        });
        for request in 1..=2000 {
            requests.asked.store(request, Ordering::SeqCst);
            kick.kick();
            wait_for(|| requests.served.load(Ordering::SeqCst) == request);
        }
        requests.stop.store(true, Ordering::SeqCst);
        kick.kick();
        wait_for(|| thread.is_finished());
        thread.join().unwrap();
    }
}

#[test]
fn a_kick_before_the_run_is_not_forgotten() {
    let mut machine = Machine::direct(Protocol::Pvh, &SPIN);
    machine.vcpus[0].kick_handle().kick();
    let thread = thread::spawn(move || machine.vcpus[0].run(&Recorder::default()));
    wait_for(|| thread.is_finished());
    assert_eq!(thread.join().unwrap(), Exit::Interrupted);
}

#[test]
fn a_vcpu_that_waits_to_be_started_can_be_kicked() {
    let mut machine = Machine::new(2);
    let kick = machine.vcpus[1].kick_handle();
    let thread = thread::spawn(move || {
        let kick = machine.vcpus[1].kick_handle();
        let _attached = kick.attach().unwrap();
        machine.vcpus[1].run(&Recorder::default())
    });
    thread::sleep(Duration::from_millis(50));
    assert!(!thread.is_finished(), "it waits");
    kick.kick();
    wait_for(|| thread.is_finished());
    assert_eq!(thread.join().unwrap(), Exit::Interrupted);
}

#[test]
fn a_kick_outlives_its_vcpu_and_its_thread() {
    let mut machine = Machine::direct(Protocol::Pvh, &SLEEP);
    let vcpu = machine.vcpus.remove(0);
    let kick = vcpu.kick_handle();
    thread::spawn(move || drop(vcpu.kick_handle().attach().unwrap()))
        .join()
        .unwrap();
    kick.kick();
}

/// The state of asynchronous page faults goes from one vCPU to another, and the guest there is told to look for all its pages again.
#[test]
fn restored_async_page_faults_wake_all() {
    const AREA: u64 = 0x8000;
    const APIC_SPURIOUS: usize = 0xf0;
    let msrs = paravirtual_msrs(&Host::open().unwrap()).unwrap();
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let first = Machine::new(1);
    let values = [
        entry(ASYNC_PF_INTERRUPT, 32),
        entry(ASYNC_PF_ENABLE, AREA | 1 | 8),
    ];
    let written = first.vcpus[0]
        .fd()
        .set_msrs(&Msrs::from_entries(&values).unwrap())
        .unwrap();
    assert_eq!(written, 2);
    let saved = ParavirtualMsrs::save(first.vcpus[0].fd(), &msrs).unwrap();
    drop(first);
    assert_eq!(saved.get(ASYNC_PF_INTERRUPT), Some(32));
    assert_eq!(saved.get(ASYNC_PF_ENABLE), Some(AREA | 1 | 8));

    // mov eax, [AREA + 4]; out 0xf4, eax
    let code = [0xa1, 0x04, 0x80, 0, 0, 0xe7, 0xf4];
    let mut second = Machine::direct(Protocol::Pvh, &code);
    let vcpu = second.vcpus[0].fd();
    let mut apic = vcpu.get_lapic().unwrap();
    apic.regs[APIC_SPURIOUS] = 0xff_u8.cast_signed();
    apic.regs[APIC_SPURIOUS + 1] = 1;
    vcpu.set_lapic(&apic).unwrap();
    saved.restore(vcpu).unwrap();
    assert_eq!(ParavirtualMsrs::save(vcpu, &msrs).unwrap(), saved);
    assert_eq!(second.run(&Recorder::default()), Ending::GuestExit(u32::MAX));
}

/// Of the memory types, which KVM holds and does not list, nothing is lost. And nothing is written to guest memory by a restore: the
/// guest asked once to have the wall clock written there, and what it has there now is its own.
#[test]
fn memory_types_are_restored_and_the_wall_clock_is_not_written_again() {
    const OLD_WALL_CLOCK: u32 = 0x11;
    const WALL_CLOCK: u32 = 0x4b56_4d00;
    const MEMORY_TYPES: [(u32, u64); 5] = [
        // A pair: base with type, and mask with the bit that makes it count.
        (0x204, 0x8000_0000 | 6),
        (0x205, 0xf_c000_0000 | 1 << 11),
        (0x250, 0x0606_0606_0606_0606),
        (0x26f, 0x0505_0505_0505_0505),
        (0x2ff, 6 | 1 << 11 | 1 << 10),
    ];
    let host = Host::open().unwrap();
    let list = StateList::new(&host).unwrap();
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    // Which version, seconds and nanoseconds.
    let clocks = [GuestAddress(0x8000), GuestAddress(0x9000)];
    let written =
        |machine: &Machine| clocks.map(|clock| machine.memory.read_obj::<[u32; 3]>(clock).unwrap() != [0; 3]);

    let first = Machine::new(1);
    let fd = first.vcpus[0].fd();
    let mut values: Vec<_> = MEMORY_TYPES.map(|(msr, value)| entry(msr, value)).to_vec();
    values.extend([entry(OLD_WALL_CLOCK, clocks[0].0), entry(WALL_CLOCK, clocks[1].0)]);
    let done = fd.set_msrs(&Msrs::from_entries(&values).unwrap()).unwrap();
    assert_eq!(done, values.len());
    assert_eq!(written(&first), [true; 2]);
    let saved = VcpuState::save(&first.vcpus[0], &list).unwrap();
    let saved = serde_json::to_string(&saved).unwrap();
    drop(first);

    let second = Machine::new(1);
    let state: VcpuState = serde_json::from_str(&saved).unwrap();
    state.restore(&second.vcpus[0], &list).unwrap();
    assert_eq!(written(&second), [false; 2], "guest memory was written to");
    let mut values = Msrs::from_entries(&MEMORY_TYPES.map(|(msr, _)| entry(msr, 0))).unwrap();
    let done = second.vcpus[0].fd().get_msrs(&mut values).unwrap();
    assert_eq!(done, MEMORY_TYPES.len());
    let found: Vec<_> = values
        .as_slice()
        .iter()
        .map(|entry| (entry.index, entry.data))
        .collect();
    assert_eq!(found, MEMORY_TYPES);
}
