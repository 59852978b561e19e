//! The threads that run vCPUs: how they stand still, are asked something meanwhile, go on, and end.
//!
//! ```text
//!            park            all stand             unpark
//!   running ──────► stopping ──────────► standing ────────► running
//!      ▲                │   one does not in time               │
//!      └────────────────┘                                      │ end
//!      └──────────────────────────► ended ◄────────────────────┘
//! ```
//!
//! A request is written behind the gate, `attention` is raised, and the vCPU is kicked ([`crate::kvm::VcpuKick`]): its thread
//! looks at `attention` after every return from `KVM_RUN`, so none is missed. A vCPU that waits for a page may not be
//! interruptible. Then it does not come to stand until the page comes, and whoever wants it to gives up after a while.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Pid;
use thiserror::Error;

use super::MachineError;
use crate::devices::{DeviceBus, Stopper};
use crate::ending::Ending;
use crate::kvm::{Exit, ExitCounts, ExitReason, Host, MsrError, StateList, Vcpu, VcpuKick, Vm};
use crate::snapshot::SnapshotState;
use crate::thread_placement::Places;

/// Why vCPUs do not stand still.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ParkError {
    /// It is in the kernel and does not return.
    #[error("vCPU {index} did not stop within {} ms", waited.as_millis())]
    Stuck {
        /// The first such vCPU.
        index: u32,
        /// How long it was waited for.
        waited: Duration,
    },
    /// It is in the middle of something.
    #[error("a device did not stop within {} ms", waited.as_millis())]
    Device {
        /// How long it was waited for.
        waited: Duration,
    },
    /// The VM has ended, or is about to.
    #[error("the VM has ended")]
    Ended,
}

/// Something to be done by a vCPU's thread while the vCPU stands.
type Task = Box<dyn FnOnce(&mut Vcpu) + Send>;

/// The vCPUs of a VM whose threads run.
pub(crate) struct Vcpus {
    gate: Mutex<Gate>,
    changed: Condvar,
    /// Somebody wants something: threads look behind the gate before they enter the guest.
    attention: AtomicBool,
    kicks: Vec<VcpuKick>,
    exits: Vec<Arc<ExitCounts>>,
    bus: Arc<DeviceBus>,
    stopper: Stopper,
    places: Places,
    first_instruction: OnceLock<Instant>,
    restore: Option<Restore>,
    /// Why the VM's state was not restored.
    restore_error: Mutex<Option<MachineError>>,
    /// Called when the first vCPU enters the guest for the first time.
    on_first_instruction: Box<dyn Fn() + Send + Sync>,
}

struct Gate {
    wanted: Wanted,
    places: Vec<Place>,
    /// vCPUs whose state is still to be restored.
    unrestored: usize,
}

/// A state to begin in, which each vCPU's thread gives its vCPU: KVM touches guest memory for it, so it may have to wait for a page,
/// and a thread that waits so may not be interruptible. The last one does the rest, and lets all run.
pub(crate) struct Restore {
    saved: Arc<SnapshotState>,
    list: StateList,
    vm: Arc<Vm>,
    bus: Arc<DeviceBus>,
}

impl Restore {
    pub(crate) fn of(
        saved: Option<&Arc<SnapshotState>>,
        host: &Host,
        vm: &Arc<Vm>,
        bus: &Arc<DeviceBus>,
    ) -> Result<Option<Self>, MsrError> {
        let Some(saved) = saved else { return Ok(None) };
        Ok(Some(Self {
            saved: Arc::clone(saved),
            list: StateList::new(host)?,
            vm: Arc::clone(vm),
            bus: Arc::clone(bus),
        }))
    }

    fn vcpu(&self, vcpu: &Vcpu) -> Result<(), MachineError> {
        let state = &self.saved.vcpus()[vcpu.index() as usize];
        Ok(state.restore(vcpu, &self.list)?)
    }

