//! Live migration over TCP on loopback, umem's modes against QEMU's: the same guest, the same KVM, the same memory.

use std::fmt;
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::Bench;
use crate::child::{self, Running};
use crate::qemu::{self, QemuVm};
use crate::table::{Metric, Table};
use crate::umem::Report;

/// How long a migration may take before it is given up.
const LIMIT: Duration = Duration::from_secs(20);

/// How long a guest may take until it has filled its memory, or until its next line.
const GUEST: Duration = Duration::from_mins(1);

/// A way to migrate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Umem(&'static str),
    Qemu(QemuWay),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QemuWay {
    Precopy,
    Multifd,
    Postcopy,
    Preempt,
}

impl Way {
    const ALL: [Self; 7] = [
        Self::Qemu(QemuWay::Precopy),
        Self::Umem("precopy"),
        Self::Qemu(QemuWay::Multifd),
        Self::Umem("hybrid"),
        Self::Qemu(QemuWay::Postcopy),
        Self::Umem("postcopy"),
        Self::Qemu(QemuWay::Preempt),
    ];
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Umem(mode) => write!(f, "umem {mode}"),
            Self::Qemu(QemuWay::Precopy) => f.write_str("QEMU precopy"),
            Self::Qemu(QemuWay::Multifd) => f.write_str("QEMU precopy, multifd"),
            Self::Qemu(QemuWay::Postcopy) => f.write_str("QEMU postcopy"),
            Self::Qemu(QemuWay::Preempt) => f.write_str("QEMU postcopy, preempt"),
        }
    }
}

/// What the guest does meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    /// Half of its memory is written, then it looks at the clock.
    Idle,
    /// It writes to so many pages, one after another, as fast as it can.
    Dirty { pages: u64 },
}

impl Load {
    fn command_line(self, ram: u64) -> String {
        match self {
            Self::Idle => format!(
                "workload=watch pages={} rounds=forever period_us=20000",
                ram / 2 / 4096
            ),
            Self::Dirty { pages } => format!("workload=dirty pages={pages} rounds=forever"),
        }
    }
}

/// What one migration was like.
struct Moved {
    /// The longest time that the guest saw between two looks, and the same before the migration, in milliseconds.
    worst_gap_ms: f64,
    quiet_gap_ms: f64,
    /// From the command to the end on both sides.
    total: Duration,
    /// As the program counts it.
    downtime_ms: Option<f64>,
    bytes: Option<f64>,
    /// Of both processes, without the guest's.
    cpu: Duration,
}

const METRICS: &[Metric] = &[
    Metric {
        name: "worst gap, ms",
        decimals: 1,
    },
    Metric {
        name: "gap before, ms",
        decimals: 1,
    },
    Metric {
        name: "total, ms",
        decimals: 0,
    },
    Metric {
        name: "downtime by its own count, ms",
        decimals: 1,
    },
    Metric {
        name: "sent, MiB",
        decimals: 0,
    },
    Metric {
        name: "CPU, s",
        decimals: 2,
    },
];

impl Moved {
    fn figures(&self) -> Vec<Option<f64>> {
        vec![
            Some(self.worst_gap_ms),
            Some(self.quiet_gap_ms),
            Some(self.total.as_secs_f64() * 1e3),
            self.downtime_ms,
            self.bytes.map(|bytes| bytes / f64::from(1 << 20)),
            Some(self.cpu.as_secs_f64()),
        ]
    }
}

/// Migrates by every way, with an idle and with a dirtying guest, of each of `sizes` bytes.
pub(crate) fn compare(bench: &Bench, sizes: &[u64]) -> Table {
    let mut table = Table::new("migration", &["RAM", "guest", "way"], METRICS);
    for &ram in sizes {
        for (name, load) in [
            ("idle", Load::Idle),
            (
                "dirtying half",
                Load::Dirty {
                    pages: ram / 2 / 4096,
                },
            ),
        ] {
            for _ in 0..bench.runs {
                for way in bench.ways() {
                    let labels = [crate::size(ram), name.to_owned(), way.to_string()];
                    table.add(
                        &labels,
                        migrate(bench, way, ram, load).map(|moved| moved.figures()),
                    );
                }
            }
        }
    }
    table
}

