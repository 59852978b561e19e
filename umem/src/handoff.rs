//! Memory of one process, served by a pager in another.
//!
//! ```text
//!   the process with the memory (AttachedPager)          the process with the pager (PagerHost)
//!        |  Describe {image}  ----------------------------> |
//!        |  <---------------------- Image {pages, digest, metadata}
//!        |  makes the region, registers it                  |
//!        |  Serve {stripes, fill, ...} + descriptors -----> |   takes over: page states as they are,
//!        |  <------------------------------------- Serving  |   what was in flight is fetched again
//!        |                                                  |
//!        |  Ping ------------------- Pong                   |   faults come to the pager alone, which
//!        |  <-------------------------- AllPagesPresent     |   installs pages in the other's memory
//!        |  <------------------------------ Failed {kind}   |
//!        |  Stop ------------------------------------------>|
//!        |  <---------------------------- Stopped {figures} |
//! ```
//!
//! A message is its length (u32, little-endian) and that many bytes of JSON; descriptors come with the first byte. `Serve`
//! brings, in this order: the page-state table (a sealed memfd), the memory's own memfd if it has one, a memfd with the
//! working set if there is one, and a userfaultfd for each stripe.
//!
//! **When the pager's process dies** nothing is lost: the process with the memory keeps its own descriptors of everything, and
//! the page-state table is its own. Faults that were unread stay in the userfaultfd; whoever waits for an answer to one that
//! was read is woken and faults again. The next pager finds in the table what is settled. What was in flight may have been
//! installed or not: it is fetched again, and if it is there, that is as well, because nobody but a pager installs anything.
//! Until then who needs a missing page waits; a userfaultfd that one process still holds is never silently zero.
//!
//! **What a dead pager may take with it** is the knowledge of memory that was just being dropped: it had read the event, which
//! lets the dropping thread go on, and had not marked the pages. So whoever drops memory that is served by another process marks
//! it too, in the table, after the dropping call has returned and before anybody may use the memory again.

mod attached;
mod host;
mod passing;

use serde::{Deserialize, Serialize};

use crate::pager::FaultClass;
use crate::source::SourceStats;
use crate::stats::Summary;
use crate::units::{HostAddress, PageIndex, PageRange};

pub use attached::{AttachError, AttachedPager, ImageDescription, PagerAddress};
pub use host::PagerHost;
pub use passing::PassingError;

/// The version of the messages. Those of another one are refused.
pub const VERSION: u32 = 1;

/// A message.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "kebab-case", rename_all_fields = "kebab-case")]
enum Message {
    /// What is there under this name; empty: the only image.
    Describe { version: u32, image: String },
    /// An image, and what its maker wrote beside it.
    Image {
        pages: u64,
        digest: [u8; 32],
        metadata: Vec<u8>,
    },
    /// Memory to be served.
    Serve(Box<Serve>),
    /// It is.
    Serving,
    /// It is not, or nothing is there.
    Refused { text: String },
    /// Every page is there, and the memory ordinary.
    AllPagesPresent,
    /// A page cannot be had.
    Failed { kind: FailureKind, text: String },
    /// Answered at once.
    Ping,
    /// The answer.
    Pong,
    /// The memory is not used any more.
    Stop,
    /// Nothing is served any more.
    Stopped(Box<Figures>),
}

/// Memory to be served.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Serve {
    version: u32,
    image: String,
    digest: [u8; 32],
    /// Bytes installed at a time: 4096 or 2097152.
    page_size: u64,
    fill: FillKind,
    /// Whether the memory's own memfd is among the descriptors.
    memfd: bool,
    stripes: Vec<StripePlace>,
}

/// A stripe's pages, and where they are in the process that sends this.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct StripePlace {
    first_page: u64,
    pages: u64,
    address: u64,
}

impl StripePlace {
    fn pages(self) -> PageRange {
        PageRange::new(PageIndex(self.first_page), self.pages)
    }

    fn start(self) -> HostAddress {
        HostAddress(self.address)
    }
}

/// What loads pages that nobody has asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum FillKind {
    Off,
    Sequential,
    NearFaults,
    /// The working set is among the descriptors.
    Recorded,
}

/// Why a page cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum FailureKind {
    /// What the source has is not what was put there.
    Corrupt,
    /// The source cannot be read.
    Lost,
    /// The pager cannot go on.
    Pager,
}

/// What a pager counts that is not in the page-state table.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Figures {
    duplicate: u64,
    faults: Summary,
    fault_classes: [Summary; FaultClass::ALL.len()],
    source: SourceStats,
}
