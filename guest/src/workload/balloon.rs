//! Gives pages back and uses them again: then they must be zero, and never what they were.
//!
//! CPU 0 does it all; the others wait.

use super::{Pages, wrong_lines_per_cpu};
use crate::balloon::{Balloon, PAGES_AT_A_TIME, QUEUE_SIZE};
use crate::command_line::How;
use crate::exit_code::ExitCode;
use crate::fingerprint::PAGE_WORDS;
use crate::machine::Machine;

/// Runs on CPU 0.
pub fn run(
    machine: &impl Machine,
    balloon: &mut impl Balloon,
    pages: &Pages<'_>,
    how: How,
    wait: bool,
    rounds: u64,
) -> ExitCode {
    if how == How::Target {
        return follow(machine, balloon, pages);
    }
    print_frames(machine, pages);
    let mut code = ExitCode::Ok;
    for round in 1..=rounds {
        write(machine, pages, 0..pages.count(), round);
        machine.print(format_args!("round={round} written={}", pages.count()));
        if wait {
            await_another_target(machine, balloon);
        }
        let start = machine.ticks();
        match how {
            How::Report => in_parts::<QUEUE_SIZE>(pages, 0..pages.count(), |part| balloon.report(part)),
            How::Inflate | How::Target => {
                in_parts::<PAGES_AT_A_TIME>(pages, 0..pages.count(), |part| balloon.inflate(part));
                balloon.set_actual(pages.count() as u32);
            }
        }
        let elapsed_us = machine.microseconds(machine.ticks().saturating_sub(start));
        machine.print(format_args!(
            "round={round} given={} elapsed_us={elapsed_us}",
            pages.count()
        ));
        if how == How::Inflate {
            in_parts::<PAGES_AT_A_TIME>(pages, 0..pages.count(), |part| balloon.deflate(part));
            balloon.set_actual(0);
        }
        if wait {
            await_another_target(machine, balloon);
        }
        let wrong = check_zero(machine, pages, 0..pages.count());
        machine.print(format_args!(
            "round={round} zero={} wrong={wrong}",
            pages.count() - wrong
        ));
        if wrong > 0 {
            code = ExitCode::CheckFailed;
        }
    }
    code
}

/// Holds as many pages as the balloon is to hold, until that was some and is none again.
fn follow(machine: &impl Machine, balloon: &mut impl Balloon, pages: &Pages<'_>) -> ExitCode {
    let (mut held, mut wrong, mut held_some) = (0, 0, false);
    machine.print(format_args!("following=on"));
    loop {
        let target = u64::from(balloon.target()).min(pages.count());
        if target == held {
            if held_some && held == 0 {
                break;
            }
            core::hint::spin_loop();
            continue;
        }
        if target > held {
            write(machine, pages, held..target, 1);
            in_parts::<PAGES_AT_A_TIME>(pages, held..target, |part| balloon.inflate(part));
            held_some = true;
        } else {
            in_parts::<PAGES_AT_A_TIME>(pages, target..held, |part| balloon.deflate(part));
            wrong += check_zero(machine, pages, target..held);
        }
        held = target;
        balloon.set_actual(held as u32);
        machine.print(format_args!("held={held} wrong={wrong}"));
    }
    if wrong == 0 {
        ExitCode::Ok
    } else {
        ExitCode::CheckFailed
    }
}

/// Waits until the balloon is to hold another number of pages.
fn await_another_target(machine: &impl Machine, balloon: &impl Balloon) {
    let target = balloon.target();
    machine.print(format_args!("waiting=on target={target}"));
    while balloon.target() == target {
        core::hint::spin_loop();
    }
}

/// Says which pages it will be, in runs of their turns; not every one of many.
fn print_frames(machine: &impl Machine, pages: &Pages<'_>) {
    const LINES: u64 = 16;
    let (mut lines, mut run) = (0, None);
    let mut print = |run: Option<(u64, u64)>| {
        if let Some((first, end)) = run.filter(|_| lines < LINES) {
            lines += 1;
            machine.print(format_args!("frames={first:#x}-{end:#x}"));
        }
    };
    for frame in (0..pages.count())
        .filter_map(|turn| pages.page(turn))
        .map(|page| page.frame)
    {
        run = match run {
            Some((first, end)) if end == frame => Some((first, end + 1)),
            before => {
                print(before);
                Some((frame, frame + 1))
            }
        };
    }
    print(run);
}

