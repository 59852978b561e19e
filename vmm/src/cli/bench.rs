//! `umem bench`: what this host can do at best, and what umem makes of it, side by side.

mod faults;
mod rates;
mod start;

use std::path::PathBuf;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use rustix::thread::CpuSet;
use serde::Serialize;
use umem::measure::{Waits, make_image, run_on, usable_cpus};

use super::error::CommandError;
use crate::plot::{Axis, Plot, Scale, Series, Style};
use faults::Fault;
use rates::Rate;
use start::Start;

/// Pages of the image that is measured with: 256 MiB, far more than stays in a processor's cache.
const PAGES: u64 = 65536;

/// What `umem bench` takes.
#[derive(Debug, Args)]
pub(super) struct BenchOptions {
    /// As JSON
    #[arg(long)]
    json: bool,
    /// A tenth of the measurements: whether it works
    #[arg(long)]
    quick: bool,
    /// Draw histograms of the faults into DIR, as SVG
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
}

/// Where and how it is measured.
struct Bench {
    directory: tempfile::TempDir,
    image: PathBuf,
    usable: CpuSet,
    /// Slices of each kind, one of each kind after the other.
    slices: u64,
    progress: ProgressBar,
}

/// All that was measured.
#[derive(Serialize)]
struct Results {
    host: Host,
    faults: Vec<Fault>,
    rates: Vec<Rate>,
    start: Vec<Start>,
}

/// The host that it was measured on.
#[derive(Serialize)]
struct Host {
    cpus: u32,
    kernel: String,
}

pub(super) fn run(options: &BenchOptions) -> Result<(), CommandError> {
    if let Some(directory) = &options.svg {
        // Before anything is measured in vain.
        std::fs::create_dir_all(directory).map_err(|source| CommandError::Plots {
            path: directory.display().to_string(),
            source,
        })?;
    }
    let directory = tempfile::tempdir().map_err(CommandError::Scratch)?;
    let image = directory.path().join("image");
    make_image(&image, PAGES)?;
    let usable = usable_cpus()?;
    let style = ProgressStyle::with_template("{msg:44} {wide_bar} {pos:>3}/{len} {eta:>4}");
    let bench = Bench {
        directory,
        image,
        usable,
        slices: if options.quick { 2 } else { 20 },
        progress: ProgressBar::new(faults::STEPS + rates::STEPS + start::STEPS),
    };
    if let Ok(style) = style {
        bench.progress.set_style(style);
    }
    let measured = measure(&bench);
    bench.progress.finish_and_clear();
    run_on(&bench.usable)?;
    let results = measured?;
    if let Some(directory) = &options.svg {
        draw(&results, directory)?;
    }
    if options.json {
        say!("{:#}", serde_json::json!(results));
    } else {
        print(&results)?;
    }
    Ok(())
}

fn measure(bench: &Bench) -> Result<Results, CommandError> {
    Ok(Results {
        host: Host {
            cpus: bench.usable.count(),
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")
                .unwrap_or_default()
                .trim()
                .to_owned(),
        },
        faults: faults::measure(bench)?,
        rates: rates::measure(bench)?,
        start: start::measure(bench)?,
    })
}

impl Bench {
    /// Says what is measured next, on a terminal.
    fn step(&self, what: &str) {
        self.progress.set_message(what.to_owned());
        self.progress.inc(1);
    }
}

