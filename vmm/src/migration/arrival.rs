//! The instance that a VM moves to.
//!
//! ```text
//!              Machine            Prepared sent       State              Loaded sent        Commit
//!   waiting ------------> making ---------------> arriving ----> loading -----------> loaded -------> mine
//!                            |                       |              |                   |
//!                            | lost, or aborted by either           |                   | aborted; or lost, and the source did
//!                            v                       v              v                   v not call again in time
//!                            +-----------------------+---- over ----+-------------------+
//! ```
//!
//! The VM runs in `mine` and in no other state, and no way leads there from `over`.

use std::collections::VecDeque;
use std::fmt::Write;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;
use umem::call::Opened;
use umem::causes::chain;
use umem::channel::{ChannelError, Receiver, Sender};
use umem::link::{Listener, Stream};
use umem::region::Region;
use umem::source::PageSource;
use umem::source::remote::{Callers, RemoteOptions, RemoteSource};
use umem::states::PageStates;
use umem::units::PAGE_SIZE;
use umem::wire::{
    ChannelKind, Epoch, Handover, Hello, Message, RefuseCode, Role, SessionId, Step, VERSION, Welcome,
};
use vmm_sys_util::eventfd::EventFd;

use super::landing::Landing;
use super::listener::{Door, Host};
use super::push::Await;
use super::record::Record;
use super::status::{Phase as StatusPhase, Status};
use super::{Description, FEATURES, KEEP_ALIVE, PATIENCE};
use crate::report::milliseconds;
use crate::snapshot::{SnapshotState, StateError};

/// How often each side of a channel for RAM says something, after the switch.
const CHANNEL_KEEP_ALIVE: Duration = Duration::from_secs(5);

/// Requests taken at a time on a channel, of which this side has none to take.
const WINDOW: u16 = 64;

/// How a VM is waited for.
#[derive(Debug)]
pub struct ArrivalOptions {
    /// How long a source that is lost is waited for while somebody needs it.
    pub timeout: Duration,
    /// Where it is written down whose the VM is.
    pub record: Option<PathBuf>,
}

