//! A small cooperative scheduler: tasks that touch absent pages are parked while others work.
//!
//! Each CPU has tasks of its own. The first of them check pages against their fingerprints, one page a turn; the others do work
//! that can be counted, one unit a turn, for as long as there are pages to be checked. Where the machine says by an event that a page is
//! not present, the task is parked and the next one has its turn; where it does not, the CPU itself waits.

use core::hint::black_box;
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed, compiler_fence};

use super::{Page, Pages, verify, wrong_lines_per_cpu};
use crate::command_line::Tasks;
use crate::exit_code::ExitCode;
use crate::fingerprint::Fingerprint;
use crate::machine::{Combine, Machine};
use crate::parking::{MAX_TASKS, Next, Parking};

/// Steps of a unit of work: some microseconds.
const UNIT: usize = 2048;

/// Of so many pages a task checks one more: that of the next task's turn, so that both want it at the same time.
const SHARED: u64 = 64;

/// A task's answer at the end of its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It wants another turn.
    Again,
    /// It is done.
    Done,
}

/// Why a task does not run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Its turn is over.
    Turn(Step),
    /// In the middle of it, a page was not present. It comes with this token.
    NotPresent(u32),
}

/// Tasks with a stack each, and the events of the CPU that they run on.
pub trait Stacks {
    /// Whether a page that is not present comes as an event.
    fn has_events(&self) -> bool;

    /// Runs a task from where it stopped.
    fn resume(&self, task: usize) -> Stopped;

    /// The next token that is ready.
    fn next_ready(&self) -> Option<u32>;

    /// Waits for an event, one of the clock or one that is ready.
    fn wait(&self);

    /// A clock that stands still while the CPU does; [`Self::CLOCK_HZ`] of it are a second.
    fn clock(&self) -> u32;

    /// How fast the clock is.
    const CLOCK_HZ: u32;
}

/// What the tasks of one CPU share. While one of them touches a page, others may run: therefore everything is atomic.
#[derive(Debug)]
pub struct Job<'a, M> {
    machine: &'a M,
    pages: &'a Pages<'a>,
    options: Tasks,
    /// How many turns each faulting task has had.
    turns: [AtomicU32; MAX_TASKS],
    /// Faulting tasks that have pages left.
    faulting: AtomicUsize,
    /// Pages that were touched and are not here yet.
    awaited: AtomicU64,
    verified: AtomicU64,
    shared: AtomicU64,
    wrong: AtomicU64,
    work: AtomicU64,
    /// Work done while a page was awaited.
    work_during_waits: AtomicU64,
    /// What a unit of work comes to.
    unit: u64,
    start: u64,
    /// The time from the start to the last page.
    fetching: AtomicU64,
}

impl<'a, M: Machine> Job<'a, M> {
    /// What the tasks of the CPU that calls this do.
    pub fn new(machine: &'a M, pages: &'a Pages<'a>, options: Tasks) -> Self {
        Self {
            machine,
            pages,
            options,
            turns: [const { AtomicU32::new(0) }; MAX_TASKS],
            faulting: AtomicUsize::new(options.faulting),
            awaited: AtomicU64::new(0),
            verified: AtomicU64::new(0),
            shared: AtomicU64::new(0),
            wrong: AtomicU64::new(0),
            work: AtomicU64::new(0),
            work_during_waits: AtomicU64::new(0),
            unit: unit_of_work(),
            start: machine.ticks(),
            fetching: AtomicU64::new(0),
        }
    }

    /// One turn of a task. Runs on the task's own stack.
    pub fn step(&self, task: usize) -> Step {
        if task < self.options.faulting {
            self.check_pages(task)
        } else {
            self.work()
        }
    }

    fn check_pages(&self, task: usize) -> Step {
        let turn = u64::from(self.turns[task].fetch_add(1, Relaxed));
        if turn % SHARED == SHARED - 1
            && let Some(page) = self.page((task + 1) % self.options.faulting, turn)
        {
            self.check(page);
            self.shared.fetch_add(1, Relaxed);
        }
        if let Some(page) = self.page(task, turn) {
            self.check(page);
            self.verified.fetch_add(1, Relaxed);
            return Step::Again;
        }
        if self.faulting.fetch_sub(1, Relaxed) == 1 {
            let elapsed = self.machine.ticks().saturating_sub(self.start);
            self.fetching.store(elapsed, Relaxed);
        }
        Step::Done
    }

    /// The page that is a task's at one of its turns.
    fn page(&self, task: usize, turn: u64) -> Option<Page> {
        let share = self.pages.share(self.machine);
        let turn = share.start + turn * self.options.faulting as u64 + task as u64;
        share.contains(&turn).then(|| self.pages.page(turn)).flatten()
    }

