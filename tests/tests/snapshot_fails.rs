//! Snapshots that come to nothing, or whose maker is killed: the one before is whole, and the VM goes on.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use rustix::thread::UnshareFlags;
use tests::in_process::{Machine, from_file};
use tests::need;
use tests::program::Program;
use tests::random::{Random, rounds};
use tests::scratch::Scratch;
use tests::served::socket;
use tests::server::Server;
use tests::snapshot::{DIRTY, assert_goes_on, assert_whole, make_image};
use umem::image::{Image, Wait};
use umem::source::remote::{RemoteOptions, RemoteSource};
use umem::units::{PageIndex, PageRange};
use vmm::control::VmState;
use vmm::machine::MachineConfig;
use vmm::ram_source::RamSource;
use vmm::snapshot::{BaseError, FILE_NAME, SnapshotError, SnapshotOptions};

#[test]
fn a_full_disk_is_told_and_leaves_nothing_and_the_vm_goes_on() {
    need!(tests::host::kvm());
    need!(tests::host::mount_namespace());
    let scratch = Scratch::new();
    let image = make_image(&scratch, "16M", DIRTY);
    let vm = Machine::running(MachineConfig {
        cpus: 2,
        ..from_file(&image)
    });
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
    let vm = Machine::running(MachineConfig {
        source: RamSource::Source(Arc::new(source)),
        ..from_file(&image)
    });
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

/// What is written while there is no room for it is tried again where there is: what was told of pages that had changed is not lost
/// with it.
#[test]
fn after_a_full_disk_the_next_incremental_snapshot_is_right() {
    need!(tests::host::kvm());
    need!(tests::host::mount_namespace());
    let scratch = Scratch::new();
    make_image(&scratch, "24M", DIRTY);
    let socket = scratch.path("socket");
    std::fs::create_dir(scratch.path("full")).unwrap();
    let vm = Program::in_mount_namespace(
        r#"mount -t tmpfs -o size=1M none full
        exec "$0" run --memory "source=file:image,track-dirty=on" --api-socket socket"#,
    )
    .current_dir(scratch.directory())
    .start();
    vm.wait_for_output("round=2 ");
    let ctl = |args: &[&str]| {
        let ctl = Program::umem(["ctl", "--api-socket"]).arg(&socket).args(args);
        ctl.current_dir(scratch.directory()).run()
    };
    let snapshot = |options: &str| {
        let made = ctl(&["snapshot", options]);
        made.assert_code(0);
    };
    let refused = |options: &str| {
        let refused = ctl(&["snapshot", options]);
        refused.assert_code(1);
        assert!(refused.stderr.contains("No space left on device"), "{refused}");
        assert!(refused.stderr.contains("snapshot.img"), "{refused}");
        let state = ctl(&["--json", "info"]).stdout;
        assert!(
            state.contains("\"running\"") || state.contains("\"paused\""),
            "{state}"
        );
    };
    let goes_on = || {
        let before = vm.stdout().len();
        vm.wait_until("it goes on", |vm| {
            vm.stdout()[before..].matches("round=").count() > 2
        });
    };
    snapshot("destination_url=file:base");
    goes_on();
    // Of all of RAM and of what has changed; while it runs, and while it stands still.
    refused("destination_url=file:full/new");
    goes_on();
    refused("destination_url=file:full/new,base_url=file:base");
    goes_on();
    ctl(&["pause"]).assert_code(0);
    refused("destination_url=file:full/new,base_url=file:base");
    // From here on nothing changes any more, so what is in the next one was given back by those that failed.
    snapshot("destination_url=file:layer,base_url=file:base");
    snapshot("destination_url=file:all");
    ctl(&["resume"]).assert_code(0);
    goes_on();
    ctl(&["shutdown"]).assert_code(0);
    let vm = vm.finish();
    vm.assert_code(0);
    assert!(!vm.stdout.contains("wrong_page="), "{vm}");

    let checksums = |name: &str| {
        let file = scratch.path(name).join(FILE_NAME);
        assert_whole(&file);
        let image = Image::open(&file).unwrap();
        let mut checksums = vec![0; image.pages() as usize];
        let all = PageRange::new(PageIndex(0), image.pages());
        image.checksums(all, Wait::Yes, &mut checksums).unwrap().unwrap();
        (image, checksums)
    };
    let ((base, before), (layer, after)) = (checksums("base"), checksums("layer"));
    let changed = before.iter().zip(&after).filter(|(one, other)| one != other);
    let (changed, stored) = (changed.count() as u64, layer.footer().checksums());
    println!(
        "{changed} pages had changed, {stored} of {} are stored",
        base.pages()
    );
    assert!(changed >= 512, "{changed}");
    assert_eq!(stored, changed, "what was not told was compared");
    assert_eq!(after, checksums("all").1);
    assert_goes_on(scratch.path("layer"), &[]);
}

/// Where the process that is killed puts its snapshots.
const SNAPSHOTS_IN: &str = "UMEM_TEST_SNAPSHOTS_IN";

/// Set where it is killed in the middle of giving a snapshot its name.
const KILLED_AT_RENAME: &str = "UMEM_TEST_KILLED_AT_RENAME";

#[test]
#[ignore = "it is a process of the tests below"]
fn makes_one_snapshot_after_another() {
    let Ok(directory) = std::env::var(SNAPSHOTS_IN) else {
        return;
    };
    let directory = Path::new(&directory);
    let vm = Machine::running(MachineConfig {
        cpus: 2,
        ..from_file(&directory.join("image"))
    });
    let snapshot = || {
        let summary = vm.snapshot(&directory.join("snapshot")).unwrap();
        println!("\nsnapshot={}", hex(&summary.digest));
    };
    snapshot();
    if std::env::var_os(KILLED_AT_RENAME).is_some() {
        end_at_rename();
    }
    loop {
        snapshot();
    }
}

fn hex(digest: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*digest).to_string()
}

