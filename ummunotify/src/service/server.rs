//! The service's side.
//!
//! One thread serves all clients, and never waits for one of them: requests and replies are small, and a client that does not take
//! its reply is served no further. Whoever makes a change tells all clients from its own thread, and waits there for those that
//! want to acknowledge it.

use std::collections::BTreeMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown};
use rustix::pipe::{PipeFlags, pipe_with};

use super::protocol::{
    self, CLIENTS_AT_MOST, EVENTS_AT_MOST, LONGEST_LIMIT, RANGES_AT_MOST, REQUEST_SIZE, Request,
};
use crate::abi;
use crate::driven::{Driven, Invalidation};
use crate::queue::Event;
use crate::ranges::{AddressRange, Cookie};

/// How long a client may take for its first request.
const HELLO_PATIENCE: Duration = Duration::from_secs(10);

/// Between two attempts at what the system has no room for.
const PAUSE: Duration = Duration::from_millis(10);

/// Requests served in a row, before others are looked at.
const REQUESTS_IN_A_ROW: usize = 64;

/// How a service works.
#[derive(Clone, Copy, Debug)]
pub struct ServiceOptions {
    /// The longest that a change waits for an acknowledgement; what clients ask for is shortened to this.
    pub limit: Duration,
}

impl Default for ServiceOptions {
    fn default() -> Self {
        Self {
            limit: Duration::from_secs(1),
        }
    }
}

/// Tells clients at a socket of changes. It ends when it is dropped.
#[derive(Debug)]
pub struct Service {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What became of a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed<T> {
    /// What making it gave.
    pub result: T,
    /// Clients that were told of it.
    pub told: usize,
    /// Process ids of clients that did not acknowledge it in time, and are clients no longer.
    pub late: Vec<i32>,
}

/// What a service has done so far, and for whom.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceStatus {
    /// Changes that were told of.
    pub changes: u64,
    /// Of those the ones that hit a range of some client.
    pub hits: u64,
    /// Changes that were acknowledged, each once for each client that did.
    pub acknowledged: u64,
    /// Clients that did not acknowledge in time.
    pub late: u64,
    /// Connections refused because there were too many.
    pub refused: u64,
    /// The clients that there are.
    pub clients: Vec<ClientStatus>,
}

/// A client, as the service sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientStatus {
    /// Its process, as the kernel names it here.
    pub pid: i32,
    /// How long changes wait for its acknowledgement, if they do.
    pub limit: Option<Duration>,
    /// Its ranges.
    pub ranges: Vec<(Cookie, AddressRange)>,
    /// Its counter.
    pub counter: u64,
    /// The last change that it was told of and is to acknowledge, and the last that it has acknowledged.
    pub begun: u64,
    /// See there.
    pub acknowledged: u64,
}

#[derive(Debug)]
struct Shared {
    options: ServiceOptions,
    clients: Mutex<Clients>,
    /// Held by who makes a change: one after another.
    changing: Mutex<()>,
    /// Written to when the thread is to end.
    wake: OwnedFd,
    ended: AtomicBool,
    change: AtomicU64,
    hits: AtomicU64,
    acknowledged: AtomicU64,
    late: AtomicU64,
    refused: AtomicU64,
}

#[derive(Debug, Default)]
struct Clients {
    all: Vec<Arc<Peer>>,
    /// The next client's.
    number: u64,
}

/// A client.
#[derive(Debug)]
struct Peer {
    /// Grows from client to client.
    number: u64,
    pid: i32,
    stream: UnixStream,
    driven: Driven,
    state: Mutex<State>,
    /// It has acknowledged something, or is gone.
    acknowledged: Condvar,
    since: Instant,
}

#[derive(Debug)]
struct State {
    /// It has said hello.
    greeted: bool,
    /// How long changes wait for its acknowledgement, if they do.
    limit: Option<Duration>,
    /// Readable, by one byte in it, while there is something to read. The client has the first one too.
    ready: Option<(OwnedFd, OwnedFd)>,
    announced: bool,
    ranges: BTreeMap<u64, AddressRange>,
    /// Beginnings and ends of changes that it was not told of yet.
    changes: Vec<abi::RawEvent>,
    begun: u64,
    acknowledged: u64,
    /// It is a client no longer.
    gone: bool,
    /// What of a request has come.
    request: Vec<u8>,
    /// What of a reply is still to be sent.
    reply: Vec<u8>,
}

