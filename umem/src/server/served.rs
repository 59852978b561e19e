//! An image that is served, and whether it still is what it was.
//!
//! A file that replaces another one by its name does no harm: the one that was opened goes on being served. One that is
//! written to or truncated in place does. It is noticed by its size and the time of its last change, which are looked at after
//! every read; from then on each page is compared with its checksum before it is sent. Damage that leaves no such trace is
//! found by the fetchers, to whom the checksums are sent with the pages.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rustix::fs::fstat;

use crate::image::{FOOTER_SIZE, Footer, Image, ReadError, Wait};
use crate::units::{PAGE_SIZE, PageRange};

#[derive(Debug)]
pub(super) struct Served {
    pub(super) name: String,
    pub(super) image: Arc<Image>,
    state: State,
    /// Somebody has written to the file, or may have.
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
    fn of(image: &Image) -> rustix::io::Result<Self> {
        let stat = fstat(&image.file)?;
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
            state: State::of(&image)?,
            image,
            altered: AtomicBool::new(false),
            damaged: AtomicBool::new(false),
        })
    }

    /// Whether a new client may have it. Looks at the file only if it was written to.
    pub(super) fn is_sound(&self) -> bool {
        if !self.damaged.load(Relaxed) && self.is_altered() {
            let size = fstat(&self.image.file).map(|stat| stat.st_size);
            if size != Ok(self.state.size) || !self.footer_is_there() {
                self.damage();
            }
        }
        !self.damaged.load(Relaxed)
    }

    /// Reads `pages`, whose checksums are `expected`. `None`: it would have to wait.
    pub(super) fn read(
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
    pub(super) fn checksums(
        &self,
        pages: PageRange,
        wait: Wait,
        into: &mut [u64],
    ) -> Result<Option<()>, ReadError> {
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
        let altered = State::of(&self.image) != Ok(self.state);
        if altered && !self.altered.swap(true, Relaxed) {
            tracing::warn!(
                image = self.name,
                path = %self.image.path().display(),
                "image was written to while it is served: each page is compared with its checksum from now on"
            );
        }
        altered
    }

    /// Whether the file's end is what it was: another image that was written over it has another footer.
    fn footer_is_there(&self) -> bool {
        let mut bytes = [0; FOOTER_SIZE];
        let at = self.state.size as u64 - FOOTER_SIZE as u64;
        self.image.file.read_exact_at(&mut bytes, at).is_ok()
            && Footer::decode(&bytes).is_ok_and(|footer| footer == *self.image.footer())
    }
}
