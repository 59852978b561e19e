//! What cannot work is refused: with a message that names the thing and the remedy, with the exit code that the manual
//! promises, and with nothing left running (which `Running::finish` checks of every program here).

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::ffi::OsStr;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tests::program::{Finished, Program};
use tests::scratch::{Scratch, truncate};
use tests::vm::Vm;
use tests::{need, skip};
use vmm::boot::builtin::GUEST_ELF;

fn umem<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Finished {
    Program::umem(args).run()
}

/// Checks that a VM of this `--memory` is refused.
#[track_caller]
fn refused_memory(options: &str, code: i32, words: &[&str]) {
    umem(["run", "--memory", options]).assert_error(code, words);
}

#[test]
fn an_image_of_another_size() {
    let scratch = Scratch::new();
    let image = scratch.image("64M", "workload=hello");
    for size in ["128M", "32M", "67108863", "67112960"] {
        let memory = format!("size={size},source=file:{}", image.display());
        refused_memory(&memory, 2, &["size", "64M", image.to_str().unwrap()]);
    }
}

#[test]
fn an_image_without_its_end() {
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("8M", 1, "");
    let length = image.metadata().unwrap().len();
    for length in [length - 1, 8 << 20, 4 << 20, 4096, 1, 0] {
        truncate(&image, length);
        let memory = format!("source=file:{}", image.display());
        refused_memory(
            &memory,
            6,
            &["not a umem image", "umem image create", image.to_str().unwrap()],
        );
        for verb in ["info", "verify"] {
            umem([OsStr::new("image"), OsStr::new(verb), image.as_os_str()])
                .assert_error(6, &["not a umem image", image.to_str().unwrap()]);
        }
    }
}

#[test]
fn what_is_no_image() {
    let scratch = Scratch::new();
    let text = scratch.file(
        "text",
        "no image, but long enough to be one\n".repeat(1000).as_bytes(),
    );
    let kernel = scratch.file("kernel", GUEST_ELF);
    for path in [&text, &kernel] {
        let memory = format!("source=file:{}", path.display());
        refused_memory(&memory, 6, &["not a umem image", path.to_str().unwrap()]);
    }
}

/// An image that ends like one but has more in front: what its end says is not so.
#[test]
fn an_image_with_something_in_front() {
    let scratch = Scratch::new();
    let image = scratch.image("8M", "workload=hello");
    let mut content = vec![0; 4096];
    content.extend(std::fs::read(&image).unwrap());
    std::fs::write(&image, content).unwrap();
    let memory = format!("source=file:{}", image.display());
    refused_memory(&memory, 6, &["corrupt", "bytes", image.to_str().unwrap()]);
}

#[test]
fn an_image_that_cannot_be_read() {
    let scratch = Scratch::new();
    let missing = scratch.path("missing");
    let directory = scratch.directory();
    for (path, why) in [
        (missing.as_path(), "No such file"),
        (directory, "directory"),
        (Path::new("/dev/null/image"), "Not a directory"),
    ] {
        let memory = format!("source=file:{}", path.display());
        refused_memory(&memory, 2, &[why, path.to_str().unwrap()]);
        umem([OsStr::new("image"), OsStr::new("info"), path.as_os_str()])
            .assert_error(2, &[why, path.to_str().unwrap()]);
    }
}

#[test]
fn an_image_that_may_not_be_read() {
    // Not even root may without these capabilities.
    let without = "--bounding-set=-dac_override,-dac_read_search";
    need!(tests::host::succeeds("setpriv", &[without, "true"]));
    let scratch = Scratch::new();
    let image = scratch.image("8M", "workload=hello");
    std::fs::set_permissions(&image, Permissions::from_mode(0o000)).unwrap();
    for verb in [&["image", "info"][..], &["image", "verify"]] {
        Program::new("setpriv")
            .arg(without)
            .arg(tests::program::umem())
            .args(verb)
            .arg(&image)
            .run()
            .assert_error(2, &["Permission denied", image.to_str().unwrap()]);
    }
}

