//! Invalidations as they are noticed, one by one, for who makes something else of them than a notifier's events.

use std::fmt;
use std::os::fd::BorrowedFd;

use crate::choice::{Choice, OpenError, WatcherKind};
use crate::ranges::AddressRange;
use crate::watcher::{Noticed, Watcher};

/// What is invalidated in one range of this process' addresses.
pub struct Stream {
    watcher: Box<dyn Watcher>,
    kind: WatcherKind,
    range: AddressRange,
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream")
            .field("watcher", &self.kind)
            .field("range", &self.range)
            .finish_non_exhaustive()
    }
}

impl Stream {
    /// Watches `range` from now on.
    pub fn open(choice: Choice, range: AddressRange) -> Result<Self, OpenError> {
        let (kind, mut watcher, _) = choice.open()?;
        watcher.wake();
        watcher.watch(range).map_err(OpenError::Io)?;
        Ok(Self { watcher, kind, range })
    }

    /// Readable when something was invalidated after everything had been taken. `None`: with this watcher nobody is told.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.watcher.descriptor()
    }

    /// What was invalidated since this was asked last, in order; also what calls did that have returned, or will return. All of the
    /// range is in it where more was than could be remembered.
    pub fn take(&mut self) -> Vec<AddressRange> {
        let mut taken: Vec<AddressRange> = Vec::new();
        let range = self.range;
        self.watcher.drain(&mut |noticed| {
            let parts = match noticed {
                Noticed::Invalidated(part) => [part, part],
                Noticed::Moved { from, to } => [from, to],
                Noticed::Everything => [range, range],
            };
            for part in parts.map(|part| part.clipped_to(range)) {
                // A process with several VMs is told of each several times.
                if !part.is_empty() && taken.last() != Some(&part) {
                    taken.push(part);
                }
            }
        });
        taken
    }
}

#[cfg(test)]
mod tests {
    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

    use super::*;

    #[test]
    fn everything_in_the_range_is_told_in_order_and_nothing_else() {
        const PAGE: usize = 4096;
        let flags = MapFlags::PRIVATE | MapFlags::POPULATE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping.
        let memory = unsafe { mmap_anonymous(std::ptr::null_mut(), 8 * PAGE, protection, flags) }.unwrap();
        let page = |index: usize| memory as u64 + (index * PAGE) as u64;
        let range = AddressRange::new(page(2), page(6));
        let mut stream = match Stream::open(Choice::Only(WatcherKind::Kvm), range) {
            Ok(stream) => stream,
            Err(error) => {
                println!("skipped: {error}");
                return;
            }
        };
        assert!(stream.take().is_empty());
        for (first, count) in [(3, 1), (0, 2), (5, 3), (2, 1)] {
            // SAFETY: the mapping of this test, in which nothing is.
            unsafe {
                let at = memory.byte_add(first * PAGE);
                madvise(at, count * PAGE, Advice::LinuxDontNeed).unwrap();
            }
        }
        let part = |from, to| AddressRange::new(page(from), page(to));
        assert_eq!(stream.take(), [part(3, 4), part(5, 6), part(2, 3)]);
        // SAFETY: the mapping of this test.
        unsafe { munmap(memory, 8 * PAGE) }.unwrap();
    }
}
