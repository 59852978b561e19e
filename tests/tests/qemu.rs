//! The built-in guest under another VMM: the same file boots there unchanged.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use tests::need;
use tests::program::{Finished, Program};
use tests::scratch::Scratch;
use vmm::boot::builtin::GUEST_ELF;

const QEMU: &str = "qemu-system-x86_64";

fn run(cpus: u32, command_line: &str) -> Finished {
    let scratch = Scratch::new();
    let kernel = scratch.file("guest", GUEST_ELF);
    Program::new(QEMU)
        .args(["-accel", "kvm", "-machine", "pc", "-m", "64M", "-smp"])
        .arg(cpus.to_string())
        .args([
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
        .args(["-append", command_line, "-kernel"])
        .arg(kernel)
        .run()
}

/// What QEMU ends with when a guest writes this to the device.
fn exit_code(guest: i32) -> i32 {
    guest << 1 | 1
}

#[test]
fn the_guest_boots_under_qemu() {
    need!(tests::host::kvm());
    need!(tests::host::succeeds(QEMU, &["--version"]));
    for cpus in [1, 2] {
        let hello = run(cpus, "workload=hello");
        hello.assert_code(exit_code(0));
        hello.line(&format!("workload=hello cpus={cpus} ram_mib=64"));
        hello.line("result=ok");
    }
}

#[test]
fn its_workloads_run_under_qemu() {
    need!(tests::host::kvm());
    need!(tests::host::succeeds(QEMU, &["--version"]));
    let touch = run(2, "workload=touch pages=all order=random seed=3 rounds=2");
    touch.assert_code(exit_code(0));
    touch.line("round=2 pages=");
    let dirty = run(2, "workload=dirty pages=all rounds=2");
    dirty.assert_code(exit_code(0));
    assert!(dirty.line("pages=").ends_with(" wrong=0"), "{dirty}");
    // There are no fingerprints there, and it says so.
    let verify = run(1, "workload=verify");
    verify.assert_code(exit_code(1));
    verify.line("wrong_page=0x");
}
