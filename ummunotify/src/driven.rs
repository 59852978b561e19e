//! A notifier that a program drives by hand: it is the program that knows of invalidations.

use std::io;
use std::ops::Deref;

use crate::choice::WatcherKind;
use crate::counter::{Counter, CounterPage, OwnCounter};
use crate::notifier::{Forked, Notifier};
use crate::ranges::AddressRange;
use crate::watcher::hand::Hand;

/// A notifier whose invalidations are those that [`Driven::begin`] and [`Driven::invalidate`] are told of. The addresses may
/// be those of anything.
///
/// ```
/// use ummunotify::{AddressRange, Cookie, Driven, Event};
///
/// let notifier = Driven::new()?;
/// notifier.register(AddressRange::new(0, 0x1000), Cookie(1))?;
/// notifier.invalidate(AddressRange::new(0x800, 0x2000))?;
/// assert_eq!(notifier.counter().load(), 1);
/// assert_eq!(
///     notifier.try_read(10)?,
///     [
///         Event::Invalidated { cookie: Cookie(1), part: AddressRange::new(0x800, 0x1000), exact: true },
///         Event::Last { counter: 1 },
///     ]
/// );
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Driven {
    notifier: Notifier,
    counter: OwnCounter,
    page: CounterPage,
}

/// An invalidation that is going on. It ends when this is dropped.
#[derive(Debug)]
#[must_use = "the invalidation ends when this is dropped"]
pub struct Invalidation<'a> {
    driven: &'a Driven,
    range: AddressRange,
    /// Ranges registered meanwhile have higher numbers.
    number: u64,
    hit: bool,
}

impl Invalidation<'_> {
    /// Whether a range that was registered when it began is hit.
    pub fn hit(&self) -> bool {
        self.hit
    }
}

impl Driven {
    /// One with no range.
    pub fn new() -> io::Result<Self> {
        let (counter, page) = OwnCounter::new()?;
        let watcher = Box::new(Hand(page.clone()));
        let notifier = Notifier::with(WatcherKind::Hand, watcher, Counter::of(page.clone()))?;
        Ok(Self {
            notifier,
            counter,
            page,
        })
    }

    /// The counter, which always has a page.
    pub fn counter(&self) -> &CounterPage {
        &self.page
    }

    /// What lies behind a range is about to change. When this returns, the events are there and the counter has moved.
    ///
    /// Who registers a range before the change is done may have looked at what goes away; so when the invalidation ends, it
    /// is an event of the ranges registered since it began.
    pub fn begin(&self, range: AddressRange) -> Result<Invalidation<'_>, Forked> {
        let (hit, number) = self.invalidate_since(range, 0)?;
        Ok(Invalidation {
            driven: self,
            range,
            number,
            hit,
        })
    }

    /// What lay behind a range has changed. Whether a registered range is hit.
    pub fn invalidate(&self, range: AddressRange) -> Result<bool, Forked> {
        Ok(self.invalidate_since(range, 0)?.0)
    }

    /// Whether there is something to read.
    pub(crate) fn is_readable(&self) -> bool {
        self.notifier.lock().is_ok_and(|state| state.queue.readable())
    }

    /// Moves the counter for whoever looks at nothing else.
    pub(crate) fn move_counter(&self) {
        self.counter.increment();
    }

    /// Of ranges that have at least this number. Whether one is hit, and the number of the next.
    fn invalidate_since(&self, range: AddressRange, number: u64) -> Result<(bool, u64), Forked> {
        let mut state = self.notifier.lock()?;
        let hit = state.queue.invalidate_since(range, number);
        if hit {
            self.counter.increment();
        }
        self.notifier.announce(&mut state);
        Ok((hit, state.queue.number()))
    }
}

impl Deref for Driven {
    type Target = Notifier;

    fn deref(&self) -> &Notifier {
        &self.notifier
    }
}

