//! A cache of registrations, as an MPI library has it for buffers that it sends from: its entries outlive the use, and are
//! right as long as the mapping is the one that was registered.

#![allow(clippy::unwrap_used)] // a test's helpers panic as its tests do

mod common;

use std::collections::HashMap;
use std::sync::Mutex;

use common::random::{Random, rounds};
use common::{Memory, open};
use ummunotify::{AddressRange, Cookie, Event, Notifier, WatcherKind};

const THREADS: usize = 4;

/// Whether the cache looks at the counter before it believes what it has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Check {
    On,
    Off,
}

struct Cache<'a> {
    notifier: &'a Notifier,
    check: Check,
    entries: Mutex<Entries>,
}

#[derive(Default)]
struct Entries {
    by_address: HashMap<u64, Entry>,
    addresses: HashMap<Cookie, u64>,
    next_cookie: u64,
    /// The counter when all events had been read.
    valid_at: u64,
}

struct Entry {
    cookie: Cookie,
    /// In a library: the key that the network card gave. Here: which mapping it was.
    registration: u64,
}

impl Cache<'_> {
    /// The registration of a buffer; a new one, of what is mapped now, if there is none that is valid.
    fn get(&self, buffer: AddressRange, mapped_now: u64) -> u64 {
        let mut entries = self.entries.lock().unwrap();
        if self.check == Check::On && self.notifier.counter().load() != entries.valid_at {
            self.forget(&mut entries);
        }
        if let Some(entry) = entries.by_address.get(&buffer.start) {
            return entry.registration;
        }
        entries.next_cookie += 1;
        let cookie = Cookie(entries.next_cookie);
        self.notifier.register(buffer, cookie).unwrap();
        let entry = Entry {
            cookie,
            registration: mapped_now,
        };
        entries.by_address.insert(buffer.start, entry);
        entries.addresses.insert(cookie, buffer.start);
        mapped_now
    }

    /// Forgets what was invalidated.
    fn forget(&self, entries: &mut Entries) {
        loop {
            let before = self.notifier.counter().load();
            let events = self.notifier.try_read(64).unwrap();
            if events.is_empty() {
                // The counter moved for ranges that have been unregistered since.
                entries.valid_at = before;
                return;
            }
            for event in events {
                match event {
                    Event::Invalidated { cookie, .. } => {
                        let address = entries.addresses.remove(&cookie).unwrap();
                        let entry = entries.by_address.remove(&address).unwrap();
                        assert_eq!(entry.cookie, cookie);
                        self.notifier.unregister(cookie).unwrap();
                    }
                    Event::Last { counter } => {
                        entries.valid_at = counter;
                        return;
                    }
                }
            }
        }
    }
}

/// Maps a buffer, registers it, uses it some times, frees it, and maps another one at the same address, over and over. How
/// often the cache gave the registration of a buffer that was gone.
fn stale_hits(notifier: &Notifier, check: Check, times: u64) -> u64 {
    let cache = Cache {
        notifier,
        check,
        entries: Mutex::default(),
    };
    let seed = Random::seeded().next();
    let (cache, seed) = (&cache, seed);
    let stale = move |thread: usize| {
        let mut random = Random::new(seed ^ thread as u64);
        let memory = Memory::new(4);
        let mut stale = 0;
        for mapping in 0..times {
            for _ in 0..=random.below(3) {
                stale += u64::from(cache.get(memory.range(), mapping) != mapping);
            }
            // Often only a part of it goes.
            let first = random.below(4);
            memory.unmap(memory.part(first, first + 1 + random.below(4 - first)));
            memory.map_again();
        }
        stale
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| scope.spawn(move || stale(thread)))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    })
}

fn no_hit_is_stale(test: &str, kind: WatcherKind, times: u64) {
    let Some(notifier) = open(test, kind) else { return };
    assert_eq!(stale_hits(&notifier, Check::On, times), 0, "{kind}");
}

#[test]
fn with_kvm_no_hit_is_stale() {
    no_hit_is_stale(
        "cache::with_kvm_no_hit_is_stale",
        WatcherKind::Kvm,
        rounds(20_000),
    );
}

#[test]
fn with_perf_no_hit_is_stale() {
    let test = "cache::with_perf_no_hit_is_stale";
    no_hit_is_stale(test, WatcherKind::Perf, rounds(20_000));
}

#[test]
fn with_userfaultfd_no_hit_is_stale() {
    let test = "cache::with_userfaultfd_no_hit_is_stale";
    no_hit_is_stale(test, WatcherKind::Userfaultfd, rounds(2000));
}

/// What the tests above would find.
#[test]
fn without_the_check_hits_are_stale() {
    for kind in [WatcherKind::Kvm, WatcherKind::Perf, WatcherKind::Userfaultfd] {
        let Some(notifier) = open("cache::without_the_check_hits_are_stale", kind) else {
            continue;
        };
        assert!(stale_hits(&notifier, Check::Off, 100) > 0, "{kind}");
    }
}
