//! An unmodified kernel of a distribution as a guest.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use tests::linux::{initramfs, kernel};
use tests::moving::{Instance, MODES, assert_migrated, guest_output};
use tests::need;
use tests::program::Program;
use tests::random::Random;
use tests::scratch::Scratch;
use tests::served::{served, socket};
use tests::server::Server;
use tests::vm::{FinishedVm, Vm};

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
            .memory("fill=sequential")
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

/// In every mode, while it checksums a file over and over: every sum is right, and neither of its clocks ever goes back.
#[test]
fn it_moves_while_it_works() {
    need!(kernel());
    let mut random = Random::seeded();
    let content: Vec<u8> = (0..16 * MIB / 8)
        .flat_map(|_| random.number().to_le_bytes())
        .collect();
    let linux = Linux::new(
        r#"
        while true; do
            sum=$(md5sum </content)
            echo "sum=${sum%% *} uptime=$(cut -d' ' -f1 /proc/uptime) time=$(date +%s)"
        done"#,
        &[("content", &content)],
    );
    let file = linux.scratch.file("content", &content);
    let expected = Program::new("/bin/busybox").arg("md5sum").arg(file).run();
    let expected = format!("sum={}", &expected.stdout[..32]);
    let image = linux.image("256M", COMMAND_LINE);
    let vm = Vm::from_image(&image)
        .memory("fill=sequential")
        .cpus(2)
        .patience(PATIENCE);
    let sums = |instance: &Instance| instance.guest_output().matches("sum=").count();
    let wait_for_more = |instance: &Instance| {
        let before = sums(instance);
        instance.wait_until("two more sums", |_| sums(instance) > before + 2);
    };
    let mut instance = Instance::running_until(vm, "sum=");
    let mut output = String::new();
    for mode in MODES {
        wait_for_more(&instance);
        let listen = format!("unix:{}", linux.scratch.path(mode).display());
        let next = Instance::waiting_with(Vm::arriving(&listen).patience(PATIENCE));
        let sent = instance.send(&next.url, &format!(",memory_mode={mode}")).finish();
        sent.assert_code(0);
        println!("{mode}: {}", sent.stdout.replace('\n', " "));
        let left = instance.finish();
        assert_migrated(&left, mode);
        output.push_str(&guest_output(&left.stdout));
        instance = next;
    }
    wait_for_more(&instance);
    output.push_str(&guest_output(&instance.stop().stdout));
    let whole = &output[..output.rfind('\n').unwrap()];
    let mut clocks = (0.0, 0);
    for line in whole.lines().filter(|line| line.starts_with("sum=")) {
        let words: Vec<&str> = line.trim().split(' ').collect();
        assert_eq!(words[0], expected, "{output}");
        let after = |word: &str, key: &str| word.strip_prefix(key).unwrap().to_owned();
        let uptime: f64 = after(words[1], "uptime=").parse().unwrap();
        let time: u64 = after(words[2], "time=").parse().unwrap();
        assert!(
            uptime >= clocks.0 && time >= clocks.1,
            "a clock went back\n{output}"
        );
        clocks = (uptime, time);
    }
}

#[test]
fn a_panic_ends_the_vm() {
    need!(kernel());
    let linux = Linux::new("echo c >/proc/sysrq-trigger\nsleep 600", &[]);
    let vm = linux.boot(kernel().unwrap()).option("--firmware", "none").run();
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
    let vm = linux.boot(vmlinux).run();
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
