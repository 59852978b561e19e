//! The page server: RAM images for any number of fetchers at once.
//!
//! ```text
//!              accept                all of a hello                  turns
//!   listener ----------> lobby ------------------------> channel ----------------> pages
//!                        no thread, bounded,             a thread and a buffer,     as many at a time as there are
//!                        the oldest goes first           bounded                    processors, least served first
//! ```
//!
//! A channel's thread waits for requests and answers them in turn; what channels share is the page cache. Who connects and
//! says nothing is let go, and so is who asks and does not read the answers. What somebody does costs nobody else more than
//! their turn.

mod channel;
mod client;
mod lobby;
mod lz4;
mod metrics;
mod provider;
mod served;
mod turns;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use self::channel::Channel;
use self::client::Client;
use self::lobby::Lobby;
use self::metrics::{Metrics, Refusal, hex};
pub use self::provider::{Provider, Unreadable};
use self::served::Served;
use self::turns::{Class, Turns};
use crate::call;
use crate::channel::ChannelError;
use crate::image::Image;
use crate::link::{Listener, Stream};
use crate::metrics::Page;
use crate::wire::{ChannelKind, Epoch, Features, Hello, RefuseCode, Role, SessionId, VERSION, Welcome};

/// Channels at a time, over all clients.
const MAX_CHANNELS: usize = 1024;

/// Connections at a time that have not said hello.
const MAX_LOBBY: usize = 4096;

/// Descriptors for everything else.
const OTHER_DESCRIPTORS: usize = 64;

/// How long a new channel may take to say hello, and an answer may wait to be read.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often each side of a channel says something. Who has not been heard of for four times as long is gone.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// How long channels may go on after the server was told to end.
const DRAIN: Duration = Duration::from_secs(5);

/// How long nobody is taken when there is no descriptor left for anybody.
const NO_DESCRIPTOR: Duration = Duration::from_millis(100);

/// Pages read and sent at a time: 256 KiB, which stays in the processor's cache between being read and being sent.
const STEP: u64 = 64;

/// Requests taken at a time on a channel. They are answered in turn; what is beyond waits in the socket.
const WINDOW: u16 = 64;

/// What a server has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServerStats {
    /// Channels opened.
    pub channels: u64,
    /// Connections refused, or ended for what they said or did not say.
    pub refused: u64,
    /// Requests answered.
    pub requests: u64,
    /// Pages sent, zero pages included.
    pub pages: u64,
    /// Bytes of page content sent, before any compression.
    pub bytes: u64,
}

/// A page server.
#[derive(Clone, Debug)]
pub struct Server {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// By name.
    images: HashMap<String, Served>,
    session_key: [u8; 16],
    sessions: AtomicU64,
    stopping: AtomicBool,
    /// Channels are ended that have not ended by themselves.
    stopped: AtomicBool,
    stop: OwnedFd,
    channels: Mutex<Channels>,
    ended: Condvar,
    turns: Turns,
    /// Connections that have not said hello.
    silent: AtomicUsize,
    metrics: Metrics,
}

#[derive(Debug, Default)]
struct Channels {
    next: u64,
    open: HashMap<u64, (Arc<Channel>, Option<Client>)>,
}

/// Ends a server, from any thread.
#[derive(Clone, Debug)]
pub struct ServerStopper(Arc<Shared>);

impl ServerStopper {
    /// No new channel is taken; those that are open may end what they have begun.
    pub fn stop(&self) {
        self.0.stopping.store(true, SeqCst);
        // The counter cannot overflow, so the write cannot fail.
        let _ = rustix::io::write(&self.0.stop, &1u64.to_ne_bytes());
    }
}

impl Server {
    /// A server of these images, by name.
    pub fn new(images: HashMap<String, Arc<Image>>) -> io::Result<Self> {
        let mut session_key = [0; 16];
        rustix::rand::getrandom(&mut session_key, rustix::rand::GetRandomFlags::empty())?;
        let images = images
            .into_iter()
            .map(|(name, image)| Ok((name.clone(), Served::new(name, image)?)))
            .collect::<io::Result<_>>()?;
        let processors = thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            shared: Arc::new(Shared {
                images,
                session_key,
                sessions: AtomicU64::new(0),
                stopping: AtomicBool::new(false),
                stopped: AtomicBool::new(false),
                stop: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
                channels: Mutex::new(Channels::default()),
                ended: Condvar::new(),
                turns: Turns::new(processors),
                silent: AtomicUsize::new(0),
                metrics: Metrics::default(),
            }),
        })
    }

    /// What ends it.
    pub fn stopper(&self) -> ServerStopper {
        ServerStopper(Arc::clone(&self.shared))
    }

    /// Serves pages on a channel that this side has opened, until it ends. That its client closes it is no error.
    pub fn attend(
        &self,
        opened: call::Opened,
        kind: ChannelKind,
        provider: &dyn Provider,
    ) -> Result<(), ChannelError> {
        self.shared.attend_called(opened, kind, provider)
    }

    /// What it has done so far.
    pub fn stats(&self) -> ServerStats {
        let metrics = &self.shared.metrics;
        ServerStats {
            channels: metrics.channels(),
            refused: metrics.refused(),
            requests: metrics.requests(),
            pages: metrics.pages_sent(),
            bytes: metrics.content(),
        }
    }

    /// All that it counts, in the OpenMetrics text format that Prometheus reads.
    pub fn metrics(&self) -> String {
        let shared = Arc::clone(&self.shared);
        crate::metrics::encode(move |page| shared.write_metrics(page))
    }

    /// Serves who connects to `listener`, until stopped; then the listener is closed, so that a successor can have its
    /// address, and clients are told.
    pub fn serve(&self, listener: Listener) -> io::Result<()> {
        let result = self.shared.take_all(&listener);
        drop(listener);
        if result.is_ok() {
            self.shared.drain();
        }
        result
    }
}

