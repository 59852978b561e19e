//! Snapshots of VMs that run in this process, restored by the built program.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use rustix::thread::UnshareFlags;
use tests::need;
use tests::program::Program;
use tests::random::{Random, rounds};
use tests::scratch::Scratch;
use tests::served::socket;
use tests::server::Server;
use umem::image::{Image, ImageWriter};
use umem::pager::{Fill, PagerOptions};
use umem::publish::Existing;
use umem::region::{Backing, PageSize};
use umem::source::PageSource;
use umem::source::delayed::{Delay, DelayedSource};
use umem::source::file::{Checksums, FileSource};
use umem::source::remote::{RemoteOptions, RemoteSource};
use umem::units::{PAGE_SIZE, PageIndex};
use vmm::address_map::RamMap;
use vmm::boot::ImageMetadata;
use vmm::control::{Control, Event, VmState};
use vmm::ending::Ending;
use vmm::kvm::AsyncPageFaults;
use vmm::machine::{self, Firmware, MachineConfig, Outcome, SerialLine, Start};
use vmm::ram_source::RamSource;
use vmm::report::Report;
use vmm::snapshot::{FILE_NAME, SnapshotError, SnapshotOptions, Then};
use vmm::thread_placement::Placement;

const PATIENCE: Duration = Duration::from_mins(1);

/// An image every page of which holds something, whose guest is told `command_line`.
fn make_image(scratch: &Scratch, memory: &str, command_line: &str) -> PathBuf {
    let options = ["--fill", "pattern:7", "--cmdline", command_line];
    scratch.create("image", memory).args(options).run().assert_code(0);
    scratch.path("image")
}

/// A VM in this process.
struct Vm {
    control: Control,
    thread: Option<thread::JoinHandle<Outcome>>,
    events: mpsc::Receiver<Event>,
}

