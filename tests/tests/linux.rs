//! An unmodified kernel of a distribution as a guest.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;
use tests::api::Api;
use tests::linux::{initramfs, kernel, modules};
use tests::need;
use tests::program::Program;
use tests::random::Random;
use tests::scratch::Scratch;
use tests::served::{served, socket};
use tests::server::Server;
use tests::vm::{FinishedVm, Vm};
use ummunotify::service::{Client, ClientOptions};
use ummunotify::{AddressRange, Cookie};

/// What ends it when it hangs. Each page is a fault of one to three milliseconds on an emulated CPU, and there are tens of
/// thousands.
const PATIENCE: Duration = Duration::from_mins(4);

const MIB: usize = 1 << 20;

/// Errors alone are printed, or lines of a test would have messages of the kernel in them.
const COMMAND_LINE: &str = "console=ttyS0 quiet";

/// A directory with the kernel's initramfs, and its image.
struct Linux {
    scratch: Scratch,
    initramfs: PathBuf,
}

impl Linux {
    fn new(setup: &str, files: &[(&str, &[u8])]) -> Self {
        let scratch = Scratch::new();
        let initramfs = scratch.file("initramfs", &initramfs(setup, files));
        Self { scratch, initramfs }
    }

    fn image(&self, memory: &str, command_line: &str) -> PathBuf {
        let created = self
            .scratch
            .create("image", memory)
            .args(["--cmdline", command_line, "--kernel"])
            .arg(kernel().unwrap())
            .arg("--initramfs")
            .arg(&self.initramfs)
            .patience(PATIENCE)
            .run();
        created.assert_code(0);
        fs::remove_file(&self.initramfs).unwrap();
        self.scratch.path("image")
    }

    /// Without an image.
    fn boot(&self, kernel: PathBuf) -> Vm {
        Vm::with_memory("256M")
            .option("--kernel", kernel)
            .option("--initramfs", &self.initramfs)
            .command_line(COMMAND_LINE)
            .patience(PATIENCE)
    }
}

#[track_caller]
fn assert_ended(vm: &FinishedVm, outcome: &str, code: i32) {
    vm.assert_code(code);
    let report = vm.report();
    assert_eq!(report.text("/outcome"), outcome, "{report}");
    report.assert_sound();
}

/// The number behind `key` at the start of a line.
#[track_caller]
fn number(vm: &FinishedVm, key: &str) -> u64 {
    let line = vm.line(key);
    line[key.len()..]
        .trim()
        .parse()
        .unwrap_or_else(|error| panic!("{line}: {error}"))
}

/// From the first page to the last, nothing is there before it is touched; and what is touched in user space, where Linux takes
/// async page faults, comes by one.
#[test]
fn all_of_its_ram_comes_lazily() {
    need!(kernel());
    let mut random = Random::seeded();
    let content: Vec<u8> = (0..64 * MIB / 8)
        .flat_map(|_| random.number().to_le_bytes())
        .collect();
    let linux = Linux::new(
        r#"
        # "HYP: N", where N counts on this CPU the interrupts by which KVM says that pages are there.
        ready() { sed -n 's/^ *HYP: *\([0-9]*\) .*/\1/p' /proc/interrupts; }
        before=$(ready)
        # Memory that Linux was told to leave alone, and has not touched. devmem maps it, and reads in user mode.
        page=0
        while [ $page -lt 100 ]; do
            devmem $((0x8000000 + page * 4096)) >/dev/null || echo devmem_failed
            page=$((page + 1))
        done
        echo async_page_faults=$(($(ready) - before))
        echo cpus=$(nproc)
        echo clock=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
        echo sum=$(sha256sum </content)
        poweroff -f"#,
        &[("content", &content)],
    );
    let file = linux.scratch.file("content", &content);
    let image = linux.image("256M", &format!("{COMMAND_LINE} memmap=4M$0x8000000"));
    let vm = Vm::from_image(&image).patience(PATIENCE).run();
    assert_ended(&vm, "poweroff", 0);
    let expected = Program::new("/bin/busybox").args(["sha256sum"]).arg(file).run();
    assert_eq!(
        vm.line("sum=")["sum=".len()..][..64],
        expected.stdout[..64],
        "{}",
        vm.stdout
    );
    assert_eq!(number(&vm, "cpus="), 1);
    assert_eq!(vm.line("clock="), "clock=kvm-clock");
    // KVM may not send one, for example while an interrupt is pending; the vCPU waits then.
    assert!(number(&vm, "async_page_faults=") > 50, "{}", vm.stdout);
    let report = vm.report();
    // All of the content at least, and each page by itself.
    assert!(report.count("/pages/demand") > 64 * 256, "{report}");
    assert_eq!(report.count("/pages/prefetched"), 0, "{report}");
    assert!(report.count("/demand_fault_us/count") > 64 * 256, "{report}");
}

