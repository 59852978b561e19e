//! Random operations, and what a list of all ranges that is searched from end to end says of them.

#![allow(clippy::unwrap_used)] // a test's helpers panic as its tests do

mod common;

use std::sync::{Mutex, PoisonError};

use common::random::{Random, rounds};
use common::{Memory, PAGE, open, read_all};
use rustix::mm::{Advice, madvise};
use ummunotify::{AddressRange, Cookie, Event, WatcherKind};

const PAGES: u64 = 32;

/// What is done to a part of the memory.
type Dropped = (AddressRange, Advice);

/// One test at a time: a fork invalidates the memory of all of them.
static ALONE: Mutex<()> = Mutex::new(());

/// Random registrations of one piece of memory, and random parts of it dropped, by two threads, and sometimes a fork: when all
/// is done, each range has an event if and only if a part of it was dropped while it was registered, with exactly that part if
/// it was one.
fn random_operations(test: &str, kind: WatcherKind, times: u64) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(notifier) = open(test, kind) else { return };
    let mut random = Random::seeded();
    for round in 0..times {
        let memory = Memory::new(PAGES);
        let ranges: Vec<AddressRange> = (0..=random.below(20))
            .map(|_| a_range(&mut random, &memory))
            .collect();
        for (cookie, range) in ranges.iter().enumerate() {
            notifier.register(*range, Cookie(cookie as u64)).unwrap();
        }
        let before = notifier.counter().load();
        let drops = [some_drops(&mut random, &memory), some_drops(&mut random, &memory)];
        std::thread::scope(|scope| {
            for drops in &drops {
                scope.spawn(move || drops.iter().for_each(drop_part));
            }
        });
        let drops: Vec<AddressRange> = drops.into_iter().flatten().map(|(part, _)| part).collect();
        let forks = random.below(16) == 0 && forks_are_seen(kind);
        if forks {
            fork();
        }
        let hits = drops
            .iter()
            .filter(|part| ranges.iter().any(|range| range.overlaps(**part)))
            .count() as u64;
        let counted = notifier.counter().load() - before;
        let context = format!("{kind}: round {round}: counted {counted} of {hits}, fork: {forks}");
        // A userfaultfd tells of one call once for each mapping, and what is registered is a mapping apart.
        let several = kind == WatcherKind::Userfaultfd && counted > hits;
        assert!(counted == hits || several || forks && counted > hits, "{context}");

        let (mut events, _) = read_all(&notifier);
        for (cookie, range) in ranges.iter().enumerate() {
            let cookie = Cookie(cookie as u64);
            let event = events
                .iter()
                .position(|event| matches!(event, Event::Invalidated { cookie: of, .. } if *of == cookie))
                .map(|at| events.swap_remove(at));
            let parts: Vec<AddressRange> = drops
                .iter()
                .copied()
                .filter(|part| range.overlaps(*part))
                .collect();
            let told = |part, exact| Some(Event::Invalidated { cookie, part, exact });
            let expected = match parts[..] {
                // All of it, be it told so or not known better.
                _ if forks => vec![told(*range, false), told(*range, true)],
                [] => vec![None],
                // For the reason above, what was one call may be several invalidations of the range.
                [part] if several => vec![told(part.clipped_to(*range), true), told(*range, false)],
                [part] => vec![told(part.clipped_to(*range), true)],
                _ => vec![told(*range, false)],
            };
            assert!(
                expected.contains(&event),
                "{context}: {event:?}, not {expected:?}"
            );
            notifier.unregister(cookie).unwrap();
        }
        assert_eq!(events, [], "{context}");
    }
}

/// To the byte, and not empty.
fn a_range(random: &mut Random, memory: &Memory) -> AddressRange {
    let start = memory.start + random.below(PAGES * PAGE);
    let end = (start + 1 + random.below(6 * PAGE)).min(memory.range().end);
    AddressRange::new(start, end)
}

fn some_drops(random: &mut Random, memory: &Memory) -> Vec<Dropped> {
    (0..random.below(6))
        .map(|_| {
            let from = random.below(PAGES);
            let part = memory.part(from, (from + 1 + random.below(4)).min(PAGES));
            let advices = [Advice::LinuxDontNeed, Advice::LinuxFree];
            (part, advices[random.below(2) as usize])
        })
        .collect()
}

fn drop_part((part, advice): &Dropped) {
    let length = (part.end - part.start) as usize;
    // SAFETY: memory of the test, to which nobody has a reference.
    unsafe { madvise(part.start as *mut _, length, *advice) }.unwrap();
}

/// A userfaultfd tells of forks only who may trace processes.
fn forks_are_seen(kind: WatcherKind) -> bool {
    kind != WatcherKind::Userfaultfd
        || rustix::thread::capabilities(None)
            .is_ok_and(|sets| sets.effective.contains(rustix::thread::CapabilitySet::SYS_PTRACE))
}

fn fork() {
    // SAFETY: the child does nothing but end, and ends without the parent's clean-up.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        // SAFETY: as above.
        unsafe { libc::_exit(0) };
    }
    // SAFETY: waits for a child of this process.
    assert_eq!(unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) }, child);
}

#[test]
fn kvm_agrees_with_a_model() {
    let test = "model::kvm_agrees_with_a_model";
    random_operations(test, WatcherKind::Kvm, rounds(2000));
}

#[test]
fn perf_agrees_with_a_model() {
    let test = "model::perf_agrees_with_a_model";
    random_operations(test, WatcherKind::Perf, rounds(2000));
}

#[test]
fn userfaultfd_agrees_with_a_model() {
    let test = "model::userfaultfd_agrees_with_a_model";
    random_operations(test, WatcherKind::Userfaultfd, rounds(2000) / 4);
}
