//! An image that is served, and whether it still is what it was.
//!
//! A file that replaces another one by its name does no harm: the one that was opened goes on being served. One that is
//! written to or truncated in place does. It is noticed by its size and the time of its last change, which are looked at after
//! every read; from then on each page is compared with its checksum before it is sent. Damage that leaves no such trace is
//! found by the fetchers, to whom the checksums are sent with the pages.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rustix::fs::fstat;

use super::STEP;
use super::provider::{Provider, Unreadable};
use crate::image::{Image, Layer, ReadError, Wait};
use crate::units::{PAGE_SIZE, PageRange};

#[derive(Debug)]
pub(super) struct Served {
    pub(super) name: String,
    pub(super) image: Arc<Image>,
    /// Of each layer, when it was opened.
    states: Vec<State>,
    /// Somebody has written to a file of it, or may have.
    altered: AtomicBool,
    /// It was seen that what is there is not what was.
    damaged: AtomicBool,
}

/// What changes when a file is written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    size: i64,
    changed: (i64, u64),
}

impl State {
    fn of(layer: &Layer) -> rustix::io::Result<Self> {
        let stat = fstat(&layer.file)?;
        Ok(Self {
            size: stat.st_size,
            changed: (stat.st_mtime, stat.st_mtime_nsec),
        })
    }
}

impl Served {
    pub(super) fn new(name: String, image: Arc<Image>) -> rustix::io::Result<Self> {
        Ok(Self {
            name,
            states: image.layers().map(State::of).collect::<Result<_, _>>()?,
            image,
            altered: AtomicBool::new(false),
            damaged: AtomicBool::new(false),
        })
    }

    /// Whether a new client may have it. Looks at its files only if one was written to.
    pub(super) fn is_sound(&self) -> bool {
        if !self.damaged.load(Relaxed) && self.is_altered() && !self.ends_are_there() {
            self.damage();
        }
        !self.damaged.load(Relaxed)
    }

    /// Reads `pages`, whose checksums are `expected`. `None`: it would have to wait.
    fn read_content(
        &self,
        pages: PageRange,
        wait: Wait,
        expected: &[u64],
        buffer: &mut [u8],
    ) -> Result<Option<()>, ReadError> {
        let read = self.note(self.image.read(pages, wait, buffer))?;
        // After the read, so that what was written before it is noticed.
        if read.is_some() && self.is_altered() {
            for ((page, content), expected) in pages.pages().zip(buffer.chunks(PAGE_SIZE)).zip(expected) {
                self.note(self.image.check(page, content, *expected))?;
            }
        }
        Ok(read)
    }

    /// The checksums of `pages`. `None`: it would have to wait.
    fn checksums(&self, pages: PageRange, wait: Wait, into: &mut [u64]) -> Result<Option<()>, ReadError> {
        self.note(self.image.checksums(pages, wait, into))
    }

    fn note<T>(&self, read: Result<T, ReadError>) -> Result<T, ReadError> {
        if let Err(ReadError::Corrupt { .. } | ReadError::Truncated { .. }) = read {
            self.damage();
        }
        read
    }

    fn damage(&self) {
        if !self.damaged.swap(true, Relaxed) {
            tracing::warn!(image = self.name, path = %self.image.path().display(), "image is damaged: nobody new is given it");
        }
    }

    fn is_altered(&self) -> bool {
        if self.altered.load(Relaxed) {
            return true;
        }
        let mut layers = self.image.layers().zip(&self.states);
        let altered = layers.any(|(layer, state)| State::of(layer) != Ok(*state));
        if altered && !self.altered.swap(true, Relaxed) {
            tracing::warn!(
                image = self.name,
                path = %self.image.path().display(),
                "image was written to while it is served: each page is compared with its checksum from now on"
            );
        }
        altered
    }

    /// Whether the end of each file is what and where it was: another image that was written over one has another footer.
    fn ends_are_there(&self) -> bool {
        let mut layers = self.image.layers().zip(&self.states);
        layers.all(|(layer, state)| {
            let size = State::of(layer).map(|state| state.size);
            size == Ok(state.size) && layer.footer_is_there(state.size as u64)
        })
    }
}

impl Provider for Served {
    fn pages(&self) -> u64 {
        self.image.pages()
    }

    fn read(
        &self,
        pages: PageRange,
        wait: Wait,
        checksums: &mut [u64],
        buffer: &mut [u8],
    ) -> Result<Option<()>, Unreadable> {
        if self.checksums(pages, wait, checksums)?.is_none() {
            return Ok(None);
        }
        if checksums.iter().all(|checksum| *checksum == 0) {
            return Ok(Some(()));
        }
        Ok(self.read_content(pages, wait, checksums, buffer)?)
    }

    /// By the checksum table.
    fn next_data(&self, within: PageRange) -> Result<Option<PageRange>, Unreadable> {
        let mut checksums = [0; STEP as usize];
        let mut run: Option<PageRange> = None;
        let mut at = within.start;
        while at < within.end() {
            let step = PageRange::new(at, STEP).clamp_to(within.end());
            let checksums = &mut checksums[..step.count as usize];
            // May wait, so it never answers that it would have to.
            let _ = self.checksums(step, Wait::Yes, checksums)?;
            for (page, checksum) in step.pages().zip(checksums) {
                match (&mut run, *checksum != 0) {
                    (None, true) => run = Some(PageRange::single(page)),
                    (Some(run), true) => run.count += 1,
                    (Some(run), false) => return Ok(Some(*run)),
                    (None, false) => {}
                }
            }
            at = step.end();
        }
        Ok(run)
    }

    fn metadata(&self) -> &[u8] {
        self.image.metadata()
    }
}