#[test]
fn sizes_that_cannot_be() {
    for (size, words) in [
        ("0", &["0", "at least"][..]),
        ("4095", &["4095", "multiple"]),
        ("67108865", &["67108865", "multiple"]),
        ("4K", &["4096", "at least"]),
        ("8192T", &["52 bits"]),
        ("4000T", &["bits"]),
        ("100T", &["RAM"]),
        ("99999999999999999999", &["address space"]),
        ("16777216T", &["address space"]),
        ("", &["size", "expected"]),
        ("-1", &["size=-1"]),
        ("many", &["many"]),
        ("1.5G", &["1.5G"]),
        ("G", &["size=G"]),
    ] {
        refused_memory(&format!("size={size}"), 2, words);
    }
    for (size, words) in [
        ("0", &["0", "at least"][..]),
        ("4097", &["4097", "multiple"]),
        ("8192T", &["52 bits"]),
        ("many", &["many"]),
    ] {
        let scratch = Scratch::new();
        scratch.create("image", size).run().assert_error(2, words);
        assert_eq!(scratch.names(), [""; 0]);
    }
}

/// RAM that the architecture could have, but neither this process nor its host's CPU.
#[test]
fn sizes_beyond_the_address_space() {
    need!(tests::host::kvm());
    for backing in ["memfd", "anonymous"] {
        for size in ["120T", "1000T"] {
            refused_memory(&format!("size={size},backing={backing}"), 2, &["RAM"]);
        }
    }
}

