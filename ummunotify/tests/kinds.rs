//! Each kind of invalidation against each watcher: the counter has moved when the call returns, and the event names at least
//! the part; or the watcher is known not to see it. The table of `docs/ummunotify.md` is this one.

#![allow(clippy::unwrap_used)] // a test's helpers panic as its tests do

mod common;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::null_mut;
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::{Memory, PAGE, open, read_all};
use rustix::mm::{
    Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags, madvise, mmap, mprotect, mremap, mremap_fixed,
    munmap,
};
use ummunotify::{AddressRange, Cookie, Event, Notifier, RegisterError, WatcherKind};

/// One test at a time: a fork invalidates the memory of all of them.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a watcher sees something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sees {
    Yes,
    No,
}

/// Registers `watched`, does something that invalidates `part` of it, and looks.
fn check(
    notifier: &Notifier,
    what: &str,
    watched: AddressRange,
    part: AddressRange,
    expected: Sees,
    act: impl FnOnce(),
) {
    let cookie = Cookie(7);
    let watcher = notifier.watcher();
    match notifier.register(watched, cookie) {
        // Before 6.7, of files.
        Err(RegisterError::Watch(error)) if expected == Sees::No => {
            return println!("{watcher} {what}: cannot be watched: {error}");
        }
        result => result.unwrap(),
    }
    read_all(notifier);
    let before = notifier.counter().load();
    act();
    let after = notifier.counter().load();
    let (events, last) = read_all(notifier);
    notifier.unregister(cookie).unwrap();
    match expected {
        Sees::Yes => {
            assert!(after > before, "{watcher} {what}: the counter has not moved");
            assert!(
                last.is_some_and(|last| last >= after),
                "{watcher} {what}: {last:?}"
            );
            let [
                Event::Invalidated {
                    cookie: Cookie(7),
                    part: told,
                    ..
                },
            ] = events[..]
            else {
                panic!("{watcher} {what}: {events:?}");
            };
            assert!(
                told.start <= part.start && part.end <= told.end,
                "{watcher} {what}: {told:?}"
            );
        }
        Sees::No => assert!(
            after == before && events.is_empty(),
            "{watcher} {what}: it does see that now: {events:?}"
        ),
    }
}

fn advise(part: AddressRange, advice: Advice) {
    // SAFETY: memory of the test, to which nobody has a reference.
    unsafe { madvise(part.start as *mut _, (part.end - part.start) as usize, advice) }.unwrap();
}

/// What every watcher sees: addresses that lose their pages.
fn addresses_that_lose_their_pages(notifier: &Notifier) {
    let four = || Memory::new(4);
    let see = |what: &str, memory: &Memory, part: AddressRange, act: &dyn Fn()| {
        check(notifier, what, memory.range(), part, Sees::Yes, act);
    };

    let memory = four();
    let middle = memory.part(1, 3);
    see("munmap", &memory, middle, &|| memory.unmap(middle));

    let memory = four();
    see("mmap over it", &memory, memory.range(), &|| memory.map_again());

    let memory = four();
    let middle = memory.part(1, 3);
    see("MADV_DONTNEED", &memory, middle, &|| {
        advise(middle, Advice::LinuxDontNeed);
    });

    let memory = four();
    see("MADV_FREE", &memory, memory.range(), &|| {
        advise(memory.range(), Advice::LinuxFree);
    });

    let memory = four();
    see("mremap, where it was", &memory, memory.range(), &|| {
        let length = 4 * PAGE as usize;
        // SAFETY: memory of the test; where it is afterwards is unmapped at once, before something is put where it was.
        unsafe {
            let there = Memory::new(8);
            let moved = mremap_fixed(
                memory.start as *mut _,
                length,
                length,
                MremapFlags::MAYMOVE,
                there.start as *mut _,
            );
            assert_eq!(moved.unwrap() as u64, there.start);
        }
        memory.map_again();
    });

    let memory = four();
    see("mremap, where it goes", &memory, memory.range(), &|| {
        let from = std::mem::ManuallyDrop::new(Memory::new(4));
        let length = 4 * PAGE as usize;
        // SAFETY: memory of the test, which is not used where it was.
        unsafe {
            let to = memory.start as *mut _;
            mremap_fixed(from.start as *mut _, length, length, MremapFlags::MAYMOVE, to)
        }
        .unwrap();
    });

    let memory = four();
    see("mremap that shrinks", &memory, memory.part(1, 4), &|| {
        // SAFETY: memory of the test.
        unsafe {
            mremap(
                memory.start as *mut _,
                4 * PAGE as usize,
                PAGE as usize,
                MremapFlags::empty(),
            )
        }
        .unwrap();
    });
}

