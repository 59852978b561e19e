//! Sending RAM while the guest runs: rounds over pages that changed, on several channels at once.
//!
//! A page is sent by one channel a round, and a round ends when the other side has acknowledged a barrier on each channel: so of two
//! versions of a page the newer one always arrives later. A page that was sent once is sent again only if it is another one, by its
//! checksum (xxh3, 64 bits).

use std::io::IoSlice;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use umem::call::Opened;
use umem::channel::{ChannelError, Receiver, Sender};
use umem::image::Wait;
use umem::link::Stream;
use umem::units::{PAGE_SIZE, PageIndex, PageRange};
use umem::wire::{Checksums, Encoding, Epoch, MAX_RANGE_PAGES, Message, PagesHead, RequestId, Zero};

use super::ram::SharedRam;
use super::{LAST_BARRIER, PATIENCE};
use crate::dirty::PageBitmap;

/// Pages that a channel takes at a time.
const CHUNK: u64 = 1024;

/// Pages read and sent at a time: 256 KiB, which stays in the processor's cache in between.
const STEP: u64 = 64;

/// The checksum of a page that was never sent. (One that has it is sent again.)
const NEVER: u64 = u64::MAX;

/// Why RAM was not sent.
#[derive(Debug)]
pub(super) enum PushError {
    /// The channel is lost.
    Channel(ChannelError),
    /// Memory cannot be read.
    Memory(String),
    /// The migration has ended meanwhile.
    Ended,
}

impl From<ChannelError> for PushError {
    fn from(error: ChannelError) -> Self {
        Self::Channel(error)
    }
}

/// What is done before pages are read.
type BeforeRead = Box<dyn Fn(PageRange) -> Result<(), String> + Send + Sync>;

/// What the channels of a migration share.
pub(super) struct Push {
    ram: SharedRam,
    before_read: BeforeRead,
    /// Of each page, the checksum that was sent last.
    sent: Vec<AtomicU64>,
    plan: Mutex<Plan>,
    changed: Condvar,
    ended: AtomicBool,
    /// Held while a log of changes is read, which is another's after the end.
    logging: RwLock<()>,
    /// Bytes sent.
    pub(super) bytes: AtomicU64,
    /// Pages of the round that were dealt with.
    dealt: AtomicU64,
}

struct Plan {
    /// Rounds begun.
    round: u64,
    todo: Option<PageBitmap>,
    /// What of it is not taken yet begins here.
    next: PageIndex,
    /// Channels that push.
    channels: usize,
    /// Of those, how many have ended the round.
    finished: usize,
    /// Nothing more is pushed.
    last: bool,
    failure: Option<PushError>,
}

/// What a channel is to do.
enum Work {
    Pages(PageRange, Epoch),
    EndOfRound(u64, Epoch),
    /// Serve.
    Last,
}

