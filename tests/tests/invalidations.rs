//! Watchers outside the VM hear when the memory behind guest-physical addresses changes.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;
use tests::api::{Api, assert_is, event};
use tests::need;
use tests::random::Random;
use tests::scratch::{PAGE_SIZE, Scratch};
use tests::vm::{RunningVm, Vm};
use ummunotify::service::{Client, ClientError, ClientOptions, LONGEST_LIMIT, Notice};
use ummunotify::{AddressRange, Cookie, Event};

/// Pages of RAM.
const RAM: u64 = (64 << 20) / PAGE_SIZE;
/// Pages that the guest gives back.
const PAGES: u64 = 700;

const PATIENCE: Duration = Duration::from_mins(1);

/// A VM whose guest gives pages back when its balloon is to hold some.
struct Watched {
    vm: RunningVm,
    api: Api,
    socket: PathBuf,
    _scratch: Scratch,
}

impl Watched {
    fn start(options: &str) -> Self {
        Self::start_with(options, "how=target", "following=on")
    }

    /// With another workload of the balloon's, which says this when it is ready.
    fn start_with(options: &str, how: &str, ready: &str) -> Self {
        let scratch = Scratch::new();
        let socket = scratch.path("invalidations");
        let vm = Vm::with_memory("64M")
            .option("--balloon", "size=0,free-page-reporting=on")
            .option("--invalidations", format!("socket={}{options}", socket.display()))
            .command_line(&format!("workload=balloon pages={PAGES} {how}"));
        let (vm, api) = Api::start_until(vm, ready);
        Self {
            vm,
            api,
            socket,
            _scratch: scratch,
        }
    }

    fn resize(&self, pages: u64) {
        let body = json!({ "desired_balloon": pages * PAGE_SIZE }).to_string();
        let reply = self.api.ask("PUT", "/api/v1/vm.resize", body.as_bytes());
        assert_eq!(reply.status, 204, "{}", String::from_utf8_lossy(&reply.body));
    }

    fn client(&self) -> Client {
        Client::connect(&self.socket, ClientOptions::default()).unwrap()
    }

    fn acknowledging(&self) -> Client {
        let acknowledge_within = Some(PATIENCE);
        Client::connect(&self.socket, ClientOptions { acknowledge_within }).unwrap()
    }

    /// What `vm.invalidations` says, which is as documented.
    fn status(&self) -> serde_json::Value {
        let status = self.api.get("/api/v1/vm.invalidations");
        assert_is("Invalidations", &status);
        status
    }

    /// The guest takes everything back, and finds it zero.
    fn finish(self) {
        self.resize(0);
        let finished = self.vm.finish();
        finished.assert_code(0);
        finished.line("result=ok");
        assert!(!self.socket.exists(), "the socket is still there");
    }
}

fn page(number: u64) -> AddressRange {
    AddressRange::new(number * PAGE_SIZE, (number + 1) * PAGE_SIZE)
}

/// Registers each of these pages by itself, under its number.
fn watch_pages(client: &mut Client, pages: impl IntoIterator<Item = u64>) {
    for number in pages {
        client.register(page(number), Cookie(number)).unwrap();
    }
}

/// Registers everything but these pages.
fn watch_all_but(client: &mut Client, pages: &BTreeSet<u64>) {
    let mut start = 0;
    for end in pages.iter().copied().chain([u64::MAX / PAGE_SIZE]) {
        let apart = AddressRange::new(start * PAGE_SIZE, end * PAGE_SIZE);
        client.register(apart, Cookie(start)).unwrap();
        start = end + 1;
    }
}

/// Everything there is to read: the pages that were hit, and other notices.
fn read_all(client: &mut Client) -> (BTreeSet<u64>, Vec<Notice>) {
    let (mut hit, mut others) = (BTreeSet::new(), Vec::new());
    loop {
        for notice in client.read(usize::MAX).unwrap() {
            match notice {
                Notice::Event(Event::Invalidated { cookie, part, exact }) => {
                    assert_eq!((part, exact), (page(cookie.0), true));
                    assert!(hit.insert(cookie.0), "page {} was told twice", cookie.0);
                }
                Notice::Event(Event::Last { counter }) => {
                    let now = client.counter().load();
                    assert!(counter <= now, "{counter} is still to come, and {now} is told");
                    // Else something has come since.
                    if counter == now {
                        return (hit, others);
                    }
                }
                other => others.push(other),
            }
        }
    }
}

