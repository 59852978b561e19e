//! VMs that move from one instance of the program to another, and what must hold of their guests.
//!
//! The guest writes a line a round, with the number of the round. What the instances wrote, one after the other, is what one guest wrote:
//! a round that is there twice was run by two VMs, and one that is missing was lost.

use std::ops::Deref;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::api::Api;
use crate::program::{Finished, PATIENCE, Program, Running};
use crate::scratch::Scratch;
use crate::vm::{FinishedVm, RunningVm, Vm};

/// Ways to move.
pub const MODES: [&str; 3] = ["precopy", "postcopy", "hybrid"];

/// What a VM that waits for another says before the guest says anything.
const WAITING: &str = "waiting for a VM at ";

/// An instance with a VM, or one that waits for a VM.
#[derive(Debug)]
pub struct Instance {
    vm: RunningVm,
    /// Its API.
    pub api: Api,
    /// Where it waits.
    pub url: String,
}

impl Deref for Instance {
    type Target = Running;

    fn deref(&self) -> &Running {
        &self.vm
    }
}

impl Instance {
    /// A VM whose guest dirties `pages` pages for so many rounds (or `forever`), in the middle of that.
    pub fn dirty(vm: Vm, pages: u64, rounds: &str) -> Self {
        Self::running(vm.command_line(&format!("workload=dirty pages={pages} rounds={rounds}")))
    }

    /// A VM whose guest counts rounds, some of which are done.
    pub fn running(vm: Vm) -> Self {
        Self::running_until(vm, "round=3 ")
    }

    /// A VM whose guest has said this.
    pub fn running_until(vm: Vm, output: &str) -> Self {
        let (vm, api) = Api::start_until(vm, output);
        Self {
            vm,
            api,
            url: String::new(),
        }
    }

    /// Waits for a VM at `listen`.
    pub fn waiting(listen: &str) -> Self {
        Self::waiting_with(Vm::arriving(listen))
    }

    /// The same with options.
    pub fn waiting_with(vm: Vm) -> Self {
        let (vm, api) = Api::start(vm);
        let url = |vm: &Running| {
            let stdout = vm.stdout();
            Some(stdout.strip_prefix(WAITING)?.split_once('\n')?.0.to_owned())
        };
        vm.wait_until("it waits for a VM", |vm| url(vm).is_some());
        let url = url(&vm).unwrap();
        Self { vm, api, url }
    }

    /// `umem ctl send-migration` to `url`, which goes on; more `options` begin with a comma.
    pub fn send(&self, url: &str, options: &str) -> Running {
        Program::umem(["ctl", "--api-socket"])
            .arg(self.api.socket())
            .args(["--json", "send-migration"])
            .arg(format!("destination_url={url}{options}"))
            .start()
    }

    /// What there is to know of it; `None` if it does not answer, because it ends.
    pub fn info(&self) -> Option<Value> {
        let reply = self.api.try_ask("GET", "/api/v1/vm.info", b"").ok()?;
        (reply.status == 200).then(|| reply.json())
    }

    /// The migration's phase; empty where there is none.
    pub fn phase(&self) -> String {
        let info = self.info().unwrap_or_default();
        info["migration"]["phase"].as_str().unwrap_or_default().to_owned()
    }

    /// Waits until the migration is in this phase.
    pub fn wait_for_phase(&self, phase: &str) {
        self.wait_until(&format!("phase {phase}"), |_| self.phase() == phase);
    }

    /// The migration's token.
    pub fn token(&self) -> String {
        let info = self.info().unwrap();
        info["migration"]["token"].as_str().unwrap().to_owned()
    }

    /// What the guest has said here.
    pub fn guest_output(&self) -> String {
        guest_output(&self.stdout())
    }

    /// The last round that the guest has ended here.
    pub fn round(&self) -> u64 {
        rounds_in(&self.guest_output()).last().copied().unwrap_or(0)
    }

    /// Waits until the guest has done more here.
    pub fn wait_for_progress(&self) {
        let before = self.round();
        self.wait_until("the guest goes on", |_| self.round() >= before + 2);
    }

    /// Checks that the guest does nothing here, for a time in which it would do a hundred times as much as may still be on its way
    /// from before.
    pub fn assert_stands_still(&self) {
        let before = self.round();
        self.wait_for_exit(Duration::from_millis(200));
        let after = self.round();
        assert!(
            after <= before + 1,
            "the guest runs here: {}",
            self.guest_output()
        );
    }

