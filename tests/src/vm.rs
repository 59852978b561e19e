//! `umem run` and its report.

use std::ffi::OsString;
use std::fmt;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::program::{self, Finished, Program, Running};
use crate::scratch::Scratch;

/// A VM to be run. Its report goes to a directory of its own.
#[derive(Debug, Default)]
pub struct Vm {
    /// Where another instance's VM is waited for: `umem receive` in place of `umem run`.
    listen: Option<OsString>,
    memory: Vec<String>,
    args: Vec<OsString>,
    patience: Option<Duration>,
    network: Option<String>,
}

impl Vm {
    /// A VM without an image: the built-in guest on `size` of zero pages.
    pub fn with_memory(size: &str) -> Self {
        Self::default().memory(&format!("size={size}"))
    }

    /// A VM from an image.
    pub fn from_image(image: &Path) -> Self {
        Self::default().memory(&format!("source=file:{}", image.display()))
    }

    /// A VM that comes from another instance, which is waited for at `listen`.
    pub fn arriving(listen: &str) -> Self {
        Self {
            listen: Some(listen.into()),
            ..Self::default()
        }
    }

    /// Adds to `--memory`.
    pub fn memory(mut self, options: &str) -> Self {
        self.memory.push(options.to_owned());
        self
    }

    /// `--cpus boot=N`.
    pub fn cpus(self, count: u32) -> Self {
        self.option("--cpus", format!("boot={count}"))
    }

    /// `--cmdline`.
    pub fn command_line(self, line: &str) -> Self {
        self.option("--cmdline", line)
    }

    /// Any option with a value.
    pub fn option(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.args.extend([name.into(), value.into()]);
        self
    }

    /// In which network namespace it runs, by its name.
    pub fn network_namespace(mut self, name: &str) -> Self {
        self.network = Some(name.to_owned());
        self
    }

    /// How long it may take.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = Some(patience);
        self
    }

    /// All arguments of `umem`, with the report going to `report`.
    pub fn args(&self, report: &Path) -> Vec<OsString> {
        let mut args: Vec<OsString> = match &self.listen {
            None => vec!["run".into()],
            Some(listen) => vec!["receive".into(), "--listen".into(), listen.clone()],
        };
        args.extend(["--report".into(), report.into()]);
        if !self.memory.is_empty() {
            args.extend(["--memory".into(), self.memory.join(",").into()]);
        }
        args.extend(self.args.iter().cloned());
        args
    }

    /// Starts it, as it is or changed by `change`.
    pub fn start_with(self, change: impl FnOnce(Program) -> Program) -> RunningVm {
        let scratch = Scratch::new();
        let report = scratch.path("report.json");
        let mut program = match &self.network {
            None => Program::umem(self.args(&report)),
            // It becomes the program.
            Some(name) => Program::new("ip")
                .args(["netns", "exec", name])
                .arg(program::umem())
                .args(self.args(&report)),
        };
        if let Some(patience) = self.patience {
            program = program.patience(patience);
        }
        RunningVm {
            running: change(program).start(),
            report,
            scratch,
        }
    }

    /// Starts it.
    pub fn start(self) -> RunningVm {
        self.start_with(|program| program)
    }

    /// Runs it to its end.
    pub fn run(self) -> FinishedVm {
        self.start().finish()
    }
}

/// A VM that runs.
#[derive(Debug)]
pub struct RunningVm {
    running: Running,
    report: PathBuf,
    scratch: Scratch,
}

impl Deref for RunningVm {
    type Target = Running;

    fn deref(&self) -> &Running {
        &self.running
    }
}

impl RunningVm {
    /// Waits for its end, and reads its report. Nothing else may be beside the report.
    pub fn finish(self) -> FinishedVm {
        let finished = self.running.finish();
        let report = std::fs::read_to_string(&self.report).ok().map(|text| {
            let value = serde_json::from_str(&text);
            Report(value.unwrap_or_else(|error| panic!("the report is no JSON: {error}\n{text}")))
        });
        let expected: &[&str] = if report.is_some() { &["report.json"] } else { &[] };
        assert_eq!(self.scratch.names(), expected, "something is beside the report");
        FinishedVm { finished, report }
    }
}

/// A VM that has ended.
#[derive(Debug)]
pub struct FinishedVm {
    finished: Finished,
    report: Option<Report>,
}