#[test]
fn a_shell_runs_on_the_serial_console_and_switches_the_machine_off() {
    need!(kernel());
    let linux = Linux::new("", &[]);
    let image = linux.image("256M", COMMAND_LINE);
    let (input, mut keyboard) = io::pipe().unwrap();
    let vm = Vm::from_image(&image)
        .memory("fill=near-faults")
        .cpus(2)
        .patience(PATIENCE)
        .start_with(|program| program.stdin(input));
    vm.wait_for_output("/ # ");
    writeln!(keyboard, "echo cpus=$(nproc) sum=$((6 * 7))").unwrap();
    vm.wait_for_output("cpus=2 sum=42");
    writeln!(keyboard, "poweroff").unwrap();
    assert_ended(&vm.finish(), "poweroff", 0);
}

#[test]
fn it_boots_from_a_page_server_and_resets() {
    need!(kernel());
    let linux = Linux::new("echo cpus=$(nproc)\nreboot -f", &[]);
    let image = linux.image("256M", COMMAND_LINE);
    let server = Server::start(&socket(&linux.scratch), &[("linux", &image)]);
    let vm = served(&[server.url()])
        .memory("fill=near-faults")
        .cpus(2)
        .patience(PATIENCE)
        .run();
    assert_ended(&vm, "reset", 65);
    assert_eq!(number(&vm, "cpus="), 2);
    server.stop();
}

#[test]
fn a_panic_ends_the_vm() {
    need!(kernel());
    let linux = Linux::new("echo c >/proc/sysrq-trigger\nsleep 600", &[]);
    let vm = linux
        .boot(kernel().unwrap())
        .memory("fill=sequential")
        .option("--firmware", "none")
        .run();
    assert_ended(&vm, "reset", 65);
    assert!(
        vm.stdout
            .contains("Kernel panic - not syncing: sysrq triggered crash"),
        "{}",
        vm.stdout
    );
}

/// The same kernel as an ELF file, as it is inside the bzImage.
#[test]
fn an_elf_kernel_boots_by_pvh() {
    need!(kernel());
    let linux = Linux::new("echo command_line=$(cat /proc/cmdline)\npoweroff -f", &[]);
    let vmlinux = linux
        .scratch
        .file("vmlinux", &uncompressed(&fs::read(kernel().unwrap()).unwrap()));
    let vm = linux.boot(vmlinux).memory("fill=sequential").run();
    assert_ended(&vm, "poweroff", 0);
    assert_eq!(
        vm.line("command_line="),
        format!("command_line=panic=-1 {COMMAND_LINE}")
    );
}

