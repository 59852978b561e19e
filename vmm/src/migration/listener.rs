//! Who calls a VMM that waits for a VM: everybody is listened to for a short time, and nobody keeps anybody else waiting.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use umem::call::Opened;
use umem::channel::{ChannelError, Receiver, Sender};
use umem::link::{Listener, Stream};
use umem::wire::{ChannelKind, Hello, Incoming, Message, RefuseCode, Refused, VERSION, Welcome, WireError};

use super::{BACKOFF, PATIENCE};

/// Connections at a time; further ones are sent away.
const MOST: usize = 64;

/// Who decides about callers.
pub(super) trait Host: Send + Sync + 'static {
    /// What a hello is answered.
    fn welcome(&self, hello: &Hello<'_>) -> Result<Welcome, (RefuseCode, String)>;

    /// A hello was answered, but the answer could not be sent.
    fn not_welcomed(&self, kind: ChannelKind, error: ChannelError);

    /// What becomes of the channel. Called by a thread of its own, which may take as long as it likes.
    fn take(&self, kind: ChannelKind, opened: Opened);
}

/// Listens until it is dropped.
#[derive(Debug)]
pub(super) struct Door {
    stop: Arc<OwnedFd>,
}

impl Door {
    /// Listens for `host`.
    pub(super) fn open(listener: Listener, host: Arc<impl Host>) -> io::Result<Self> {
        // Who is gone before being taken is not to be waited for.
        rustix::io::ioctl_fionbio(&listener, true)?;
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let stopped = Arc::clone(&stop);
        thread::Builder::new()
            .name("migration-door".into())
            .spawn(move || accept_all(&listener, &stopped, &host))?;
        Ok(Self { stop })
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // The counter cannot overflow, so the write cannot fail.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
    }
}

fn accept_all(listener: &Listener, stop: &OwnedFd, host: &Arc<impl Host>) {
    let inside = Arc::new(AtomicUsize::new(0));
    loop {
        let mut ready = [
            PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN),
        ];
        match poll(&mut ready, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => {
                tracing::error!(error = %errno, "cannot listen any more");
                return;
            }
        }
        if !ready[0].revents().is_empty() {
            return;
        }
        let Ok(stream) = listener.accept() else {
            // Out of descriptors, perhaps: who waits there still waits, and this would do nothing else.
            thread::sleep(BACKOFF.0);
            continue;
        };
        if inside.fetch_add(1, SeqCst) >= MOST {
            inside.fetch_sub(1, SeqCst);
            tracing::warn!("a connection was sent away: too many at a time");
            continue;
        }
        let (host, place) = (Arc::clone(host), Place(Arc::clone(&inside)));
        let thread = thread::Builder::new().name("migration-call".into());
        let spawned = thread.spawn(move || {
            if let Some((kind, opened)) = answer(stream, &*host) {
                host.take(kind, opened);
            }
            drop(place);
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread for a connection");
        }
    }
}

/// One of those who are inside.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

/// Hears a hello, and answers it.
fn answer(stream: Stream, host: &impl Host) -> Option<(ChannelKind, Opened)> {
    if let Err(error) = stream.handshake(PATIENCE) {
        let error = &error as &dyn std::error::Error;
        tracing::warn!(error, "caller sent away: the TLS handshake failed");
        return None;
    }
    stream.set_timeouts(Some(PATIENCE), Some(PATIENCE)).ok()?;
    let stream = Arc::new(stream);
    let mut sender = Sender::new(Arc::clone(&stream));
    let mut receiver = Receiver::new(Arc::clone(&stream), Incoming::acceptor());
    let refuse = |sender: &mut Sender, code, text: &str| {
        tracing::warn!(%code, text, "caller sent away");
        let refused = Refused {
            version: VERSION,
            code,
            text,
        };
        // Nobody waits for who does not even read this.
        let _ = sender.send(&Message::Refused(refused));
    };
    let (kind, welcome) = match receiver.receive() {
        Ok(Message::Hello(hello)) => match host.welcome(&hello) {
            Ok(welcome) => (hello.channel, welcome),
            Err((code, text)) => {
                refuse(&mut sender, code, &text);
                return None;
            }
        },
        // `Incoming` lets nothing else through.
        Ok(_) => return None,
        // It is told what it does not know by itself: that it speaks another version, for example.
        Err(ChannelError::Protocol(error))
            if !matches!(
                error,
                WireError::HeaderChecksum | WireError::PayloadChecksum { .. }
            ) =>
        {
            refuse(&mut sender, error.refuse_code(), &error.to_string());
            return None;
        }
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "caller sent away: it did not say hello");
            return None;
        }
    };
    if let Err(error) = sender.send(&Message::Welcome(welcome)) {
        host.not_welcomed(kind, error);
        return None;
    }
    // Which of them may wait is known to who receives.
    stream.set_timeouts(None, Some(PATIENCE)).ok()?;
    receiver
        .incoming
        .open(kind, umem::wire::Role::Provider, welcome.features);
    let opened = Opened {
        sender,
        receiver,
        stream,
        welcome,
    };
    Some((kind, opened))
}
