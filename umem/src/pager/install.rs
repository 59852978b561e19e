//! Putting content where a page is wanted.

use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::time::{Duration, Instant};

use super::shared::Shared;
use super::stripe::{Piece, Stripe};
use super::{INSTALL_STEP, PagerError};
use crate::image::is_zero;
use crate::region::PageSize;
use crate::source::Content;
use crate::states::{Arrival, PageState};
use crate::uffd::{InstallError, Installed};
use crate::units::{HUGE_PAGE_SIZE, PAGE_SIZE, PageIndex, PageRange};

/// When who waits for a page is woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wake {
    /// By the installation.
    Now,
    /// By the caller; by the installation all the same where that is a zero page.
    Later,
}

/// How long an event may be in the way of an installation: its reader never waits, and who makes it is in the kernel.
pub(super) const EVENT_PATIENCE: Duration = Duration::from_secs(10);

/// Whether another try will do better, when the event that is in the way has been read. The kernel looks for the mapping before it
/// looks whether mappings are changing (Linux 6.10 on), so what was just moved away is said to be not registered.
pub(super) fn is_transient(error: &InstallError) -> bool {
    matches!(error, InstallError::Changing | InstallError::NotRegistered)
}

static ZEROS: [u8; HUGE_PAGE_SIZE] = [0; HUGE_PAGE_SIZE];

/// The content of a run of pages, of which those that are all zero need no bytes.
#[derive(Clone, Copy)]
pub(super) struct Fetched<'a> {
    pages: PageRange,
    content: Content,
    /// As long as `pages`; means nothing where the content is zero.
    buffer: &'a [u8],
}

impl<'a> Fetched<'a> {
    pub(super) fn new(pages: PageRange, content: Content, buffer: &'a [u8]) -> Self {
        Self {
            pages,
            content,
            buffer,
        }
    }

    pub(super) fn zero(pages: PageRange) -> Self {
        Self::new(pages, Content::Zero, &[])
    }

    /// The bytes of `pages`, which are among those fetched; `None` says that they are all zero.
    pub(super) fn bytes_of(&self, pages: PageRange) -> Option<&'a [u8]> {
        let offset = (pages.start.0 - self.pages.start.0) as usize * PAGE_SIZE;
        let bytes = || &self.buffer[offset..offset + pages.bytes()];
        (self.content == Content::Data)
            .then(bytes)
            .filter(|bytes| !is_zero(bytes))
    }
}

impl Shared {
    /// Installs claimed pages from any thread but the fault thread: those of them that are still wanted.
    pub(super) fn deliver(&self, fetched: Fetched<'_>, arrival: Arrival) -> Result<(), PagerError> {
        // Who is woken may fault again at once, and that fault is read by a thread which needs the placement: it is let go of
        // first.
        let wake = if arrival == Arrival::Demand {
            Wake::Later
        } else {
            Wake::Now
        };
        self.deliver_by(fetched, arrival, wake, || {
            // The fault thread is about to read the event that is in the way.
            std::thread::yield_now();
            Ok(())
        })
    }

    /// Installs claimed pages, those of them that are still wanted, and wakes who waits for them as `wake` says. Where an event is
    /// in the way, `make_way` is called, with the placement let go of, and it is tried again.
    pub(super) fn deliver_by(
        &self,
        fetched: Fetched<'_>,
        arrival: Arrival,
        wake: Wake,
        mut make_way: impl FnMut() -> Result<(), PagerError>,
    ) -> Result<(), PagerError> {
        let mut at = fetched.pages.start;
        let mut stuck = None;
        while at < fetched.pages.end() {
            let stripe = self.stripe_of(at);
            let placement = stripe.placement();
            if self.closing.load(Relaxed) {
                // Whoever stops the pager has waited for who held the placement, and now counts what there is.
                return Ok(());
            }
            let run = self.wanted_run(&fetched, stripe, at);
            let Some(piece) = placement.run_at(run) else {
                // Removed or unmapped meanwhile.
                at = at.advance(self.page_size.pages());
                continue;
            };
            let bytes = fetched.bytes_of(piece.pages);
            let installed = PageRange::new(at, self.install(stripe, piece, bytes, wake)?);
            for unit in self.states.units(installed) {
                self.states
                    .arrive(unit, if bytes.is_none() { Arrival::Zero } else { arrival });
            }
            drop(placement);
            if wake == Wake::Later && installed.count > 0 {
                stripe.wake(piece.addresses());
            }
            self.record_waiting(installed);
            if installed.count == 0 {
                if stripe.events_ended.load(Acquire) {
                    return Ok(());
                }
                let since = *stuck.get_or_insert_with(Instant::now);
                if since.elapsed() >= EVENT_PATIENCE {
                    let source = InstallError::Changing;
                    return Err(PagerError::Install { page: at, source });
                }
                make_way()?;
            } else {
                stuck = None;
            }
            at = installed.end();
        }
        Ok(())
    }

