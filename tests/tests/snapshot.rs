//! Snapshots of VMs that run in this process, restored by the built program.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tests::in_process::{Machine, from_file};
use tests::need;
use tests::program::Program;
use tests::random::{Random, rounds};
use tests::scratch::Scratch;
use tests::served::socket;
use tests::server::Server;
use tests::snapshot::{DIRTY, assert_goes_on, assert_whole, make_image, restore};
use umem::image::{Image, ImageWriter, MAX_METADATA};
use umem::publish::Existing;
use umem::region::Backing;
use umem::source::delayed::{Delay, DelayedSource};
use umem::source::file::{Checksums, FileSource};
use umem::units::{PAGE_SIZE, PageIndex};
use vmm::control::{Control, VmState};
use vmm::ending::Ending;
use vmm::machine::{MachineConfig, Outcome};
use vmm::ram_source::RamSource;
use vmm::snapshot::{FILE_NAME, SnapshotError, SnapshotOptions, SnapshotState, StateError, Then};

#[test]
fn a_guest_goes_on_where_it_was() {
    need!(tests::host::kvm());
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let image = make_image(&scratch, "24M", DIRTY);
    let mut pauses = Vec::new();
    for turn in 0..rounds(9) {
        let cpus = [1, 2, 4][(turn % 3) as usize];
        let backing = random.choose(&[Backing::Memfd, Backing::Anonymous]);
        let restored = random.choose(&["backing=memfd", "backing=anonymous,fill=sequential"]);
        let vm = Machine::running(MachineConfig {
            cpus,
            backing,
            ..from_file(&image)
        });
        // Those that do not wait for its first words are in the firmware, or in the boot of the other CPUs.
        if !random.once_in(4) {
            vm.wait_for_exits(200);
        }
        let moment = random.moment(Duration::from_millis(400));
        thread::sleep(moment);
        let directory = scratch.path("snapshot");
        let summary = vm.snapshot(&directory).unwrap();
        println!("turn {turn}: {cpus} vCPUs, {backing:?}, {restored}, after {moment:?}: {summary:?}");
        assert!(summary.absent_pages > 0, "all pages were loaded");
        pauses.push(summary.paused);
        vm.wait_for_exits(5);
        vm.stop();
        if random.once_in(2) {
            assert_goes_on(&directory, &["--memory", restored]);
        } else {
            let server = Server::start(&socket(&scratch), &[("vm", &directory.join(FILE_NAME))]);
            assert_goes_on(format!("{}#vm", server.url()), &["--memory", restored]);
            server.stop();
        }
    }
    pauses.sort_unstable();
    println!(
        "snapshots={} restored={0} vcpus=1,2,4 paused_p50={:?} paused_max={:?}",
        pauses.len(),
        pauses[pauses.len() / 2],
        pauses[pauses.len() - 1]
    );
}

/// The snapshot of a guest that was itself restored, and was not loaded yet, is whole again.
#[test]
fn a_snapshot_of_a_restored_guest_is_restored() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = make_image(&scratch, "16M", "workload=dirty pages=200 rounds=forever");
    let vm = Machine::running(MachineConfig {
        cpus: 2,
        ..from_file(&image)
    });
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
    assert_whole(&directory.join(FILE_NAME));
}

/// Many more vCPUs than there are CPUs.
#[test]
fn sixteen_vcpus_go_on() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = make_image(&scratch, "16M", "workload=dirty pages=160 rounds=forever");
    let vm = Machine::running(MachineConfig {
        cpus: 16,
        ..from_file(&image)
    });
    vm.wait_for_exits(500);
    let directory = scratch.path("snapshot");
    vm.snapshot(&directory).unwrap();
    vm.stop();
    let metadata = Image::open(&directory.join(FILE_NAME)).unwrap().metadata().len();
    println!("16 vCPUs: {metadata} bytes of state");
    assert_goes_on(&directory, &[]);
}

/// The state is bounded. This host's vCPUs all fit, and with more there is no snapshot but a clear word.
#[test]
fn how_many_vcpus_fit_into_the_state() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = Image::open(&small(&scratch)).unwrap();
    let original: serde_json::Value = serde_json::from_slice(image.metadata()).unwrap();
    let encoded = |vcpus: usize| {
        let mut metadata = original.clone();
        let snapshot = &mut metadata["snapshot"];
        snapshot["vcpus"] = vec![snapshot["vcpus"][0].clone(); vcpus].into();
        snapshot["cpus"] = vcpus.into();
        let bytes = serde_json::to_vec(&metadata).unwrap();
        SnapshotState::decode(&bytes, image.footer().ram_size)
            .unwrap()
            .encode()
    };
    let one = encoded(1).unwrap().len();
    let each = encoded(2).unwrap().len() - one;
    let most = 1 + (MAX_METADATA - one) / each;
    println!("{one} bytes with one vCPU, {each} with each further one: {most} fit");
    assert!(most >= 255, "there can be 255");
    assert!(encoded(most).unwrap().len() <= MAX_METADATA);
    let error = encoded(most + 1).unwrap_err();
    assert!(
        matches!(error, StateError::TooLarge { vcpus, size } if vcpus == most + 1 && size > MAX_METADATA),
        "{error}"
    );
    for words in [
        format!("{} vCPUs", most + 1),
        format!("more than the {MAX_METADATA}"),
    ] {
        assert!(error.to_string().contains(&words), "{error}");
    }
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
        let vm = Machine::running(MachineConfig {
            source: RamSource::Source(Arc::new(source)),
            cpus: 1 + (turn % 2) as u32,
            ..from_file(&image)
        });
        let moment = random.moment(Duration::from_millis(400));
        thread::sleep(moment);
        let directory = scratch.path("snapshot");
        let options = SnapshotOptions {
            then: Then::Stop,
            ..SnapshotOptions::new(&directory)
        };
        match vm.make_snapshot(&options) {
            Ok(summary) => println!("turn {turn}: after {moment:?}: {summary:?}"),
            Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
        }
        let outcome = vm.end();
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
    let vm = Machine::running(from_file(&image));
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
    let vm = Machine::running(MachineConfig {
        cpus: 2,
        backing: Backing::Anonymous,
        ..from_file(&image)
    });
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
