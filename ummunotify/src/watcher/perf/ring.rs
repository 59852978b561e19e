//! A ring of perf's, which the kernel writes over when it is full.
//!
//! Mapped for reading alone, it never stops the kernel: the head moves with each record, and who has not read a record in
//! time has lost it, and can tell so. (Mapped for writing, the kernel would wait for the reader, and the head would stand still.)
//!
//! Source: perf_event_open(2).

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::sync::atomic::{AtomicU32, AtomicU64, fence};

use rustix::mm::ProtFlags;
use rustix::process::{Pid, getpid};

use super::sys::Event;
use super::tracepoint::Tracepoint;
use crate::mapping::Mapping;
use crate::ranges::AddressRange;

const PAGE: usize = 4096;

/// Bytes for records, each of which takes 48. A user may have 516 KiB for each CPU, unless there is a greater limit.
pub(super) const SIZE: usize = 1 << 18;

/// The kernel writes a record before it moves the head: so many bytes after the head may not be what they were.
const MARGIN: u64 = 4096;

/// `data_head` in `struct perf_event_mmap_page`.
const DATA_HEAD: usize = 1024;

/// A record: `type`, `misc` and `size`; the number of the event; how long the rest is; the rest.
const IDENTIFIER: u64 = 8;
const RAW: u64 = 20;
/// `PERF_RECORD_SAMPLE`.
const SAMPLE: u32 = 9;

/// A CPU's ring, and the place up to which it has been read.
#[derive(Debug)]
pub(super) struct Ring {
    memory: ManuallyDrop<Mapping>,
    tracepoint: Tracepoint,
    at: u64,
    /// The last record that was taken.
    last: Option<Record>,
    owner: Pid,
}

/// An invalidation, as one of the events tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    event: u64,
    range: AddressRange,
}

impl Ring {
    /// That of an event.
    pub(super) fn map(event: &Event, tracepoint: Tracepoint) -> io::Result<Self> {
        let memory = Mapping::shared(event.as_fd(), 0, PAGE + SIZE, ProtFlags::READ)?;
        let mut ring = Self {
            memory: ManuallyDrop::new(memory),
            tracepoint,
            at: 0,
            last: None,
            owner: getpid(),
        };
        ring.at = ring.load_head();
        Ok(ring)
    }

    /// How many bytes the kernel has written: it has grown before an invalidation goes on. It is there as long as `self` is.
    pub(super) fn head(&self) -> NonNull<AtomicU64> {
        // SAFETY: in the first page.
        unsafe { self.memory.start().add(DATA_HEAD).cast() }
    }

    /// The place up to which it has been read.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// Takes out the invalidations that have been recorded when this is called. `false`: some were written over.
    pub(super) fn drain(&mut self, mut taken: impl FnMut(AddressRange)) -> bool {
        let head = self.load_head();
        while self.at < head {
            let length = u64::from(self.word(self.at + 4) >> 16);
            let range = |field: usize| self.long(self.at + RAW + field as u64);
            let record = Record {
                event: self.long(self.at + IDENTIFIER),
                range: AddressRange::new(range(self.tracepoint.start), range(self.tracepoint.end)),
            };
            let whole = self.word(self.at) == SAMPLE && length > RAW;
            // It was read before this, and all of it if the kernel has not come round by now.
            fence(Acquire);
            if self.load_head() - self.at > SIZE as u64 - MARGIN || !whole {
                self.at = self.load_head();
                self.last = None;
                return false;
            }
            self.at += length;
            // While somebody waits, two events tell of each invalidation, one directly after the other.
            let again = self
                .last
                .is_some_and(|last| last.event != record.event && last.range == record.range);
            self.last = (!again).then_some(record);
            if !again {
                taken(record.range);
            }
        }
        true
    }

    fn load_head(&self) -> u64 {
        // SAFETY: mapped as long as `self` is.
        unsafe { self.head().as_ref() }.load(Acquire)
    }

    fn long(&self, at: u64) -> u64 {
        u64::from(self.word(at)) | u64::from(self.word(at + 4)) << 32
    }

    /// The word at a place, which is a multiple of 4. A record may begin at the end of the ring and end at its beginning.
    fn word(&self, at: u64) -> u32 {
        // SAFETY: in the ring, aligned as its beginning is, and the kernel writes it as others read it.
        let word = unsafe {
            let place = self.memory.start().add(PAGE + at as usize % SIZE);
            place.cast::<AtomicU32>().as_ref()
        };
        word.load(Relaxed)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // A process made by fork does not have the mapping, and may have something else in its place.
        if self.owner == getpid() {
            // SAFETY: it is not used after this.
            unsafe { ManuallyDrop::drop(&mut self.memory) };
        }
    }
}
