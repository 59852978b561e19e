//! Starting guests: from images and without, by the firmware and directly, and how they end.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use guest::exit_code::ExitCode;
use tests::need;
use tests::scratch::Scratch;
use tests::vm::Vm;
use vmm::boot::builtin::GUEST_ELF;

const GUEST_FAILED: i32 = 64;

fn code(code: ExitCode) -> i32 {
    GUEST_FAILED + code as i32
}

#[test]
fn a_guest_without_an_image_says_hello() {
    need!(tests::host::kvm());
    let vm = Vm::with_memory("64M").run();
    vm.assert_ended_well();
    vm.line("workload=hello cpus=1 ram_mib=64");
    let report = vm.report();
    assert!(report.text("/source/url").starts_with("zero:"), "{report}");
    assert!(
        !report.has("/time_to_all_pages_ms"),
        "hello does not touch all pages: {report}"
    );
}

#[test]
fn an_image_needs_nothing_else() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.image("64M", "workload=touch pages=10 order=stride");
    let vm = Vm::from_image(&image).run();
    vm.assert_ended_well();
    vm.line("round=1 pages=10 ");
    let report = vm.report();
    assert_eq!(
        report.text("/source/url"),
        format!("file:{}", image.display()),
        "{report}"
    );
    assert_eq!(report.count("/pages/total"), 64 * 256);
    assert!(report.count("/source/bytes") > 0, "{report}");
}

#[test]
fn a_command_line_replaces_that_of_the_image() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.image("64M", "workload=touch pages=10");
    for firmware in [None, Some("none")] {
        let mut vm = Vm::from_image(&image).command_line("workload=hello");
        if let Some(firmware) = firmware {
            vm = vm.option("--firmware", firmware);
        }
        let vm = vm.run();
        vm.assert_ended_well();
        vm.line("workload=hello ");
        assert!(!vm.stdout.contains("round=1"), "{}", vm.stdout);
    }
    // Only for that one VM.
    Vm::from_image(&image).run().line("round=1 pages=10 ");
}

#[test]
fn a_kernel_file_boots_without_an_image() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let kernel = scratch.file("kernel", GUEST_ELF);
    for firmware in ["none", "default"] {
        let mut vm = Vm::with_memory("64M")
            .option("--kernel", &kernel)
            .command_line("workload=dirty pages=64 rounds=2");
        if firmware == "none" {
            vm = vm.option("--firmware", "none");
        }
        let vm = vm.run();
        vm.assert_ended_well();
        vm.line("pages=64 wrong=0");
    }
}

#[test]
fn a_kernel_file_boots_from_an_image() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let kernel = scratch.file("kernel", GUEST_ELF);
    let initramfs = scratch.file("initramfs", &vec![0x5a; 100_000]);
    let created = scratch
        .create("image", "64M")
        .args(["--cmdline", "workload=hello", "--kernel"])
        .arg(&kernel)
        .arg("--initramfs")
        .arg(&initramfs)
        .run();
    created.assert_code(0);
    // What the guest needs to start is in it.
    std::fs::remove_file(kernel).unwrap();
    std::fs::remove_file(initramfs).unwrap();
    let vm = Vm::from_image(&scratch.path("image")).run();
    vm.assert_ended_well();
    vm.line("workload=hello ");
}

/// The firmware is what leads to the kernel: another one, which does something else, is really run.
#[test]
fn another_firmware_is_loaded() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    // mov $7, %al; out %al, $0xf4; hlt.
    let rom = scratch.file("rom", &rom(b"\xb0\x07\xe6\xf4\xf4"));
    let vm = Vm::with_memory("64M").option("--firmware", rom).run();
    vm.assert_code(GUEST_FAILED + 7);
    let report = vm.report();
    assert_eq!(report.text("/outcome"), "guest-exit");
    assert_eq!(report.count("/guest_exit"), 7);
}

#[test]
fn all_cpus_start() {
    need!(tests::host::kvm());
    for cpus in [1, 2, 4] {
        for firmware in [None, Some("none")] {
            let mut vm = Vm::with_memory("64M").cpus(cpus);
            if let Some(firmware) = firmware {
                vm = vm.option("--firmware", firmware);
            }
            let vm = vm.run();
            vm.assert_ended_well();
            vm.line(&format!("workload=hello cpus={cpus} "));
        }
    }
}

