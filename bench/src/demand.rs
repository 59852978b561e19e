//! How long a VM waits for the pages that it touches, with and without other work for who answers.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::Bench;
use crate::child::Running;
use crate::table::{Metric, Table};
use crate::umem::{Report, Server};

const PATIENCE: Duration = Duration::from_mins(5);

/// Of the image's content.
const SEED: u64 = 2026;

/// VMs that have all of their RAM at one server at the same time.
const CROWD: usize = 4;

const METRICS: &[Metric] = &[
    Metric {
        name: "a page, us",
        decimals: 1,
    },
    Metric {
        name: "fault p50, us",
        decimals: 1,
    },
    Metric {
        name: "fault p99, us",
        decimals: 1,
    },
];

/// Where pages come from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum From {
    File,
    Unix,
    Tcp,
}

/// What else goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Load {
    None,
    Fill,
    Crowd,
}

const KINDS: &[(From, Load, &str)] = &[
    (From::File, Load::None, "free"),
    (From::File, Load::None, "beside"),
    (From::File, Load::Fill, "free"),
    (From::File, Load::Fill, "beside"),
    (From::Unix, Load::None, "free"),
    (From::Unix, Load::Fill, "free"),
    (From::Unix, Load::Crowd, "free"),
    (From::Tcp, Load::None, "free"),
    (From::Tcp, Load::Fill, "free"),
    (From::Tcp, Load::Crowd, "free"),
];

/// VMs of `ram` bytes that check every page in random order.
pub(crate) fn compare(bench: &Bench, ram: u64) -> Result<Table> {
    let directory = bench.scratch()?;
    let image = directory.path().join("image");
    make_image(bench, ram, &image)?;
    let path = directory.path();
    let unix = Server::start(
        &bench.umem,
        &format!("unix:{}", path.join("pages.sock").display()),
        &image,
    )?;
    let tcp = Server::start(&bench.umem, "tcp:127.0.0.1:0", &image)?;
    let mut table = Table::new("demand", &["pages from", "beside it", "placement"], METRICS);
    for _ in 0..bench.runs {
        for (from, load, placement) in KINDS {
            let (source, name) = match from {
                From::File => (format!("file:{}", image.display()), "file"),
                From::Unix => (unix.url.clone(), "page server, unix"),
                From::Tcp => (tcp.url.clone(), "page server, tcp"),
            };
            let (fill, crowd, beside) = match load {
                Load::None => ("off", 1, "nothing"),
                Load::Fill => ("sequential", 1, "its own fill"),
                Load::Crowd => ("off", CROWD, "3 VMs that do the same"),
            };
            let memory = format!("source={source},fill={fill}");
            let cpus = format!("boot=1,placement={placement}");
            let labels = [name, beside, placement].map(str::to_owned);
            table.add(&labels, run(bench, &memory, &cpus, crowd));
        }
    }
    Ok(table)
}

/// An image each of whose pages says what it is, and a guest that looks.
pub(crate) fn make_image(bench: &Bench, ram: u64, path: &std::path::Path) -> Result<()> {
    bench.umem.run([
        "image",
        "create",
        "--memory",
        &ram.to_string(),
        "--fill",
        &format!("pattern:{SEED}"),
        "--cmdline",
        &format!("workload=verify pages=all order=random seed={SEED} full=off"),
        "-o",
        &path.display().to_string(),
    ])?;
    Ok(())
}

/// So many of the same at once; what is measured is the first.
fn run(bench: &Bench, memory: &str, cpus: &str, count: usize) -> Result<Vec<Option<f64>>> {
    let directory = bench.scratch()?;
    let report = |number: usize| directory.path().join(format!("report{number}.json"));
    let vms: Vec<Running> = (0..count)
        .map(|number| {
            let report = report(number).display().to_string();
            bench
                .umem
                .start(["run", "--memory", memory, "--cpus", cpus, "--report", &report])
        })
        .collect::<Result<_>>()?;
    let mut measured = None;
    for mut vm in vms {
        vm.succeed(PATIENCE)?;
        let line = vm.wait_for_line(0, PATIENCE, |line| line.starts_with("verified="))?;
        anyhow::ensure!(
            line.number("wrong")? == 0,
            "the guest found wrong pages: {}",
            line.text
        );
        measured = measured.or(Some((line.number("elapsed_us")?, line.number("verified")?)));
    }
    let (elapsed_us, pages) = measured.context("no VM")?;
    figures(&Report::read(&report(0))?, elapsed_us, pages)
}

fn figures(report: &Report, elapsed_us: u64, pages: u64) -> Result<Vec<Option<f64>>> {
    Ok(vec![
        Some(elapsed_us as f64 / pages as f64),
        Some(report.number("/demand_fault_us/p50")?),
        Some(report.number("/demand_fault_us/p99")?),
    ])
}
