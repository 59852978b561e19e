//! A network that does what it should not: between a VM and its page server, it knows the frames of the page service, and cuts,
//! delays, damages, doubles and reorders them by a plan.
//!
//! Each connection has a thread for each direction, which forwards frame by frame. What is no frame is forwarded as it comes,
//! and the faults are done to the pieces.

mod connection;
mod frames;
mod plan;
mod socket;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::net::Shutdown;
use umem::units::PageIndex;
use umem::wire::{ChannelKind, Message};

use self::connection::Connection;
pub use self::plan::{Direction, Fault, Kind, Plan};
use crate::program::Running;

/// Which message is waited for: told whither it goes, and what it says.
type Awaited = Box<dyn Fn(Direction, &Message<'_>) -> bool + Send>;

/// A message that is waited for, and what becomes of it.
#[derive(Default)]
struct Stop {
    awaited: Option<Awaited>,
    /// It has come, and nothing more passes that way of its connection.
    held: bool,
}

impl fmt::Debug for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stop")
            .field("held", &self.held)
            .finish_non_exhaustive()
    }
}

/// What has passed, and what was done to it.
#[derive(Clone, Debug, Default)]
pub struct Record {
    /// Connections, those included that were not taken.
    pub connections: u64,
    /// Frames in both directions.
    pub frames: u64,
    /// Bytes in both directions.
    pub bytes: u64,
    /// Refusals of the server.
    pub refusals: u64,
    /// Faults done, by kind.
    pub faults: BTreeMap<Kind, u64>,
    /// Page data that was damaged, in order.
    pub corrupted: Vec<(ChannelKind, PageIndex)>,
    /// When nobody was reached any more.
    pub gone: Option<Instant>,
}

impl Record {
    /// Whether a page was damaged and, asked for again, damaged again.
    pub fn corrupted_twice(&self) -> bool {
        let mut sorted: Vec<_> = self
            .corrupted
            .iter()
            .map(|(channel, page)| (*channel as u8, page.0))
            .collect();
        sorted.sort_unstable();
        sorted.windows(2).any(|pair| pair[0] == pair[1])
    }
}

/// A proxy. It ends all connections when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    url: String,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    listener: Mutex<Option<Arc<OwnedFd>>>,
    upstream: String,
    plan: Plan,
    state: Mutex<State>,
    /// Something has passed, connected, ended, or may go on.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    record: Record,
    open: HashMap<u64, Arc<Connection>>,
    /// Connections that are not taken, of those to come.
    refuse: u64,
    faults_left: u32,
    /// Nothing passes once this many bytes have.
    hold_at: Option<u64>,
    held: bool,
    stop: Stop,
    /// No connection is taken.
    down: bool,
    /// Bytes a second, in both directions together, and when the next may pass.
    throttle: Option<(u64, Instant)>,
    ending: bool,
}

