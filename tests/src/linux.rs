//! An unmodified Linux as a guest: its kernel, and an initramfs with busybox.

use std::env;
use std::fs;
use std::path::PathBuf;

/// The variable that names a bzImage.
const KERNEL: &str = "UMEM_TEST_KERNEL";

/// Linked statically, as Debian's package busybox-static has it.
const BUSYBOX: &str = "/bin/busybox";

/// What the first process runs before the test's own commands.
const SETUP: &str = "#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox --install -s /bin
";

/// The bzImage, or why there is none that may be booted here.
pub fn kernel() -> Result<PathBuf, String> {
    let kernel = env::var_os(KERNEL).map(PathBuf::from).ok_or_else(|| {
        format!(
            "{KERNEL} names no kernel; one that is unmodified needs a KVM on hardware or scripts/test-nested"
        )
    })?;
    for file in [&kernel, &PathBuf::from(BUSYBOX)] {
        fs::metadata(file).map_err(|error| format!("{}: {error}", file.display()))?;
    }
    Ok(kernel)
}

/// Modules of that kernel, in the order in which they are given, or why they cannot be had: those of the kernel that runs here, which
/// in the machine of scripts/nested-kvm is the same.
pub fn modules(directory: &str, names: &[&str]) -> Result<Vec<(String, Vec<u8>)>, String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").map_err(|error| error.to_string())?;
    let directory = PathBuf::from("/lib/modules")
        .join(release.trim())
        .join("kernel")
        .join(directory);
    let module = |name: &&str| {
        let name = format!("{name}.ko");
        let path = directory.join(&name);
        let content = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok((name, content))
    };
    names.iter().map(module).collect()
}

/// An initramfs whose first process is busybox's `init`: it runs the shell commands `setup`, and then a shell on the console.
/// `files` are names in its root, and contents.
pub fn initramfs(setup: &str, files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = Archive::default();
    for directory in ["bin", "dev", "etc", "proc", "sys"] {
        archive.add(directory, 0o40_755, (0, 0), b"");
    }
    archive.add("dev/console", 0o20_600, (5, 1), b"");
    archive.add("bin/busybox", 0o100_755, (0, 0), &fs::read(BUSYBOX).unwrap());
    archive.add("init", 0o120_777, (0, 0), BUSYBOX.as_bytes());
    archive.add(
        "etc/inittab",
        0o100_644,
        (0, 0),
        b"::sysinit:/setup\n::respawn:-/bin/sh\n",
    );
    archive.add("setup", 0o100_755, (0, 0), format!("{SETUP}{setup}").as_bytes());
    for (name, content) in files {
        archive.add(name, 0o100_644, (0, 0), content);
    }
    archive.add("TRAILER!!!", 0, (0, 0), b"");
    archive.bytes
}

/// A cpio archive of the format that Linux takes (`Documentation/driver-api/early-userspace/buffer-format.rst`).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let length = u32::try_from(content.len()).unwrap();
        let name_length = u32::try_from(name.len() + 1).unwrap();
        self.bytes.extend(b"070701");
        // Inode, mode, owner, group, links, time, size, the device it is on, the device it is, the name's length, a checksum.
        for field in [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            length,
            0,
            0,
            device.0,
            device.1,
            name_length,
            0,
        ] {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes().chain([0]));
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