impl Drop for Invalidation<'_> {
    fn drop(&mut self) {
        // A child made by fork meanwhile has nobody to tell.
        let _ = self.driven.invalidate_since(self.range, self.number);
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;
    use crate::notifier::{ExchangeError, RegisterError, UnregisterError};
    use crate::queue::Event;
    use crate::ranges::Cookie;

    const RANGE: AddressRange = AddressRange::new(0x1000, 0x2000);

    fn is_readable(notifier: &Notifier) -> bool {
        let descriptor = notifier.descriptor().unwrap();
        let at_once = Timespec::default();
        poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&at_once)).unwrap() == 1
    }

    #[test]
    fn features_are_exchanged_before_anything_else() {
        let notifier = Driven::new().unwrap();
        assert_eq!(notifier.exchange_features(u32::MAX), Ok(0));
        assert_eq!(notifier.exchange_features(0), Err(ExchangeError::InUse));

        let notifier = Driven::new().unwrap();
        notifier.register(RANGE, Cookie(1)).unwrap();
        assert_eq!(notifier.exchange_features(0), Err(ExchangeError::InUse));

        let notifier = Driven::new().unwrap();
        assert!(notifier.try_read(1).unwrap().is_empty());
        assert_eq!(notifier.exchange_features(0), Err(ExchangeError::InUse));

        // As in the driver, this is no use.
        let notifier = Driven::new().unwrap();
        assert_eq!(
            notifier.unregister(Cookie(1)),
            Err(UnregisterError::UnknownCookie)
        );
        assert_eq!(notifier.exchange_features(1), Ok(0));
    }

    #[test]
    fn what_cannot_be_registered_changes_nothing() {
        let notifier = Driven::new().unwrap();
        notifier.register(RANGE, Cookie(1)).unwrap();
        let again = notifier.register(RANGE, Cookie(1));
        assert!(matches!(again, Err(RegisterError::CookieInUse)));
        let wraps = notifier.register(AddressRange::new(u64::MAX, 0x1000), Cookie(2));
        assert!(matches!(wraps, Err(RegisterError::EndsBeforeItStarts)));
        notifier.invalidate(AddressRange::ALL).unwrap();
        assert_eq!(notifier.try_read(10).unwrap().len(), 2);
    }

    #[test]
    fn it_is_readable_until_the_last_event_was_read() {
        let notifier = Driven::new().unwrap();
        notifier.register(RANGE, Cookie(1)).unwrap();
        assert!(!is_readable(&notifier));
        notifier.invalidate(AddressRange::new(0x2000, 0x3000)).unwrap();
        assert!(!is_readable(&notifier));
        assert_eq!(notifier.counter().load(), 0);
        notifier.invalidate(RANGE).unwrap();
        assert!(is_readable(&notifier));
        assert_eq!(notifier.try_read(1).unwrap().len(), 1);
        assert!(is_readable(&notifier));
        assert_eq!(notifier.try_read(1).unwrap(), [Event::Last { counter: 1 }]);
        assert!(!is_readable(&notifier));
        notifier.invalidate(RANGE).unwrap();
        notifier.unregister(Cookie(1)).unwrap();
        assert!(!is_readable(&notifier));
    }

    #[test]
    fn a_reader_that_waits_is_woken() {
        let notifier = Driven::new().unwrap();
        notifier.register(RANGE, Cookie(1)).unwrap();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| notifier.read(10).unwrap());
            notifier.invalidate(RANGE).unwrap();
            assert_eq!(reader.join().unwrap().len(), 2);
        });
    }

    #[test]
    fn what_is_registered_during_an_invalidation_hears_of_it() {
        let notifier = Driven::new().unwrap();
        notifier.register(RANGE, Cookie(1)).unwrap();
        let invalidation = notifier.begin(RANGE).unwrap();
        assert_eq!(notifier.try_read(10).unwrap().len(), 2);
        notifier.register(RANGE, Cookie(2)).unwrap();
        notifier
            .register(AddressRange::new(0x2000, 0x3000), Cookie(3))
            .unwrap();
        assert_eq!(notifier.counter().load(), 1);
        drop(invalidation);
        assert_eq!(notifier.counter().load(), 2);
        assert_eq!(
            notifier.try_read(10).unwrap(),
            [
                Event::Invalidated {
                    cookie: Cookie(2),
                    part: RANGE,
                    exact: true
                },
                Event::Last { counter: 2 }
            ]
        );
        // Registered after its end: no.
        notifier.unregister(Cookie(2)).unwrap();
        notifier.begin(RANGE).map(drop).unwrap();
        notifier.register(RANGE, Cookie(4)).unwrap();
        assert_eq!(notifier.try_read(10).unwrap().len(), 2);
    }
}
