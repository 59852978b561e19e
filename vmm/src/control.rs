//! A VM that runs, in the hands of other threads: its state, pause, resume, snapshot, the end, and what it has counted.
//!
//! A [`Control`] is made before the VM is and outlives it. [`crate::machine::run`] puts the VM under it; until then, and after
//! the end, there is nothing to be asked but the state.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use thiserror::Error;
use umem::pager::{PagerError, PagerStats};
use umem::states::StateCounts;
use umem::units::{PAGE_SIZE, PageIndex};
use ummunotify::AddressRange;
use vm_memory::GuestAddress;

use crate::devices::{BalloonStatus, Stopper};
use crate::ending::Ending;
use crate::invalidations::Invalidations;
use crate::kvm::ExitReason;
use crate::machine::{ParkError, Parts};
use crate::migration::{
    self, Arrival, MigrationError, MigrationOptions, MigrationSummary, Ongoing, Status, TooLate,
};
use crate::report::{self, milliseconds};
use crate::snapshot::{
    Complete, Draft, SnapshotError, SnapshotOptions, SnapshotProgress, SnapshotSummary, Then,
};

/// How long vCPUs are waited for when they are to stand still.
pub const PATIENCE: Duration = Duration::from_secs(3);

/// After how long a wait for a page is what the VM does.
const LONG_WAIT: Duration = Duration::from_secs(1);

/// What a VM does, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmState {
    /// No vCPU has entered the guest yet.
    Booting,
    /// vCPUs run.
    Running,
    /// They stand still because somebody asked for it.
    Paused,
    /// They run, but somebody has been waiting for a page for more than a second.
    WaitingForPages,
    /// The VM is being sent to another host.
    MigratingOut,
    /// It is arriving from another host.
    MigratingIn,
    /// It runs on another host.
    MigratedAway,
    /// It has ended.
    Stopped,
}

impl VmState {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Booting,
        Self::Running,
        Self::Paused,
        Self::WaitingForPages,
        Self::MigratingOut,
        Self::MigratingIn,
        Self::MigratedAway,
        Self::Stopped,
    ];

    /// The word.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Booting => "booting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::WaitingForPages => "waiting-for-pages",
            Self::MigratingOut => "migrating-out",
            Self::MigratingIn => "migrating-in",
            Self::MigratedAway => "migrated-away",
            Self::Stopped => "stopped",
        }
    }
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What observers are told.
#[derive(Clone, Debug)]
pub enum Event {
    /// The VM is in another state than before. (`WaitingForPages` is not told: it is what a running VM is when it is asked.)
    State(VmState),
    /// Every page of RAM is there. Told once.
    AllPagesPresent,
    /// The page source is out of reach, for this reason, and is looked for.
    SourceLost(String),
    /// It is in reach again.
    SourceBack,
    /// A page cannot be had, and the VM ends. Told once.
    PagerFailed(Arc<PagerError>),
    /// What is behind guest-physical addresses is about to change. Only told where somebody may watch that from outside.
    Invalidated {
        /// Why.
        cause: Cause,
        /// Where.
        ranges: Arc<[AddressRange]>,
    },
}

/// Why what is behind guest-physical addresses changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The guest has put pages into its balloon.
    Balloon,
    /// The guest has reported that pages are free.
    FreePageReporting,
    /// The VM goes on elsewhere, or not at all: its RAM is the guest's no longer.
    SwitchOver,
}

impl Cause {
    /// In a word.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Balloon => "balloon",
            Self::FreePageReporting => "free-page-reporting",
            Self::SwitchOver => "switch-over",
        }
    }
}

/// Is told events, one after another. Must neither block nor change the VM's state.
type Observer = Box<dyn Fn(&Event) + Send + Sync>;