/// A shared mapping of a file of that many pages, and the file.
fn map_file(file: &impl AsFd, pages: u64, flags: MapFlags) -> u64 {
    let length = (pages * PAGE) as usize;
    // SAFETY: at an address that the kernel chooses.
    let start = unsafe {
        mmap(
            null_mut(),
            length,
            ProtFlags::READ | ProtFlags::WRITE,
            flags,
            file,
            0,
        )
    }
    .unwrap();
    for page in 0..pages as usize {
        // SAFETY: just mapped, and as long.
        unsafe { start.cast::<u8>().add(page * PAGE as usize).read_volatile() };
    }
    start as u64
}

fn unmap(start: u64, pages: u64) {
    // SAFETY: memory of the test, to which nobody has a reference.
    unsafe { munmap(start as *mut _, (pages * PAGE) as usize) }.unwrap();
}

fn shared_memory(notifier: &Notifier, from_outside: Sees) {
    let memfd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memfd, 4 * PAGE).unwrap();
    let start = map_file(&memfd, 4, MapFlags::SHARED);
    let (all, middle) = (
        AddressRange::new(start, start + 4 * PAGE),
        AddressRange::new(start + PAGE, start + 2 * PAGE),
    );
    check(notifier, "MADV_REMOVE", all, middle, Sees::Yes, || {
        advise(middle, Advice::LinuxRemove);
    });
    check(notifier, "a hole in the file", all, all, from_outside, || {
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&memfd, flags, 0, 4 * PAGE).unwrap();
    });
    unmap(start, 4);
}

/// What is done to pages while the addresses stay as they are.
fn pages_that_change(notifier: &Notifier, expected: Sees) {
    let memory = Memory::new(4);
    let middle = memory.part(1, 3);
    check(notifier, "mprotect", memory.range(), middle, expected, || {
        // SAFETY: memory of the test, which is not written.
        unsafe { mprotect(middle.start as *mut _, 2 * PAGE as usize, MprotectFlags::READ) }.unwrap();
    });

    let file = file_on_disk(16);
    let start = map_file(&file, 16, MapFlags::PRIVATE);
    let all = AddressRange::new(start, start + 16 * PAGE);
    check(
        notifier,
        "MADV_PAGEOUT",
        all,
        AddressRange::new(start, start),
        expected,
        || {
            advise(all, Advice::LinuxPageOut);
        },
    );
    unmap(start, 16);

    let Some(memory) = huge_page() else {
        println!("no huge page to be had: a split is not tried");
        return;
    };
    let at = memory.start.next_multiple_of(512 * PAGE);
    let (first, last) = (
        AddressRange::new(at, at + PAGE),
        AddressRange::new(at + 300 * PAGE, at + 301 * PAGE),
    );
    // Not what is invalidated itself, but mapped by the same entry.
    check(
        notifier,
        "a huge page that is split",
        last,
        last,
        expected,
        || {
            advise(first, Advice::LinuxDontNeed);
        },
    );
}

/// A file whose pages the kernel can drop, since they are on a disk. Beside the test's program, which is on one.
fn file_on_disk(pages: u64) -> File {
    let directory = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let path = directory.join(format!("ummunotify-{}", std::process::id()));
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    std::fs::remove_file(&path).unwrap();
    file.write_all(&vec![1; (pages * PAGE) as usize]).unwrap();
    file.sync_all().unwrap();
    file
}

/// Memory with a huge page in it.
fn huge_page() -> Option<Memory> {
    let memory = Memory::new(1024);
    let at = memory.start.next_multiple_of(512 * PAGE);
    advise(AddressRange::new(at, at + 512 * PAGE), Advice::LinuxHugepage);
    // MADV_COLLAPSE; Linux 6.1.
    // SAFETY: changes nothing of what is in memory.
    let result = unsafe { libc::madvise(at as *mut _, 512 * PAGE as usize, 25) };
    (result == 0).then_some(memory)
}

