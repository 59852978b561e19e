//! Snapshots that hold only what is not in another one.
//!
//! Two things say that a page is the base's, and each of them is enough:
//!
//! - **it cannot have changed**: pages that change have been tracked ever since RAM was the same as the base, and this one has
//!   not; or it has never been loaded, and the VM's source is the base;
//! - **it is the same**, byte for byte.
//!
//! So any snapshot of as much RAM can be the base of any other: the result is right, and what is not known is compared. A page
//! that is tracked is compared too, since it may have been written to without being changed.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use thiserror::Error;
use umem::image::{Image, OpenError, ReadError, Wait, checksum};
use umem::publish::second_name;
use umem::source::PageSource;
use umem::units::{PAGE_SIZE, PageIndex, PageRange};

use super::{FILE_NAME, SnapshotError};
use crate::dirty::{Changes, PageBitmap};

/// Why a snapshot cannot be a base.
#[derive(Debug, Error)]
pub enum BaseError {
    /// It cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// It is of other RAM.
    #[error("it has {base} pages, and the VM has {vm}")]
    Size {
        /// Its pages.
        base: u64,
        /// The VM's.
        vm: u64,
    },
    /// The new snapshot would take the place of what it needs.
    #[error("'{}' is to be replaced by the new one, which is of no use without it: choose another directory", .0.display())]
    Replaced(PathBuf),
}

/// The snapshot that another one is laid over.
pub(super) struct Base {
    image: Image,
    /// The pages that may be others than the base's, among those that the guest has. `None`: any of them.
    changed: Option<PageBitmap>,
    /// The VM's source is this base.
    is_source: bool,
    content: Box<[u8; PAGE_SIZE]>,
}

impl Base {
    /// Opens the snapshot at `path`, to lay one of `pages` pages over it that is going to be `target`.
    pub(super) fn open(path: &Path, target: &Path, pages: u64) -> Result<Self, SnapshotError> {
        let file = if path.is_dir() {
            path.join(FILE_NAME)
        } else {
            path.to_path_buf()
        };
        Self::open_file(&file, target, pages).map_err(|error| SnapshotError::Base {
            path: file,
            source: error.into(),
        })
    }

    fn open_file(file: &Path, target: &Path, pages: u64) -> Result<Self, BaseError> {
        let image = Image::open(file)?;
        if image.pages() != pages {
            return Err(BaseError::Size {
                base: image.pages(),
                vm: pages,
            });
        }
        let same = |one: &Path, other: &Path| match (one.metadata(), other.metadata()) {
            (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
            _ => false,
        };
        // What has the second name goes too.
        for replaced in [target.to_path_buf(), second_name(target)] {
            if image.layers().any(|layer| same(layer.path(), &replaced)) {
                return Err(BaseError::Replaced(replaced));
            }
        }
        Ok(Self {
            image,
            changed: None,
            is_source: false,
            content: Box::new([0; PAGE_SIZE]),
        })
    }

    pub(super) fn image(&self) -> &Image {
        &self.image
    }

    /// Takes note of what is known: which pages have changed since when, and where the VM's pages come from.
    pub(super) fn know(&mut self, changes: Option<&Changes>, source: Option<&dyn PageSource>) {
        let digest = Some(self.image.footer().digest);
        let changes = changes.filter(|changes| changes.since == digest);
        self.changed = changes.map(|changes| changes.pages.clone());
        self.is_source = source.is_some_and(|source| source.exact_digest() == digest);
    }

    /// Whether it is known which pages may have changed.
    pub(super) fn is_tracked(&self) -> bool {
        self.changed.is_some()
    }

    /// Whether it has what the VM has not loaded yet.
    pub(super) fn has_absent_pages(&self) -> bool {
        self.is_source || self.is_tracked()
    }

    /// The first run of pages in `within` that may have changed.
    pub(super) fn next_changed(&self, within: PageRange) -> Option<PageRange> {
        match &self.changed {
            None => Some(within).filter(|within| within.count > 0),
            Some(changed) => changed.next_run(within),
        }
    }

    /// Whether `page` holds `content` here too.
    pub(super) fn has(&mut self, page: PageIndex, content: &[u8; PAGE_SIZE]) -> Result<bool, SnapshotError> {
        let pages = PageRange::single(page);
        let mut expected = [0];
        // Both may wait, so they have an answer.
        let _ = self
            .image
            .checksums(pages, Wait::Yes, &mut expected)
            .map_err(|error| self.failed(error))?;
        if checksum(content) != expected[0] {
            return Ok(false);
        }
        if expected[0] == 0 {
            return Ok(true);
        }
        // Two pages may have the same checksum, and the file may be damaged.
        let _ = self
            .image
            .read(pages, Wait::Yes, &mut self.content[..])
            .map_err(|error| self.failed(error))?;
        Ok(*self.content == *content)
    }

    /// The first run of pages in `within` that are not zero here.
    pub(super) fn next_data(&self, within: PageRange) -> Result<Option<PageRange>, SnapshotError> {
        self.image
            .next_with_checksum(within)
            .map_err(|error| self.failed(error))
    }

    fn failed(&self, error: ReadError) -> SnapshotError {
        SnapshotError::Base {
            path: self.image.path().to_path_buf(),
            source: Box::new(error.into()),
        }
    }
}
