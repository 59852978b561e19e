//! The instance that a VM leaves.
//!
//! ```text
//!             Prepared          it pays no more         Loaded            Running             Complete
//!  preparing ----------> precopy ------------> switching ------> in doubt --------> postcopy ----------> (ends)
//!      |                    |                      |                |
//!      | lost, refused,     | or cancelled         |                | taken back, or the destination
//!      v                    v                      v                v says that it never ran
//!      +--------------------+---- the VM runs here +----------------+
//! ```
//!
//! The commit is the step from switching to in doubt: before it, whatever happens, the VM runs on here; after it, never again without
//! the destination or an operator saying so.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use umem::channel::ChannelError;
use umem::region::PageSize;
use umem::server::Server;
use umem::source::remote::MAX_CONNECTIONS;
use umem::units::{PAGE_SIZE, PageIndex, PageRange};
use umem::wire::{
    ChannelKind, Epoch, Goodbye, GoodbyeReason, MAX_RANGE_PAGES, MAX_RANGES, Message, SessionId, Step,
};

use super::arrival::token;
use super::conversation::{Conversation, Dialer, Heard};
use super::data_channel::DataChannel;
use super::ongoing::Ongoing;
use super::push::{Push, PushError};
use super::ram::{LeavingRam, SharedRam};
use super::record::Record;
use super::status::Phase;
use super::{BACKOFF, MigrationError, MigrationOptions, MigrationSummary, Mode, PATIENCE, TimeoutStrategy};
use crate::control::{Control, PATIENCE as PAUSE_PATIENCE, VmState};
use crate::dirty::{DirtyTracker, PageBitmap};
use crate::machine::{ParkError, Parts};
use crate::report::milliseconds;
use crate::snapshot::SnapshotState;

/// How often somebody who waits looks whether it is still wanted.
const TICK: Duration = Duration::from_millis(50);

/// The most rounds of a hybrid migration: each halves what is left, or is the last.
const HYBRID_ROUNDS: u32 = 16;

/// How often what has changed meanwhile is told before the guest stands still: each time less is left to be told then.
const EARLY_DISCARDS: u32 = 8;

/// So few pages are told of while the guest stands still.
const LATE_DISCARDS: u64 = 64;

/// Sends a VM that runs, and returns when it is not needed here any more. After an error it runs here.
pub(crate) fn send(
    control: &Control,
    parts: &Arc<Parts>,
    ongoing: &Arc<Ongoing>,
    options: &MigrationOptions,
) -> Result<MigrationSummary, MigrationError> {
    // Whose thread this is answers other requests later, and is none the worse for it.
    umem::step_forward();
    let result = await_arrival(control, parts, ongoing, options)
        .and_then(|()| Session::open(control, parts, ongoing, options))
        .and_then(Session::run);
    if result.is_err() {
        ongoing.update(|status| status.phase = Phase::Failed);
    }
    result
}

/// A VM whose own pages still come from the instance that it left is not sent on before it has them: page services are not chained.
fn await_arrival(
    control: &Control,
    parts: &Parts,
    ongoing: &Ongoing,
    options: &MigrationOptions,
) -> Result<(), MigrationError> {
    while let Some(missing) = parts.missing_of_arrival() {
        if !options.wait_for_arrival {
            return Err(MigrationError::Arriving(missing));
        }
        ongoing.update(|status| status.phase = Phase::Waiting);
        if ongoing.is_cancelled() {
            return Err(MigrationError::Cancelled);
        }
        if control.state() == VmState::Stopped {
            return Err(MigrationError::Ended);
        }
        if ongoing.began.elapsed() >= options.timeout {
            return Err(MigrationError::Arriving(missing));
        }
        thread::sleep(TICK);
    }
    Ok(())
}

/// One migration.
struct Session {
    control: Control,
    parts: Arc<Parts>,
    ongoing: Arc<Ongoing>,
    options: MigrationOptions,
    dialer: Arc<Dialer>,
    conversation: Conversation,
    record: Record,
    push: Arc<Push>,
    server: Server,
    ram: SharedRam,
    /// Channels for what nobody waits for.
    connections: usize,
    /// Pages that the destination installs at once.
    unit: u64,
    tracker: Option<DirtyTracker>,
    rounds: u32,
    /// Pages that the destination has been told not to have, or never had.
    discarded: PageBitmap,
    /// The latest sign that the destination was asked for, and the latest that it gave.
    signs: (u64, u64),
    /// Since when the guest stands still.
    paused: Option<Instant>,
}