/// How many connections may be in the lobby and how many channels may be open, with the descriptors that there may be.
fn capacities() -> (usize, usize) {
    let most = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let most = usize::try_from(most)
        .unwrap_or(usize::MAX)
        .saturating_sub(OTHER_DESCRIPTORS);
    let channels = (most / 2).clamp(1, MAX_CHANNELS);
    (most.saturating_sub(channels).clamp(1, MAX_LOBBY), channels)
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Channels> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(SeqCst)
    }

    fn has_stopped(&self) -> bool {
        self.stopped.load(SeqCst)
    }

    /// Takes who connects until stopped.
    fn take_all(self: &Arc<Self>, listener: &Listener) -> io::Result<()> {
        // Who is gone before being taken is not to be waited for.
        rustix::io::ioctl_fionbio(listener, true)?;
        let (lobby, channels) = capacities();
        let mut lobby = Lobby::new(lobby, PATIENCE)?;
        let mut pause: Option<Instant> = None;
        while !self.is_stopping() {
            let late = lobby.dismiss_late(&self.metrics);
            self.silent.store(lobby.len(), Relaxed);
            let until = late.into_iter().chain(pause).min();
            let timeout = until.map(|until| until.saturating_duration_since(Instant::now()));
            // At most 10 s, which is a valid time.
            let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
            let listen = if pause.is_some() {
                PollFlags::empty()
            } else {
                PollFlags::IN
            };
            let [_, guests, listening] = {
                let guests = lobby.epoll();
                let mut ready = [
                    PollFd::from_borrowed_fd(self.stop.as_fd(), PollFlags::IN),
                    PollFd::from_borrowed_fd(guests.as_fd(), PollFlags::IN),
                    PollFd::from_borrowed_fd(listener.as_fd(), listen),
                ];
                match rustix::event::poll(&mut ready, timeout.as_ref()) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno.into()),
                }
                ready.map(|fd| !fd.revents().is_empty())
            };
            if guests {
                lobby.look(&self.metrics, |stream| self.welcome(stream, channels))?;
            }
            if pause.is_some_and(|until| until <= Instant::now()) {
                pause = None;
            }
            if listening {
                pause = self.accept(listener, &mut lobby);
            }
        }
        Ok(())
    }

    /// Takes a connection. The answer is until when nobody is to be taken.
    fn accept(&self, listener: &Listener, lobby: &mut Lobby) -> Option<Instant> {
        let error = match listener.accept() {
            Ok(stream) => {
                lobby.enter(stream, &self.metrics);
                return None;
            }
            Err(error) => error,
        };
        match Errno::from_io_error(&error) {
            Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                // There is room again when somebody leaves.
                if lobby.dismiss_oldest(&self.metrics) {
                    return None;
                }
                tracing::warn!(%error, "cannot take a connection");
                Some(Instant::now() + NO_DESCRIPTOR)
            }
            // Gone before it was taken.
            _ => None,
        }
    }

    /// Gives a connection its thread.
    fn welcome(self: &Arc<Self>, stream: Stream, most: usize) {
        let channel = Arc::new(Channel::new(stream));
        let number = {
            let mut channels = self.lock();
            if channels.open.len() >= most {
                drop(channels);
                self.refuse(&channel, RefuseCode::Busy, "as many channels as can be are open");
                return;
            }
            channels.next += 1;
            let number = channels.next;
            channels.open.insert(number, (Arc::clone(&channel), None));
            number
        };
        let shared = Arc::clone(self);
        let thread = thread::Builder::new()
            .name(format!("channel-{number}"))
            .spawn(move || {
                shared.serve_channel(number, &channel);
                shared.forget(number);
            });
        if let Err(error) = thread {
            tracing::warn!(%error, "no thread for a connection");
            self.metrics.refuse(Refusal::Busy);
            self.forget(number);
        }
    }

    /// Whose channel it is, is known now.
    fn join(&self, number: u64, client: Client) {
        if let Some((_, whose)) = self.lock().open.get_mut(&number) {
            *whose = Some(client);
        }
    }

    fn forget(&self, number: u64) {
        if let Some((channel, _)) = self.lock().open.remove(&number) {
            // Whoever else holds it does not keep the connection.
            channel.shutdown();
        }
        self.ended.notify_all();
    }

    /// Says goodbye to all, waits until they have ended, and ends those that do not.
    fn drain(&self) {
        let deadline = Instant::now() + DRAIN;
        let open: Vec<Arc<Channel>> = self
            .lock()
            .open
            .values()
            .map(|(channel, _)| Arc::clone(channel))
            .collect();
        for channel in open {
            channel.say_draining();
        }
        let mut channels = self.lock();
        while !channels.open.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.stopped.store(true, SeqCst);
                for (channel, _) in channels.open.values() {
                    channel.shutdown();
                }
            }
            let wait = left.max(Duration::from_millis(100));
            channels = self
                .ended
                .wait_timeout(channels, wait)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// What a hello is answered.
    fn open(&self, hello: &Hello<'_>) -> Result<(&Served, Welcome), (RefuseCode, String)> {
        if self.is_stopping() {
            return Err((RefuseCode::Draining, "this server is about to end".into()));
        }
        if hello.role != Role::Fetcher {
            return Err((
                RefuseCode::NotPermitted,
                "this server has pages and takes none".into(),
            ));
        }
        let image = match (hello.image, self.images.len()) {
            ("", 1) => self.images.values().next(),
            (name, _) => self.images.get(name),
        };
        let Some(served) = image else {
            let mut names: Vec<&str> = self.images.keys().map(String::as_str).collect();
            names.sort_unstable();
            let text = format!("no image '{}' here; there are: {}", hello.image, names.join(", "));
            return Err((RefuseCode::UnknownImage, text));
        };
        let image = &served.image;
        if !served.is_sound() {
            let text = format!(
                "image '{}' cannot be used: it was damaged or replaced in place",
                served.name
            );
            return Err((RefuseCode::BadImage, text));
        }
        let digest = image.footer().digest;
        if hello.digest.is_some_and(|expected| expected != digest) {
            return Err((
                RefuseCode::WrongDigest,
                format!("image '{}' has another digest", hello.image),
            ));
        }
        if hello.pages.is_some_and(|pages| pages != image.pages()) {
            return Err((
                RefuseCode::WrongSize,
                format!("image '{}' has {} pages", hello.image, image.pages()),
            ));
        }
        let session = if hello.session == SessionId::NEW {
            self.new_session()
        } else {
            hello.session
        };
        let welcome = Welcome {
            version: VERSION,
            features: hello.features.and(Features::LZ4),
            pages: image.pages(),
            epoch: Epoch(0),
            keep_alive_ms: KEEP_ALIVE.as_millis() as u32,
            window: WINDOW,
            session,
            digest: Some(digest),
        };
        Ok((served, welcome))
    }

    /// A number that nobody else has: of this server's random key and a counter.
    fn new_session(&self) -> SessionId {
        let mut id = self.session_key;
        let count = self.sessions.fetch_add(1, Relaxed);
        let hash = blake3::keyed_hash(
            &{
                let mut key = [0; 32];
                key[..16].copy_from_slice(&self.session_key);
                key
            },
            &count.to_le_bytes(),
        );
        id.copy_from_slice(&hash.as_bytes()[..16]);
        SessionId(id)
    }
}

