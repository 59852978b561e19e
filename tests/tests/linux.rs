//! An unmodified kernel of a distribution as a guest.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::process::Signal;
use serde_json::json;
use tests::api::Api;
use tests::linux::{initramfs, kernel, modules};
use tests::moving::{Instance, MODES, assert_migrated, guest_output};
use tests::need;
use tests::program::{Program, Running};
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

/// What the guest of the next test says over and over: which time it is the how-many-th, what its clocks say, and the checksum
/// of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tick {
    number: u64,
    /// `CLOCK_MONOTONIC`, in nanoseconds.
    monotonic: u64,
    /// `CLOCK_BOOTTIME`, in hundredths of a second.
    boottime: u64,
    /// The wall clock, in seconds since 1970.
    wall: u64,
}

/// The ticks of which the whole line is there.
fn ticks(stdout: &str, sum: &str) -> Vec<Tick> {
    let whole = &stdout[..stdout.rfind('\n').map_or(0, |end| end + 1)];
    // The first of a restored guest may be the end of a line that began before.
    let lines = whole.lines().filter_map(|line| line.strip_prefix("tick="));
    let tick = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [number, monotonic, boottime, wall, found] = words[..] else {
            panic!("a tick is '{line}'\n{stdout}");
        };
        assert_eq!(found, sum, "the checksum is wrong: {line}");
        Tick {
            number: number.parse().unwrap(),
            monotonic: monotonic.parse().unwrap(),
            boottime: boottime.replace('.', "").parse().unwrap(),
            wall: wall.parse().unwrap(),
        }
    };
    lines.map(tick).collect()
}

/// Checks that nothing was left out and that no clock went back.
#[track_caller]
fn assert_in_order(ticks: &[Tick]) {
    for two in ticks.windows(2) {
        let (one, next) = (two[0], two[1]);
        assert_eq!(next.number, one.number + 1, "{ticks:#?}");
        assert_not_before(one, next);
    }
}

#[track_caller]
fn assert_not_before(one: Tick, next: Tick) {
    assert!(next.monotonic > one.monotonic, "{one:?} {next:?}");
    assert!(next.boottime >= one.boottime, "{one:?} {next:?}");
    assert!(next.wall >= one.wall, "{one:?} {next:?}");
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// A guest that computes is snapshotted at moments that nobody chose; it goes on where it was, here and where it is restored,
/// and all of its clocks say what time it is.
#[test]
fn a_snapshot_keeps_what_it_computes_and_its_clocks_right() {
    need!(kernel());
    let mut random = Random::seeded();
    let content: Vec<u8> = (0..MIB / 8).flat_map(|_| random.number().to_le_bytes()).collect();
    let linux = Linux::new(
        r"
        number=0
        while true; do
            number=$((number + 1))
            sum=$(sha256sum </content)
            monotonic=$(sed -n 's/^now at \([0-9]*\) nsecs$/\1/p; 4q' /proc/timer_list)
            read boottime idle </proc/uptime
            echo tick=$number $monotonic $boottime $(date +%s) ${sum%% *}
        done",
        &[("content", &content)],
    );
    let file = linux.scratch.file("content", &content);
    let sum = Program::new("/bin/busybox")
        .arg("sha256sum")
        .arg(file)
        .run()
        .stdout[..64]
        .to_owned();
    let image = linux.image("256M", COMMAND_LINE);
    let wait_for_ticks = |vm: &Running, count| {
        vm.wait_until("the guest computes", |vm| {
            ticks(&vm.stdout(), &sum).len() >= count
        });
    };

    let (vm, api) = Api::start(Vm::from_image(&image).cpus(2).patience(PATIENCE));
    wait_for_ticks(&vm, 2);
    let snapshot = |name: &str, then: &str| {
        let directory = linux.scratch.path(name);
        let made = api.ctl(&[
            "snapshot",
            &format!("destination_url=file:{},then={then}", directory.display()),
        ]);
        made.assert_code(0);
        directory
    };
    for turn in 0..3 {
        // Anywhere in a tick, which takes as long as it takes.
        vm.wait_for_exit(random.moment(Duration::from_secs(1)));
        snapshot(&format!("running {turn}"), "go-on");
        wait_for_ticks(&vm, ticks(&vm.stdout(), &sum).len() + 2);
    }
    let directory = snapshot("last", "stop");
    let vm = vm.finish();
    assert_ended(&vm, "stopped", 0);
    let before = ticks(&vm.stdout, &sum);
    assert_in_order(&before);

    let mut last = *before.last().unwrap();
    for turn in 0..2 {
        let restored = Program::umem(["run", "--snapshot"])
            .arg(&directory)
            .patience(PATIENCE)
            .start();
        wait_for_ticks(&restored, 2);
        let seen = ticks(&restored.stdout(), &sum);
        // The wall clock was right when the guest booted, and nothing has set it since.
        let off = seen.last().unwrap().wall.abs_diff(now());
        assert!(off <= 5, "the wall clock is wrong by {off} s: {seen:#?}");
        wait_for_ticks(&restored, 4);
        restored.signal(Signal::TERM);
        let restored = restored.finish();
        restored.assert_code(0);
        let after = ticks(&restored.stdout, &sum);
        println!("restored the {turn}. time: {last:?}, then {after:?}");
        assert_in_order(&after);
        // Whichever was being said when the snapshot was made, it is the next or the one after that.
        let gap = after[0].number - before.last().unwrap().number;
        assert!((1..=2).contains(&gap), "{before:#?} {after:#?}");
        // The second time too: the clocks have gone on while the first one ran.
        assert_not_before(last, after[0]);
        // Nobody was suspended, so these two are the same clock; and time went by for all clocks alike.
        for tick in &after {
            let (monotonic, boottime) = (tick.monotonic / 10_000_000, tick.boottime);
            assert!(monotonic.abs_diff(boottime) < 500, "{tick:?}");
            let by_wall = tick.wall - before[0].wall;
            let by_monotonic = (tick.monotonic - before[0].monotonic) / 1_000_000_000;
            assert!(by_wall.abs_diff(by_monotonic) <= 3, "{:?} {tick:?}", before[0]);
        }
        last = *after.last().unwrap();
    }
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