/// Where the time goes while the guest stands still, in microseconds.
struct Clock {
    last: Instant,
    laps: Vec<(&'static str, u128)>,
}

impl Clock {
    fn start() -> Self {
        Self {
            last: Instant::now(),
            laps: Vec::new(),
        }
    }

    fn lap(&mut self, name: &'static str) {
        let now = Instant::now();
        self.laps.push((name, (now - self.last).as_micros()));
        self.last = now;
    }
}

impl Session {
    /// Calls the destination.
    fn open(
        control: &Control,
        parts: &Arc<Parts>,
        ongoing: &Arc<Ongoing>,
        options: &MigrationOptions,
    ) -> Result<Self, MigrationError> {
        ongoing.update(|status| status.phase = Phase::Preparing);
        let memory = parts.memory().ok_or(MigrationError::Ended)?;
        let ram = Arc::new(LeavingRam::new(memory)?);
        let mut dialer = Dialer {
            credentials: options.credentials()?,
            options: options.clone(),
            pages: ram.pages(),
            session: SessionId::NEW,
            streams: Mutex::default(),
            epoch: AtomicU64::new(0),
        };
        let opened = dialer.call(ChannelKind::Control, SessionId::NEW)?;
        dialer.session = opened.welcome.session;
        let token = token(dialer.session);
        ongoing.update(|status| status.token.clone_from(&token));
        let connections = options.connections.clamp(1, MAX_CONNECTIONS);
        let server = Server::new(std::collections::HashMap::new()).map_err(MigrationError::Os)?;
        let tracked = options.mode != Mode::Postcopy;
        // A thread that sends may outlive the machine, which writes the last of the guest's output when it goes.
        let of = Arc::downgrade(parts);
        let before_read = move |pages| {
            if tracked {
                let parts = of.upgrade().ok_or("the VM has ended")?;
                let forgotten = parts.forget_changes(pages);
                return forgotten.map_err(|error| umem::causes::chain(&error));
            }
            Ok(())
        };
        let discarded = match options.mode {
            Mode::Postcopy => PageBitmap::all(ram.pages()),
            Mode::Precopy | Mode::Hybrid => PageBitmap::new(ram.pages()),
        };
        Ok(Self {
            control: control.clone(),
            parts: Arc::clone(parts),
            ongoing: Arc::clone(ongoing),
            options: options.clone(),
            dialer: Arc::new(dialer),
            conversation: Conversation::new(opened),
            record: Record::new(options.record.clone(), token, "source"),
            push: Arc::new(Push::new(Arc::clone(&ram), connections, Box::new(before_read))),
            server,
            ram,
            connections,
            unit: 1,
            tracker: None,
            rounds: 0,
            discarded,
            signs: (0, 0),
            paused: None,
        })
    }

    /// Has the destination make a VM like this one.
    fn prepare(&mut self) -> Result<(), MigrationError> {
        let description = self
            .parts
            .describe(self.options.mode, self.connections)
            .encode()?;
        let said = self.conversation.say(&Message::Machine { bytes: &description });
        said.map_err(|error| self.lost(error))?;
        let unit = self.await_step(Step::Prepared, PATIENCE * 3)?;
        if ![PageSize::Small, PageSize::Huge]
            .iter()
            .any(|size| size.pages() == u64::from(unit))
        {
            return Err(MigrationError::Refused {
                destination: self.dialer.destination(),
                reason: format!("it has pages of {unit} times 4 KiB"),
            });
        }
        self.unit = unit.into();
        self.start_channels()
    }

    /// The channels for RAM, each with its thread.
    fn start_channels(&mut self) -> Result<(), MigrationError> {
        let kinds = [ChannelKind::Demand]
            .into_iter()
            .chain(vec![ChannelKind::Background; self.connections]);
        for (index, kind) in kinds.enumerate() {
            let opened = match self.dialer.call(kind, self.dialer.session) {
                Ok(opened) => opened,
                Err(error) => {
                    // If the destination has said why, that says more.
                    self.listen(TICK)?;
                    return Err(error);
                }
            };
            let channel = DataChannel {
                dialer: Arc::clone(&self.dialer),
                push: Arc::clone(&self.push),
                server: self.server.clone(),
                ram: Arc::clone(&self.ram),
                kind,
            };
            let thread = thread::Builder::new().name(format!("migration-{index}"));
            thread
                .spawn(move || channel.run(opened))
                .map_err(MigrationError::Os)?;
        }
        Ok(())
    }