impl Vm {
    fn start(image: &Path, source: Arc<dyn PageSource>, cpus: u32, backing: Backing) -> Self {
        let image = Image::open(image).unwrap();
        let metadata = ImageMetadata::decode(image.metadata()).unwrap();
        let config = MachineConfig {
            source: RamSource::Source(source),
            ram: RamMap::new(image.footer().ram_size).unwrap(),
            start: Start::Boot {
                entry: metadata.entry.into(),
                firmware: Firmware::BuiltIn,
            },
            serial_line: SerialLine::File(Arc::new(tempfile::tempfile().unwrap())),
            backing,
            page_size: PageSize::Small,
            pager: PagerOptions::from(Fill::Off),
            recording: None,
            cpus,
            async_pf: AsyncPageFaults::IfThere,
            placement: Placement::Free,
            track_dirty: false,
            balloon: None,
        };
        let control = Control::new();
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

    fn from_file(image: &Path, cpus: u32, backing: Backing) -> Self {
        let source = FileSource::new(Image::open(image).unwrap(), Checksums::On);
        Self::start(image, Arc::new(source), cpus, backing)
    }

    /// Waits until its first instruction.
    fn wait_until_it_runs(&self) {
        while !matches!(
            self.events.recv_timeout(PATIENCE).unwrap(),
            Event::State(VmState::Running)
        ) {}
    }

    /// Waits until it has left the guest this often more.
    fn wait_for_exits(&self, more: u64) {
        let exits = || -> u64 {
            let counters = self.control.counters().unwrap();
            counters.exits.iter().map(|(_, count)| count).sum()
        };
        let (before, deadline) = (exits(), Instant::now() + PATIENCE);
        while exits() < before + more {
            assert!(Instant::now() < deadline, "the guest does nothing");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn snapshot(&self, directory: &Path) -> Result<vmm::snapshot::SnapshotSummary, SnapshotError> {
        let mut last = 0;
        let options = SnapshotOptions::new(directory);
        let summary = self.control.snapshot(&options, &mut |progress| {
            assert!(progress.done >= last && progress.done <= progress.total);
            last = progress.done;
        })?;
        assert_eq!(last, summary.pages, "not all pages were told of");
        Ok(summary)
    }

    fn stop(mut self) {
        self.control.shutdown().unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.control.shutdown();
    }
}

/// `umem run --snapshot`.
fn restore(location: impl AsRef<OsStr>, options: &[&str]) -> Program {
    Program::umem(["run", "--snapshot"]).arg(location).args(options)
}

/// The numbers of the whole lines that say which round it is.
fn rounds_in(stdout: &str) -> Vec<u64> {
    // What the line was that the guest was in the middle of, nobody knows.
    let lines = stdout
        .lines()
        .filter(|line| line.ends_with(|last: char| last.is_ascii_digit()));
    let numbers = lines.filter_map(|line| line.strip_prefix("round=")?.split(' ').next()?.parse().ok());
    numbers.collect()
}

/// Checks that the guest in a snapshot goes on and finds what it wrote.
#[track_caller]
fn assert_goes_on(location: impl AsRef<OsStr>, options: &[&str]) {
    let vm = restore(location, options).start();
    vm.wait_until("several rounds", |vm| rounds_in(&vm.stdout()).len() > 3);
    vm.signal(Signal::TERM);
    let vm = vm.finish();
    vm.assert_code(0);
    assert_eq!(vm.stderr, "", "{vm}");
    assert!(!vm.stdout.contains("wrong"), "{vm}");
    let rounds = rounds_in(&vm.stdout);
    // The first is a half line's, and the last is maybe not whole.
    let whole = &rounds[1..rounds.len() - 1];
    assert!(whole.windows(2).all(|two| two[0] + 1 == two[1]), "{vm}");
}

const DIRTY: &str = "workload=dirty pages=512 order=random seed=5 rounds=forever";

#[test]
fn a_guest_goes_on_where_it_was() {
    need!(tests::host::kvm());
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let image = make_image(&scratch, "24M", DIRTY);
    for turn in 0..rounds(8) {
        let cpus = 1 + (turn % 2) as u32;
        let backing = [Backing::Memfd, Backing::Anonymous][(turn / 2 % 2) as usize];
        let restored = ["backing=memfd", "backing=anonymous,fill=sequential"][random.below(2) as usize];
        let vm = Vm::from_file(&image, cpus, backing);
        vm.wait_until_it_runs();
        // Early ones are in the firmware and in the boot of the second CPU.
        let moment = random.moment(Duration::from_millis(400));
        thread::sleep(moment);
        let directory = scratch.path("snapshot");
        let summary = vm.snapshot(&directory).unwrap();
        println!("turn {turn}: {cpus} vCPUs, {backing:?}, {restored}, after {moment:?}: {summary:?}");
        assert!(summary.absent_pages > 0, "all pages were loaded");
        vm.wait_for_exits(5);
        vm.stop();
        if turn % 4 < 2 {
            assert_goes_on(&directory, &["--memory", restored]);
        } else {
            let server = Server::start(&socket(&scratch), &[("vm", &directory.join(FILE_NAME))]);
            assert_goes_on(format!("{}#vm", server.url()), &["--memory", restored]);
            server.stop();
        }
    }
}

/// The snapshot of a guest that was itself restored, and was not loaded yet, is whole again.
#[test]
fn a_snapshot_of_a_restored_guest_is_restored() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = make_image(&scratch, "16M", "workload=dirty pages=200 rounds=forever");
    let vm = Vm::from_file(&image, 2, Backing::Memfd);
    vm.wait_until_it_runs();
    vm.wait_for_exits(2000);
    let directory = scratch.path("a");
    vm.snapshot(&directory).unwrap();
    // Replaced while the VM that it was made from goes on.
    vm.wait_for_exits(50);
    vm.snapshot(&directory).unwrap();
    vm.stop();
    assert_goes_on(&directory, &[]);
    let names: Vec<_> = std::fs::read_dir(&directory).unwrap().collect();
    assert_eq!(names.len(), 1, "{names:?}");
    let verified = Image::open(&directory.join(FILE_NAME))
        .unwrap()
        .verify(|_| {})
        .unwrap();
    assert!(verified.is_sound());
}

/// Tasks that wait for pages are told of them in their new home: a lost wake-up would end the guest with an error.
#[test]
fn tasks_that_wait_for_pages_go_on() {
    need!(tests::host::kvm());
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let image = make_image(
        &scratch,
        "24M",
        "workload=tasks tasks=32 faulting=32 pages=3000 order=random seed=7",
    );
    for turn in 0..rounds(4) {
        let delay = Delay {
            min: Duration::from_micros(100),
            max: Duration::from_millis(5),
            seed: turn,
        };
        let file = FileSource::new(Image::open(&image).unwrap(), Checksums::On);
        let source = DelayedSource::new(Arc::new(file), delay).unwrap();
        let mut vm = Vm::start(&image, Arc::new(source), 1 + (turn % 2) as u32, Backing::Memfd);
        vm.wait_until_it_runs();
        let moment = random.moment(Duration::from_millis(400));
        thread::sleep(moment);
        let directory = scratch.path("snapshot");
        let options = SnapshotOptions {
            then: Then::Stop,
            ..SnapshotOptions::new(&directory)
        };
        match vm.control.snapshot(&options, &mut |_| {}) {
            Ok(summary) => println!("turn {turn}: after {moment:?}: {summary:?}"),
            Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
        }
        let outcome = vm.thread.take().unwrap().join().unwrap();
        assert!(matches!(outcome, Outcome::Ended(Ending::Stopped)), "{outcome:?}");
        let vm = restore(&directory, &["--memory", "source-delay=100us-5ms"]).run();
        vm.assert_code(0);
        assert_eq!(vm.stderr, "", "{vm}");
        vm.line("result=ok");
    }
}

/// A snapshot of a small guest, and what is in it.
fn small(scratch: &Scratch) -> PathBuf {
    let image = make_image(scratch, "8M", "workload=dirty pages=20 rounds=forever");
    let vm = Vm::from_file(&image, 1, Backing::Memfd);
    vm.wait_until_it_runs();
    vm.wait_for_exits(500);
    let directory = scratch.path("snapshot");
    vm.snapshot(&directory).unwrap();
    vm.stop();
    directory.join(FILE_NAME)
}

#[test]
fn every_changed_byte_of_the_state_and_any_of_ram_is_found() {
    need!(tests::host::kvm());
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let path = small(&scratch);
    let footer = Image::open(&path).unwrap().footer().clone();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let mut flip = |offset: u64, damaged: &mut dyn FnMut()| {
        let bit = random.below(8);
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 1 << bit], offset).unwrap();
        damaged();
        file.write_all_at(&byte, offset).unwrap();
    };
    for offset in footer.metadata_offset()..footer.file_size() {
        flip(offset, &mut || {
            assert!(Image::open(&path).is_err(), "byte {offset} may be changed");
        });
    }
    let mut moments = Random::seeded();
    for _ in 0..50 {
        let offset = moments.below(footer.ram_size);
        flip(offset, &mut || {
            let verified = Image::open(&path).unwrap().verify(|_| {}).unwrap();
            assert_eq!(verified.corrupt, [PageIndex::containing(offset)]);
        });
    }
    flip(footer.metadata_offset() + 100, &mut || {
        restore(&path, &[]).run().assert_code(6);
    });
    // All of RAM: the guest touches one of them.
    let whole = std::fs::read(&path).unwrap();
    for page in 0..footer.pages() {
        file.write_all_at(&[!whole[(page * 4096) as usize]], page * 4096)
            .unwrap();
    }
    let vm = restore(&path, &[]).run();
    vm.assert_code(6);
    assert!(vm.stderr.contains("checksum"), "{vm}");
}