/// What a fork does to private memory: from then on a write copies.
fn fork(notifier: &Notifier, expected: Sees) {
    let memory = Memory::new(4);
    check(notifier, "fork", memory.range(), memory.range(), expected, || {
        // SAFETY: the child does nothing but end, and ends without the parent's clean-up.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child == 0 {
            // SAFETY: as above.
            unsafe { libc::_exit(0) };
        }
        // SAFETY: waits for a child of this process.
        assert_eq!(unsafe { libc::waitpid(child, null_mut(), 0) }, child);
    });
}

#[test]
fn kvm_sees_everything() {
    let _alone = alone();
    let Some(notifier) = open("kinds::kvm_sees_everything", WatcherKind::Kvm) else {
        return;
    };
    addresses_that_lose_their_pages(&notifier);
    shared_memory(&notifier, Sees::Yes);
    pages_that_change(&notifier, Sees::Yes);
    fork(&notifier, Sees::Yes);
}

#[test]
fn perf_sees_everything() {
    let _alone = alone();
    let Some(notifier) = open("kinds::perf_sees_everything", WatcherKind::Perf) else {
        return;
    };
    addresses_that_lose_their_pages(&notifier);
    shared_memory(&notifier, Sees::Yes);
    pages_that_change(&notifier, Sees::Yes);
    fork(&notifier, Sees::Yes);
}

#[test]
fn userfaultfd_sees_what_addresses_lose() {
    let _alone = alone();
    let Some(notifier) = open(
        "kinds::userfaultfd_sees_what_addresses_lose",
        WatcherKind::Userfaultfd,
    ) else {
        return;
    };
    addresses_that_lose_their_pages(&notifier);
    shared_memory(&notifier, Sees::No);
    pages_that_change(&notifier, Sees::No);
    let privileged = rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(rustix::thread::CapabilitySet::SYS_PTRACE));
    fork(&notifier, if privileged { Sees::Yes } else { Sees::No });
}

/// A process that ends takes its memory with it, but its MMU notifiers go first: who has its counter does not hear of it.
#[test]
fn the_end_of_a_process() {
    let _alone = alone();
    let test = "kinds::the_end_of_a_process";
    if open(test, WatcherKind::Kvm).is_none() {
        return;
    }
    let (ours, theirs) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    // SAFETY: the child uses nothing that other threads may have locked but the allocator, which is made for that.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let notifier = open(test, WatcherKind::Kvm).unwrap();
        let memory = std::mem::ManuallyDrop::new(Memory::new(4));
        notifier.register(memory.range(), Cookie(1)).unwrap();
        send(&theirs, notifier.counter().page().unwrap().file());
        // SAFETY: ends the process.
        unsafe { libc::_exit(0) };
    }
    drop(theirs);
    let counter = receive(&ours);
    // SAFETY: waits for a child of this process.
    assert_eq!(unsafe { libc::waitpid(child, null_mut(), 0) }, child);
    // SAFETY: at an address that the kernel chooses.
    let page = unsafe {
        mmap(
            null_mut(),
            PAGE as usize,
            ProtFlags::READ,
            MapFlags::SHARED,
            &counter,
            0,
        )
    }
    .unwrap();
    // SAFETY: just mapped.
    let count = unsafe { page.cast::<u64>().read_volatile() };
    unmap(page as u64, 1);
    assert_eq!(count, 0, "the end of a process is seen now");
}

fn send(socket: &OwnedFd, fd: impl AsFd) {
    let fds = [fd.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds)));
    let data = [std::io::IoSlice::new(b"c")];
    rustix::net::sendmsg(socket, &data, &mut control, rustix::net::SendFlags::empty()).unwrap();
}

fn receive(socket: &OwnedFd) -> OwnedFd {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = rustix::net::RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut data = [std::io::IoSliceMut::new(&mut byte)];
    rustix::net::recvmsg(
        socket,
        &mut data,
        &mut control,
        rustix::net::RecvFlags::CMSG_CLOEXEC,
    )
    .unwrap();
    let mut messages = control.drain();
    let Some(rustix::net::RecvAncillaryMessage::ScmRights(mut fds)) = messages.next() else {
        panic!("no descriptor came");
    };
    fds.next().unwrap()
}
