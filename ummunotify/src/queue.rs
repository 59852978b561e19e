//! What is registered, and what there is to tell of it: the semantics of the interface, without descriptors.

use std::collections::{BTreeMap, HashMap};

use crate::abi;
use crate::ranges::{AddressRange, Cookie, Ranges};

/// What a reader is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Something in a registered range was invalidated since the last event of that range.
    Invalidated {
        /// The range's cookie.
        cookie: Cookie,
        /// What was invalidated.
        part: AddressRange,
        /// One invalidation hit the range, and just this part of it. Otherwise several did, and `part` is the whole range.
        exact: bool,
    },
    /// There are no more events: as long as the counter has this value, none has come.
    Last {
        /// The counter.
        counter: u64,
    },
}

impl From<Event> for abi::RawEvent {
    fn from(event: Event) -> Self {
        match event {
            Event::Invalidated { cookie, part, exact } => Self {
                kind: abi::EVENT_TYPE_INVAL,
                flags: if exact { abi::EVENT_FLAG_HINT } else { 0 },
                hint_start: part.start,
                hint_end: part.end,
                user_cookie_counter: cookie.0,
            },
            Event::Last { counter } => Self {
                kind: abi::EVENT_TYPE_LAST,
                user_cookie_counter: counter,
                ..Self::default()
            },
        }
    }
}

/// How many ranges can be registered: who registers without end is to be told so before there is no memory left.
pub(crate) const RANGES_AT_MOST: usize = 1 << 22;

/// Why a range was not registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    #[error("the cookie is in use")]
    CookieInUse,
    #[error("the range ends before it starts")]
    EndsBeforeItStarts,
    #[error("there are too many ranges")]
    TooMany,
}

/// Registered ranges and pending events.
#[derive(Debug)]
pub(crate) struct Queue {
    ranges_at_most: usize,
    ranges: Ranges,
    watched: HashMap<Cookie, Watched>,
    /// In the order in which ranges were first hit. A range's place is in its [`Pending`].
    pending: BTreeMap<u64, Cookie>,
    /// Of the next range or the next pending event.
    next_number: u64,
    /// Somebody who read an event has not yet read that it was the last, or the counter has moved for no event.
    owes_last: bool,
}

#[derive(Debug)]
struct Watched {
    range: AddressRange,
    /// Grows from registration to registration.
    number: u64,
    pending: Option<Pending>,
}

#[derive(Debug)]
struct Pending {
    place: u64,
    /// What was invalidated, if by one invalidation.
    part: Option<AddressRange>,
}

impl Default for Queue {
    fn default() -> Self {
        Self::new(RANGES_AT_MOST)
    }
}

impl Queue {
    /// One for so many ranges.
    fn new(ranges_at_most: usize) -> Self {
        Self {
            ranges_at_most,
            ranges: Ranges::default(),
            watched: HashMap::new(),
            pending: BTreeMap::new(),
            next_number: 0,
            owes_last: false,
        }
    }

    /// The ranges.
    pub(crate) fn ranges(&self) -> &Ranges {
        &self.ranges
    }

    pub(crate) fn register(&mut self, range: AddressRange, cookie: Cookie) -> Result<(), Refused> {
        if range.end < range.start {
            return Err(Refused::EndsBeforeItStarts);
        }
        if self.watched.contains_key(&cookie) {
            return Err(Refused::CookieInUse);
        }
        if self.watched.len() == self.ranges_at_most {
            return Err(Refused::TooMany);
        }
        self.ranges.insert(range, cookie);
        let number = self.number();
        let watched = Watched {
            range,
            number,
            pending: None,
        };
        self.watched.insert(cookie, watched);
        Ok(())
    }

    /// The range that was registered with this cookie; there is no more event of it.
    pub(crate) fn unregister(&mut self, cookie: Cookie) -> Option<AddressRange> {
        let watched = self.watched.remove(&cookie)?;
        self.ranges.remove(watched.range, cookie);
        if let Some(pending) = watched.pending {
            self.pending.remove(&pending.place);
        }
        Some(watched.range)
    }

    /// What is registered from now on has a number not below this.
    pub(crate) fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    /// An invalidation. Whether it hit any range.
    pub(crate) fn invalidate(&mut self, range: AddressRange) -> bool {
        self.invalidate_since(range, 0)
    }