impl Service {
    /// Serves whoever connects to `listener`.
    pub fn start(listener: UnixListener, options: ServiceOptions) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let shared = Arc::new(Shared {
            options: ServiceOptions {
                limit: options.limit.min(LONGEST_LIMIT),
            },
            clients: Mutex::default(),
            changing: Mutex::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            ended: AtomicBool::new(false),
            change: AtomicU64::new(0),
            hits: AtomicU64::new(0),
            acknowledged: AtomicU64::new(0),
            late: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        });
        let serving = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("invalidations".into())
            .spawn(move || serving.serve(&listener))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Makes a change of what lies behind `ranges`, by `make`, which is called once whatever the clients do.
    ///
    /// Before it is, the counter and the events of every client with a range that is hit have moved, and those that wanted to
    /// acknowledge that have, or are clients no longer: because they are gone, or because they did not do it in time. Changes are
    /// made one after another.
    pub fn change<T>(&self, ranges: &[AddressRange], make: impl FnOnce() -> T) -> Changed<T> {
        let shared = &self.shared;
        let _turn = shared.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let change = shared.change.fetch_add(1, Relaxed) + 1;
        let (clients, next) = {
            let clients = shared.clients();
            (clients.all.clone(), clients.number)
        };
        let mut going_on: Vec<Invalidation<'_>> = Vec::new();
        let mut told: Vec<&Arc<Peer>> = Vec::new();
        for client in &clients {
            // Held, so that the client reads all events of the change or none of them before its beginning.
            let mut state = client.lock();
            if state.gone {
                continue;
            }
            let begun = ranges.iter().filter_map(|range| client.driven.begin(*range).ok());
            let first = going_on.len();
            going_on.extend(begun);
            if going_on[first..].iter().any(Invalidation::hit) {
                told.push(client);
                client.tell(&mut state, protocol::begin(change));
            }
        }
        if !told.is_empty() {
            shared.hits.fetch_add(1, Relaxed);
        }
        let began = Instant::now();
        let late: Vec<i32> = told
            .iter()
            .filter(|client| !client.await_acknowledgement(change, began))
            .map(|client| {
                client.let_go();
                client.pid
            })
            .collect();
        shared.late.fetch_add(late.len() as u64, Relaxed);
        let result = make();
        // What was registered meanwhile hears of it now: who registered may have looked at what went.
        drop(going_on);
        for client in shared.clients().all.iter().filter(|client| client.number >= next) {
            let mut state = client.lock();
            for range in ranges {
                // In a child made by fork there is nobody to tell.
                let _ = client.driven.invalidate(*range);
            }
            client.announce(&mut state);
        }
        for client in &clients {
            let mut state = client.lock();
            if state.begun == change {
                client.tell(&mut state, protocol::end(change));
            }
            client.announce(&mut state);
        }
        Changed {
            result,
            told: told.len(),
            late,
        }
    }

    /// What lay behind `ranges` has changed already. Nobody is waited for.
    pub fn changed(&self, ranges: &[AddressRange]) {
        let shared = &self.shared;
        let _turn = shared.changing.lock().unwrap_or_else(PoisonError::into_inner);
        shared.change.fetch_add(1, Relaxed);
        let clients = shared.clients().all.clone();
        let mut hit = false;
        for client in &clients {
            let mut state = client.lock();
            for range in ranges {
                hit |= client.driven.invalidate(*range).unwrap_or(false);
            }
            client.announce(&mut state);
        }
        shared.hits.fetch_add(u64::from(hit), Relaxed);
    }

