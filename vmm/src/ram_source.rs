//! Where RAM comes from, and who brings it: a pager of this process, or one in another.

use std::sync::Arc;
use std::time::Duration;

use umem::handoff::{AttachedPager, PagerAddress};
use umem::pager::{Notice, Pager, PagerOptions, PagerStats, PreparedPager, StartError};
use umem::region::Region;
use umem::source::PageSource;
use umem::states::{PageStates, StateCounts};
use umem::units::PageIndex;

use crate::migration::{Arrival, ArrivalError};

/// Where RAM comes from.
#[derive(Clone)]
pub enum RamSource {
    /// From a source that this process asks.
    Source(Arc<dyn PageSource>),
    /// From a pager in another process.
    Pager(PagerProcess),
    /// With the machine, which moves here.
    Arriving(Arrival),
}

/// A pager in another process.
#[derive(Clone)]
pub struct PagerProcess {
    /// Where it is.
    pub address: PagerAddress,
    /// The image that it serves RAM from.
    pub digest: [u8; 32],
    /// How long it is looked for when it is lost.
    pub timeout: Duration,
    /// Pages that are not the image's.
    pub own_pages: Vec<(PageIndex, Vec<u8>)>,
}

impl RamSource {
    /// Its name for people, as a source URL.
    pub fn url(&self) -> String {
        match self {
            Self::Source(source) => source.url(),
            Self::Pager(pager) => pager.address.to_string(),
            Self::Arriving(_) => "migration:".into(),
        }
    }

    /// The identity of what is in it, if it has one.
    pub fn digest(&self) -> Option<[u8; 32]> {
        match self {
            Self::Source(source) => source.digest(),
            Self::Pager(pager) => Some(pager.digest),
            Self::Arriving(_) => None,
        }
    }

    /// The identity of the image of which every page is, if there is one.
    pub fn exact_digest(&self) -> Option<[u8; 32]> {
        match self {
            Self::Source(source) => source.exact_digest(),
            Self::Pager(pager) => Some(pager.digest).filter(|_| pager.own_pages.is_empty()),
            Self::Arriving(_) => None,
        }
    }

    /// Begins to serve `region`, or, where its pages come before the state of the machine does, prepares to.
    pub(crate) fn serve(
        &self,
        region: Arc<Region>,
        options: PagerOptions,
        observer: impl Fn(Notice) + Send + Sync + 'static,
    ) -> Result<ServingRam, ServeError> {
        Ok(ServingRam::Now(match self {
            Self::Arriving(arrival) => {
                let (states, source) = arrival.land(&region)?;
                let prepared = Pager::prepare(region, states, source, options, observer)?;
                return Ok(ServingRam::Later(prepared));
            }
            Self::Source(source) => {
                ServingPager::Own(Pager::start(region, Arc::clone(source), options, observer)?)
            }
            Self::Pager(pager) => {
                let PagerProcess {
                    address,
                    digest,
                    timeout,
                    own_pages,
                } = pager.clone();
                let pager =
                    AttachedPager::start(address, digest, timeout, region, options, &own_pages, observer)?;
                ServingPager::Attached(pager)
            }
        }))
    }
}

/// Why RAM is not served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    /// The pager does not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The machine does not arrive.
    #[error(transparent)]
    Arrival(#[from] ArrivalError),
}

/// A pager for RAM.
#[derive(Debug)]
pub(crate) enum ServingRam {
    /// That serves it.
    Now(ServingPager),
    /// That is going to, when the machine's state is there.
    Later(PreparedPager),
}

impl ServingRam {
    /// Serves it, from now on at the latest.
    pub(crate) fn begin(self) -> Result<ServingPager, StartError> {
        match self {
            Self::Now(pager) => Ok(pager),
            Self::Later(prepared) => prepared.begin().map(ServingPager::Own),
        }
    }
}

/// A pager that serves RAM.
#[derive(Debug)]
pub(crate) enum ServingPager {
    Own(Pager),
    Attached(AttachedPager),
}

impl ServingPager {
    /// Ends its work: see [`Pager::stop`].
    pub(crate) fn stop(&mut self) {
        match self {
            Self::Own(pager) => pager.stop(),
            Self::Attached(pager) => pager.stop(),
        }
    }

    /// Of RAM that was served [later](ServingRam::Later): loads what nobody touches, too.
    pub(crate) fn fill(&self) {
        if let Self::Own(pager) = self {
            pager.fill();
        }
    }

    /// What was done so far.
    pub(crate) fn stats(&self) -> PagerStats {
        match self {
            Self::Own(pager) => pager.stats(),
            Self::Attached(pager) => pager.stats(),
        }
    }

    /// How many pages are in which state.
    pub(crate) fn states(&self) -> StateCounts {
        match self {
            Self::Own(pager) => pager.states().counts(),
            Self::Attached(pager) => pager.counts(),
        }
    }

    /// For how long somebody has been waiting for a page; in vain, if the pager is another process.
    pub(crate) fn longest_wait(&self) -> Option<Duration> {
        match self {
            Self::Own(pager) => Some(pager.longest_wait()?.1),
            Self::Attached(pager) => pager.longest_wait(),
        }
    }

    /// What is known of the pages, and where those that are not there come from, if this process asks there.
    pub(crate) fn pages(&self) -> (Arc<PageStates>, Option<Arc<dyn PageSource>>) {
        match self {
            Self::Own(pager) => (pager.states(), Some(pager.source())),
            Self::Attached(pager) => (pager.states(), None),
        }
    }

    /// The page that somebody has waited for longest, where this process knows.
    pub(crate) fn missing_page(&self) -> Option<PageIndex> {
        match self {
            Self::Own(pager) => Some(pager.longest_wait()?.0),
            Self::Attached(_) => None,
        }
    }

    /// The most memory that its page-state table can take, in bytes.
    pub(crate) fn table_size(&self) -> u64 {
        match self {
            Self::Own(pager) => pager.table_size(),
            Self::Attached(pager) => pager.table_size(),
        }
    }
}
