//! Know when memory mappings go away.
//!
//! A program registers ranges of its addresses. When a mapping in one of them is invalidated (unmapped, moved, given back,
//! protected), an event of that range is queued and a counter moves. The counter is in a page that the program has mapped:
//! looking at it takes no system call, and **it has moved before the call that invalidated returns**. So who keeps what was
//! learnt of a mapping (a registration with a network card, a translation) may use it as long as the counter stands still.
//! (With one watcher, `perf`, the counter is in no page, and [`Counter::load`] alone is right.)
//!
//! The interface is that of the ummunotify v2 patch, R. Dreier and E. Munson 2010, a driver that was never merged. Here there
//! is no driver: [`Notifier`] has the semantics, and a watcher behind it learns of invalidations by what today's kernels
//! offer. From the top:
//!
//! ```text
//! service         watchers in other processes
//! notifier        register, read, poll
//! stream          without registered ranges: everything in one, as it is noticed
//! queue  ranges   what is pending; which ranges an invalidation hits
//! watcher         who notices: kvm, perf, userfaultfd, or the program itself (Driven)
//! counter         the page
//! ```

#![warn(missing_docs)]

pub mod abi;
pub mod capi;
mod choice;
mod counter;
mod driven;
mod mapping;
mod notifier;
mod queue;
#[cfg(test)]
mod random;
mod ranges;
pub mod service;
mod signals;
mod stream;
mod watcher;

pub use choice::{Choice, OpenError, UnknownWatcher, WatcherKind};
pub use counter::{COUNTER_PAGE, Counter, CounterPage};
pub use driven::{Driven, Invalidation};
pub use notifier::{ExchangeError, Forked, Notifier, ReadError, RegisterError, UnregisterError};
pub use queue::Event;
pub use ranges::{AddressRange, Cookie, Ranges};
pub use stream::Stream;
pub use watcher::kvm::KvmError;
pub use watcher::perf::PerfError;
pub use watcher::userfaultfd::UserfaultfdError;
