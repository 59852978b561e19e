//! Which tasks can run, and which wait for what token: a scheduler's parking logic without stacks, clocks and interrupts.
//!
//! A task that touches an absent page is parked by the token of its *not present* event until the *ready* event of the same token
//! comes. The two may come in either order: a token that is ready before its task is parked is kept, and the task does not wait.
//! [`WAKE_ALL`] makes every task that is parked at that moment runnable: whoever still misses its page will be told so again.

/// The most tasks that one CPU has: twice as many as KVM lets fault at a time.
pub const MAX_TASKS: usize = 128;

/// The token that stands for all tokens.
pub const WAKE_ALL: u32 = u32::MAX;

/// Tokens that may be ready before their tasks are parked. As many as KVM gives out at a time; when one more comes, the oldest
/// cannot be waited for any more.
const EARLY: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Task {
    Runnable,
    Parked { token: u32, since: u32 },
    Done,
}

/// What a CPU does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// It runs this task.
    Run(usize),
    /// It waits for an event: all tasks that are left are parked.
    Wait,
    /// Nothing: all tasks are done.
    End,
}

/// A task that has been parked for too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overdue {
    /// Which task.
    pub task: usize,
    /// What it waits for.
    pub token: u32,
    /// Since when.
    pub since: u32,
}

/// What has happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Tasks told that a page is not present.
    pub not_present: u64,
    /// Tokens told to be ready, other than [`WAKE_ALL`].
    pub ready: u64,
    /// [`WAKE_ALL`].
    pub wake_all: u64,
    /// Tokens that were ready before their tasks were parked.
    pub early: u64,
    /// The most tasks that were parked at a time.
    pub most_parked: u64,
}

/// The tasks of one CPU.
#[derive(Clone, Debug)]
pub struct Parking {
    /// The first `count` are there.
    tasks: [Task; MAX_TASKS],
    count: usize,
    not_done: usize,
    parked: usize,
    /// The task that ran last: the next one after it has its turn.
    last: usize,
    /// A ring; `None` is free.
    early: [Option<u32>; EARLY],
    early_next: usize,
    counts: Counts,
}

impl Parking {
    /// `count` tasks, at most [`MAX_TASKS`], that can all run.
    pub fn new(count: usize) -> Self {
        let count = count.min(MAX_TASKS);
        Self {
            tasks: [Task::Runnable; MAX_TASKS],
            count,
            not_done: count,
            parked: 0,
            last: count.saturating_sub(1),
            early: [None; EARLY],
            early_next: 0,
            counts: Counts::default(),
        }
    }

    /// Whose turn it is.
    pub fn choose(&mut self) -> Next {
        if self.not_done == 0 {
            return Next::End;
        }
        let turns = (1..=self.count).map(|step| (self.last + step) % self.count);
        let found = turns.into_iter().find(|&task| self.tasks[task] == Task::Runnable);
        found.map_or(Next::Wait, |task| {
            self.last = task;
            Next::Run(task)
        })
    }

    /// A task that ran was told that its page comes with `token`; it is the time `now` of any clock.
    pub fn park(&mut self, task: usize, token: u32, now: u32) {
        self.counts.not_present += 1;
        if let Some(early) = self.early.iter_mut().find(|early| **early == Some(token)) {
            *early = None;
            return;
        }
        self.tasks[task] = Task::Parked { token, since: now };
        self.parked += 1;
        self.counts.most_parked = self.counts.most_parked.max(self.parked as u64);
    }

    /// A token is ready.
    pub fn ready(&mut self, token: u32) {
        let mut woken = 0;
        for task in &mut self.tasks[..self.count] {
            if matches!(task, Task::Parked { token: waits_for, .. } if token == WAKE_ALL || *waits_for == token)
            {
                *task = Task::Runnable;
                woken += 1;
            }
        }
        self.parked -= woken;
        if token == WAKE_ALL {
            self.counts.wake_all += 1;
            return;
        }
        self.counts.ready += 1;
        if woken == 0 {
            self.counts.early += 1;
            self.early[self.early_next] = Some(token);
            self.early_next = (self.early_next + 1) % EARLY;
        }
    }

    /// A task that ran has nothing more to do.
    pub fn finish(&mut self, task: usize) {
        if self.tasks[task] != Task::Done {
            self.tasks[task] = Task::Done;
            self.not_done -= 1;
        }
    }

    /// How many tasks are parked.
    pub fn parked(&self) -> usize {
        self.parked
    }

    /// A task that has been parked for more than `patience`, `now` being the time of the clock that [`Self::park`] was told.
    pub fn overdue(&self, now: u32, patience: u32) -> Option<Overdue> {
        self.tasks[..self.count]
            .iter()
            .enumerate()
            .find_map(|(index, task)| match *task {
                Task::Parked { token, since } if now.wrapping_sub(since) > patience => Some(Overdue {
                    task: index,
                    token,
                    since,
                }),
                _ => None,
            })
    }

    /// What has happened so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet, VecDeque};

    #[test]
    fn a_parked_task_runs_again_when_its_token_is_ready() {
        let mut parking = Parking::new(2);
        assert_eq!(parking.choose(), Next::Run(0));
        parking.park(0, 7, 0);
        assert_eq!(parking.choose(), Next::Run(1));
        parking.park(1, 8, 0);
        assert_eq!(parking.choose(), Next::Wait);
        parking.ready(7);
        assert_eq!(parking.choose(), Next::Run(0));
        parking.finish(0);
        assert_eq!(parking.choose(), Next::Wait);
        parking.ready(8);
        assert_eq!(parking.choose(), Next::Run(1));
        parking.finish(1);
        assert_eq!(parking.choose(), Next::End);
    }

