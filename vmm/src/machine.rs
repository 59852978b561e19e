//! The parts put together: a VM whose RAM is a region filled from a page source, run until it ends.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use firmware::boot_info::BootInfo;
use thiserror::Error;
use umem::causes::chain;
use umem::pager::{Notice, PagerError, PagerOptions, StartError};
use umem::region::{Backing, PageSize, Region, RegionError};
use umem::states::{PageStates, StateCounts};
use umem::units::{PageIndex, PageRange};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::address_map::{PAGE_SIZE, RamMap};
use crate::boot::{ReadOnlyPages, RomError};
use crate::control::{Control, Counters, Event, ResizeError};
use crate::devices::{
    BALLOON_IRQ, Balloon, BalloonOptions, Console, ConsoleError, DeviceBus, DeviceState, EventLoop,
    EventLoopError, SERIAL_IRQ, Stopper,
};
use crate::dirty::{self, Changes, DirtyTracker, PageBitmap, Tracking};
use crate::ending::Ending;
use crate::invalidations::InvalidationsError;
use crate::kvm::{
    AsyncPageFaultCounter, AsyncPageFaults, ChipsetState, ChipsetStateError, CpuMismatch, CpuModel,
    CpuModelError, Host, HostError, MsrError, StateList, Vcpu, VcpuSetupError, VcpuState, VcpuStateError, Vm,
    VmError,
};
use crate::memory::GuestMemory;
use crate::migration::{Arrival, ArrivalError, Description, Mode};
use crate::ram_source::{RamSource, ServeError, ServingPager, ServingRam};
use crate::removal::{Ram, Remover};
use crate::report::{Process, Report, milliseconds};
use crate::snapshot::{Memory, Saved, SavedPages, SnapshotError, SnapshotState, VERSION};
use crate::thread_placement::{Placement, PlacementError, Places};
use crate::working_set::{Recording, RunningRecording, WorkingSetFileError};

mod arrival;
mod vcpus;

use self::arrival::{begin_state, end_arrival, take_over};
pub use self::vcpus::ParkError;
use self::vcpus::{Begin, Restore, Threads, Vcpus};

/// How long vCPUs are waited for when the VM ends. One that waits for a page may not be interruptible, so it is not waited for
/// longer: the end of the process ends its wait, and until then it sees no page that is not its own.
const VCPU_GRACE: Duration = Duration::from_secs(1);

/// The most that a memory slot takes (Linux: `KVM_MEM_MAX_NR_PAGES`).
const SLOT_SIZE_MAX: u64 = ((1 << 31) - 1) * PAGE_SIZE;

/// What the first instruction is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Firmware {
    /// The reset vector of the ROM that comes with this program.
    BuiltIn,
    /// The reset vector of another ROM.
    File(PathBuf),
    /// The kernel's entry.
    None,
}

/// What is at the other end of the guest's serial line.
#[derive(Clone, Debug)]
pub enum SerialLine {
    /// Standard input and output.
    StandardStreams,
    /// No input, and output that goes to this file.
    File(Arc<File>),
}

/// How a VM begins.
#[derive(Clone, Debug)]
pub enum Start {
    /// With its first instruction.
    Boot {
        /// How its kernel is entered.
        entry: BootInfo,
        /// What comes before that.
        firmware: Firmware,
    },
    /// Where it was saved.
    Restore(Arc<SnapshotState>),
    /// Where it stood still on another host, which it comes from.
    Arrive(Arrival, Arc<Description>),
}