/// Why a VM was not paused.
#[derive(Debug, Error)]
pub enum PauseError {
    /// It is paused.
    #[error("the VM is paused already")]
    AlreadyPaused,
    /// It does not run.
    #[error("the VM cannot be paused: it is {0}")]
    WrongState(VmState),
    /// Another request has not ended yet.
    #[error("another request is being served")]
    Busy,
    /// A device does not come to an end with what it does. The VM runs on as before.
    #[error("a device did not stop within {} ms; the VM goes on as before", waited.as_millis())]
    DeviceBusy {
        /// How long it was waited for.
        waited: Duration,
    },
    /// A vCPU is in the kernel and cannot be interrupted. The VM runs on as before.
    #[error("{}; the VM goes on as before", stuck(*index, *waited, page.as_ref()))]
    VcpuWaits {
        /// The vCPU.
        index: u32,
        /// How long it was waited for.
        waited: Duration,
        /// The page that somebody has waited for longest, if that is known: where in RAM, and where the guest sees it.
        page: Option<(PageIndex, GuestAddress)>,
    },
}

/// A vCPU that does not stop, in words.
fn stuck(index: u32, waited: Duration, page: Option<&(PageIndex, GuestAddress)>) -> String {
    let waited = waited.as_millis();
    match page {
        Some((page, address)) => format!(
            "vCPU {index} did not stop within {waited} ms: it waits for a page, and page {page} (guest-physical {:#x}) has not come",
            address.0
        ),
        None => format!("vCPU {index} did not stop within {waited} ms"),
    }
}

/// Why a VM was not resumed.
#[derive(Debug, Error)]
pub enum ResumeError {
    /// It is not paused.
    #[error("the VM cannot be resumed: it is {0}, not paused")]
    WrongState(VmState),
    /// Another request has not ended yet.
    #[error("another request is being served")]
    Busy,
}

/// Why a VM's balloon has no other size.
#[derive(Debug, Error)]
pub enum ResizeError {
    /// There is none.
    #[error("the VM has no balloon: give it one with --balloon")]
    NoBalloon,
    /// More than RAM.
    #[error("a balloon of {asked} bytes does not fit into RAM, which has {ram}")]
    TooLarge {
        /// Bytes asked for.
        asked: u64,
        /// Bytes of RAM.
        ram: u64,
    },
    /// No whole pages.
    #[error("the size of a balloon is a multiple of 4096 bytes, and {0} is not")]
    Unaligned(u64),
    /// There is no VM.
    #[error("the balloon cannot be resized: the VM is {0}")]
    WrongState(VmState),
}

/// Why a VM was not told to end.
#[derive(Debug, Error)]
pub enum ShutdownError {
    /// It has ended.
    #[error("the VM has ended already")]
    Stopped,
}

/// Why a migration was not cancelled.
#[derive(Debug, Error)]
pub enum CancelError {
    /// There is none.
    #[error("there is no migration to be cancelled: the VM is {0}")]
    None(VmState),
    /// The VM was handed over.
    #[error("it is too late: the VM was handed over to its destination")]
    TooLate,
}

/// Why a VM was not taken back.
#[derive(Debug, Error)]
pub enum TakeBackError {
    /// It runs here, or does not run at all.
    #[error("there is nothing to be taken back: the VM was not handed over")]
    NotInDoubt,
    /// It runs there.
    #[error("the destination has said that it runs the VM: it cannot be taken back")]
    Away,
    /// Another migration was meant.
    #[error("that is not the token of this migration: 'umem ctl info' says it")]
    WrongToken,
}

/// What was counted so far.
#[derive(Clone, Debug)]
pub struct Counters {
    /// Where RAM comes from, as a source URL.
    pub source_url: String,
    /// The pager's figures, with the page source's.
    pub pager: PagerStats,
    /// Pages of RAM, of 4 KiB.
    pub pages: u64,
    /// How many of them the kernel holds in memory, if it says.
    pub resident: Option<u64>,
    /// How many vCPUs there are.
    pub vcpus: u32,
    /// How often they left the guest.
    pub exits: [(ExitReason, u64); ExitReason::ALL.len()],
    /// When the first vCPU entered the guest.
    pub first_instruction: Option<Instant>,
    /// What its balloon holds, if it has one.
    pub balloon: Option<BalloonStatus>,
}