    fn check(&self, page: Page) {
        self.awaited.fetch_add(1, Relaxed);
        // Other tasks may run within the read, which the compiler does not know.
        compiler_fence(core::sync::atomic::Ordering::SeqCst);
        black_box(self.machine.read(page.frame, 0));
        compiler_fence(core::sync::atomic::Ordering::SeqCst);
        self.awaited.fetch_sub(1, Relaxed);
        if let Some(mismatch) = verify::check(self.machine, page, self.options.seed, true) {
            let wrong = self.wrong.fetch_add(1, Relaxed) + 1;
            if wrong <= wrong_lines_per_cpu(self.machine) {
                mismatch.print(self.machine, page);
            }
        }
    }

    fn work(&self) -> Step {
        if self.faulting.load(Relaxed) == 0 {
            return Step::Done;
        }
        if unit_of_work() != self.unit {
            // A register was not what it had been.
            self.wrong.fetch_add(1, Relaxed);
        }
        self.work.fetch_add(1, Relaxed);
        if self.awaited.load(Relaxed) > 0 {
            self.work_during_waits.fetch_add(1, Relaxed);
        }
        Step::Again
    }
}

/// Takes the same time and comes to the same result whenever it is done.
fn unit_of_work() -> u64 {
    (0..UNIT).fold(black_box(0), |state, index| {
        Fingerprint::new(state, index as u64).word(0)
    })
}

/// Runs the tasks of one CPU to their end, each on its own stack.
pub fn run<M: Machine, S: Stacks>(job: &Job<'_, M>, stacks: &S) -> ExitCode {
    let (machine, options) = (job.machine, job.options);
    if machine.cpu() == 0 {
        let events = if stacks.has_events() { "on" } else { "off" };
        machine.print(format_args!(
            "tasks={} faulting={} pages={} seed={} async_page_faults={events}",
            options.tasks,
            options.faulting,
            job.pages.count(),
            options.seed
        ));
    }
    let mut parking = Parking::new(options.tasks);
    let is_complete = run_tasks(machine, options, stacks, &mut parking);
    let counts = parking.counts();
    let sum = |value| machine.combine(value, Combine::Sum);
    let max = |value| machine.combine(value, Combine::Max);
    let lost = sum(u64::from(!is_complete));
    let (verified, shared, wrong) = (
        sum(job.verified.load(Relaxed)),
        sum(job.shared.load(Relaxed)),
        sum(job.wrong.load(Relaxed)),
    );
    let (work, during_waits) = (
        sum(job.work.load(Relaxed)),
        sum(job.work_during_waits.load(Relaxed)),
    );
    let elapsed_us = machine.microseconds(max(job.fetching.load(Relaxed)));
    let (not_present, ready, wake_all, early) = (
        sum(counts.not_present),
        sum(counts.ready),
        sum(counts.wake_all),
        sum(counts.early),
    );
    let most_parked = max(counts.most_parked);
    if machine.cpu() == 0 {
        machine.print(format_args!(
            "verified={verified} wrong={wrong} shared={shared} elapsed_us={elapsed_us}"
        ));
        let per_s = (u128::from(work) * 1_000_000 / u128::from(elapsed_us.max(1))) as u64;
        machine.print(format_args!(
            "work={work} work_during_waits={during_waits} work_per_s={per_s}"
        ));
        machine.print(format_args!(
            "not_present={not_present} ready={ready} wake_all={wake_all} early={early} most_parked={most_parked}"
        ));
    }
    if wrong == 0 && lost == 0 {
        ExitCode::Ok
    } else {
        ExitCode::CheckFailed
    }
}