/// A VM to be run.
#[derive(Clone)]
pub struct MachineConfig {
    /// Where its RAM comes from.
    pub source: RamSource,
    /// Where its RAM is.
    pub ram: RamMap,
    /// How it begins.
    pub start: Start,
    /// Where its console is.
    pub serial_line: SerialLine,
    /// What is behind its RAM.
    pub backing: Backing,
    /// In which pages its RAM is installed.
    pub page_size: PageSize,
    /// How its RAM is served.
    pub pager: PagerOptions,
    /// Where a record of the pages that the guest touches goes.
    pub recording: Option<Recording>,
    /// How many vCPUs it has.
    pub cpus: u32,
    /// Whether KVM offers async page faults to it.
    pub async_pf: AsyncPageFaults,
    /// Where its threads run.
    pub placement: Placement,
    /// Whether the pages that change are tracked, so that a snapshot that is laid over the one before, or over the image that RAM
    /// is loaded from, looks at no others.
    pub track_dirty: bool,
    /// A balloon; one that is restored has it as it was saved.
    pub balloon: Option<BalloonOptions>,
}

/// Why a VM could not be run, or not to its end.
#[derive(Debug, Error)]
pub enum MachineError {
    /// This host cannot run VMs.
    #[error("this host cannot run VMs")]
    Host(#[from] HostError),
    /// KVM does not make the VM.
    #[error("cannot set up the VM")]
    Vm(#[from] VmError),
    /// KVM does not make a vCPU.
    #[error("cannot set up the vCPUs")]
    Vcpu(#[from] VcpuSetupError),
    /// The snapshot's CPU cannot be had here.
    #[error("the snapshot cannot be restored on this host")]
    Cpu(#[from] CpuMismatch),
    /// KVM does not say what the state of a vCPU is.
    #[error("the snapshot cannot be restored on this host")]
    StateList(#[from] MsrError),
    /// A vCPU does not take the state that was saved.
    #[error("the snapshot cannot be restored on this host")]
    VcpuState(#[from] VcpuStateError),
    /// The VM does not take the state that was saved.
    #[error("the snapshot cannot be restored on this host")]
    Chipset(#[from] ChipsetStateError),
    /// KVM has no CPU model to offer.
    #[error("cannot set up the vCPUs")]
    CpuModel(#[from] CpuModelError),
    /// More vCPUs than KVM makes, or than APIC IDs of 8 bits can tell apart.
    #[error("--cpus boot={asked} is more than a VM can have here, which is {most}")]
    TooManyCpus {
        /// How many were asked for.
        asked: u32,
        /// How many there may be.
        most: usize,
    },
    /// RAM ends where no physical address reaches.
    #[error(
        "RAM of {size} bytes does not fit into the {bits} bits of a physical address on this host: choose a smaller --memory size"
    )]
    RamTooLarge {
        /// Bytes of RAM.
        size: u64,
        /// Bits of a physical address.
        bits: u32,
    },
    /// RAM is more than KVM takes in one piece.
    #[error(
        "RAM of {size} bytes is more than KVM maps in one slot ({most} bytes): choose a smaller --memory size"
    )]
    RamBeyondSlot {
        /// Bytes of RAM.
        size: u64,
        /// The most that a slot takes.
        most: u64,
    },
    /// Its threads cannot run where they should.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// No memory for RAM.
    #[error("cannot make guest memory")]
    Region(#[from] RegionError),
    /// RAM cannot be served.
    #[error("cannot serve guest memory")]
    Pager(#[from] StartError),
    /// No VM came.
    #[error(transparent)]
    Arrival(#[from] ArrivalError),
    /// No ROM.
    #[error("cannot load the firmware")]
    Rom(#[from] RomError),
    /// No console.
    #[error("cannot set up the console")]
    Console(#[from] ConsoleError),
    /// No event loop.
    #[error("cannot set up the event loop")]
    EventLoop(#[from] EventLoopError),
    /// What the kernel does to RAM cannot be told.
    #[error(transparent)]
    Invalidations(#[from] InvalidationsError),
    /// The working set cannot be recorded.
    #[error(transparent)]
    WorkingSet(#[from] WorkingSetFileError),
    /// No event descriptor or no thread.
    #[error("cannot set up the VM")]
    Os(#[source] std::io::Error),
}

/// How a run ended.
#[derive(Debug)]
pub enum Outcome {
    /// By the guest, or by a request from outside.
    Ended(Ending),
    /// Because a page could not be had.
    PagerFailed(Arc<PagerError>),
}

/// What a VM is made of once its vCPUs have threads, for those who ask something of it while it runs.
pub(crate) struct Parts {
    pub(crate) vcpus: Arc<Vcpus>,
    ram: RamMap,
    region: Arc<Region>,
    source_url: String,
    model: CpuModel,
    cpus: u32,
    tsc_khz: Option<u32>,
    bus: Arc<DeviceBus>,
    /// `None` at the end.
    pager: Mutex<Option<ServingPager>>,
    vm: Arc<Vm>,
    /// After the VM, which may look at it.
    memory: GuestMemory,
    tracking: Mutex<Tracking>,
    state_list: OnceLock<StateList>,
    /// While the machine comes from another host, and after.
    arrival: Option<Arrival>,
}

impl Parts {
    pub(crate) fn ram_size(&self) -> u64 {
        self.ram.size()
    }

    fn pager(&self) -> MutexGuard<'_, Option<ServingPager>> {
        self.pager.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn counters(&self) -> Option<Counters> {
        let pager = self.pager().as_ref()?.stats();
        Some(Counters {
            source_url: self.source_url.clone(),
            pager,
            pages: self.region.pages(),
            resident: self.region.populated().ok(),
            vcpus: self.cpus,
            exits: self.vcpus.exits(),
            first_instruction: self.vcpus.first_instruction(),
            balloon: self.bus.balloon().map(Balloon::status),
        })
    }

    pub(crate) fn states(&self) -> Option<StateCounts> {
        Some(self.pager().as_ref()?.states())
    }

    /// The state of a VM all of whose vCPUs stand still. `patience` is how long they may take to say theirs.
    pub(crate) fn save_state(&self, patience: Duration) -> Result<SnapshotState, SnapshotError> {
        let list = self.state_list()?.clone();
        // What comes from outside meanwhile waits, so that all parts of the state are of one moment.
        self.bus.hold_still(|devices| {
            let vcpus = self
                .vcpus
                .ask(patience, move |vcpu| VcpuState::save(vcpu, &list))?
                .into_iter()
                .collect::<Result<_, _>>()?;
            Ok(SnapshotState::new(Saved {
                ram: self.ram,
                cpu: self.model.clone(),
                vcpus,
                chipset: ChipsetState::save(&self.vm)?,
                devices,
                read_only: self.memory.read_only(),
            }))
        })
    }

    fn tracking(&self) -> MutexGuard<'_, Tracking> {
        self.tracking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has changed ([`Tracking::take`]).
    pub(crate) fn take_changes(&self) -> Result<Option<Changes>, VmError> {
        self.tracking().take(&self.vm, &self.memory)
    }

    /// A snapshot was made of RAM as it was when changes were taken last, or none was.
    pub(crate) fn changes_are(&self, saved: Option<[u8; 32]>, changes: Option<&Changes>) {
        match (saved, changes) {
            (Some(digest), _) => self.tracking().saved(digest),
            (None, Some(changes)) => self.tracking().give_back(changes),
            (None, None) => {}
        }
    }

    /// What another host has to make for this VM, whose state will be of this version.
    pub(crate) fn describe(&self, mode: Mode, connections: usize) -> Description {
        Description {
            version: VERSION,
            mode,
            ram_size: self.ram.size(),
            page_size: PAGE_SIZE,
            cpus: self.cpus,
            connections: connections as u32,
            async_pf: self.model.has_async_page_faults(),
            tsc_khz: self.tsc_khz,
            cpu: self.model.clone(),
            read_only: self.memory.read_only().iter().map(SavedPages::save).collect(),
        }
    }

    /// What tells which pages change; to be [returned](Self::return_tracker).
    pub(crate) fn lend_tracker(&self) -> Result<DirtyTracker, VmError> {
        self.tracking().lend(&self.vm, &self.memory)
    }

    /// What has changed, by a tracker that was lent.
    pub(crate) fn changes_of(&self, tracker: &mut DirtyTracker) -> Result<PageBitmap, VmError> {
        tracker.take(&self.vm)
    }

    /// The same, which is in the next answer too if it is not [forgotten](Self::forget_changes).
    pub(crate) fn look_at_changes(&self, tracker: &mut DirtyTracker) -> Result<PageBitmap, VmError> {
        tracker.look(&self.vm)
    }

    /// Forgets that `pages`, which are about to be read, have changed.
    pub(crate) fn forget_changes(&self, pages: PageRange) -> Result<(), VmError> {
        dirty::forget(&self.vm, &self.memory, pages)
    }

    pub(crate) fn return_tracker(&self, tracker: DirtyTracker) {
        self.tracking().give(tracker, &self.vm);
    }

    /// Loads what nobody touches of RAM that came later than its machine.
    pub(crate) fn fill(&self) {
        if let Some(pager) = &*self.pager() {
            pager.fill();
        }
    }

    /// The list of what KVM saves of a vCPU.
    pub(crate) fn state_list(&self) -> Result<&StateList, SnapshotError> {
        if let Some(list) = self.state_list.get() {
            return Ok(list);
        }
        let list = StateList::new(&Host::open()?)?;
        Ok(self.state_list.get_or_init(|| list))
    }

    /// How many pages of a machine that came from another host are still there.
    pub(crate) fn missing_of_arrival(&self) -> Option<u64> {
        self.arrival.as_ref()?.missing()
    }

    /// Where the pages of RAM are; `None` at the end.
    pub(crate) fn memory(&self) -> Option<Memory> {
        let (states, source) = self.pager().as_ref()?.pages();
        Some(Memory {
            region: Arc::clone(&self.region),
            states,
            source,
        })
    }

    /// Wants the balloon to hold so many bytes.
    pub(crate) fn resize_balloon(&self, bytes: u64) -> Result<(), ResizeError> {
        let balloon = self.bus.balloon().ok_or(ResizeError::NoBalloon)?;
        let ram = self.ram.size();
        if bytes > ram {
            return Err(ResizeError::TooLarge { asked: bytes, ram });
        }
        if !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(ResizeError::Unaligned(bytes));
        }
        balloon.resize(bytes);
        Ok(())
    }

    /// For how long somebody has been waiting for a page.
    pub(crate) fn longest_wait(&self) -> Option<Duration> {
        self.pager().as_ref()?.longest_wait()
    }

    /// The page that has been waited for longest, where this process knows, and where the guest sees it.
    pub(crate) fn missing_page(&self) -> Option<(PageIndex, GuestAddress)> {
        let page = self.pager().as_ref()?.missing_page()?;
        Some((page, self.ram.address_of(page.byte_offset())?))
    }
}

/// Runs a VM until it ends, in the hands of `control`; fills in `report` but for the outcome. `started` is when the program
/// began.
pub fn run(
    config: &MachineConfig,
    control: &Control,
    started: Instant,
    report: &mut Report,
) -> Result<Outcome, MachineError> {
    let result = run_to_the_end(config, control, started, report);
    if let (Err(error), Start::Arrive(arrival, _)) = (&result, &config.start) {
        // Whoever sends it hears why it cannot be taken, and not only that nobody is there any more.
        arrival.give_up(&chain(error));
    }
    control.stopped();
    result
}

fn run_to_the_end(
    config: &MachineConfig,
    control: &Control,
    started: Instant,
    report: &mut Report,
) -> Result<Outcome, MachineError> {
    // Before any thread is started: it blocks signals.
    let mut event_loop = EventLoop::new()?;
    control.set_stopper(event_loop.stopper());
    let mut clock = SetupClock::new(started);

    let host = Host::open()?;
    let vm = Vm::new(&host)?;
    check_limits(config, &host, &vm)?;
    let places = Places::choose(config.placement, config.cpus)?;
    clock.lap("vm");

    let region = Arc::new(Region::new(config.ram.size(), config.backing, config.page_size)?);
    clock.lap("memory");

    let memory = GuestMemory::new(Arc::clone(&region), config.ram, read_only_pages(config)?);
    // SAFETY: nothing that the guest could see goes away while a vCPU may run: at the end of this function all vCPUs are closed,
    // or the memory is never given back. (The pager goes before the VM does, whose end may wait for pages.)
    unsafe { memory.map_into(&vm) }?;
    watch_ram(control, &region, config.ram)?;
    let tracking = Tracking::start(config.track_dirty, config.source.exact_digest(), &vm, &memory)?;
    clock.lap("slots");

    let vm = Arc::new(vm);
    let (model, all) = make_vcpus(config, &host, &vm)?;
    clock.lap("vcpus");
    let failure = Arc::new(OnceLock::new());
    let pager = start_pager(config, &region, &failure, &places, event_loop.stopper(), control)?;
    clock.lap("pager");
    let Some(saved) = begin_state(config, &mut event_loop)? else {
        return Ok(Outcome::Ended(Ending::Stopped));
    };
    clock.lap("state");
    let pager = pager.begin()?;
    let recording = start_recording(config, &region)?;

    let (console, bus) = make_devices(config, saved.as_deref(), &vm, (&memory, &region), control)?;
    event_loop.add(Box::new(console));
    clock.lap("devices");

    let restore = Restore::of(saved.as_ref(), &host, &vm, &bus)?;
    log_start(config);
    let on_first_instruction = on_first_instruction(control);
    let stopper = event_loop.stopper();
    let tsc_khz = all[0].tsc_khz();
    let (begin, arrival) = match &config.start {
        Start::Arrive(arrival, _) => (Begin::Standing, Some(arrival.clone())),
        Start::Boot { .. } | Start::Restore(_) => (Begin::Running, None),
    };
    let vcpus = Vcpus::new(&all, &bus, stopper, restore, begin, places, on_first_instruction);
    let parts = Arc::new(Parts {
        vcpus: Arc::clone(&vcpus),
        ram: config.ram,
        region: Arc::clone(&region),
        source_url: config.source.url(),
        model,
        cpus: config.cpus,
        tsc_khz,
        bus,
        pager: Mutex::new(Some(pager)),
        vm,
        memory,
        tracking: Mutex::new(tracking),
        state_list: OnceLock::new(),
        arrival,
    });
    // Before a vCPU runs: who hears that it does may ask for anything.
    control.attach(&parts);
    let (threads, not_started) = vcpus.start(all);
    take_over(&parts, event_loop.stopper());
    // Only now: it can take long, and nobody waits for it. If not all were started, there is nothing to count.
    let counters = match not_started {
        None => count_async_page_faults(config, &threads),
        Some(_) => vec![None],
    };

    let ending = event_loop.run();
    tracing::info!(?ending, "the VM has ended");
    let restore_error = vcpus.restore_error();
    let not_arrived = end_arrival(parts.arrival.as_ref(), restore_error.as_ref(), failure.get());
    control.stopped();
    vcpus.end();
    let all_stopped = threads.end_within(VCPU_GRACE);
    let mut pager = parts.pager().take();
    if all_stopped && let Some(pager) = &mut pager {
        // So that the report counts every page that was loaded.
        pager.stop();
    }
    control.detach();

    let recorded = recording.map_or(Ok(()), RunningRecording::finish);

    report.setup_ms = clock.laps;
    report_run(config, control, started, &parts, pager.as_ref(), report);
    if failure.get().is_some() && not_arrived.is_none() {
        report.lost_pages = pager.as_ref().map(|pager| lost_pages(&pager.pages().0));
    }
    report.set_async_page_faults(&counters);
    // Gives the terminal back.
    drop(event_loop);

    if !all_stopped {
        // A vCPU waits for a page and still may run. Whatever it could see goes away with the process, and not before: a
        // userfaultfd that is closed under it would give it zero pages.
        std::mem::forget((pager, parts));
    }
    if let Some(error) = not_started {
        return Err(MachineError::Os(error));
    }
    if let (None, Some(error)) = (failure.get(), restore_error) {
        return Err(error);
    }
    if let Some(error) = not_arrived {
        return Err(error.into());
    }
    outcome(ending?, failure.get(), recorded)
}

/// The record of the pages that the guest touches, if there is to be one.
fn start_recording(
    config: &MachineConfig,
    region: &Region,
) -> Result<Option<RunningRecording>, WorkingSetFileError> {
    let recording = config.recording.clone();
    recording
        .map(|recording| recording.start(config.source.digest(), region.pages()))
        .transpose()
}

/// What was counted.
fn report_run(
    config: &MachineConfig,
    control: &Control,
    started: Instant,
    parts: &Parts,
    pager: Option<&ServingPager>,
    report: &mut Report,
) {
    let first_instruction = parts.vcpus.first_instruction();
    report.time_to_first_instruction_ms =
        first_instruction.map(|at| milliseconds(at.duration_since(started)));
    if let Some(pager) = pager {
        let stats = pager.stats();
        report.set_pager(&stats, &parts.region, started);
        report.set_source(config.source.url(), stats.source);
        report.migration = control.migration_report(&stats);
        report.process = own_memory(config, &parts.region, pager.table_size());
    }
}

/// What is told when the first vCPU enters the guest.
fn on_first_instruction(control: &Control) -> impl Fn() + Send + Sync + use<> {
    let control = control.clone();
    move || control.started()
}

fn log_start(config: &MachineConfig) {
    tracing::info!(
        source = config.source.url(),
        bytes = config.ram.size(),
        vcpus = config.cpus,
        "starting with no page of RAM populated"
    );
}

/// The console, and the bus that its serial port is on.
fn make_devices(
    config: &MachineConfig,
    saved: Option<&SnapshotState>,
    vm: &Vm,
    (memory, region): (&GuestMemory, &Arc<Region>),
    control: &Control,
) -> Result<(Console, Arc<DeviceBus>), MachineError> {
    let interrupt = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(MachineError::Os)?;
    vm.irqfd(&interrupt, SERIAL_IRQ)?;
    let devices = saved.map(SnapshotState::devices);
    let console = make_console(config, devices, interrupt)?;
    let balloon = make_balloon(config, devices, vm, memory, region, control)?;
    let bus = match devices {
        None => DeviceBus::new(console.serial(), balloon),
        Some(devices) => DeviceBus::restored(console.serial(), balloon, devices),
    };
    Ok((console, Arc::new(bus)))
}

fn make_console(
    config: &MachineConfig,
    devices: Option<&DeviceState>,
    interrupt: EventFd,
) -> Result<Console, MachineError> {
    let registers = devices.map(|devices| &devices.serial);
    Ok(match &config.serial_line {
        SerialLine::StandardStreams => Console::on_standard_streams(interrupt, registers)?,
        SerialLine::File(file) => {
            let output = file.try_clone().map_err(MachineError::Os)?;
            Console::open(None, output.into(), interrupt, registers)?
        }
    })
}

/// Tells those outside who watch guest-physical addresses where they are.
fn watch_ram(control: &Control, region: &Region, map: RamMap) -> Result<(), InvalidationsError> {
    match control.invalidations() {
        Some(invalidations) => invalidations.watch_ram(region, map),
        None => Ok(()),
    }
}

/// The balloon, if the machine has one.
fn make_balloon(
    config: &MachineConfig,
    saved: Option<&DeviceState>,
    vm: &Vm,
    memory: &GuestMemory,
    region: &Arc<Region>,
    control: &Control,
) -> Result<Option<Balloon>, MachineError> {
    let saved = saved.map(|saved| saved.balloon.as_ref());
    if saved.map_or(config.balloon.is_none(), |balloon| balloon.is_none()) {
        return Ok(None);
    }
    let interrupt = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(MachineError::Os)?;
    vm.irqfd(&interrupt, BALLOON_IRQ)?;
    // Fails only if RAM were of another size than its map.
    let ram = Ram::new(Arc::clone(region), config.ram, memory.own_writes())
        .ok_or_else(|| MachineError::Os(std::io::ErrorKind::InvalidInput.into()))?;
    let remover = Arc::new(Remover::new(ram, control.clone()));
    let balloon = match (saved.flatten(), config.balloon) {
        (Some(state), _) => Balloon::restored(state, remover, interrupt),
        (None, Some(options)) => Balloon::new(options, remover, interrupt),
        (None, None) => return Ok(None),
    };
    balloon.map(Some).map_err(MachineError::Os)
}

/// All vCPUs, and the CPU that they are. All before the first runs: an INIT for one that does not exist yet would be lost.
fn make_vcpus(config: &MachineConfig, host: &Host, vm: &Vm) -> Result<(CpuModel, Vec<Vcpu>), MachineError> {
    let here = CpuModel::new(host, config.cpus, config.async_pf)?;
    match &config.start {
        Start::Boot { entry, firmware } => {
            let vcpus = (0..config.cpus).map(|index| Vcpu::new(vm, index, &here));
            let mut vcpus = vcpus.collect::<Result<Vec<_>, _>>()?;
            if *firmware == Firmware::None {
                vcpus[0].enter_directly(entry)?;
            }
            Ok((here, vcpus))
        }
        Start::Restore(saved) => {
            saved.check_cpu(&here)?;
            let states = (0..).zip(saved.vcpus());
            let vcpus = states.map(|(index, state)| Vcpu::for_state(vm, index, saved.cpu(), state.tsc_khz()));
            Ok((saved.cpu().clone(), vcpus.collect::<Result<_, _>>()?))
        }
        Start::Arrive(_, machine) => {
            machine.cpu.check_on(&here)?;
            let vcpus =
                (0..config.cpus).map(|index| Vcpu::for_state(vm, index, &machine.cpu, machine.tsc_khz));
            Ok((machine.cpu.clone(), vcpus.collect::<Result<_, _>>()?))
        }
    }
}

/// How a run ended, all in all.
fn outcome(
    ending: Ending,
    failure: Option<&Arc<PagerError>>,
    recorded: Result<(), WorkingSetFileError>,
) -> Result<Outcome, MachineError> {
    let outcome = match (ending, failure) {
        // Whatever else ended the VM came before the failure.
        (Ending::Stopped, Some(error)) => Outcome::PagerFailed(Arc::clone(error)),
        (ending, _) => Outcome::Ended(ending),
    };
    match (recorded, outcome) {
        (Err(error), Outcome::Ended(_)) => Err(error.into()),
        (recorded, outcome) => {
            if let Err(error) = recorded {
                tracing::error!(error = &error as &dyn std::error::Error);
            }
            Ok(outcome)
        }
    }
}

/// A counter for each vCPU, if async page faults were asked for by name: a thread that is counted is slower at every switch, which
/// is a twentieth of the time that a vCPU waits for a page of a hot file.
fn count_async_page_faults(config: &MachineConfig, threads: &Threads) -> Vec<Option<AsyncPageFaultCounter>> {
    if config.async_pf != AsyncPageFaults::Required {
        return vec![None];
    }
    let threads = threads.ids().take(config.cpus as usize);
    threads.map(AsyncPageFaultCounter::start).collect()
}

fn start_pager(
    config: &MachineConfig,
    region: &Arc<Region>,
    failure: &Arc<OnceLock<Arc<PagerError>>>,
    places: &Places,
    stopper: Stopper,
    control: &Control,
) -> Result<ServingRam, MachineError> {
    let failure = Arc::clone(failure);
    let control = control.clone();
    let arrival = match &config.source {
        RamSource::Arriving(arrival) => Some(arrival.clone()),
        RamSource::Source(_) | RamSource::Pager(_) => None,
    };
    let observer = move |notice| match notice {
        Notice::AllPagesPresent => {
            tracing::info!("all pages are present");
            control.tell(&Event::AllPagesPresent);
            if let Some(arrival) = &arrival {
                arrival.has_all();
            }
        }
        Notice::SourceLost(why) => control.tell(&Event::SourceLost(why)),
        Notice::SourceBack => control.tell(&Event::SourceBack),
        Notice::Failed(error) => {
            control.tell(&Event::PagerFailed(Arc::clone(&error)));
            // Told once, and before the end that it makes.
            let _ = failure.set(error);
            stopper.end(Ending::Stopped);
        }
    };
    let options = PagerOptions {
        demand_cpus: places.demand,
        ..config.pager.clone()
    };
    config
        .source
        .serve(Arc::clone(region), options, observer)
        .map_err(|error| match error {
            ServeError::Start(error) => error.into(),
            ServeError::Arrival(error) => error.into(),
        })
}

/// The ROM, if the VM starts in one, and what tells it where to go and the kernel what machine it is on; or what there was of them
/// when it was saved.
fn read_only_pages(config: &MachineConfig) -> Result<Vec<ReadOnlyPages>, RomError> {
    let (entry, firmware) = match &config.start {
        Start::Boot { entry, firmware } => (entry, firmware),
        Start::Restore(saved) => return saved.read_only_pages(),
        Start::Arrive(_, machine) => return machine.read_only_pages(),
    };
    let description = ReadOnlyPages::description(entry, config.cpus, config.balloon.is_some())?;
    Ok(match firmware {
        Firmware::BuiltIn => vec![ReadOnlyPages::builtin_rom()?, description],
        Firmware::File(path) => vec![ReadOnlyPages::rom_from_file(path)?, description],
        Firmware::None => vec![description],
    })
}

fn check_limits(config: &MachineConfig, host: &Host, vm: &Vm) -> Result<(), MachineError> {
    if config.cpus as usize > vm.max_vcpus() {
        return Err(MachineError::TooManyCpus {
            asked: config.cpus,
            most: vm.max_vcpus(),
        });
    }
    let (size, bits) = (config.ram.size(), host.physical_address_bits());
    let end = config
        .ram
        .ranges()
        .map(|range| range.guest.0 + range.size)
        .max()
        .unwrap_or(0);
    if bits < u64::BITS && end > 1 << bits {
        return Err(MachineError::RamTooLarge { size, bits });
    }
    if config.ram.ranges().any(|range| range.size > SLOT_SIZE_MAX) {
        return Err(MachineError::RamBeyondSlot {
            size,
            most: SLOT_SIZE_MAX,
        });
    }
    Ok(())
}

/// Pages that are not there, in runs.
fn lost_pages(states: &PageStates) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for page in states.all().pages().filter(|page| !states.is_settled(*page)) {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == page.0 => *count += 1,
            _ => runs.push((page.0, 1)),
        }
    }
    runs
}

/// Resident memory of this process that is not the guest's.
fn own_memory(config: &MachineConfig, region: &Region, page_state_table: u64) -> Option<Process> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    // Not shared memory: that is the guest's memfd and nothing else. Huge pages from the reserve are in no count.
    let own = kib_in(&status, "RssAnon:") + kib_in(&status, "RssFile:");
    let guest = match config.backing {
        Backing::Anonymous => {
            let maps = std::fs::read_to_string("/proc/self/smaps").ok()?;
            let start = format!("{:x}-", region.all_addresses().start.0);
            kib_in(&maps[maps.find(&start)?..], "Anonymous:")
        }
        Backing::Memfd => 0,
    };
    Some(Process {
        own_memory_kib: own.saturating_sub(guest),
        page_state_table_kib: page_state_table.div_ceil(1024),
    })
}

/// The first number of KiB behind `key` in a file of /proc.
fn kib_in(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok())
        .unwrap_or(0)
}

/// Where the time before the first instruction goes.
struct SetupClock {
    last: Instant,
    laps: BTreeMap<&'static str, f64>,
}

impl SetupClock {
    fn new(started: Instant) -> Self {
        let mut clock = Self {
            last: started,
            laps: BTreeMap::new(),
        };
        clock.lap("configuration");
        clock
    }

    fn lap(&mut self, name: &'static str) {
        let now = Instant::now();
        self.laps.insert(name, milliseconds(now - self.last));
        self.last = now;
    }
}
