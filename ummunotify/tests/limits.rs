//! Ranges that make no sense, and a program that registers without end.

#![allow(clippy::unwrap_used)] // a test's helpers panic as its tests do

mod common;

use std::sync::{Mutex, MutexGuard, PoisonError};

use common::{Memory, PAGE, open, read_all};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use ummunotify::{AddressRange, Cookie, Notifier, RegisterError, WatcherKind};

const ALL: [WatcherKind; 3] = [WatcherKind::Kvm, WatcherKind::Perf, WatcherKind::Userfaultfd];

/// One test at a time: one of them uses up what others need.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// That the notifier works as if nothing had been tried.
fn works(notifier: &Notifier) {
    let memory = Memory::new(2);
    let cookie = Cookie(u64::MAX);
    notifier.register(memory.range(), cookie).unwrap();
    read_all(notifier);
    let before = notifier.counter().load();
    memory.unmap(memory.part(0, 1));
    assert_eq!(notifier.counter().load(), before + 1);
    assert_eq!(read_all(notifier).0.len(), 1);
    notifier.unregister(cookie).unwrap();
}

#[test]
fn ranges_at_the_edges_of_all_addresses_do_no_harm() {
    let _alone = alone();
    let test = "limits::ranges_at_the_edges_of_all_addresses_do_no_harm";
    for notifier in ALL.into_iter().filter_map(|kind| open(test, kind)) {
        let wraps = [(u64::MAX, 0), (5, 4), (1 << 63, (1 << 63) - 1)];
        for (start, end) in wraps {
            let refused = notifier
                .register(AddressRange::new(start, end), Cookie(7))
                .unwrap_err();
            assert!(matches!(refused, RegisterError::EndsBeforeItStarts), "{refused}");
            assert_eq!(refused.errno(), libc::EINVAL);
        }
        let odd = [
            (0, 0),
            (u64::MAX, u64::MAX),
            (5, 5),
            (0, u64::MAX),
            (0, 1),
            (u64::MAX - 1, u64::MAX),
            (u64::MAX - PAGE, u64::MAX),
            (i64::MAX as u64, 1 << 63),
            ((1 << 47) - PAGE, (1 << 47) + PAGE),
        ];
        for (start, end) in odd {
            let watcher = notifier.watcher();
            match notifier.register(AddressRange::new(start, end), Cookie(7)) {
                Ok(()) => {
                    read_all(&notifier);
                    notifier.unregister(Cookie(7)).unwrap();
                }
                // Who watches mappings can watch none there.
                Err(RegisterError::Watch(error)) if watcher == WatcherKind::Userfaultfd => {
                    let errno = error.raw_os_error();
                    let known = [libc::EINVAL, libc::ENOMEM];
                    assert!(errno.is_some_and(|errno| known.contains(&errno)), "{error}");
                    notifier.unregister(Cookie(7)).unwrap_err();
                }
                Err(error) => panic!("{watcher}: {start:#x}-{end:#x}: {error}"),
            }
            works(&notifier);
        }
        // Everything that happens is an event of all addresses, but nothing is registered any more.
        assert_eq!(read_all(&notifier).0, []);
    }
}

/// A userfaultfd's ranges are mappings, of which the kernel allows so many.
#[test]
fn who_registers_too_many_mappings_is_told_so() {
    let _alone = alone();
    let test = "limits::who_registers_too_many_mappings_is_told_so";
    let Some(notifier) = open(test, WatcherKind::Userfaultfd) else {
        return;
    };
    let most: u64 = std::fs::read_to_string("/proc/sys/vm/max_map_count")
        .ok()
        .and_then(|most| most.trim().parse().ok())
        .unwrap();
    // Every second page, so that each is a mapping and so is what is between.
    let length = (most * PAGE) as usize;
    // SAFETY: at an address that the kernel chooses.
    let start = unsafe {
        mmap_anonymous(
            std::ptr::null_mut(),
            length,
            ProtFlags::READ,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }
    .unwrap() as u64;
    let page = |number: u64| {
        let at = start + 2 * number * PAGE;
        AddressRange::new(at, at + PAGE)
    };
    // Memory for what is registered is there before no more can be mapped.
    let first = most / 2 - most / 8;
    for number in 0..most / 2 {
        match notifier.register(page(number), Cookie(number)) {
            Ok(()) => {}
            Err(RegisterError::Watch(error)) => {
                assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
                assert!(number > first, "{number}");
                // As if it had not been tried; and what is given back can be had again.
                notifier.unregister(Cookie(number)).unwrap_err();
                notifier.unregister(Cookie(0)).unwrap();
                notifier.register(page(0), Cookie(number)).unwrap();
                break;
            }
            Err(error) => panic!("{error}"),
        }
    }
    // SAFETY: nobody has a reference to it.
    unsafe { munmap(start as *mut _, length) }.unwrap();
    let (events, _) = read_all(&notifier);
    assert!(events.len() as u64 > first, "{}", events.len());
    works(&notifier);
}
