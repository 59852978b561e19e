//! RAM that arrives before the guest does.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use umem::call::Opened;
use umem::channel::ChannelError;
use umem::region::Region;
use umem::states::{Arrival, PageState, PageStates};
use umem::units::{PAGE_SIZE, PageRange};
use umem::wire::{MAX_PAGES_PER_FRAME, Message, Pages, Run};

use super::LAST_BARRIER;

/// RAM of a VM that does not run yet: written to by those who receive, and served by nobody.
#[derive(Debug)]
pub(super) struct Landing {
    pub(super) region: Arc<Region>,
    /// What is there.
    pub(super) states: Arc<PageStates>,
    /// No page that comes may be older.
    epoch: AtomicU64,
    /// Held for as long as one is taken. False: the machine's state is there, and RAM is about to be its pager's alone.
    open: RwLock<bool>,
}

/// Why pages were not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum LandingError {
    /// The channel ended.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// Pages that cannot be.
    #[error("the other side sent {0}")]
    Wrong(String),
    /// There is no memory for them.
    #[error("cannot write to guest memory")]
    Memory(#[source] std::io::Error),
}

impl Landing {
    /// `None`: no memory for the states.
    pub(super) fn new(region: Arc<Region>) -> Option<Self> {
        let states = PageStates::new(region.pages(), region.page_size().pages())?;
        Some(Self {
            region,
            states: Arc::new(states),
            epoch: AtomicU64::new(0),
            open: RwLock::new(true),
        })
    }

