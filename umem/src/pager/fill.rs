//! The background fill: loads what nobody has asked for yet.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::install::Fetched;
use super::order::Order;
use super::shared::Shared;
use super::{Fill, PagerError};
use crate::region::PageSize;
use crate::schedule::{Stopped, step_back};
use crate::source::{Class, MAX_REQUEST_RANGES};
use crate::states::{Arrival, PageState};
use crate::units::{PageIndex, PageRange};
use crate::working_set::WorkingSet;

/// Pages fetched at a time: 256 KiB, which stays in the processor's cache between being read and being installed.
const FILL_STEP: u64 = 64;

/// Why a fill ended early.
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

/// The fill thread's own.
struct Filler<'a> {
    shared: &'a Shared,
    /// What is claimed and not asked for yet.
    batch: Vec<PageRange>,
    buffer: Vec<u8>,
    /// Pages claimed and read at a time.
    step: u64,
    /// As many ranges as these can be.
    step_ranges: usize,
}

impl Shared {
    /// The fill thread.
    pub(super) fn fill(self: Arc<Self>, fill: &Fill) {
        step_back();
        let unit = self.page_size.pages();
        let step = FILL_STEP.max(unit);
        let mut filler = Filler {
            shared: &self,
            batch: Vec::with_capacity(MAX_REQUEST_RANGES),
            buffer: Self::buffer(step),
            step,
            step_ranges: (step / unit) as usize,
        };
        let ended = filler.load_uncertain().and_then(|()| match fill {
            Fill::Off => Ok(()),
            Fill::Sequential => filler.load_all(false),
            Fill::NearFaults => filler.load_all(true),
            Fill::Recorded(set) => filler.replay(set),
        });
        match ended {
            Ok(()) | Err(Ended::Stopped) => {}
            Err(Ended::Failed(error)) => self.fail(error),
        }
    }
}