/// From now on a `rename` by this thread is the end of the process, as sudden as SIGKILL.
fn end_at_rename() {
    // Loads the number of the system call; if it is 82 or 316 (rename, renameat2), kills the process; else allows it. No other is
    // made here.
    let statement = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut program = [
        statement((libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, 0, 0, 0),
        statement(
            (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            1,
            0,
            libc::SYS_rename as u32,
        ),
        statement(
            (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            0,
            1,
            libc::SYS_renameat2 as u32,
        ),
        statement(
            (libc::BPF_RET | libc::BPF_K) as u16,
            0,
            0,
            libc::SECCOMP_RET_KILL_PROCESS,
        ),
        statement(
            (libc::BPF_RET | libc::BPF_K) as u16,
            0,
            0,
            libc::SECCOMP_RET_ALLOW,
        ),
    ];
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: no pointers are given; then the program lives until the call has copied it.
    let set = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1_u64, 0_u64, 0_u64, 0_u64) == 0
            && libc::prctl(
                libc::PR_SET_SECCOMP,
                u64::from(libc::SECCOMP_MODE_FILTER),
                &raw const program,
            ) == 0
    };
    assert!(set, "{}", std::io::Error::last_os_error());
}

/// A process that makes snapshots until it is killed.
fn maker(scratch: &Scratch) -> Program {
    Program::new(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            "makes_one_snapshot_after_another",
            "--nocapture",
        ])
        .env(SNAPSHOTS_IN, scratch.directory())
}

/// The digests of the snapshots that a process said it had made.
fn made(stdout: &str) -> Vec<&str> {
    let lines = stdout.lines().filter_map(|line| line.strip_prefix("snapshot="));
    lines.filter(|digest| digest.len() == 64).collect()
}

fn names_in(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    names
}

#[test]
fn a_process_that_is_killed_leaves_a_whole_snapshot() {
    need!(tests::host::kvm());
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    make_image(&scratch, "16M", DIRTY);
    let directory = scratch.path("snapshot");
    let file = directory.join(FILE_NAME);
    let (mut old, mut new, mut between) = (0, 0, 0);
    for turn in 0..rounds(10) {
        let process = maker(&scratch).start();
        process.wait_until("two snapshots", |process| made(&process.stdout()).len() >= 2);
        let moment = random.moment(Duration::from_millis(100));
        process.wait_for_exit(moment);
        process.signal(Signal::KILL);
        let process = process.finish();
        assert_eq!(process.signal(), Some(Signal::KILL.as_raw()));
        let names = names_in(&directory);
        println!("turn {turn}: after {moment:?}: {names:?}");
        let expected = [FILE_NAME.to_owned(), format!("{FILE_NAME}.new")];
        assert!(names == expected[..1] || names == expected, "{names:?}");
        for name in &names {
            assert_whole(&directory.join(name));
        }
        // The last that it told of, or one that it had no time to tell of.
        let found = hex(&Image::open(&file).unwrap().footer().digest);
        let told = made(&process.stdout);
        match told.iter().position(|digest| *digest == found) {
            Some(place) => {
                assert_eq!(place + 1, told.len(), "an older one is there again");
                old += 1;
            }
            None => new += 1,
        }
        between += usize::from(names.len() == 2);
        if turn % 5 == 0 {
            assert_goes_on(&directory, &[]);
        }
    }
    println!(
        "killed={} left_the_old_one={old} left_the_new_one={new} of_these_with_a_second_name={between} damaged=0",
        old + new
    );
}

/// The one moment in which a second name is there: it is whole, and goes with the next snapshot before that needs the room.
#[test]
fn a_process_that_is_killed_at_the_last_moment_leaves_both_whole() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    make_image(&scratch, "16M", DIRTY);
    let directory = scratch.path("snapshot");
    let process = maker(&scratch).env(KILLED_AT_RENAME, "1").run();
    assert_eq!(process.signal(), Some(Signal::SYS.as_raw()), "{process}");
    let [first] = made(&process.stdout)[..] else {
        panic!("{process}");
    };
    let left = format!("{FILE_NAME}.new");
    assert_eq!(names_in(&directory), [FILE_NAME, &left]);
    let digest = |name: &str| {
        let path = directory.join(name);
        assert_whole(&path);
        assert_goes_on(&path, &[]);
        hex(&Image::open(&path).unwrap().footer().digest)
    };
    assert_eq!(digest(FILE_NAME), first);
    assert_ne!(digest(&left), first);

    let vm = Machine::running(from_file(&scratch.path("image")));
    // Not while somebody wants to lay something over it.
    match vm.snapshot_over(&directory, &directory.join(&left)) {
        Err(SnapshotError::Base { source, .. }) => {
            assert!(matches!(*source, BaseError::Replaced(_)), "{source}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(names_in(&directory), [FILE_NAME, &left]);
    let options = SnapshotOptions::new(&directory);
    let mut seen = None;
    let mut note = |_| {
        seen.get_or_insert_with(|| names_in(&directory));
    };
    vm.control.snapshot(&options, &mut note).unwrap();
    vm.stop();
    assert_eq!(
        seen.unwrap(),
        [FILE_NAME],
        "it is still there when room is needed"
    );
    assert_eq!(names_in(&directory), [FILE_NAME]);
    assert_goes_on(&directory, &[]);
}
