//! A channel for RAM, at the side that the VM leaves.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Instant;

use umem::call::{CallError, Opened};
use umem::server::Server;
use umem::wire::{ChannelKind, Epoch, Message};

use super::conversation::Dialer;
use super::push::Push;
use super::ram::SharedRam;
use super::{BACKOFF, LAST_BARRIER, MigrationError};

/// A channel for RAM.
pub(super) struct DataChannel {
    pub(super) dialer: Arc<Dialer>,
    pub(super) push: Arc<Push>,
    pub(super) server: Server,
    pub(super) ram: SharedRam,
    pub(super) kind: ChannelKind,
}

impl DataChannel {
    /// Pushes, then serves; connects anew as long as it is wanted.
    pub(super) fn run(&self, mut opened: Opened) {
        let pushed = match self.kind {
            ChannelKind::Background => self.push.push_on(&mut opened),
            _ => self.push.await_last(),
        };
        if pushed.is_err() && !self.push.is_last() {
            return;
        }
        // One that was lost when all was pushed, unnoticed, is called for again as one that is lost later.
        let mut current = pushed.is_ok().then_some(opened);
        let mut pause = BACKOFF.0;
        loop {
            if let Some(opened) = current {
                let began = Instant::now();
                if let Err(error) = self.server.attend(opened, self.kind, &*self.ram) {
                    tracing::info!(error = &error as &dyn std::error::Error, channel = %self.kind, "channel to the destination lost");
                }
                if began.elapsed() >= BACKOFF.1 {
                    pause = BACKOFF.0;
                }
            }
            current = Some(loop {
                if self.push.has_ended() {
                    return;
                }
                thread::sleep(pause);
                pause = (pause * 2).min(BACKOFF.1);
                match self.dialer.call(self.kind, self.dialer.session) {
                    Ok(mut opened) => {
                        // Whoever still waits for pages to be pushed learns that there are none.
                        let last = Message::Barrier {
                            number: LAST_BARRIER,
                            epoch: Epoch(self.dialer.epoch.load(Relaxed)),
                        };
                        if self.kind == ChannelKind::Demand || opened.sender.send(&last).is_ok() {
                            break opened;
                        }
                    }
                    Err(MigrationError::Call {
                        source: CallError::Refused { .. },
                        ..
                    }) => {}
                    Err(error) => {
                        tracing::debug!(error = &error as &dyn std::error::Error, channel = %self.kind, "no channel to the destination");
                    }
                }
            });
        }
    }
}
