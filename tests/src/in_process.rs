//! VMs that run in the process of the test, which has them in its hands.

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use umem::image::Image;
use umem::pager::{Fill, PagerOptions};
use umem::region::{Backing, PageSize};
use umem::source::PageSource;
use umem::source::file::{Checksums, FileSource};
use vmm::address_map::RamMap;
use vmm::boot::ImageMetadata;
use vmm::control::{Control, Event, VmState};
use vmm::kvm::AsyncPageFaults;
use vmm::machine::{self, Firmware, MachineConfig, Outcome, SerialLine, Start};
use vmm::ram_source::RamSource;
use vmm::report::Report;
use vmm::snapshot::{
    SnapshotError, SnapshotOptions, SnapshotProgress, SnapshotState, SnapshotSummary, is_snapshot,
};
use vmm::thread_placement::Placement;

/// The most that something takes which a VM in this process does by itself.
const PATIENCE: Duration = Duration::from_mins(1);

/// A VM with one vCPU and a console that nobody reads, over pages of `source`.
pub fn config(ram: RamMap, start: Start, source: Arc<dyn PageSource>) -> MachineConfig {
    MachineConfig {
        source: RamSource::Source(source),
        ram,
        start,
        serial_line: SerialLine::File(Arc::new(tempfile::tempfile().unwrap())),
        backing: Backing::Memfd,
        page_size: PageSize::Small,
        pager: PagerOptions::from(Fill::Off),
        recording: None,
        cpus: 1,
        async_pf: AsyncPageFaults::IfThere,
        placement: Placement::Free,
        track_dirty: false,
        balloon: None,
    }
}

/// A VM that boots an image, or is restored from a snapshot with as many vCPUs as that has.
pub fn from_file(image: &Path) -> MachineConfig {
    let image = Image::open(image).unwrap();
    let ram_size = image.footer().ram_size;
    let (start, cpus) = if is_snapshot(image.metadata()) {
        let state = SnapshotState::decode(image.metadata(), ram_size).unwrap();
        let cpus = state.cpus();
        (Start::Restore(Arc::new(state)), cpus)
    } else {
        let entry = ImageMetadata::decode(image.metadata()).unwrap().entry.into();
        let firmware = Firmware::BuiltIn;
        (Start::Boot { entry, firmware }, 1)
    };
    let source = Arc::new(FileSource::new(image, Checksums::On));
    MachineConfig {
        cpus,
        ..config(RamMap::new(ram_size).unwrap(), start, source)
    }
}

/// A VM in this process. It is ended if it is dropped.
#[derive(Debug)]
pub struct Machine {
    /// What is asked of it.
    pub control: Control,
    thread: Option<thread::JoinHandle<Outcome>>,
    events: mpsc::Receiver<Event>,
}

impl Machine {
    /// Runs it in a thread of its own.
    pub fn start(config: MachineConfig) -> Self {
        Self::start_under(Control::new(), config)
    }

    /// The same, where somebody has its control already.
    pub fn start_under(control: Control, config: MachineConfig) -> Self {
        let (tell, events) = mpsc::channel();
        control.observe(move |event| drop(tell.send(event.clone())));
        let thread = {
            let control = control.clone();
            thread::spawn(move || {
                machine::run(&config, &control, Instant::now(), &mut Report::default()).unwrap()
            })
        };
        Self {
            control,
            thread: Some(thread),
            events,
        }
    }

    /// Starts it, and waits until its first instruction.
    pub fn running(config: MachineConfig) -> Self {
        let machine = Self::start(config);
        machine.wait_until_it_runs();
        machine
    }

    /// Waits until its first instruction.
    pub fn wait_until_it_runs(&self) {
        while !matches!(
            self.events.recv_timeout(PATIENCE).unwrap(),
            Event::State(VmState::Running)
        ) {}
    }

    /// How often its vCPUs have left the guest.
    pub fn exits(&self) -> u64 {
        let counters = self.control.counters().unwrap();
        counters.exits.iter().map(|(_, count)| count).sum()
    }

    /// Waits until they have left it this often more, as they do when the guest says something.
    pub fn wait_for_exits(&self, more: u64) {
        let (before, deadline) = (self.exits(), Instant::now() + PATIENCE);
        while self.exits() < before + more {
            assert!(Instant::now() < deadline, "the guest does nothing");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Makes a snapshot, and checks what is told of its progress.
    pub fn snapshot(&self, directory: &Path) -> Result<SnapshotSummary, SnapshotError> {
        self.make_snapshot(&SnapshotOptions::new(directory))
    }

    /// The same of a snapshot that is laid over `base`.
    pub fn snapshot_over(&self, directory: &Path, base: &Path) -> Result<SnapshotSummary, SnapshotError> {
        self.make_snapshot(&SnapshotOptions {
            base: Some(base.to_path_buf()),
            ..SnapshotOptions::new(directory)
        })
    }

    /// The same of any snapshot.
    pub fn make_snapshot(&self, options: &SnapshotOptions) -> Result<SnapshotSummary, SnapshotError> {
        let mut last = 0;
        let summary = self
            .control
            .snapshot(options, &mut |progress: SnapshotProgress| {
                assert!(progress.done >= last && progress.done <= progress.total);
                last = progress.done;
            })?;
        assert_eq!(last, summary.pages, "not all pages were told of");
        Ok(summary)
    }

    /// Waits for its end.
    pub fn end(mut self) -> Outcome {
        self.thread.take().unwrap().join().unwrap()
    }

    /// Ends it.
    pub fn stop(self) {
        self.control.shutdown().unwrap();
        self.end();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.control.shutdown();
    }
}