/// A handle on a VM. Clones are for the same one.
#[derive(Clone)]
pub struct Control {
    shared: Arc<Shared>,
}

struct Shared {
    inner: Mutex<Inner>,
    /// Held while events are told, so that they are told in order.
    observers: Mutex<Vec<Observer>>,
    /// Whoever pauses, resumes or makes a snapshot has it.
    turn: Mutex<()>,
    /// Those outside who watch guest-physical addresses.
    invalidations: Mutex<Option<Arc<Invalidations>>>,
}

struct Inner {
    state: VmState,
    /// The VM is to end, as soon as there is one.
    shutdown: bool,
    stopper: Option<Stopper>,
    /// While there is a VM.
    parts: Option<Arc<Parts>>,
    /// While the VM is being sent, and after.
    ongoing: Option<Arc<Ongoing>>,
    /// When it has been sent.
    moved: Option<MigrationSummary>,
    /// Where it comes from another host.
    arrival: Option<Arrival>,
}

impl Default for Control {
    fn default() -> Self {
        Self::new()
    }
}

impl Control {
    /// A handle on a VM that is going to be.
    pub fn new() -> Self {
        Self {
            shared: Arc::new(Shared {
                inner: Mutex::new(Inner {
                    state: VmState::Booting,
                    shutdown: false,
                    stopper: None,
                    parts: None,
                    ongoing: None,
                    moved: None,
                    arrival: None,
                }),
                observers: Mutex::new(Vec::new()),
                turn: Mutex::new(()),
                invalidations: Mutex::new(None),
            }),
        }
    }

    /// Tells `observer` all events from now on, one after another, from the thread in which they happen. It must neither block
    /// nor ask for anything that changes the state.
    pub fn observe(&self, observer: impl Fn(&Event) + Send + Sync + 'static) {
        self.observers().push(Box::new(observer));
    }

    /// What the VM does.
    pub fn state(&self) -> VmState {
        let (state, parts) = self.now();
        let waits = || {
            let wait = parts.and_then(|parts| parts.longest_wait());
            wait.is_some_and(|waited| waited >= LONG_WAIT)
        };
        match state {
            VmState::Running if waits() => VmState::WaitingForPages,
            state => state,
        }
    }

    /// Makes all vCPUs leave the guest, and stay out of it until [`Self::resume`]. Pages are served meanwhile.
    pub fn pause(&self) -> Result<(), PauseError> {
        self.pause_within(PATIENCE)
    }

    /// The same with another limit to how long vCPUs may take. After an error the VM is as it was.
    pub fn pause_within(&self, patience: Duration) -> Result<(), PauseError> {
        let _turn = self.turn().ok_or(PauseError::Busy)?;
        let parts = match self.now() {
            (VmState::Paused, _) => return Err(PauseError::AlreadyPaused),
            (VmState::Running, Some(parts)) => parts,
            (state, _) => return Err(PauseError::WrongState(state)),
        };
        self.park(&parts, patience)
    }

    /// Lets a paused VM run on.
    pub fn resume(&self) -> Result<(), ResumeError> {
        let _turn = self.turn().ok_or(ResumeError::Busy)?;
        let parts = match self.now() {
            (VmState::Paused, Some(parts)) => parts,
            (state, _) => return Err(ResumeError::WrongState(state)),
        };
        if self.unpark(&parts) {
            Ok(())
        } else {
            Err(ResumeError::WrongState(VmState::Stopped))
        }
    }

