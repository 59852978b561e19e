//! The reader's side of a BPF ring buffer.
//!
//! Source: the kernel's `Documentation/bpf/ringbuf.rst`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::mm::ProtFlags;

use super::program::Record;
use super::sys::{Map, MapKind};
use crate::mapping::Mapping;
use crate::watcher::wait_for;

const PAGE: usize = 4096;

/// Bytes for records. Each takes 24, so there is room for some 43,000.
const SIZE: usize = 1 << 20;

/// In a record's header: the program has not filled it in yet.
const BUSY: u32 = 1 << 31;
/// It never will.
const DISCARDED: u32 = 1 << 30;
const HEADER: u64 = 8;

/// A ring and the place up to which it has been read.
#[derive(Debug)]
pub(crate) struct Ring {
    map: OwnedFd,
    /// One page: where the reader is. The kernel reads it.
    consumer: Mapping,
    /// One page: where the program is; then the records, twice, so that none is in two parts.
    producer: Mapping,
}

impl Ring {
    pub(crate) fn new() -> io::Result<Self> {
        let map = Map {
            kind: MapKind::Ring,
            value_size: 0,
            entries: SIZE as u32,
            flags: 0,
            inner: None,
        };
        let map = map.create()?;
        let consumer = Mapping::shared(map.as_fd(), 0, PAGE, ProtFlags::READ | ProtFlags::WRITE)?;
        let producer = Mapping::shared(map.as_fd(), PAGE as u64, PAGE + 2 * SIZE, ProtFlags::READ)?;
        Ok(Self {
            map,
            consumer,
            producer,
        })
    }

    /// The map; poll says that it is readable while there are records.
    pub(crate) fn map(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }

    /// Takes out all records that were in the ring when this was called, those not yet filled in too.
    pub(crate) fn drain(&mut self, mut taken: impl FnMut(Record)) {
        // SAFETY: each is the first word of a page, which is mapped as long as `self` is.
        let (consumer, producer) = unsafe {
            (
                self.consumer.start().cast::<AtomicU64>().as_ref(),
                self.producer.start().cast::<AtomicU64>().as_ref(),
            )
        };
        let end = producer.load(Acquire);
        let mut at = consumer.load(Acquire);
        while at < end {
            // SAFETY: the records follow the page, and `at` modulo their size is the place of a record.
            let header = unsafe { self.producer.start().add(PAGE + at as usize % SIZE) };
            let length = Self::wait_until_filled(header);
            if length & DISCARDED == 0 {
                // SAFETY: the program puts nothing else into the ring, and this record is complete.
                taken(unsafe { header.add(HEADER as usize).cast::<Record>().read() });
            }
            at += (HEADER + u64::from(length & !DISCARDED)).next_multiple_of(8);
            // From here on the program may write over it.
            consumer.store(at, Release);
        }
    }

    /// The length of a record. The program's few instructions up to there may have been interrupted.
    fn wait_until_filled(header: NonNull<u8>) -> u32 {
        // SAFETY: as for the record; a header starts with this word, and is aligned to 8 bytes.
        let length = unsafe { header.cast::<AtomicU32>().as_ref() };
        wait_for(|| Some(length.load(Acquire)).filter(|length| length & BUSY == 0))
    }
}