    fn lost(&self, source: ChannelError) -> MigrationError {
        MigrationError::Lost {
            destination: self.dialer.destination(),
            source,
        }
    }

    /// Whether it is still wanted.
    fn check(&self) -> Result<(), MigrationError> {
        if self.ongoing.is_cancelled() {
            return Err(MigrationError::Cancelled);
        }
        if self.control.state() == VmState::Stopped {
            return Err(MigrationError::Ended);
        }
        Ok(())
    }

    /// Waits for a step of the destination's.
    fn await_step(&mut self, wanted: Step, patience: Duration) -> Result<u32, MigrationError> {
        let deadline = Instant::now() + patience;
        loop {
            match self.listen(TICK)? {
                Some((step, value)) if step == wanted => return Ok(value),
                _ if Instant::now() >= deadline => {
                    return Err(MigrationError::Silent(self.dialer.destination()));
                }
                _ => self.check()?,
            }
        }
    }

    /// What the destination says, if it does not say no.
    fn listen(&mut self, patience: Duration) -> Result<Option<(Step, u32)>, MigrationError> {
        match self.conversation.hear(patience) {
            Ok(None) => Ok(None),
            Ok(Some(Heard::Step(Step::Abort, _, reason) | Heard::Goodbye(reason))) => {
                Err(MigrationError::Refused {
                    destination: self.dialer.destination(),
                    reason,
                })
            }
            Ok(Some(Heard::Step(step, value, _))) => Ok(Some((step, value))),
            Ok(Some(Heard::Sign(number))) => {
                self.signs.1 = number;
                Ok(None)
            }
            Err(error) => Err(self.lost(error)),
        }
    }

    /// Waits until the destination has done what it was told.
    fn settle(&mut self) -> Result<(), MigrationError> {
        self.signs.0 += 1;
        let asked = self.conversation.ask_for_sign(self.signs.0);
        asked.map_err(|error| self.lost(error))?;
        // It may have much to do; that it is alive its signs of life tell.
        while self.signs.1 < self.signs.0 {
            self.listen(TICK)?;
            self.check()?;
        }
        Ok(())
    }

    fn run(mut self) -> Result<MigrationSummary, MigrationError> {
        let result = self.move_out();
        if let Err(error) = &result {
            // Whoever hears it need not find out.
            let _ = self.conversation.step(Step::Abort, &umem::causes::chain(error));
        }
        self.push.end();
        self.server.stopper().stop();
        self.dialer.hang_up();
        let handed_over = matches!(self.ongoing.status().phase, Phase::InDoubt | Phase::Postcopy);
        if handed_over && matches!(result, Err(MigrationError::Ended)) {
            // It ended here while it may run there: what stands still must not go on on its way to the end, and what is written down
            // is for who asks where the VM is.
            return result;
        }
        if result.is_err() {
            self.record.remove();
            if let Some(tracker) = self.tracker.take() {
                self.parts.return_tracker(tracker);
            }
            if self.paused.is_some() {
                self.parts.vcpus.unpark();
            }
        }
        result
    }

    fn move_out(&mut self) -> Result<MigrationSummary, MigrationError> {
        self.prepare()?;
        // Not while the guest stands still.
        self.parts.state_list()?;
        self.record
            .write("sending")
            .map_err(|source| self.unwritable(source))?;
        let changed = match self.options.mode {
            Mode::Postcopy => None,
            Mode::Precopy | Mode::Hybrid => Some(self.precopy()?),
        };
        let precopy_bytes = self.push.bytes.load(Relaxed);
        self.ongoing.update(|status| {
            status.phase = Phase::Switching;
            status.bytes_sent = precopy_bytes;
        });
        self.switch(changed)?;
        let served = self.serve()?;
        Ok(MigrationSummary {
            mode: self.options.mode,
            total: self.ongoing.began.elapsed(),
            downtime: served,
            precopy_bytes: self.push.bytes.load(Relaxed),
            postcopy_bytes: self.server.stats().bytes,
            rounds: self.rounds,
        })
    }

    fn unwritable(&self, source: std::io::Error) -> MigrationError {
        MigrationError::Record {
            path: self.record.path().to_path_buf(),
            source,
        }
    }