impl Shared {
    fn write_metrics(&self, page: &mut Page<'_>) -> fmt::Result {
        self::metrics::write(page, &self.metrics)?;
        let silent = self.silent.load(Relaxed) as u64;
        page.gauge(
            "umem_serve_connections_silent",
            "Connections that have not said hello",
            silent,
        )?;
        page.gauge(
            "umem_serve_clients",
            "Sessions with at least one open channel",
            self.clients(),
        )?;
        let waiting = self.turns.waiting().map(|(class, waiting)| {
            let name = match class {
                Class::Demand => "demand",
                Class::Background => "background",
            };
            ([("class", name)], waiting as u64)
        });
        page.gauges(
            "umem_serve_turns_waiting",
            "Channels that wait for their turn",
            waiting,
        )?;
        let waits = self.turns.waits();
        page.counter(
            "umem_serve_turn_waits",
            "Times that a channel had to wait for its turn",
            None,
            waits,
        )?;
        let mut images: Vec<&Served> = self.images.values().collect();
        images.sort_unstable_by_key(|served| &served.name);
        let sound = images.iter().map(|served| {
            let digest = hex(&served.image.footer().digest);
            (
                vec![("image", served.name.clone()), ("digest", digest)],
                u64::from(served.is_sound()),
            )
        });
        page.gauges(
            "umem_serve_images",
            "Images: 1 if a client may have it, 0 if it was damaged",
            sound,
        )
    }

    fn clients(&self) -> u64 {
        let channels = self.lock();
        let clients: HashSet<Client> = channels.open.values().filter_map(|(_, client)| *client).collect();
        clients.len() as u64
    }
}
