//! The parts put together: a VM whose RAM is a region filled from a page source, run until it ends.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use firmware::boot_info::BootInfo;
use rustix::process::Pid;
use thiserror::Error;
use umem::pager::{Notice, PagerError, PagerOptions, StartError};
use umem::region::{Backing, PageSize, Region, RegionError};
use vmm_sys_util::eventfd::EventFd;

use crate::address_map::{PAGE_SIZE, RamMap};
use crate::boot::{ReadOnlyPages, RomError};
use crate::devices::{Console, ConsoleError, DeviceBus, EventLoop, EventLoopError, SERIAL_IRQ, Stopper};
use crate::ending::Ending;
use crate::kvm::{
    AsyncPageFaultCounter, AsyncPageFaults, CpuModel, CpuModelError, Exit, Host, HostError, Vcpu, VcpuKick,
    VcpuSetupError, Vm, VmError,
};
use crate::memory::GuestMemory;
use crate::ram_source::{RamSource, ServingPager};
use crate::report::{Process, Report, milliseconds};
use crate::working_set::{Recording, RunningRecording, WorkingSetFileError};

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

/// A VM to be run.
#[derive(Clone)]
pub struct MachineConfig {
    /// Where its RAM comes from.
    pub source: RamSource,
    /// Where its RAM is.
    pub ram: RamMap,
    /// How its kernel is entered.
    pub entry: BootInfo,
    /// What is behind its RAM.
    pub backing: Backing,
    /// In which pages its RAM is installed.
    pub page_size: PageSize,
    /// How its RAM is served.
    pub pager: PagerOptions,
    /// Where a record of the pages that the guest touches goes.
    pub recording: Option<Recording>,
    /// How it starts.
    pub firmware: Firmware,
    /// How many vCPUs it has.
    pub cpus: u32,
    /// Whether KVM offers async page faults to it.
    pub async_pf: AsyncPageFaults,
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
    /// No memory for RAM.
    #[error("cannot make guest memory")]
    Region(#[from] RegionError),
    /// RAM cannot be served.
    #[error("cannot serve guest memory")]
    Pager(#[from] StartError),
    /// No ROM.
    #[error("cannot load the firmware")]
    Rom(#[from] RomError),
    /// No console.
    #[error("cannot set up the console")]
    Console(#[from] ConsoleError),
    /// No event loop.
    #[error("cannot set up the event loop")]
    EventLoop(#[from] EventLoopError),
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

/// What vCPU threads and the thread that waits for them share.
struct Running {
    stop: AtomicBool,
    first_instruction: OnceLock<Instant>,
    /// The threads that run vCPUs are told here.
    threads: mpsc::Sender<Pid>,
    stopper: Stopper,
}

/// Runs a VM until it ends; fills in `report` but for the outcome. `started` is when the program began.
pub fn run(config: &MachineConfig, started: Instant, report: &mut Report) -> Result<Outcome, MachineError> {
    // Before any thread is started: it blocks signals.
    let mut event_loop = EventLoop::new()?;
    let mut clock = SetupClock::new(started);

    let host = Host::open()?;
    let vm = Vm::new(&host)?;
    check_limits(config, &host, &vm)?;
    clock.lap("vm");

    let region = Arc::new(Region::new(config.ram.size(), config.backing, config.page_size)?);
    let failure = Arc::new(OnceLock::new());
    let mut pager = start_pager(config, &region, &failure, event_loop.stopper())?;
    let pages = region.pages();
    let recording = config
        .recording
        .clone()
        .map(|recording| recording.start(config.source.digest(), pages));
    let recording = recording.transpose()?;
    clock.lap("memory");

    let memory = GuestMemory::new(Arc::clone(&region), config.ram, read_only_pages(config)?);
    // SAFETY: nothing that the guest could see goes away while a vCPU may run: at the end of this function all vCPUs are closed,
    // or the memory is never given back. (The pager goes before the VM does, whose end may wait for pages.)
    unsafe { memory.map_into(&vm) }?;
    clock.lap("slots");

    let interrupt = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(MachineError::Os)?;
    vm.irqfd(&interrupt, SERIAL_IRQ)?;
    let console = Console::on_standard_streams(interrupt)?;
    let bus = Arc::new(DeviceBus::new(console.serial()));
    event_loop.add(Box::new(console));
    clock.lap("devices");

    let model = CpuModel::new(&host, config.cpus, config.async_pf)?;
    // All before the first runs: an INIT for one that does not exist yet would be lost.
    let mut vcpus = (0..config.cpus)
        .map(|index| Vcpu::new(&vm, index, &model))
        .collect::<Result<Vec<_>, _>>()?;
    if config.firmware == Firmware::None {
        vcpus[0].enter_directly(&config.entry)?;
    }
    let (threads, vcpu_threads) = mpsc::channel();
    let running = Arc::new(Running {
        stop: AtomicBool::new(false),
        first_instruction: OnceLock::new(),
        threads,
        stopper: event_loop.stopper(),
    });
    let kicks: Vec<VcpuKick> = vcpus.iter().map(Vcpu::kick_handle).collect();
    clock.lap("vcpus");
    tracing::info!(
        source = config.source.url(),
        bytes = config.ram.size(),
        vcpus = config.cpus,
        "starting with no page of RAM populated"
    );
    let (all_ended, not_started) = start_vcpus(vcpus, &bus, &running);
    // Only now: it can take long, and nobody waits for it. If not all were started, there is nothing to count.
    let counters = match not_started {
        None => count_async_page_faults(config, &vcpu_threads),
        Some(_) => vec![None],
    };

    let ending = event_loop.run();
    tracing::info!(?ending, "the VM has ended");
    running.stop.store(true, SeqCst);
    kicks.iter().for_each(VcpuKick::kick);
    drop(kicks);
    let all_stopped = all_ended.recv_timeout(VCPU_GRACE) == Err(RecvTimeoutError::Disconnected);
    if all_stopped {
        // So that the report counts every page that was loaded.
        pager.stop();
    }

    let recorded = recording.map_or(Ok(()), RunningRecording::finish);

    report.time_to_first_instruction_ms = running
        .first_instruction
        .get()
        .map(|at| milliseconds(at.duration_since(started)));
    report.setup_ms = clock.laps;
    report.set_pager(&pager.stats(), &region, started);
    report.set_source(config.source.url(), pager.stats().source);
    report.set_async_page_faults(&counters);
    report.process = own_memory(config, &region, pager.table_size());
    // Gives the terminal back.
    drop(event_loop);

    if !all_stopped {
        // A vCPU waits for a page and still may run. Whatever it could see goes away with the process, and not before: a
        // userfaultfd that is closed under it would give it zero pages.
        std::mem::forget((pager, memory, vm));
    }
    if let Some(error) = not_started {
        return Err(MachineError::Os(error));
    }
    let outcome = match (ending?, failure.get()) {
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
fn count_async_page_faults(
    config: &MachineConfig,
    threads: &mpsc::Receiver<Pid>,
) -> Vec<Option<AsyncPageFaultCounter>> {
    if config.async_pf != AsyncPageFaults::Required {
        return vec![None];
    }
    let threads = threads.iter().take(config.cpus as usize);
    threads.map(AsyncPageFaultCounter::start).collect()
}

fn start_pager(
    config: &MachineConfig,
    region: &Arc<Region>,
    failure: &Arc<OnceLock<Arc<PagerError>>>,
    stopper: Stopper,
) -> Result<ServingPager, StartError> {
    let failure = Arc::clone(failure);
    let observer = move |notice| match notice {
        Notice::AllPagesPresent => tracing::info!("all pages are present"),
        Notice::SourceLost(_) | Notice::SourceBack => {}
        Notice::Failed(error) => {
            // Told once, and before the end that it makes.
            let _ = failure.set(error);
            stopper.end(Ending::Stopped);
        }
    };
    config
        .source
        .serve(Arc::clone(region), config.pager.clone(), observer)
}

/// The ROM, if the VM starts in one, and what tells it where to go and the kernel what machine it is on.
fn read_only_pages(config: &MachineConfig) -> Result<Vec<ReadOnlyPages>, RomError> {
    let description = ReadOnlyPages::description(&config.entry, config.cpus)?;
    Ok(match &config.firmware {
        Firmware::BuiltIn => vec![ReadOnlyPages::builtin_rom()?, description],
        Firmware::File(path) => vec![ReadOnlyPages::rom_from_file(path)?, description],
        Firmware::None => vec![description],
    })
}

/// Starts a thread for each vCPU. The receiver is disconnected when the last one has ended and its vCPU is closed; if not all
/// could be started, the VM is told to stop.
fn start_vcpus(
    vcpus: Vec<Vcpu>,
    bus: &Arc<DeviceBus>,
    running: &Arc<Running>,
) -> (mpsc::Receiver<()>, Option<std::io::Error>) {
    let (alive, all_ended) = mpsc::channel();
    for mut vcpu in vcpus {
        let (running, bus, alive) = (Arc::clone(running), Arc::clone(bus), alive.clone());
        let stopper = running.stopper.clone();
        let thread = thread::Builder::new()
            .name(format!("vcpu-{}", vcpu.index()))
            .spawn(move || {
                run_vcpu(&mut vcpu, &bus, &running);
                drop(vcpu);
                drop(alive);
            });
        if let Err(error) = thread {
            stopper.end(Ending::Stopped);
            return (all_ended, Some(error));
        }
    }
    (all_ended, None)
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

/// Runs a vCPU until the VM ends.
fn run_vcpu(vcpu: &mut Vcpu, bus: &DeviceBus, running: &Running) {
    // Before anything can fail: it is waited for.
    let _ = running.threads.send(rustix::thread::gettid());
    let kick = vcpu.kick_handle();
    let _attached = match kick.attach() {
        Ok(attached) => attached,
        Err(error) => {
            tracing::error!(%error, "a vCPU cannot be interrupted");
            return running.stopper.end(Ending::Stopped);
        }
    };
    if vcpu.index() == 0 {
        let _ = running.first_instruction.set(Instant::now());
    }
    while !running.stop.load(SeqCst) {
        if let Exit::Ended(ending) = vcpu.run(bus) {
            return running.stopper.end(ending);
        }
    }
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
