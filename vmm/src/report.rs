//! What a run leaves behind for people and programs: one JSON object, whose keys are documented in `docs/running.md`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use thiserror::Error;
use umem::pager::{FaultClass, PagerStats};
use umem::publish::{Existing, UnnamedFile};
use umem::region::Region;
use umem::source::SourceStats;
use umem::stats::Summary;

use crate::kvm::AsyncPageFaultCounter;

/// The report of one VM's run.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// How it ended, in one word.
    pub outcome: &'static str,
    /// What the guest wrote to the exit port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_exit: Option<u32>,
    /// What went wrong, as it was printed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// From the start of the process to the first `KVM_RUN` of the boot vCPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time_to_first_instruction_ms: Option<f64>,
    /// From the start of the process to the moment at which no page was missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time_to_all_pages_ms: Option<f64>,
    /// From the start of the process to this report.
    pub total_ms: f64,
    /// Where the time before the first instruction went.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub setup_ms: BTreeMap<&'static str, f64>,
    /// Pages of 4 KiB, by how they arrived.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pages: Option<Pages>,
    /// How long a demand fault took, all classes together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub demand_fault_us: Option<Latency>,
    /// The same by class, where there were any.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub fault_classes_us: BTreeMap<&'static str, Latency>,
    /// What KVM told the guest of pages that were not there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub async_page_faults: Option<AsyncPageFaults>,
    /// The page source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// How the VM came here, or went from here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration: Option<Migration>,
    /// Pages that cannot be had any more, where that ended the VM: runs of pages of 4 KiB, each with its first page and how many.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost_pages: Option<Vec<(u64, u64)>>,
    /// This process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process: Option<Process>,
}

/// Pages of 4 KiB.
#[derive(Debug, Serialize)]
pub struct Pages {
    /// RAM.
    pub total: u64,
    /// Held in memory by the kernel when the vCPUs started.
    pub populated_at_start: u64,
    /// Arrived because somebody waited.
    pub demand: u64,
    /// Arrived by background fill.
    pub prefetched: u64,
    /// Pushed by the source.
    pub pushed: u64,
    /// All zero.
    pub zero: u64,
    /// Given back and not used again.
    pub removed: u64,
    /// Arrived though they were there.
    pub duplicate: u64,
    /// Held in memory by the kernel at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resident: Option<u64>,
}

/// A latency distribution in microseconds.
#[derive(Debug, Serialize)]
pub struct Latency {
    count: u64,
    p50: f64,
    p90: f64,
    p99: f64,
    p999: f64,
    max: f64,
}

impl From<Summary> for Latency {
    fn from(summary: Summary) -> Self {
        let us = |nanos: u64| (nanos as f64 / 10.0).round() / 100.0;
        Self {
            count: summary.count,
            p50: us(summary.p50),
            p90: us(summary.p90),
            p99: us(summary.p99),
            p999: us(summary.p999),
            max: us(summary.max),
        }
    }
}

/// Events of asynchronous page faults, by KVM's tracepoints; absent where this process may not count them, or was not asked to.
#[derive(Debug, Serialize)]
pub struct AsyncPageFaults {
    /// Pages that a vCPU was told are not present.
    pub not_present: u64,
    /// Pages that it was told are ready, and times that it was told so of all.
    pub ready: u64,
}

/// The page source.
#[derive(Debug, Serialize)]
pub struct Source {
    /// Where it is.
    pub url: String,
    /// Bytes of page content that came from it.
    pub bytes: u64,
    /// Requests that it answered.
    pub requests: u64,
    /// Times that the connection to it was made anew.
    pub reconnects: u64,
}

impl Source {
    /// What the source at `url` did.
    pub fn new(url: String, stats: SourceStats) -> Self {
        Self {
            url,
            bytes: stats.bytes,
            requests: stats.requests,
            reconnects: stats.reconnects,
        }
    }
}

/// A VM that has moved.
#[derive(Clone, Debug, Serialize)]
pub struct Migration {
    /// `precopy`, `postcopy` or `hybrid`.
    pub mode: &'static str,
    /// From the beginning until the VM was all here, or was not needed here any more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_ms: Option<f64>,
    /// How long the guest stood still: at the side that it left until it was known to run, at the other one by the hosts' clocks.
    pub downtime_ms: f64,
    /// Bytes sent before the guest ran at the other side.
    pub precopy_bytes: u64,
    /// Bytes sent after that.
    pub postcopy_bytes: u64,
    /// Rounds before the switch; known at the side that it left.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rounds: Option<u32>,
}

/// Memory of this process.
#[derive(Debug, Serialize)]
pub struct Process {
    /// Resident memory that is not the guest's, the page-state table included.
    pub own_memory_kib: u64,
    /// The most that the page-state table can take.
    pub page_state_table_kib: u64,
}