    /// Makes a snapshot of a VM that runs or is paused ([`crate::snapshot`]). Whatever hinders it, the VM goes on as before.
    ///
    /// A VM that runs stands still only until the pages that it has are written; those that are not loaded yet and all that makes
    /// the file safe comes after that.
    pub fn snapshot(
        &self,
        options: &SnapshotOptions,
        progress: &mut dyn FnMut(SnapshotProgress),
    ) -> Result<SnapshotSummary, SnapshotError> {
        let _turn = self.turn().ok_or(SnapshotError::Busy)?;
        let began = Instant::now();
        let (was_paused, parts) = match self.now() {
            (VmState::Paused, Some(parts)) => (true, parts),
            (VmState::Running, Some(parts)) => (false, parts),
            (state, _) => return Err(SnapshotError::WrongState(state)),
        };
        let memory = parts
            .memory()
            .ok_or(SnapshotError::WrongState(VmState::Stopped))?;
        let mut draft = Draft::new(&options.directory, options.base.as_deref(), memory, progress)?;
        let since = Instant::now();
        if !was_paused {
            self.park(&parts, options.patience)?;
        }
        let mut changes = None;
        let state = parts.save_state(options.patience).and_then(|state| {
            // After the state was read, for which KVM may have written to RAM.
            changes = parts.take_changes()?;
            draft.write_present(changes.as_ref())?;
            Ok(state)
        });
        let paused = if was_paused {
            Duration::ZERO
        } else {
            since.elapsed()
        };
        if !was_paused && (state.is_err() || options.then == Then::GoOn) {
            self.unpark(&parts);
        }
        let complete = state.and_then(|state| draft.complete(&state));
        match (&complete, options.then) {
            // If it has ended already, all the better.
            (Ok(_), Then::Stop) => self.switching_over(|| drop(self.shutdown())),
            (Err(_), Then::Stop) if !was_paused => drop(self.unpark(&parts)),
            _ => {}
        }
        let digest = complete.as_ref().ok().map(|complete| complete.footer.digest);
        parts.changes_are(digest, changes.as_ref());
        let Complete {
            path,
            footer,
            absent_pages,
            tracked,
        } = complete?;
        Ok(SnapshotSummary {
            path,
            pages: footer.pages(),
            data_pages: footer.data_pages,
            absent_pages,
            own_pages: footer.checksums(),
            tracked,
            digest: footer.digest,
            paused,
            took: began.elapsed(),
        })
    }

    /// Sends the VM, which runs, to another host, and returns when it is not needed here any more, which then ends. Whatever hinders it,
    /// the VM goes on here as before.
    pub fn send_migration(&self, options: &MigrationOptions) -> Result<MigrationSummary, MigrationError> {
        let _turn = self.turn().ok_or(MigrationError::Busy)?;
        let parts = match self.now() {
            (VmState::Running, Some(parts)) => parts,
            (state, _) => return Err(MigrationError::WrongState(state)),
        };
        let ongoing = Arc::new(Ongoing::new(options, parts.ram_size()));
        self.inner().ongoing = Some(Arc::clone(&ongoing));
        self.change(VmState::MigratingOut);
        let sent = migration::send(self, &parts, &ongoing, options);
        match &sent {
            Ok(summary) => {
                let mut inner = self.inner();
                inner.moved = Some(summary.clone());
                if let Some(stopper) = &inner.stopper {
                    stopper.end(Ending::Migrated);
                }
            }
            Err(_) => {
                self.change(VmState::Running);
            }
        }
        sent
    }

    /// Lets a VM that is being sent stay here.
    pub fn cancel_migration(&self) -> Result<(), CancelError> {
        let (state, ongoing) = self.ongoing();
        let ongoing = ongoing.ok_or(CancelError::None(state))?;
        ongoing.cancel().map_err(|_| CancelError::TooLate)
    }

    /// Lets a VM run here of which it is not known whether it runs where it was sent. Whoever says so has made sure that it does not, and
    /// will not.
    pub fn take_back(&self, token: &str) -> Result<(), TakeBackError> {
        let (_, ongoing) = self.ongoing();
        let ongoing = ongoing.ok_or(TakeBackError::NotInDoubt)?;
        ongoing.take_back(token).map_err(|error| match error {
            TooLate::Away => TakeBackError::Away,
            TooLate::WrongToken => TakeBackError::WrongToken,
            TooLate::NotInDoubt | TooLate::InDoubt => TakeBackError::NotInDoubt,
        })
    }

