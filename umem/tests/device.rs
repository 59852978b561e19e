//! A device with both halves in this process: what is served, when, and to whom.

#![allow(clippy::unwrap_used)] // a test's helpers panic as its tests do

mod common;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use common::{rounds, shuffled};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{FallocateFlags, OFlags};
use umem::device::{Client, Device, DeviceError, DeviceOptions, Mapping, PageBuffer, Place, Server, Serving};
use umem::units::{PAGE_SIZE, PageIndex};

const BOTH: [Serving; 2] = [Serving::Copied, Serving::InPlace];

/// Longer than anything here takes.
const LONG: Duration = Duration::from_mins(1);

fn create(pages: u64, serving: Serving) -> (Server, Client) {
    let options = DeviceOptions {
        size: pages * PAGE_SIZE as u64,
        max_requests: 1,
        serving,
    };
    let (server, client) = Device::create(options).unwrap().into_halves();
    (server.unwrap(), client.unwrap())
}

fn map(client: &Client) -> Mapping {
    client.map(client.everything()).unwrap()
}

/// What page `page` is served with in round `round`.
fn content(page: u64, round: u64) -> [u8; PAGE_SIZE] {
    let mut bytes = [0; PAGE_SIZE];
    for (at, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *word = (page << 32 | round << 16 | at as u64).to_ne_bytes();
    }
    bytes
}

fn serve(server: &Server, page: u64) {
    server.fill(PageIndex(page), &content(page, 0)).unwrap();
    assert_eq!(server.write(&[PageIndex(page)]).unwrap(), 1);
}

fn page_of(mapping: &Mapping, page: u64) -> [u8; PAGE_SIZE] {
    // SAFETY: within the mapping.
    unsafe {
        mapping
            .start()
            .add(page as usize * PAGE_SIZE)
            .cast::<[u8; PAGE_SIZE]>()
            .read_volatile()
    }
}

fn assert_served(mapping: &Mapping, page: u64) {
    let found = page_of(mapping, page);
    assert!(
        found == content(page, 0),
        "page {page}: {:x?} at {:?}",
        &found[..16],
        mapping.start()
    );
}

