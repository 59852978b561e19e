//! Rings, without the thread that reads them in time.

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use rustix::thread::CpuSet;

use super::*;

/// Rings, and what keeps the tracepoint being hit; unless this machine has none, and then why.
fn open(test: &str) -> Option<(Vec<Events>, Vec<Ring>, Arc<OwnedFd>)> {
    let opened = vm::get().map_err(PerfError::Vm).and_then(|vm| {
        let (events, rings) = Perf::open_events()?;
        Ok((events, rings, vm))
    });
    opened
        .inspect_err(|error| {
            println!(
                "skipped: {test}: {error}: {:?}",
                std::error::Error::source(&error)
            );
        })
        .ok()
}

/// Maps a page, maps another over it so many times, and unmaps it, on the first CPU.
fn unmap_on_the_first_cpu(times: u64) -> AddressRange {
    const PAGE: usize = 4096;
    let before = rustix::thread::sched_getaffinity(None).unwrap();
    let mut first = CpuSet::new();
    first.set(0);
    rustix::thread::sched_setaffinity(None, &first).unwrap();
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: at an address that the kernel chooses.
    let start = unsafe { mmap_anonymous(std::ptr::null_mut(), PAGE, protection, MapFlags::PRIVATE) }.unwrap();
    for _ in 0..times {
        let flags = MapFlags::PRIVATE | MapFlags::FIXED;
        // SAFETY: over the page mapped before, to which nobody has a reference.
        unsafe {
            mmap_anonymous(start, PAGE, protection, flags | MapFlags::POPULATE).unwrap();
        }
    }
    // SAFETY: nobody has a reference to it.
    unsafe { munmap(start, PAGE) }.unwrap();
    rustix::thread::sched_setaffinity(None, &before).unwrap();
    let start = start as u64;
    AddressRange::new(start, start + PAGE as u64)
}

fn count(ring: &mut Ring, range: AddressRange) -> (bool, u64) {
    let mut count = 0;
    let complete = ring.drain(|taken| count += u64::from(taken.overlaps(range)));
    (complete, count)
}

#[test]
fn what_two_events_tell_is_one_invalidation() {
    let Some((events, mut rings, _vm)) = open("what_two_events_tell_is_one_invalidation") else {
        return;
    };
    for awaited in [false, true, false] {
        if awaited {
            events[0].wakes.enable().unwrap();
        } else {
            events[0].wakes.disable().unwrap();
        }
        let head = rings[0].at();
        let range = unmap_on_the_first_cpu(1000);
        // Each time that it was mapped over, and the last munmap.
        assert_eq!(count(&mut rings[0], range), (true, 1001), "{awaited}");
        let written = rings[0].at() - head;
        assert!(written >= 48 * 1001 * (1 + u64::from(awaited)), "{written}");
    }
}

#[test]
fn what_was_written_over_is_told_as_lost() {
    let Some((_events, mut rings, _vm)) = open("what_was_written_over_is_told_as_lost") else {
        return;
    };
    unmap_on_the_first_cpu(2 * SIZE as u64 / 48);
    let (complete, count_before) = count(&mut rings[0], AddressRange::ALL);
    assert!(!complete);
    assert_eq!(count_before, 0);
    // And it works again.
    let range = unmap_on_the_first_cpu(10);
    assert_eq!(count(&mut rings[0], range), (true, 11));
}

/// Why there is one ring for each CPU.
#[test]
fn there_is_no_ring_for_all_cpus() {
    let Some((events, _rings, _vm)) = open("there_is_no_ring_for_all_cpus") else {
        return;
    };
    let Some(second) = events.get(1) else {
        println!("skipped: there_is_no_ring_for_all_cpus: there is one CPU");
        return;
    };
    let other = Event::open(
        Tracepoint::find().unwrap().id,
        sys::cpus().unwrap()[0],
        Wakes::Always,
    );
    let refused = other.unwrap().write_to_ring_of(&second.records).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EINVAL));
    let all = Event::open(Tracepoint::find().unwrap().id, u32::MAX, Wakes::Always);
    assert_eq!(all.unwrap_err().raw_os_error(), Some(libc::EINVAL));
}