    /// An invalidation, for the ranges that were registered since [`Queue::number`] gave this number.
    pub(crate) fn invalidate_since(&mut self, range: AddressRange, number: u64) -> bool {
        let mut hit = false;
        let (watched, pending, next_number) = (&mut self.watched, &mut self.pending, &mut self.next_number);
        self.ranges.overlapping(range, |_, cookie| {
            let Some(watched) = watched
                .get_mut(&cookie)
                .filter(|watched| watched.number >= number)
            else {
                return;
            };
            hit = true;
            if let Some(pending) = &mut watched.pending {
                pending.part = None;
                return;
            }
            *next_number += 1;
            pending.insert(*next_number, cookie);
            watched.pending = Some(Pending {
                place: *next_number,
                part: Some(range.clipped_to(watched.range)),
            });
        });
        hit
    }

    /// Every range was hit, and nobody knows where.
    pub(crate) fn invalidate_everything(&mut self) {
        for (&cookie, watched) in &mut self.watched {
            if let Some(pending) = &mut watched.pending {
                pending.part = None;
                continue;
            }
            self.next_number += 1;
            self.pending.insert(self.next_number, cookie);
            watched.pending = Some(Pending {
                place: self.next_number,
                part: None,
            });
        }
    }

    /// The counter has moved though there is no event: whoever asks is told its value, and does not wait for an event.
    pub(crate) fn owe_last(&mut self) {
        self.owes_last = true;
    }

    /// Whether there is anything to tell.
    pub(crate) fn readable(&self) -> bool {
        self.owes_last || !self.pending.is_empty()
    }

