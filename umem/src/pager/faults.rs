//! The thread that reads events and answers what it can at once.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::install::{EVENT_PATIENCE, Fetched, Wake, is_transient};
use super::shared::Shared;
use super::stripe::Piece;
use super::{FaultClass, PagerError};
use crate::region::PageSize;
use crate::source::{Class, Content, Inbox, PageSink, Received, SourceError};
use crate::states::{Arrival, Claim, PageState};
use crate::uffd::{Event, EventBuffer, FaultKind, InstallError};
use crate::units::{HostAddress, PageIndex, PageRange};

/// Events read at a time.
const EVENTS: usize = 64;

/// How long a fault waits for a fill that is fetching its page. Threads that work for a fill give way to others, so on a busy host it
/// may be long before one installs what has come; and behind a slow link a page of a fill is behind many others.
const FILL_PATIENCE: Duration = Duration::from_micros(500);

/// A fault to be answered.
#[derive(Clone, Copy)]
struct Fault {
    address: HostAddress,
    kind: FaultKind,
}

/// The thread that reads events.
pub(super) struct FaultThread {
    shared: Arc<Shared>,
    /// Its stripe's number.
    stripe: usize,
    events: EventBuffer,
    /// Faults that were read and not yet answered.
    faults: Vec<Fault>,
    /// Units that somebody else was fetching, and since when they are waited for here; in that order.
    joined: VecDeque<(PageRange, Instant)>,
    buffer: Vec<u8>,
    /// What it has asked the source for comes here, if that can be had.
    inbox: Option<Box<dyn Inbox>>,
}

/// The fault thread, to which pages come that it receives itself.
struct Inline<'a>(RefCell<&'a mut FaultThread>);

impl PageSink for Inline<'_> {
    fn arrived(&self, pages: PageRange, content: Content, buffer: &[u8], class: Class) {
        let mut thread = self.0.borrow_mut();
        let shared = Arc::clone(&thread.shared);
        let fetched = Fetched::new(pages, content, buffer);
        // The event that may be in the way is this thread's to read.
        let make_way = || thread.read_events().map_err(PagerError::Events);
        if let Err(error) = shared.deliver_by(fetched, class.into(), Wake::Now, make_way) {
            shared.fail(error);
        }
    }

    fn completed(&self, class: Class) {
        self.0.borrow().shared.completed(class);
    }

    fn failed(&self, error: SourceError) {
        self.0.borrow().shared.failed(error);
    }
}

impl FaultThread {
    pub(super) fn new(shared: Arc<Shared>, stripe: usize) -> Self {
        let buffer = Shared::buffer(shared.page_size.pages());
        Self {
            shared,
            stripe,
            events: EventBuffer::new(EVENTS),
            faults: Vec::with_capacity(2 * EVENTS),
            joined: VecDeque::with_capacity(2 * EVENTS),
            buffer,
            inbox: None,
        }
    }

