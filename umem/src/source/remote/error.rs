//! What can go wrong with a page server.

use std::io;
use std::time::Duration;

use crate::channel::ChannelError;
use crate::stats::seconds;
use crate::units::{PageIndex, PageRange};
use crate::wire::{FailCode, RefuseCode};

/// Why a page server does not give pages.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// It cannot be reached.
    #[error("cannot connect to {url}")]
    Connect {
        /// The server.
        url: String,
        /// Why.
        source: io::Error,
    },
    /// It does not want to.
    #[error("{url} refused: {code}{}{text}", if text.is_empty() { "" } else { ": " })]
    Refused {
        /// The server.
        url: String,
        /// Why.
        code: RefuseCode,
        /// Why, in its words.
        text: String,
    },
    /// It was to call, and has not.
    #[error("{name} has not called")]
    NobodyCalled {
        /// Who was to call.
        name: String,
    },
    /// The channel ended.
    #[error("the connection to {url} failed")]
    Channel {
        /// The server.
        url: String,
        /// Why.
        source: ChannelError,
    },
    /// It has lost the page.
    #[error("{url} cannot give pages {pages}: {code}{}{text}", if text.is_empty() { "" } else { ": " })]
    Failed {
        /// The server.
        url: String,
        /// The pages.
        pages: PageRange,
        /// Why.
        code: FailCode,
        /// Why, in its words.
        text: String,
    },
    /// It sends a page that is not what was put there, also when asked again.
    #[error("page {page} from {url} does not match its checksum")]
    Corrupt {
        /// The server.
        url: String,
        /// The page.
        page: PageIndex,
    },
    /// It was not reached again in time, or was and gave nothing.
    #[error("no page server was reached and gave an answer for {}, last tried {url}", seconds(*.after))]
    TimedOut {
        /// How long it was tried.
        after: Duration,
        /// The last that was tried.
        url: String,
        /// Why it was not reached.
        source: Box<Self>,
    },
    /// This side is ending.
    #[error("the source is closed")]
    Closed,
}
