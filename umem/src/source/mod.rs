//! Where pages come from.

pub mod file;
pub mod zero;

use crate::image::ReadError;
use crate::units::{PageIndex, PageRange};

/// What a page range holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// All zero; the buffer was not written.
    Zero,
    /// What was written to the buffer.
    Data,
}

/// Why a source cannot give a page.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// What it has is not what was put there.
    #[error(transparent)]
    Corrupt(ReadError),
    /// It cannot be reached or read.
    #[error(transparent)]
    Lost(ReadError),
}

impl From<ReadError> for SourceError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Corrupt { .. } | ReadError::Truncated { .. } => Self::Corrupt(error),
            ReadError::Io { .. } => Self::Lost(error),
        }
    }
}

/// What a source has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourceStats {
    /// Bytes of page content that it gave.
    pub bytes: u64,
    /// Requests that it answered.
    pub requests: u64,
}

/// Where the pages of a region come from. It is asked from several threads at once.
pub trait PageSource: Send + Sync {
    /// Its name for people, as a source URL.
    fn url(&self) -> String;

    /// The content of `pages`, at once or not at all: `None` says that it would have to wait. `buffer` is as long as
    /// `pages`. Called by the thread that reads faults, so it must neither block nor allocate.
    fn try_read(&self, pages: PageRange, buffer: &mut [u8]) -> Result<Option<Content>, SourceError>;

    /// The content of `pages`. `buffer` is as long as `pages`.
    fn read(&self, pages: PageRange, buffer: &mut [u8]) -> Result<Content, SourceError>;

    /// The next run of pages at or after `from` that may hold something; everything before it is zero. Of pages that are
    /// in no such run nothing is ever fetched by a background fill.
    fn next_data(&self, from: PageIndex) -> Result<Option<PageRange>, SourceError>;

    /// What it has done so far.
    fn stats(&self) -> SourceStats;
}
