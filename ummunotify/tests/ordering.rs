//! The contract: when the call that invalidates returns, the counter has moved.

#![allow(clippy::unwrap_used)] // a test's helpers panic as its tests do

mod common;

use common::random::{Random, rounds};
use common::{Memory, PAGE, open, read_all};
use ummunotify::{AddressRange, Cookie, Event, Notifier, WatcherKind};

/// Unmaps and maps again and looks at the counter each time, with a notifier of its own for each thread; so that what one
/// thread does cannot make up for what was missed of another.
fn the_counter_has_moved(test: &str, kind: WatcherKind, threads: u64, times: u64) {
    let Some(notifiers) = (0..threads)
        .map(|_| open(test, kind))
        .collect::<Option<Vec<Notifier>>>()
    else {
        return;
    };
    std::thread::scope(|scope| {
        for notifier in &notifiers {
            scope.spawn(move || {
                let memory = Memory::new(2);
                for count in 0..times {
                    notifier.register(memory.range(), Cookie(1)).unwrap();
                    let before = notifier.counter().load();
                    memory.unmap(memory.part(1, 2));
                    let after = notifier.counter().load();
                    assert_ne!(after, before, "{kind}: late or never, after {count}");
                    // Most of the time nobody reads.
                    if count % 100 == 0 {
                        let (events, last) = read_all(notifier);
                        assert_eq!(events.len(), 1, "{kind}: {events:?}");
                        assert!(last.unwrap() >= after);
                    }
                    notifier.unregister(Cookie(1)).unwrap();
                    memory.map_again();
                }
            });
        }
    });
}

#[test]
fn kvm_moves_the_counter_in_time() {
    let test = "ordering::kvm_moves_the_counter_in_time";
    the_counter_has_moved(test, WatcherKind::Kvm, 1, rounds(50_000));
    the_counter_has_moved(test, WatcherKind::Kvm, 4, rounds(50_000) / 4);
}

#[test]
fn perf_moves_the_counter_in_time() {
    let test = "ordering::perf_moves_the_counter_in_time";
    the_counter_has_moved(test, WatcherKind::Perf, 1, rounds(50_000));
    the_counter_has_moved(test, WatcherKind::Perf, 4, rounds(50_000) / 4);
}

#[test]
fn userfaultfd_moves_the_counter_in_time() {
    let test = "ordering::userfaultfd_moves_the_counter_in_time";
    the_counter_has_moved(test, WatcherKind::Userfaultfd, 1, rounds(50_000) / 10);
    the_counter_has_moved(test, WatcherKind::Userfaultfd, 4, rounds(50_000) / 40);
}

/// One notifier for all threads: each invalidation is counted, once.
fn each_invalidation_is_counted_once(test: &str, kind: WatcherKind, times: u64) {
    const THREADS: u64 = 4;
    let Some(notifier) = open(test, kind) else { return };
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let notifier = &notifier;
            scope.spawn(move || {
                for _ in 0..times {
                    let memory = Memory::new(1);
                    notifier.register(memory.range(), Cookie(thread)).unwrap();
                    drop(memory);
                    notifier.unregister(Cookie(thread)).unwrap();
                }
            });
        }
    });
    let (events, last) = read_all(&notifier);
    assert_eq!(events, []);
    assert_eq!(notifier.counter().load(), THREADS * times, "{kind}");
    assert!(last.is_none_or(|last| last == THREADS * times));
}

#[test]
fn kvm_counts_each_invalidation_once() {
    let test = "ordering::kvm_counts_each_invalidation_once";
    each_invalidation_is_counted_once(test, WatcherKind::Kvm, rounds(10_000));
}

#[test]
fn perf_counts_each_invalidation_once() {
    let test = "ordering::perf_counts_each_invalidation_once";
    each_invalidation_is_counted_once(test, WatcherKind::Perf, rounds(10_000));
}

#[test]
fn userfaultfd_counts_each_invalidation_once() {
    let test = "ordering::userfaultfd_counts_each_invalidation_once";
    each_invalidation_is_counted_once(test, WatcherKind::Userfaultfd, rounds(10_000) / 10);
}

/// While one thread invalidates, another unregisters: what is unregistered has no event afterwards, and a range that is
/// registered under the same cookie has none of what happened before.
fn unregistering_races_with_an_invalidation(test: &str, kind: WatcherKind, times: u64) {
    let Some(notifier) = open(test, kind) else { return };
    let mut random = Random::seeded();
    for _ in 0..times {
        let memory = std::mem::ManuallyDrop::new(Memory::new(2));
        let elsewhere = Memory::new(1);
        notifier.register(memory.range(), Cookie(1)).unwrap();
        let delay = random.below(200);
        std::thread::scope(|scope| {
            scope.spawn(|| memory.unmap(memory.range()));
            for _ in 0..delay {
                std::hint::spin_loop();
            }
            notifier.unregister(Cookie(1)).unwrap();
            notifier.register(elsewhere.range(), Cookie(1)).unwrap();
            let (events, _) = read_all(&notifier);
            assert_eq!(events, [], "{kind}");
        });
        let (events, _) = read_all(&notifier);
        assert_eq!(events, [], "{kind}");
        notifier.unregister(Cookie(1)).unwrap();
    }
}

