//! The built-in guest, started from a layout: with firmware from the reset vector, and without it at its entry.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{io::Read, thread};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm::{
    address_map::PAGE_SIZE,
    boot::{Kernel, Layout, LayoutConfig, ReadOnlyPages},
    devices::{Console, DeviceBus, EventLoop, SERIAL_IRQ},
    ending::Ending,
    kvm::{AsyncPageFaults, CpuModel, Exit, Host, Vcpu, Vm},
};
use vmm_sys_util::eventfd::EventFd;

/// Runs the built-in guest and returns how it ended and what it wrote.
fn run(command_line: Option<&str>, with_firmware: bool) -> (Ending, String) {
    let layout = Layout::build(&LayoutConfig {
        ram_size: 64 << 20,
        kernel: Kernel::BuiltIn,
        initramfs: None,
        command_line: command_line.map(str::to_owned),
    })
    .unwrap();
    let memory = load(&layout);
    let rom = ReadOnlyPages::builtin_rom().unwrap();
    let description = ReadOnlyPages::description(&layout.boot_info(), 1, false).unwrap();

    let host = Host::open().unwrap();
    let vm = Vm::new(&host).unwrap();
    // SAFETY: `memory`, `rom` and `description` are dropped after the VM and its vCPU.
    unsafe {
        let ram = memory.get_host_address(GuestAddress(0)).unwrap();
        vm.map(0, GuestAddress(0), ram, layout.ram().size(), false)
            .unwrap();
        for (slot, pages) in [(1, &rom), (2, &description)] {
            vm.map(
                slot,
                pages.guest_address(),
                pages.host_address(),
                pages.size(),
                true,
            )
            .unwrap();
        }
    }
    let mut event_loop = EventLoop::new().unwrap();
    let (output, sink) = rustix::pipe::pipe().unwrap();
    let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    vm.irqfd(&interrupt, SERIAL_IRQ).unwrap();
    let console = Console::new(None, sink, interrupt).unwrap();
    let bus = DeviceBus::new(console.serial(), None);
    event_loop.add(Box::new(console));
    let stopper = event_loop.stopper();
    let mut vcpu = Vcpu::new(
        &vm,
        0,
        &CpuModel::new(&host, 1, AsyncPageFaults::IfThere).unwrap(),
    )
    .unwrap();
    if !with_firmware {
        vcpu.enter_directly(&layout.boot_info()).unwrap();
    }
    let ending = thread::scope(|scope| {
        scope.spawn(move || {
            loop {
                if let Exit::Ended(ending) = vcpu.run(&bus) {
                    return stopper.end(ending);
                }
            }
        });
        event_loop.run().unwrap()
    });
    drop(event_loop);
    let mut text = String::new();
    std::fs::File::from(output).read_to_string(&mut text).unwrap();
    (ending, text)
}

/// RAM as the layout has it.
fn load(layout: &Layout) -> GuestMemoryMmap {
    let ranges: Vec<_> = layout
        .ram()
        .ranges()
        .map(|range| (range.guest, range.size as usize))
        .collect();
    let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let mut page = [0; PAGE_SIZE as usize];
    for (index, written) in layout.pages() {
        if written {
            layout.read_page(index, &mut page);
            let address = layout.ram().address_of(index * PAGE_SIZE).unwrap();
            memory.write_slice(&page, address).unwrap();
        }
    }
    memory
}

#[test]
fn the_guest_says_hello_with_and_without_firmware() {
    for with_firmware in [true, false] {
        let (ending, text) = run(None, with_firmware);
        assert_eq!(ending, Ending::GuestExit(0), "{text}");
        assert!(text.contains("hello"), "{text}");
    }
}
