//! A VM as clients see it.

use std::collections::BTreeMap;
use std::time::Instant;

use serde::Serialize;
use umem::pager::FaultClass;

use crate::control::{Control, Counters};
use crate::devices::BalloonStatus;
use crate::invalidations::Invalidations;
use crate::migration::{MigrationSummary, Status};
use crate::report::{Latency, Source, milliseconds};
use crate::snapshot::SnapshotSummary;

/// This program.
#[derive(Debug, Serialize)]
pub(super) struct Ping {
    version: &'static str,
    pid: u32,
}

impl Ping {
    pub(super) fn new() -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
        }
    }
}

/// A VM. What is not known before it runs, or any more, is absent.
#[derive(Debug, Serialize)]
pub(super) struct Info {
    state: &'static str,
    #[serde(flatten)]
    program: Ping,
    uptime_ms: f64,
    /// The last migration, if there was any.
    #[serde(skip_serializing_if = "Option::is_none")]
    migration: Option<Status>,
    #[serde(flatten)]
    machine: Option<Machine>,
}

#[derive(Debug, Serialize)]
struct Machine {
    vcpus: u32,
    memory_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    time_to_first_instruction_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    time_to_all_pages_ms: Option<f64>,
    pages: Pages,
    #[serde(skip_serializing_if = "Option::is_none")]
    balloon: Option<Balloon>,
    source: Source,
    demand_fault_us: Latency,
    fault_classes_us: BTreeMap<&'static str, Latency>,
}

/// Pages of 4 KiB, by state and, if they are present, by how they arrived.
#[derive(Debug, Serialize)]
struct Pages {
    total: u64,
    absent: u64,
    in_flight: u64,
    present: u64,
    removed: u64,
    demand: u64,
    prefetched: u64,
    pushed: u64,
    zero: u64,
    duplicate: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    resident: Option<u64>,
}

/// A balloon, in bytes.
#[derive(Debug, Serialize)]
struct Balloon {
    target: u64,
    actual: u64,
    inflated: u64,
    deflated: u64,
    reported: u64,
}

impl From<BalloonStatus> for Balloon {
    fn from(status: BalloonStatus) -> Self {
        Self {
            target: status.target,
            actual: status.actual,
            inflated: status.inflated,
            deflated: status.deflated,
            reported: status.reported,
        }
    }
}

/// Those outside who watch guest-physical addresses.
#[derive(Debug, Serialize)]
pub(super) struct Watchers {
    socket: String,
    changes: u64,
    hits: u64,
    acknowledged: u64,
    late: u64,
    refused: u64,
    clients: Vec<Watcher>,
}

#[derive(Debug, Serialize)]
struct Watcher {
    pid: i32,
    #[serde(skip_serializing_if = "Option::is_none")]
    acknowledge_within_ms: Option<f64>,
    counter: u64,
    last_begun: u64,
    last_acknowledged: u64,
    range_count: usize,
    /// The first of them.
    ranges: Vec<WatchedRange>,
}

#[derive(Debug, Serialize)]
struct WatchedRange {
    cookie: u64,
    start: u64,
    end: u64,
}

/// The most ranges of a watcher that are named.
const RANGES_NAMED: usize = 64;

impl Watchers {
    pub(super) fn new(invalidations: &Invalidations) -> Self {
        let status = invalidations.status();
        let clients = status.clients.into_iter().map(|client| Watcher {
            pid: client.pid,
            acknowledge_within_ms: client.limit.map(milliseconds),
            counter: client.counter,
            last_begun: client.begun,
            last_acknowledged: client.acknowledged,
            range_count: client.ranges.len(),
            ranges: client
                .ranges
                .iter()
                .take(RANGES_NAMED)
                .map(|(cookie, range)| WatchedRange {
                    cookie: cookie.0,
                    start: range.start,
                    end: range.end,
                })
                .collect(),
        });
        Self {
            socket: invalidations.socket().display().to_string(),
            changes: status.changes,
            hits: status.hits,
            acknowledged: status.acknowledged,
            late: status.late,
            refused: status.refused,
            clients: clients.collect(),
        }
    }
}

