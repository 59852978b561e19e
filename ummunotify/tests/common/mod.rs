//! Memory to invalidate, and the watchers that this machine has.

#![allow(dead_code)]

#[path = "../../src/random.rs"]
pub(crate) mod random;

use std::sync::LazyLock;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use ummunotify::{AddressRange, Choice, Event, Notifier, WatcherKind};

pub(crate) const PAGE: u64 = 4096;

/// A notifier with this watcher, unless this machine has none; then the test is skipped, and says so.
pub(crate) fn open(test: &str, kind: WatcherKind) -> Option<Notifier> {
    match Notifier::open(Choice::Only(kind)) {
        Ok(notifier) => Some(notifier),
        Err(error) => {
            let mut text = error.to_string();
            let mut cause = std::error::Error::source(&error);
            while let Some(error) = cause {
                text = format!("{text}: {error}");
                cause = error.source();
            }
            println!("skipped: {test}: {text}");
            None
        }
    }
}

/// Anonymous memory, every page of it there; unmapped when it is dropped. It is where nothing else is ever mapped, so that
/// what a test unmaps of it stays free until it is mapped again.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) start: u64,
    pub(crate) pages: u64,
}

/// Far below what the kernel chooses, and not where another test that runs at the same time has its memory: what that one does
/// there would be noticed here.
static NEXT: LazyLock<AtomicU64> = LazyLock::new(|| {
    /// How much a test uses up at most.
    const EACH: u64 = 1 << 36;
    AtomicU64::new(0x2000_0000_0000 + (1 + u64::from(std::process::id()) % 1023) * EACH)
});

impl Memory {
    pub(crate) fn new(pages: u64) -> Self {
        let start = NEXT.fetch_add((pages + 1) * PAGE, Relaxed);
        // SAFETY: where nothing is mapped, or it fails.
        unsafe { map(start, pages, MapFlags::FIXED_NOREPLACE) };
        let memory = Self { start, pages };
        memory.fill(1);
        memory
    }

    pub(crate) fn range(&self) -> AddressRange {
        self.part(0, self.pages)
    }

    /// Pages `from` up to, and without, `to`.
    pub(crate) fn part(&self, from: u64, to: u64) -> AddressRange {
        AddressRange::new(self.start + from * PAGE, self.start + to * PAGE)
    }

    /// Writes to every page.
    pub(crate) fn fill(&self, value: u8) {
        for page in 0..self.pages {
            // SAFETY: mapped and writable, and nobody has a reference to it.
            unsafe { ((self.start + page * PAGE) as *mut u8).write_volatile(value) };
        }
    }

    /// Maps it anew where something else was unmapped.
    pub(crate) fn map_again(&self) {
        // SAFETY: at an address that is this memory's own.
        unsafe { map(self.start, self.pages, MapFlags::FIXED) };
        self.fill(2);
    }

    pub(crate) fn unmap(&self, part: AddressRange) {
        assert!(self.start <= part.start && part.end <= self.start + self.pages * PAGE);
        // SAFETY: a part of this memory, to which nobody has a reference.
        unsafe { munmap(part.start as *mut _, (part.end - part.start) as usize) }.unwrap();
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.unmap(self.range());
    }
}

/// # Safety
///
/// With [`MapFlags::FIXED`], what is at the address must be the caller's.
unsafe fn map(at: u64, pages: u64, flags: MapFlags) {
    let (length, protection) = ((pages * PAGE) as usize, ProtFlags::READ | ProtFlags::WRITE);
    // SAFETY: by this function's own condition.
    unsafe { mmap_anonymous(at as *mut _, length, protection, MapFlags::PRIVATE | flags) }.unwrap();
}

/// All events that there are; of the last one the counter.
pub(crate) fn read_all(notifier: &Notifier) -> (Vec<Event>, Option<u64>) {
    let mut events = notifier.try_read(usize::MAX).unwrap();
    let last = events.pop_if(|event| matches!(event, Event::Last { .. }));
    let counter = last.map(|last| match last {
        Event::Last { counter } => counter,
        Event::Invalidated { .. } => unreachable!(),
    });
    (events, counter)
}