impl Report {
    /// Takes over what a pager counted. `started` is when the process began.
    pub fn set_pager(&mut self, stats: &PagerStats, region: &Region, started: Instant) {
        self.time_to_all_pages_ms = stats
            .all_present_at
            .map(|at| milliseconds(at.duration_since(started)));
        self.pages = Some(Pages {
            total: region.pages(),
            populated_at_start: stats.populated_at_start,
            demand: stats.demand,
            prefetched: stats.prefetched,
            pushed: stats.pushed,
            zero: stats.zero,
            removed: stats.states.removed,
            duplicate: stats.duplicate,
            resident: region.populated().ok(),
        });
        self.demand_fault_us = Some(stats.faults.into());
        self.fault_classes_us = FaultClass::ALL
            .into_iter()
            .zip(stats.fault_classes)
            .filter(|(_, summary)| summary.count > 0)
            .map(|(class, summary)| (class.name(), summary.into()))
            .collect();
    }

    /// Takes over what the source at `url` did.
    pub fn set_source(&mut self, url: String, source: SourceStats) {
        self.source = Some(Source::new(url, source));
    }

    /// Takes over what each vCPU's counter says; nothing, if it is not known of every vCPU.
    pub fn set_async_page_faults(&mut self, vcpus: &[Option<AsyncPageFaultCounter>]) {
        let counts: Option<Vec<(u64, u64)>> = vcpus.iter().map(|vcpu| vcpu.as_ref()?.read()).collect();
        self.async_page_faults = counts.map(|counts| AsyncPageFaults {
            not_present: counts.iter().map(|count| count.0).sum(),
            ready: counts.iter().map(|count| count.1).sum(),
        });
    }

    /// Writes it to `target`.
    pub fn write(&self, target: ReportTarget) -> Result<(), ReportError> {
        let ReportTarget { path, place } = target;
        let result = serde_json::to_string_pretty(self)
            .map_err(io::Error::from)
            .and_then(|mut text| {
                text.push('\n');
                match place {
                    Place::AsItIs(mut file) => file.write_all(text.as_bytes()),
                    Place::Unnamed(unnamed) => {
                        unnamed.file().write_all(text.as_bytes())?;
                        unnamed.publish(Existing::Replace)
                    }
                }
            });
        result.map_err(|source| ReportError { path, source })
    }
}

/// Where a report is going to be.
#[derive(Debug)]
pub struct ReportTarget {
    path: PathBuf,
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// A file, which has its name when it is complete.
    Unnamed(UnnamedFile),
    /// What is no regular file, and so is written to as it is: a pipe, a device.
    AsItIs(File),
}

impl ReportTarget {
    /// Makes sure, before anything else is done, that there can be a report. (A pipe is waited for until somebody reads it.)
    pub fn new(path: &Path) -> Result<Self, ReportError> {
        // What is reached by a link is replaced, and not the link. A name that only stands for an open file (/dev/stdout)
        // cannot be replaced, whatever file that is.
        let stands_for_another = ["/dev/stdout", "/dev/stderr", "/dev/fd", "/proc"]
            .iter()
            .any(|name| path.starts_with(name));
        let path = path
            .canonicalize()
            .ok()
            .filter(|_| !stands_for_another)
            .unwrap_or_else(|| path.to_path_buf());
        let kind = path.metadata().map(|metadata| metadata.file_type());
        let place = match kind {
            Ok(kind) if kind.is_dir() => Err(io::ErrorKind::IsADirectory.into()),
            Ok(kind) if stands_for_another || !kind.is_file() => {
                File::options().append(true).open(&path).map(Place::AsItIs)
            }
            _ => UnnamedFile::create(&path).map(Place::Unnamed),
        };
        match place {
            Ok(place) => Ok(Self { path, place }),
            Err(source) => Err(ReportError { path, source }),
        }
    }
}

/// Why there is no report.
#[derive(Debug, Error)]
#[error("cannot write report '{}'", path.display())]
pub struct ReportError {
    path: PathBuf,
    source: io::Error,
}

/// Milliseconds, to the microsecond.
pub fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path) {
        Report {
            outcome: "poweroff",
            ..Default::default()
        }
        .write(ReportTarget::new(path).unwrap())
        .unwrap();
    }

    #[test]
    fn a_report_replaces_the_file_and_not_the_link_to_it() {
        let directory = tempfile::tempdir().unwrap();
        let (file, link) = (directory.path().join("file"), directory.path().join("link"));
        std::fs::write(&file, "old, and longer than any report is: ".repeat(99)).unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        write(&link);
        let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        assert_eq!(report["outcome"], "poweroff");
        assert!(link.is_symlink());
    }

    #[test]
    fn what_is_no_file_is_written_to() {
        write(Path::new("/dev/null"));
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        let reader = {
            let pipe = pipe.clone();
            std::thread::spawn(move || std::fs::read_to_string(pipe).unwrap())
        };
        write(&pipe);
        assert!(reader.join().unwrap().contains("poweroff"));
    }

    #[test]
    fn where_there_can_be_no_report_is_known_at_once() {
        let directory = tempfile::tempdir().unwrap();
        assert!(ReportTarget::new(directory.path()).is_err());
        assert!(ReportTarget::new(&directory.path().join("missing/report")).is_err());
    }
}