fn print(results: &Results) -> Result<(), CommandError> {
    let Host { cpus, kernel } = &results.host;
    say!("{cpus} CPUs, Linux {kernel}");
    say!("");
    say!("What a thread waits for a page, in us; cpus says where it runs and where it is answered");
    say!(
        "{:46} {:7} {:>8} {:>8} {:>8} {:>8} {:>6} {:>6}",
        "",
        "cpus",
        "floor",
        "p99",
        "umem",
        "p99",
        "ratio",
        "p99"
    );
    let us = |nanos: Option<u64>| nanos.map_or("-".into(), |nanos| format!("{:.1}", nanos as f64 / 1e3));
    let ratio = |ratio: Option<f64>| ratio.map_or("-".into(), |ratio| format!("{ratio:.2}"));
    for fault in &results.faults {
        let (floor, umem) = (fault.floor.as_ref(), fault.umem.as_ref());
        say!(
            "{:46} {:7} {:>8} {:>8} {:>8} {:>8} {:>6} {:>6}",
            fault.what,
            fault.cpus,
            us(floor.map(|wait| wait.p50_ns)),
            us(floor.map(|wait| wait.p99_ns)),
            us(umem.map(|wait| wait.p50_ns)),
            us(umem.map(|wait| wait.p99_ns)),
            ratio(fault.p50_ratio),
            ratio(fault.p99_ratio)
        );
    }
    say!("");
    say!("Many pages at once, in GiB/s");
    say!(
        "{:46} {:7} {:>8} {:>8} {:>6}",
        "",
        "cpus",
        "floor",
        "umem",
        "ratio"
    );
    let gib = |rate: Option<f64>| rate.map_or("-".into(), |rate| format!("{rate:.2}"));
    for rate in &results.rates {
        say!(
            "{:46} {:7} {:>8} {:>8} {:>6}",
            rate.what,
            rate.cpus,
            gib(rate.floor_gib_per_s),
            gib(rate.umem_gib_per_s),
            ratio(rate.ratio)
        );
    }
    say!("");
    if results.start.is_empty() {
        say!("VMs cannot be started here: umem check says why");
    } else {
        say!("From the start of the program to the first instruction of a VM, in ms");
        say!(
            "{:46} {:7} {:>8} {:>8} {:>6} {:>12}",
            "",
            "cpus",
            "KVM alone",
            "umem",
            "ratio",
            "own memory"
        );
    }
    for start in &results.start {
        say!(
            "{:46} {:7} {:>9.1} {:>8.1} {:>6.2} {:>8.1} MiB",
            start.what,
            "free",
            start.floor_ms,
            start.umem_ms,
            start.ratio,
            start.own_memory_kib / 1024.0
        );
    }
    Ok(())
}

/// One picture for each kind of fault that was measured against a floor.
fn draw(results: &Results, directory: &std::path::Path) -> Result<(), CommandError> {
    std::fs::create_dir_all(directory).map_err(CommandError::Scratch)?;
    for (name, title) in [
        ("local", "Faults on pages of an image of this host"),
        ("remote", "Faults on pages of a page server over TCP"),
    ] {
        let drawn = results.faults.iter().filter(|fault| fault.plot == Some(name));
        let series = drawn.flat_map(|fault| {
            let of = |who: &str, waits: &Waits| Series {
                name: format!("{who}, {}", fault.cpus),
                points: histogram(waits),
            };
            [of("floor", &fault.floor_waits), of("umem", &fault.umem_waits)]
        });
        let plot = Plot {
            title: title.into(),
            x: Axis {
                label: "time of a fault, us".into(),
                scale: Scale::Log,
            },
            y: Axis {
                label: "share of all, %".into(),
                scale: Scale::Linear,
            },
            style: Style::Steps,
            series: series.filter(|series| !series.points.is_empty()).collect(),
        };
        let path = directory.join(format!("{name}-faults.svg"));
        std::fs::write(&path, plot.svg()).map_err(|source| CommandError::Plots {
            path: directory.display().to_string(),
            source,
        })?;
    }
    Ok(())
}

/// In microseconds and percent; without the thousandth at the far end, which would make the rest small.
fn histogram(waits: &Waits) -> Vec<(f64, f64)> {
    let mut seen = 0.0;
    waits
        .histogram(8)
        .into_iter()
        .take_while(|(_, share)| {
            let before = seen;
            seen += share;
            before < 0.999
        })
        .map(|(nanos, share)| (nanos / 1e3, share * 100.0))
        .collect()
}
