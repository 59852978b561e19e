//! One connection: what passes, and what is done to it.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::Shutdown;
use umem::wire::{ChannelKind, MessageType};

use super::frames::{self, Frames};
use super::socket;
use super::{Direction, Fault, Kind, Shared};
use crate::random::Random;

/// The longest that a frame waits for others, and that nothing passes.
const LONGEST: Duration = Duration::from_millis(60);

#[derive(Debug)]
pub(super) struct Connection {
    index: u64,
    client: OwnedFd,
    server: OwnedFd,
    channel: OnceLock<ChannelKind>,
    /// Nothing more passes.
    over: AtomicBool,
    frozen: AtomicBool,
    /// Directions that have ended.
    ended: AtomicU8,
}

impl Connection {
    pub(super) fn new(index: u64, client: OwnedFd, server: OwnedFd) -> Self {
        Self {
            index,
            client,
            server,
            channel: OnceLock::new(),
            over: AtomicBool::new(false),
            frozen: AtomicBool::new(false),
            ended: AtomicU8::new(0),
        }
    }

    pub(super) fn is_frozen(&self) -> bool {
        self.frozen.load(Relaxed) && !self.is_over()
    }

    pub(super) fn is_over(&self) -> bool {
        self.over.load(Relaxed)
    }

    fn ends(&self, towards: Direction) -> (&OwnedFd, &OwnedFd) {
        match towards {
            Direction::Client => (&self.server, &self.client),
            Direction::Server => (&self.client, &self.server),
        }
    }

    /// Ends both directions.
    pub(super) fn cut(&self) {
        self.over.store(true, Relaxed);
        socket::end(&self.client, Shutdown::Both);
        socket::end(&self.server, Shutdown::Both);
    }

    /// Ends both without a word: the ends learn it by a reset.
    fn reset(&self) {
        self.over.store(true, Relaxed);
        socket::reset(&self.client);
        socket::reset(&self.server);
    }
}

/// What becomes of a direction.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    GoOn,
    /// Nothing more of it passes; what comes is taken and thrown away.
    Swallow,
    /// The connection is over.
    End,
}

/// A direction's thread.
pub(super) fn forward(
    shared: &Arc<Shared>,
    connection: &Arc<Connection>,
    towards: Direction,
    faults: &[Fault],
) {
    let mut way = Way {
        shared,
        connection,
        towards,
        frames: Frames::default(),
        extra: 0,
    };
    way.run(faults);
    if connection.ended.fetch_add(1, Relaxed) == 1 {
        shared.forget(connection.index);
    }
}

struct Way<'a> {
    shared: &'a Shared,
    connection: &'a Connection,
    towards: Direction,
    frames: Frames,
    /// By how much frames are numbered higher than they were, because some were added.
    extra: u32,
}

