//! The background fill: loads what nobody has asked for yet.

use std::sync::Arc;

use super::install::Fetched;
use super::{PagerError, Shared};
use crate::schedule::Stopped;
use crate::source::Class;
use crate::states::Arrival;
use crate::units::{PageIndex, PageRange};

/// Pages fetched at a time: 256 KiB, which stays in the processor's cache between being read and being installed.
const FILL_STEP: u64 = 64;

/// Why a walk ended early.
enum Ended {
    Stopped,
    Failed(PagerError),
}

impl From<Stopped> for Ended {
    fn from(_: Stopped) -> Self {
        Self::Stopped
    }
}

impl From<PagerError> for Ended {
    fn from(error: PagerError) -> Self {
        Self::Failed(error)
    }
}

impl Shared {
    /// The fill thread. Zero pages are not loaded: when nothing else is missing, the region is released, and what is absent
    /// then is the kernel's to fill with zeros, as in any memory.
    pub(super) fn fill_sequentially(self: Arc<Self>) {
        let mut buffer = Self::buffer(FILL_STEP.max(self.region.page_size().pages()));
        loop {
            let seen = self.schedule.progress();
            let ended = match self.fill_data(&mut buffer) {
                // A settled page stays settled. So a walk that saw every page that holds something settled is a proof.
                Ok(0) => return self.release(),
                // What is left is being fetched for who waits for it.
                Ok(_) => self.schedule.wait_for_progress(seen).map_err(Ended::from),
                Err(ended) => Err(ended),
            };
            match ended {
                Ok(()) => {}
                Err(Ended::Stopped) => return,
                Err(Ended::Failed(error)) => return self.fail(error),
            }
        }
    }

    /// Walks over all pages that may hold something, and loads those that are absent. Answers how many it saw that are
    /// neither present nor removed.
    fn fill_data(&self, buffer: &mut [u8]) -> Result<u64, Ended> {
        let mut unsettled = 0;
        let mut at = PageIndex(0);
        while let Some(data) = self
            .source
            .next_data(at)
            .map_err(|error| self.source_error(error))?
        {
            let mut rest = data;
            loop {
                self.schedule.pass_gate()?;
                let Some(run) = self.states.claim_run(rest, FILL_STEP) else {
                    break;
                };
                self.fill_run(run, buffer)?;
                rest = PageRange::new(run.end(), data.end().0.saturating_sub(run.end().0));
            }
            unsettled += data.pages().filter(|page| !self.states.is_settled(*page)).count() as u64;
            at = data.end();
        }
        Ok(unsettled)
    }

    fn fill_run(&self, pages: PageRange, buffer: &mut [u8]) -> Result<(), PagerError> {
        self.schedule.begin_background();
        if self.submit(&[pages], Class::Background) {
            return Ok(());
        }
        let result = self.read_run(pages, buffer);
        self.schedule.end_background();
        result
    }

    fn read_run(&self, pages: PageRange, buffer: &mut [u8]) -> Result<(), PagerError> {
        let buffer = &mut buffer[..pages.bytes()];
        match self.source.read(pages, buffer) {
            Ok(content) => self.deliver(
                Fetched {
                    pages,
                    content,
                    buffer,
                },
                Arrival::Prefetched,
            ),
            Err(error) => {
                // One page of them cannot be had. Who waits for another asks again, for that one alone.
                for unit in self.states.units(pages) {
                    self.states.cancel(unit);
                }
                self.wake(pages);
                self.record_waiting(pages);
                Err(self.source_error(error))
            }
        }
    }
}