/// The same RAM with other metadata.
fn with_metadata(original: &Path, change: impl FnOnce(&mut serde_json::Value)) -> PathBuf {
    let image = Image::open(original).unwrap();
    let mut metadata: serde_json::Value = serde_json::from_slice(image.metadata()).unwrap();
    change(&mut metadata["snapshot"]);
    let path = original.with_file_name("changed");
    let mut writer = ImageWriter::create(&path, image.footer().ram_size).unwrap();
    writer.write_page(PageIndex(1), &[1; PAGE_SIZE]).unwrap();
    writer
        .finish(&serde_json::to_vec(&metadata).unwrap(), Existing::Replace)
        .unwrap();
    path
}

fn leaf(snapshot: &mut serde_json::Value, function: u64) -> &mut serde_json::Value {
    let mut leaves = snapshot["cpu"].as_array_mut().unwrap().iter_mut();
    leaves.find(|leaf| leaf[0] == function && leaf[1] == 0).unwrap()
}

#[test]
fn what_cannot_be_restored_here_is_refused_with_the_reason() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let path = small(&scratch);
    let refused = |location: &Path, options: &[&str], expected: i32, words: &[&str]| {
        let vm = restore(location, options).run();
        vm.assert_code(expected);
        assert!(
            words.iter().all(|word| vm.stderr.contains(word)),
            "{words:?}: {vm}"
        );
        assert_eq!(vm.stdout, "");
    };
    let changed = |change: &dyn Fn(&mut serde_json::Value), code, words: &[&str]| {
        refused(&with_metadata(&path, change), &[], code, words);
    };
    changed(&|state| state["version"] = 3.into(), 6, &["version 3", "reads 1"]);
    changed(&|state| state["version"] = 0.into(), 6, &["version 0"]);
    changed(
        &|state| leaf(state, 0)[4] = u32::from_le_bytes(*b"Cent").into(),
        3,
        &["Cent", "this host has one of"],
    );
    changed(
        &|state| leaf(state, 7)[5] = u32::MAX.into(),
        3,
        &["lacks CPU features", "enqcmd"],
    );
    changed(
        &|state| state["ram_size"] = (4 << 20).into(),
        6,
        &["4194304 bytes of RAM", "8388608"],
    );
    changed(
        &|state| state["cpus"] = 2.into(),
        6,
        &["2 vCPUs and the state of 1"],
    );
    changed(&|state| state["page_size"] = 16384.into(), 6, &["16384"]);
    changed(
        &|state| state["surprise"] = 1.into(),
        6,
        &["unknown field", "surprise"],
    );
    changed(
        &|state| state["vcpus"][0]["registers"] = "A".repeat(4000).into(),
        6,
        &["bytes where there are"],
    );
    changed(
        &|state| state["read_only"][0]["size"] = (1_u64 << 40).into(),
        6,
        &["no read-only pages"],
    );
    changed(
        &|state| state["read_only"][0]["address"] = 0.into(),
        6,
        &["no read-only pages"],
    );

    let boot = scratch.path("image");
    refused(&path, &["--memory", "size=4M"], 2, &["size=4M", "8M"]);
    refused(&path, &["--cpus", "boot=2"], 2, &["boot=2"]);
    refused(&path, &["--cmdline", "x"], 2, &["--cmdline"]);
    refused(&path, &["--firmware", "none"], 2, &["--firmware"]);
    refused(&path, &["--memory", "source=zero:"], 2, &["source="]);
    refused(&boot, &[], 2, &["no snapshot"]);
    refused(&scratch.path("missing"), &[], 2, &["missing"]);
    refused(scratch.directory(), &[], 2, &[FILE_NAME]);
    let source = format!("source=file:{}", path.display());
    let vm = Program::umem(["run", "--memory", &source]).run();
    vm.assert_code(2);
    assert!(vm.stderr.contains("--snapshot"), "{vm}");
}

