//! Reads the first word of every page.

use super::Pages;
use crate::exit_code::ExitCode;
use crate::machine::{Combine, Machine};

/// Runs on every CPU. A round ends when the last CPU has read its last page.
pub fn run(machine: &impl Machine, pages: &Pages<'_>, rounds: u64) -> ExitCode {
    for round in 1..=rounds {
        let start = machine.ticks();
        let sum = pages
            .of(machine)
            .fold(0, |sum: u64, page| sum.wrapping_add(machine.read(page.frame, 0)));
        let sum = machine.combine(sum, Combine::Sum);
        let elapsed_us = machine.microseconds(machine.ticks().saturating_sub(start));
        if machine.cpu() == 0 {
            let pages = pages.count();
            machine.print(format_args!(
                "round={round} pages={pages} sum={sum:#x} elapsed_us={elapsed_us}"
            ));
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
    fn every_page_is_read_once_a_round() {
        let map = map();
        let pages = Pages::new(&map, 20, Order::Stride { stride: 4 }).unwrap();
        let shared = Shared::new(3);
        for index in 0..20 {
            let page = [index; crate::fingerprint::PAGE_WORDS];
            shared
                .memory
                .lock()
                .unwrap()
                .insert(map.frame(index).unwrap(), page);
        }
        assert_eq!(shared.run(|machine| run(machine, &pages, 2)), ExitCode::Ok);
        let lines = shared.lines();
        assert_eq!(lines.len(), 2);
        assert!(
            lines[0].starts_with("round=1 pages=20 sum=0xbe elapsed_us="),
            "{}",
            lines[0]
        );
        assert!(
            lines[1].starts_with("round=2 pages=20 sum=0xbe elapsed_us="),
            "{}",
            lines[1]
        );
        assert_eq!(shared.touched.lock().unwrap().len(), 40);
    }
}