    /// Pages may be taken for as long as this is held.
    fn open(&self) -> Result<RwLockReadGuard<'_, bool>, LandingError> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        if !*open {
            return Err(LandingError::Wrong("pages after its state".into()));
        }
        Ok(open)
    }

    /// Takes no more pages from now on; those that are being taken have been.
    pub(super) fn close(&self) {
        *self.open.write().unwrap_or_else(PoisonError::into_inner) = false;
    }

    /// Takes what is pushed on a channel, until nothing more is.
    pub(super) fn receive(&self, opened: &mut Opened) -> Result<(), LandingError> {
        let Opened { sender, receiver, .. } = opened;
        let mut buffer = vec![0; MAX_PAGES_PER_FRAME * PAGE_SIZE];
        loop {
            match receiver.receive()? {
                Message::Pages(pages) => {
                    let _open = self.open()?;
                    self.take_pages(&pages, &mut buffer)?;
                }
                Message::Zero(zero) => {
                    let _open = self.open()?;
                    self.check(zero.range, zero.epoch.0)?;
                    self.take_zero(zero.range)?;
                }
                Message::Barrier { number, epoch } => {
                    self.epoch.fetch_max(epoch.0, SeqCst);
                    if number == LAST_BARRIER {
                        return Ok(());
                    }
                    sender.send(&Message::BarrierAck { number })?;
                }
                Message::Ping { token } => sender.send(&Message::Pong { token })?,
                Message::Goodbye(_) => return Err(ChannelError::Closed.into()),
                _ => {}
            }
        }
    }

    fn check(&self, pages: PageRange, epoch: u64) -> Result<(), LandingError> {
        if pages.end().0 > self.states.pages() {
            return Err(LandingError::Wrong(format!(
                "pages {pages}, which are not in RAM"
            )));
        }
        if epoch < self.epoch.load(SeqCst) {
            return Err(LandingError::Wrong(format!(
                "pages {pages} of a round that is over"
            )));
        }
        Ok(())
    }

    fn take_pages(&self, pages: &Pages<'_>, buffer: &mut [u8]) -> Result<(), LandingError> {
        self.check(pages.range, pages.epoch.0)?;
        let unpacked = pages.unpack(buffer).map_err(ChannelError::from)?;
        unpacked.verify().map_err(ChannelError::from)?;
        for run in unpacked.runs() {
            match run {
                Run::Zero(range) => self.take_zero(range)?,
                Run::Data(range, data) => {
                    self.region.write(range, data).map_err(LandingError::Memory)?;
                    self.note(range, Arrival::Pushed);
                }
            }
        }
        Ok(())
    }

    /// What has no memory reads zero. Of a unit that is larger than a page, only all of it has none.
    fn take_zero(&self, pages: PageRange) -> Result<(), LandingError> {
        static ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
        if self.states.unit_of(pages.start).count > 1 {
            for page in pages.pages() {
                self.region
                    .write(PageRange::single(page), &ZEROS)
                    .map_err(LandingError::Memory)?;
            }
            self.note(pages, Arrival::Pushed);
            return Ok(());
        }
        if let Some(first) = self.region.first_populated(pages).map_err(LandingError::Memory)? {
            self.region
                .discard(pages.from(first))
                .map_err(LandingError::Memory)?;
        }
        self.note(pages, Arrival::Zero);
        Ok(())
    }

    /// Pages of a unit come in order and on one channel: with the last one, the unit is there.
    fn note(&self, pages: PageRange, arrival: Arrival) {
        for unit in self.states.units(pages) {
            if unit.end() <= pages.end() {
                self.states.preset(unit, arrival);
            }
        }
    }

    /// The content of `pages` is not right any more.
    pub(super) fn discard(&self, pages: PageRange, epoch: u64) -> Result<(), LandingError> {
        if pages.end().0 > self.states.pages() {
            return Err(LandingError::Wrong(format!(
                "pages {pages}, which are not in RAM"
            )));
        }
        self.epoch.fetch_max(epoch, SeqCst);
        for run in self.present_units(pages) {
            self.states.forget(run);
            self.region.discard(run).map_err(LandingError::Memory)?;
        }
        Ok(())
    }

    /// Runs of whole units that `pages` touch and that are there.
    fn present_units(&self, pages: PageRange) -> Vec<PageRange> {
        let mut runs: Vec<PageRange> = Vec::new();
        for unit in self.states.units(pages) {
            if self.states.get(unit.start) != PageState::Present {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.end() == unit.start => run.count += unit.count,
                _ => runs.push(unit),
            }
        }
        runs
    }

    /// How many pages are there.
    pub(super) fn present(&self) -> u64 {
        self.states.counts().present
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use umem::region::{Backing, PageSize};
    use umem::units::PageIndex;

    fn landing(pages: u64, backing: Backing) -> Landing {
        let region = Region::new(pages * PAGE_SIZE as u64, backing, PageSize::Small).unwrap();
        Landing::new(Arc::new(region)).unwrap()
    }

    fn read(landing: &Landing, page: u64) -> Vec<u8> {
        let mut content = vec![1; PAGE_SIZE];
        landing
            .region
            .read(PageRange::single(PageIndex(page)), &mut content)
            .unwrap();
        content
    }

    #[test]
    fn what_was_discarded_is_absent_and_has_no_memory() {
        for backing in [Backing::Memfd, Backing::Anonymous] {
            let landing = landing(64, backing);
            let pages = PageRange::new(PageIndex(8), 16);
            landing.region.write(pages, &vec![7; pages.bytes()]).unwrap();
            landing.note(pages, Arrival::Pushed);
            landing.take_zero(PageRange::new(PageIndex(40), 8)).unwrap();
            assert_eq!(landing.present(), 24);
            landing.discard(PageRange::new(PageIndex(10), 2), 1).unwrap();
            assert_eq!(landing.states.get(PageIndex(10)), PageState::Absent);
            assert_eq!(landing.states.get(PageIndex(12)), PageState::Present);
            assert_eq!((landing.present(), landing.states.counts().absent), (22, 42));
            assert_eq!(landing.region.populated().unwrap(), 14);
            assert_eq!((read(&landing, 9)[5], read(&landing, 12)[5]), (7, 7));
            // And it comes again.
            landing
                .region
                .write(PageRange::single(PageIndex(10)), &[9; PAGE_SIZE])
                .unwrap();
            landing.note(PageRange::single(PageIndex(10)), Arrival::Pushed);
            assert_eq!((landing.present(), read(&landing, 10)[0]), (23, 9));
        }
    }

    #[test]
    fn a_page_that_is_zero_now_shows_nothing_of_what_it_was() {
        let landing = landing(8, Backing::Memfd);
        let page = PageRange::single(PageIndex(3));
        landing.region.write(page, &[5; PAGE_SIZE]).unwrap();
        landing.note(page, Arrival::Pushed);
        landing.take_zero(PageRange::new(PageIndex(0), 8)).unwrap();
        assert_eq!(read(&landing, 3), [0; PAGE_SIZE]);
        assert_eq!(landing.region.populated().unwrap(), 0);
        assert_eq!(landing.present(), 8);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let landing = landing(8, Backing::Memfd);
        let beyond = PageRange::new(PageIndex(7), 2);
        assert!(landing.check(beyond, 1).is_err());
        assert!(landing.discard(beyond, 1).is_err());
        landing.discard(PageRange::single(PageIndex(1)), 3).unwrap();
        assert!(
            landing.check(PageRange::single(PageIndex(1)), 2).is_err(),
            "it is older than the discard"
        );
        assert!(landing.check(PageRange::single(PageIndex(1)), 3).is_ok());
    }
}