#[test]
fn a_full_disk_is_told_and_leaves_nothing_and_the_vm_goes_on() {
    need!(tests::host::kvm());
    need!(tests::host::mount_namespace());
    let scratch = Scratch::new();
    let image = make_image(&scratch, "16M", DIRTY);
    let vm = Vm::from_file(&image, 2, Backing::Memfd);
    vm.wait_until_it_runs();
    let mount_point = scratch.path("full");
    std::fs::create_dir(&mount_point).unwrap();
    let vm = thread::scope(|scope| {
        let try_it = || {
            let flags = UnshareFlags::NEWNS | UnshareFlags::FS;
            // SAFETY: of this thread alone, which ends after this; no descriptors are unshared.
            unsafe { rustix::thread::unshare_unsafe(flags) }.unwrap();
            let private =
                rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
            rustix::mount::mount_change("/", private).unwrap();
            let none = rustix::mount::MountFlags::empty();
            rustix::mount::mount("none", &mount_point, "tmpfs", none, Some(c"size=4M")).unwrap();
            // While it is paused, and after that: the pages that are not loaded yet.
            for _ in 0..3 {
                let error = vm.snapshot(&mount_point.join("new")).unwrap_err();
                let cause = std::error::Error::source(&error).unwrap();
                let cause = cause.source().unwrap().to_string();
                assert!(cause.contains("No space left"), "{error}: {cause}");
                assert_eq!(std::fs::read_dir(&mount_point).unwrap().count(), 0);
                assert_eq!(vm.control.state(), VmState::Running);
                vm.wait_for_exits(20);
            }
            vm
        };
        scope.spawn(try_it).join().unwrap()
    });
    vm.stop();
}

