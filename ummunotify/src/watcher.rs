//! Watchers: who notices invalidations, moves the counter, and remembers what was hit until somebody asks.

pub(crate) mod hand;
pub(crate) mod kvm;
pub(crate) mod perf;
pub(crate) mod userfaultfd;
mod vm;

use std::hint::spin_loop;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::ranges::{AddressRange, Ranges};

/// What a watcher has noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Noticed {
    /// The mappings in a range were invalidated.
    Invalidated(AddressRange),
    /// Mappings went elsewhere.
    Moved {
        /// Where they were.
        from: AddressRange,
        /// Where they are, still watched as if that had been asked for.
        to: AddressRange,
    },
    /// More than could be remembered.
    Everything,
}

/// A watcher's side of a notifier, which calls it under its lock.
///
/// A watcher moves its counter once for each invalidation that hits something it was asked to watch, before the call that
/// invalidates returns. It never waits for the notifier, whose lock may be held by the very thread that invalidates.
pub(crate) trait Watcher: Send {
    /// From now on also watches `range`.
    fn watch(&mut self, range: AddressRange) -> io::Result<()>;

    /// No longer watches `range`, except for what `ranges`, all that are still registered, have of it.
    fn unwatch(&mut self, range: AddressRange, ranges: &Ranges);

    /// Hands over what was noticed, and returns a value of the counter: all that it counts has been handed over by now.
    fn drain(&mut self, noticed: &mut dyn FnMut(Noticed)) -> u64;

    /// A descriptor that is readable while there is something to drain. `None`: nothing happens but by the notifier's doing.
    fn descriptor(&self) -> Option<BorrowedFd<'_>>;

    /// From now on somebody waits on that descriptor; before, nobody needs to be woken. What was noticed before this need not
    /// make it readable: it is drained after this.
    fn wake(&mut self);
}

/// Waits for what another thread or a program of the kernel's does within a few instructions, unless it is interrupted there.
pub(crate) fn wait_for<T>(mut done: impl FnMut() -> Option<T>) -> T {
    /// How often it is looked before the CPU is left to others.
    const SPINS: u32 = 200;
    let mut spins = 0;
    loop {
        if let Some(value) = done() {
            return value;
        }
        if spins < SPINS {
            spins += 1;
            spin_loop();
        } else {
            // Not yield, which leaves the CPU to nobody of a lower priority.
            std::thread::sleep(Duration::from_micros(20));
        }
    }
}