/// Migrates by every way a guest that writes to more and more of its memory.
pub(crate) fn by_dirty_rate(bench: &Bench, ram: u64) -> Table {
    let mut table = Table::new("growth-dirty", &["RAM", "writes to", "way"], METRICS);
    let mut pages = (ram / 4096 / 512).max(16);
    while pages <= ram / 4096 / 2 {
        for _ in 0..bench.runs {
            for way in bench.ways() {
                let labels = [crate::size(ram), crate::size(pages * 4096), way.to_string()];
                let moved = migrate(bench, way, ram, Load::Dirty { pages });
                table.add(&labels, moved.map(|moved| moved.figures()));
            }
        }
        pages *= 4;
    }
    table
}

impl Bench {
    /// The ways that this build of umem has, and all of QEMU's.
    fn ways(&self) -> impl Iterator<Item = Way> {
        let receives = self.umem.has(&["receive"]);
        Way::ALL.into_iter().filter(move |way| match way {
            Way::Umem(mode) => receives && (!self.quick || *mode == "postcopy"),
            Way::Qemu(way) => !self.quick || *way == QemuWay::Postcopy,
        })
    }
}

fn migrate(bench: &Bench, way: Way, ram: u64, load: Load) -> Result<Moved> {
    match way {
        Way::Qemu(way) => migrate_qemu(bench, way, ram, load),
        Way::Umem(mode) => migrate_umem(bench, mode, ram, load),
    }
}

/// A TCP port of loopback on which nobody listens.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("a free port")?;
    Ok(listener.local_addr().context("a free port")?.port())
}

/// Both sides of a migration as the guest's output and the processor see them.
struct Sides<'a> {
    source: &'a Running,
    destination: &'a Running,
    quiet_gap_ms: f64,
    /// Where the source's output was when the migration began, and the destination's.
    marks: (usize, usize),
    cpu: Duration,
    began: Instant,
}

impl<'a> Sides<'a> {
    /// Waits until the guest has filled its memory and has been watched for a while, then begins to measure. The destination is going
    /// to need `memory` bytes.
    fn begin(source: &'a Running, destination: &'a Running, memory: u64) -> Result<Self> {
        // The rounds before are those in which memory and page tables were made.
        let line = source.wait_for_line(0, GUEST, |line| line.starts_with("round=2 "))?;
        let mut quiet_gap_ms: f64 = 0.0;
        let mut end = line.end;
        let until = Instant::now() + Duration::from_millis(300);
        while Instant::now() < until {
            let line = source.wait_for_line(end, GUEST, is_round)?;
            quiet_gap_ms = quiet_gap_ms.max(line.number("worst_gap_us")? as f64 / 1e3);
            end = line.end;
        }
        crate::touch_free_memory(memory)?;
        // The round of meanwhile is not counted.
        let end = source.wait_for_line(source.written(), GUEST, is_round)?.end;
        Ok(Self {
            source,
            destination,
            quiet_gap_ms,
            marks: (end, destination.written()),
            cpu: source.cpu_time()? + destination.cpu_time()?,
            began: Instant::now(),
        })
    }

    /// The migration is over: takes the times, and what the guest saw by then.
    fn end(&self) -> Result<Moved> {
        let total = self.began.elapsed();
        let cpu = (self.source.cpu_time()? + self.destination.cpu_time()?).saturating_sub(self.cpu);
        // A round that was begun before the end tells its gap when it is over: the one after it was not touched by the migration.
        let mut end = self.destination.written();
        for _ in 0..2 {
            end = self.destination.wait_for_line(end, GUEST, is_round)?.end;
        }
        // A line may have been begun on one side and ended on the other.
        let seen = self.source.text_from(self.marks.0) + &self.destination.text_from(self.marks.1);
        let gaps = seen.lines().filter(|line| is_round(line));
        let worst = gaps.filter_map(|line| child::number(line, "worst_gap_us")).max();
        let worst = worst.context("the guest saw nothing")?;
        if let Some(wrong) = seen.lines().find(|line| line.starts_with("wrong_page")) {
            bail!("the guest lost a page: {wrong}");
        }
        Ok(Moved {
            worst_gap_ms: worst as f64 / 1e3,
            quiet_gap_ms: self.quiet_gap_ms,
            total,
            downtime_ms: None,
            bytes: None,
            cpu,
        })
    }
}

