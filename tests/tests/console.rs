//! The guest's serial line at this program's standard streams.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::io::Write;
use std::process::Stdio;

use rustix::process::Signal;
use tests::need;
use tests::program::Program;
use tests::terminal::Terminal;
use tests::vm::Vm;

/// A guest that writes a line every now and then, for ever.
fn endless() -> Vm {
    Vm::with_memory("64M").command_line("workload=dirty pages=64 rounds=forever")
}

#[test]
fn the_end_of_input_does_not_end_the_vm() {
    need!(tests::host::kvm());
    let closed_pipe = || {
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(b"typed ahead").unwrap();
        Stdio::from(reader)
    };
    for stdin in [Stdio::null(), closed_pipe()] {
        let vm = endless().start_with(|program| program.stdin(stdin));
        // A few lines more than what may have been under way.
        vm.wait_for_output("round=30 ");
        vm.signal(Signal::TERM);
        let vm = vm.finish();
        vm.assert_code(0);
        assert_eq!(vm.report().text("/outcome"), "stopped");
    }
}

#[test]
fn input_that_nobody_takes_does_not_stop_the_vm() {
    need!(tests::host::kvm());
    let (reader, mut writer) = std::io::pipe().unwrap();
    // More than the serial port holds; the pipe takes it all.
    writer.write_all(&[b'x'; 4096]).unwrap();
    let vm = endless().start_with(|program| program.stdin(reader));
    vm.wait_for_output("round=30 ");
    vm.signal(Signal::TERM);
    vm.finish().assert_code(0);
    drop(writer);
}

/// A guest goes on when nobody listens any more, and can still be stopped.
#[test]
fn output_that_nobody_reads_does_not_end_the_vm() {
    need!(tests::host::kvm());
    let (reader, writer) = std::io::pipe().unwrap();
    let vm = endless().start_with(|program| program.stdout(writer));
    let mut first = [0; 64];
    std::io::Read::read(&mut &reader, &mut first).unwrap();
    drop(reader);
    let ticks = |vm: &tests::program::Running| {
        // The processor time of all threads, in user mode and in the kernel (proc(5): fields 14 and 15).
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", vm.pid())).unwrap();
        let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let before = ticks(&vm);
    vm.wait_until("the guest goes on", |vm| ticks(vm) > before + 5);
    vm.signal(Signal::TERM);
    let vm = vm.finish();
    vm.assert_code(0);
    assert_eq!(vm.report().text("/outcome"), "stopped");
}

/// Nobody reads and nobody closes: the guest waits, but the VM can still be stopped.
#[test]
fn a_full_pipe_does_not_hinder_the_stop() {
    need!(tests::host::kvm());
    let (reader, writer) = std::io::pipe().unwrap();
    let vm = endless().start_with(|program| program.stdout(writer));
    let filled = |_: &tests::program::Running| {
        let mut bytes = 0_u32;
        rustix::io::ioctl_fionread(&reader)
            .map(|count| bytes = count as u32)
            .unwrap();
        bytes > 60_000
    };
    vm.wait_until("the pipe is full", filled);
    vm.signal(Signal::TERM);
    let vm = vm.finish();
    vm.assert_code(0);
    assert_eq!(vm.report().text("/outcome"), "stopped");
    drop(reader);
}

#[test]
fn closed_streams_are_no_reason_to_crash() {
    need!(tests::host::kvm());
    for (streams, expected) in [("<&-", 0), (">&-", 0), ("2>&-", 0), ("<&- >&- 2>&-", 0)] {
        let script = format!("exec \"$0\" run --memory size=64M {streams}");
        let run = Program::new("sh")
            .args(["-c", &script])
            .arg(tests::program::umem())
            .run();
        // Either it works, or it says what is missing.
        assert!(
            run.code() == Some(expected) || run.stderr.contains("standard") && run.code() == Some(1),
            "{run}"
        );
    }
}

#[test]
fn ctrl_c_on_a_terminal_stops_the_vm_and_gives_the_terminal_back() {
    need!(tests::host::kvm());
    let terminal = Terminal::new();
    let before = terminal.modes();
    assert!(!terminal.is_raw());
    let vm = endless().start_with(|program| program.on_terminal(&terminal.device));
    vm.wait_until("the guest says something", |_| {
        terminal.screen().contains("round=5 ")
    });
    assert!(terminal.is_raw());
    assert_ne!(terminal.modes(), before);
    terminal.type_keys(b"hello\r");
    terminal.type_keys(&[0x03]);
    let vm = vm.finish();
    vm.assert_code(0);
    assert_eq!(vm.report().text("/outcome"), "stopped");
    assert_eq!(terminal.modes(), before);
    assert!(
        !terminal.screen().contains("hello"),
        "no echo: {}",
        terminal.screen()
    );
}

/// However it ends, the terminal is as it was.
#[test]
fn the_terminal_is_given_back_at_every_end() {
    need!(tests::host::kvm());
    let terminal = Terminal::new();
    let before = terminal.modes();
    let on_terminal = |program: Program| program.on_terminal(&terminal.device);

    // The guest's own.
    let vm = Vm::with_memory("64M").start_with(on_terminal).finish();
    vm.assert_code(0);
    assert_eq!(terminal.modes(), before);
    assert!(terminal.screen().contains("result=ok"), "{}", terminal.screen());

    // A guest that fails.
    let vm = Vm::with_memory("64M")
        .command_line("workload=fault")
        .start_with(on_terminal)
        .finish();
    vm.assert_code(67);
    assert_eq!(terminal.modes(), before);

    // A signal.
    let vm = endless().start_with(on_terminal);
    vm.wait_until("the terminal is the guest's", |_| terminal.is_raw());
    vm.signal(Signal::TERM);
    vm.finish().assert_code(0);
    assert_eq!(terminal.modes(), before);

    // The terminal is hung up: there is nobody left to ask for anything.
    let vm = endless().start_with(on_terminal);
    vm.wait_until("the terminal is the guest's", |_| terminal.is_raw());
    vm.signal(Signal::HUP);
    let vm = vm.finish();
    assert!(vm.code() == Some(0) || vm.signal() == Some(Signal::HUP.as_raw()));

    // An error, before the guest runs.
    let terminal = Terminal::new();
    let before = terminal.modes();
    let vm = Vm::with_memory("64M")
        .option("--cpus", "boot=100000")
        .start_with(|program| program.on_terminal(&terminal.device));
    vm.finish().assert_code(2);
    assert_eq!(terminal.modes(), before);
}

/// An error on a terminal comes out whole, and is the last thing there.
#[test]
fn messages_on_a_terminal_are_readable() {
    let terminal = Terminal::new();
    let program = Program::umem(["run", "--memory", "size=5"]).on_terminal(&terminal.device);
    program.run().assert_code(2);
    let finished = |screen: &str| screen.contains("multiple") && screen.ends_with("\r\n");
    let deadline = std::time::Instant::now() + tests::program::PATIENCE;
    while !finished(&terminal.screen()) {
        assert!(std::time::Instant::now() < deadline, "{}", terminal.screen());
        std::thread::yield_now();
    }
}