    /// What it has done so far, and for whom.
    pub fn status(&self) -> ServiceStatus {
        let shared = &self.shared;
        let clients = shared.clients().all.clone();
        ServiceStatus {
            changes: shared.change.load(Relaxed),
            hits: shared.hits.load(Relaxed),
            acknowledged: shared.acknowledged.load(Relaxed),
            late: shared.late.load(Relaxed),
            refused: shared.refused.load(Relaxed),
            clients: clients.iter().filter_map(|client| client.status()).collect(),
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.shared.ended.store(true, SeqCst);
        // Written once, so that it is not full.
        let _ = rustix::io::write(&self.shared.wake, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // It has nothing to say.
            let _ = thread.join();
        }
        let clients = std::mem::take(&mut self.shared.clients().all);
        for client in clients {
            client.let_go();
        }
    }
}

impl Shared {
    fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread.
    fn serve(&self, listener: &UnixListener) {
        while !self.ended.load(SeqCst) {
            let clients = self.clients().all.clone();
            let greeted = clients.iter().all(|client| client.lock().greeted);
            let fixed = [
                PollFd::new(&self.wake, PollFlags::IN),
                PollFd::new(listener, PollFlags::IN),
            ];
            let of_clients = clients
                .iter()
                .map(|client| PollFd::new(&client.stream, client.awaits()));
            let mut descriptors: Vec<PollFd<'_>> = fixed.into_iter().chain(of_clients).collect();
            let tick = Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            };
            match poll(&mut descriptors, (!greeted).then_some(&tick)) {
                Ok(_) | Err(Errno::INTR) => {}
                // No memory for the kernel's list: others may give some back.
                Err(_) => std::thread::sleep(PAUSE),
            }
            let ready: Vec<bool> = descriptors.iter().map(|of| !of.revents().is_empty()).collect();
            for (client, ready) in clients.iter().zip(&ready[2..]) {
                let overdue = !client.lock().greeted && client.since.elapsed() > HELLO_PATIENCE;
                if (*ready && !self.serve_client(client)) || overdue {
                    client.let_go();
                    self.clients().all.retain(|other| !Arc::ptr_eq(other, client));
                }
            }
            if ready[1] {
                self.accept(listener);
            }
        }
    }

    fn accept(&self, listener: &UnixListener) {
        // Of many, others may be served in between.
        let Ok((stream, _)) = listener.accept() else {
            // Out of descriptors, perhaps: whoever waits there is still waiting, and this thread would do nothing else.
            std::thread::sleep(PAUSE);
            return;
        };
        let admitted = stream.set_nonblocking(true).and_then(|()| {
            let mut clients = self.clients();
            if clients.all.len() < CLIENTS_AT_MOST {
                let client = Peer::new(stream, clients.number)?;
                clients.number += 1;
                clients.all.push(Arc::new(client));
            } else {
                self.refused.fetch_add(1, Relaxed);
                let text = format!("{CLIENTS_AT_MOST} clients are served, and there can be no more");
                let refusal = protocol::refusal(libc::EBUSY, &text);
                // It fits into an empty socket, and is all that this client gets.
                let _ = rustix::net::send(&stream, &refusal, SendFlags::NOSIGNAL);
            }
            Ok(())
        });
        // Who is not admitted for lack of descriptors sees the connection closed.
        let _: io::Result<()> = admitted;
    }

    /// Serves what a client has asked for. False: it is a client no longer.
    fn serve_client(&self, client: &Peer) -> bool {
        for _ in 0..REQUESTS_IN_A_ROW {
            let mut state = client.lock();
            if state.gone {
                return false;
            }
            match client.flush(&mut state) {
                Sent::All => {}
                Sent::Part => return true,
                Sent::Closed => return false,
            }
            let request = match client.receive(&mut state) {
                Received::Request(request) => request,
                Received::Nothing => return true,
                Received::Closed => return false,
            };
            let reply = match Request::decode(&request) {
                Ok(request) if state.greeted => self.answer(client, &mut state, request),
                Ok(Request::Hello { limit }) => {
                    if client.greet(&mut state, limit.map(|limit| limit.min(self.options.limit))) {
                        continue;
                    }
                    return false;
                }
                Ok(_) => Err(Refused::fatal("the first request is not a hello")),
                Err(bad) => Err(Refused::fatal(&bad.to_string())),
            };
            let fatal = reply.as_ref().is_err_and(|refused| refused.fatal);
            state.reply = reply.unwrap_or_else(|refused| protocol::refusal(refused.errno, &refused.text));
            if fatal {
                // As much as goes at once; the connection ends anyway.
                client.flush(&mut state);
                return false;
            }
        }
        true
    }