impl Push {
    pub(super) fn new(ram: SharedRam, channels: usize, before_read: BeforeRead) -> Self {
        let pages = ram.pages();
        Self {
            ram,
            before_read,
            sent: (0..pages).map(|_| AtomicU64::new(NEVER)).collect(),
            plan: Mutex::new(Plan {
                round: 0,
                todo: None,
                next: PageIndex(0),
                channels,
                finished: 0,
                last: false,
                failure: None,
            }),
            changed: Condvar::new(),
            ended: AtomicBool::new(false),
            logging: RwLock::default(),
            bytes: AtomicU64::new(0),
            dealt: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The other side has forgotten pages: they are sent again, whatever is in them.
    pub(super) fn forget(&self, pages: PageRange) {
        for page in pages.pages() {
            self.sent[page.0 as usize].store(NEVER, Relaxed);
        }
    }

    /// Begins a round, and answers its number.
    pub(super) fn begin_round(&self, todo: PageBitmap) -> u64 {
        let mut plan = self.lock();
        plan.round += 1;
        let round = plan.round;
        plan.todo = Some(todo);
        plan.next = PageIndex(0);
        plan.finished = 0;
        self.dealt.store(0, Relaxed);
        drop(plan);
        self.changed.notify_all();
        round
    }

    /// Waits for the end of the round, or for `patience`. True: it has ended.
    pub(super) fn wait_for_round(&self, patience: Duration) -> Result<bool, PushError> {
        let deadline = Instant::now() + patience;
        let mut plan = self.lock();
        loop {
            if let Some(failure) = plan.failure.take() {
                return Err(failure);
            }
            if plan.finished == plan.channels {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            let waited = self.changed.wait_timeout(plan, left);
            plan = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lets the round end with what is being sent now. The answer is what will not be sent.
    pub(super) fn cut_round(&self) -> PageBitmap {
        let mut plan = self.lock();
        let from = plan.next;
        let Some(todo) = &plan.todo else {
            return PageBitmap::new(self.ram.pages());
        };
        let rest = todo.from(from);
        plan.next = PageIndex(todo.pages());
        rest
    }

    /// Pages of the round that were dealt with so far.
    pub(super) fn dealt(&self) -> u64 {
        self.dealt.load(Relaxed)
    }

    /// Nothing more is pushed: the channels are for who asks now.
    pub(super) fn last(&self) {
        self.lock().last = true;
        self.changed.notify_all();
    }

    /// Nothing more is to be done at all.
    pub(super) fn end(&self) {
        self.ended.store(true, SeqCst);
        drop(self.logging.write().unwrap_or_else(PoisonError::into_inner));
        // So that nobody goes to sleep who has looked before.
        drop(self.lock());
        self.changed.notify_all();
    }

    /// Whether nothing more is pushed: what is lost with a channel is asked for.
    pub(super) fn is_last(&self) -> bool {
        self.lock().last
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(SeqCst)
    }

    /// What a channel pushes until it is to serve. An error was told to who waits for the round.
    pub(super) fn push_on(&self, opened: &mut Opened) -> Result<(), ()> {
        let mut channel = Channel {
            push: self,
            stream: &opened.stream,
            sender: &mut opened.sender,
            receiver: &mut opened.receiver,
            buffer: vec![0; PageRange::new(PageIndex(0), STEP).bytes()],
        };
        channel.work().map_err(|failure| {
            let mut plan = self.lock();
            plan.failure.get_or_insert(failure);
            drop(plan);
            self.changed.notify_all();
        })
    }

    /// Waits until pages are asked for.
    pub(super) fn await_last(&self) -> Result<(), ()> {
        let mut plan = self.lock();
        while !plan.last {
            if self.has_ended() {
                return Err(());
            }
            plan = self.changed.wait(plan).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    /// What is to be done next. `done`: the last round that the channel has ended.
    fn next(&self, done: u64) -> Result<Work, PushError> {
        let mut plan = self.lock();
        loop {
            if self.has_ended() {
                return Err(PushError::Ended);
            }
            let (round, from) = (plan.round, plan.next);
            if round > done
                && let Some(todo) = &plan.todo
            {
                let within = PageRange::new(from, todo.pages() - from.0);
                let run = todo
                    .next_run(within)
                    .map(|run| run.clamp_to(run.start.advance(CHUNK)));
                let Some(run) = run else {
                    return Ok(Work::EndOfRound(round, Epoch(round)));
                };
                plan.next = run.end();
                return Ok(Work::Pages(run, Epoch(round)));
            }
            if plan.last {
                return Ok(Work::Last);
            }
            plan = self.changed.wait(plan).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn end_round(&self) {
        self.lock().finished += 1;
        self.changed.notify_all();
    }
}

/// A channel that pushes.
struct Channel<'a> {
    push: &'a Push,
    stream: &'a Stream,
    sender: &'a mut Sender,
    receiver: &'a mut Receiver,
    buffer: Vec<u8>,
}

impl Channel<'_> {
    fn work(&mut self) -> Result<(), PushError> {
        let mut done = 0;
        loop {
            match self.push.next(done)? {
                Work::Pages(run, epoch) => self.send_run(run, epoch)?,
                Work::EndOfRound(round, epoch) => {
                    self.say(&Message::Barrier { number: round, epoch })?;
                    self.await_barrier(round)?;
                    done = round;
                    self.push.end_round();
                }
                Work::Last => {
                    return self.say(&Message::Barrier {
                        number: LAST_BARRIER,
                        epoch: Epoch(done),
                    });
                }
            }
        }
    }

    fn send_run(&mut self, run: PageRange, epoch: Epoch) -> Result<(), PushError> {
        let ram = SharedRam::clone(&self.push.ram);
        {
            let _log = self.push.logging.read().unwrap_or_else(PoisonError::into_inner);
            if self.push.has_ended() {
                return Err(PushError::Ended);
            }
            // What changes in them between this and being read is sent, and told of again.
            (self.push.before_read)(run).map_err(PushError::Memory)?;
        }
        let mut rest = run;
        while rest.count > 0 {
            let data = ram.next_few(rest).map_err(PushError::Memory)?;
            let zero = rest.clamp_to(data.map_or(rest.end(), |data| data.start));
            self.send_zero(zero, epoch)?;
            for step in data.into_iter().flat_map(steps) {
                self.send_step(step, epoch)?;
            }
            rest = rest.from(data.map_or(rest.end(), PageRange::end));
        }
        Ok(())
    }

    /// Sends those of a few pages that are others than those sent before.
    fn send_step(&mut self, step: PageRange, epoch: Epoch) -> Result<(), PushError> {
        let mut checksums = [0; STEP as usize];
        let checksums = &mut checksums[..step.count as usize];
        self.push
            .ram
            .read(step, Wait::Yes, checksums, &mut self.buffer)
            .map_err(PushError::Memory)?;
        let is_new = |index: usize| {
            let page = (step.start.0 as usize) + index;
            self.push.sent[page].load(Relaxed) != checksums[index]
        };
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for index in (0..checksums.len()).filter(|index| is_new(*index)) {
            match runs.last_mut() {
                Some((_, end)) if *end == index => *end = index + 1,
                _ => runs.push((index, index + 1)),
            }
        }
        for (start, end) in runs {
            let pages = PageRange::new(step.start.advance(start as u64), (end - start) as u64);
            let sums = &checksums[start..end];
            self.send_pages(pages, start, sums, epoch)?;
            for (page, sum) in pages.pages().zip(sums) {
                self.push.sent[page.0 as usize].store(*sum, Relaxed);
            }
        }
        self.push.dealt.fetch_add(step.count, Relaxed);
        Ok(())
    }

    /// Sends pages of the buffer, of which the first is the one at `at`.
    fn send_pages(
        &mut self,
        pages: PageRange,
        at: usize,
        sums: &[u64],
        epoch: Epoch,
    ) -> Result<(), PushError> {
        if sums.iter().all(|sum| *sum == 0) {
            return self.say(&Message::Zero(Zero {
                request: RequestId::PUSH,
                range: pages,
                epoch,
            }));
        }
        let content = &self.buffer[at * PAGE_SIZE..at * PAGE_SIZE + pages.bytes()];
        let data: Vec<IoSlice<'_>> = content
            .chunks(PAGE_SIZE)
            .zip(sums)
            .filter(|(_, sum)| **sum != 0)
            .map(|(page, _)| IoSlice::new(page))
            .collect();
        let head = PagesHead {
            request: RequestId::PUSH,
            range: pages,
            epoch,
            encoding: Encoding::Raw,
            checksums: Checksums::from(sums),
            data_length: data.len() * PAGE_SIZE,
        };
        self.push.bytes.fetch_add(head.data_length as u64, Relaxed);
        self.sender
            .send_pages_with(&head, &data, |stream| wait_for_room(self.push, stream))?;
        Ok(())
    }

    /// Sends that pages are zero, those of them of which the other side has something else, or nothing.
    fn send_zero(&mut self, pages: PageRange, epoch: Epoch) -> Result<(), PushError> {
        let mut rest = pages;
        while rest.count > 0 {
            let sent = |page: &PageIndex| self.push.sent[page.0 as usize].load(Relaxed);
            let Some(first) = rest.pages().find(|page| sent(page) != 0) else {
                break;
            };
            let rest_of = rest.from(first);
            let count = rest_of.pages().take_while(|page| sent(page) != 0).count() as u64;
            let range = PageRange::new(first, count.min(MAX_RANGE_PAGES));
            self.say(&Message::Zero(Zero {
                request: RequestId::PUSH,
                range,
                epoch,
            }))?;
            for page in range.pages() {
                self.push.sent[page.0 as usize].store(0, Relaxed);
            }
            rest = rest.from(range.end());
        }
        self.push.dealt.fetch_add(pages.count, Relaxed);
        Ok(())
    }

    fn say(&mut self, message: &Message<'_>) -> Result<(), PushError> {
        let push = self.push;
        self.push.bytes.fetch_add(64, Relaxed);
        Ok(self
            .sender
            .send_with(message, |stream| wait_for_room(push, stream))?)
    }

    fn await_barrier(&mut self, round: u64) -> Result<(), PushError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if self.push.has_ended() {
                return Err(PushError::Ended);
            }
            if left.is_zero() {
                return Err(ChannelError::Quiet.into());
            }
            if !self.receiver.has_more(self.stream, left)? {
                continue;
            }
            while let Some(message) = self.receiver.next_message()? {
                match message {
                    Message::BarrierAck { number } if number == round => return Ok(()),
                    Message::Ping { token } => {
                        self.sender.send(&Message::Pong { token })?;
                    }
                    Message::Goodbye(_) => return Err(ChannelError::Closed.into()),
                    _ => {}
                }
            }
        }
    }
}

/// Waiting on a channel without a time-out of its own.
pub(super) trait Await {
    /// Waits until something has come, and takes it; no longer than `patience`.
    fn has_more(&mut self, stream: &Stream, patience: Duration) -> Result<bool, ChannelError>;
}

impl Await for Receiver {
    fn has_more(&mut self, stream: &Stream, patience: Duration) -> Result<bool, ChannelError> {
        // What TLS has decrypted does not show in the socket.
        if self.fill()? {
            return Ok(true);
        }
        if !stream.wait_to_read(patience).map_err(ChannelError::Lost)? {
            return Ok(false);
        }
        self.fill()
    }
}

/// Waits until a connection takes more. It may take as long as whoever is at the other end may say nothing.
fn wait_for_room(push: &Push, stream: &Stream) -> std::io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if push.has_ended() {
            return Err(std::io::ErrorKind::ConnectionAborted.into());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        // At most 100 ms, which is a valid time.
        let wait = Timespec::try_from(left.min(Duration::from_millis(100))).unwrap_or_default();
        match poll(&mut [PollFd::new(stream, PollFlags::OUT)], Some(&wait)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Pieces of at most [`STEP`] pages.
fn steps(pages: PageRange) -> impl Iterator<Item = PageRange> {
    let starts = (pages.start.0..pages.end().0).step_by(STEP as usize);
    starts.map(move |start| PageRange::new(PageIndex(start), STEP).clamp_to(pages.end()))
}
