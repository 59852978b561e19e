//! The program, run by the kernel with arguments of our choosing.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};

use super::*;
use crate::random::{Random, rounds};

impl Kvm {
    /// Whether the program takes an invalidation for a hit.
    fn hits(&self, range: AddressRange) -> bool {
        sys::tests::run(self.program.as_fd(), &[range.start, range.end]).unwrap() == 1
    }
}

/// A watcher, unless this machine has none, and then why.
fn open(test: &str) -> Option<Kvm> {
    match Kvm::open() {
        Ok((watcher, _)) => Some(watcher),
        Err(error) => {
            println!(
                "skipped: {test}: {error}: {:?}",
                std::error::Error::source(&error)
            );
            None
        }
    }
}

fn drained(watcher: &mut Kvm) -> Vec<Noticed> {
    let mut all = Vec::new();
    watcher.drain(&mut |noticed| all.push(noticed));
    all
}

/// Addresses that no process has, so that nothing else is heard of them.
const HIGH: u64 = 1 << 58;

fn high(range: AddressRange) -> AddressRange {
    AddressRange::new(HIGH + range.start, HIGH + range.end)
}

#[test]
fn the_program_says_what_a_search_of_all_ranges_says() {
    let Some(mut watcher) = open("the_program_says_what_a_search_of_all_ranges_says") else {
        return;
    };
    let mut random = Random::seeded();
    for _ in 0..rounds(3) {
        let mut model: Vec<AddressRange> = Vec::new();
        let pages = 1 << (1 + random.below(16));
        let most = 1 + random.below(10_000) as usize;
        for _ in 0..most {
            let range = high(filter::tests::a_range(&mut random, pages));
            watcher.watch(range).unwrap();
            model.push(range);
        }
        for _ in 0..2000 {
            let asked = high(filter::tests::a_range(&mut random, pages));
            let expected = model.iter().any(|range| range.overlaps(asked));
            assert_eq!(watcher.hits(asked), expected, "{asked:?}");
            let noticed = drained(&mut watcher);
            assert_eq!(noticed.contains(&Noticed::Invalidated(asked)), expected);
            if !model.is_empty() {
                let range = model.swap_remove(random.below(model.len() as u64) as usize);
                watcher.unwatch(range, &Ranges::default());
            }
        }
        for range in model {
            watcher.unwatch(range, &Ranges::default());
        }
        assert!(!watcher.hits(high(AddressRange::new(0, HIGH))));
    }
}

#[test]
fn a_full_ring_means_everything() {
    let Some(mut watcher) = open("a_full_ring_means_everything") else {
        return;
    };
    let range = high(AddressRange::new(0, 0x1000));
    watcher.watch(range).unwrap();
    let before = watcher.counter.load();
    for _ in 0..50_000 {
        assert!(watcher.hits(range));
    }
    assert_eq!(watcher.counter.load(), before + 50_000);
    let noticed = drained(&mut watcher);
    assert!(
        noticed.len() > 40_000 && noticed.len() < 50_000,
        "{}",
        noticed.len()
    );
    assert_eq!(noticed.last(), Some(&Noticed::Everything));
    // And it works again.
    assert!(watcher.hits(range));
    assert_eq!(drained(&mut watcher), [Noticed::Invalidated(range)]);
}

#[test]
fn the_counter_cannot_be_written() {
    let Some(watcher) = open("the_counter_cannot_be_written") else {
        return;
    };
    let protection = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
    assert!(crate::mapping::Mapping::shared(watcher.counter.file(), 0, 4096, protection).is_err());
}

/// Many invalidations on one CPU while the ranges change on another: what is watched all the time is never missed.
#[test]
fn a_change_of_other_ranges_hides_nothing() {
    let Some(mut watcher) = open("a_change_of_other_ranges_hides_nothing") else {
        return;
    };
    let mut random = Random::seeded();
    let watched = high(AddressRange::new(0x80_0000, 0x80_1000));
    watcher.watch(watched).unwrap();
    let program = watcher.program.as_fd().try_clone_to_owned().unwrap();
    let (done, count) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Relaxed) {
                let hit = sys::tests::run(program.as_fd(), &[watched.start, watched.end]);
                count.fetch_add(1, Relaxed);
                assert_eq!(hit.unwrap(), 1);
            }
        });
        let mut others = Vec::new();
        let mut changes = 0;
        // Where there is one CPU, until the other thread has had some of it.
        while changes < rounds(50_000) || count.load(Relaxed) < 1000 {
            changes += 1;
            if others.len() > 3000 || !others.is_empty() && random.below(2) == 0 {
                let range = others.swap_remove(random.below(others.len() as u64) as usize);
                watcher.unwatch(range, &Ranges::default());
            } else {
                let range = high(filter::tests::a_range(&mut random, 0x1000));
                watcher.watch(range).unwrap();
                others.push(range);
            }
        }
        done.store(true, Relaxed);
        println!("{changes} changes, {} invalidations", count.load(Relaxed));
    });
}