impl Deref for FinishedVm {
    type Target = Finished;

    fn deref(&self) -> &Finished {
        &self.finished
    }
}

impl FinishedVm {
    /// Its report.
    #[track_caller]
    pub fn report(&self) -> &Report {
        self.report
            .as_ref()
            .unwrap_or_else(|| panic!("there is no report\n{}", self.finished))
    }

    /// Whether it left a report.
    pub fn has_report(&self) -> bool {
        self.report.is_some()
    }

    /// Checks that the guest found nothing wrong, that nothing was complained of, and that the report is sound.
    #[track_caller]
    pub fn assert_ended_well(&self) {
        self.assert_code(0);
        assert_eq!(self.stderr, "", "nothing is to be said\n{}", self.finished);
        self.line("result=ok");
        let report = self.report();
        assert_eq!(report.text("/outcome"), "guest-exit");
        assert_eq!(report.count("/guest_exit"), 0);
        report.assert_sound();
    }
}

/// A report.
#[derive(Debug)]
pub struct Report(Value);

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.0)
    }
}

impl Report {
    /// Whether it has something there.
    pub fn has(&self, pointer: &str) -> bool {
        self.0.pointer(pointer).is_some()
    }

    /// The string there.
    #[track_caller]
    pub fn text(&self, pointer: &str) -> &str {
        self.0
            .pointer(pointer)
            .and_then(Value::as_str)
            .unwrap_or_else(|| panic!("no text {pointer} in {self}"))
    }

    /// The whole number there.
    #[track_caller]
    pub fn count(&self, pointer: &str) -> u64 {
        self.0
            .pointer(pointer)
            .and_then(Value::as_u64)
            .unwrap_or_else(|| panic!("no count {pointer} in {self}"))
    }

    /// The number there.
    #[track_caller]
    pub fn number(&self, pointer: &str) -> f64 {
        self.0
            .pointer(pointer)
            .and_then(Value::as_f64)
            .unwrap_or_else(|| panic!("no number {pointer} in {self}"))
    }

    /// All pages that arrived, each in one way.
    #[track_caller]
    pub fn arrivals(&self) -> u64 {
        ["demand", "prefetched", "pushed", "zero"]
            .into_iter()
            .map(|way| self.count(&format!("/pages/{way}")))
            .sum()
    }

    /// Checks what holds of the report of every VM that ran and from which nothing was taken back.
    #[track_caller]
    pub fn assert_sound(&self) {
        assert_eq!(self.count("/pages/populated_at_start"), 0, "{self}");
        assert_eq!(self.count("/pages/removed"), 0, "{self}");
        assert!(
            self.has("/pages/resident"),
            "the kernel's count is missing: {self}"
        );
        let (arrivals, resident) = (self.arrivals(), self.count("/pages/resident"));
        let has_all = self.has("/time_to_all_pages_ms");
        assert!(!has_all || arrivals == self.count("/pages/total"), "{self}");
        // A pager in another process may have been killed while it left, and before it said so.
        let source = self.0.pointer("/source/url").and_then(Value::as_str);
        if has_all || source.is_some_and(|url| url.starts_with("attach:")) {
            // Zero pages that nobody had touched when all others were there are left to the kernel, like any untouched memory.
            assert!(
                resident <= arrivals && arrivals <= resident + self.count("/pages/zero"),
                "{self}"
            );
        } else {
            assert_eq!(arrivals, resident, "{self}");
            assert!(arrivals < self.count("/pages/total"), "{self}");
        }
        assert!(self.number("/time_to_first_instruction_ms") > 0.0, "{self}");
        self.assert_latencies_in_order();
    }

    #[track_caller]
    fn assert_latencies_in_order(&self) {
        let figures: Vec<_> = ["p50", "p90", "p99", "p999", "max"]
            .map(|name| self.number(&format!("/demand_fault_us/{name}")))
            .into();
        // A fill that was done before the guest began leaves it nothing to wait for.
        let waited = self.count("/demand_fault_us/count") > 0;
        assert!(waited || self.count("/pages/prefetched") > 0, "{self}");
        assert_eq!(figures[0] > 0.0, waited, "{self}");
        assert!(figures.is_sorted(), "{self}");
    }
}
