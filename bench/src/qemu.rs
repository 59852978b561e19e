//! A VM of QEMU.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::child::Running;
use crate::qmp::Qmp;

/// How to start one.
pub(crate) struct Options<'a> {
    /// QEMU's program.
    pub(crate) program: &'a Path,
    /// The guest's ELF file.
    pub(crate) kernel: &'a Path,
    /// Bytes of RAM.
    pub(crate) ram: u64,
    /// The guest's command line.
    pub(crate) command_line: &'a str,
    /// Options of its own.
    pub(crate) more: &'a [&'a str],
}

/// A VM of QEMU that runs, or waits for its state.
pub(crate) struct QemuVm {
    pub(crate) running: Running,
    pub(crate) qmp: Qmp,
}

/// Starts QEMU with nothing but the machine, the guest and its serial port. The monitor's descriptor is for [`Qmp::begin`].
pub(crate) fn start(options: &Options<'_>) -> Result<(Running, UnixStream)> {
    let (here, there) = UnixStream::pair().context("a socket pair")?;
    // The program inherits it.
    rustix::io::fcntl_setfd(&there, rustix::io::FdFlags::empty()).context("fcntl(F_SETFD)")?;
    let mut command = Command::new(options.program);
    command
        .args([
            "-accel",
            "kvm",
            "-machine",
            "pc",
            "-nodefaults",
            "-no-user-config",
        ])
        .args(["-display", "none", "-no-reboot", "-serial", "stdio"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
        .args(["-m", &format!("{}M", options.ram >> 20)])
        .args(["-chardev", &format!("socket,id=monitor,fd={}", there.as_raw_fd())])
        .args(["-mon", "chardev=monitor,mode=control"])
        .args(["-append", options.command_line])
        .arg("-kernel")
        .arg(options.kernel)
        .args(options.more);
    let running = Running::start("QEMU", &mut command)?;
    Ok((running, here))
}

impl QemuVm {
    /// Starts one.
    pub(crate) fn start(options: &Options<'_>) -> Result<Self> {
        let (running, monitor) = start(options)?;
        let qmp = Qmp::begin(monitor)?;
        Ok(Self { running, qmp })
    }

    /// Switches capabilities of migration on.
    pub(crate) fn capabilities(&mut self, names: &[&str]) -> Result<()> {
        let list: Vec<Value> = names
            .iter()
            .map(|name| json!({"capability": name, "state": true}))
            .collect();
        self.qmp
            .execute("migrate-set-capabilities", json!({"capabilities": list}))?;
        Ok(())
    }

    /// Sets parameters of migration.
    pub(crate) fn parameters(&mut self, parameters: Value) -> Result<()> {
        self.qmp.execute("migrate-set-parameters", parameters)?;
        Ok(())
    }
}

/// The version that a program says it is.
pub(crate) fn version(program: &Path) -> Result<String> {
    let output = Command::new(program)
        .arg("--version")
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let first = text.lines().next().unwrap_or_default();
    Ok(first.replace("QEMU emulator version ", "QEMU "))
}