    fn answer(&self, client: &Peer, state: &mut State, request: Request) -> Result<Vec<u8>, Refused> {
        match request {
            Request::Hello { .. } => return Err(Refused::fatal("hello is the first request, and only that")),
            Request::Register { range, cookie } => {
                if state.ranges.len() == RANGES_AT_MOST {
                    let text =
                        format!("{RANGES_AT_MOST} ranges are registered, and a client can have no more");
                    return Err(Refused::new(libc::ENOMEM, text));
                }
                let registered = client.driven.register(range, cookie);
                registered.map_err(|error| Refused::new(error.errno(), error.to_string()))?;
                state.ranges.insert(cookie.0, range);
            }
            Request::Unregister { cookie } => {
                let unregistered = client.driven.unregister(cookie);
                unregistered.map_err(|error| Refused::new(error.errno(), error.to_string()))?;
                state.ranges.remove(&cookie.0);
            }
            Request::Read { max } => {
                let events = client.read(state, (max as usize).min(EVENTS_AT_MOST));
                return Ok(protocol::reply(request, 0, &events));
            }
            Request::Acknowledge { change } => {
                if change > state.begun {
                    let text = format!("change {change} has not begun");
                    return Err(Refused::new(libc::EINVAL, text));
                }
                if change > state.acknowledged {
                    state.acknowledged = change;
                    self.acknowledged.fetch_add(1, Relaxed);
                    client.acknowledged.notify_all();
                }
            }
        }
        Ok(protocol::reply(request, 0, &[]))
    }
}

/// Why a request is not served.
struct Refused {
    errno: i32,
    text: String,
    /// The client does not keep to the protocol.
    fatal: bool,
}

impl Refused {
    fn new(errno: i32, text: String) -> Self {
        Self {
            errno,
            text,
            fatal: false,
        }
    }

    fn fatal(text: &str) -> Self {
        Self {
            errno: libc::EPROTO,
            text: text.to_owned(),
            fatal: true,
        }
    }
}

enum Sent {
    All,
    Part,
    Closed,
}

enum Received {
    Request([u8; REQUEST_SIZE]),
    Nothing,
    Closed,
}