/// Hands on the frames of these turns, so many at a time.
fn in_parts<const MOST: usize>(
    pages: &Pages<'_>,
    turns: core::ops::Range<u64>,
    mut give: impl FnMut(&[u32]),
) {
    let mut part = [0; MOST];
    let mut count = 0;
    for page in turns.filter_map(|turn| pages.page(turn)) {
        part[count] = page.frame as u32;
        count += 1;
        if count == MOST {
            give(&part);
            count = 0;
        }
    }
    if count > 0 {
        give(&part[..count]);
    }
}

/// Writes words none of which is zero.
fn write(machine: &impl Machine, pages: &Pages<'_>, turns: core::ops::Range<u64>, round: u64) {
    for page in turns.filter_map(|turn| pages.page(turn)) {
        for word in 0..PAGE_WORDS {
            machine.write(
                page.frame,
                word,
                page.frame << 32 | round << 16 | word as u64 | 1 << 15,
            );
        }
    }
}

/// How many pages are not all zero.
fn check_zero(machine: &impl Machine, pages: &Pages<'_>, turns: core::ops::Range<u64>) -> u64 {
    let mut wrong = 0;
    for page in turns.filter_map(|turn| pages.page(turn)) {
        let found = (0..PAGE_WORDS).map(|word| (word, machine.read(page.frame, word)));
        if let Some((word, found)) = found.into_iter().find(|(_, found)| *found != 0) {
            wrong += 1;
            if wrong <= wrong_lines_per_cpu(machine) {
                machine.print(format_args!(
                    "not_zero={:#x} word={word} found={found:#x}",
                    page.frame
                ));
            }
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::fake::Shared;
    use crate::order::Order;
    use crate::workload::tests::map;

    /// One that takes pages away, or does not.
    struct FakeBalloon<'a> {
        shared: &'a Shared,
        takes: bool,
        targets: Vec<u32>,
        given: Vec<u32>,
    }

    impl FakeBalloon<'_> {
        fn take(&mut self, frames: &[u32]) {
            assert!(frames.len() <= PAGES_AT_A_TIME);
            self.given.extend(frames);
            if self.takes {
                let mut memory = self.shared.memory.lock().unwrap();
                for frame in frames {
                    memory.remove(&u64::from(*frame));
                }
            }
        }
    }

    impl Balloon for FakeBalloon<'_> {
        fn inflate(&mut self, frames: &[u32]) {
            self.take(frames);
        }

        fn deflate(&mut self, _: &[u32]) {}

        fn report(&mut self, frames: &[u32]) {
            assert!(frames.len() <= QUEUE_SIZE);
            self.take(frames);
        }

        fn target(&self) -> u32 {
            self.targets[0]
        }

        fn set_actual(&mut self, _: u32) {
            if self.targets.len() > 1 {
                self.targets.remove(0);
            }
        }
    }

    fn run_with(how: How, takes: bool, targets: &[u32]) -> (ExitCode, Vec<u32>, Vec<String>) {
        let map = map();
        let pages = Pages::new(&map, 20, Order::Sequential).unwrap();
        let shared = Shared::new(1);
        let given = std::sync::Mutex::new(Vec::new());
        let code = shared.run(|machine| {
            let mut balloon = FakeBalloon {
                shared: &shared,
                takes,
                targets: targets.to_vec(),
                given: Vec::new(),
            };
            let code = run(machine, &mut balloon, &pages, how, false, 2);
            given.lock().unwrap().extend(balloon.given);
            code
        });
        (code, given.into_inner().unwrap(), shared.lines())
    }

    #[test]
    fn pages_that_are_taken_are_zero_and_others_are_named() {
        for how in [How::Inflate, How::Report] {
            let (code, given, lines) = run_with(how, true, &[0]);
            assert_eq!((code, given.len()), (ExitCode::Ok, 40));
            assert_eq!(lines.last().unwrap(), "round=2 zero=20 wrong=0");
            let (code, _, lines) = run_with(how, false, &[0]);
            assert_eq!(code, ExitCode::CheckFailed);
            assert_eq!(lines.last().unwrap(), "round=2 zero=0 wrong=20");
            assert!(
                lines
                    .iter()
                    .any(|line| line.starts_with("not_zero=0x10 word=0 found=0x10000"))
            );
        }
    }

    #[test]
    fn the_target_is_followed_until_it_is_none() {
        let (code, given, lines) = run_with(How::Target, true, &[5, 30, 3, 0]);
        assert_eq!(code, ExitCode::Ok);
        assert_eq!(given.len(), 20);
        let held: Vec<&String> = lines.iter().filter(|line| line.starts_with("held=")).collect();
        assert_eq!(
            held,
            [
                "held=5 wrong=0",
                "held=20 wrong=0",
                "held=3 wrong=0",
                "held=0 wrong=0"
            ]
        );
    }
}
