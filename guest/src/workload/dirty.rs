//! Writes to every page round after round, and checks that what it wrote in the round before is still there.

use super::{Page, Pages, wrong_lines_per_cpu};
use crate::exit_code::ExitCode;
use crate::fingerprint::{Fingerprint, PAGE_SIZE};
use crate::machine::{Combine, Machine};

/// What a round leaves at the start of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    index: u64,
    round: u64,
    checksum: u64,
}

impl Mark {
    fn new(page: Page, round: u64) -> Self {
        Self {
            index: page.index,
            round,
            checksum: Fingerprint::new(page.index, round).word(0),
        }
    }

    fn read(machine: &impl Machine, page: Page) -> Self {
        Self {
            index: machine.read(page.frame, 0),
            round: machine.read(page.frame, 1),
            checksum: machine.read(page.frame, 2),
        }
    }

    fn write(self, machine: &impl Machine, page: Page) {
        machine.write(page.frame, 0, self.index);
        machine.write(page.frame, 1, self.round);
        machine.write(page.frame, 2, self.checksum);
    }
}

/// One CPU's view of its work.
struct Dirtier<'a, M> {
    machine: &'a M,
    /// When the last page was touched.
    touched: u64,
    /// The longest time between two touches since the last report, and the longest without the change of rounds.
    worst_gap: u64,
    worst_gap_in_round: u64,
    wrong: u64,
}

/// Runs on every CPU; `None` rounds are for ever. After the last round there is one more that only checks.
///
/// `worst_gap_us` leaves no time out, so that no pause of the machine goes unseen: the time between the last touch of a round
/// and the first of the next, in which the CPUs wait for each other and a line is printed, counts for the later one.
/// `in_round_us` is the same without that.
pub fn run(machine: &impl Machine, pages: &Pages<'_>, rounds: Option<u64>) -> ExitCode {
    let mut dirtier = Dirtier {
        machine,
        touched: machine.ticks(),
        worst_gap: 0,
        worst_gap_in_round: 0,
        wrong: 0,
    };
    let mut round = 0;
    let mut right = true;
    while right && rounds.is_none_or(|rounds| round < rounds) {
        round += 1;
        dirtier.round(pages, round);
        right = dirtier.report("round", round);
    }
    if right {
        dirtier.check_all(pages, round);
        right = dirtier.report("checked", round);
    }
    let wrong = machine.combine(dirtier.wrong, Combine::Sum);
    if machine.cpu() == 0 {
        machine.print(format_args!("pages={} wrong={wrong}", pages.count()));
    }
    if right {
        ExitCode::Ok
    } else {
        ExitCode::CheckFailed
    }
}