    /// The next event. `counter` is its value when all invalidations that it counts have been handed in.
    pub(crate) fn next(&mut self, counter: u64) -> Option<Event> {
        let Some((_, cookie)) = self.pending.pop_first() else {
            return std::mem::take(&mut self.owes_last).then_some(Event::Last { counter });
        };
        self.owes_last = true;
        let watched = self.watched.get_mut(&cookie)?;
        let part = watched.pending.take()?.part;
        Some(Event::Invalidated {
            cookie,
            part: part.unwrap_or(watched.range),
            exact: part.is_some(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    fn range(start: u64, end: u64) -> AddressRange {
        AddressRange::new(start, end)
    }

    fn all(queue: &mut Queue, counter: u64) -> Vec<Event> {
        std::iter::from_fn(|| queue.next(counter)).collect()
    }

    fn invalidated(cookie: u64, part: AddressRange, exact: bool) -> Event {
        Event::Invalidated {
            cookie: Cookie(cookie),
            part,
            exact,
        }
    }

    #[test]
    fn one_invalidation_is_told_exactly() {
        let mut queue = Queue::default();
        queue.register(range(100, 200), Cookie(7)).unwrap();
        assert!(queue.invalidate(range(150, 300)));
        assert_eq!(
            all(&mut queue, 1),
            [invalidated(7, range(150, 200), true), Event::Last { counter: 1 }]
        );
        assert!(!queue.readable());
    }

    #[test]
    fn several_are_told_as_one_event_of_the_whole_range() {
        let mut queue = Queue::default();
        queue.register(range(100, 200), Cookie(7)).unwrap();
        assert!(queue.invalidate(range(110, 120)));
        assert!(queue.invalidate(range(130, 140)));
        assert_eq!(
            all(&mut queue, 2),
            [invalidated(7, range(100, 200), false), Event::Last { counter: 2 }]
        );
        assert!(queue.invalidate(range(130, 140)));
        assert_eq!(queue.next(3), Some(invalidated(7, range(130, 140), true)));
    }

    #[test]
    fn each_of_several_ranges_has_its_event() {
        let mut queue = Queue::default();
        queue.register(range(100, 200), Cookie(1)).unwrap();
        queue.register(range(100, 200), Cookie(2)).unwrap();
        queue.register(range(150, 160), Cookie(3)).unwrap();
        queue.register(range(300, 400), Cookie(4)).unwrap();
        assert!(queue.invalidate(range(0, 155)));
        let events = all(&mut queue, 1);
        assert_eq!(events.len(), 4);
        for event in [
            invalidated(1, range(100, 155), true),
            invalidated(2, range(100, 155), true),
            invalidated(3, range(150, 155), true),
        ] {
            assert!(events[..3].contains(&event), "{events:?}");
        }
    }

    #[test]
    fn an_unregistered_range_has_no_event_even_if_it_was_hit() {
        let mut queue = Queue::default();
        queue.register(range(100, 200), Cookie(7)).unwrap();
        queue.invalidate(range(100, 200));
        assert_eq!(queue.unregister(Cookie(7)), Some(range(100, 200)));
        assert_eq!(queue.unregister(Cookie(7)), None);
        assert!(!queue.readable());
        assert!(!queue.invalidate(range(100, 200)));
    }

    #[test]
    fn a_cookie_in_use_and_a_range_that_wraps_are_refused() {
        let mut queue = Queue::default();
        queue.register(range(100, 200), Cookie(7)).unwrap();
        assert_eq!(
            queue.register(range(300, 400), Cookie(7)),
            Err(Refused::CookieInUse)
        );
        assert_eq!(
            queue.register(range(u64::MAX, 100), Cookie(8)),
            Err(Refused::EndsBeforeItStarts)
        );
        assert_eq!(queue.ranges().len(), 1);
        queue.unregister(Cookie(7));
        queue.register(range(300, 400), Cookie(7)).unwrap();
    }

    #[test]
    fn who_registers_without_end_is_stopped() {
        let mut queue = Queue::new(100);
        for cookie in 0..100 {
            queue.register(range(100, 200), Cookie(cookie)).unwrap();
        }
        let one_more = Cookie(u64::MAX);
        assert_eq!(queue.register(range(100, 200), one_more), Err(Refused::TooMany));
        queue.unregister(Cookie(5));
        queue.register(range(100, 200), one_more).unwrap();
    }

    /// The driver's way: a list of registrations, each with two flags, and a list of those that were hit.
    #[derive(Default)]
    struct Model {
        registered: Vec<Registered>,
        hit: Vec<u64>,
        need_empty: bool,
        counter: u64,
    }

    struct Registered {
        cookie: u64,
        range: AddressRange,
        invalid: bool,
        hint: Option<AddressRange>,
    }

    impl Model {
        fn invalidate(&mut self, invalid: AddressRange) -> bool {
            let mut hit = false;
            for registered in &mut self.registered {
                if registered.range.start >= invalid.end || invalid.start >= registered.range.end {
                    continue;
                }
                // Not so in the driver: an empty range lies in nothing.
                if registered.range.start == registered.range.end || invalid.start == invalid.end {
                    continue;
                }
                hit = true;
                if std::mem::replace(&mut registered.invalid, true) {
                    registered.hint = None;
                } else {
                    self.hit.push(registered.cookie);
                    registered.hint = Some(invalid);
                }
            }
            self.counter += u64::from(hit);
            hit
        }

        fn read(&mut self, max: usize) -> Vec<Event> {
            let mut events = Vec::new();
            if !self.need_empty && self.hit.is_empty() {
                return events;
            }
            while events.len() < max {
                if self.hit.is_empty() {
                    let counter = self.counter;
                    events.push(Event::Last { counter });
                    self.need_empty = false;
                    break;
                }
                let cookie = self.hit.remove(0);
                let registered = self.registered.iter_mut().find(|r| r.cookie == cookie).unwrap();
                let (start, end) = (registered.range.start, registered.range.end);
                let part = registered
                    .hint
                    .map_or((start, end), |hint| (start.max(hint.start), end.min(hint.end)));
                events.push(invalidated(
                    cookie,
                    range(part.0, part.1),
                    registered.hint.is_some(),
                ));
                registered.invalid = false;
                registered.hint = None;
                self.need_empty = true;
            }
            events
        }
    }

    /// Events of one invalidation come in whatever order; so both lists are sorted where they are compared.
    fn sorted(events: &[Event]) -> Vec<String> {
        let mut words: Vec<String> = events.iter().map(|event| format!("{event:?}")).collect();
        words.sort();
        words
    }

    #[test]
    fn random_operations_are_as_the_driver_does_them() {
        let mut random = Random::seeded();
        for _ in 0..crate::random::rounds(300) {
            let mut queue = Queue::default();
            let mut model = Model::default();
            for _ in 0..200 {
                let start = random.below(50);
                let span = range(start, start + random.below(20));
                let cookie = random.below(12);
                match random.below(6) {
                    0 | 1 => {
                        let known = model.registered.iter().any(|r| r.cookie == cookie);
                        assert_eq!(queue.register(span, Cookie(cookie)).is_ok(), !known);
                        if !known {
                            model.registered.push(Registered {
                                cookie,
                                range: span,
                                invalid: false,
                                hint: None,
                            });
                        }
                    }
                    2 => {
                        let known = model.registered.iter().position(|r| r.cookie == cookie);
                        assert_eq!(queue.unregister(Cookie(cookie)).is_some(), known.is_some());
                        if let Some(known) = known {
                            model.registered.remove(known);
                            model.hit.retain(|&hit| hit != cookie);
                        }
                    }
                    3 | 4 => assert_eq!(queue.invalidate(span), model.invalidate(span)),
                    _ => {
                        // Of those hit at once either side may tell another first, so what is read is all or nothing.
                        let events = all(&mut queue, model.counter);
                        let mut expected = model.read(usize::MAX);
                        if expected.is_empty() {
                            assert!(events.is_empty());
                        }
                        assert_eq!(sorted(&events), sorted(&std::mem::take(&mut expected)));
                    }
                }
                assert_eq!(queue.readable(), model.need_empty || !model.hit.is_empty());
            }
        }
    }
}
