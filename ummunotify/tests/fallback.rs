//! Which watcher is taken where not all are to be had.

#![allow(clippy::unwrap_used)] // a test's helpers panic as its tests do

mod common;

use std::path::Path;

use common::{Memory, open, read_all};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::{CapabilitySet, UnshareFlags, capabilities, set_capabilities, unshare_unsafe};
use ummunotify::{Choice, Cookie, Event, Notifier, OpenError, WatcherKind};

const TRACEFS: &str = "/sys/kernel/tracing";

/// Takes capabilities away from this thread, and lets it find tracefs without them.
fn give_up(given_up: CapabilitySet) -> rustix::io::Result<()> {
    // SAFETY: other threads' files are not touched.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    if !Path::new(TRACEFS).join("events").exists() {
        mount("tracefs", TRACEFS, "tracefs", MountFlags::empty(), None)?;
    }
    let mut sets = capabilities(None)?;
    sets.effective -= given_up;
    sets.permitted -= given_up;
    set_capabilities(None, sets)
}

/// In a thread of its own, which may not do all that this one may.
fn without(test: &str, given_up: CapabilitySet, act: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        scope.spawn(|| match give_up(given_up) {
            Ok(()) => act(),
            Err(error) => println!("skipped: {test}: only who may do all can give it up: {error}"),
        });
    });
}

const BPF: CapabilitySet = CapabilitySet::BPF.union(CapabilitySet::SYS_ADMIN);

#[test]
fn where_bpf_is_not_permitted_perf_is_next() {
    let test = "fallback::where_bpf_is_not_permitted_perf_is_next";
    if open(test, WatcherKind::Kvm).is_none() || open(test, WatcherKind::Perf).is_none() {
        return;
    }
    without(test, BPF, || {
        // On Debian's Linux 6.1 this was refused without CAP_SYS_ADMIN.
        if open(test, WatcherKind::Perf).is_none() {
            return;
        }
        let notifier = Notifier::open(Choice::Auto).unwrap();
        assert_eq!(notifier.watcher(), WatcherKind::Perf);
        let memory = Memory::new(2);
        notifier.register(memory.range(), Cookie(1)).unwrap();
        memory.unmap(memory.part(0, 1));
        assert_eq!(notifier.counter().load(), 1);
        // Who needs the page gets one that is right by itself.
        let notifier = Notifier::open(Choice::AutoWithPage).unwrap();
        assert_eq!(notifier.watcher(), WatcherKind::Userfaultfd);
        let refused = Notifier::open(Choice::Only(WatcherKind::Kvm)).unwrap_err();
        let cause = std::error::Error::source(&refused).unwrap().to_string();
        assert!(cause.contains("no permission to use BPF"), "{cause}");
    });
}

#[test]
fn where_perf_is_not_permitted_either_userfaultfd_is_next() {
    let test = "fallback::where_perf_is_not_permitted_either_userfaultfd_is_next";
    if open(test, WatcherKind::Perf).is_none() || open(test, WatcherKind::Userfaultfd).is_none() {
        return;
    }
    without(test, BPF | CapabilitySet::PERFMON, || {
        let notifier = Notifier::open(Choice::Auto).unwrap();
        assert_eq!(notifier.watcher(), WatcherKind::Userfaultfd);
        let refused = Notifier::open(Choice::Only(WatcherKind::Perf)).unwrap_err();
        assert!(matches!(refused, OpenError::Perf(_)), "{refused}");
    });
}

#[test]
fn with_perf_the_counter_has_no_page() {
    let Some(notifier) = open("fallback::with_perf_the_counter_has_no_page", WatcherKind::Perf) else {
        return;
    };
    assert!(notifier.counter().page().is_none());
}

/// The rings are not the child's.
#[test]
fn in_a_forked_process_perfs_counter_stands_still() {
    let test = "fallback::in_a_forked_process_perfs_counter_stands_still";
    let Some(notifier) = open(test, WatcherKind::Perf) else {
        return;
    };
    let memory = Memory::new(2);
    notifier.register(memory.range(), Cookie(1)).unwrap();
    memory.unmap(memory.part(0, 1));
    let before = notifier.counter().load();
    // SAFETY: the child uses nothing that other threads may have locked but the allocator, which is made for that.
    let child = unsafe { libc::fork() };
    if child == 0 {
        memory.unmap(memory.part(1, 2));
        let right = notifier.counter().load() == before && notifier.try_read(1).is_err();
        drop(notifier);
        // SAFETY: ends the process.
        unsafe { libc::_exit(i32::from(!right)) };
    }
    let mut status = 0;
    // SAFETY: waits for a child of this process.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0);
    // The fork's write protection, and then the parent's own.
    let forked = notifier.counter().load();
    memory.unmap(memory.part(1, 2));
    assert!(notifier.counter().load() > forked);
}

/// Who has the counter may outlive the notifier.
#[test]
fn after_perfs_notifier_the_counter_stands_still() {
    let test = "fallback::after_perfs_notifier_the_counter_stands_still";
    let Some(notifier) = open(test, WatcherKind::Perf) else {
        return;
    };
    let memory = Memory::new(2);
    notifier.register(memory.range(), Cookie(1)).unwrap();
    let counter = notifier.counter().clone();
    memory.unmap(memory.part(0, 1));
    assert_eq!(counter.load(), 1);
    drop(notifier);
    memory.unmap(memory.part(1, 2));
    assert_eq!(counter.load(), 1);
}

/// Whether anybody waits or not, and whoever looked first, there is one event and one movement of the counter.
#[test]
fn who_waits_for_perf_is_woken() {
    let test = "fallback::who_waits_for_perf_is_woken";
    let Some(notifier) = open(test, WatcherKind::Perf) else {
        return;
    };
    for round in 0..1000 {
        let memory = Memory::new(2);
        notifier.register(memory.range(), Cookie(1)).unwrap();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let descriptor = notifier.descriptor().unwrap();
                poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], None).unwrap();
                read_all(&notifier)
            });
            memory.unmap(memory.part(0, 1));
            let part = memory.part(0, 1);
            let expected = Event::Invalidated {
                cookie: Cookie(1),
                part,
                exact: true,
            };
            assert_eq!(notifier.counter().load(), round + 1);
            assert_eq!(reader.join().unwrap(), (vec![expected], Some(round + 1)));
        });
        notifier.unregister(Cookie(1)).unwrap();
    }
}