    /// What comes after all vCPUs have their state, and before one runs.
    fn vm(&self) -> Result<(), MachineError> {
        self.saved.chipset().restore(&self.vm)?;
        self.bus.repeat_interrupts();
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Run,
    Stand,
    End,
}

#[derive(Default)]
struct Place {
    at: At,
    task: Option<Task>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum At {
    #[default]
    Running,
    Standing,
    Gone,
}

/// How vCPUs begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begin {
    /// They run.
    Running,
    /// They stand, until [`Vcpus::unpark`].
    Standing,
}

/// The end of the threads.
pub(crate) struct Threads {
    all_ended: Receiver<()>,
    /// As they start.
    ids: Receiver<Pid>,
}

impl Threads {
    /// Whether all have ended, which is waited for no longer than `patience`.
    pub(crate) fn end_within(&self, patience: Duration) -> bool {
        self.all_ended.recv_timeout(patience) == Err(RecvTimeoutError::Disconnected)
    }

    /// The threads, as soon as they have started.
    pub(crate) fn ids(&self) -> impl Iterator<Item = Pid> + '_ {
        self.ids.iter()
    }
}

impl Vcpus {
    /// What is shared by the threads of `vcpus`, which are still to be [started](Self::start). They end the VM through `stopper`.
    pub(crate) fn new(
        vcpus: &[Vcpu],
        bus: &Arc<DeviceBus>,
        stopper: Stopper,
        restore: Option<Restore>,
        begin: Begin,
        places: Places,
        on_first_instruction: impl Fn() + Send + Sync + 'static,
    ) -> Arc<Self> {
        let gate = Gate {
            wanted: match begin {
                Begin::Running => Wanted::Run,
                Begin::Standing => Wanted::Stand,
            },
            places: vcpus.iter().map(|_| Place::default()).collect(),
            unrestored: if restore.is_some() { vcpus.len() } else { 0 },
        };
        Arc::new(Self {
            gate: Mutex::new(gate),
            changed: Condvar::new(),
            attention: AtomicBool::new(begin == Begin::Standing),
            kicks: vcpus.iter().map(Vcpu::kick_handle).collect(),
            exits: vcpus.iter().map(Vcpu::exits).collect(),
            bus: Arc::clone(bus),
            stopper,
            places,
            first_instruction: OnceLock::new(),
            restore,
            restore_error: Mutex::new(None),
            on_first_instruction: Box::new(on_first_instruction),
        })
    }

    /// Starts a thread for each vCPU. If not all could be started, there is an error and the VM is told to stop.
    pub(crate) fn start(self: &Arc<Self>, vcpus: Vec<Vcpu>) -> (Threads, Option<io::Error>) {
        let (alive, all_ended) = mpsc::channel();
        let (id, ids) = mpsc::channel();
        let threads = Threads { all_ended, ids };
        for mut vcpu in vcpus {
            let (vcpus, alive, id) = (Arc::clone(self), alive.clone(), id.clone());
            let thread = thread::Builder::new()
                .name(format!("vcpu-{}", vcpu.index()))
                .spawn(move || {
                    vcpus.run(&mut vcpu, id);
                    vcpus.lock().places[vcpu.index() as usize].at = At::Gone;
                    vcpus.changed.notify_all();
                    drop(vcpu);
                    drop(alive);
                });
            if let Err(error) = thread {
                self.stopper.end(Ending::Stopped);
                return (threads, Some(error));
            }
        }
        (threads, None)
    }