/// Kernel files made from the good one, by setting bytes.
#[test]
fn kernels_that_cannot_be_booted() {
    /// Where the first note with the PVH entry is in the file.
    fn note() -> usize {
        let name = b"\x04\0\0\0\x08\0\0\0\x12\0\0\0Xen\0";
        GUEST_ELF
            .windows(name.len())
            .position(|bytes| bytes == name)
            .unwrap()
    }
    let scratch = Scratch::new();
    let changed = |at: usize, bytes: &[u8]| {
        let mut elf = GUEST_ELF.to_vec();
        elf[at..at + bytes.len()].copy_from_slice(bytes);
        elf
    };
    // Boot protocol 2.15, one sector of setup code, 1,024 bytes of kernel, alignment 2 MiB, 4 MiB needed, linked to 16 MiB.
    let bzimage = |changes: &[(usize, &[u8])]| {
        let mut file = vec![0; 2048];
        let good: [(usize, &[u8]); 10] = [
            (0x1f1, &[1]),
            (0x1f4, &[64]),
            (0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]),
            (0x202, b"HdrS\x0f\x02"),
            (0x211, &[1]),
            (0x232, &[0x20]),
            (0x234, &[1]),
            (0x236, &[1]),
            (0x238, &[0xff, 7]),
            (0x262, &[0x40]),
        ];
        for (at, bytes) in good.iter().chain(changes) {
            file[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        file
    };
    let mut arm64_image = vec![0; 4096];
    arm64_image[0x38..0x3c].copy_from_slice(b"ARM\x64");
    for (name, content, words) in [
        ("script", b"#!/bin/sh\n".to_vec(), &["bzImage", "ELF", "PVH"][..]),
        ("empty", Vec::new(), &["bzImage", "ELF"]),
        ("arm64-image", arm64_image, &["aarch64", "x86-64"]),
        (
            "truncated-bzimage",
            bzimage(&[(0x1f4, &[0, 1])]),
            &["truncated", "bzImage"],
        ),
        ("32-bit-bzimage", bzimage(&[(0x236, &[0])]), &["32-bit", "x86-64"]),
        ("old-bzimage", bzimage(&[(0x206, &[0x0a])]), &["2.10", "2.12"]),
        (
            "large-bzimage",
            bzimage(&[(0x260, &[0, 0, 0, 0x10])]),
            &["more memory"],
        ),
        (
            "damaged-bzimage",
            bzimage(&[(0x232, &[0])]),
            &["damaged", "alignment"],
        ),
        ("aarch64", changed(18, &[183, 0]), &["aarch64", "x86-64"]),
        ("32-bit", changed(4, &[1]), &["32-bit", "64-bit"]),
        ("dynamic", changed(16, &[3, 0]), &["ET_DYN", "ET_EXEC"]),
        (
            "no-note",
            changed(note() + 8, &[17]),
            &["no PVH entry", "CONFIG_PVH"],
        ),
        ("entry", changed(note() + 16, &[0; 8]), &["entry", "segments"]),
        (
            "truncated",
            GUEST_ELF[..GUEST_ELF.len() / 8].to_vec(),
            &["truncated"],
        ),
    ] {
        let kernel = scratch.file(name, &content);
        let path = kernel.to_str().unwrap();
        let mut words = words.to_vec();
        words.push(path);
        umem(["run", "--memory", "size=64M", "--kernel", path]).assert_error(2, &words);
        let image = scratch.path("image");
        umem(
            ["image", "create", "--memory", "64M", "--kernel", path, "-o"]
                .map(OsStr::new)
                .into_iter()
                .chain([image.as_os_str()]),
        )
        .assert_error(2, &words);
        assert!(!image.exists());
        std::fs::remove_file(kernel).unwrap();
    }
    assert_eq!(scratch.names(), [""; 0]);
}

#[test]
fn files_that_are_not_there() {
    let scratch = Scratch::new();
    let missing = scratch.path("missing");
    let path = missing.to_str().unwrap();
    for option in ["--kernel", "--initramfs", "--firmware"] {
        umem(["run", option, path]).assert_error(2, &["No such file", path]);
    }
    for option in ["--kernel", "--initramfs"] {
        scratch
            .create("image", "64M")
            .args([option, path])
            .run()
            .assert_error(2, &["No such file", path]);
    }
    for option in ["--kernel", "--initramfs", "--firmware"] {
        let path = scratch.directory().to_str().unwrap();
        umem(["run", option, path]).assert_error(2, &[path]);
    }
    assert_eq!(scratch.names(), [""; 0]);
}

#[test]
fn firmware_that_does_not_fit() {
    let scratch = Scratch::new();
    for (name, size, words) in [
        ("empty", 0, &["empty", "none"][..]),
        ("odd", 5000, &["5000", "multiple"]),
        ("large", (256 << 10) + 4096, &["256 KiB"]),
    ] {
        let rom = scratch.file(name, &vec![0; size]);
        let path = rom.to_str().unwrap();
        let mut words = words.to_vec();
        words.push(path);
        umem(["run", "--firmware", path]).assert_error(2, &words);
    }
}

#[test]
fn ram_that_is_too_small_for_what_goes_in() {
    let scratch = Scratch::new();
    let initramfs = scratch.file("initramfs", &vec![1; 8 << 20]);
    let path = initramfs.to_str().unwrap();
    umem(["run", "--memory", "size=8M", "--initramfs", path])
        .assert_error(2, &["initramfs", path, "more memory"]);
    umem(["run", "--memory", "size=1M"]).assert_error(2, &["more memory"]);
    let empty = scratch.file("empty", b"");
    umem(["run", "--initramfs", empty.to_str().unwrap()])
        .assert_error(2, &["empty", empty.to_str().unwrap()]);
}

#[test]
fn options_that_make_no_sense() {
    let scratch = Scratch::new();
    let image = scratch.image("8M", "workload=hello");
    let from_image = format!("source=file:{}", image.display());
    let long = "x".repeat(5000);
    for (args, words) in [
        (&["run", "--bogus"][..], &["--bogus"][..]),
        (&["run", "file"], &["file"]),
        (&["bogus"], &["bogus"]),
        (&["run", "--cpus", "0"], &["--cpus", "boot="]),
        (
            &["run", "--cpus", "boot=0"],
            &["--cpus", "boot=0", "at least one"],
        ),
        (&["run", "--cpus", "boot=-1"], &["--cpus", "boot=-1"]),
        (&["run", "--cpus", "boot=two"], &["--cpus", "boot=two"]),
        (&["run", "--cpus", "bogus=1"], &["--cpus", "bogus", "boot=N"]),
        (
            &["run", "--cpus", "async_pf=maybe"],
            &["async_pf=maybe", "on or off"],
        ),
        (
            &["run", "--memory", "bogus=1"],
            &["--memory", "bogus", "backing="],
        ),
        (
            &["run", "--memory", "size=64M,size=64M"],
            &["size", "more than once"],
        ),
        (&["run", "--memory", "64M"], &["64M", "size="]),
        (&["run", "--memory", "source=bogus:x"], &["bogus:x", "file:PATH"]),
        (&["run", "--memory", "source=file:"], &["file:PATH"]),
        (
            &["run", "--memory", "backing=paper"],
            &["paper", "memfd or anonymous"],
        ),
        (&["run", "--memory", "fill=some"], &["some", "off or sequential"]),
        (&["run", "--memory", "hugepages=1"], &["hugepages=1", "on or off"]),
        (&["run", "--memory", "checksums=1"], &["checksums=1", "on or off"]),
        (
            &["run", "--memory", &from_image, "--kernel", "x"],
            &["--kernel", "image"],
        ),
        (
            &["run", "--memory", &from_image, "--initramfs", "x"],
            &["--initramfs", "image"],
        ),
        (&["run", "--cmdline", &long], &["command line", "5000", "2047"]),
        (
            &["run", "--memory", &from_image, "--cmdline", &long],
            &["command line", "5000"],
        ),
        (&["image", "create", "--memory", "64M"], &["--output"]),
        (&["image", "create", "-o", "x"], &["--memory"]),
        (
            &["image", "create", "--memory", "64M", "--fill", "zeros", "-o", "x"],
            &["zeros", "pattern:SEED"],
        ),
        (
            &[
                "image",
                "create",
                "--memory",
                "64M",
                "--fill",
                "pattern:x",
                "-o",
                "x",
            ],
            &["pattern:SEED"],
        ),
        (&["image", "verify"], &["IMAGE"]),
    ] {
        Program::umem(args)
            .current_dir(scratch.directory())
            .run()
            .assert_error(2, words);
    }
    assert_eq!(scratch.names(), ["image"]);
}

#[test]
fn more_cpus_than_there_can_be() {
    need!(tests::host::kvm());
    umem(["run", "--cpus", "boot=100000"]).assert_error(2, &["100000", "boot"]);
    // Of 65 the built-in guest says so itself.
    let vm = Vm::with_memory("64M").cpus(65).run();
    vm.assert_code(69);
    vm.line("error=too_many_cpus cpus=65 limit=64");
}

#[test]
fn an_image_that_exists_is_not_overwritten() {
    let scratch = Scratch::new();
    let path = scratch.file("image", b"precious");
    scratch
        .create("image", "8M")
        .run()
        .assert_error(2, &["exists", "--force", path.to_str().unwrap()]);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    scratch.create("image", "8M").arg("--force").run().assert_code(0);
    umem([OsStr::new("image"), OsStr::new("verify"), path.as_os_str()]).assert_code(0);
    // A directory is not replaced even then.
    std::fs::create_dir(scratch.path("directory")).unwrap();
    let refused = scratch.create("directory", "8M").arg("--force").run();
    refused.assert_error(refused.code().unwrap(), &["directory"]);
    assert_ne!(refused.code(), Some(0));
    assert!(scratch.path("directory").is_dir());
}

#[test]
fn an_image_where_there_is_no_directory() {
    let scratch = Scratch::new();
    scratch
        .create("missing/image", "8M")
        .run()
        .assert_error(2, &["No such file", "missing/image"]);
}

#[test]
fn a_full_disk() {
    need!(tests::host::mount_namespace());
    let scratch = Scratch::new();
    let directory = scratch.directory().display().to_string();
    let script = format!(
        "mount -t tmpfs -o size=16M none '{directory}'
         cd '{directory}'
         code=0
         \"$0\" image create --memory 64M --fill pattern:1 -o image || code=$?
         echo \"left: [$(ls -A)]\"
         exit $code"
    );
    let created = Program::in_mount_namespace(&script).run();
    created.assert_error(1, &["No space left", "image"]);
    created.line("left: []");
}

/// The report is part of what was asked for: a run without it has not done its work.
#[test]
fn a_report_that_cannot_be_written() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let path = scratch.path("missing/report");
    for (path, why) in [
        (path.as_path(), "No such file"),
        (Path::new("/dev/full"), "No space left"),
        (scratch.directory(), "directory"),
    ] {
        let run = Program::umem(["run", "--report"]).arg(path).run();
        run.assert_error(run.code().unwrap(), &["report", why, path.to_str().unwrap()]);
        assert!(matches!(run.code(), Some(1 | 2)), "{run}");
    }
    let log = scratch.path("missing/log");
    Program::umem(["run", "--log-file"])
        .arg(&log)
        .run()
        .assert_error(2, &["log", "No such file", log.to_str().unwrap()]);
}

