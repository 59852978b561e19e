//! Restoring a VM: from the start of the process to the guest's first line, umem's ways against QEMU's.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::Bench;
use crate::qemu::{self, QemuVm};
use crate::table::{Metric, Table};
use crate::umem::{Report, Server};

const PATIENCE: Duration = Duration::from_mins(2);

/// The most memory that the guest has written to when it is saved.
const MOST_WRITTEN: u64 = 1 << 30;

const METRICS: &[Metric] = &[
    Metric {
        name: "first output, ms",
        decimals: 1,
    },
    Metric {
        name: "all pages, ms",
        decimals: 0,
    },
    Metric {
        name: "resident at first output, MiB",
        decimals: 1,
    },
    Metric {
        name: "file, MiB",
        decimals: 0,
    },
];

/// A way to restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    UmemFile { eager: bool },
    UmemServer { socket: &'static str, eager: bool },
    QemuStream,
    QemuMappedRam,
}

impl Way {
    const ALL: [Self; 8] = [
        Self::UmemFile { eager: false },
        Self::QemuMappedRam,
        Self::UmemFile { eager: true },
        Self::UmemServer {
            socket: "unix",
            eager: false,
        },
        Self::UmemServer {
            socket: "unix",
            eager: true,
        },
        Self::QemuStream,
        Self::UmemServer {
            socket: "tcp",
            eager: false,
        },
        Self::UmemServer {
            socket: "tcp",
            eager: true,
        },
    ];

    fn name(self) -> String {
        let how = |eager| if eager { "eagerly" } else { "lazily" };
        match self {
            Self::UmemFile { eager } => format!("umem, file, {}", how(eager)),
            Self::UmemServer { socket, eager } => format!("umem, page server ({socket}), {}", how(eager)),
            Self::QemuStream => "QEMU, file".into(),
            Self::QemuMappedRam => "QEMU, file, mapped-ram".into(),
        }
    }
}

/// The same guest saved by each program, and page servers for umem's file.
struct Saved {
    directory: tempfile::TempDir,
    servers: Vec<Server>,
    ram: u64,
    command_line: String,
}

/// Restores by every way VMs of each of `sizes` bytes.
pub(crate) fn compare(bench: &Bench, sizes: &[u64]) -> Table {
    let mut table = Table::new("restore", &["RAM", "way"], METRICS);
    for &ram in sizes {
        let saved = match Saved::make(bench, ram) {
            Ok(saved) => saved,
            Err(error) => {
                table.add(&[crate::size(ram), "saving".into()], Err(error));
                continue;
            }
        };
        for _ in 0..bench.runs {
            for way in Way::ALL {
                let labels = [crate::size(ram), way.name()];
                table.add(&labels, saved.restore(bench, way));
            }
        }
    }
    table
}

impl Saved {
    fn make(bench: &Bench, ram: u64) -> Result<Self> {
        let directory = bench.scratch()?;
        let pages = (ram / 2).min(MOST_WRITTEN) / 4096;
        // A line each millisecond, so that the first one is no later than that.
        let command_line = format!("workload=watch pages={pages} rounds=forever period_us=1000");
        let mut saved = Self {
            directory,
            servers: Vec::new(),
            ram,
            command_line,
        };
        saved.save_umem(bench).context("saving a VM of umem")?;
        for way in [Way::QemuStream, Way::QemuMappedRam] {
            saved
                .save_qemu(bench, way)
                .with_context(|| format!("saving for {}", way.name()))?;
        }
        let image = saved.umem_snapshot().join("snapshot.img");
        let socket = format!("unix:{}", saved.directory.path().join("pages.sock").display());
        for listen in [socket.as_str(), "tcp:127.0.0.1:0"] {
            saved.servers.push(Server::start(&bench.umem, listen, &image)?);
        }
        Ok(saved)
    }

    fn umem_snapshot(&self) -> PathBuf {
        self.directory.path().join("umem")
    }

    fn qemu_file(&self, way: Way) -> PathBuf {
        let name = if way == Way::QemuMappedRam {
            "mapped-ram"
        } else {
            "stream"
        };
        self.directory.path().join(name)
    }

    fn save_umem(&self, bench: &Bench) -> Result<()> {
        let socket = self.directory.path().join("api.sock");
        let vm = bench.umem.start([
            "run",
            "--memory",
            &format!("size={},fill=sequential", self.ram),
            "--cmdline",
            &self.command_line,
            "--api-socket",
            &socket.display().to_string(),
        ])?;
        vm.wait_for_line(0, PATIENCE, |line| line.starts_with("round=2 "))?;
        let destination = format!(
            "destination_url=file:{},then=stop",
            self.umem_snapshot().display()
        );
        bench.umem.ctl(&socket, &["snapshot", &destination])?;
        Ok(())
    }