/// The payload of a bzImage (`Documentation/arch/x86/boot.rst`) in the format of `lz4 -l`, which Debian's kernels have: a magic
/// number, then blocks of at most 8 MiB, each behind its compressed size. At the payload's end is its uncompressed size.
fn uncompressed(bzimage: &[u8]) -> Vec<u8> {
    let word = |at: usize| u32::from_le_bytes(bzimage[at..at + 4].try_into().unwrap()) as usize;
    let start = (usize::from(bzimage[0x1f1]) + 1) * 512 + word(0x248);
    let end = start + word(0x24c) - 4;
    assert_eq!(word(start), 0x184c_2102, "another compression than lz4");
    let mut kernel = Vec::with_capacity(word(end));
    let mut at = start + 4;
    while at < end {
        let block = &bzimage[at + 4..at + 4 + word(at)];
        kernel.extend(lz4_flex::block::decompress(block, 8 * MIB).unwrap());
        at += 4 + word(at);
    }
    assert_eq!(kernel.len(), word(end));
    kernel
}

/// Its own driver finds the balloon by ACPI, gives pages back when it is asked to, reports those that are free, and goes on with
/// all of them.
#[test]
fn it_gives_pages_back_by_its_balloon() {
    const SIZE: u64 = 64 << 20;
    const DRIVERS: [&str; 4] = ["virtio_ring", "virtio", "virtio_mmio", "virtio_balloon"];
    need!(kernel());
    need!(modules("drivers/virtio", &DRIVERS));
    let drivers = modules("drivers/virtio", &DRIVERS).unwrap();
    let files: Vec<(&str, &[u8])> = drivers
        .iter()
        .map(|(name, content)| (name.as_str(), content.as_slice()))
        .collect();
    let linux = Linux::new(
        r"
        total() { sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo; }
        before=$(total)
        for driver in virtio_ring virtio virtio_mmio virtio_balloon; do insmod /$driver.ko || echo no_driver=$driver; done
        echo device=$(cat /sys/bus/virtio/devices/virtio0/device)
        while [ $(total) -gt $((before - 60000)) ]; do usleep 50000; done
        echo inflated
        while [ $(total) -lt $((before - 1000)) ]; do usleep 50000; done
        # All of it is used again.
        dd if=/dev/zero of=/filled bs=1M count=100 2>/dev/null
        echo sum=$(sha256sum </filled)
        poweroff -f",
        &files,
    );
    let scratch = Scratch::new();
    let socket = scratch.path("invalidations");
    let vm = linux
        .boot(kernel().unwrap())
        .memory("fill=off")
        .option("--balloon", "size=0,free-page-reporting=on")
        .option("--invalidations", format!("socket={}", socket.display()));
    let (vm, api) = Api::start(vm);
    let mut watcher = Client::connect(&socket, ClientOptions::default()).unwrap();
    watcher.register(AddressRange::ALL, Cookie(1)).unwrap();
    vm.wait_for_output("device=");
    assert!(vm.stdout().contains("device=0x0005"), "{}", vm.stdout());
    let balloon = |key: &str| api.info()["balloon"][key].as_u64().unwrap_or(0);
    vm.wait_until("free pages are reported", |_| balloon("reported") > 0);
    let reported = watcher.counter().load();
    assert!(reported > 0);
    let resize = |size: u64| {
        let body = json!({ "desired_balloon": size }).to_string();
        let reply = api.ask("PUT", "/api/v1/vm.resize", body.as_bytes());
        assert_eq!(reply.status, 204, "{reply:?}");
    };
    resize(SIZE);
    vm.wait_for_output("inflated");
    vm.wait_until("the balloon holds what it is to", |_| balloon("actual") == SIZE);
    assert!(balloon("inflated") >= SIZE);
    assert!(api.info()["pages"]["removed"].as_u64().unwrap() * 4096 >= SIZE);
    assert!(watcher.counter().load() > reported);
    resize(0);
    let vm = vm.finish();
    vm.assert_code(0);
    assert_eq!(vm.report().text("/outcome"), "poweroff");
    let zeros = Program::new("/bin/busybox")
        .args([
            "sh",
            "-c",
            "dd if=/dev/zero bs=1M count=100 2>/dev/null | sha256sum",
        ])
        .run();
    assert_eq!(
        vm.line("sum=")["sum=".len()..][..64],
        zeros.stdout[..64],
        "{}",
        vm.stdout
    );
}