#[test]
fn an_unknown_workload() {
    need!(tests::host::kvm());
    let vm = Vm::with_memory("64M").command_line("workload=dance").run();
    vm.assert_error(66, &["guest"]);
    vm.line("error=unknown_workload word=workload=dance expected=hello|");
    let vm = Vm::with_memory("64M")
        .command_line("workload=touch pages=1000000")
        .run();
    vm.assert_code(66);
    vm.line("error=too_many_pages word=pages=1000000 available=");
}

#[test]
fn huge_pages_that_are_not_there() {
    need!(tests::host::kvm());
    let too_many = tests::host::free_huge_pages() + 64;
    for backing in ["memfd", "anonymous"] {
        let memory = format!("size={}M,hugepages=on,backing={backing}", 2 * too_many);
        refused_memory(&memory, 3, &["huge pages", "vm.nr_hugepages"]);
    }
}

#[test]
fn huge_pages_that_ram_is_no_multiple_of() {
    need!(tests::host::kvm());
    refused_memory("size=65M,hugepages=on", 2, &["multiple", "2097152"]);
}

/// A script that hides all of /dev but for these, to which it does something.
fn with_devices(scratch: &Scratch, devices: &str, change: &str) -> String {
    let directory = scratch.path("dev").display().to_string();
    format!(
        "mkdir '{directory}'
         mount -t tmpfs none '{directory}'
         for device in {devices}; do cp -a \"$device\" '{directory}'; done
         cd '{directory}'
         {change}
         cd /
         mount --move '{directory}' /dev
         rmdir '{directory}'
         "
    )
}