/// The pages that the guest says that it gives: the first of its memory.
fn given(vm: &RunningVm) -> BTreeSet<u64> {
    let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
    let runs = vm.stdout();
    let runs = runs.lines().filter_map(|line| line.strip_prefix("frames="));
    runs.flat_map(|run| {
        let (first, end) = run.split_once('-').unwrap();
        number(first)..number(end)
    })
    .collect()
}

#[test]
fn a_watcher_hears_of_just_the_pages_that_go_and_others_hear_nothing() {
    need!(tests::host::kvm());
    for how in ["how=inflate wait=on", "how=report wait=on"] {
        let watched = Watched::start_with(",acknowledge-within=5s", how, "waiting=on");
        // The guest gives them one after another, and each time waits for this one.
        let mut gate = watched.acknowledging();
        watch_pages(&mut gate, 0..RAM);
        let (mut same, mut others) = (watched.client(), watched.client());
        watched.resize(1);
        let (mut hit, mut registered, mut last) = (BTreeSet::new(), false, None);
        while hit.len() < PAGES as usize {
            assert!(
                gate.wait(PATIENCE).unwrap(),
                "nothing is told\n{}",
                watched.vm.stdout()
            );
            // It was written, and not yet given: no page has gone for which nobody was asked.
            let output = watched.vm.stdout();
            assert!(
                output.contains("written=") && !output.contains("given="),
                "{output}"
            );
            let (pages, changes) = read_all(&mut gate);
            assert!(hit.is_disjoint(&pages), "told twice");
            if !registered {
                // Now it is known which ones they are. The first go while this is registered: that is told at their end.
                let given = given(&watched.vm);
                watch_pages(&mut same, given.iter().copied());
                watch_all_but(&mut others, &given);
                registered = true;
            }
            hit.extend(pages);
            for change in changes {
                match change {
                    Notice::Begin { change } => {
                        assert_eq!(last, None, "one began before another had ended");
                        last = Some(change);
                        gate.acknowledge(change).unwrap();
                    }
                    Notice::End { change } => assert_eq!(last.take(), Some(change)),
                    Notice::Event(_) => unreachable!(),
                }
            }
        }
        assert_eq!(hit, given(&watched.vm), "{how}");
        // Given, and not yet used again.
        watched.vm.wait_for_output("waiting=on target=1");
        assert_eq!(read_all(&mut same).0, hit, "{how}");
        assert!(same.counter().load() > 0);
        assert_eq!((read_all(&mut others).0.len(), others.counter().load()), (0, 0));
        assert_eq!(
            read_all(&mut gate).1,
            [Notice::End {
                change: last.unwrap()
            }]
        );
        // It uses them again, and nobody hears of that.
        watched.resize(2);
        let finished = watched.vm.finish();
        finished.assert_code(0);
        finished.line("result=ok");
    }
}

/// Begin, acknowledgement, the change, end: the guest goes on when all that is done.
#[test]
fn a_page_goes_when_its_watcher_has_said_so() {
    need!(tests::host::kvm());
    let watched = Watched::start(",acknowledge-within=5s");
    let mode = watched.socket.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut client = watched.acknowledging();
    assert_eq!(client.limit(), Some(LONGEST_LIMIT));
    client.register(AddressRange::ALL, Cookie(1)).unwrap();
    watched.resize(10);
    assert!(client.wait(PATIENCE).unwrap());
    let begun = client.read(100).unwrap();
    let [
        Notice::Event(Event::Invalidated { .. }),
        Notice::Begin { change },
        _,
    ] = begun[..]
    else {
        panic!("{begun:?}");
    };
    let status = watched.status();
    assert_eq!(status["clients"][0]["last_begun"], change);
    assert_eq!(watched.api.info()["pages"]["removed"], 0);
    assert!(!watched.vm.stdout().contains("held="));
    client.acknowledge(change).unwrap();
    watched.vm.wait_for_output("held=10 ");
    assert!(client.wait(PATIENCE).unwrap());
    let ended = client.read(100).unwrap();
    assert_eq!(ended[0], Notice::End { change });
    let info = watched.api.info();
    assert_eq!(
        (&info["pages"]["removed"], &info["balloon"]["inflated"]),
        (&json!(10), &json!(10 * PAGE_SIZE))
    );
    let status = watched.status();
    assert_eq!(
        (&status["hits"], &status["acknowledged"], &status["late"]),
        (&json!(1), &json!(1), &json!(0))
    );
    drop(client);
    watched.finish();
}