#[test]
fn an_unknown_workload_is_named_by_the_guest() {
    need!(tests::host::kvm());
    let vm = Vm::with_memory("64M").command_line("workload=nonsense").run();
    vm.assert_code(code(ExitCode::CommandLine));
    vm.line("error=unknown_workload word=workload=nonsense expected=");
    assert_eq!(vm.report().text("/outcome"), "guest-exit");
}

#[test]
fn an_exception_of_the_guest_is_reported_and_ends_it() {
    need!(tests::host::kvm());
    for (kind, line) in [
        ("page-fault", "exception=#PF vector=14 "),
        ("invalid-opcode", "exception=#UD vector=6 "),
        ("double-fault", "exception=#DF vector=8 "),
    ] {
        for cpus in [1, 2] {
            let vm = Vm::with_memory("64M")
                .cpus(cpus)
                .command_line(&format!("workload=fault kind={kind}"))
                .run();
            vm.assert_code(code(ExitCode::Exception));
            let line = vm.line(line);
            for word in [" error_code=0x", " rip=0x", " cr2=0x"] {
                assert!(line.contains(word), "{line}");
            }
        }
    }
    let vm = Vm::with_memory("64M")
        .command_line("workload=fault kind=panic")
        .run();
    vm.assert_code(code(ExitCode::Panic));
}

/// Ends that were not asked for.
#[test]
fn a_reset_or_triple_fault_ends_the_vm_with_65() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    for (outcome, code) in [
        // xor %al, %al; div %al: a division by zero, whose handler cannot be found because of this: lidt of zeros, and
        // protected mode (mov %cr0, %eax; or $1, %al; mov %eax, %cr0) before.
        (
            "triple-fault",
            &b"\x0f\x01\x1e\x00\x00\x0f\x20\xc0\x0c\x01\x0f\x22\xc0\x30\xc0\xf6\xf0"[..],
        ),
        // mov $0xfe, %al; out %al, $0x64; hlt.
        ("reset", b"\xb0\xfe\xe6\x64\xf4"),
    ] {
        let rom = scratch.file(outcome, &rom(code));
        let vm = Vm::with_memory("64M").option("--firmware", rom).run();
        vm.assert_error(65, &["guest"]);
        assert_eq!(vm.report().text("/outcome"), outcome);
        assert!(!vm.report().has("/guest_exit"), "{}", vm.report());
    }
}

/// A ROM with 16-bit code for the reset vector to jump to.
fn rom(code: &[u8]) -> Vec<u8> {
    const RESET_VECTOR: usize = 4096 - 16;
    const START: usize = 4096 - 256;
    let mut rom = vec![0; 4096];
    rom[START..START + code.len()].copy_from_slice(code);
    // jmp, relative to the byte behind it.
    let distance = START as i16 - (RESET_VECTOR as i16 + 3);
    rom[RESET_VECTOR] = 0xe9;
    rom[RESET_VECTOR + 1..RESET_VECTOR + 3].copy_from_slice(&distance.to_le_bytes());
    rom
}

#[test]
fn what_the_guest_says_comes_out_as_it_is() {
    need!(tests::host::kvm());
    let vm = Vm::with_memory("64M").run();
    vm.assert_ended_well();
    assert!(
        vm.stdout.ends_with("result=ok\n") || vm.stdout.ends_with("result=ok\r\n"),
        "{vm}",
        vm = vm.stdout
    );
}

#[test]
fn verbose_and_log_file_do_not_disturb_the_guest() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let log = scratch.path("log");
    let vm = Vm::with_memory("64M")
        .option("--log-file", &log)
        .start_with(|program| program.arg("-v"));
    let vm = vm.finish();
    vm.assert_ended_well();
    assert!(!std::fs::read_to_string(log).unwrap().is_empty());
    let vm = Vm::with_memory("64M")
        .start_with(|program| program.arg("-v"))
        .finish();
    vm.assert_code(0);
    assert!(!vm.stderr.is_empty(), "-v says something");
    vm.line("result=ok");
}
