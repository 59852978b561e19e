//! Writes one word to every page and from then on only looks at the clock: a machine that has memory, does nothing with it, and
//! sees whether it stood still.

use super::Pages;
use crate::exit_code::ExitCode;
use crate::fingerprint::Fingerprint;
use crate::machine::{Combine, Machine};

/// Runs on every CPU; `None` rounds are for ever. A round takes `period_us`, and a line about each says the longest time between two
/// looks at the clock, the printing of the line before included.
pub fn run(machine: &impl Machine, pages: &Pages<'_>, rounds: Option<u64>, period_us: u64) -> ExitCode {
    for page in pages.of(machine) {
        machine.write(page.frame, 0, Fingerprint::new(page.index, 1).word(0));
    }
    machine.combine(0, Combine::Max);
    if machine.cpu() == 0 {
        machine.print(format_args!("watching pages={}", pages.count()));
    }
    let mut looked = machine.ticks();
    let mut round = 0;
    while rounds.is_none_or(|rounds| round < rounds) {
        round += 1;
        let start = looked;
        let mut worst_gap = 0;
        while machine.microseconds(looked.saturating_sub(start)) < period_us {
            let now = machine.ticks();
            worst_gap = worst_gap.max(now.saturating_sub(looked));
            looked = now;
        }
        let worst_gap = machine.combine(worst_gap, Combine::Max);
        if machine.cpu() == 0 {
            let worst_gap_us = machine.microseconds(worst_gap);
            machine.print(format_args!("round={round} worst_gap_us={worst_gap_us}"));
        }
    }
    ExitCode::Ok
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::fake::Shared;
    use crate::order::Order;
    use crate::workload::tests::map;

    #[test]
    fn every_page_is_written_and_every_round_told() {
        let map = map();
        let pages = Pages::new(&map, 20, Order::Sequential).unwrap();
        for cpus in [1, 3] {
            let shared = Shared::new(cpus);
            assert_eq!(
                shared.run(|machine| run(machine, &pages, Some(2), 10)),
                ExitCode::Ok
            );
            let lines = shared.lines();
            assert_eq!(lines.len(), 3, "{lines:#?}");
            assert_eq!(lines[0], "watching pages=20");
            assert!(lines[2].starts_with("round=2 worst_gap_us="), "{}", lines[2]);
            let memory = shared.memory.lock().unwrap();
            assert_eq!(memory.len(), 20);
            assert!(memory.values().all(|page| page[0] != 0));
        }
    }
}