#[test]
fn kvm_tells_nothing_of_an_unregistered_range() {
    let test = "ordering::kvm_tells_nothing_of_an_unregistered_range";
    unregistering_races_with_an_invalidation(test, WatcherKind::Kvm, rounds(2000));
}

#[test]
fn perf_tells_nothing_of_an_unregistered_range() {
    let test = "ordering::perf_tells_nothing_of_an_unregistered_range";
    unregistering_races_with_an_invalidation(test, WatcherKind::Perf, rounds(2000));
}

#[test]
fn userfaultfd_tells_nothing_of_an_unregistered_range() {
    let test = "ordering::userfaultfd_tells_nothing_of_an_unregistered_range";
    unregistering_races_with_an_invalidation(test, WatcherKind::Userfaultfd, rounds(2000));
}

/// Random registrations of one piece of memory, and random parts of it dropped, by two threads: when both are done, each range
/// has an event if and only if a part of it was dropped while it was registered.
fn random_operations(test: &str, kind: WatcherKind, times: u64) {
    const PAGES: u64 = 32;
    let Some(notifier) = open(test, kind) else { return };
    let mut random = Random::seeded();
    for round in 0..times {
        let memory = Memory::new(PAGES);
        let mut ranges = Vec::new();
        for cookie in 0..=random.below(20) {
            // To the byte.
            let start = memory.start + random.below(PAGES * PAGE);
            let end = (start + 1 + random.below(6 * PAGE)).min(memory.range().end);
            let range = AddressRange::new(start, end);
            notifier.register(range, Cookie(cookie)).unwrap();
            ranges.push(range);
        }
        let before = notifier.counter().load();
        let drops: Vec<Vec<AddressRange>> = (0..2)
            .map(|_| {
                (0..random.below(6))
                    .map(|_| {
                        let from = random.below(PAGES);
                        memory.part(from, (from + 1 + random.below(4)).min(PAGES))
                    })
                    .collect()
            })
            .collect();
        std::thread::scope(|scope| {
            for drops in &drops {
                scope.spawn(move || {
                    for part in drops {
                        let length = (part.end - part.start) as usize;
                        let advice = rustix::mm::Advice::LinuxDontNeed;
                        // SAFETY: memory of the test, to which nobody has a reference.
                        unsafe { rustix::mm::madvise(part.start as *mut _, length, advice) }.unwrap();
                    }
                });
            }
        });
        let drops: Vec<AddressRange> = drops.into_iter().flatten().collect();
        let hits = drops
            .iter()
            .filter(|part| ranges.iter().any(|range| range.overlaps(**part)))
            .count() as u64;
        let counted = notifier.counter().load() - before;
        // A userfaultfd tells of one call once for each mapping, and what is registered is a mapping apart.
        let several = kind == WatcherKind::Userfaultfd && counted > hits;
        assert!(
            counted == hits || several,
            "{kind}: round {round}: {counted} of {hits}"
        );
        let (mut events, _) = read_all(&notifier);
        for (cookie, range) in ranges.iter().enumerate() {
            let cookie = Cookie(cookie as u64);
            let hits: Vec<AddressRange> = drops
                .iter()
                .copied()
                .filter(|part| range.overlaps(*part))
                .collect();
            let event = events
                .iter()
                .position(|event| matches!(event, Event::Invalidated { cookie: of, .. } if *of == cookie))
                .map(|at| events.swap_remove(at));
            let expected = match hits[..] {
                [] => None,
                [part] => Some(Event::Invalidated {
                    cookie,
                    part: part.clipped_to(*range),
                    exact: true,
                }),
                _ => Some(Event::Invalidated {
                    cookie,
                    part: *range,
                    exact: false,
                }),
            };
            let whole = Event::Invalidated {
                cookie,
                part: *range,
                exact: false,
            };
            // For the same reason, what was one call may be several invalidations of the range.
            let merged = several && expected.is_some() && event == Some(whole);
            assert!(
                event == expected || merged,
                "{kind}: round {round}: {event:?}, not {expected:?}"
            );
            notifier.unregister(cookie).unwrap();
        }
        assert_eq!(events, [], "{kind}: round {round}");
    }
}

#[test]
fn kvm_agrees_with_a_model() {
    random_operations(
        "ordering::kvm_agrees_with_a_model",
        WatcherKind::Kvm,
        rounds(2000),
    );
}

#[test]
fn perf_agrees_with_a_model() {
    let test = "ordering::perf_agrees_with_a_model";
    random_operations(test, WatcherKind::Perf, rounds(2000));
}

#[test]
fn userfaultfd_agrees_with_a_model() {
    let test = "ordering::userfaultfd_agrees_with_a_model";
    random_operations(test, WatcherKind::Userfaultfd, rounds(2000) / 4);
}
