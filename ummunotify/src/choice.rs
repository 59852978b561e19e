//! Which watcher notices invalidations.

use std::fmt;
use std::io;
use std::str::FromStr;

use crate::counter::Counter;
use crate::watcher::Watcher;
use crate::watcher::kvm::{Kvm, KvmError};
use crate::watcher::perf::{Perf, PerfError};
use crate::watcher::userfaultfd::{UserfaultfdError, UserfaultfdWatcher};

/// Who notices invalidations. `docs/ummunotify.md` says what each of them sees and needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatcherKind {
    /// KVM's MMU notifier, and a BPF program at its tracepoint.
    Kvm,
    /// KVM's MMU notifier, and perf's rings at its tracepoint. The counter has no page that could be mapped.
    Perf,
    /// A userfaultfd, by its events.
    Userfaultfd,
    /// Who drives the notifier: [`crate::Driven`].
    Hand,
}

impl fmt::Display for WatcherKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Perf => "perf",
            Self::Userfaultfd => "userfaultfd",
            Self::Hand => "hand",
        })
    }
}

/// Which watcher to open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The best that this host offers.
    #[default]
    Auto,
    /// The best of those whose counter has a page.
    AutoWithPage,
    /// This one or none.
    Only(WatcherKind),
}

impl Choice {
    /// The same, for who needs the counter's page.
    #[must_use]
    pub fn with_page(self) -> Self {
        match self {
            Self::Auto => Self::AutoWithPage,
            other => other,
        }
    }
}

/// There is no such watcher.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no watcher {0:?}: auto, kvm, perf, userfaultfd")]
pub struct UnknownWatcher(String);

impl FromStr for Choice {
    type Err = UnknownWatcher;

    fn from_str(name: &str) -> Result<Self, UnknownWatcher> {
        match name {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Only(WatcherKind::Kvm)),
            "perf" => Ok(Self::Only(WatcherKind::Perf)),
            "userfaultfd" => Ok(Self::Only(WatcherKind::Userfaultfd)),
            _ => Err(UnknownWatcher(name.to_owned())),
        }
    }
}

/// Why there is no notifier.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// KVM's notifier cannot be heard.
    #[error("the watcher kvm is not to be had")]
    Kvm(#[source] KvmError),
    /// KVM's notifier cannot be heard through perf.
    #[error("the watcher perf is not to be had")]
    Perf(#[source] PerfError),
    /// A userfaultfd cannot watch.
    #[error("the watcher userfaultfd is not to be had")]
    Userfaultfd(#[source] UserfaultfdError),
    /// No watcher is there.
    #[error("no watcher is to be had, neither kvm ({kvm}) nor perf ({perf}) nor userfaultfd")]
    None {
        /// Why the first is not.
        kvm: KvmError,
        /// Why the second is not.
        perf: PerfError,
        /// Why the last is not.
        #[source]
        userfaultfd: UserfaultfdError,
    },
    /// None of those whose counter has a page is there.
    #[error("no watcher is to be had whose counter has a page, neither kvm ({kvm}) nor userfaultfd")]
    NoneWithPage {
        /// Why the first is not.
        kvm: KvmError,
        /// Why the last is not.
        #[source]
        userfaultfd: UserfaultfdError,
    },
    /// A notifier that is driven by hand is not opened but made.
    #[error("a notifier that is driven by hand has no watcher to open")]
    Hand,
    /// Anything else.
    #[error("cannot open a notifier")]
    Io(#[source] io::Error),
}

/// A watcher, and its counter.
type Opened = (WatcherKind, Box<dyn Watcher>, Counter);

impl Choice {
    pub(crate) fn open(self) -> Result<Opened, OpenError> {
        match self {
            Self::Auto => open_kvm().or_else(|kvm| {
                open_perf().or_else(|perf| {
                    open_userfaultfd().map_err(|userfaultfd| OpenError::None {
                        kvm,
                        perf,
                        userfaultfd,
                    })
                })
            }),
            Self::AutoWithPage => open_kvm().or_else(|kvm| {
                open_userfaultfd().map_err(|userfaultfd| OpenError::NoneWithPage { kvm, userfaultfd })
            }),
            Self::Only(WatcherKind::Kvm) => open_kvm().map_err(OpenError::Kvm),
            Self::Only(WatcherKind::Perf) => open_perf().map_err(OpenError::Perf),
            Self::Only(WatcherKind::Userfaultfd) => open_userfaultfd().map_err(OpenError::Userfaultfd),
            Self::Only(WatcherKind::Hand) => Err(OpenError::Hand),
        }
    }
}

fn open_kvm() -> Result<Opened, KvmError> {
    let (watcher, counter) = Kvm::open()?;
    Ok((WatcherKind::Kvm, Box::new(watcher), counter))
}

fn open_perf() -> Result<Opened, PerfError> {
    let (watcher, counter) = Perf::open()?;
    Ok((WatcherKind::Perf, Box::new(watcher), counter))
}

fn open_userfaultfd() -> Result<Opened, UserfaultfdError> {
    let (watcher, counter) = UserfaultfdWatcher::open()?;
    Ok((WatcherKind::Userfaultfd, Box::new(watcher), counter))
}
