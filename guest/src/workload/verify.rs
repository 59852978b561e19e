//! Checks that every page holds its fingerprint.

use super::{Page, Pages, wrong_lines_per_cpu};
use crate::exit_code::ExitCode;
use crate::fingerprint::{Fingerprint, PAGE_SIZE, PAGE_WORDS};
use crate::machine::{Combine, Machine};

/// Runs on every CPU. Not `full` looks at three words of each page: the first, the last, and one that the seed chooses.
pub fn run(machine: &impl Machine, pages: &Pages<'_>, seed: u64, full: bool) -> ExitCode {
    let start = machine.ticks();
    let (mut verified, mut wrong) = (0, 0);
    for page in pages.of(machine) {
        verified += 1;
        if let Some(mismatch) = check(machine, page, seed, full) {
            wrong += 1;
            if wrong <= wrong_lines_per_cpu(machine) {
                mismatch.print(machine, page);
            }
        }
    }
    let verified = machine.combine(verified, Combine::Sum);
    let wrong = machine.combine(wrong, Combine::Sum);
    let elapsed_us = machine.microseconds(machine.ticks().saturating_sub(start));
    if machine.cpu() == 0 {
        machine.print(format_args!(
            "verified={verified} wrong={wrong} elapsed_us={elapsed_us}"
        ));
    }
    if wrong == 0 {
        ExitCode::Ok
    } else {
        ExitCode::CheckFailed
    }
}

/// The first wrong word of a page.
pub(super) struct Mismatch {
    word: usize,
    expected: u64,
    found: u64,
}

impl Mismatch {
    /// Names it.
    pub(super) fn print(&self, machine: &impl Machine, page: Page) {
        let Self {
            word,
            expected,
            found,
        } = self;
        let address = page.frame * PAGE_SIZE as u64 + *word as u64 * 8;
        machine.print(format_args!(
            "wrong_page={:#x} address={address:#x} word={word} expected={expected:#x} found={found:#x}",
            page.frame
        ));
    }
}

/// Compares a page with its fingerprint: every word of it, or three.
pub(super) fn check(machine: &impl Machine, page: Page, seed: u64, full: bool) -> Option<Mismatch> {
    let fingerprint = Fingerprint::new(seed, page.frame);
    let check = |word| {
        let (expected, found) = (fingerprint.word(word), machine.read(page.frame, word));
        (found != expected).then_some(Mismatch {
            word,
            expected,
            found,
        })
    };
    if full {
        (0..PAGE_WORDS).find_map(check)
    } else {
        // The word behind the last is in no page, but as good as any other for choosing one.
        let chosen = fingerprint.word(PAGE_WORDS) as usize % PAGE_WORDS;
        [0, PAGE_WORDS - 1, chosen].into_iter().find_map(check)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::fake::Shared;
    use crate::order::Order;
    use crate::workload::tests::map;

    const SEED: u64 = 9;

    fn filled(cpus: usize) -> Shared {
        let shared = Shared::new(cpus);
        let map = map();
        let mut memory = shared.memory.lock().unwrap();
        for index in 0..map.count() {
            let frame = map.frame(index).unwrap();
            let fingerprint = Fingerprint::new(SEED, frame);
            memory.insert(frame, std::array::from_fn(|word| fingerprint.word(word)));
        }
        drop(memory);
        shared
    }

    fn verify(shared: &Shared, order: Order, full: bool) -> ExitCode {
        let map = map();
        let pages = Pages::new(&map, map.count(), order).unwrap();
        shared.run(|machine| run(machine, &pages, SEED, full))
    }

    #[test]
    fn right_pages_are_right() {
        for cpus in [1, 4] {
            for full in [true, false] {
                for order in [Order::Sequential, Order::Random { seed: SEED }] {
                    let shared = filled(cpus);
                    assert_eq!(verify(&shared, order, full), ExitCode::Ok);
                    assert!(shared.lines()[0].starts_with("verified=32 wrong=0 elapsed_us="));
                    let words = if full { 512 } else { 3 };
                    assert_eq!(shared.touched.lock().unwrap().len(), 32 * words);
                }
            }
        }
    }

    #[test]
    fn one_bit_is_found_and_named() {
        let shared = filled(2);
        shared.memory.lock().unwrap().get_mut(&0x41).unwrap()[100] ^= 1 << 63;
        assert_eq!(verify(&shared, Order::Sequential, true), ExitCode::CheckFailed);
        let expected = Fingerprint::new(SEED, 0x41).word(100);
        let found = expected ^ 1 << 63;
        let lines = shared.lines();
        assert_eq!(
            lines[0],
            format!("wrong_page=0x41 address=0x41320 word=100 expected={expected:#x} found={found:#x}")
        );
        assert!(lines[1].starts_with("verified=32 wrong=1 "), "{}", lines[1]);
    }

    #[test]
    fn missing_and_swapped_pages_are_found_by_few_words() {
        let shared = filled(1);
        let mut memory = shared.memory.lock().unwrap();
        memory.remove(&0x10);
        let (a, b) = (memory[&0x11], memory[&0x12]);
        memory.extend([(0x12, a), (0x11, b)]);
        drop(memory);
        assert_eq!(verify(&shared, Order::Sequential, false), ExitCode::CheckFailed);
        assert!(shared.lines().last().unwrap().starts_with("verified=32 wrong=3 "));
    }

    #[test]
    fn not_every_wrong_page_gets_a_line() {
        for cpus in [1, 2] {
            let shared = Shared::new(cpus);
            assert_eq!(verify(&shared, Order::Sequential, true), ExitCode::CheckFailed);
            let lines = shared.lines();
            assert_eq!(lines.len(), 17);
            assert!(lines[16].starts_with("verified=32 wrong=32 "));
        }
    }
}