/// Pages that are not loaded yet and that nobody has any more hinder a snapshot, and nothing else: the VM needs none of them.
#[test]
fn a_lost_source_is_told_in_time_and_the_vm_goes_on() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = make_image(&scratch, "16M", "workload=dirty pages=50 rounds=forever");
    let server = Server::start(&socket(&scratch), &[("vm", &image)]);
    let url = format!("{}#vm", server.url());
    let options = RemoteOptions {
        timeout: Duration::from_secs(1),
        ..Default::default()
    };
    let (source, _) = RemoteSource::connect(&[url.parse().unwrap()], options).unwrap();
    let vm = Vm::start(&image, Arc::new(source), 1, Backing::Memfd);
    vm.wait_until_it_runs();
    vm.wait_for_exits(2000);
    let directory = scratch.path("snapshot");
    vm.snapshot(&directory).unwrap();
    server.kill();
    for _ in 0..2 {
        let since = Instant::now();
        let error = vm.snapshot(&directory).unwrap_err();
        assert!(matches!(error, SnapshotError::Source { .. }), "{error}");
        assert!(since.elapsed() < Duration::from_secs(15), "{:?}", since.elapsed());
        assert_eq!(vm.control.state(), VmState::Running);
        vm.wait_for_exits(100);
    }
    vm.stop();
    // The first is still there.
    assert_goes_on(&directory, &[]);
}

#[test]
fn a_paused_vm_stays_paused_and_a_stopped_one_has_no_snapshot() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = make_image(&scratch, "16M", DIRTY);
    let directory = scratch.path("snapshot");
    let early = Control::new();
    let refused = early.snapshot(&SnapshotOptions::new(&directory), &mut |_| {});
    assert!(matches!(
        refused,
        Err(SnapshotError::WrongState(VmState::Booting))
    ));
    let vm = Vm::from_file(&image, 2, Backing::Anonymous);
    vm.wait_until_it_runs();
    vm.wait_for_exits(200);
    vm.control.pause().unwrap();
    let summary = vm.snapshot(&directory).unwrap();
    assert_eq!(vm.control.state(), VmState::Paused);
    assert_eq!(summary.paused, Duration::ZERO);
    vm.control.resume().unwrap();
    vm.wait_for_exits(10);
    let control = vm.control.clone();
    vm.stop();
    let refused = control.snapshot(&SnapshotOptions::new(&directory), &mut |_| {});
    assert!(matches!(
        refused,
        Err(SnapshotError::WrongState(VmState::Stopped))
    ));
    assert_goes_on(&directory, &[]);
}

/// Where the process that is killed puts its snapshots.
const SNAPSHOTS_IN: &str = "UMEM_TEST_SNAPSHOTS_IN";

#[test]
#[ignore = "it is a process of the test below"]
fn makes_one_snapshot_after_another() {
    let Ok(directory) = std::env::var(SNAPSHOTS_IN) else {
        return;
    };
    let directory = Path::new(&directory);
    let vm = Vm::from_file(&directory.join("image"), 2, Backing::Memfd);
    vm.wait_until_it_runs();
    loop {
        vm.snapshot(&directory.join("snapshot")).unwrap();
        println!("\nsnapshot");
    }
}

#[test]
fn a_process_that_is_killed_leaves_a_whole_snapshot() {
    need!(tests::host::kvm());
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    make_image(&scratch, "16M", DIRTY);
    let directory = scratch.path("snapshot");
    let mut between = 0;
    for turn in 0..rounds(10) {
        let process = Program::new(std::env::current_exe().unwrap())
            .args([
                "--ignored",
                "--exact",
                "makes_one_snapshot_after_another",
                "--nocapture",
            ])
            .env(SNAPSHOTS_IN, scratch.directory())
            .start();
        process.wait_for_output("\nsnapshot\n");
        let moment = random.moment(Duration::from_millis(100));
        process.wait_for_exit(moment);
        process.signal(Signal::KILL);
        assert_eq!(process.finish().signal(), Some(Signal::KILL.as_raw()));
        let mut names: Vec<_> = std::fs::read_dir(&directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort_unstable();
        between += usize::from(names.len() == 2);
        println!("turn {turn}: after {moment:?}: {names:?}");
        let expected = [FILE_NAME.to_owned(), format!("{FILE_NAME}.new")];
        assert!(names == expected[..1] || names == expected, "{names:?}");
        for name in names {
            let verified = Image::open(&directory.join(name))
                .unwrap()
                .verify(|_| {})
                .unwrap();
            assert!(verified.is_sound());
        }
        if turn % 5 == 0 {
            assert_goes_on(&directory, &[]);
        }
    }
    println!("{between} were killed with two names there");
}