    fn take_changes(&mut self) -> Result<PageBitmap, MigrationError> {
        let changed = match &mut self.tracker {
            Some(tracker) => self.parts.changes_of(tracker)?,
            None => PageBitmap::new(self.ram.pages()),
        };
        Ok(changed.in_units(self.unit))
    }

    /// What has changed and not been read since.
    fn look_at_changes(&mut self) -> Result<PageBitmap, MigrationError> {
        let changed = match &mut self.tracker {
            Some(tracker) => self.parts.look_at_changes(tracker)?,
            None => PageBitmap::new(self.ram.pages()),
        };
        Ok(changed.in_units(self.unit))
    }

    /// Sends RAM until that pays no more. The answer is what has changed since.
    fn precopy(&mut self) -> Result<PageBitmap, MigrationError> {
        self.ongoing.update(|status| status.phase = Phase::Precopy);
        self.tracker = Some(self.parts.lend_tracker()?);
        // Before anything is read: what changes from here on is seen.
        let _ = self.take_changes()?;
        let mut todo = PageBitmap::all(self.ram.pages());
        loop {
            let (sent, took, unsent) = self.round(todo)?;
            let mut changed = self.look_at_changes()?;
            changed.merge(&unsent);
            let left = changed.count() * PAGE_SIZE as u64;
            let bandwidth = (sent as f64 / took.as_secs_f64()).max(1.0);
            let expected = Duration::from_secs_f64(left as f64 / bandwidth);
            self.ongoing.update(|status| {
                status.dirty_rate = (left as f64 / took.as_secs_f64()) as u64;
                status.bandwidth = bandwidth as u64;
                status.expected_downtime_ms = Some(milliseconds(expected));
                status.bytes_left = left;
            });
            tracing::info!(round = self.rounds, sent, left, ?took, "round of precopy");
            let late = self.ongoing.began.elapsed() >= self.options.timeout;
            match self.options.mode {
                // Half of what was sent has changed meanwhile: another round would find the same.
                Mode::Hybrid if late || left == 0 || left * 2 >= sent || self.rounds >= HYBRID_ROUNDS => {
                    return Ok(changed);
                }
                Mode::Precopy if expected <= self.options.downtime => return Ok(changed),
                Mode::Precopy if late => match self.options.timeout_strategy {
                    TimeoutStrategy::Switch => return Ok(changed),
                    TimeoutStrategy::Cancel => {
                        return Err(MigrationError::TimedOut {
                            left: changed.count(),
                            after: self.ongoing.began.elapsed(),
                        });
                    }
                },
                _ => todo = changed,
            }
        }
    }

    /// Sends pages, and waits until they have arrived. The answer is how many bytes that were, how long it took, and what was not sent
    /// because time is over: what a hybrid migration sends after the switch.
    fn round(&mut self, todo: PageBitmap) -> Result<(u64, Duration, PageBitmap), MigrationError> {
        self.rounds += 1;
        self.send(todo)
    }

    fn send(&mut self, todo: PageBitmap) -> Result<(u64, Duration, PageBitmap), MigrationError> {
        let (began, before) = (Instant::now(), self.push.bytes.load(Relaxed));
        let (round, pages) = (self.rounds, todo.count());
        let epoch = self.push.begin_round(todo);
        self.dialer.epoch.store(epoch, Relaxed);
        let mut unsent = None;
        loop {
            let ended = self
                .push
                .wait_for_round(TICK)
                .map_err(|error| self.push_failed(error))?;
            let left = pages.saturating_sub(self.push.dealt()) * PAGE_SIZE as u64;
            self.ongoing.update(|status| {
                status.round = round;
                status.bytes_sent = self.push.bytes.load(Relaxed);
                status.bytes_left = left;
            });
            if ended {
                break;
            }
            if self.paused.is_none() {
                self.check()?;
                let late = self.ongoing.began.elapsed() >= self.options.timeout;
                if late && self.options.mode == Mode::Hybrid && unsent.is_none() {
                    unsent = Some(self.push.cut_round());
                }
                if late
                    && self.options.mode == Mode::Precopy
                    && self.options.timeout_strategy == TimeoutStrategy::Cancel
                {
                    return Err(MigrationError::TimedOut {
                        left: left / PAGE_SIZE as u64,
                        after: self.ongoing.began.elapsed(),
                    });
                }
            }
            self.listen(Duration::ZERO)?;
        }
        let unsent = unsent.unwrap_or_else(|| PageBitmap::new(self.ram.pages()));
        Ok((self.push.bytes.load(Relaxed) - before, began.elapsed(), unsent))
    }

