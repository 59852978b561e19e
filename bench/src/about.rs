//! Where and how it was measured.

use std::process::Command;

use anyhow::Result;
use serde_json::{Value, json};

use crate::Bench;
use crate::qemu;

/// Date, machine, programs, command.
pub(crate) fn about(bench: &Bench) -> Result<Value> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let model = cpus
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown", |(_, model)| model);
    let memory = read("/proc/meminfo");
    let kib: u64 = memory
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemTotal:")?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .unwrap_or(0);
    let said = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output();
        output.map_or_else(
            |_| "unknown".to_owned(),
            |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        )
    };
    Ok(json!({
        "date": said("date", &["--utc", "+%Y-%m-%d %H:%M UTC"]),
        "cpu": model,
        "cpus": std::thread::available_parallelism().map_or(1, usize::from),
        "memory_gib": kib.div_ceil(1 << 20),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "umem": bench.umem.version()?,
        "commit": said("git", &["rev-parse", "--short", "HEAD"]),
        "qemu": qemu::version(&bench.qemu)?,
        "runs": bench.runs,
        "load_at_start": read("/proc/loadavg").split_whitespace().next(),
    }))
}

/// The same in words, for the document.
pub(crate) fn in_words(about: &Value) -> String {
    let text = |key: &str| match &about[key] {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    format!(
        "{}, {} CPUs ({}), {} GiB of memory, Linux {}, load {} at the start; {} at commit {}, {}; {} runs of each; \
         no program is bound to CPUs where a row does not say so.\n",
        text("date"),
        text("cpus"),
        text("cpu"),
        text("memory_gib"),
        text("kernel"),
        text("load_at_start"),
        text("umem"),
        text("commit"),
        text("qemu"),
        text("runs"),
    )
}