    /// A thread's work, until the VM ends.
    fn run(&self, vcpu: &mut Vcpu, id: Sender<Pid>) {
        // Before anything can fail: it is waited for.
        let _ = id.send(rustix::thread::gettid());
        drop(id);
        self.places.bind_vcpu(vcpu.index());
        let kick = vcpu.kick_handle();
        let _attached = match kick.attach() {
            Ok(attached) => attached,
            Err(error) => {
                tracing::error!(%error, "a vCPU cannot be interrupted");
                return self.stopper.end(Ending::Stopped);
            }
        };
        if let Some(restore) = &self.restore
            && !self.restore(vcpu, restore)
        {
            return;
        }
        if self.attention.load(SeqCst) && !self.stand(vcpu) {
            return;
        }
        if vcpu.index() == 0 && self.first_instruction.set(Instant::now()).is_ok() {
            (self.on_first_instruction)();
        }
        loop {
            if self.attention.load(SeqCst) && !self.stand(vcpu) {
                return;
            }
            if let Exit::Ended(ending) = vcpu.run(&*self.bus) {
                return self.stopper.end(ending);
            }
        }
    }

    /// Gives the vCPU the state that it begins in, and waits until all have theirs. False: it is the end.
    fn restore(&self, vcpu: &Vcpu, restore: &Restore) -> bool {
        let mut result = restore.vcpu(vcpu);
        let mut gate = self.lock();
        if result.is_ok() && gate.unrestored == 1 {
            drop(gate);
            result = restore.vm();
            gate = self.lock();
        }
        if let Err(error) = result {
            drop(gate);
            self.restore_error
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert(error);
            self.stopper.end(Ending::Stopped);
            return false;
        }
        gate.unrestored -= 1;
        self.changed.notify_all();
        while gate.unrestored > 0 && gate.wanted != Wanted::End {
            gate = self.wait(gate);
        }
        gate.wanted != Wanted::End
    }

    /// Why the VM's state was not restored, if that is how it ended.
    pub(crate) fn restore_error(&self) -> Option<MachineError> {
        self.restore_error
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// Stands for as long as that is wanted. False: it is the end.
    fn stand(&self, vcpu: &mut Vcpu) -> bool {
        let index = vcpu.index() as usize;
        match self.lock().wanted {
            Wanted::Run => return true,
            Wanted::End => return false,
            Wanted::Stand => {}
        }
        if let Some(ending) = vcpu.complete_access(&*self.bus) {
            self.stopper.end(ending);
            return false;
        }
        let mut gate = self.lock();
        gate.places[index].at = At::Standing;
        self.changed.notify_all();
        loop {
            if let Some(task) = gate.places[index].task.take() {
                drop(gate);
                task(vcpu);
                gate = self.lock();
                continue;
            }
            match gate.wanted {
                Wanted::Stand => gate = self.wait(gate),
                Wanted::Run => break,
                Wanted::End => return false,
            }
        }
        gate.places[index].at = At::Running;
        drop(gate);
        vcpu.excuse_pause();
        true
    }

    /// Makes all stand, and the devices with them, and waits until they do. After an error they run as before.
    pub(crate) fn park(&self, patience: Duration) -> Result<(), ParkError> {
        let deadline = Instant::now() + patience;
        self.park_vcpus(patience)?;
        // After the vCPUs: none asks a device for anything any more.
        if self
            .bus
            .stand_still(deadline.saturating_duration_since(Instant::now()))
        {
            return Ok(());
        }
        self.unpark();
        Err(ParkError::Device { waited: patience })
    }

    fn park_vcpus(&self, patience: Duration) -> Result<(), ParkError> {
        let deadline = Instant::now() + patience;
        let mut gate = self.lock();
        if gate.wanted == Wanted::End {
            return Err(ParkError::Ended);
        }
        gate.wanted = Wanted::Stand;
        self.attention.store(true, SeqCst);
        // Under the lock: a thread that is kicked and comes here waits for it, but has nothing else to do.
        self.kicks.iter().for_each(VcpuKick::kick);
        loop {
            let error = match gate.places.iter().position(|place| place.at != At::Standing) {
                None => return Ok(()),
                Some(index) => {
                    let ended = gate.wanted == Wanted::End;
                    if ended || gate.places.iter().any(|place| place.at == At::Gone) {
                        ParkError::Ended
                    } else if Instant::now() >= deadline {
                        let (index, waited) = (index as u32, patience);
                        ParkError::Stuck { index, waited }
                    } else {
                        gate = self.wait_until(gate, deadline);
                        continue;
                    }
                }
            };
            self.release(&mut gate);
            return Err(error);
        }
    }

    /// Waits until all stand that began so.
    pub(crate) fn await_standing(&self) -> Result<(), ParkError> {
        let mut gate = self.lock();
        loop {
            let mut places = gate.places.iter();
            if gate.wanted != Wanted::Stand || gate.places.iter().any(|place| place.at == At::Gone) {
                return Err(ParkError::Ended);
            }
            if places.all(|place| place.at == At::Standing) {
                return Ok(());
            }
            gate = self.wait(gate);
        }
    }

    /// Lets all run again.
    pub(crate) fn unpark(&self) {
        self.release(&mut self.lock());
    }

    fn release(&self, gate: &mut Gate) {
        if gate.wanted == Wanted::Stand {
            self.bus.go_on();
            gate.wanted = Wanted::Run;
            self.attention.store(false, SeqCst);
            self.changed.notify_all();
        }
    }

    /// Lets each vCPU's thread, all of which stand, do something; the answers are in the order of the vCPUs. The threads that
    /// have not answered in time do it later, for nobody.
    pub(crate) fn ask<T: Send + 'static>(
        &self,
        patience: Duration,
        question: impl Fn(&mut Vcpu) -> T + Send + Sync + 'static,
    ) -> Result<Vec<T>, ParkError> {
        let deadline = Instant::now() + patience;
        let question = Arc::new(question);
        let mut gate = self.lock();
        let answers: Vec<Receiver<T>> = gate
            .places
            .iter_mut()
            .map(|place| {
                let (answer, answered) = mpsc::channel();
                let question = Arc::clone(&question);
                place.task = Some(Box::new(move |vcpu| {
                    // Who asked may have gone.
                    let _ = answer.send(question(vcpu));
                }));
                answered
            })
            .collect();
        self.changed.notify_all();
        drop(gate);
        (0..)
            .zip(answers)
            .map(|(index, answer)| {
                let left = deadline.saturating_duration_since(Instant::now());
                answer.recv_timeout(left).map_err(|error| match error {
                    RecvTimeoutError::Timeout => ParkError::Stuck {
                        index,
                        waited: patience,
                    },
                    RecvTimeoutError::Disconnected => ParkError::Ended,
                })
            })
            .collect()
    }

