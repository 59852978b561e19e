//! Snapshots that are laid over others, of VMs that run in this process; restored here and by the built program.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tests::in_process::{Machine, from_file};
use tests::need;
use umem::image::{Image, OpenError, Wait};
use umem::region::Backing;
use umem::units::{PAGE_SIZE, PageIndex, PageRange};
use vmm::machine::MachineConfig;
use vmm::snapshot::{BaseError, FILE_NAME, SnapshotError};

/// The built program.
fn umem(args: &[&str]) -> Command {
    let mut command = Command::new(tests::program::umem());
    command.args(args).stdin(Stdio::null());
    command
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// An image every page of which holds something, whose guest is told `command_line`.
fn make_image(directory: &Path, memory: &str, command_line: &str) -> PathBuf {
    let path = directory.join("image");
    let mut create = umem(&["image", "create", "--fill", "pattern:7", "--memory", memory]);
    let output = create
        .args(["--cmdline", command_line, "-o"])
        .arg(&path)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    path
}

/// Whether pages that change are tracked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Track {
    Yes,
    No,
}

/// Boots an image, or restores a snapshot, and waits until the guest runs.
fn start(image: &Path, cpus: u32, backing: Backing, track: Track) -> Machine {
    Machine::running(MachineConfig {
        cpus,
        backing,
        track_dirty: track == Track::Yes,
        ..from_file(image)
    })
}

fn file(directory: &Path) -> PathBuf {
    directory.join(FILE_NAME)
}

/// What a snapshot's RAM holds, page by page.
fn content(directory: &Path) -> Vec<u64> {
    let image = Image::open(&file(directory)).unwrap();
    let mut checksums = vec![0; image.pages() as usize];
    let pages = PageRange::new(PageIndex(0), image.pages());
    image
        .checksums(pages, Wait::Yes, &mut checksums)
        .unwrap()
        .unwrap();
    let mut buffer = vec![0; PAGE_SIZE * 256];
    for start in (0..image.pages()).step_by(256) {
        let pages = PageRange::new(PageIndex(start), 256).clamp_to(PageIndex(image.pages()));
        image.read(pages, Wait::Yes, &mut buffer).unwrap().unwrap();
        for (page, content) in pages.pages().zip(buffer.chunks(PAGE_SIZE)) {
            image.check(page, content, checksums[page.0 as usize]).unwrap();
        }
    }
    checksums
}

#[track_caller]
fn assert_same(one: &Path, other: &Path) {
    let (one, other) = (content(one), content(other));
    let different: Vec<usize> = (0..one.len()).filter(|page| one[*page] != other[*page]).collect();
    assert_eq!(different, Vec::<usize>::new(), "pages differ");
    assert_eq!(one.len(), other.len());
}

/// The built program restores a snapshot, and the guest goes on for `rounds` rounds and finds everything as it left it.
#[track_caller]
fn assert_restores(location: &str, rounds: usize) {
    let mut child = umem(&["run", "--snapshot", location])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut seen = 0;
    let mut last = None;
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        assert!(!line.contains("wrong_page="), "{line}");
        let Some(round) = line.strip_prefix("round=") else {
            continue;
        };
        let round: u64 = round.split(' ').next().unwrap().parse().unwrap();
        assert!(last.is_none_or(|last| round == last + 1), "{last:?} {round}");
        last = Some(round);
        seen += 1;
        if seen == rounds {
            break;
        }
    }
    let _ = child.kill();
    let mut errors = String::new();
    child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
    child.wait().unwrap();
    assert_eq!(seen, rounds, "{errors}");
}

fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// A chain: a snapshot of all of RAM, and `count` that are laid each over the one before, with the guest at work in between.
/// The last is of the same moment as `all`, a snapshot of all of RAM.
fn chain(directory: &Path, vm: &Machine, count: usize, track: Track) -> (Vec<PathBuf>, PathBuf) {
    let mut chain = vec![directory.join("0")];
    vm.snapshot(&chain[0]).unwrap();
    for index in 1..=count {
        vm.wait_for_exits(60);
        if index == count {
            vm.control.pause().unwrap();
        }
        let next = directory.join(index.to_string());
        let summary = vm.snapshot_over(&next, chain.last().unwrap()).unwrap();
        assert_eq!(summary.tracked, track == Track::Yes);
        assert!(
            summary.own_pages > 0 && summary.own_pages < summary.pages / 2,
            "{summary:?}"
        );
        chain.push(next);
    }
    let all = directory.join("all");
    vm.snapshot(&all).unwrap();
    vm.control.resume().unwrap();
    (chain, all)
}

