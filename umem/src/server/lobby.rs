//! Connections that have not said all of a hello yet. They have no thread: one thread looks at all of them, and takes nothing
//! of what they say.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use super::metrics::{Metrics, Refusal};
use crate::link::Stream;
use crate::wire::{HEADER_SIZE, Header, MAX_HELLO, MessageType};

/// The lobby.
#[derive(Debug)]
pub(super) struct Lobby {
    epoll: OwnedFd,
    capacity: usize,
    patience: Duration,
    next: u64,
    /// In the order in which they came.
    guests: BTreeMap<u64, Guest>,
}

#[derive(Debug)]
struct Guest {
    stream: Stream,
    deadline: Instant,
}

/// What a connection has said.
enum Said {
    All,
    NotAll,
    Nonsense,
    /// It is gone.
    Nothing,
}

impl Lobby {
    /// Room for `capacity` connections, each of which may take `patience` to say its hello.
    pub(super) fn new(capacity: usize, patience: Duration) -> rustix::io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            capacity,
            patience,
            next: 0,
            guests: BTreeMap::new(),
        })
    }

    /// Readable when somebody has said something.
    pub(super) fn epoll(&self) -> impl AsFd + '_ {
        &self.epoll
    }

    pub(super) fn len(&self) -> usize {
        self.guests.len()
    }

    /// Takes a connection in; where there is no room, the one that has been silent longest goes.
    pub(super) fn enter(&mut self, stream: Stream, metrics: &Metrics) {
        if self.guests.len() >= self.capacity {
            self.dismiss_oldest(metrics);
        }
        // Each time that something comes: what has been looked at and is not all yet is no reason to look again.
        let flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        if let Err(error) = epoll::add(&self.epoll, &stream, EventData::new_u64(self.next), flags) {
            tracing::warn!(%error, "cannot wait for a connection");
            return;
        }
        let deadline = Instant::now() + self.patience;
        self.guests.insert(self.next, Guest { stream, deadline });
        self.next += 1;
    }

    /// Lets the connection go that has been silent longest. False: there is none.
    pub(super) fn dismiss_oldest(&mut self, metrics: &Metrics) -> bool {
        let oldest = self.guests.pop_first();
        if oldest.is_some() {
            metrics.refuse(Refusal::Crowded);
        }
        oldest.is_some()
    }

    /// Lets those go whose time is over, and says when the next one's is.
    pub(super) fn dismiss_late(&mut self, metrics: &Metrics) -> Option<Instant> {
        let now = Instant::now();
        while let Some(oldest) = self.guests.first_entry() {
            let deadline = oldest.get().deadline;
            if deadline > now {
                return Some(deadline);
            }
            metrics.refuse(Refusal::Silent);
            oldest.remove();
        }
        None
    }

    /// Hands those that have said a hello, or what will be refused as one, to `call`.
    pub(super) fn look(&mut self, metrics: &Metrics, mut call: impl FnMut(Stream)) -> rustix::io::Result<()> {
        let mut events = [const { std::mem::MaybeUninit::<epoll::Event>::uninit() }; 64];
        let (events, _) = match epoll::wait(
            &self.epoll,
            &mut events,
            Some(&rustix::event::Timespec::default()),
        ) {
            Ok(events) => events,
            Err(Errno::INTR) => return Ok(()),
            Err(errno) => return Err(errno),
        };
        for event in events {
            let number = event.data.u64();
            let Some(guest) = self.guests.get(&number) else {
                continue;
            };
            let said = said(&guest.stream);
            if matches!(said, Said::NotAll) {
                continue;
            }
            let Some(guest) = self.guests.remove(&number) else {
                continue;
            };
            match said {
                Said::All => {
                    // Whoever reads from it now is no matter of the lobby.
                    let _ = epoll::delete(&self.epoll, &guest.stream);
                    call(guest.stream);
                }
                Said::Nonsense => metrics.refuse(Refusal::Garbage),
                Said::Nothing | Said::NotAll => metrics.leave(),
            }
        }
        Ok(())
    }
}

/// Looks at what has come, and leaves it where it is.
fn said(stream: &Stream) -> Said {
    if stream.is_encrypted() {
        // The handshake is the channel's own affair, and who begins none has little time for it.
        return match recv(stream, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((0, _)) => Said::Nothing,
            Ok(_) => Said::All,
            Err(Errno::AGAIN | Errno::INTR) => Said::NotAll,
            Err(_) => Said::Nothing,
        };
    }
    let mut bytes = [0; HEADER_SIZE + MAX_HELLO];
    let length = match recv(stream, &mut bytes, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((0, _)) => return Said::Nothing,
        Ok((length, _)) => length,
        Err(Errno::AGAIN | Errno::INTR) => return Said::NotAll,
        Err(_) => return Said::Nothing,
    };
    let Some((header, payload)) = bytes[..length].split_first_chunk() else {
        return Said::NotAll;
    };
    match Header::decode(header) {
        Ok(header) if header.kind != MessageType::Hello => Said::Nonsense,
        Ok(header) if payload.len() < header.length as usize => Said::NotAll,
        Ok(_) => Said::All,
        Err(_) => Said::Nonsense,
    }
}