    /// The units from `at` on that are still in flight and alike in being zero or not, as many as may be installed at once.
    fn wanted_run(&self, fetched: &Fetched<'_>, stripe: &Stripe, at: PageIndex) -> PageRange {
        let unit = self.page_size.pages();
        let end = fetched.pages.end().min(stripe.pages.end());
        let mut run = PageRange::new(at, 0);
        let mut zero = None;
        while run.count + unit <= INSTALL_STEP.max(unit) && run.end() < end {
            let is_zero = fetched.bytes_of(PageRange::new(run.end(), unit)).is_none();
            let alike = *zero.get_or_insert(is_zero) == is_zero;
            if !alike || self.states.get(run.end()) != PageState::InFlight {
                break;
            }
            run.count += unit;
        }
        run
    }

    /// Installs the pages of `piece` or the first of them, by what their bytes are (`None`: zero), and wakes who waits for
    /// them as `wake` says. Answers how many; 0 says that an event must be read first.
    pub(super) fn install(
        &self,
        stripe: &Stripe,
        piece: Piece,
        bytes: Option<&[u8]>,
        wake: Wake,
    ) -> Result<u64, PagerError> {
        let unit = self.page_size.pages();
        let pages = piece.pages;
        let Installed { bytes: done, stopped } = match (bytes, wake) {
            (Some(bytes), Wake::Later) => stripe.uffd.copy_silently(piece.start, bytes),
            _ => self.try_install(stripe, piece, bytes),
        };
        match stopped {
            _ if done > 0 => Ok(done / PAGE_SIZE as u64),
            None => Ok(pages.count),
            Some(error) if is_transient(&error) && !self.released.load(Acquire) => Ok(0),
            Some(InstallError::Changing) => Ok(0),
            // The pager before this one installed it, and was gone before it could say so; or the source did, at the same time.
            // Or demand and a fill both fetched it, and this one comes second.
            Some(InstallError::Exists)
                if self.is_uncertain(pages.start)
                    || self.source.installs()
                    || self.states.may_be_there(pages.start) =>
            {
                stripe.wake(piece.addresses());
                Ok(unit)
            }
            // The rest was settled as zero while this zero page was on its way, and a fault was faster.
            Some(InstallError::Exists) if bytes.is_none() && self.released.load(Acquire) => {
                stripe.wake(piece.addresses());
                Ok(unit)
            }
            // Otherwise pages in flight are installed by who claimed them and by nobody else.
            Some(InstallError::Exists) => {
                self.duplicate.fetch_add(unit, Relaxed);
                Err(PagerError::Unaccounted { page: pages.start })
            }
            // The region was released while these zero pages were on their way: the kernel has filled them in.
            Some(InstallError::NotRegistered) if bytes.is_none() && self.released.load(Acquire) => {
                Ok(pages.count)
            }
            Some(source) => Err(PagerError::Install {
                page: pages.start,
                source,
            }),
        }
    }

    /// The system call that the content and the region's page size ask for.
    pub(super) fn try_install(&self, stripe: &Stripe, piece: Piece, bytes: Option<&[u8]>) -> Installed {
        match (bytes, self.page_size) {
            (Some(bytes), _) => stripe.uffd.copy(piece.start, bytes),
            (None, PageSize::Small) => stripe.uffd.zero(piece.addresses()),
            // There is no ZEROPAGE for huge pages. A run of them is one unit long (`wanted_run`).
            (None, PageSize::Huge) => stripe.uffd.copy(piece.start, &ZEROS[..piece.pages.bytes()]),
        }
    }
}