    /// Ends it without a word.
    pub fn kill(self) -> FinishedVm {
        self.signal(Signal::KILL);
        self.vm.finish()
    }

    /// Waits for its end.
    pub fn finish(self) -> FinishedVm {
        self.vm.finish()
    }

    /// Waits for its end, which comes within `patience`.
    #[track_caller]
    pub fn finish_within(self, patience: Duration) -> FinishedVm {
        assert!(
            self.wait_for_exit(patience),
            "it does not end within {patience:?}\n{}\n{:?}",
            *self.vm,
            self.info()
        );
        self.vm.finish()
    }

    /// Tells it to end, and waits for that.
    pub fn stop(self) -> FinishedVm {
        self.api.shutdown();
        self.vm.finish()
    }
}

/// What the guest said, of what the program wrote.
pub fn guest_output(stdout: &str) -> String {
    match stdout.strip_prefix(WAITING) {
        Some(rest) => rest.split_once('\n').map_or("", |(_, output)| output).to_owned(),
        None => stdout.to_owned(),
    }
}

/// The numbers of the rounds of which there are whole lines.
pub fn rounds_in(output: &str) -> Vec<u64> {
    let whole = output.rfind('\n').map_or("", |end| &output[..end]);
    let number = |line: &str| line.strip_prefix("round=")?.split(' ').next()?.parse().ok();
    whole.lines().filter_map(number).collect()
}

/// Checks that what instances wrote, one after the other, was written by one guest that found nothing wrong, and that each of them had a
/// part in it of at least `least` rounds. The answer is how many rounds there were.
#[track_caller]
pub fn assert_one_guest(outputs: &[String]) -> u64 {
    let all: String = outputs.concat();
    assert!(!all.contains("wrong_page="), "a page is a wrong one\n{all}");
    let rounds = rounds_in(&all);
    let expected: Vec<u64> = (1..=rounds.len() as u64).collect();
    assert_eq!(
        rounds,
        expected,
        "these are not the rounds of one guest\n{}",
        outputs.join("\n=====\n")
    );
    rounds.len() as u64
}

/// The worst gap that the guest saw, in microseconds: between two touches of a vCPU, and the same without the change of rounds, when
/// all of them wait for the slowest.
pub fn worst_gap_us(output: &str) -> [u64; 2] {
    ["worst_gap_us=", "in_round_us="].map(|key| {
        let gap = |line: &str| {
            let (_, rest) = line.split_once(key)?;
            rest.split(' ').next()?.parse().ok()
        };
        output.lines().filter_map(gap).max().unwrap_or(0)
    })
}

/// Checks that a VM has left, and that its instance says so.
#[track_caller]
pub fn assert_migrated(vm: &FinishedVm, mode: &str) {
    vm.assert_code(0);
    assert_eq!(vm.stderr, "");
    let report = vm.report();
    assert_eq!(report.text("/outcome"), "migrated", "{report}");
    assert_eq!(report.text("/migration/mode"), mode, "{report}");
    assert!(report.number("/migration/downtime_ms") > 0.0, "{report}");
    assert!(
        report.number("/migration/total_ms") >= report.number("/migration/downtime_ms"),
        "{report}"
    );
    let sent = (
        report.count("/migration/precopy_bytes"),
        report.count("/migration/postcopy_bytes"),
    );
    assert!(sent.0 + sent.1 > 0, "{report}");
    if mode == "precopy" {
        assert_eq!(sent.1, 0, "{report}");
    }
    assert_eq!(
        report.count("/migration/rounds") == 0,
        mode == "postcopy",
        "{report}"
    );
}

/// Checks that a request to move a VM was refused or came to nothing, for a reason that has these words in it.
#[track_caller]
pub fn assert_not_moved(sent: Running, words: &[&str]) -> Finished {
    let sent = sent.finish();
    sent.assert_code(5);
    for word in words {
        assert!(
            sent.stderr.contains(word),
            "'{word}' is not in the message\n{sent}"
        );
    }
    sent
}

/// A name for a Unix socket, or any port of loopback.
pub fn listen(scratch: &Scratch, transport: &str, name: &str) -> String {
    match transport {
        "tcp" => "tcp:127.0.0.1:0".into(),
        _ => format!("unix:{}", scratch.path(name).display()),
    }
}

/// Waits until something holds, which nothing announces.
#[track_caller]
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} is still to come");
        std::thread::sleep(Duration::from_millis(2));
    }
}
