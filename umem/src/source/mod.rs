//! Where pages come from.

pub mod delayed;
pub mod file;
pub mod remote;
pub mod zero;

use std::error::Error;
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};

use serde::{Deserialize, Serialize};

use crate::image::ReadError;
use crate::units::{PageIndex, PageRange};

pub use crate::wire::{MAX_REQUEST_PAGES, MAX_REQUEST_RANGES};

/// What a page range holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// All zero; the buffer was not written.
    Zero,
    /// What was written to the buffer.
    Data,
}

/// Who wants pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Somebody who waits for them.
    Demand,
    /// A fill.
    Background,
}

/// Why a source cannot give a page.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// What it has is not what was put there.
    #[error(transparent)]
    Corrupt(Box<dyn Error + Send + Sync>),
    /// It cannot be reached or read.
    #[error(transparent)]
    Lost(Box<dyn Error + Send + Sync>),
}

impl From<ReadError> for SourceError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Corrupt { .. } | ReadError::Truncated { .. } => Self::Corrupt(error.into()),
            ReadError::Io { .. } => Self::Lost(error.into()),
        }
    }
}

/// What a source has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceStats {
    /// Bytes of page content that it gave.
    pub bytes: u64,
    /// Requests that it answered.
    pub requests: u64,
    /// Connections that were lost and made anew.
    pub reconnects: u64,
}

/// Where pages go that a source was asked for by [`PageSource::submit`]. Called from the source's own threads, or by who calls
/// [`Inbox::receive`].
pub trait PageSink {
    /// Some of the pages that were submitted have come.
    fn arrived(&self, pages: PageRange, content: Content, buffer: &[u8], class: Class);

    /// All that was asked for by one `submit` has come.
    fn completed(&self, class: Class);

    /// Pages that were submitted will not come.
    fn failed(&self, error: SourceError);

    /// The source is out of reach. It is looked for, and until it is [back](Self::back) nothing comes.
    fn lost(&self, _why: &dyn Error) {}

    /// The source is in reach again.
    fn back(&self) {}
}

/// The receiving of what a source was asked for by [`PageSource::submit`] as demand, lent to one thread. Dropping it gives it
/// back.
pub trait Inbox: AsFd {
    /// Takes some of what has come, if anything has, and hands it to `sink`; what is not for that goes where it belongs. Never
    /// waits. To be called whenever the descriptor can be read.
    fn receive(&self, sink: &dyn PageSink) -> Received;
}

/// What is to be done about an [`Inbox`] after something was taken from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// There may be more, which the descriptor need not show.
    More,
    /// If there is more, the descriptor shows it.
    All,
    /// It is to be dropped: nothing more comes here. What was asked for comes by the source's own threads, until another inbox is
    /// lent.
    Over,
}

/// Where the pages of a region come from. It is asked from several threads at once.
pub trait PageSource: Send + Sync {
    /// Its name for people, as a source URL.
    fn url(&self) -> String;

    /// The content of `pages`, at once or not at all: `None` says that it would have to wait. `buffer` is as long as
    /// `pages`. Called by the thread that reads faults, so it must neither block nor allocate.
    fn try_read(&self, pages: PageRange, buffer: &mut [u8]) -> Result<Option<Content>, SourceError>;

    /// The content of `pages`, for who waits as `class` says. `buffer` is as long as `pages`.
    fn read(&self, pages: PageRange, class: Class, buffer: &mut [u8]) -> Result<Content, SourceError>;

    /// The first run of pages in `within` that may hold something; everything before it is zero, and `None` says that all of
    /// `within` is. Of pages that are in no such run nothing is ever fetched by a background fill. May wait.
    fn next_data(&self, within: PageRange) -> Result<Option<PageRange>, SourceError>;

    /// The identity of the content: two sources with the same one hold the same pages. `None`: it has none.
    fn digest(&self) -> Option<[u8; 32]>;

    /// The identity of the content if no page is another than in the image that has this digest, as it may be where something is
    /// laid over an image.
    fn exact_digest(&self) -> Option<[u8; 32]> {
        self.digest()
    }

    /// Where pages go that are submitted. Called once, before anything else is asked.
    fn attach(&self, _sink: Weak<dyn PageSink + Send + Sync>) {}

    /// Asks for `ranges` in one request, without waiting; they go to the sink. At most [`MAX_REQUEST_RANGES`] ranges and
    /// [`MAX_REQUEST_PAGES`] pages. False: this source is not asked so, but by `read`.
    fn submit(&self, _ranges: &[PageRange], _class: Class) -> bool {
        false
    }

    /// Whether it installs what was submitted by itself, in the memory that is served, and marks it in the page-state table: the
    /// pager then asks for it and has nothing more to do with it.
    fn installs(&self) -> bool {
        false
    }

    /// Of one that [installs](Self::installs): that is over for now, and nothing is installed until [`resume`](Self::resume). The pager
    /// calls it before it reads events, and when it has marked what they say, the other.
    fn pause(&self) {}

    /// It may install again. `moved`: some of the memory is not where it was, and is the pager's alone from now on.
    fn resume(&self, _moved: bool) {}

    /// Whether a page that is in the shared memory behind the region may be mapped there. Not if somebody else than the pager writes
    /// to that memory, and has not said that the page is whole.
    fn may_map(&self, _page: PageIndex) -> bool {
        true
    }

    /// Another way to the same content, for who reads beside a pager: if it is lost, this one is not. `None`: there is no need
    /// of another, because reads of this one fail for themselves alone.
    fn beside(&self) -> Result<Option<Arc<dyn PageSource>>, SourceError> {
        Ok(None)
    }

    /// Lends the receiving of what is submitted as demand, if that can be lent now, to the thread that submits it, which then is
    /// woken once for an answer where two threads would be. Does not wait.
    fn lend_inbox(&self) -> Option<Box<dyn Inbox>> {
        None
    }

    /// Nothing more is wanted: whoever waits in `read` or `next_data` for something far away is let go with an error.
    fn close(&self) {}

    /// What it has done so far.
    fn stats(&self) -> SourceStats;
}