    #[test]
    fn ready_before_not_present_is_not_lost() {
        let mut parking = Parking::new(1);
        assert_eq!(parking.choose(), Next::Run(0));
        parking.ready(7);
        parking.park(0, 7, 0);
        assert_eq!(parking.choose(), Next::Run(0));
        // Once: the token may be given out again.
        parking.park(0, 7, 0);
        assert_eq!(parking.choose(), Next::Wait);
        assert_eq!(parking.counts().early, 1);
    }

    #[test]
    fn wake_all_wakes_all_that_are_parked_and_nobody_later() {
        let mut parking = Parking::new(3);
        for (task, token) in [(0, 1), (1, 2)] {
            assert_eq!(parking.choose(), Next::Run(task));
            parking.park(task, token, 0);
        }
        parking.ready(WAKE_ALL);
        assert_eq!(parking.parked(), 0);
        parking.park(2, 3, 0);
        assert_eq!(parking.parked(), 1);
        assert_eq!(
            [parking.choose(), parking.choose(), parking.choose()],
            [0, 1, 0].map(Next::Run)
        );
    }

    #[test]
    fn a_token_that_two_tasks_wait_for_wakes_both() {
        let mut parking = Parking::new(2);
        parking.park(0, 5, 0);
        parking.park(1, 5, 0);
        parking.ready(5);
        assert_eq!(parking.parked(), 0);
        assert_eq!(parking.counts().most_parked, 2);
    }

    #[test]
    fn who_waits_too_long_is_named() {
        let mut parking = Parking::new(2);
        parking.park(1, 9, u32::MAX);
        assert_eq!(parking.overdue(4, 5), None);
        let overdue = Overdue {
            task: 1,
            token: 9,
            since: u32::MAX,
        };
        assert_eq!(parking.overdue(5, 5), Some(overdue));
        parking.ready(9);
        assert_eq!(parking.overdue(5, 5), None);
    }

    /// A KVM that fetches pages, and a guest with [`Parking`] that touches them. Whatever the order of events, every task comes to its
    /// end. The guest sees events in the order in which they are delivered, but may look at them late.
    struct Model {
        parking: Parking,
        /// The pages that each task still wants.
        wants: Vec<VecDeque<u8>>,
        present: BTreeSet<u8>,
        /// Tokens of pages on their way.
        fetching: BTreeMap<u32, u8>,
        /// Ready events that the guest has not looked at.
        delivered: VecDeque<u32>,
        /// A task that was told that its page is not present, and is not yet parked.
        told: Option<(usize, u32)>,
        next_token: u32,
    }

    impl Model {
        const LIMIT: usize = 64;

        fn look_at_events(&mut self) {
            while let Some(token) = self.delivered.pop_front() {
                self.parking.ready(token);
            }
        }

        fn fetch_all(&mut self) {
            while let Some((token, page)) = self.fetching.pop_first() {
                self.present.insert(page);
                self.delivered.push_back(token);
            }
        }

        fn run(&mut self) {
            if let Some((task, token)) = self.told.take() {
                self.parking.park(task, token, 0);
                return;
            }
            let Next::Run(task) = self.parking.choose() else {
                return;
            };
            let Some(&page) = self.wants[task].front() else {
                self.parking.finish(task);
                return;
            };
            if self.present.contains(&page) {
                self.wants[task].pop_front();
            } else if self.fetching.values().any(|other| *other == page) || self.fetching.len() == Self::LIMIT
            {
                // KVM stops the CPU until something comes.
                self.fetch_all();
            } else {
                self.next_token += 1;
                self.fetching.insert(self.next_token, page);
                self.told = Some((task, self.next_token));
            }
        }

        fn step(&mut self, choice: u8) {
            match choice % 8 {
                0..4 => self.run(),
                4 => {
                    let which = usize::from(choice / 8) % self.fetching.len().max(1);
                    if let Some((&token, &page)) = self.fetching.iter().nth(which) {
                        self.fetching.remove(&token);
                        self.present.insert(page);
                        self.delivered.push_back(token);
                    }
                }
                5 => self.look_at_events(),
                6 => {
                    // The machine moves: what is on its way never comes, but all are woken, and look for their pages again.
                    self.fetching.clear();
                    self.delivered.push_back(WAKE_ALL);
                    // Such an event comes behind what was told before it.
                    if let Some((task, token)) = self.told.take() {
                        self.parking.park(task, token, 0);
                    }
                }
                _ => {
                    let gone = self.present.iter().nth(usize::from(choice / 8)).copied();
                    gone.map(|page| self.present.remove(&page));
                }
            }
        }
    }

    proptest! {
        #[test]
        fn every_task_comes_to_its_end(
            wants in prop::collection::vec(prop::collection::vec(0_u8..100, 0..12), 1..100),
            choices in prop::collection::vec(any::<u8>(), 0..2000),
        ) {
            let steps = 4 * wants.iter().map(|wants| wants.len() + 2).sum::<usize>();
            let mut model = Model {
                parking: Parking::new(wants.len()),
                wants: wants.into_iter().map(VecDeque::from).collect(),
                present: BTreeSet::new(),
                fetching: BTreeMap::new(),
                delivered: VecDeque::new(),
                told: None,
                next_token: 0,
            };
            for choice in choices {
                model.step(choice);
            }
            // From now on everything that is wanted comes, and nothing else happens.
            for _ in 0..steps {
                model.run();
                model.fetch_all();
                if model.told.is_none() {
                    model.look_at_events();
                }
            }
            prop_assert_eq!(model.parking.choose(), Next::End, "{:?}", model.parking);
            prop_assert!(model.wants.iter().all(VecDeque::is_empty));
        }
    }
}