impl Way<'_> {
    fn run(&mut self, faults: &[Fault]) {
        let (from, to) = self.connection.ends(self.towards);
        let mut faults = faults.iter().peekable();
        let mut next = Next::GoOn;
        let mut number = 0;
        while let Some(frame) = self.next_frame(from) {
            if next == Next::Swallow {
                continue;
            }
            self.notice(&frame);
            self.shared
                .hold(self.connection, self.towards, frames::message(&frame).as_ref());
            self.shared.pace(frame.len());
            let fault = faults.next_if(|fault| fault.frame <= number);
            number += 1;
            next = match fault {
                Some(fault) if self.shared.take_fault(fault.kind) => self.harm(fault, frame),
                _ => self.send(&frame),
            };
            if next == Next::End || self.connection.is_over() {
                return;
            }
        }
        // A direction that ended by itself ends beyond, too.
        if !self.connection.is_over() {
            socket::end(to, Shutdown::Write);
        }
    }

    fn notice(&self, frame: &[u8]) {
        if let Some(channel) = frames::channel(frame) {
            let _ = self.connection.channel.set(channel);
        }
        if frames::header(frame).is_some_and(|header| header.kind == MessageType::Refused) {
            self.shared.lock().record.refusals += 1;
        }
    }

    fn next_frame(&mut self, from: &OwnedFd) -> Option<Vec<u8>> {
        let mut frame = self.frames.next(from)?;
        if self.extra > 0 {
            frames::add_to_number(&mut frame, self.extra);
        }
        Some(frame)
    }

    /// Forwards a frame, or what was made of it.
    fn send(&self, bytes: &[u8]) -> Next {
        self.shared.admit(self.connection, bytes.len());
        let (_, to) = self.connection.ends(self.towards);
        if socket::send_all(to, bytes, || self.connection.is_over()) {
            return Next::GoOn;
        }
        if !self.connection.is_over() {
            self.connection.cut();
        }
        Next::End
    }

    fn harm(&mut self, fault: &Fault, mut frame: Vec<u8>) -> Next {
        let mut random = Random::new(fault.seed);
        // A place in the frame: as often in its header as anywhere.
        let at = if random.once_in(2) {
            random.below(frame.len().min(32) as u64)
        } else {
            random.below(frame.len() as u64)
        } as usize;
        match fault.kind {
            Kind::Cut => self.cut(),
            Kind::HalfCut => self.half_cut(),
            Kind::Reset => self.reset(),
            Kind::Truncate => {
                frame.truncate(at);
                match self.send(&frame) {
                    Next::GoOn => match random.below(3) {
                        0 => self.cut(),
                        1 => self.half_cut(),
                        _ => self.reset(),
                    },
                    next => next,
                }
            }
            Kind::Corrupt => {
                let pages = frames::pages_at(&frame, at);
                if let Some(channel) = self.connection.channel.get() {
                    let corrupted = &mut self.shared.lock().record.corrupted;
                    corrupted.extend(pages.into_iter().map(|page| (*channel, page)));
                }
                frame[at] ^= if random.once_in(2) {
                    1 << random.below(8)
                } else {
                    1 + random.below(255) as u8
                };
                self.send(&frame)
            }
            Kind::Insert => {
                let mut garbage: Vec<u8> = (0..=random.below(200)).map(|_| random.below(256) as u8).collect();
                garbage.extend_from_slice(&frame);
                self.send(&garbage)
            }
            Kind::Duplicate => {
                let first = self.send(&frame);
                if random.once_in(2) {
                    self.extra += 1;
                    frames::add_to_number(&mut frame, 1);
                }
                match first {
                    Next::GoOn => self.send(&frame),
                    next => next,
                }
            }
            Kind::Swap => self.swap(frame, random.once_in(2)),
            Kind::Delay => {
                let frames = self.shared.lock().record.frames + 1 + random.below(20);
                let longest = random.moment(LONGEST);
                self.shared.wait(longest, |state| state.record.frames >= frames);
                self.send(&frame)
            }
            Kind::Freeze => {
                let connections = self.shared.lock().record.connections;
                self.connection.frozen.store(true, Relaxed);
                self.shared.wait(random.moment(LONGEST), |state| {
                    state.record.connections > connections
                });
                {
                    // Under the lock, or the other direction may look before and sleep after.
                    let _state = self.shared.lock();
                    self.connection.frozen.store(false, Relaxed);
                }
                self.shared.changed.notify_all();
                self.send(&frame)
            }
            Kind::Dribble => self.dribble(&frame, &mut random),
            Kind::Omit => {
                let end = (at + 1 + random.below(64) as usize).min(frame.len());
                frame.drain(at..end);
                self.send(&frame)
            }
            Kind::Lose => Next::GoOn,
            Kind::Refuse => {
                self.shared.lock().refuse = 1 + random.below(4);
                if random.once_in(2) {
                    self.cut()
                } else {
                    self.reset()
                }
            }
            Kind::Gone => {
                self.shared.lock().record.gone.get_or_insert_with(Instant::now);
                self.shared.close();
                Next::End
            }
        }
    }

    fn cut(&self) -> Next {
        self.connection.cut();
        Next::End
    }

    fn half_cut(&self) -> Next {
        socket::end(self.connection.ends(self.towards).1, Shutdown::Write);
        Next::Swallow
    }

    fn reset(&self) -> Next {
        self.connection.reset();
        Next::End
    }

    /// Forwards the next frame first, if there is one before long.
    fn swap(&mut self, mut frame: Vec<u8>, renumbered: bool) -> Next {
        let (from, _) = self.connection.ends(self.towards);
        if !self.frames.is_ready() {
            let mut fds = [PollFd::new(from, PollFlags::IN)];
            let longest = Timespec::try_from(LONGEST).unwrap();
            if !matches!(poll(&mut fds, Some(&longest)), Ok(1..)) {
                return self.send(&frame);
            }
        }
        let Some(mut successor) = self.next_frame(from) else {
            return self.send(&frame);
        };
        if renumbered
            && let (Some(first), Some(second)) = (frames::header(&frame), frames::header(&successor))
        {
            let distance = second.sequence.wrapping_sub(first.sequence);
            frames::add_to_number(&mut frame, distance);
            frames::add_to_number(&mut successor, distance.wrapping_neg());
        }
        match self.send(&successor) {
            Next::GoOn => self.send(&frame),
            next => next,
        }
    }

    fn dribble(&self, frame: &[u8], random: &mut Random) -> Next {
        let mut rest = frame;
        while !rest.is_empty() {
            let most = if rest.len() > 4096 { 32 << 10 } else { 16 };
            let length = (1 + random.below(most) as usize).min(rest.len());
            let piece = rest[..length].to_vec();
            rest = &rest[length..];
            match self.send(&piece) {
                Next::GoOn => {}
                next => return next,
            }
        }
        Next::GoOn
    }
}
