//! The generation counter: 64 bits in a page that whoever asks maps read-only. With the watcher `perf` it is behind until
//! somebody looks; then only this process can look.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::ProtFlags;

use crate::mapping::Mapping;

/// Bytes of the page.
pub const COUNTER_PAGE: usize = 4096;

/// The counter of a notifier. It grows with every invalidation that hits a registered range, and has done so before the call
/// that invalidated returns.
///
/// Copies are the same counter, which stays as long as one of them does.
#[derive(Clone, Debug)]
pub struct Counter {
    page: CounterPage,
    backlog: Option<(Arc<Heads>, Arc<dyn Backlog>)>,
}

/// What has not yet been counted.
pub(crate) trait Backlog: fmt::Debug + Send + Sync {
    /// Counts all that has happened when this is called.
    fn catch_up(&self);
}

/// Words of which one grows with whatever happens, and their sum when all that was counted.
#[derive(Debug)]
pub(crate) struct Heads {
    words: Box<[NonNull<AtomicU64>]>,
    /// How many words there are, and that sum: in a page of which a process made by fork has zeroes, since it does not have
    /// the words either.
    page: Mapping,
}

// SAFETY: the words are there as long as `self` is used, by the condition of `new`, and are only read, atomically.
unsafe impl Send for Heads {}
// SAFETY: as for Send.
unsafe impl Sync for Heads {}

impl Heads {
    /// # Safety
    ///
    /// The words are there as long as what is returned is used, except in a process made by fork.
    pub(crate) unsafe fn new(words: Box<[NonNull<AtomicU64>]>) -> io::Result<Self> {
        let page = Mapping::wiped_in_a_fork(2 * size_of::<AtomicU64>())?;
        let heads = Self { words, page };
        heads.count().store(heads.words.len() as u64, Release);
        Ok(heads)
    }

    /// Whether something has happened that is not counted. Nothing ever has after [`Heads::close`], nor in a process made by
    /// fork.
    #[inline]
    fn have_moved(&self) -> bool {
        // First, so that each word is at or after what it was then: the sums are the same if and only if all words are.
        let counted = self.counted().load(Acquire);
        let count = self.count().load(Acquire) as usize;
        // SAFETY: there are so many, by the condition of `new`.
        let words = self.words.iter().take(count).map(|word| unsafe { word.as_ref() });
        words.fold(0, |sum: u64, word| sum.wrapping_add(word.load(Acquire))) != counted
    }

    /// All has been counted that happened up to where the words had this sum.
    pub(crate) fn set_counted(&self, sum: u64) {
        self.counted().store(sum, Release);
    }

    /// Whether there are any words.
    pub(crate) fn are_open(&self) -> bool {
        self.count().load(Acquire) > 0
    }

    /// From now on nothing happens.
    pub(crate) fn close(&self) {
        self.count().store(0, Release);
        self.counted().store(0, Release);
    }

    fn count(&self) -> &AtomicU64 {
        // SAFETY: in the page, which is mapped as long as `self` is, and used in this way alone.
        unsafe { self.page.start().cast().as_ref() }
    }

    fn counted(&self) -> &AtomicU64 {
        // SAFETY: as above.
        unsafe { self.page.start().cast::<AtomicU64>().add(1).as_ref() }
    }
}

impl Counter {
    /// One whose page is right by itself.
    pub(crate) fn of(page: CounterPage) -> Self {
        let backlog = None;
        Self { page, backlog }
    }

    /// One whose page is right when `backlog` has been counted, of which there is some when `heads` have moved.
    pub(crate) fn behind(page: CounterPage, heads: Arc<Heads>, backlog: Arc<dyn Backlog>) -> Self {
        let backlog = Some((heads, backlog));
        Self { page, backlog }
    }

    /// Its value. What invalidations that have returned did is in it.
    ///
    /// With the watcher `perf`, and after an invalidation anywhere, this takes a lock: it is nothing for the handler of a
    /// signal.
    #[inline]
    pub fn load(&self) -> u64 {
        if let Some((heads, backlog)) = &self.backlog
            && heads.have_moved()
        {
            backlog.catch_up();
        }
        self.page.load()
    }

    /// Its page, for who looks without this type or from another process. `None`: there is none that is right by itself,
    /// because the watcher is `perf`.
    pub fn page(&self) -> Option<&CounterPage> {
        self.backlog.is_none().then_some(&self.page)
    }
}

/// A read-only view of a page that has a counter at its start.
///
/// Copies are views of the same page, which stays as long as one of them does.
#[derive(Clone, Debug)]
pub struct CounterPage(Arc<View>);

#[derive(Debug)]
struct View {
    page: Mapping,
    /// Whose first page it is.
    file: OwnedFd,
}

impl CounterPage {
    /// Maps the first page of a file.
    pub(crate) fn map(file: OwnedFd) -> io::Result<Self> {
        let page = Mapping::shared(file.as_fd(), 0, COUNTER_PAGE, ProtFlags::READ)?;
        Ok(Self(Arc::new(View { page, file })))
    }

    /// Its value. What invalidations that have returned did is in it.
    #[inline]
    pub fn load(&self) -> u64 {
        // SAFETY: the counter is at the start of the page, which is mapped as long as `self` is.
        unsafe { self.0.page.start().cast::<AtomicU64>().as_ref() }.load(Acquire)
    }

    /// The word at this index of the page.
    pub(crate) fn word(&self, index: usize) -> u64 {
        // SAFETY: as for the first word; there are 512.
        unsafe { self.0.page.start().cast::<AtomicU64>().add(index).as_ref() }.load(Acquire)
    }

    /// Where the page is mapped in this process.
    pub fn start(&self) -> NonNull<u64> {
        self.0.page.start().cast()
    }

    /// A file whose first page it is. It may be mapped by any process it is given to, but only for reading.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
    }
}

/// A counter that this process moves.
#[derive(Debug)]
pub(crate) struct OwnCounter(Mapping);

impl OwnCounter {
    /// One of 0, and the view of it.
    pub(crate) fn new() -> io::Result<(Self, CounterPage)> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memfd = rustix::fs::memfd_create("ummunotify", flags)?;
        rustix::fs::ftruncate(&memfd, COUNTER_PAGE as u64)?;
        let page = Mapping::shared(memfd.as_fd(), 0, COUNTER_PAGE, ProtFlags::READ | ProtFlags::WRITE)?;
        // From here on nobody else can map it for writing, or make it so short that reading it raises SIGBUS.
        rustix::fs::fcntl_add_seals(
            &memfd,
            SealFlags::FUTURE_WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL,
        )?;
        Ok((Self(page), CounterPage::map(memfd)?))
    }

    /// Moves it.
    pub(crate) fn increment(&self) {
        // SAFETY: the counter is at the start of the page, which is mapped as long as `self` is.
        unsafe { self.0.start().cast::<AtomicU64>().as_ref() }.fetch_add(1, AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_else_may_write() {
        let (own, counter) = OwnCounter::new().unwrap();
        assert_eq!(counter.load(), 0);
        own.increment();
        assert_eq!(counter.load(), 1);
        let writable = Mapping::shared(
            counter.file(),
            0,
            COUNTER_PAGE,
            ProtFlags::READ | ProtFlags::WRITE,
        );
        assert_eq!(writable.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert!(rustix::fs::ftruncate(counter.file(), 0).is_err());
        assert!(rustix::io::pwrite(counter.file(), &[1], 0).is_err());
        let elsewhere = CounterPage::map(counter.file().try_clone_to_owned().unwrap()).unwrap();
        own.increment();
        assert_eq!(elsewhere.load(), 2);
    }
}