impl<M: Machine> Dirtier<'_, M> {
    fn round(&mut self, pages: &Pages<'_>, round: u64) {
        for (turn, page) in pages.of(self.machine).enumerate() {
            if round > 1 {
                self.check(page, round - 1);
            }
            Mark::new(page, round).write(self.machine, page);
            self.touch(turn == 0);
        }
    }

    fn check_all(&mut self, pages: &Pages<'_>, round: u64) {
        for (turn, page) in pages.of(self.machine).enumerate() {
            self.check(page, round);
            self.touch(turn == 0);
        }
    }

    fn check(&mut self, page: Page, round: u64) {
        let (expected, found) = (Mark::new(page, round), Mark::read(self.machine, page));
        if found == expected {
            return;
        }
        self.wrong += 1;
        if self.wrong <= wrong_lines_per_cpu(self.machine) {
            self.machine.print(format_args!(
                "wrong_page={:#x} address={:#x} expected_index={} expected_round={} expected_checksum={:#x} \
                 found_index={} found_round={} found_checksum={:#x}",
                page.frame,
                page.frame * PAGE_SIZE as u64,
                expected.index,
                expected.round,
                expected.checksum,
                found.index,
                found.round,
                found.checksum,
            ));
        }
    }

    fn touch(&mut self, first_of_round: bool) {
        let now = self.machine.ticks();
        let gap = now.saturating_sub(self.touched);
        self.touched = now;
        self.worst_gap = self.worst_gap.max(gap);
        if !first_of_round {
            self.worst_gap_in_round = self.worst_gap_in_round.max(gap);
        }
    }

    /// Waits for the other CPUs, prints what the round was like, and tells whether all was right. The line is short, because printing
    /// it is part of the next round's worst gap.
    fn report(&mut self, key: &str, round: u64) -> bool {
        let machine = self.machine;
        let worst_gap = machine.combine(self.worst_gap, Combine::Max);
        let worst_gap_in_round = machine.combine(self.worst_gap_in_round, Combine::Max);
        let wrong = machine.combine(self.wrong, Combine::Sum);
        (self.worst_gap, self.worst_gap_in_round) = (0, 0);
        if machine.cpu() == 0 {
            let worst_gap_us = machine.microseconds(worst_gap);
            let in_round_us = machine.microseconds(worst_gap_in_round);
            machine.print(format_args!(
                "{key}={round} worst_gap_us={worst_gap_us} in_round_us={in_round_us}"
            ));
        }
        wrong == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::fake::{FakeMachine, Shared};
    use crate::order::Order;
    use crate::workload::tests::map;
    use std::fmt;

    #[test]
    fn rounds_leave_their_marks() {
        let map = map();
        for (cpus, order) in [
            (1, Order::Sequential),
            (3, Order::Random { seed: 1 }),
            (40, Order::Sequential),
        ] {
            let shared = Shared::new(cpus);
            let pages = Pages::new(&map, 32, order).unwrap();
            assert_eq!(shared.run(|machine| run(machine, &pages, Some(3))), ExitCode::Ok);
            let lines = shared.lines();
            assert_eq!(lines.len(), 5);
            assert_eq!(lines[4], "pages=32 wrong=0");
            assert!(lines[2].starts_with("round=3 worst_gap_us="), "{}", lines[2]);
            assert!(lines[3].starts_with("checked=3 worst_gap_us="), "{}", lines[3]);
            let memory = shared.memory.lock().unwrap();
            for index in 0..32 {
                let frame = map.frame(index).unwrap();
                let mark = Mark::new(Page { index, frame }, 3);
                assert_eq!(memory[&frame][..3], [index, 3, mark.checksum]);
            }
        }
    }

    /// A machine that loses one write: it puts an old mark in the place of a newer one.
    struct Forgetful<'a>(&'a FakeMachine<'a>);

    impl Machine for Forgetful<'_> {
        fn cpu(&self) -> u64 {
            self.0.cpu()
        }
        fn cpus(&self) -> u64 {
            self.0.cpus()
        }
        fn ram_bytes(&self) -> u64 {
            self.0.ram_bytes()
        }
        fn read(&self, frame: u64, word: usize) -> u64 {
            self.0.read(frame, word)
        }
        fn write(&self, frame: u64, word: usize, value: u64) {
            let lost = frame == 0x45 && self.0.read(frame, 1) == 2;
            if !lost {
                self.0.write(frame, word, value);
            }
        }
        fn ticks(&self) -> u64 {
            self.0.ticks()
        }
        fn microseconds(&self, ticks: u64) -> u64 {
            self.0.microseconds(ticks)
        }
        fn print(&self, line: fmt::Arguments<'_>) {
            self.0.print(line);
        }
        fn combine(&self, value: u64, how: Combine) -> u64 {
            self.0.combine(value, how)
        }
    }

    #[test]
    fn a_lost_write_is_found_and_ends_it() {
        let map = map();
        let shared = Shared::new(2);
        let pages = Pages::new(&map, 32, Order::Sequential).unwrap();
        let code = shared.run(|machine| run(&Forgetful(machine), &pages, None));
        assert_eq!(code, ExitCode::CheckFailed);
        let lines = shared.lines();
        // The CPU that finds it does not wait for the other one to print its rounds.
        let expected = "wrong_page=0x45 address=0x45000 expected_index=21 ";
        assert!(lines.iter().any(|line| line.starts_with(expected)), "{lines:#?}");
        assert!(lines.last().unwrap().ends_with("pages=32 wrong=1"));
    }
}