#[test]
fn a_snapshot_of_little_change_is_little() {
    need!(tests::host::kvm());
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    // One in a hundred of the pages of 1 GiB.
    let image = make_image(
        directory.path(),
        "1G",
        "workload=dirty pages=2621 order=random rounds=forever",
    );
    let vm = start(&image, 1, Backing::Memfd, Track::Yes);
    vm.wait_for_exits(60);
    let base = vm.snapshot(&at("base")).unwrap();
    assert!(base.absent_pages > 200_000, "{base:?}");
    vm.wait_for_exits(120);
    vm.control.pause().unwrap();
    let tracked = vm.snapshot_over(&at("tracked"), &at("base")).unwrap();
    let compared = vm.snapshot_over(&at("compared"), &at("base")).unwrap();
    assert!(tracked.tracked && !compared.tracked);
    vm.stop();
    let whole = allocated(&file(&at("base")));
    for (name, summary) in [("tracked", &tracked), ("compared", &compared)] {
        let part = allocated(&file(&at(name)));
        println!(
            "{name}: {part} of {whole} bytes, {} pages, {:?}",
            summary.own_pages, summary.took
        );
        assert!(part > whole / 200 && part < whole / 66, "{part} of {whole}");
        assert!((2621..3100).contains(&summary.own_pages), "{summary:?}");
        assert_restores(at(name).to_str().unwrap(), 3);
    }
    assert_eq!(tracked.own_pages, compared.own_pages, "tracking missed a page");
    assert_same(&at("tracked"), &at("compared"));
}

#[test]
fn a_chain_of_ten_is_what_was_there_at_its_end() {
    need!(tests::host::kvm());
    for (track, backing, cpus) in [
        (Track::Yes, Backing::Memfd, 2),
        (Track::No, Backing::Memfd, 1),
        (Track::Yes, Backing::Anonymous, 1),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let image = make_image(
            directory.path(),
            "64M",
            "workload=dirty pages=300 order=random rounds=forever",
        );
        let vm = start(&image, cpus, backing, track);
        let (chain, all) = chain(directory.path(), &vm, 10, track);
        vm.stop();
        let top = chain.last().unwrap();
        assert_eq!(Image::open(&file(top)).unwrap().layer_count(), 11);
        assert_same(top, &all);
        assert_restores(top.to_str().unwrap(), 3);
    }
}

#[test]
fn a_restored_vm_is_tracked_from_its_snapshot_on() {
    need!(tests::host::kvm());
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let image = make_image(
        directory.path(),
        "64M",
        "workload=dirty pages=400 order=random rounds=forever",
    );
    // From the image itself, which is no snapshot, and then from each snapshot.
    let (mut from, mut base) = (image.clone(), image);
    for name in ["first", "second", "third"] {
        let vm = start(&from, 1, Backing::Memfd, Track::Yes);
        vm.wait_for_exits(100);
        vm.control.pause().unwrap();
        let summary = vm.snapshot_over(&at(name), &base).unwrap();
        assert!(summary.tracked && summary.absent_pages > 10_000, "{summary:?}");
        assert!(summary.own_pages < 2_000, "{summary:?}");
        // The source is the base no more, and what is absent comes from the source.
        let all = at(&format!("{name} all"));
        vm.snapshot(&all).unwrap();
        vm.stop();
        assert_same(&at(name), &all);
        from = file(&at(name));
        base = at(name);
        assert_restores(at(name).to_str().unwrap(), 2);
    }
    assert_eq!(Image::open(&from).unwrap().layer_count(), 4);
}

#[test]
fn a_vm_may_be_laid_over_what_it_has_nothing_to_do_with() {
    need!(tests::host::kvm());
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let image = make_image(directory.path(), "64M", "workload=dirty pages=400 rounds=forever");
    let other = at("other");
    let create = umem(&[
        "image",
        "create",
        "--memory",
        "64M",
        "-o",
        other.to_str().unwrap(),
    ])
    .output()
    .unwrap();
    assert!(create.status.success(), "{create:?}");
    let vm = start(&image, 1, Backing::Memfd, Track::Yes);
    vm.wait_for_exits(60);
    vm.control.pause().unwrap();
    let summary = vm.snapshot_over(&at("over"), &other).unwrap();
    assert!(
        !summary.tracked && summary.own_pages > summary.pages / 2,
        "{summary:?}"
    );
    vm.snapshot(&at("all")).unwrap();
    // Of what is zero there and not here, and the other way round.
    let zero = vm.snapshot_over(&at("back"), &at("over")).unwrap();
    assert_eq!(zero.own_pages, 0);
    vm.stop();
    assert_same(&at("over"), &at("all"));
    assert_same(&at("back"), &at("all"));
    assert_restores(at("back").to_str().unwrap(), 2);
}

