//! What is typed at, or piped into, the guest.

use std::os::fd::{AsRawFd, OwnedFd};

use event_manager::{Error, EventOps, EventSet, Events};
use rustix::{io::Errno, termios::isatty};
use tracing::{debug, warn};

use super::terminal::{self, RawMode};

/// Where input comes from, for as long as it comes.
#[derive(Debug)]
pub(super) struct Input {
    source: OwnedFd,
    raw_mode: Option<RawMode>,
    waiting: Waiting,
}

/// How the event loop learns of input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waiting {
    /// Not at all at the moment.
    Paused,
    /// By the descriptor.
    Listening,
    /// It need not: this is a file, which can be read at any time and cannot be polled.
    File,
}

/// What a read gave.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// This many bytes, not 0.
    Bytes(usize),
    /// Nothing at the moment.
    Nothing,
    /// Nothing ever again.
    End,
}

impl Input {
    /// Takes input from `source`. A terminal is switched to raw mode; one that belongs to another job is left alone.
    pub(super) fn open(source: OwnedFd) -> Result<Option<Self>, Errno> {
        let raw_mode = if isatty(&source) {
            if terminal::is_of_another_job(&source) {
                debug!("in the background: the guest gets no input");
                return Ok(None);
            }
            Some(RawMode::enter(source.try_clone().map_err(|error| {
                Errno::from_io_error(&error).unwrap_or(Errno::MFILE)
            })?)?)
        } else {
            None
        };
        Ok(Some(Self {
            source,
            raw_mode,
            waiting: Waiting::Paused,
        }))
    }

    /// Whether `fd`, which was reported, is its descriptor.
    pub(super) fn is(&self, fd: i32) -> bool {
        self.source.as_raw_fd() == fd
    }

    /// Whether it can be read without waiting for the event loop to say so.
    pub(super) fn is_file(&self) -> bool {
        self.waiting == Waiting::File
    }

    /// Lets the event loop report input.
    pub(super) fn listen(&mut self, ops: &mut EventOps) {
        if self.waiting != Waiting::Paused {
            return;
        }
        self.waiting = match ops.add(Events::new(&self.source, EventSet::IN)) {
            Ok(()) => Waiting::Listening,
            // What cannot be polled never makes a reader wait: regular files, /dev/null.
            Err(Error::Epoll(error)) if error.errno() == libc::EPERM => Waiting::File,
            Err(error) => {
                warn!(%error, "cannot wait for input; the guest gets none");
                Waiting::Paused
            }
        };
    }

    /// Lets it stop. Removed and not muted, because a descriptor that hung up is reported even when muted.
    pub(super) fn pause(&mut self, ops: &mut EventOps) {
        if self.waiting == Waiting::Listening {
            if let Err(error) = ops.remove(Events::empty(&self.source)) {
                debug!(%error, "input was not listened to");
            }
            self.waiting = Waiting::Paused;
        }
    }

    /// Reads what there is, into a buffer that is not empty.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Read {
        match rustix::io::read(&self.source, buffer) {
            Ok(0) => Read::End,
            Ok(length) => Read::Bytes(length),
            Err(Errno::AGAIN | Errno::INTR) => Read::Nothing,
            Err(error) => {
                debug!(%error, "input ends");
                Read::End
            }
        }
    }

    /// Gives the terminal back. May be called again.
    pub(super) fn restore_terminal(&mut self) {
        if let Some(raw_mode) = &mut self.raw_mode {
            raw_mode.restore();
        }
    }
}