    pub(super) fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        shared.prepare_demand_thread();
        let result = self.serve();
        // Its owner receives again.
        self.inbox = None;
        // What cannot be installed now never will be: whoever tries gives up.
        shared.stripes[self.stripe].events_ended.store(true, Release);
        if let Err(error) = result {
            shared.fail(PagerError::Events(error));
        }
    }

    /// Serves faults until told to stop; an error says that events can no longer be read.
    fn serve(&mut self) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        loop {
            let ready = self.wait()?;
            if ready.stop {
                return Ok(());
            }
            let mut since = Instant::now();
            if ready.events {
                self.read_events()?;
            }
            loop {
                while let Some(fault) = self.faults.pop() {
                    if let Err(error) = self.answer(fault, since) {
                        shared.fail(error);
                    }
                }
                // Also what was asked for just now: who answers on the same CPU has run before this thread went on.
                let more = self.receive();
                if more {
                    // They come first.
                    since = Instant::now();
                    self.read_events()?;
                } else if self.faults.is_empty() {
                    break;
                }
            }
            self.overtake_fill();
            shared.schedule.note_progress();
            shared.release_if_settled();
        }
    }

    /// Waits for events, or pages in the inbox, or the end, or until a fill has been waited for long enough.
    fn wait(&mut self) -> io::Result<Ready> {
        let states = &self.shared.states;
        while self
            .joined
            .pop_front_if(|(unit, _)| states.is_settled(unit.start))
            .is_some()
        {}
        let patience = self.joined.front().map(|(_, since)| {
            let left = FILL_PATIENCE.saturating_sub(since.elapsed());
            Timespec {
                tv_sec: 0,
                tv_nsec: left.as_nanos() as i64,
            }
        });
        let stripe = &self.shared.stripes[self.stripe];
        let events = PollFd::from_borrowed_fd(stripe.uffd.as_fd(), PollFlags::IN);
        let stop = PollFd::from_borrowed_fd(self.shared.stop.as_fd(), PollFlags::IN);
        let result = match &self.inbox {
            None => poll(&mut [events, stop], patience),
            Some(inbox) => poll(&mut [events, stop, PollFd::new(inbox, PollFlags::IN)], patience),
        };
        Ok(result?)
    }

    /// Takes some of what has come into the inbox, if there is one. True: there may be more.
    fn receive(&mut self) -> bool {
        let Some(inbox) = self.inbox.take() else {
            return false;
        };
        let received = inbox.receive(&Inline(RefCell::new(&mut *self)));
        if received != Received::Over {
            self.inbox = Some(inbox);
        }
        received == Received::More
    }

    /// Reads events while nobody installs anything.
    fn read_events(&mut self) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        // Before the placement is held: who is waited for may be another process, and who sees that it was killed needs the placement.
        shared.source.pause();
        let moved = self.read_events_alone();
        // Where they could not be read, what they say is not known.
        shared.source.resume(*moved.as_ref().unwrap_or(&true));
        moved.map(drop)
    }

    /// Reads every event there is: marks what is removed, notes what is moved, keeps the faults for later. Who waits for what
    /// is no longer going to be installed there is woken, which the kernel does not do by itself, and looks again. Answers whether
    /// something was moved.
    fn read_events_alone(&mut self) -> io::Result<bool> {
        let shared = &self.shared;
        let stripe = &shared.stripes[self.stripe];
        let mut placement = stripe.placement_alone();
        let mut moved = false;
        loop {
            let mut count = 0;
            for event in stripe.uffd.read(&mut self.events)? {
                count += 1;
                match event {
                    Event::Fault { address, kind, .. } => self.faults.push(Fault { address, kind }),
                    Event::Remove { start, end } => {
                        shared.remove(&placement.pages_at(&(start..end)));
                        stripe.wake(start..end);
                    }
                    Event::Unmap { start, end } => {
                        shared.remove(&placement.unmap(&(start..end)));
                        stripe.wake(start..end);
                    }
                    Event::Remap { from, to, length } => {
                        moved = true;
                        placement.remap(from, to, length);
                        stripe.wake(from..HostAddress(from.0 + length));
                    }
                    Event::Other(number) => tracing::warn!(number, "unexpected userfaultfd event"),
                }
            }
            if count < self.events.capacity() {
                return Ok(moved);
            }
        }
    }

    fn answer(&mut self, fault: Fault, since: Instant) -> Result<(), PagerError> {
        let shared = Arc::clone(&self.shared);
        // What was moved away after the fault was read has woken who waits, and is answered where it is now.
        let page = shared.stripes[self.stripe].placement().page_at(fault.address);
        let Some(page) = page else {
            return self.answer_outside(fault);
        };
        let unit = shared.states.unit_of(page);
        match fault.kind {
            FaultKind::Minor if shared.source.may_map(unit.start) => self.answer_minor(unit, since),
            _ => match shared.states.claim(unit) {
                Claim::Granted => match shared.source.try_read(unit, &mut self.buffer) {
                    Ok(Some(content)) => {
                        shared.note_touch(page);
                        self.install_claimed(unit, content, since)
                    }
                    Ok(None) => {
                        shared.note_touch(page);
                        if shared.source.installs() {
                            shared.submit(&[unit], Class::Demand);
                            return Ok(());
                        }
                        shared.await_fetch(unit, since, FaultClass::Fetched);
                        self.ask_for(unit);
                        Ok(())
                    }
                    Err(error) => Err(shared.source_error(error)),
                },
                // Who installs it wakes all who wait there.
                Claim::Joined if shared.source.installs() => Ok(()),
                Claim::Joined => self.join(unit, fault, since),
                Claim::Present | Claim::Removed => self.zero_settled(unit, since),
            },
        }
    }

    /// Has a claimed unit fetched by others than this thread.
    fn ask_for(&mut self, unit: PageRange) {
        let shared = &self.shared;
        // Before it is asked for: the answer may be faster than this thread.
        shared.schedule.begin_demand();
        if !shared.submit(&[unit], Class::Demand) {
            shared.schedule.enqueue(unit);
        } else if self.inbox.is_none() {
            self.inbox = shared.lend_inbox();
        }
    }

    /// Fetches what a fill has been waited for long enough to bring. Not what is large: to fetch that again takes longer than to wait.
    fn overtake_fill(&mut self) {
        let shared = Arc::clone(&self.shared);
        let is_over = |joined: &mut (PageRange, Instant)| joined.1.elapsed() >= FILL_PATIENCE;
        while let Some((unit, since)) = self.joined.pop_front_if(is_over) {
            if shared.page_size != PageSize::Small || !shared.states.share(unit) {
                continue;
            }
            let result = match shared.source.try_read(unit, &mut self.buffer) {
                Ok(Some(content)) => {
                    // It has a class of its own.
                    shared.waiting().retain(|waiting| waiting.unit != unit.start);
                    self.install_claimed(unit, content, since)
                }
                Ok(None) => {
                    self.ask_for(unit);
                    Ok(())
                }
                Err(error) => Err(shared.source_error(error)),
            };
            if let Err(error) = result {
                shared.fail(error);
            }
        }
    }

    /// Waits for a fetch that is under way. The race: it may have ended, and woken nobody, before we were on the list; then
    /// the state says so, and we answer ourselves.
    fn join(&mut self, unit: PageRange, fault: Fault, since: Instant) -> Result<(), PagerError> {
        self.shared.await_fetch(unit, since, FaultClass::Joined);
        if self.shared.states.get(unit.start) == PageState::InFlight {
            self.joined.push_back((unit, since));
            return Ok(());
        }
        self.shared.waiting().retain(|waiting| waiting.unit != unit.start);
        self.answer(fault, since)
    }

    /// A fault at an address where none of the region's pages is. Memory that was made larger by mremap is registered in its
    /// whole length, and what is behind the region's end is nobody's: zero, as anywhere.
    ///
    /// The race: memory was moved to that address, and the event that says so is not yet in the queue. Until it has been read
    /// the kernel refuses to install anything; after that there is a page.
    fn answer_outside(&mut self, fault: Fault) -> Result<(), PagerError> {
        let address = fault.address;
        let shared = Arc::clone(&self.shared);
        let stripe = &shared.stripes[self.stripe];
        let pages = PageRange::new(PageIndex(0), shared.page_size.pages());
        let start = HostAddress(address.0 - address.0 % pages.bytes() as u64);
        let place = Piece { pages, start };
        match shared.try_install(stripe, place, None).stopped {
            None => Ok(()),
            Some(InstallError::Changing) => {
                self.read_events().map_err(PagerError::Events)?;
                // Answered again, in the loop that this was called from.
                self.faults.push(fault);
                Ok(())
            }
            // There already; or gone, and who waits is to find that out.
            Some(error) => {
                tracing::debug!(%address, %error, "page fault outside the region");
                stripe.wake(place.addresses());
                Ok(())
            }
        }
    }

    /// Installs a claimed unit's content.
    fn install_claimed(
        &mut self,
        unit: PageRange,
        content: Content,
        since: Instant,
    ) -> Result<(), PagerError> {
        let shared = Arc::clone(&self.shared);
        loop {
            // Removed while it was claimed: this thread reads the events, so only its own `read_events` below does that.
            if shared.states.get(unit.start) != PageState::InFlight {
                return self.zero_settled(unit, since);
            }
            let stripe = &shared.stripes[self.stripe];
            let Some(piece) = stripe.placement().run_at(unit) else {
                return Ok(());
            };
            let bytes = Fetched::new(unit, content, &self.buffer).bytes_of(unit);
            if shared.install(stripe, piece, bytes, Wake::Now)? > 0 {
                let (arrival, class) = match bytes {
                    Some(_) => (Arrival::Demand, FaultClass::Immediate),
                    None => (Arrival::Zero, FaultClass::Zero),
                };
                shared.states.arrive(unit, arrival);
                shared.latency[class as usize].record(since.elapsed());
                return Ok(());
            }
            if since.elapsed() >= EVENT_PATIENCE {
                let (page, source) = (unit.start, InstallError::Changing);
                return Err(PagerError::Install { page, source });
            }
            self.read_events().map_err(PagerError::Events)?;
        }
    }

    /// A fault on a settled page. Either it was answered already, or the page has lost its memory: removed, or taken away
    /// without a word. It gets a zero page; if there is a page after all, the kernel says so and nothing is replaced.
    fn zero_settled(&mut self, unit: PageRange, since: Instant) -> Result<(), PagerError> {
        let shared = Arc::clone(&self.shared);
        let stripe = &shared.stripes[self.stripe];
        let class = loop {
            let Some(piece) = stripe.placement().run_at(unit) else {
                return Ok(());
            };
            match shared.try_install(stripe, piece, None).stopped {
                None => {
                    shared.states.touch(unit);
                    break FaultClass::Zero;
                }
                Some(InstallError::Exists) => {
                    stripe.wake(piece.addresses());
                    break FaultClass::Joined;
                }
                Some(InstallError::NotRegistered) if shared.released.load(Acquire) => {
                    stripe.wake(piece.addresses());
                    break FaultClass::Joined;
                }
                Some(error) if is_transient(&error) && since.elapsed() < EVENT_PATIENCE => {
                    self.read_events().map_err(PagerError::Events)?;
                }
                Some(source) => {
                    return Err(PagerError::Install {
                        page: unit.start,
                        source,
                    });
                }
            }
        };
        shared.latency[class as usize].record(since.elapsed());
        Ok(())
    }

    /// A page is in the memory behind the region and not mapped. In flight it is one that another thread is installing: the
    /// kernel puts a page into the file, whole, before it maps it.
    fn answer_minor(&mut self, unit: PageRange, since: Instant) -> Result<(), PagerError> {
        let shared = Arc::clone(&self.shared);
        let stripe = &shared.stripes[self.stripe];
        loop {
            if shared.source.installs() {
                shared.states.claim(unit);
                // Refused where it is settled.
                shared.states.arrive(unit, Arrival::Demand);
            } else if shared.states.get(unit.start) == PageState::Absent {
                if !shared.is_uncertain(unit.start) {
                    return Err(PagerError::Unaccounted { page: unit.start });
                }
                if shared.states.claim(unit) == Claim::Granted {
                    shared.states.arrive(unit, Arrival::Demand);
                }
            }
            let Some(piece) = stripe.placement().run_at(unit) else {
                return Ok(());
            };
            match stripe.uffd.continue_(piece.addresses()).stopped {
                None => break,
                // Mapped by another thread; or gone again before it was mapped (EFAULT): the thread that waits looks again.
                Some(InstallError::Exists | InstallError::Other(Errno::FAULT)) => {
                    stripe.wake(piece.addresses());
                    break;
                }
                Some(InstallError::NotRegistered) if shared.released.load(Acquire) => {
                    stripe.wake(piece.addresses());
                    break;
                }
                Some(error) if is_transient(&error) && since.elapsed() < EVENT_PATIENCE => {
                    self.read_events().map_err(PagerError::Events)?;
                }
                Some(source) => {
                    return Err(PagerError::Install {
                        page: unit.start,
                        source,
                    });
                }
            }
        }
        if shared.states.get(unit.start) == PageState::Removed {
            shared.states.touch(unit);
        }
        shared.latency[FaultClass::Minor as usize].record(since.elapsed());
        Ok(())
    }
}

/// What a fault thread has waited for.
#[derive(Default)]
struct Ready {
    events: bool,
    stop: bool,
}

/// Waits for any of them, for so long; the first two are events and the end.
fn poll(descriptors: &mut [PollFd<'_>], patience: Option<Timespec>) -> Result<Ready, Errno> {
    match rustix::event::poll(descriptors, patience.as_ref()) {
        Ok(_) => Ok(Ready {
            events: !descriptors[0].revents().is_empty(),
            stop: !descriptors[1].revents().is_empty(),
        }),
        Err(Errno::INTR) => Ok(Ready::default()),
        Err(errno) => Err(errno),
    }
}
