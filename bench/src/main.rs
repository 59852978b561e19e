//! umem and QEMU on the same work, side by side, in one run: what `scripts/bench` runs. `docs/benchmarks.md` says what is measured
//! and what it means.

mod about;
mod child;
mod demand;
mod growth;
mod migration;
mod qemu;
mod qmp;
mod restore;
mod results;
mod table;
mod umem;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;

use table::Table;
use umem::Umem;

/// Measures umem beside QEMU, and writes tables and plots.
#[derive(Debug, Parser)]
struct CommandLine {
    /// The program umem
    #[arg(long, value_name = "FILE", required_unless_present = "watch")]
    umem: Option<PathBuf>,
    /// The program QEMU
    #[arg(long, value_name = "FILE", required_unless_present = "watch")]
    qemu: Option<PathBuf>,
    /// Where results go
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    out: PathBuf,
    /// A document whose tables and plots are replaced by those measured
    #[arg(long, value_name = "FILE")]
    document: Option<PathBuf>,
    /// How often each is measured
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// The smallest of everything, once: whether it works
    #[arg(long)]
    quick: bool,
    /// Which parts; all if none is named
    #[arg(value_name = "PART", value_parser = PARTS)]
    parts: Vec<String>,
    /// RAM of the VMs that migrate, in MiB
    #[arg(long, value_delimiter = ',', value_name = "MIB")]
    migration_sizes: Vec<u64>,
    /// RAM of the VMs that are restored, in MiB
    #[arg(long, value_delimiter = ',', value_name = "MIB")]
    restore_sizes: Vec<u64>,
    /// Measure one process that watches so many ranges
    #[arg(long, hide = true, value_name = "RANGES")]
    watch: Option<u64>,
}

const PARTS: [&str; 8] = [
    "limits",
    "migration",
    "restore",
    "demand",
    "growth-ram",
    "growth-dirty",
    "growth-vms",
    "growth-ranges",
];

/// What all measurements need.
struct Bench {
    umem: Umem,
    qemu: PathBuf,
    /// The guest's ELF file.
    kernel: PathBuf,
    out: PathBuf,
    runs: usize,
    quick: bool,
    /// Where files are made that are gone afterwards.
    scratch: tempfile::TempDir,
}

impl Bench {
    /// A directory that is gone when it is dropped.
    fn scratch(&self) -> Result<tempfile::TempDir> {
        tempfile::tempdir_in(self.scratch.path()).context("a directory")
    }
}

/// A size for people: `256M`, `4G`.
fn size(bytes: u64) -> String {
    match bytes {
        _ if bytes >= 1 << 30 && bytes.is_multiple_of(1 << 30) => format!("{}G", bytes >> 30),
        _ if bytes >= 1 << 20 && bytes.is_multiple_of(1 << 20) => format!("{}M", bytes >> 20),
        _ => format!("{}K", bytes >> 10),
    }
}

/// Touches much more memory that nobody uses than the `bytes` that are going to be needed, so that this host, if it is a VM itself,
/// has it from its own host by then. The first touch of a page that it has not can take ten times as long, and whether that is so
/// depends on what ran before: it would be counted for whoever comes first.
fn touch_free_memory(bytes: u64) -> Result<()> {
    // Which free memory is used next is the kernel's choice.
    let bytes = (bytes as usize * 3).max(3 << 30);
    // SAFETY: new private memory, of which nobody else knows, is written to in its own bounds and given back.
    unsafe {
        let flags = rustix::mm::MapFlags::PRIVATE;
        let protection = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
        let start = rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, protection, flags)
            .context("no memory to touch")?;
        for offset in (0..bytes).step_by(4096) {
            start.cast::<u8>().add(offset).write_volatile(1);
        }
        rustix::mm::munmap(start, bytes).context("munmap")
    }
}

fn main() -> ExitCode {
    match run(CommandLine::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: CommandLine) -> Result<()> {
    if let Some(ranges) = options.watch {
        return watch::run(ranges);
    }
    let scratch = tempfile::tempdir().context("a directory")?;
    let kernel = scratch.path().join("guest");
    std::fs::write(&kernel, vmm::boot::builtin::GUEST_ELF).context("the guest's file")?;
    let bench = Bench {
        umem: Umem(options.umem.context("--umem")?),
        qemu: options.qemu.context("--qemu")?,
        kernel,
        out: options.out,
        runs: if options.quick { 1 } else { options.runs },
        quick: options.quick,
        scratch,
    };
    std::fs::create_dir_all(&bench.out).context("the directory of the results")?;
    let about = about::about(&bench)?;
    let in_words = about::in_words(&about);
    println!("{in_words}");
    let sizes = |given: &[u64], full: &[u64]| -> Vec<u64> {
        let mib = match given {
            [] if bench.quick => &[64],
            [] => full,
            _ => given,
        };
        mib.iter().map(|mib| mib << 20).collect()
    };
    let migration_sizes = sizes(&options.migration_sizes, &[256, 1024, 4096]);
    let restore_sizes = sizes(&options.restore_sizes, &[64, 256, 1024, 4096, 16384]);
    let quick_or = |quick, full| if bench.quick { quick } else { full };
    let mut tables: Vec<Table> = Vec::new();
    for part in PARTS {
        if !options.parts.is_empty() && !options.parts.iter().any(|wanted| wanted == part) {
            continue;
        }
        let measured = match part {
            "limits" => limits(&bench)?,
            "migration" => vec![migration::compare(&bench, &migration_sizes)],
            "restore" => vec![restore::compare(&bench, &restore_sizes)],
            "demand" => vec![demand::compare(&bench, quick_or(32 << 20, 256 << 20))?],
            "growth-ram" => vec![growth::by_ram(&bench, quick_or(256 << 20, 64 << 30))?],
            "growth-dirty" => {
                vec![migration::by_dirty_rate(&bench, quick_or(64 << 20, 256 << 20))]
            }
            "growth-vms" => vec![growth::by_vms(&bench, quick_or(4, 64))?],
            _ => vec![growth::by_ranges(&bench, quick_or(4096, 1 << 20))?],
        };
        // Of a run that does not come to its end, what was measured is left.
        results::write(&bench.out, &in_words, &measured)?;
        tables.extend(measured);
        results::write_samples(&bench.out, &about, &tables)?;
        if let Some(document) = &options.document {
            results::update(document, &bench.out)?;
        }
    }
    let failures: usize = tables
        .iter()
        .flat_map(|table| &table.rows)
        .map(|row| row.failures.len())
        .sum();
    if bench.quick && failures > 0 {
        anyhow::bail!("{failures} measurements failed");
    }
    Ok(())
}

/// What `umem bench` measures, and its pictures.
fn limits(bench: &Bench) -> Result<Vec<Table>> {
    let out = bench.out.display().to_string();
    let mut args = vec!["bench", "--json", "--svg", &out];
    if bench.quick {
        args.push("--quick");
    }
    let text = bench.umem.run(args)?;
    let measured = serde_json::from_str(&text).context("what umem bench says")?;
    Ok(results::limits(&measured))
}
