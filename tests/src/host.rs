//! What this machine offers, and skipping what needs more.

use std::any::type_name_of_val;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::process::{Command, Stdio};

/// Whether VMs can be run here, or else why not.
pub fn kvm() -> Result<(), String> {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map(drop)
        .map_err(|error| format!("/dev/kvm: {error}"))
}

/// Whether this process may use more than one CPU, or else why not.
pub fn two_cpus() -> Result<(), String> {
    match std::thread::available_parallelism() {
        Ok(count) if count.get() > 1 => Ok(()),
        Ok(_) => Err("there is one CPU".into()),
        Err(error) => Err(format!("the number of CPUs: {error}")),
    }
}

/// Whether this process may have a mount namespace of its own, or else why not.
pub fn mount_namespace() -> Result<(), String> {
    succeeds("unshare", &["--mount", "--propagation", "private", "true"])
}

/// Whether a program is there and ends well with these arguments.
pub fn succeeds(program: &str, args: &[&str]) -> Result<(), String> {
    match Command::new(program).args(args).stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!(
            "{program}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
        Err(error) => Err(format!("{program}: {error}")),
    }
}

/// Whether processes without privileges may use userfaultfd in full.
pub fn userfaultfd_is_for_everybody() -> bool {
    fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").is_ok_and(|text| text.trim() == "1")
}

/// Huge pages of 2 MiB that nobody has.
pub fn free_huge_pages() -> u64 {
    fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0)
}

/// Says that a test is skipped. `inside` is a function defined in it. The output of tests that succeed is not shown, but this
/// goes past that.
pub fn announce_skip<F>(inside: &F, reason: fmt::Arguments<'_>) {
    let name = type_name_of_val(inside);
    let name = name.rsplit_once("::").map_or(name, |(test, _)| test);
    // If even that cannot be written, nobody reads it.
    let _ = writeln!(io::stderr(), "skipped: {name}: {reason}");
}

/// Ends the test, saying that it is skipped and why.
#[macro_export]
macro_rules! skip {
    ($($reason:tt)*) => {{
        fn here() {}
        $crate::host::announce_skip(&here, format_args!($($reason)*));
        return;
    }};
}

/// Skips the test if this `Result` is an error, which is the reason.
#[macro_export]
macro_rules! need {
    ($condition:expr) => {
        if let Err(reason) = $condition {
            $crate::skip!("{reason}");
        }
    };
}