    fn ongoing(&self) -> (VmState, Option<Arc<Ongoing>>) {
        let inner = self.inner();
        let sent = matches!(inner.state, VmState::MigratingOut | VmState::MigratedAway);
        (inner.state, inner.ongoing.clone().filter(|_| sent))
    }

    /// How far the last migration is, if there was any.
    pub fn migration(&self) -> Option<Status> {
        let (ongoing, arrival) = {
            let inner = self.inner();
            (inner.ongoing.clone(), inner.arrival.clone())
        };
        match ongoing {
            Some(ongoing) => Some(ongoing.status()),
            None => arrival?.status(),
        }
    }

    /// Makes the vCPUs stand still, and says so.
    fn park(&self, parts: &Parts, patience: Duration) -> Result<(), PauseError> {
        match parts.vcpus.park(patience) {
            Ok(()) if self.change(VmState::Paused) => Ok(()),
            Ok(()) | Err(ParkError::Ended) => Err(PauseError::WrongState(VmState::Stopped)),
            Err(ParkError::Device { waited }) => Err(PauseError::DeviceBusy { waited }),
            Err(ParkError::Stuck { index, waited }) => Err(PauseError::VcpuWaits {
                index,
                waited,
                page: parts.missing_page(),
            }),
        }
    }

    /// Lets them run. It is told before they do, so that nothing that the guest does comes before. False: the VM has ended.
    fn unpark(&self, parts: &Parts) -> bool {
        let runs = self.change(VmState::Running);
        if runs {
            parts.vcpus.unpark();
        }
        runs
    }

    /// Wants the balloon to hold so many bytes of RAM. The guest hears of it, and does it when and as far as it can.
    pub fn resize_balloon(&self, bytes: u64) -> Result<(), ResizeError> {
        let (state, Some(parts)) = self.now() else {
            return Err(ResizeError::WrongState(self.state()));
        };
        if state == VmState::Stopped {
            return Err(ResizeError::WrongState(state));
        }
        parts.resize_balloon(bytes)
    }

    /// Lets others watch guest-physical addresses from outside, until the VM ends.
    pub fn tell_of_invalidations(&self, invalidations: Invalidations) {
        *self.watchers() = Some(Arc::new(invalidations));
    }

    /// Those who watch guest-physical addresses from outside, if that is possible.
    pub fn invalidations(&self) -> Option<Arc<Invalidations>> {
        self.watchers().clone()
    }

    /// Makes a change of what is behind these guest-physical addresses: by `make`, which is called once whatever others do. Before
    /// it is, they have been told, and are done with what was there, or have had their time for it.
    pub fn changing<T>(&self, cause: Cause, ranges: &[AddressRange], make: impl FnOnce() -> T) -> T {
        let Some(invalidations) = self.invalidations() else {
            return make();
        };
        let ranges: Arc<[AddressRange]> = ranges.into();
        self.tell(&Event::Invalidated {
            cause,
            ranges: Arc::clone(&ranges),
        });
        invalidations.change(&ranges, make)
    }

    /// The same for all of RAM, which is the guest's no longer when `make` returns. For whoever moves a VM elsewhere: before it runs
    /// there.
    pub fn switching_over<T>(&self, make: impl FnOnce() -> T) -> T {
        self.changing(Cause::SwitchOver, &[AddressRange::ALL], make)
    }

    fn watchers(&self) -> MutexGuard<'_, Option<Arc<Invalidations>>> {
        self.shared
            .invalidations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the VM, in whatever state it is: with the outcome `stopped`.
    pub fn shutdown(&self) -> Result<(), ShutdownError> {
        let mut inner = self.inner();
        if inner.state == VmState::Stopped {
            return Err(ShutdownError::Stopped);
        }
        inner.shutdown = true;
        if let Some(stopper) = &inner.stopper {
            stopper.end(Ending::Stopped);
        }
        Ok(())
    }