impl Proxy {
    /// Listens at `listen` (for TCP, port 0 is any), and forwards to `upstream`.
    pub fn start(listen: &str, upstream: &str, plan: Plan) -> Self {
        let (listener, url) = socket::listen(listen);
        let listener = Arc::new(listener);
        let shared = Arc::new(Shared {
            listener: Mutex::new(Some(Arc::clone(&listener))),
            upstream: upstream.to_owned(),
            plan,
            state: Mutex::new(State {
                faults_left: plan.faults,
                ..State::default()
            }),
            changed: Condvar::new(),
        });
        let acceptor = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.accept(&listener))
        };
        Self {
            shared,
            url,
            acceptor: Some(acceptor),
        }
    }

    /// Where it is.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// What has happened so far.
    pub fn record(&self) -> Record {
        self.shared.lock().record.clone()
    }

    /// Lets nothing pass once this many bytes more have.
    pub fn hold_after(&self, bytes: u64) {
        let mut state = self.shared.lock();
        state.hold_at = Some(state.record.bytes + bytes);
        state.held = false;
    }

    /// Waits until that is so, but not for longer than the program runs; false if it has ended before.
    pub fn wait_until_held(&self, program: &Running) -> bool {
        self.wait(program, |state| state.held)
    }

    /// Lets everything pass again.
    pub fn go_on(&self) {
        let mut state = self.shared.lock();
        (state.hold_at, state.held) = (None, false);
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Holds back the first message of which this holds, and what comes after it on its way of its connection; all else passes.
    pub fn hold_message(&self, awaited: impl Fn(Direction, &Message<'_>) -> bool + Send + 'static) {
        self.shared.lock().stop = Stop {
            awaited: Some(Box::new(awaited)),
            held: false,
        };
    }

    /// Waits until it has come, but not for longer than the program runs; false if it has ended before.
    pub fn wait_for_message(&self, program: &Running) -> bool {
        self.wait(program, |state| state.stop.held)
    }

    /// Lets it pass.
    pub fn release_message(&self) {
        self.shared.lock().stop = Stop::default();
        self.shared.changed.notify_all();
    }

    /// The link goes down: all connections end, what was held back with them, and none is made until [`Self::link_up`].
    pub fn link_down(&self) {
        let open: Vec<_> = {
            let mut state = self.shared.lock();
            state.down = true;
            state.open.values().cloned().collect()
        };
        for connection in open {
            connection.cut();
        }
        self.release_message();
    }

    /// Connections are taken again.
    pub fn link_up(&self) {
        self.shared.lock().down = false;
    }

    /// From now on so many bytes pass in a second.
    pub fn throttle(&self, bytes_per_second: Option<u64>) {
        self.shared.lock().throttle = bytes_per_second.map(|rate| (rate, Instant::now()));
    }

    /// Waits for something to have happened, but not for longer than the program runs; false if it has ended before.
    pub fn wait_until(&self, program: &Running, condition: impl Fn(&Record) -> bool) -> bool {
        self.wait(program, |state| condition(&state.record))
    }

    fn wait(&self, program: &Running, condition: impl Fn(&State) -> bool) -> bool {
        let mut holds = false;
        program.wait_until("the network is so far", |program| {
            let ended = program.wait_for_exit(Duration::ZERO);
            holds = condition(&self.shared.lock());
            holds || ended
        });
        holds
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.lock().ending = true;
        self.shared.close();
        self.shared.changed.notify_all();
        if let Some(acceptor) = self.acceptor.take() {
            // Its panic, if any, was seen already.
            let _ = acceptor.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody listens any more, and all connections end.
    fn close(&self) {
        let listener = self
            .listener
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(listener) = listener {
            // Whoever waits for the next connection learns it by this.
            socket::end(&listener, Shutdown::Both);
        }
        let open: Vec<_> = self.lock().open.values().cloned().collect();
        for connection in open {
            connection.cut();
        }
    }

    fn accept(self: Arc<Self>, listener: &OwnedFd) {
        let mut threads = Vec::new();
        while let Some(client) = socket::take(listener) {
            let mut state = self.lock();
            let index = state.record.connections;
            state.record.connections += 1;
            let refused = state.refuse > 0 || state.down;
            state.refuse = state.refuse.saturating_sub(1);
            let ending = state.ending || state.record.gone.is_some();
            drop(state);
            self.changed.notify_all();
            if refused || ending {
                continue;
            }
            let Ok(server) = socket::connect(&self.upstream) else {
                continue;
            };
            let connection = Arc::new(Connection::new(index, client, server));
            self.lock().open.insert(index, Arc::clone(&connection));
            let faults = self.plan.of_connection(index);
            let ways = [Direction::Client, Direction::Server].map(|towards| {
                let (shared, connection) = (Arc::clone(&self), Arc::clone(&connection));
                let faults: Vec<Fault> = faults
                    .iter()
                    .filter(|fault| fault.towards == towards)
                    .copied()
                    .collect();
                thread::spawn(move || connection::forward(&shared, &connection, towards, &faults))
            });
            threads.extend(ways);
            // It ended between being taken and being listed.
            let state = self.lock();
            let over = state.ending || state.down || state.record.gone.is_some();
            drop(state);
            if over {
                connection.cut();
            }
        }
        for thread in threads {
            thread.join().unwrap();
        }
    }

    /// One fault less is left, if any was.
    fn take_fault(&self, kind: Kind) -> bool {
        let mut state = self.lock();
        if state.faults_left == 0 {
            return false;
        }
        state.faults_left -= 1;
        *state.record.faults.entry(kind).or_default() += 1;
        true
    }

    /// Waits until `condition` holds, but not for longer than `longest`.
    fn wait(&self, longest: Duration, condition: impl Fn(&State) -> bool) {
        let state = self.lock();
        drop(
            self.changed
                .wait_timeout_while(state, longest, |state| !state.ending && !condition(state))
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// Waits for as long as this message is held back.
    fn hold(&self, connection: &Connection, towards: Direction, message: Option<&Message<'_>>) {
        let Some(message) = message else { return };
        let mut state = self.lock();
        if state
            .stop
            .awaited
            .as_ref()
            .is_none_or(|awaited| !awaited(towards, message))
        {
            return;
        }
        state.stop = Stop {
            awaited: None,
            held: true,
        };
        self.changed.notify_all();
        while state.stop.held && !state.ending && !connection.is_over() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until so much may pass.
    fn pace(&self, bytes: usize) {
        let mut state = self.lock();
        let Some((rate, next)) = state.throttle else {
            return;
        };
        let now = Instant::now();
        let at = next.max(now);
        state.throttle = Some((rate, at + Duration::from_secs_f64(bytes as f64 / rate as f64)));
        while !state.ending && state.throttle.is_some() {
            let left = at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Counts what is about to pass, once it may.
    fn admit(&self, connection: &Connection, bytes: usize) {
        let mut state = self.lock();
        loop {
            let held = state.hold_at.is_some_and(|at| state.record.bytes >= at);
            if held && !state.held {
                state.held = true;
                self.changed.notify_all();
            }
            if (!held && !connection.is_frozen()) || state.ending {
                break;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.record.frames += 1;
        state.record.bytes += bytes as u64;
        drop(state);
        self.changed.notify_all();
    }

    fn forget(&self, index: u64) {
        self.lock().open.remove(&index);
        self.changed.notify_all();
    }
}