/// What follows runs as a user without rights.
const AS_NOBODY: &str = "exec setpriv --reuid=65534 --regid=65534 --clear-groups";

#[test]
fn a_host_without_kvm() {
    need!(tests::host::mount_namespace());
    let scratch = Scratch::new();
    let script = with_devices(&scratch, "", "") + "exec \"$0\" run";
    Program::in_mount_namespace(&script)
        .run()
        .assert_error(3, &["/dev/kvm is not there", "modprobe"]);
}

#[test]
fn a_host_whose_kvm_is_for_others() {
    need!(tests::host::kvm());
    need!(tests::host::mount_namespace());
    let scratch = Scratch::new();
    let program = for_everybody(&scratch);
    let script =
        with_devices(&scratch, "/dev/kvm", "chmod 600 kvm") + &format!("{AS_NOBODY} '{program}' run");
    Program::in_mount_namespace(&script)
        .run()
        .assert_error(3, &["no permission to open /dev/kvm", "group"]);
}

/// With the device that is there, but not for this user; and without it.
#[test]
fn a_host_whose_userfaultfd_is_for_others() {
    need!(tests::host::kvm());
    need!(tests::host::mount_namespace());
    if tests::host::userfaultfd_is_for_everybody() {
        skip!("vm.unprivileged_userfaultfd is 1");
    }
    let scratch = Scratch::new();
    let program = for_everybody(&scratch);
    for devices in ["/dev/kvm", "/dev/kvm /dev/userfaultfd"] {
        let script = with_devices(&scratch, devices, "chmod 600 *; chmod 666 kvm")
            + &format!("{AS_NOBODY} '{program}' run");
        Program::in_mount_namespace(&script).run().assert_error(
            3,
            &[
                "no permission to use userfaultfd",
                "/dev/userfaultfd",
                "vm.unprivileged_userfaultfd",
            ],
        );
    }
}

/// A copy of the program where every user can reach it, which need not be so of where it was built.
fn for_everybody(scratch: &Scratch) -> String {
    let mode = |path: &Path| std::fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
    mode(scratch.directory());
    let program = scratch.path("umem");
    std::fs::copy(tests::program::umem(), &program).unwrap();
    mode(&program);
    program.display().to_string()
}
