//! Which watcher notices invalidations.

use std::fmt;
use std::io;
use std::str::FromStr;

use crate::counter::Counter;
use crate::watcher::Watcher;
use crate::watcher::kvm::{Kvm, KvmError};
use crate::watcher::userfaultfd::{UserfaultfdError, UserfaultfdWatcher};

/// Who notices invalidations. `docs/ummunotify.md` says what each of them sees and needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatcherKind {
    /// KVM's MMU notifier, and a BPF program at its tracepoint.
    Kvm,
    /// A userfaultfd, by its events.
    Userfaultfd,
    /// Who drives the notifier: [`crate::Driven`].
    Hand,
}

impl fmt::Display for WatcherKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
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
    /// This one or none.
    Only(WatcherKind),
}

/// There is no such watcher.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no watcher {0:?}: auto, kvm, userfaultfd")]
pub struct UnknownWatcher(String);

impl FromStr for Choice {
    type Err = UnknownWatcher;

    fn from_str(name: &str) -> Result<Self, UnknownWatcher> {
        match name {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Only(WatcherKind::Kvm)),
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
    /// A userfaultfd cannot watch.
    #[error("the watcher userfaultfd is not to be had")]
    Userfaultfd(#[source] UserfaultfdError),
    /// No watcher is there.
    #[error("no watcher is to be had, neither kvm ({kvm}) nor userfaultfd")]
    None {
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
                open_userfaultfd().map_err(|userfaultfd| OpenError::None { kvm, userfaultfd })
            }),
            Self::Only(WatcherKind::Kvm) => open_kvm().map_err(OpenError::Kvm),
            Self::Only(WatcherKind::Userfaultfd) => open_userfaultfd().map_err(OpenError::Userfaultfd),
            Self::Only(WatcherKind::Hand) => Err(OpenError::Hand),
        }
    }
}

fn open_kvm() -> Result<Opened, KvmError> {
    let (watcher, counter) = Kvm::open()?;
    Ok((WatcherKind::Kvm, Box::new(watcher), counter))
}

fn open_userfaultfd() -> Result<Opened, UserfaultfdError> {
    let (watcher, counter) = UserfaultfdWatcher::open()?;
    Ok((WatcherKind::Userfaultfd, Box::new(watcher), counter))
}
