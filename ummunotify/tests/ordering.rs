//! The contract: when the call that invalidates returns, the counter has moved.

#![allow(clippy::unwrap_used)] // a test's helpers panic as its tests do

mod common;

use common::random::{Random, rounds};
use common::{Memory, open, read_all};
use ummunotify::{Cookie, Notifier, WatcherKind};

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