    fn push_failed(&mut self, error: PushError) -> MigrationError {
        // If the destination has said why, that says more.
        if let Err(refused @ MigrationError::Refused { .. }) = self.listen(TICK) {
            return refused;
        }
        match error {
            PushError::Channel(error) => self.lost(error),
            PushError::Memory(text) => MigrationError::Memory(text),
            PushError::Ended => MigrationError::Cancelled,
        }
    }

    /// The guest stands still, its state is sent, and the destination is about to run it.
    fn switch(&mut self, mut changed: Option<PageBitmap>) -> Result<(), MigrationError> {
        if self.options.mode == Mode::Hybrid {
            for _ in 0..EARLY_DISCARDS {
                let Some(pages) = &mut changed else { break };
                pages.subtract(&self.discarded);
                if pages.count() <= LATE_DISCARDS {
                    break;
                }
                let pages = std::mem::replace(pages, PageBitmap::new(self.ram.pages()));
                self.discard(&pages)?;
                // So that it has not all of them to do when the guest stands still.
                self.settle()?;
                changed = Some(self.take_changes()?);
            }
        }
        self.check()?;
        let mut clock = Clock::start();
        self.paused = Some(Instant::now());
        self.stand_still()?;
        clock.lap("stand still");
        let state = self.save_state()?;
        clock.lap("save");
        // After the state was read, for which KVM may have written to RAM.
        let rest = match changed {
            Some(mut pages) => {
                pages.merge(&self.take_changes()?);
                if self.options.mode == Mode::Precopy {
                    self.rounds += 1;
                    pages
                } else {
                    self.discard_rest(pages, &state)?
                }
            }
            None => self.discard_rest(PageBitmap::new(self.ram.pages()), &state)?,
        };
        self.send(rest)?;
        self.push.last();
        clock.lap("rest of RAM");
        let bytes = state.encode()?;
        clock.lap("encode");
        let said = self.conversation.say(&Message::State { bytes: &bytes });
        said.map_err(|error| self.lost(error))?;
        clock.lap("send");
        self.await_step(Step::Loaded, PATIENCE)?;
        clock.lap("load there");
        // Whoever watches guest memory from outside is done with it before the VM is another host's.
        self.control.switching_over(|| ());
        self.record
            .write("committed")
            .map_err(|source| self.unwritable(source))?;
        clock.lap("record");
        tracing::info!(laps = ?clock.laps, bytes = bytes.len(), "switched");
        if !self.ongoing.commit() {
            return Err(MigrationError::Cancelled);
        }
        Ok(())
    }

    fn stand_still(&mut self) -> Result<(), MigrationError> {
        self.parts.vcpus.park(PAUSE_PATIENCE).map_err(|error| {
            // They run as before.
            self.paused = None;
            match error {
                ParkError::Ended => MigrationError::Ended,
                ParkError::Device { waited } => crate::control::PauseError::DeviceBusy { waited }.into(),
                ParkError::Stuck { index, waited } => crate::control::PauseError::VcpuWaits {
                    index,
                    waited,
                    page: self.parts.missing_page(),
                }
                .into(),
            }
        })
    }

    fn save_state(&self) -> Result<SnapshotState, MigrationError> {
        Ok(self.parts.save_state(PAUSE_PATIENCE)?)
    }

    /// Tells the destination that it has no right content of those of `pages` that the guest does not need at once. Those that it does
    /// are the answer, and to be sent with its state: the destination would ask for one after the other.
    fn discard_rest(
        &mut self,
        mut pages: PageBitmap,
        state: &SnapshotState,
    ) -> Result<PageBitmap, MigrationError> {
        let at_hand = match self.unit {
            1 => self.ram.at_hand(state),
            // Around each of them is a large page, and to send that takes longer than to be asked for it.
            _ => PageBitmap::new(self.ram.pages()),
        };
        pages.subtract(&self.discarded);
        pages.subtract(&at_hand);
        self.discard(&pages)?;
        self.discarded.subtract(&at_hand);
        Ok(at_hand)
    }

