//! Memory that came page by page becomes huge pages again: one after the other, and seldom. Whoever touches what the kernel is
//! putting together waits for that, and so does who wants to change the mapping.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::region::Region;
use crate::units::PageRange;

/// Of so many parts of the time one is spent with it.
const SHARE: u32 = 20;

/// The pause between two huge pages. The longest is also how soon it is tried again where it is put off.
const PAUSE: RangeInclusive<Duration> = Duration::from_millis(20)..=Duration::from_millis(500);

/// What is to become huge pages.
#[derive(Debug, Default)]
pub(crate) struct Collapser {
    todo: Mutex<Todo>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Todo {
    ranges: VecDeque<PageRange>,
    ended: bool,
}

impl Collapser {
    /// These are populated throughout and registered no longer.
    pub(crate) fn hand_over(&self, ranges: Vec<PageRange>) {
        self.lock().ranges = ranges.into();
    }

    /// Nothing more is to be done.
    pub(crate) fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// Does what was handed over, until that is done or the end.
    pub(crate) fn run(&self, region: &Region) {
        let mut pause = Duration::ZERO;
        while let Some(range) = self.next(pause) {
            // What was given back meanwhile would have memory again.
            if !region.is_populated(range) {
                continue;
            }
            let began = Instant::now();
            pause = if region.collapse(range) {
                (began.elapsed() * SHARE).clamp(*PAUSE.start(), *PAUSE.end())
            } else {
                self.lock().ranges.push_front(range);
                *PAUSE.end()
            };
        }
    }

    /// The next range, after a pause.
    fn next(&self, pause: Duration) -> Option<PageRange> {
        let todo = self.lock();
        if todo.ranges.is_empty() {
            return None;
        }
        let waited = self
            .changed
            .wait_timeout_while(todo, pause, |todo| !todo.ended)
            .unwrap_or_else(PoisonError::into_inner);
        let mut todo = waited.0;
        if todo.ended { None } else { todo.ranges.pop_front() }
    }

    fn lock(&self) -> MutexGuard<'_, Todo> {
        self.todo.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;
    use crate::region::{Backing, PageSize};
    use crate::units::{PAGE_SIZE, PageIndex};

    const HUGE_PAGES: u64 = 2;

    fn populated(backing: Backing) -> (Arc<Region>, Vec<PageRange>) {
        let huge = PageSize::Huge.pages();
        let size = PageSize::Huge.bytes() * HUGE_PAGES;
        let region = Region::new(size, backing, PageSize::Small).unwrap();
        for page in 0..huge * HUGE_PAGES {
            let pages = PageRange::new(PageIndex(page), 1);
            region.write(pages, &[page as u8; PAGE_SIZE]).unwrap();
        }
        let ranges = (0..HUGE_PAGES).map(|index| PageRange::new(PageIndex(index * huge), huge));
        (Arc::new(region), ranges.collect())
    }

    #[test]
    fn what_was_in_the_pages_stays() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let (region, ranges) = populated(backing);
            let collapser = Collapser::default();
            collapser.hand_over(ranges);
            collapser.run(&region);
            assert!(collapser.lock().ranges.is_empty());
            let mut content = [0; PAGE_SIZE];
            for page in 0..region.pages() {
                region
                    .read(PageRange::new(PageIndex(page), 1), &mut content)
                    .unwrap();
                assert_eq!(content, [page as u8; PAGE_SIZE], "{backing:?}, page {page}");
            }
        }
    }

    #[test]
    fn what_was_given_back_has_no_memory_again() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let (region, ranges) = populated(backing);
            let given_back = PageRange::new(PageIndex(7), 3);
            region.remove(given_back).unwrap();
            let collapser = Collapser::default();
            collapser.hand_over(ranges);
            collapser.run(&region);
            assert_eq!(
                region.populated().unwrap(),
                region.pages() - given_back.count,
                "{backing:?}"
            );
        }
    }

    #[test]
    fn it_is_put_off_while_somebody_wants_it_so_and_ends_all_the_same() {
        let (region, ranges) = populated(Backing::Memfd);
        let collapser = Arc::new(Collapser::default());
        collapser.hand_over(ranges.clone());
        let put_off = region.put_off_collapse();
        assert!(!region.collapse(ranges[0]));
        let run = {
            let (region, collapser) = (Arc::clone(&region), Arc::clone(&collapser));
            thread::spawn(move || collapser.run(&region))
        };
        collapser.end();
        run.join().unwrap();
        assert_eq!(Vec::from(collapser.lock().ranges.clone()), ranges);
        drop(put_off);
        assert!(region.collapse(ranges[0]));
    }
}