impl Peer {
    fn new(stream: UnixStream, number: u64) -> io::Result<Self> {
        let pid = rustix::net::sockopt::socket_peercred(&stream)?.pid;
        Ok(Self {
            number,
            pid: pid.as_raw_nonzero().get(),
            stream,
            driven: Driven::new()?,
            state: Mutex::new(State {
                greeted: false,
                limit: None,
                ready: Some(pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?),
                announced: false,
                ranges: BTreeMap::new(),
                changes: Vec::new(),
                begun: 0,
                acknowledged: 0,
                gone: false,
                request: Vec::with_capacity(REQUEST_SIZE),
                reply: Vec::new(),
            }),
            acknowledged: Condvar::new(),
            since: Instant::now(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What its socket is polled for.
    fn awaits(&self) -> PollFlags {
        if self.lock().reply.is_empty() {
            PollFlags::IN
        } else {
            PollFlags::OUT
        }
    }

    /// Hands over the descriptor to poll and the counter's page. False: it cannot be done.
    fn greet(&self, state: &mut State, limit: Option<Duration>) -> bool {
        let Some((ready, _)) = &state.ready else {
            return false;
        };
        let descriptors: [BorrowedFd<'_>; 2] = [ready.as_fd(), self.driven.counter().file()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fits = ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        let value = limit.map_or(0, |limit| limit.as_micros() as u64);
        let reply = protocol::reply(Request::Hello { limit: None }, value, &[]);
        let bytes = [io::IoSlice::new(&reply)];
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent = rustix::net::sendmsg(&self.stream, &bytes, &mut ancillary, flags);
        state.greeted = true;
        state.limit = limit;
        // The socket was empty.
        fits && sent == Ok(reply.len())
    }

    fn receive(&self, state: &mut State) -> Received {
        let mut bytes = [0; REQUEST_SIZE];
        let missing = REQUEST_SIZE - state.request.len();
        let count = match rustix::io::retry_on_intr(|| rustix::io::read(&self.stream, &mut bytes[..missing]))
        {
            Ok(0) => return Received::Closed,
            Ok(count) => count,
            Err(Errno::AGAIN) => return Received::Nothing,
            Err(_) => return Received::Closed,
        };
        state.request.extend_from_slice(&bytes[..count]);
        match <[u8; REQUEST_SIZE]>::try_from(state.request.as_slice()) {
            Ok(request) => {
                state.request.clear();
                Received::Request(request)
            }
            // The rest of it is still to come.
            Err(_) => Received::Nothing,
        }
    }

    fn flush(&self, state: &mut State) -> Sent {
        while !state.reply.is_empty() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::send(&self.stream, &state.reply, flags) {
                Ok(count) => drop(state.reply.drain(..count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Sent::Part,
                Err(_) => return Sent::Closed,
            }
        }
        Sent::All
    }

    /// Up to `max` events. The beginnings and ends of changes come after all events that belong to them, and last how far it goes.
    fn read(&self, state: &mut State, max: usize) -> Vec<abi::RawEvent> {
        // Before anything is read: a change moves it and tells of it without this client's state, and what is told below with the number
        // may be older than that, and never newer.
        let counter = self.driven.counter().load();
        let read = self.driven.try_read(max).unwrap_or_default();
        let mut events: Vec<abi::RawEvent> = Vec::with_capacity(read.len() + state.changes.len() + 1);
        events.extend(
            read.iter()
                .filter(|event| !matches!(event, Event::Last { .. }))
                .map(|event| abi::RawEvent::from(*event)),
        );
        if !self.driven.is_readable() {
            let room = max.saturating_sub(events.len()).min(state.changes.len());
            events.extend(state.changes.drain(..room));
            if state.changes.is_empty() && events.len() < max {
                events.push(Event::Last { counter }.into());
            }
        }
        self.announce(state);
        events
    }

    /// Tells of a beginning or an end, if changes wait for this client.
    fn tell(&self, state: &mut State, event: abi::RawEvent) {
        if state.limit.is_some() && !state.gone {
            state.begun = event.user_cookie_counter;
            state.changes.push(event);
        }
        self.announce(state);
    }

    /// Makes the descriptor readable if there is something to read, and only then.
    fn announce(&self, state: &mut State) {
        let readable = self.driven.is_readable() || !state.changes.is_empty();
        let Some((from, to)) = &state.ready else { return };
        if readable == state.announced {
            return;
        }
        state.announced = readable;
        // Neither fails, but when the client has taken the byte by itself.
        let _ = if readable {
            rustix::io::write(to, &[1])
        } else {
            rustix::io::read(from, &mut [0])
        };
    }

    /// Waits until the client has acknowledged a change that began at `began`, if that is to be waited for, or is gone. False: it
    /// has not in time.
    fn await_acknowledgement(&self, change: u64, began: Instant) -> bool {
        let mut state = self.lock();
        let Some(limit) = state.limit else {
            return true;
        };
        while state.acknowledged < change && !state.gone {
            let left = limit.saturating_sub(began.elapsed());
            if left.is_zero() {
                return false;
            }
            let waited = self.acknowledged.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// It is a client no longer: it sees its connection closed, its descriptor hung up, and its counter moved a last time.
    fn let_go(&self) {
        let mut state = self.lock();
        if state.gone {
            return;
        }
        state.gone = true;
        self.driven.move_counter();
        state.ready = None;
        state.changes.clear();
        drop(state);
        self.acknowledged.notify_all();
        // The thread that serves finds it closed.
        let _ = rustix::net::shutdown(&self.stream, Shutdown::Both);
    }

    fn status(&self) -> Option<ClientStatus> {
        let state = self.lock();
        if state.gone || !state.greeted {
            return None;
        }
        let ranges = state.ranges.iter();
        Some(ClientStatus {
            pid: self.pid,
            limit: state.limit,
            ranges: ranges.map(|(cookie, range)| (Cookie(*cookie), *range)).collect(),
            counter: self.driven.counter().load(),
            begun: state.begun,
            acknowledged: state.acknowledged,
        })
    }
}