    /// Tells the destination that it has no right content of `pages`.
    fn discard(&mut self, pages: &PageBitmap) -> Result<(), MigrationError> {
        self.discarded.merge(pages);
        pages.runs().for_each(|run| self.push.forget(run));
        let epoch = Epoch(u64::from(self.rounds) + 1);
        let pieces = pages.runs().flat_map(|run| {
            let starts = (run.start.0..run.end().0).step_by(MAX_RANGE_PAGES as usize);
            starts.map(move |start| PageRange::new(PageIndex(start), MAX_RANGE_PAGES).clamp_to(run.end()))
        });
        let pieces: Vec<PageRange> = pieces.collect();
        for ranges in pieces.chunks(MAX_RANGES) {
            let said = self.conversation.say(&Message::Discard {
                epoch,
                ranges: ranges.into(),
            });
            said.map_err(|error| self.lost(error))?;
        }
        Ok(())
    }

    /// Says the commit once more, if the VM was not taken back meanwhile: whoever did that knows that the destination does not run it,
    /// and it must not begin to.
    fn commit_again(
        &mut self,
        downtime: Option<Duration>,
    ) -> Result<Result<(), ChannelError>, MigrationError> {
        if downtime.is_none() && self.ongoing.is_taken_back() {
            return Err(MigrationError::TakenBack);
        }
        Ok(self.conversation.step(Step::Commit, ""))
    }

    /// The machine is the destination's. Serves its pages until it has all of them. The answer is how long the guest stood still.
    fn serve(&mut self) -> Result<Duration, MigrationError> {
        let mut pause = BACKOFF.0;
        let mut downtime = None;
        let missing = self.discarded.count();
        let mut said = self.conversation.step(Step::Commit, "");
        loop {
            let heard = said.and_then(|()| self.conversation.hear(TICK));
            said = Ok(());
            match heard {
                Ok(Some(Heard::Step(step @ (Step::Running | Step::Complete), ..))) => {
                    if downtime.is_none() {
                        let stood = self.paused.map_or(Duration::ZERO, |since| since.elapsed());
                        downtime = Some(stood);
                        self.ongoing.hand_over(stood);
                        self.control.migrated_away();
                        // It is known already, and nobody asks the file before this process is gone.
                        let _ = self.record.write("away");
                    }
                    if step == Step::Complete {
                        break;
                    }
                }
                // It had not heard of the commit, and now never runs.
                Ok(Some(Heard::Step(Step::Abort, _, reason))) if downtime.is_none() => {
                    return Err(MigrationError::Refused {
                        destination: self.dialer.destination(),
                        reason,
                    });
                }
                Ok(Some(Heard::Step(Step::Loaded, ..))) => said = self.commit_again(downtime)?,
                Ok(None | Some(Heard::Step(..) | Heard::Sign(_))) => {}
                Ok(Some(Heard::Goodbye(_))) | Err(_) => {
                    thread::sleep(pause);
                    pause = (pause * 2).min(BACKOFF.1);
                    match self.dialer.call(ChannelKind::Control, self.dialer.session) {
                        Ok(opened) => {
                            self.conversation = Conversation::new(opened);
                            // It says its step, and hears this one in any case.
                            said = self.commit_again(downtime)?;
                            pause = BACKOFF.0;
                        }
                        Err(error) => {
                            tracing::debug!(
                                error = &error as &dyn std::error::Error,
                                "the destination is out of reach"
                            );
                            said = Err(ChannelError::Closed);
                        }
                    }
                }
            }
            if downtime.is_none() && self.ongoing.is_taken_back() {
                return Err(MigrationError::TakenBack);
            }
            if self.control.state() == VmState::Stopped {
                return Err(MigrationError::Ended);
            }
            let served = self.server.stats();
            let left = missing.saturating_sub(served.pages) * PAGE_SIZE as u64;
            self.ongoing.update(|status| {
                status.bytes_sent = self.push.bytes.load(Relaxed) + served.bytes;
                status.bytes_left = left;
            });
        }
        let goodbye = Goodbye {
            reason: GoodbyeReason::Done,
            text: "",
        };
        // If it does not hear it, it hears that this process is gone.
        let _ = self.conversation.say(&Message::Goodbye(goodbye));
        self.ongoing.update(|status| {
            status.phase = Phase::Complete;
            status.bytes_left = 0;
        });
        self.record.remove();
        Ok(downtime.unwrap_or_default())
    }
}