/// Gives every task its turns. False: one waits for a token that does not come, and the others have been given up.
fn run_tasks<S: Stacks>(machine: &impl Machine, options: Tasks, stacks: &S, parking: &mut Parking) -> bool {
    let patience = options.patience_s * S::CLOCK_HZ;
    let mut looked_at = stacks.clock();
    loop {
        while let Some(token) = stacks.next_ready() {
            parking.ready(token);
        }
        let now = stacks.clock();
        if now != looked_at {
            looked_at = now;
            if let Some(overdue) = parking.overdue(now, patience) {
                machine.print(format_args!(
                    "lost_token={:#x} task={} cpu={} parked={}",
                    overdue.token,
                    overdue.task,
                    machine.cpu(),
                    parking.parked()
                ));
                return false;
            }
        }
        match parking.choose() {
            Next::Run(task) => match stacks.resume(task) {
                Stopped::Turn(Step::Again) => {}
                Stopped::Turn(Step::Done) => parking.finish(task),
                Stopped::NotPresent(token) => parking.park(task, token, stacks.clock()),
            },
            Next::Wait => stacks.wait(),
            Next::End => return true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command_line::Pages as PagesWanted;
    use crate::machine::fake::{FakeMachine, Shared};
    use crate::order::Order;
    use crate::workload::tests::map;
    use std::cell::{Cell, RefCell};
    use std::collections::VecDeque;

    const SEED: u64 = 5;

    /// Stacks on which about every second turn of a task is preceded by a page that is not present.
    struct FakeStacks<'a> {
        job: &'a Job<'a, FakeMachine<'a>>,
        turns: Cell<u32>,
        not_ready: RefCell<VecDeque<u32>>,
        ready: RefCell<VecDeque<u32>>,
        /// This token never becomes ready.
        lost: Option<u32>,
        clock: Cell<u32>,
    }

    impl Stacks for FakeStacks<'_> {
        const CLOCK_HZ: u32 = 10;

        fn has_events(&self) -> bool {
            true
        }

        fn resume(&self, task: usize) -> Stopped {
            let turn = self.turns.replace(self.turns.get() + 1);
            let is_absent = Fingerprint::new(SEED, u64::from(turn)).word(0).is_multiple_of(2);
            if is_absent && task < self.job.options.faulting {
                self.not_ready.borrow_mut().push_back(turn);
                return Stopped::NotPresent(turn);
            }
            if task >= self.job.options.faulting {
                // Time goes by.
                self.wait();
            }
            Stopped::Turn(self.job.step(task))
        }

        fn next_ready(&self) -> Option<u32> {
            self.ready.borrow_mut().pop_front()
        }

        fn wait(&self) {
            self.clock.set(self.clock.get() + 1);
            let ready = self.not_ready.borrow_mut().pop_back();
            let ready = ready.filter(|token| Some(*token) != self.lost);
            self.ready.borrow_mut().extend(ready);
        }

        fn clock(&self) -> u32 {
            self.clock.get()
        }
    }

    fn run_on(shared: &Shared, lost: Option<u32>) -> ExitCode {
        let map = map();
        let order = Order::Random { seed: SEED };
        let pages = Pages::new(&map, map.count(), order).unwrap();
        let options = Tasks {
            tasks: 8,
            faulting: 5,
            pages: PagesWanted::All,
            seed: SEED,
            order,
            patience_s: 3,
        };
        shared.run(|machine| {
            let job = Job::new(machine, &pages, options);
            let stacks = FakeStacks {
                job: &job,
                turns: Cell::new(0),
                not_ready: RefCell::default(),
                ready: RefCell::default(),
                lost,
                clock: Cell::new(0),
            };
            run(&job, &stacks)
        })
    }

    /// The memory of `map`, with its fingerprints.
    fn fingerprinted(cpus: usize) -> Shared {
        let shared = Shared::new(cpus);
        let mut memory = shared.memory.lock().unwrap();
        let map = map();
        for frame in (0..map.count()).filter_map(|index| map.frame(index)) {
            let fingerprint = Fingerprint::new(SEED, frame);
            memory.insert(frame, std::array::from_fn(|word| fingerprint.word(word)));
        }
        drop(memory);
        shared
    }

    #[test]
    fn every_page_is_checked_and_every_token_comes() {
        for cpus in [1, 3] {
            let shared = fingerprinted(cpus);
            assert_eq!(run_on(&shared, None), ExitCode::Ok);
            let lines = shared.lines().join("\n");
            assert!(lines.contains("verified=32 wrong=0 "), "{lines}");
        }
    }

    #[test]
    fn a_wrong_page_is_named() {
        let shared = fingerprinted(1);
        shared.memory.lock().unwrap().get_mut(&0x42).unwrap()[7] ^= 1;
        assert_eq!(run_on(&shared, None), ExitCode::CheckFailed);
        let lines = shared.lines().join("\n");
        assert!(
            lines.contains("wrong_page=0x42 address=0x42038 word=7 "),
            "{lines}"
        );
        assert!(lines.contains("verified=32 wrong=1 "), "{lines}");
    }

    #[test]
    fn a_lost_token_is_named_and_the_run_fails() {
        let shared = fingerprinted(1);
        assert_eq!(run_on(&shared, Some(2)), ExitCode::CheckFailed);
        let lines = shared.lines().join("\n");
        assert!(lines.contains("lost_token=0x2 task="), "{lines}");
    }
}