#[test]
fn what_cannot_be_a_base_is_refused_and_the_vm_goes_on() {
    need!(tests::host::kvm());
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let image = make_image(directory.path(), "16M", "workload=dirty pages=100 rounds=forever");
    let small = at("small");
    let create = umem(&["image", "create", "--memory", "8M", "-o", small.to_str().unwrap()])
        .output()
        .unwrap();
    assert!(create.status.success(), "{create:?}");
    let vm = start(&image, 1, Backing::Memfd, Track::Yes);
    vm.snapshot(&at("a")).unwrap();
    vm.snapshot_over(&at("b"), &at("a")).unwrap();
    let refused = |target: &str, base: &Path| match vm.snapshot_over(&at(target), base) {
        Err(SnapshotError::Base { source, .. }) => *source,
        other => panic!("{other:?}"),
    };
    assert!(matches!(
        refused("c", &at("nothing")),
        BaseError::Open(OpenError::Io { .. })
    ));
    assert!(matches!(refused("c", &small), BaseError::Size { .. }));
    // In its own place, and in that of its base.
    assert!(matches!(refused("b", &at("b")), BaseError::Replaced(_)));
    assert!(matches!(refused("a", &at("b")), BaseError::Replaced(_)));
    assert!(!at("c").exists(), "a directory was left behind");
    vm.wait_for_exits(60);
    vm.control.pause().unwrap();
    let last = vm.snapshot_over(&at("c"), &at("b")).unwrap();
    assert!(last.tracked, "what was refused has cost nothing");
    vm.snapshot(&at("all")).unwrap();
    vm.stop();
    assert_same(&at("c"), &at("all"));
}

/// What the program says of a chain whose files are not what they were.
#[test]
fn a_base_that_is_missing_replaced_or_damaged_is_found() {
    need!(tests::host::kvm());
    let directory = tempfile::tempdir().unwrap();
    let image = make_image(directory.path(), "16M", "workload=dirty pages=100 rounds=forever");
    let vm = start(&image, 1, Backing::Memfd, Track::Yes);
    let (chain, all) = chain(directory.path(), &vm, 3, Track::Yes);
    vm.stop();
    let top = chain.last().unwrap().to_str().unwrap();
    let restore = || umem(&["run", "--snapshot", top]).output().unwrap();
    let verify = || {
        umem(&["image", "verify", file(Path::new(top)).to_str().unwrap()])
            .output()
            .unwrap()
    };
    assert!(verify().status.success(), "{}", stderr(&verify()));

    for directory in &chain[..3] {
        let (path, moved) = (file(directory), directory.join("moved"));
        fs::rename(&path, &moved).unwrap();
        let output = restore();
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(
            stderr(&output).contains("cannot be used without its base"),
            "{}",
            stderr(&output)
        );
        // Another snapshot of the same VM.
        fs::copy(file(&all), &path).unwrap();
        let output = restore();
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(stderr(&output).contains("another one"), "{}", stderr(&output));
        fs::rename(&moved, &path).unwrap();
    }
    for directory in &chain {
        let path = file(directory);
        let length = fs::metadata(&path).unwrap().len();
        let opened = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        // In a page, in the tables, in the state, and in what the footer says.
        let image = Image::open(&path).unwrap();
        let footer = image.footer().clone();
        for offset in [
            0,
            footer.table_offset(),
            footer.metadata_offset() + 9,
            length - 150,
            length - 30,
        ] {
            let mut byte = [0];
            opened.read_exact_at(&mut byte, offset).unwrap();
            opened.write_all_at(&[byte[0] ^ 4], offset).unwrap();
            let output = verify();
            assert_eq!(
                output.status.code(),
                Some(6),
                "{} {offset}: {}",
                path.display(),
                stderr(&output)
            );
            assert!(stderr(&output).contains("corrupt"), "{}", stderr(&output));
            opened.write_all_at(&byte, offset).unwrap();
        }
    }
    assert!(verify().status.success());
    assert_restores(top, 2);
}

#[test]
fn a_page_server_serves_all_layers() {
    need!(tests::host::kvm());
    let directory = tempfile::tempdir().unwrap();
    let image = make_image(
        directory.path(),
        "16M",
        "workload=dirty pages=200 order=random rounds=forever",
    );
    let vm = start(&image, 1, Backing::Memfd, Track::Yes);
    let (chain, _) = chain(directory.path(), &vm, 3, Track::Yes);
    vm.stop();
    let top = file(chain.last().unwrap());
    let url = format!("unix:{}", directory.path().join("socket").display());
    let mut server = umem(&[
        "serve",
        "--listen",
        &url,
        "--image",
        &format!("vm={}", top.display()),
    ])
    .stdout(Stdio::piped())
    .spawn()
    .unwrap();
    let mut line = String::new();
    BufReader::new(server.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert!(line.starts_with("serving at"), "{line}");
    assert_restores(&format!("{url}#vm"), 3);
    server.kill().unwrap();
    server.wait().unwrap();
    fs::remove_file(file(&chain[1])).unwrap();
    let output = umem(&[
        "serve",
        "--listen",
        &url,
        "--image",
        &format!("vm={}", top.display()),
    ])
    .output()
    .unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
}