    fn save_qemu(&self, bench: &Bench, way: Way) -> Result<()> {
        let mut vm = QemuVm::start(&self.qemu_options(bench, &[]))?;
        vm.running
            .wait_for_line(0, PATIENCE, |line| line.starts_with("round=2 "))?;
        vm.capabilities(Self::qemu_capabilities(way))?;
        vm.parameters(json!({"max-bandwidth": 100_u64 << 30}))?;
        let uri = format!("file:{}", self.qemu_file(way).display());
        // A VM that is saved while it runs does so when it is restored.
        vm.qmp.execute("migrate", json!({"uri": uri}))?;
        let state = vm.qmp.migration_state(&["completed", "failed"], PATIENCE)?;
        if state != "completed" {
            bail!("QEMU could not save the VM");
        }
        Ok(())
    }

    fn qemu_capabilities(way: Way) -> &'static [&'static str] {
        if way == Way::QemuMappedRam {
            &["events", "mapped-ram"]
        } else {
            &["events"]
        }
    }

    fn qemu_options<'a>(&'a self, bench: &'a Bench, more: &'a [&'a str]) -> qemu::Options<'a> {
        qemu::Options {
            program: &bench.qemu,
            kernel: &bench.kernel,
            ram: self.ram,
            command_line: &self.command_line,
            more,
        }
    }

    fn restore(&self, bench: &Bench, way: Way) -> Result<Vec<Option<f64>>> {
        crate::touch_free_memory((self.ram / 2).min(MOST_WRITTEN))?;
        let umem_file = self.umem_snapshot().join("snapshot.img");
        match way {
            Way::UmemFile { eager } => self.restore_umem(
                bench,
                &self.umem_snapshot().display().to_string(),
                eager,
                &umem_file,
            ),
            Way::UmemServer { socket, eager } => {
                let server = self.servers.iter().find(|server| server.url.starts_with(socket));
                let server = server.context("no page server")?;
                self.restore_umem(bench, &server.url, eager, &umem_file)
            }
            Way::QemuStream | Way::QemuMappedRam => self.restore_qemu(bench, way),
        }
    }

    fn restore_umem(
        &self,
        bench: &Bench,
        snapshot: &str,
        eager: bool,
        file: &Path,
    ) -> Result<Vec<Option<f64>>> {
        let path = |name: &str| self.directory.path().join(name);
        let (report, events) = (path("report.json"), path("events.jsonl"));
        // It is written at its end.
        let _ = std::fs::remove_file(&events);
        let fill = if eager { "sequential" } else { "off" };
        let mut vm = bench.umem.start([
            "run",
            "--snapshot",
            snapshot,
            "--memory",
            &format!("fill={fill}"),
            "--event-monitor",
            &format!("path={}", events.display()),
            "--report",
            &report.display().to_string(),
        ])?;
        let first = vm.wait_for_line(0, PATIENCE, |line| line.starts_with("round="))?;
        let resident = vm.status_kib("VmRSS")?;
        if eager {
            let deadline = Instant::now() + PATIENCE;
            // Looking into a file is no load beside the fill, which gives way to every other thread.
            while !all_pages_present(&events)? {
                anyhow::ensure!(Instant::now() < deadline, "not all pages came");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        vm.terminate()?;
        let report = Report::read(&report)?;
        let all_pages = report.number("/time_to_all_pages_ms").ok();
        let first = (first.at - vm.started()).as_secs_f64() * 1e3;
        Ok(vec![
            Some(first),
            all_pages,
            Some(resident as f64 / 1024.0),
            size_on_disk(file),
        ])
    }

    fn restore_qemu(&self, bench: &Bench, way: Way) -> Result<Vec<Option<f64>>> {
        let file = self.qemu_file(way);
        let uri = format!("file:{}", file.display());
        let more = if way == Way::QemuMappedRam {
            // The same as by the monitor, without waiting for that.
            vec!["-global", "migration.mapped-ram=on", "-incoming", &uri]
        } else {
            vec!["-incoming", &uri]
        };
        let (vm, _monitor) = qemu::start(&self.qemu_options(bench, &more))?;
        let first = vm.wait_for_line(0, PATIENCE, |line| line.starts_with("round="))?;
        let resident = vm.status_kib("VmRSS")? as f64 / 1024.0;
        let first = (first.at - vm.started()).as_secs_f64() * 1e3;
        // It has them all before the guest runs.
        Ok(vec![
            Some(first),
            Some(first),
            Some(resident),
            size_on_disk(&file),
        ])
    }
}

/// Whether umem has left, by the events that it wrote.
fn all_pages_present(events: &Path) -> Result<bool> {
    let text = std::fs::read_to_string(events).context("the events")?;
    Ok(text.contains("all-pages-present"))
}

fn size_on_disk(file: &Path) -> Option<f64> {
    let metadata = std::fs::metadata(file).ok()?;
    Some((metadata.blocks() * 512) as f64 / f64::from(1 << 20))
}