impl Filler<'_> {
    /// Loads what a pager before this one may have installed, or not, and left in flight: that claim is this one's now. Were it given up
    /// first and this pager killed before it claimed it again, nobody would know any more that it may be there.
    fn load_uncertain(&mut self) -> Result<(), Ended> {
        let shared = self.shared;
        for unit in &shared.uncertain {
            shared.schedule.pass_gate()?;
            self.batch.push(shared.states.unit_of(*unit));
            self.fetch()?;
        }
        Ok(())
    }

    /// Loads all pages that hold something, near to the latest fault first if that is to be followed. Zero pages are not
    /// loaded: when nothing else is missing, the region is released, and what is absent then is the kernel's to fill with
    /// zeros, as in any memory.
    fn load_all(&mut self, follow_faults: bool) -> Result<(), Ended> {
        let (shared, step) = (self.shared, self.step);
        let all = shared.states.all();
        let mut order = Order::new(all.count.div_ceil(step) as usize);
        loop {
            shared.schedule.pass_gate()?;
            if follow_faults {
                order.move_to((shared.last_fault.load(Relaxed) / step) as usize);
            }
            // Chunks in which little is left make one request together.
            let mut claimed = 0;
            while claimed < step && self.has_room() {
                let Some(chunk) = order.take() else { break };
                let chunk = PageRange::new(PageIndex(chunk as u64 * step), step).clamp_to(all.end());
                claimed += self.claim_data(chunk)?;
            }
            if self.batch.is_empty() {
                break;
            }
            self.fetch()?;
        }
        self.finish(all)
    }

    /// Waits until all pages of `rest` that hold something are settled, loading once more what was claimed by somebody who
    /// gave it up; then the region is released.
    fn finish(&mut self, mut rest: PageRange) -> Result<(), Ended> {
        let shared = self.shared;
        loop {
            let seen = shared.schedule.progress();
            // A settled page stays settled. So when no page that holds something is found unsettled, that is a proof.
            let Some(page) = self.first_unsettled(rest)? else {
                shared.release();
                return Ok(());
            };
            rest = rest.from(page);
            if shared.states.get(page) == PageState::Absent {
                shared.schedule.pass_gate()?;
                self.claim_data(PageRange::new(page, self.step).clamp_to(rest.end()))?;
                self.fetch()?;
            } else {
                shared.schedule.wait_for_progress(seen)?;
            }
        }
    }

    fn first_unsettled(&self, mut rest: PageRange) -> Result<Option<PageIndex>, PagerError> {
        while let Some(data) = self.next_data(rest)? {
            if let Some(page) = data.pages().find(|page| !self.shared.states.is_settled(*page)) {
                return Ok(Some(page));
            }
            rest = rest.from(data.end());
        }
        Ok(None)
    }

    /// Loads the pages of a working set in its order, zero pages too: they are what the guest is going to touch.
    fn replay(&mut self, set: &WorkingSet) -> Result<(), Ended> {
        let shared = self.shared;
        let mut claimed = 0;
        for run in set.runs() {
            let mut rest = run.pages;
            while rest.count > 0 {
                if claimed == 0 {
                    shared.schedule.pass_gate()?;
                }
                let piece = PageRange::new(rest.start, self.step - claimed).clamp_to(rest.end());
                claimed += self.claim_all(piece)?;
                rest = rest.from(piece.end());
                if claimed >= self.step || !self.has_room() {
                    self.fetch()?;
                    claimed = 0;
                }
            }
        }
        self.fetch()?;
        Ok(())
    }

    /// Claims what is absent in `within` and holds something. Answers how many pages that were.
    fn claim_data(&mut self, within: PageRange) -> Result<u64, PagerError> {
        let mut claimed = 0;
        let mut rest = within;
        while let Some(data) = self.next_data(rest)? {
            claimed += self.claim(data);
            rest = rest.from(data.end());
        }
        Ok(claimed)
    }

    /// Claims what is absent in `within`. What of it is zero is installed at once. Answers how many other pages there were.
    fn claim_all(&mut self, within: PageRange) -> Result<u64, PagerError> {
        let first = self.batch.len();
        self.claim(within);
        let mut claimed = 0;
        for run in self.batch.split_off(first) {
            if self.shared.page_size == PageSize::Huge {
                // Installed whole, whatever is in it.
                claimed += run.count;
                self.batch.push(run);
                continue;
            }
            let mut rest = run;
            loop {
                let data = self.next_data(rest)?.unwrap_or(PageRange::new(rest.end(), 0));
                let zero = rest.clamp_to(data.start);
                self.shared.deliver(Fetched::zero(zero), Arrival::Prefetched)?;
                if data.count == 0 {
                    break;
                }
                claimed += data.count;
                self.batch.push(data);
                rest = rest.from(data.end());
            }
        }
        Ok(claimed)
    }

    /// Whether one request can hold what another step may claim.
    fn has_room(&self) -> bool {
        self.batch.len() + self.step_ranges <= MAX_REQUEST_RANGES
    }

    fn claim(&mut self, within: PageRange) -> u64 {
        let mut claimed = 0;
        let mut rest = within;
        while let Some(run) = self.shared.states.claim_run(rest, self.step) {
            claimed += run.count;
            self.batch.push(run);
            rest = rest.from(run.end());
        }
        claimed
    }

    /// The next pages that may hold something. What was claimed is given up if that cannot be known.
    fn next_data(&self, within: PageRange) -> Result<Option<PageRange>, PagerError> {
        if within.count == 0 {
            return Ok(None);
        }
        self.shared.source.next_data(within).map_err(|error| {
            self.batch.iter().for_each(|run| self.shared.give_up(*run));
            self.shared.source_error(error)
        })
    }

    /// Fetches what was claimed.
    fn fetch(&mut self) -> Result<(), PagerError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let shared = self.shared;
        shared.schedule.begin_background();
        if shared.submit(&self.batch, Class::Background) {
            self.batch.clear();
            return Ok(());
        }
        let mut failure = None;
        for run in self.batch.drain(..) {
            if failure.is_some() {
                shared.give_up(run);
                continue;
            }
            let buffer = &mut self.buffer[..run.bytes()];
            let delivered = match shared.source.read(run, Class::Background, buffer) {
                Ok(content) => shared.deliver(Fetched::new(run, content, buffer), Arrival::Prefetched),
                Err(error) => {
                    // One page of them cannot be had. Who waits for another asks again, for that one alone.
                    shared.give_up(run);
                    Err(shared.source_error(error))
                }
            };
            failure = delivered.err();
        }
        shared.schedule.end_background();
        failure.map_or(Ok(()), Err)
    }
}