/// Why no VM arrived. It may run where it was.
#[derive(Debug, Error)]
pub enum ArrivalError {
    /// The source says so.
    #[error("the VM did not arrive: {0}")]
    Aborted(String),
    /// The connection was lost.
    #[error("the connection to the source was lost before the VM was handed over")]
    Lost(#[source] ChannelError),
    /// The source is gone when it was to say whose the VM is.
    #[error("the source was lost when the VM was about to be handed over, and did not call again for {} s; this side never ran it", .0.as_secs())]
    Undecided(Duration),
    /// What the source says makes no sense.
    #[error("the source sent a VM that cannot be taken")]
    State(#[from] StateError),
    /// It does not fit to what was said before.
    #[error("the source sent a VM that cannot be taken: {0}")]
    Wrong(String),
    /// RAM did not arrive.
    #[error("guest memory did not arrive: {0}")]
    Memory(String),
    /// Somebody here wanted it so.
    #[error("stopped before a VM arrived")]
    Stopped,
    /// No thread, no descriptor.
    #[error("cannot wait for a VM")]
    Os(#[source] io::Error),
}

/// A VM that is waited for, and then arrives.
#[derive(Clone)]
pub struct Arrival {
    shared: Arc<Shared>,
    /// Of this and its clones.
    _door: Arc<Door>,
}

struct Shared {
    options: ArrivalOptions,
    state: Mutex<State>,
    changed: Condvar,
    /// Readable when there is a state to begin in, or none will come.
    wake: EventFd,
    callers: Arc<Callers>,
    /// What asks them for pages, as soon as there is somebody who needs any.
    source: OnceLock<Arc<RemoteSource>>,
    /// What says something on the control channel.
    voice: Mutex<Option<Sender>>,
    began: Instant,
    /// When what happened while the guest stood still.
    laps: Mutex<Vec<(&'static str, Instant)>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Waiting,
    Making,
    Arriving,
    Loading,
    Loaded,
    Mine,
    Over,
}

/// What of RAM is still at the source when the machine is this side's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rest {
    /// Something.
    Missing,
    /// Nobody asks for it any more: the machine ends.
    Unneeded,
    /// Nothing.
    Here,
}

struct State {
    phase: Phase,
    error: Option<ArrivalError>,
    session: Option<(SessionId, u64)>,
    peer: String,
    record: Option<Arc<Record>>,
    controls: VecDeque<Opened>,
    description: Option<Arc<Description>>,
    landing: Option<Arc<Landing>>,
    bytes: Option<Vec<u8>>,
    /// The machine says so.
    runs: bool,
    rest: Rest,
    /// The source knows.
    done: bool,
    downtime: Option<Duration>,
}

impl State {
    fn write_down(&self, phase: &str) {
        if let Some(record) = &self.record
            && let Err(error) = record.write(phase)
        {
            let path = record.path().display();
            tracing::warn!(%error, %path, "cannot write down whose the VM is");
        }
    }

    /// What this side says when it is asked.
    fn step(&self) -> Option<Step> {
        match self.phase {
            Phase::Waiting | Phase::Making | Phase::Arriving | Phase::Loading => None,
            Phase::Loaded => Some(Step::Loaded),
            Phase::Mine if !self.runs => None,
            Phase::Mine if self.rest != Rest::Missing => Some(Step::Complete),
            Phase::Mine => Some(Step::Running),
            Phase::Over => Some(Step::Abort),
        }
    }
}

impl Arrival {
    /// Waits for somebody to call at `listener`.
    pub fn listen(listener: Listener, options: ArrivalOptions) -> Result<Self, ArrivalError> {
        let shared = Arc::new(Shared {
            options,
            state: Mutex::new(State {
                phase: Phase::Waiting,
                error: None,
                session: None,
                peer: String::new(),
                record: None,
                controls: VecDeque::new(),
                description: None,
                landing: None,
                bytes: None,
                runs: false,
                rest: Rest::Missing,
                done: false,
                downtime: None,
            }),
            changed: Condvar::new(),
            wake: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(ArrivalError::Os)?,
            callers: Arc::new(Callers::new("migration:source")),
            source: OnceLock::new(),
            voice: Mutex::default(),
            began: Instant::now(),
            laps: Mutex::default(),
        });
        let door = Door::open(listener, Arc::clone(&shared)).map_err(ArrivalError::Os)?;
        let controlling = Arc::clone(&shared);
        thread::Builder::new()
            .name("migration-ctl".into())
            .spawn(move || controlling.control())
            .map_err(ArrivalError::Os)?;
        Ok(Self {
            shared,
            _door: Arc::new(door),
        })
    }

    /// What machine is to be made, which is waited for as long as that is `wanted`.
    pub(crate) fn await_machine(&self, wanted: impl Fn() -> bool) -> Result<Arc<Description>, ArrivalError> {
        let mut state = self.shared.lock();
        loop {
            if state.phase == Phase::Over {
                return Err(state.error.take().unwrap_or(ArrivalError::Stopped));
            }
            if let Some(description) = &state.description {
                return Ok(Arc::clone(description));
            }
            if !wanted() {
                return Err(ArrivalError::Stopped);
            }
            let waited = self
                .shared
                .changed
                .wait_timeout(state, Duration::from_millis(100));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// This is going to be RAM. The answer is what of it is there, and where the rest comes from.
    pub(crate) fn land(
        &self,
        region: &Arc<Region>,
    ) -> Result<(Arc<PageStates>, Arc<dyn PageSource>), ArrivalError> {
        let landing = Landing::new(Arc::clone(region))
            .ok_or_else(|| ArrivalError::Memory("there is no memory for the page states".into()))?;
        let mut state = self.shared.lock();
        if state.phase == Phase::Over {
            return Err(state.error.take().unwrap_or(ArrivalError::Stopped));
        }
        let options = RemoteOptions {
            timeout: self.shared.options.timeout,
            connections: state
                .description
                .as_ref()
                .map_or(1, |machine| machine.connections as usize),
            ..RemoteOptions::default()
        };
        let source = Arc::new(RemoteSource::called(
            Arc::clone(&self.shared.callers),
            region.pages(),
            options,
        ));
        let _ = self.shared.source.set(Arc::clone(&source));
        let states = Arc::clone(&landing.states);
        state.landing = Some(Arc::new(landing));
        Ok((states, source))
    }

    /// The machine is made: its RAM can be sent.
    pub(crate) fn prepared(&self) {
        let mut state = self.shared.lock();
        let unit = state
            .landing
            .as_ref()
            .map_or(1, |landing| landing.region.page_size().pages());
        if state.phase == Phase::Making {
            state.phase = Phase::Arriving;
        }
        drop(state);
        self.shared.say(Step::Prepared, unit as u32, "");
    }

    /// Readable when [`Self::has_state`].
    pub(crate) fn wake(&self) -> io::Result<EventFd> {
        self.shared.wake.try_clone()
    }

    /// Whether there is a state to begin in, or none will come.
    pub(crate) fn has_state(&self) -> bool {
        let state = self.shared.lock();
        state.phase == Phase::Over || state.bytes.is_some()
    }

    /// What was to be done by now is done.
    pub(crate) fn lap(&self, name: &'static str) {
        self.shared.lap(name);
    }

    /// The state to begin in.
    pub(crate) fn take_state(&self) -> Result<SnapshotState, ArrivalError> {
        let mut state = self.shared.lock();
        if state.phase == Phase::Over {
            return Err(state.error.take().unwrap_or(ArrivalError::Stopped));
        }
        let (Some(bytes), Some(description)) = (state.bytes.take(), state.description.clone()) else {
            return Err(ArrivalError::Stopped);
        };
        drop(state);
        let saved = SnapshotState::decode(&bytes, description.ram_size)?;
        if saved.cpus() != description.cpus {
            return Err(ArrivalError::Wrong(format!(
                "it was to have {} vCPUs, and has {}",
                description.cpus,
                saved.cpus()
            )));
        }
        Ok(saved)
    }

    /// The machine is about to run, if it is this side's: true. False: it is not, and never will be.
    pub(crate) fn load(&self) -> bool {
        let shared = &self.shared;
        let mut state = shared.lock();
        if state.phase != Phase::Loading {
            return false;
        }
        state.phase = Phase::Loaded;
        shared.lap("restored");
        state.write_down("loaded");
        drop(state);
        shared.say(Step::Loaded, 0, "");
        shared.lap("loaded");
        let mut state = shared.lock();
        while state.phase == Phase::Loaded {
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let mine = state.phase == Phase::Mine;
        if mine {
            shared.lap("handed over");
            state.write_down("running");
            shared.lap("written down");
        }
        mine
    }

    /// It runs, after the guest stood still for so long.
    pub(crate) fn runs(&self, downtime: Duration) {
        let mut state = self.shared.lock();
        state.runs = true;
        state.downtime = Some(downtime);
        self.shared.say_step(state);
        self.shared.lap("runs");
        self.shared.log_laps();
    }

    /// It has all of its pages.
    pub(crate) fn has_all(&self) {
        // First: the source ends when it hears of it, and nobody is to miss it.
        if let Some(source) = self.shared.source.get() {
            source.has_all();
        }
        let mut state = self.shared.lock();
        state.rest = Rest::Here;
        if state.phase == Phase::Mine {
            self.shared.say_step(state);
        }
    }

    /// Nothing will come of it, unless the machine is this side's already.
    pub(crate) fn give_up(&self, why: &str) {
        self.shared.end(ArrivalError::Aborted(why.to_owned()));
    }

    /// Why nothing came of it.
    pub(crate) fn error(&self) -> Option<ArrivalError> {
        let mut state = self.shared.lock();
        (state.phase == Phase::Over).then(|| state.error.take().unwrap_or(ArrivalError::Stopped))
    }

    /// Whether the machine is this side's.
    pub(crate) fn is_mine(&self) -> bool {
        self.shared.lock().phase == Phase::Mine
    }

    /// At the end: the source is told that it is no longer needed, and that is waited for, for a short time.
    pub(crate) fn finish(&self) {
        let mut state = self.shared.lock();
        state.rest = state.rest.max(Rest::Unneeded);
        if state.phase == Phase::Mine {
            self.shared.say_step(state);
        }
        let deadline = Instant::now() + KEEP_ALIVE;
        let mut state = self.shared.lock();
        while state.phase == Phase::Mine && !state.done {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if !state.done && state.phase == Phase::Mine {
            // The source may still be in doubt, and nobody else can tell any more that the VM ran.
            state.write_down("ended");
        }
    }

    pub(crate) fn status(&self) -> Option<Status> {
        let state = self.shared.lock();
        let description = state.description.as_ref()?;
        let phase = match state.phase {
            Phase::Waiting | Phase::Making => StatusPhase::Preparing,
            Phase::Arriving => StatusPhase::Precopy,
            Phase::Loading => StatusPhase::Switching,
            Phase::Loaded => StatusPhase::InDoubt,
            Phase::Mine if state.rest == Rest::Here => StatusPhase::Complete,
            Phase::Mine => StatusPhase::Postcopy,
            Phase::Over => StatusPhase::Failed,
        };
        let present = state.landing.as_ref().map_or(0, |landing| landing.present());
        Some(Status {
            direction: "in",
            mode: description.mode,
            phase,
            peer: state.peer.clone(),
            token: state
                .session
                .map_or_else(String::new, |(session, _)| token(session)),
            round: 0,
            bytes_total: description.ram_size,
            bytes_sent: 0,
            bytes_left: description.ram_size.saturating_sub(present * PAGE_SIZE as u64),
            dirty_rate: 0,
            bandwidth: 0,
            expected_downtime_ms: None,
            downtime_ms: state.downtime.map(milliseconds),
            elapsed_ms: milliseconds(self.shared.began.elapsed()),
        })
    }

    /// How many pages are missing, if the machine is this side's and any are.
    pub(crate) fn missing(&self) -> Option<u64> {
        let state = self.shared.lock();
        let counts = state.landing.as_ref()?.states.counts();
        let missing = counts.absent + counts.in_flight;
        (state.rest != Rest::Here && missing > 0).then_some(missing)
    }
}

impl std::fmt::Debug for Arrival {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arrival")
            .field("phase", &self.shared.lock().phase)
            .finish_non_exhaustive()
    }
}

/// How a control channel ended that was not lost.
enum Heard {
    /// The source needs nothing more, and nothing more is needed of it.
    Goodbye,
    /// There is another channel, or nothing to be heard any more.
    Enough,
}

/// A session for people.
pub(super) fn token(session: SessionId) -> String {
    let mut text = String::with_capacity(32);
    for byte in session.0 {
        // Writing to a text does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing comes of it, unless the machine is this side's already.
    fn end(&self, error: ArrivalError) {
        let mut state = self.lock();
        if state.phase >= Phase::Mine {
            return;
        }
        tracing::info!(error = &error as &dyn std::error::Error, "no VM arrives");
        let text = chain(&error);
        state.phase = Phase::Over;
        state.error = Some(error);
        state.write_down("never-ran");
        // Before anybody hears of it here, and so before the state is let go of: with them this process ends.
        self.say(Step::Abort, 0, &text);
        drop(state);
        self.changed.notify_all();
        let _ = self.wake.write(1);
    }

    /// Says something, if anybody can hear it; it is said again to who calls later.
    fn say(&self, step: Step, value: u32, text: &str) {
        let mut voice = self.voice.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = &mut *voice
            && let Err(error) = sender.send(&Message::Handover(Handover { step, value, text }))
        {
            tracing::debug!(%error, %step, "not heard by the source");
        }
    }

    fn lap(&self, name: &'static str) {
        let mut laps = self.laps.lock().unwrap_or_else(PoisonError::into_inner);
        laps.push((name, Instant::now()));
    }

    /// Where the time went while the guest stood still, in microseconds from one to the next.
    fn log_laps(&self) {
        let laps = self.laps.lock().unwrap_or_else(PoisonError::into_inner);
        let between = laps
            .windows(2)
            .map(|two| (two[1].0, (two[1].1 - two[0].1).as_micros()));
        tracing::info!(laps = ?between.collect::<Vec<_>>(), "took over");
    }

    fn say_step(&self, state: MutexGuard<'_, State>) {
        let step = state.step();
        drop(state);
        if let Some(step) = step {
            self.say(step, 0, "");
        }
    }

    /// The thread that hears the source, until nothing of it is needed.
    fn control(&self) {
        // The guest stands still while it hears the state and the commit.
        umem::step_forward();
        loop {
            let Some(opened) = self.next_control() else {
                return;
            };
            let Opened {
                sender,
                receiver,
                stream,
                ..
            } = opened;
            *self.voice.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
            self.say_step(self.lock());
            let heard = self.hear(receiver, &stream);
            let phase = self.lock().phase;
            let over = match heard {
                Ok(Heard::Goodbye) => {
                    let mut state = self.lock();
                    state.done = true;
                    // There is nothing left to decide; and when this VM is sent on, its next record is there.
                    if let Some(record) = state.record.take() {
                        record.remove();
                    }
                    drop(state);
                    self.changed.notify_all();
                    true
                }
                Ok(Heard::Enough) => false,
                // Whose the machine is, the source will say when it calls again.
                Err(ArrivalError::Lost(error)) if phase >= Phase::Loaded => {
                    tracing::info!(error = &error as &dyn std::error::Error, "control channel lost");
                    false
                }
                // While the source can still hear why.
                Err(error) => {
                    self.end(error);
                    false
                }
            };
            *self.voice.lock().unwrap_or_else(PoisonError::into_inner) = None;
            let _ = stream.shutdown();
            if over {
                return;
            }
        }
    }

    /// The next control channel. `None`: none is needed any more.
    fn next_control(&self) -> Option<Opened> {
        let since = Instant::now();
        let mut state = self.lock();
        loop {
            if state.phase == Phase::Over {
                return None;
            }
            if let Some(opened) = state.controls.pop_front() {
                return Some(opened);
            }
            if state.phase == Phase::Loaded && since.elapsed() >= self.options.timeout {
                drop(state);
                self.end(ArrivalError::Undecided(self.options.timeout));
                return None;
            }
            let waited = self.changed.wait_timeout(state, Duration::from_millis(100));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Hears the source on one channel, until that ends.
    fn hear(&self, mut receiver: Receiver, stream: &Stream) -> Result<Heard, ArrivalError> {
        let mut heard = Instant::now();
        let mut said = Instant::now();
        loop {
            while let Some(message) = receiver.next_message().map_err(ArrivalError::Lost)? {
                heard = Instant::now();
                if !self.obey(&message)? {
                    return Ok(Heard::Goodbye);
                }
            }
            {
                // It may have ended meanwhile, by what happens here; a newer channel is a better one.
                let state = self.lock();
                if state.phase == Phase::Over || !state.controls.is_empty() {
                    return Ok(Heard::Enough);
                }
            }
            if said.elapsed() >= KEEP_ALIVE {
                said = Instant::now();
                self.answer(&Message::Ping { token: 0 });
            }
            let came = receiver
                .has_more(stream, Duration::from_millis(100))
                .map_err(ArrivalError::Lost)?;
            // Only now: what was done meanwhile may have taken long.
            if !came && heard.elapsed() >= PATIENCE {
                return Err(ArrivalError::Lost(ChannelError::Quiet));
            }
        }
    }

    fn answer(&self, message: &Message<'_>) {
        let mut voice = self.voice.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = &mut *voice {
            // Who receives sees the end of a connection that cannot be written.
            let _ = sender.send(message);
        }
    }

    /// Does what the source says. False: it says no more.
    fn obey(&self, message: &Message<'_>) -> Result<bool, ArrivalError> {
        match message {
            Message::Machine { bytes } => self.begin(bytes)?,
            Message::Discard { epoch, ranges } => {
                let state = self.lock();
                let landing = match (&state.landing, state.phase) {
                    (Some(landing), Phase::Arriving) => Arc::clone(landing),
                    _ => {
                        return Err(ArrivalError::Wrong(
                            "it discards pages of RAM that is not its".into(),
                        ));
                    }
                };
                drop(state);
                for range in ranges.iter() {
                    landing
                        .discard(range, epoch.0)
                        .map_err(|error| ArrivalError::Memory(chain(&error)))?;
                }
            }
            Message::State { bytes } => {
                let mut state = self.lock();
                if state.phase != Phase::Arriving {
                    return Err(ArrivalError::Wrong(
                        "its state came when none was expected".into(),
                    ));
                }
                state.phase = Phase::Loading;
                state.bytes = Some(bytes.to_vec());
                let landing = state.landing.clone();
                drop(state);
                if let Some(landing) = landing {
                    landing.close();
                }
                self.callers.begin();
                self.lap("state");
                self.changed.notify_all();
                let _ = self.wake.write(1);
            }
            Message::Handover(Handover { step, text, .. }) => match step {
                Step::Commit => self.commit()?,
                Step::Abort => return Err(ArrivalError::Aborted((*text).to_owned())),
                _ => {}
            },
            Message::Ping { token } => self.answer(&Message::Pong { token: *token }),
            Message::Goodbye(goodbye) => {
                let state = self.lock();
                if state.phase < Phase::Mine {
                    return Err(ArrivalError::Aborted(goodbye.text.to_owned()));
                }
                return Ok(false);
            }
            _ => {}
        }
        Ok(true)
    }

    fn begin(&self, bytes: &[u8]) -> Result<(), ArrivalError> {
        let description = Description::decode(bytes)?;
        let mut state = self.lock();
        let pages = state.session.map_or(0, |(_, pages)| pages);
        if state.phase != Phase::Waiting {
            return Err(ArrivalError::Wrong("it was described twice".into()));
        }
        if description.ram_size != pages.saturating_mul(PAGE_SIZE as u64)
            || description.page_size != PAGE_SIZE as u64
        {
            return Err(ArrivalError::Wrong(format!(
                "it has {} bytes of RAM, and {pages} pages were announced",
                description.ram_size
            )));
        }
        state.phase = Phase::Making;
        state.description = Some(Arc::new(description));
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// The machine is this side's, if this side has not given up before.
    fn commit(&self) -> Result<(), ArrivalError> {
        let mut state = self.lock();
        match state.phase {
            Phase::Loaded => {
                state.phase = Phase::Mine;
                drop(state);
                self.changed.notify_all();
                Ok(())
            }
            // Heard before.
            Phase::Mine | Phase::Over => {
                self.say_step(state);
                Ok(())
            }
            _ => Err(ArrivalError::Wrong(
                "it was handed over before it was loaded".into(),
            )),
        }
    }
}

impl Host for Shared {
    fn welcome(&self, hello: &Hello<'_>) -> Result<Welcome, (RefuseCode, String)> {
        if hello.role != Role::Provider {
            let text = "a VM is waited for here, and no pages are served";
            return Err((RefuseCode::NotPermitted, text.into()));
        }
        let features = hello.features.and(FEATURES);
        if !features.contains(FEATURES) {
            let text = "a VM can only be taken from a program that speaks this version of the protocol";
            return Err((RefuseCode::MissingFeature, text.into()));
        }
        let Some(pages) = hello.pages else {
            return Err((
                RefuseCode::BadHello,
                "it does not say how many pages it has".into(),
            ));
        };
        let mut state = self.lock();
        let session = match state.session {
            None if hello.session == SessionId::NEW && hello.channel == ChannelKind::Control => {
                let mut id = [0; 16];
                rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
                    .map_err(|errno| (RefuseCode::Busy, errno.to_string()))?;
                let session = SessionId(id);
                state.session = Some((session, pages));
                let record = Record::new(self.options.record.clone(), token(session), "destination");
                state.record = Some(Arc::new(record));
                state.write_down("arriving");
                session
            }
            Some(_) if hello.session == SessionId::NEW => {
                return Err((RefuseCode::Busy, "another VM is arriving here, or has".into()));
            }
            Some((session, of)) if hello.session == session => {
                if of != pages {
                    return Err((RefuseCode::WrongSize, format!("the VM has {of} pages")));
                }
                if state.done {
                    return Err((RefuseCode::UnknownSession, "all of it has arrived".into()));
                }
                session
            }
            _ => return Err((RefuseCode::UnknownSession, String::new())),
        };
        Ok(Welcome {
            version: VERSION,
            features,
            pages,
            epoch: Epoch(0),
            keep_alive_ms: CHANNEL_KEEP_ALIVE.as_millis() as u32,
            window: WINDOW,
            session,
            digest: None,
        })
    }

    fn not_welcomed(&self, kind: ChannelKind, error: ChannelError) {
        // The session is the one that was made for it, and nobody knows of it: without a control channel it would never end. Any later
        // one is called for again.
        if kind == ChannelKind::Control && self.lock().phase < Phase::Loaded {
            self.end(ArrivalError::Lost(error));
        }
    }

    fn take(&self, kind: ChannelKind, mut opened: Opened) {
        if kind == ChannelKind::Control {
            self.lock().controls.push_back(opened);
            self.changed.notify_all();
            return;
        }
        let state = self.lock();
        let (phase, landing) = (state.phase, state.landing.clone());
        drop(state);
        match (kind, landing) {
            (ChannelKind::Background, Some(landing)) if phase == Phase::Arriving => {
                if let Err(error) = landing.receive(&mut opened) {
                    // Of an end that the control channel tells too, it knows more.
                    let text = chain(&error);
                    tracing::info!(error = text, "channel for RAM lost");
                    let _ = opened.stream.shutdown();
                    if !matches!(
                        error,
                        super::landing::LandingError::Channel(ChannelError::Closed | ChannelError::Lost(_))
                    ) {
                        self.end(ArrivalError::Memory(text));
                    }
                    return;
                }
            }
            (_, None) => return,
            _ => {}
        }
        self.callers.put(kind, opened);
    }
}