#[test]
fn a_watcher_that_dies_or_hangs_does_not_stop_the_vm() {
    need!(tests::host::kvm());
    let watched = Watched::start(",acknowledge-within=300ms");
    // One that dies while it is waited for.
    let mut client = watched.acknowledging();
    client.register(AddressRange::ALL, Cookie(1)).unwrap();
    watched.resize(10);
    assert!(client.wait(PATIENCE).unwrap());
    drop(client);
    watched.vm.wait_for_output("held=10 ");
    // One that hangs: it is waited for once.
    let mut client = watched.acknowledging();
    client.register(AddressRange::ALL, Cookie(1)).unwrap();
    let valid_at = client.counter().load();
    let began = Instant::now();
    watched.resize(PAGES);
    watched.vm.wait_for_output(&format!("held={PAGES} "));
    assert!(
        began.elapsed() >= Duration::from_millis(300),
        "{:?}",
        began.elapsed()
    );
    assert_ne!(client.counter().load(), valid_at);
    assert!(matches!(client.wait(PATIENCE), Err(ClientError::Closed)));
    let status = watched.status();
    assert_eq!(
        (&status["late"], &status["clients"]),
        (&json!(1), &json!([])),
        "{status:#}"
    );
    watched.finish();
}

#[test]
fn who_makes_no_sense_is_refused_and_the_vm_goes_on() {
    need!(tests::host::kvm());
    let watched = Watched::start("");
    let mut client = watched.client();
    for (range, cookie) in [
        (AddressRange::new(u64::MAX, 0), 1),
        (AddressRange::new(4096, 4095), 2),
    ] {
        let error = client.register(range, Cookie(cookie)).unwrap_err();
        assert_eq!(error.to_string(), "the range ends before it starts");
    }
    let mut random = Random::seeded();
    for _ in 0..100 {
        let mut stream = UnixStream::connect(&watched.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let bytes: Vec<u8> = (0..random.number() % 300)
            .map(|_| random.number() as u8)
            .collect();
        // It may be closed by then.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    // Who registers without end.
    let mut refused = None;
    for cookie in 0..1 << 20 {
        if let Err(error) = client.register(page(cookie % RAM), Cookie(cookie)) {
            refused = Some((cookie, error.to_string()));
            break;
        }
    }
    let (count, said) = refused.unwrap();
    assert_eq!(count, 65_536);
    assert_eq!(said, "65536 ranges are registered, and a client can have no more");
    drop(client);
    // And connects without end.
    let clients: Vec<_> = (0..40)
        .map(|_| Client::connect(&watched.socket, ClientOptions::default()))
        .collect();
    let error = clients.into_iter().find_map(Result::err).unwrap();
    assert_eq!(
        error.to_string(),
        "32 clients are served, and there can be no more"
    );
    watched.resize(50);
    watched.vm.wait_for_output("held=50 ");
    watched.finish();
}

/// A VM that goes into a file has no RAM any more that anybody could use.
#[test]
fn the_end_of_a_vm_in_a_snapshot_is_told_as_a_change_of_all_ram() {
    need!(tests::host::kvm());
    let watched = Watched::start("");
    let mut client = watched.acknowledging();
    client.register(page(5), Cookie(5)).unwrap();
    let scratch = Scratch::new();
    let mut events = watched.api.events();
    let path = scratch.path("snapshot");
    std::thread::scope(|scope| {
        let snapshot = scope.spawn(|| {
            let options = format!("destination_url=file:{},then=stop", path.display());
            watched.api.ctl(&["snapshot", &options])
        });
        assert!(client.wait(PATIENCE).unwrap());
        let (pages, begun) = read_all(&mut client);
        let [Notice::Begin { change }] = begun[..] else {
            panic!("{begun:?}");
        };
        assert_eq!(pages, BTreeSet::from([5]));
        assert_eq!(watched.api.state(), "paused");
        client.acknowledge(change).unwrap();
        snapshot.join().unwrap().assert_code(0);
    });
    let told = events.wait_for("invalidations", "changing");
    assert_eq!(told["properties"]["cause"], "switch-over");
    watched.vm.finish().assert_code(0);
    assert!(!watched.socket.exists());
    // There may be the end of the change to be read, and then nobody.
    let began = Instant::now();
    while client.read(10).is_ok() {
        assert!(began.elapsed() < PATIENCE);
    }
    assert!(matches!(client.wait(PATIENCE), Err(ClientError::Closed)));
}

#[test]
fn ctl_shows_who_watches_and_follows_what_is_told() {
    need!(tests::host::kvm());
    let watched = Watched::start("");
    let mut client = watched.client();
    client
        .register(AddressRange::new(0x1000, 0x3000), Cookie(0xbeef))
        .unwrap();
    let shown = watched.api.ctl(&["invalidations"]);
    shown.assert_code(0);
    assert!(shown.stdout.contains("0 changes, 0 of them"), "{}", shown.stdout);
    assert!(
        shown
            .stdout
            .contains(&format!("process {}: 1 ranges", std::process::id()))
    );
    assert!(
        shown.stdout.contains("0x1000-0x3000 cookie 0xbeef"),
        "{}",
        shown.stdout
    );
    let shown = watched.api.ctl(&["--json", "invalidations"]);
    assert_is("Invalidations", &serde_json::from_str(&shown.stdout).unwrap());
    let follow = |socket: &Path| {
        tests::program::Program::umem(["ctl", "--json", "--api-socket"])
            .arg(socket)
            .args(["invalidations", "--follow"])
            .start()
    };
    let following = follow(watched.api.socket());
    // It listens some time after it has begun: until then, more is done.
    let mut held = 0;
    following.wait_until("something is told", |following| {
        held = held % 600 + 1;
        watched.resize(held);
        watched.vm.wait_for_output(&format!("held={held} "));
        !following.stdout().is_empty()
    });
    watched.finish();
    let followed = following.finish();
    followed.assert_code(0);
    for line in followed.stdout.lines() {
        let told = event(line);
        assert_eq!(told["source"], "invalidations");
        assert_eq!(told["properties"]["cause"], "balloon");
        assert!(told["properties"]["bytes"].as_u64().unwrap() >= PAGE_SIZE);
    }
}

#[test]
fn a_socket_that_cannot_be_is_a_matter_of_what_was_asked_for() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let file = scratch.file("file", b"precious");
    for (options, words) in [
        (format!("socket={}", file.display()), "is no socket"),
        ("acknowledge-within=1s".to_owned(), "socket"),
        ("socket=x,acknowledge-within=6s".to_owned(), "at most 5 s"),
        ("socket=x,limit=6s".to_owned(), "limit"),
    ] {
        let vm = Vm::with_memory("64M").option("--invalidations", &options).run();
        vm.assert_code(2);
        assert!(vm.stderr.contains(words), "{options}: {}", vm.stderr);
    }
    let vm = Vm::with_memory("64M").command_line("workload=dirty pages=10 rounds=forever");
    let (vm, api) = Api::start_until(vm, "round=1 ");
    api.ask("GET", "/api/v1/vm.invalidations", b"")
        .assert_error(409, &["--invalidations"]);
    let shown = api.ctl(&["invalidations", "--follow"]);
    shown.assert_code(1);
    api.shutdown();
    vm.finish();
}