    /// Ends all, as soon as they leave the guest.
    pub(crate) fn end(&self) {
        let mut gate = self.lock();
        gate.wanted = Wanted::End;
        // What a thread that is gone was asked, nobody answers.
        gate.places.iter_mut().for_each(|place| place.task = None);
        self.attention.store(true, SeqCst);
        self.changed.notify_all();
        drop(gate);
        self.kicks.iter().for_each(VcpuKick::kick);
    }

    /// When the first vCPU entered the guest.
    pub(crate) fn first_instruction(&self) -> Option<Instant> {
        self.first_instruction.get().copied()
    }

    /// How long ago the state was saved that they began in, by the hosts' clocks.
    pub(crate) fn state_age(&self) -> Duration {
        self.restore
            .as_ref()
            .map_or(Duration::ZERO, |restore| restore.saved.age())
    }

    /// How often vCPUs left the guest, all together.
    pub(crate) fn exits(&self) -> [(ExitReason, u64); ExitReason::ALL.len()] {
        ExitReason::ALL.map(|reason| (reason, self.exits.iter().map(|counts| counts.get(reason)).sum()))
    }

    fn lock(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, gate: MutexGuard<'a, Gate>) -> MutexGuard<'a, Gate> {
        self.changed.wait(gate).unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_until<'a>(&self, gate: MutexGuard<'a, Gate>, deadline: Instant) -> MutexGuard<'a, Gate> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.changed
            .wait_timeout(gate, left)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }
}