fn is_round(line: &str) -> bool {
    line.starts_with("round=") && child::number(line, "worst_gap_us").is_some()
}

fn migrate_qemu(bench: &Bench, way: QemuWay, ram: u64, load: Load) -> Result<Moved> {
    let command_line = load.command_line(ram);
    let start = |more| {
        QemuVm::start(&qemu::Options {
            program: &bench.qemu,
            kernel: &bench.kernel,
            ram,
            command_line: &command_line,
            more,
        })
    };
    let mut source = start(&[])?;
    let mut destination = start(&["-incoming", "defer"])?;
    let capabilities: &[&str] = match way {
        QemuWay::Precopy => &["events"],
        QemuWay::Multifd => &["events", "multifd"],
        QemuWay::Postcopy => &["events", "postcopy-ram"],
        QemuWay::Preempt => &["events", "postcopy-ram", "postcopy-preempt"],
    };
    for side in [&mut source, &mut destination] {
        side.capabilities(capabilities)?;
        // By itself it sends 128 MiB a second and no more.
        side.parameters(json!({"max-bandwidth": 100_u64 << 30, "downtime-limit": 300}))?;
    }
    let uri = format!("tcp:127.0.0.1:{}", free_port()?);
    destination.qmp.execute("migrate-incoming", json!({"uri": uri}))?;
    let sides = Sides::begin(&source.running, &destination.running, ram / 2)?;
    source.qmp.execute("migrate", json!({"uri": uri}))?;
    if matches!(way, QemuWay::Postcopy | QemuWay::Preempt) {
        source.qmp.migration_state(&["active"], LIMIT)?;
        source.qmp.execute("migrate-start-postcopy", json!({}))?;
    }
    let states = ["completed", "failed", "cancelled"];
    let state = source.qmp.migration_state(&states, LIMIT);
    let state = state.with_context(|| format!("not done after {} s", LIMIT.as_secs()))?;
    if state != "completed" {
        bail!("the migration ended as {state}");
    }
    destination.qmp.migration_state(&["completed"], LIMIT)?;
    let mut moved = sides.end()?;
    let info = source.qmp.execute("query-migrate", json!({}))?;
    moved.bytes = info.pointer("/ram/transferred").and_then(Value::as_f64);
    moved.downtime_ms = info["downtime"].as_f64();
    Ok(moved)
}

fn migrate_umem(bench: &Bench, mode: &str, ram: u64, load: Load) -> Result<Moved> {
    let scratch = tempfile::tempdir().context("a directory")?;
    let path = |name: &str| scratch.path().join(name);
    let text = |path: &Path| path.display().to_string();
    let (source_socket, report) = (path("source.sock"), path("report.json"));
    let mut source = bench.umem.start([
        "run",
        "--memory",
        // Nothing is in it: it is ordinary memory from the beginning.
        &format!("size={ram},fill=sequential"),
        "--cmdline",
        &load.command_line(ram),
        "--api-socket",
        &text(&source_socket),
        "--report",
        &text(&report),
    ])?;
    let destination = bench.umem.start([
        "receive",
        "--listen",
        "tcp:127.0.0.1:0",
        "--api-socket",
        &text(&path("destination.sock")),
    ])?;
    let listening = destination.wait_for_line(0, GUEST, |line| line.contains("tcp:"))?;
    let url = listening
        .text
        .split_whitespace()
        .find(|word| word.starts_with("tcp:"));
    let url = url.context("umem receive does not say where it listens")?;
    let sides = Sides::begin(&source, &destination, ram / 2)?;
    let limit = LIMIT.as_secs();
    let send = format!(
        "destination_url={url},memory_mode={mode},downtime_ms=300,timeout_s={limit},timeout_strategy=cancel"
    );
    bench
        .umem
        .ctl(&source_socket, &["send-migration", &send])
        .with_context(|| format!("not done after {limit} s"))?;
    let mut moved = sides.end()?;
    source.succeed(Duration::from_secs(30))?;
    let report = Report::read(&report)?;
    let bytes = |key: &str| report.number(&format!("/migration/{key}")).unwrap_or(0.0);
    moved.bytes = Some(bytes("precopy_bytes") + bytes("postcopy_bytes"));
    moved.downtime_ms = report.number("/migration/downtime_ms").ok();
    Ok(moved)
}