fn readable(server: &Server) -> bool {
    let mut ready = [PollFd::new(server, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    rustix::event::poll(&mut ready, Some(&now)).unwrap();
    ready[0].revents().contains(PollFlags::IN)
}

fn wait_until_readable(server: &Server) {
    let mut ready = [PollFd::new(server, PollFlags::IN)];
    let long = Timespec {
        tv_sec: LONG.as_secs() as i64,
        tv_nsec: 0,
    };
    assert_eq!(rustix::event::poll(&mut ready, Some(&long)).unwrap(), 1);
}

/// Waits for what cannot be waited for otherwise.
fn wait_until(what: &str, mut happened: impl FnMut() -> bool) {
    let since = Instant::now();
    while !happened() {
        assert!(since.elapsed() < LONG, "{what}");
        thread::yield_now();
    }
}

/// Every page is there; the write that brought the last one may not have returned yet.
fn make_anonymous(server: &Server) {
    wait_until("it is ordinary memory", || match server.make_anonymous() {
        Err(DeviceError::Incomplete) => false,
        made => made.map(|()| true).unwrap(),
    });
}

fn set_nonblocking(server: &Server) {
    rustix::fs::fcntl_setfl(server, OFlags::NONBLOCK).unwrap();
}

/// Serves every request until there is no client any more. Answers what was asked for, in order.
fn serve_all(server: &Server) -> Vec<u64> {
    let mut asked = Vec::new();
    let mut pages = [PageIndex(0); 64];
    loop {
        let count = server.read(&mut pages).unwrap();
        if count == 0 {
            return asked;
        }
        for page in &pages[..count] {
            server.fill(*page, &content(page.0, 0)).unwrap();
        }
        assert_eq!(server.write(&pages[..count]).unwrap(), count);
        asked.extend(pages[..count].iter().map(|page| page.0));
    }
}

#[test]
fn pages_come_as_they_are_touched_and_each_is_asked_for_once() {
    const PAGES: u64 = 300;
    for serving in BOTH {
        let (server, client) = create(PAGES, serving);
        let server = thread::spawn(move || serve_all(&server));
        let mapping = map(&client);
        drop(client);
        let order: Vec<u64> = (0..PAGES).map(|at| at * 7 % PAGES).collect();
        for page in order.iter().chain(&order) {
            assert_served(&mapping, *page);
        }
        // Unmapping is the end of the client.
        drop(mapping);
        assert_eq!(server.join().unwrap(), order, "{serving:?}");
    }
}

#[test]
fn what_is_served_before_it_is_touched_or_mapped_is_there() {
    for serving in BOTH {
        let (server, client) = create(200, serving);
        set_nonblocking(&server);
        (0..100).for_each(|page| serve(&server, page));
        let mapping = map(&client);
        (100..199).rev().for_each(|page| serve(&server, page));
        // Never written to: it reads zero.
        server.write(&[PageIndex(199)]).unwrap();
        (0..199).for_each(|page| assert_served(&mapping, page));
        assert!(page_of(&mapping, 199) == [0; PAGE_SIZE]);
        assert!(!readable(&server));
        assert!(matches!(
            server.read(&mut [PageIndex(0)]),
            Err(DeviceError::WouldBlock)
        ));
    }
}

#[test]
fn a_page_that_was_served_is_the_clients_own() {
    let (server, client) = create(3, Serving::Copied);
    let drop_page = |page: u64| {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(
            server.window_file(),
            flags,
            page * PAGE_SIZE as u64,
            PAGE_SIZE as u64,
        )
        .unwrap();
    };
    serve(&server, 0);
    serve(&server, 1);
    // Before there is a mapping, and served once more.
    drop_page(0);
    server.fill(PageIndex(1), &content(9, 9)).unwrap();
    server.write(&[PageIndex(0), PageIndex(1)]).unwrap();
    let mapping = map(&client);
    serve(&server, 2);
    drop_page(2);
    for page in 0..3 {
        assert_served(&mapping, page);
    }
    server.fill(PageIndex(2), &content(9, 9)).unwrap();
    server.write(&[PageIndex(2)]).unwrap();
    assert_served(&mapping, 2);
    // And the other way.
    // SAFETY: within the mapping.
    unsafe { mapping.start().add(PAGE_SIZE).write_volatile(0xee) };
    let window = server.window().unwrap();
    // SAFETY: within the window.
    assert_ne!(unsafe { window.add(PAGE_SIZE).read_volatile() }, 0xee);
}

#[test]
fn content_need_not_go_through_the_window() {
    for serving in BOTH {
        let (server, client) = create(6, serving);
        let bytes: Vec<u8> = (0..6).flat_map(|page| content(page, 0)).collect();
        server.write_from(PageIndex(0), &bytes[..2 * PAGE_SIZE]).unwrap();
        let mapping = map(&client);
        server.write_from(PageIndex(1), &bytes[PAGE_SIZE..]).unwrap();
        (0..6).for_each(|page| assert_served(&mapping, page));
        for (first, length) in [(5, 2), (u64::MAX, 2), (0, 0)] {
            let refused = server.write_from(PageIndex(first), &bytes[..length * PAGE_SIZE]);
            assert_eq!(refused.unwrap_err().errno(), libc::EINVAL);
        }
    }
}

#[test]
fn in_place_nothing_is_copied() {
    let (server, client) = create(2, Serving::InPlace);
    let mapping = map(&client);
    serve(&server, 0);
    assert_served(&mapping, 0);
    // SAFETY: within the mapping.
    unsafe { mapping.start().write_volatile(0xee) };
    let window = server.window().unwrap();
    // SAFETY: within the window.
    assert_eq!(unsafe { window.read_volatile() }, 0xee);
}

#[test]
fn a_page_that_is_only_half_written_is_not_shown() {
    // In place it is in the file behind the memory from the first byte on.
    let (server, client) = create(1, Serving::InPlace);
    server.fill(PageIndex(0), &[7; 9]).unwrap();
    let mapping = map(&client);
    let toucher = thread::spawn(move || page_of(&mapping, 0));
    let mut page = [PageIndex(5)];
    assert_eq!(server.read(&mut page).unwrap(), 1);
    serve(&server, 0);
    assert!(toucher.join().unwrap() == content(0, 0));
}

#[test]
fn pages_that_are_given_away_are_moved() {
    let (server, client) = create(600, Serving::Copied);
    let mut buffer = PageBuffer::new(100).unwrap();
    let fill = |buffer: &mut PageBuffer, first: u64| {
        for (page, bytes) in (first..).zip(buffer.chunks_mut(PAGE_SIZE)) {
            bytes.copy_from_slice(&content(page, 0));
        }
    };
    // Before there is somewhere to move them.
    fill(&mut buffer, 0);
    server.donate(PageIndex(0), &mut buffer).unwrap();
    let mapping = map(&client);
    for first in (100..600).step_by(100) {
        fill(&mut buffer, first);
        // One of them is there already.
        serve(&server, first + 50);
        server.donate(PageIndex(first), &mut buffer).unwrap();
    }
    (0..600).for_each(|page| assert_served(&mapping, page));
    let beyond = server.donate(PageIndex(501), &mut buffer);
    assert!(matches!(beyond, Err(DeviceError::BeyondEnd { .. })));
}

#[test]
fn poll_says_when_there_is_something_and_only_then() {
    let (server, client) = create(64, Serving::Copied);
    let mapping = Arc::new(map(&client));
    assert!(!readable(&server));
    let touch = |page| {
        let mapping = Arc::clone(&mapping);
        thread::spawn(move || assert_served(&mapping, page))
    };
    let mut pages = [PageIndex(0); 64];
    for round in 0..20 {
        let toucher = touch(round);
        wait_until_readable(&server);
        assert!(readable(&server));
        assert_eq!(server.read(&mut pages).unwrap(), 1);
        // Asked for, read, not served: nothing more is to be read.
        assert!(!readable(&server));
        // Others want it too.
        let more: Vec<_> = (0..3).map(|_| touch(round)).collect();
        serve(&server, pages[0].0);
        toucher.join().unwrap();
        for toucher in more {
            toucher.join().unwrap();
        }
        assert!(!readable(&server));
    }
}

#[test]
fn requests_beyond_the_limit_wait_and_none_is_lost() {
    const THREADS: u64 = 700;
    // A request takes 8 bytes of a page of the pipe, so that there is room for 512.
    let (server, client) = create(THREADS, Serving::Copied);
    let mapping = Arc::new(map(&client));
    let left = Arc::new(AtomicU64::new(THREADS));
    let touchers: Vec<_> = (0..THREADS)
        .map(|page| {
            let (mapping, left) = (Arc::clone(&mapping), Arc::clone(&left));
            let touch = move || {
                assert_served(&mapping, page);
                left.fetch_sub(1, SeqCst);
            };
            thread::Builder::new().stack_size(64 << 10).spawn(touch).unwrap()
        })
        .collect();
    let waiting = || rustix::io::ioctl_fionread(server.as_fd()).unwrap() / 8;
    wait_until("the pipe is full", || waiting() == 512);
    let mut pages = [PageIndex(0); 100];
    while left.load(SeqCst) > 0 {
        let count = server.read(&mut pages).unwrap();
        pages[..count].iter().for_each(|page| serve(&server, page.0));
        // What was given up is asked for again.
        wait_until("the next request", || left.load(SeqCst) == 0 || waiting() > 0);
    }
    for toucher in touchers {
        toucher.join().unwrap();
    }
}

#[test]
fn sixty_four_threads_of_the_client_and_four_that_serve() {
    const PAGES: u64 = 4096;
    for serving in BOTH {
        let (server, client) = create(PAGES, serving);
        let server = Arc::new(server);
        let servers: Vec<_> = (0..4)
            .map(|_| {
                let server = Arc::clone(&server);
                thread::spawn(move || serve_all(&server).len() as u64)
            })
            .collect();
        let mapping = map(&client);
        drop(client);
        thread::scope(|scope| {
            for number in 0..64 {
                let mapping = &mapping;
                scope.spawn(move || {
                    for at in 0..PAGES {
                        assert_served(mapping, (at * 31 + number * 64) % PAGES);
                    }
                });
            }
        });
        make_anonymous(&server);
        assert!(mapping.is_ordinary());
        let asked: u64 = servers.into_iter().map(|server| server.join().unwrap()).sum();
        assert_eq!(asked, PAGES, "{serving:?}");
    }
}

#[test]
fn answers_that_nobody_asked_for_come_late_or_twice_do_no_harm() {
    let (server, client) = create(8, Serving::Copied);
    let mapping = Arc::new(map(&client));
    let touch = |page| {
        let mapping = Arc::clone(&mapping);
        thread::spawn(move || assert_served(&mapping, page))
    };
    let touchers: Vec<_> = [5, 2, 7].into_iter().map(touch).collect();
    let mut pages = [PageIndex(0); 8];
    let mut asked = Vec::new();
    while asked.len() < 3 {
        let count = server.read(&mut pages).unwrap();
        asked.extend_from_slice(&pages[..count]);
    }
    // Never asked for, repeated, out of order; those asked for last.
    for page in [6, 1, 0, 3, 4] {
        serve(&server, page);
    }
    let mut all = vec![PageIndex(1), PageIndex(1), PageIndex(6)];
    for page in &asked {
        server.fill(*page, &content(page.0, 0)).unwrap();
        all.extend([*page, *page]);
    }
    assert_eq!(server.write(&all).unwrap(), all.len());
    assert_eq!(server.write(&all).unwrap(), all.len());
    for toucher in touchers {
        toucher.join().unwrap();
    }
    (0..8).for_each(|page| assert_served(&mapping, page));
    // One that there is not ends it, with those before it served.
    let (server, client) = create(2, Serving::Copied);
    let mapping = map(&client);
    server.fill(PageIndex(0), &content(0, 0)).unwrap();
    let beyond = server.write(&[PageIndex(0), PageIndex(2), PageIndex(1)]);
    assert_eq!(beyond.unwrap_err().errno(), libc::EINVAL);
    assert_served(&mapping, 0);
    assert_eq!(
        server.write(&[PageIndex(u64::MAX)]).unwrap_err().errno(),
        libc::EINVAL
    );
}

#[test]
fn it_becomes_ordinary_memory_when_every_page_is_there() {
    for serving in BOTH {
        let (server, client) = create(50, serving);
        let errno = || server.make_anonymous().unwrap_err().errno();
        (0..49).for_each(|page| serve(&server, page));
        // Not even mapped.
        assert_eq!(errno(), libc::EBUSY);
        let mapping = map(&client);
        assert_eq!(errno(), libc::EBUSY);
        serve(&server, 49);
        drop(client);
        server.make_anonymous().unwrap();
        // Once more is as well.
        server.make_anonymous().unwrap();
        assert_eq!(server.read(&mut [PageIndex(0)]).unwrap(), 0);
        drop(server);
        assert!(mapping.is_ordinary());
        (0..50).for_each(|page| assert_served(&mapping, page));
        if serving == Serving::Copied {
            // SAFETY: within the mapping, whose pages nobody uses meanwhile.
            unsafe { libc::madvise(mapping.start().cast(), PAGE_SIZE, libc::MADV_DONTNEED) };
            assert!(page_of(&mapping, 0) == [0; PAGE_SIZE]);
        }
    }
}

#[test]
fn a_part_is_mapped_and_the_rest_never_missed() {
    for serving in BOTH {
        let (server, client) = create(100, serving);
        let place = Place {
            first: PageIndex(30),
            length: 20 * PAGE_SIZE - 5,
            ..client.everything()
        };
        for (first, length) in [
            (81, 20 * PAGE_SIZE),
            (0, 101 * PAGE_SIZE),
            (101, 1),
            (u64::MAX, 1),
            (0, 0),
        ] {
            let place = Place {
                first: PageIndex(first),
                length,
                ..place
            };
            assert_eq!(client.map(place).unwrap_err().errno(), libc::EINVAL);
        }
        let mapping = client.map(place).unwrap();
        assert_eq!(mapping.length(), 20 * PAGE_SIZE);
        assert_eq!(client.map(place).unwrap_err().errno(), libc::EBUSY);
        (0..100).rev().for_each(|page| serve(&server, page));
        for page in 30..50 {
            assert!(page_of(&mapping, page - 30) == content(page, 0));
        }
        drop(client);
        server.make_anonymous().unwrap();
    }
}

#[test]
fn memory_that_is_moved_is_served_where_it_is() {
    for serving in BOTH {
        let (server, client) = create(40, serving);
        let mapping = map(&client);
        drop(client);
        (0..10).for_each(|page| serve(&server, page));
        let length = mapping.length();
        let start = mapping.into_raw();
        // SAFETY: this test's own mapping.
        let moved = unsafe {
            libc::mremap(
                start.cast(),
                length,
                length * 2,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                {
                    libc::mmap(
                        std::ptr::null_mut(),
                        length * 2,
                        libc::PROT_NONE,
                        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                        -1,
                        0,
                    )
                },
            )
        };
        assert_ne!(moved, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        let at = |page: u64| moved as usize + page as usize * PAGE_SIZE;
        // SAFETY: within what was moved.
        let read = |address: usize| unsafe { (address as *const [u8; PAGE_SIZE]).read_volatile() };
        // What is served before it is touched, and after.
        (10..25).for_each(|page| serve(&server, page));
        let server = Arc::new(server);
        let other = Arc::clone(&server);
        let thread = thread::spawn(move || serve_all(&other));
        for page in 0..40 {
            let found = read(at(page));
            assert!(
                found == content(page, 0),
                "{serving:?} page {page}: {:x?} at {:x}, was {:?}",
                &found[..16],
                at(page),
                start
            );
        }
        make_anonymous(&server);
        // SAFETY: this test's own mapping.
        unsafe { libc::munmap(moved, length * 2) };
        let asked = thread.join().unwrap();
        assert!(asked.iter().all(|page| *page >= 25), "{asked:?}");
    }
}

/// Other memory that is served comes to be where memory was that was moved. The kernel would install a page of one in the other.
#[test]
fn what_was_moved_is_not_served_where_it_was() {
    for serving in BOTH {
        // Another test's memory may come to be there first.
        let met = (0..20).any(|_| other_memory_is_left_alone(serving));
        assert!(met, "{serving:?}: the address was taken each time");
    }
}

/// False: there was no memory where memory had been moved from.
fn other_memory_is_left_alone(serving: Serving) -> bool {
    let (server, client) = create(8, serving);
    // Before, so that nothing of it comes to be there.
    let (other_server, other) = create(8, Serving::Copied);
    other_server.window().unwrap();
    let mapping = map(&client);
    let (start, length) = (mapping.start(), mapping.length());
    serve(&server, 0);
    // SAFETY: this test's own mapping, which is unmapped below.
    let moved = unsafe {
        let place = libc::mmap(
            std::ptr::null_mut(),
            length,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        libc::mremap(
            start.cast(),
            length,
            length,
            libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
            place,
        )
    };
    assert_ne!(moved, libc::MAP_FAILED);
    mapping.into_raw();
    let place = Place {
        address: start,
        flags: libc::MAP_FIXED_NOREPLACE,
        ..other.everything()
    };
    let other_mapping = other.map(place).ok();
    (0..8).for_each(|page| serve(&server, page));
    if let Some(other_mapping) = &other_mapping {
        (0..8).for_each(|page| {
            other_server.fill(PageIndex(page), &content(page, 1)).unwrap();
            assert_eq!(other_server.write(&[PageIndex(page)]).unwrap(), 1);
        });
        for page in 0..8 {
            assert!(
                page_of(other_mapping, page) == content(page, 1),
                "{serving:?} page {page}"
            );
        }
    }
    for page in 0..8 {
        let at = (moved as usize + page as usize * PAGE_SIZE) as *const [u8; PAGE_SIZE];
        // SAFETY: within what was moved.
        let found = unsafe { at.read_volatile() };
        assert!(found == content(page, 0), "{serving:?} page {page}");
    }
    // SAFETY: this test's own mapping.
    unsafe { libc::munmap(moved, length) };
    other_mapping.is_some()
}

/// A thread drops pages while two others serve all of them, at random: what was dropped reads zero, the rest its content.
#[test]
fn what_is_dropped_while_it_is_served_reads_zero() {
    const PAGES: u64 = 64;
    for seed in 0..rounds(300) {
        let (server, client) = create(PAGES, Serving::Copied);
        let mapping = map(&client);
        let begin = Barrier::new(3);
        thread::scope(|scope| {
            let (server, mapping, begin) = (&server, &mapping, &begin);
            for thread in 0..2 {
                scope.spawn(move || {
                    begin.wait();
                    shuffled(PAGES, seed * 2 + thread).for_each(|page| serve(server, page));
                });
            }
            begin.wait();
            for page in shuffled(PAGES, !seed).take(PAGES as usize / 2) {
                // SAFETY: within the mapping, whose pages nobody uses meanwhile.
                let dropped = unsafe {
                    let at = mapping.start().add(page as usize * PAGE_SIZE);
                    libc::madvise(at.cast(), PAGE_SIZE, libc::MADV_DONTNEED)
                };
                assert_eq!(dropped, 0, "seed {seed}");
            }
        });
        let dropped: Vec<u64> = shuffled(PAGES, !seed).take(PAGES as usize / 2).collect();
        for page in 0..PAGES {
            let content = if dropped.contains(&page) {
                [0; PAGE_SIZE]
            } else {
                content(page, 0)
            };
            assert!(page_of(&mapping, page) == content, "seed {seed}: page {page}");
        }
    }
}

#[test]
fn what_the_client_drops_reads_zero() {
    let (server, client) = create(4, Serving::Copied);
    let mapping = map(&client);
    serve(&server, 0);
    // SAFETY: within the mapping, whose pages nobody uses meanwhile.
    unsafe { libc::madvise(mapping.start().cast(), 2 * PAGE_SIZE, libc::MADV_DONTNEED) };
    serve(&server, 1);
    for page in 0..2 {
        let found = page_of(&mapping, page);
        assert!(
            found == [0; PAGE_SIZE],
            "page {page}: {:x?} at {:?}",
            &found[..16],
            mapping.start()
        );
    }
    serve(&server, 2);
    serve(&server, 3);
    drop(client);
    server.make_anonymous().unwrap();
    assert_served(&mapping, 3);
}

#[test]
fn halves_go_through_sockets() {
    let (server, client) = create(3, Serving::Copied);
    let (here, there) = UnixStream::pair().unwrap();
    server.send(&here).unwrap();
    client.send(&here).unwrap();
    drop((server, client));
    // Which is which is said.
    assert!(matches!(Client::receive(&there), Err(DeviceError::NotADevice(_))));
    let client = Client::receive(&there).unwrap();
    assert_eq!(client.size(), 3 * PAGE_SIZE as u64);
    // The one server half that there was is gone, with the message it was in.
    let (server, other) = create(3, Serving::InPlace);
    server.send(&here).unwrap();
    other.send(&here).unwrap();
    let server = Server::receive(&there).unwrap();
    assert!(matches!(Server::receive(&there), Err(DeviceError::NotADevice(_))));
    drop(client);
    let mapping = map(&other);
    drop(other);
    let thread = thread::spawn(move || serve_all(&server));
    (0..3).for_each(|page| assert_served(&mapping, page));
    drop(mapping);
    assert_eq!(thread.join().unwrap(), [0, 1, 2]);
    rustix::io::write(&here, b"S").unwrap();
    assert!(matches!(Server::receive(&there), Err(DeviceError::NotADevice(_))));
    drop(here);
    assert!(matches!(Server::receive(&there), Err(DeviceError::Os { .. })));
}

#[test]
fn a_device_that_cannot_be_is_refused() {
    for (size, errno) in [
        (0, libc::EINVAL),
        (u64::MAX, libc::ENOMEM),
        ((1 << 46) + 1, libc::ENOMEM),
    ] {
        let options = DeviceOptions {
            size,
            max_requests: 1,
            serving: Serving::Copied,
        };
        assert_eq!(Device::create(options).unwrap_err().errno(), errno);
    }
    let options = DeviceOptions {
        size: PAGE_SIZE as u64 + 1,
        max_requests: 1,
        serving: Serving::Copied,
    };
    let device = Device::create(options).unwrap();
    assert_eq!(device.server().unwrap().pages(), 2);
    assert_eq!(device.read(&mut []).unwrap_err().errno(), libc::EINVAL);
    assert_eq!(device.write(&[]).unwrap_err().errno(), libc::EINVAL);
}
