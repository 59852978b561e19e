//! A program as a page source: what is wanted goes into a pipe.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, OnceLock, Weak};

use rustix::io::Errno;

use super::shared::Parts;
use super::{DeviceError, Serving};
use crate::source::{Class, Content, PageSink, PageSource, SourceError, SourceStats};
use crate::units::{PageIndex, PageRange};

pub(super) struct DeviceSource {
    parts: Arc<Parts>,
    /// The pipe's end that is written.
    requests: OwnedFd,
    sink: OnceLock<Weak<dyn PageSink + Send + Sync>>,
    asked: AtomicU64,
    /// Nobody is to be waited for any more.
    closed: AtomicBool,
}

impl DeviceSource {
    pub(super) fn new(parts: Arc<Parts>, requests: OwnedFd) -> Self {
        Self {
            parts,
            requests,
            sink: OnceLock::new(),
            asked: AtomicU64::new(0),
            closed: AtomicBool::new(false),
        }
    }

    /// Installs what was kept and is not there yet, of those pages that are `within`. By the pager, which knows where they are now.
    /// Not for its fault thread, for which it may have to wait.
    pub(super) fn install_kept(&self, within: PageRange) -> Result<(), DeviceError> {
        let Some(sink) = self.sink.get().and_then(Weak::upgrade) else {
            return Ok(());
        };
        let mut buffer = vec![0; super::shared::STEP as usize * crate::units::PAGE_SIZE];
        let mut rest = within;
        while let Some(mut run) = self.parts.waiting(rest) {
            rest = rest.from(run.end());
            while let Some((step, _)) = self.parts.claim_next(&mut run) {
                self.parts.read_stash(step, &mut buffer)?;
                sink.arrived(step, Content::Data, &buffer[..step.bytes()], Class::Demand);
            }
        }
        Ok(())
    }

    fn ask(&self, page: PageIndex) -> Result<(), Errno> {
        rustix::io::write(&self.requests, &page.0.to_ne_bytes()).map(drop)
    }
}

impl PageSource for DeviceSource {
    fn url(&self) -> String {
        "device:".to_owned()
    }

    /// What was kept.
    fn try_read(&self, pages: PageRange, buffer: &mut [u8]) -> Result<Option<Content>, SourceError> {
        if !self.parts.is_served(pages.start) {
            return Ok(None);
        }
        if self.parts.serving == Serving::InPlace {
            // The server never wrote to it, or it would be there.
            return Ok(Some(Content::Zero));
        }
        let read = self.parts.read_stash(pages, buffer);
        read.map_err(|error| SourceError::Lost(error.into()))?;
        Ok(Some(Content::Data))
    }

    fn read(&self, _: PageRange, _: Class, _: &mut [u8]) -> Result<Content, SourceError> {
        Err(SourceError::Lost("its pages are not read".into()))
    }

    fn next_data(&self, _: PageRange) -> Result<Option<PageRange>, SourceError> {
        Ok(None)
    }

    fn digest(&self) -> Option<[u8; 32]> {
        None
    }

    fn attach(&self, sink: Weak<dyn PageSink + Send + Sync>) {
        // Called once.
        let _ = self.sink.set(sink);
    }

    /// Asks the server. Where the pipe is full, the page is given up, and who waits for it goes on waiting until the server has read, and
    /// wakes all who wait, to ask again. The race: the server has read between the two. So the flag is up before it is tried
    /// again: either there is room, or who makes room sees the flag.
    fn submit(&self, ranges: &[PageRange], _: Class) -> bool {
        for page in ranges.iter().flat_map(|range| range.pages()) {
            self.asked.fetch_add(1, Relaxed);
            let asked = self.ask(page).or_else(|errno| {
                if errno == Errno::AGAIN {
                    self.parts.header().overflowed.store(1, SeqCst);
                    return self.ask(page);
                }
                Err(errno)
            });
            if asked.is_err() {
                // If it is that there is no server any more, the keeper finds out.
                self.parts.states.cancel(PageRange::single(page));
            }
        }
        true
    }

    fn installs(&self) -> bool {
        true
    }

    fn pause(&self) {
        let gate = &self.parts.header().gate;
        gate.close(|| self.closed.load(SeqCst));
    }

    fn resume(&self, moved: bool) {
        let gate = &self.parts.header().gate;
        if moved {
            gate.note_move();
        }
        gate.open();
    }

    fn close(&self) {
        self.parts.header().gate.note_move();
        self.closed.store(true, SeqCst);
    }

    fn may_map(&self, page: PageIndex) -> bool {
        self.parts.is_served(page)
    }

    fn stats(&self) -> SourceStats {
        SourceStats {
            requests: self.asked.load(Relaxed),
            ..SourceStats::default()
        }
    }
}