impl Info {
    pub(super) fn new(control: &Control, started: Instant) -> Self {
        Self {
            state: control.state().name(),
            program: Ping::new(),
            uptime_ms: milliseconds(started.elapsed()),
            migration: control.migration(),
            machine: control.counters().map(|counters| Machine::new(counters, started)),
        }
    }
}

impl Machine {
    fn new(counters: Counters, started: Instant) -> Self {
        let since_start = |at: Instant| milliseconds(at.duration_since(started));
        let pager = counters.pager;
        Self {
            vcpus: counters.vcpus,
            memory_bytes: counters.pages * crate::address_map::PAGE_SIZE,
            time_to_first_instruction_ms: counters.first_instruction.map(since_start),
            time_to_all_pages_ms: pager.all_present_at.map(since_start),
            pages: Pages {
                total: counters.pages,
                absent: pager.states.absent,
                in_flight: pager.states.in_flight,
                present: pager.states.present,
                removed: pager.states.removed,
                demand: pager.demand,
                prefetched: pager.prefetched,
                pushed: pager.pushed,
                zero: pager.zero,
                duplicate: pager.duplicate,
                resident: counters.resident,
            },
            balloon: counters.balloon.map(Balloon::from),
            source: Source::new(counters.source_url, pager.source),
            demand_fault_us: pager.faults.into(),
            fault_classes_us: FaultClass::ALL
                .into_iter()
                .zip(pager.fault_classes)
                .filter(|(_, summary)| summary.count > 0)
                .map(|(class, summary)| (class.name(), summary.into()))
                .collect(),
        }
    }
}

/// A VM that has moved.
#[derive(Debug, Serialize)]
pub(super) struct Migrated {
    mode: &'static str,
    total_ms: f64,
    downtime_ms: f64,
    precopy_bytes: u64,
    postcopy_bytes: u64,
    rounds: u32,
}

impl Migrated {
    pub(super) fn new(moved: &MigrationSummary) -> Self {
        Self {
            mode: moved.mode.name(),
            total_ms: milliseconds(moved.total),
            downtime_ms: milliseconds(moved.downtime),
            precopy_bytes: moved.precopy_bytes,
            postcopy_bytes: moved.postcopy_bytes,
            rounds: moved.rounds,
        }
    }
}

/// A snapshot that was made.
#[derive(Debug, Serialize)]
pub(super) struct Snapshot {
    path: String,
    pages: u64,
    data_pages: u64,
    absent_pages: u64,
    own_pages: u64,
    digest: String,
    paused_ms: f64,
    took_ms: f64,
}

impl Snapshot {
    pub(super) fn new(made: &SnapshotSummary) -> Self {
        Self {
            path: made.path.display().to_string(),
            pages: made.pages,
            data_pages: made.data_pages,
            absent_pages: made.absent_pages,
            own_pages: made.own_pages,
            digest: blake3::Hash::from_bytes(made.digest).to_hex().to_string(),
            paused_ms: milliseconds(made.paused),
            took_ms: milliseconds(made.took),
        }
    }
}

/// Everything that only grows, by what it is counted of; nothing where there is no VM.
pub(super) fn counters(control: &Control) -> BTreeMap<&'static str, BTreeMap<&'static str, u64>> {
    let Some(counters) = control.counters() else {
        return BTreeMap::new();
    };
    let pager = counters.pager;
    let exits = counters
        .exits
        .iter()
        .map(|(reason, count)| (reason.name(), *count));
    let faults = FaultClass::ALL.into_iter().zip(pager.fault_classes);
    let pages = [
        ("demand", pager.demand),
        ("prefetched", pager.prefetched),
        ("pushed", pager.pushed),
        ("zero", pager.zero),
        ("duplicate", pager.duplicate),
    ];
    let source = [
        ("bytes", pager.source.bytes),
        ("requests", pager.source.requests),
        ("reconnects", pager.source.reconnects),
    ];
    BTreeMap::from([
        ("exits", exits.collect()),
        (
            "faults",
            faults
                .map(|(class, summary)| (class.name(), summary.count))
                .collect(),
        ),
        ("pages", pages.into()),
        ("source", source.into()),
    ])
}
