//! What grows with what, in steps of 4: RAM, VMs on one page server, watched ranges. (For the dirty rate see `migration`.)

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::Bench;
use crate::child::{Running, number};
use crate::demand::make_image;
use crate::table::{Metric, Table};
use crate::umem::{Report, Server};

const PATIENCE: Duration = Duration::from_secs(500);

/// RAM of each of many VMs.
const RAM_OF_MANY: u64 = 32 << 20;

/// Steps of 4 from `first` to at most `last`.
fn steps(first: u64, last: u64) -> impl Iterator<Item = u64> {
    std::iter::successors(Some(first), |step| step.checked_mul(4)).take_while(move |step| *step <= last)
}

/// The start of a VM by the size of its RAM, which is still in a sparse image.
pub(crate) fn by_ram(bench: &Bench, largest: u64) -> Result<Table> {
    const METRICS: &[Metric] = &[
        Metric {
            name: "first instruction, ms",
            decimals: 1,
        },
        Metric {
            name: "KVM alone, ms",
            decimals: 1,
        },
        Metric {
            name: "own memory, MiB",
            decimals: 1,
        },
    ];
    let directory = bench.scratch()?;
    let path = |name: String| directory.path().join(name);
    let mut table = Table::new("growth-ram", &["RAM"], METRICS);
    for ram in steps(64 << 20, largest) {
        let image = path(format!("{ram}.img")).display().to_string();
        bench
            .umem
            .run(["image", "create", "--memory", &ram.to_string(), "-o", &image])?;
    }
    for _ in 0..bench.runs {
        for ram in steps(64 << 20, largest) {
            let measure = || -> Result<Vec<Option<f64>>> {
                let report = path("report.json".into());
                let source = format!("source=file:{}", path(format!("{ram}.img")).display());
                bench.umem.run([
                    "run",
                    "--memory",
                    &source,
                    "--report",
                    &report.display().to_string(),
                ])?;
                let report = Report::read(&report)?;
                let kvm =
                    vmm::slot_setup::measure(ram).map_err(|error| anyhow::anyhow!("KVM alone: {error}"))?;
                Ok(vec![
                    Some(report.number("/time_to_first_instruction_ms")?),
                    Some((kvm.vm + kvm.slots).as_secs_f64() * 1e3),
                    Some(report.number("/process/own_memory_kib")? / 1024.0),
                ])
            };
            table.add(&[crate::size(ram)], measure());
        }
    }
    Ok(table)
}

/// VMs that have all of their RAM at one page server at the same time.
pub(crate) fn by_vms(bench: &Bench, most: u64) -> Result<Table> {
    const METRICS: &[Metric] = &[
        Metric {
            name: "all done, s",
            decimals: 2,
        },
        Metric {
            name: "pages a second, all VMs",
            decimals: 0,
        },
        Metric {
            name: "slowest VM against the median",
            decimals: 2,
        },
        Metric {
            name: "server's memory at most, MiB",
            decimals: 1,
        },
        Metric {
            name: "a VM's own memory, MiB",
            decimals: 1,
        },
    ];
    let directory = bench.scratch()?;
    let image = directory.path().join("image");
    make_image(bench, RAM_OF_MANY, &image)?;
    let listen = format!("unix:{}", directory.path().join("pages.sock").display());
    let mut table = Table::new("growth-vms", &["VMs"], METRICS);
    for _ in 0..bench.runs {
        for count in steps(1, most) {
            let measure = || -> Result<Vec<Option<f64>>> {
                // The most that a server took is that of all its life.
                let mut server = Server::start(&bench.umem, &listen, &image)?;
                let memory = format!("source={}", server.url);
                let report = |number: u64| directory.path().join(format!("{number}.json"));
                let since = Instant::now();
                let vms: Vec<Running> = (0..count)
                    .map(|number| {
                        let report = report(number).display().to_string();
                        bench
                            .umem
                            .start(["run", "--memory", &memory, "--report", &report])
                    })
                    .collect::<Result<_>>()?;
                for mut vm in vms {
                    vm.succeed(PATIENCE)?;
                }
                let elapsed = since.elapsed().as_secs_f64();
                let (mut totals, mut pages, mut own): (Vec<f64>, f64, Vec<f64>) = (vec![], 0.0, vec![]);
                for number in 0..count {
                    let report = Report::read(&report(number))?;
                    totals.push(report.number("/total_ms")?);
                    pages += report.number("/pages/demand")?;
                    own.push(report.number("/process/own_memory_kib")? / 1024.0);
                }
                let slowest = totals.iter().copied().fold(0.0, f64::max);
                let median = crate::table::median(&totals).context("no VM")?;
                let peak = server.running.status_kib("VmHWM")? as f64 / 1024.0;
                server.running.terminate()?;
                Ok(vec![
                    Some(elapsed),
                    Some(pages / elapsed),
                    Some(slowest / median),
                    Some(peak),
                    crate::table::median(&own),
                ])
            };
            table.add(&[count.to_string()], measure());
        }
    }
    Ok(table)
}

/// Unmapping pages while more and more ranges are watched, each in a process of its own: what a watcher leaves in an address space
/// is not nothing.
pub(crate) fn by_ranges(bench: &Bench, most: u64) -> Result<Table> {
    const METRICS: &[Metric] = &[
        Metric {
            name: "munmap beside them, ns",
            decimals: 0,
        },
        Metric {
            name: "munmap of one, ns",
            decimals: 0,
        },
        Metric {
            name: "registering one, ns",
            decimals: 0,
        },
        Metric {
            name: "memory, MiB",
            decimals: 1,
        },
    ];
    let program = std::env::current_exe().context("this program")?;
    let mut table = Table::new("growth-ranges", &["watched ranges"], METRICS);
    for _ in 0..bench.runs {
        for ranges in std::iter::once(0).chain(steps(1024, most)) {
            let measure = || -> Result<Vec<Option<f64>>> {
                let mut child = Running::start(
                    "watching ranges",
                    Command::new(&program).args(["--watch", &ranges.to_string()]),
                )?;
                child.succeed(PATIENCE)?;
                let text = child.text_from(0);
                let figure = |key| number(&text, key).map(|figure| figure as f64);
                Ok(vec![
                    figure("miss_ns"),
                    figure("hit_ns"),
                    figure("register_ns"),
                    figure("memory_kib").map(|kib| kib / 1024.0),
                ])
            };
            table.add(&[ranges.to_string()], measure());
        }
    }
    Ok(table)
}