    /// What was counted so far; `None` where there is no VM yet, or none any more.
    pub fn counters(&self) -> Option<Counters> {
        self.now().1?.counters()
    }

    /// How many pages are in which state: the one of the [counters](Self::counters) that costs nearly nothing.
    pub fn pages(&self) -> Option<StateCounts> {
        self.now().1?.states()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.shared.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn observers(&self) -> MutexGuard<'_, Vec<Observer>> {
        self.shared
            .observers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The state as it was told, and the VM if there is one.
    fn now(&self) -> (VmState, Option<Arc<Parts>>) {
        let inner = self.inner();
        (inner.state, inner.parts.clone())
    }

    /// `None`: somebody else has it.
    fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        match self.shared.turn.try_lock() {
            Ok(turn) => Some(turn),
            Err(TryLockError::Poisoned(turn)) => Some(turn.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Changes the state, and tells that. False: the VM has ended, which is the last state.
    fn change(&self, to: VmState) -> bool {
        let observers = self.observers();
        {
            let mut inner = self.inner();
            if inner.state == VmState::Stopped {
                return false;
            }
            inner.state = to;
        }
        observers.iter().for_each(|observer| observer(&Event::State(to)));
        true
    }
}

/// For the machine.
impl Control {
    /// What ends the VM is there.
    pub(crate) fn set_stopper(&self, stopper: Stopper) {
        let mut inner = self.inner();
        if inner.shutdown {
            stopper.end(Ending::Stopped);
        }
        inner.stopper = Some(stopper);
    }

    /// The VM is there.
    pub(crate) fn attach(&self, parts: &Arc<Parts>) {
        self.inner().parts = Some(Arc::clone(parts));
    }

    /// The first vCPU enters the guest.
    pub(crate) fn started(&self) {
        self.change(VmState::Running);
    }

    /// It comes from another host.
    pub(crate) fn arriving(&self, arrival: &Arrival) {
        self.inner().arrival = Some(arrival.clone());
        self.change(VmState::MigratingIn);
    }

    /// It runs on another host.
    pub(crate) fn migrated_away(&self) {
        self.change(VmState::MigratedAway);
    }

    /// Whether it is to end.
    pub(crate) fn is_ending(&self) -> bool {
        let inner = self.inner();
        inner.shutdown || inner.state == VmState::Stopped
    }

    /// What there is to report of a migration.
    pub(crate) fn migration_report(&self, pager: &PagerStats) -> Option<report::Migration> {
        let inner = self.inner();
        if let Some(moved) = &inner.moved {
            return Some(report::Migration {
                mode: moved.mode.name(),
                total_ms: Some(milliseconds(moved.total)),
                downtime_ms: milliseconds(moved.downtime),
                precopy_bytes: moved.precopy_bytes,
                postcopy_bytes: moved.postcopy_bytes,
                rounds: Some(moved.rounds),
            });
        }
        let status = inner.arrival.as_ref()?.status()?;
        Some(report::Migration {
            mode: status.mode.name(),
            total_ms: None,
            downtime_ms: status.downtime_ms?,
            precopy_bytes: pager.pushed * PAGE_SIZE as u64,
            postcopy_bytes: pager.source.bytes,
            rounds: None,
        })
    }

    /// Something has happened.
    pub(crate) fn tell(&self, event: &Event) {
        self.observers().iter().for_each(|observer| observer(event));
    }

    /// The VM has ended: nobody begins anything with it any more.
    pub(crate) fn stopped(&self) {
        self.change(VmState::Stopped);
    }

    /// Lets go of the VM. Who is making a snapshot of it has what it needs: memory that is not written any more.
    pub(crate) fn detach(&self) {
        // Who watches from outside sees that it is over.
        drop(self.watchers().take());
        self.inner().parts = None;
    }
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control")
            .field("state", &self.inner().state)
            .finish_non_exhaustive()
    }
}
