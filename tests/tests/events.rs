//! Events, in a file and as a stream: what becomes of a VM, in order and as it happens.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use tests::api::{Api, event};
use tests::need;
use tests::program::{Program, umem};
use tests::scratch::Scratch;
use tests::served::{SEED, assert_right, served, socket};
use tests::server::Server;
use tests::terminal::Terminal;
use tests::vm::Vm;

/// A VM that writes its events to a file.
fn monitored(vm: Vm, path: &Path) -> Vm {
    vm.option("--event-monitor", format!("path={}", path.display()))
}

/// The events in a file, which are in the order of their times.
#[track_caller]
fn read(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.ends_with('\n'), "{text}");
    let events: Vec<Value> = text.lines().map(event).collect();
    let times: Vec<_> = events
        .iter()
        .map(|event| {
            let part = |name: &str| event["timestamp"][name].as_u64().unwrap();
            (part("secs"), part("nanos"))
        })
        .collect();
    assert!(times.is_sorted(), "{text}");
    events
}

/// Source and name of each, without those whose number nobody knows.
fn names(events: &[Value]) -> Vec<String> {
    let name = |event: &Value| {
        format!(
            "{} {}",
            event["source"].as_str().unwrap(),
            event["event"].as_str().unwrap()
        )
    };
    events
        .iter()
        .map(name)
        .filter(|name| name != "memory fill-progress" && name != "vm waiting-for-pages")
        .collect()
}

fn of<'a>(events: &'a [Value], source: &'a str, name: &'a str) -> impl Iterator<Item = &'a Value> {
    events
        .iter()
        .filter(move |event| event["source"] == source && event["event"] == name)
}

#[test]
fn a_run_from_its_beginning_to_its_end() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let path = scratch.path("events");
    monitored(Vm::with_memory("64M"), &path).run().assert_ended_well();
    let events = read(&path);
    assert_eq!(names(&events), ["vm running", "vm stopped", "guest exit"]);
    assert_eq!(events[0]["properties"]["previous"], "booting");
    let exit = &events[2]["properties"];
    assert_eq!(
        (&exit["outcome"], &exit["code"]),
        (&"guest-exit".into(), &0.into())
    );
    // The next one is added.
    let failing = Vm::with_memory("64M").command_line("workload=no-such-workload");
    let failing = monitored(failing, &path).run();
    let events = read_appended(&path, events.len());
    assert_eq!(names(&events), ["vm running", "vm stopped", "guest exit"]);
    let exit = &events[2]["properties"];
    assert_eq!(exit["code"], failing.report().count("/guest_exit"));
    assert_eq!(exit["error"], failing.report().text("/error"));
}

/// The events that a second VM added; its times begin anew.
#[track_caller]
fn read_appended(path: &Path, before: usize) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().skip(before).map(event).collect()
}

#[test]
fn a_vm_that_never_was_says_so() {
    let scratch = Scratch::new();
    let path = scratch.path("events");
    let vm = monitored(Vm::from_image(&scratch.path("missing")), &path).run();
    vm.assert_error(2, &["missing"]);
    let events = read(&path);
    assert_eq!(names(&events), ["vmm exit"]);
    assert_eq!(events[0]["properties"]["outcome"], "error");
}

#[test]
fn a_fill_is_told_in_steps_and_its_end_once() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("64M", SEED, "order=random");
    for fill in ["sequential", "near-faults"] {
        let path = scratch.path(fill);
        // Slow enough for all steps to be seen.
        let vm = Vm::from_image(&image).memory(&format!("fill={fill},source-delay=20ms"));
        let (vm, api) = Api::start(monitored(vm, &path));
        let mut stream = api.events();
        let present = stream.wait_for("memory", "all-pages-present");
        assert_eq!(present["properties"]["total"], 64 * 256);
        let info = api.info();
        assert_eq!(info["pages"]["present"], 64 * 256, "{info}");
        assert!(info["time_to_all_pages_ms"].is_number(), "{info}");
        vm.finish().assert_ended_well();
        let events = read(&path);
        assert_eq!(of(&events, "memory", "all-pages-present").count(), 1);
        let steps: Vec<u64> = of(&events, "memory", "fill-progress")
            .map(|event| {
                assert_eq!(event["properties"]["total"], 64 * 256);
                event["properties"]["pages"].as_u64().unwrap()
            })
            .collect();
        println!("fill={fill}: {steps:?}");
        assert!((2..=10).contains(&steps.len()) && steps.is_sorted(), "{steps:?}");
        let last = events
            .iter()
            .rposition(|event| event["event"] == "fill-progress")
            .unwrap();
        let end = events
            .iter()
            .position(|event| event["event"] == "all-pages-present")
            .unwrap();
        assert!(last < end, "there is progress after the end: {events:#?}");
    }
}

#[test]
fn pause_resume_and_shutdown_are_told_to_the_file_and_to_all_clients() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let path = scratch.path("events");
    let vm = Vm::with_memory("64M").command_line("workload=dirty pages=16 rounds=forever");
    let (vm, api) = Api::start_until(monitored(vm, &path), "round=2 ");
    let streams = [api.events(), api.events()];
    api.pause();
    api.resume();
    api.pause();
    api.shutdown();
    let expected = ["vm paused", "vm running", "vm paused", "vm stopped", "vmm exit"];
    for stream in streams {
        let heard: Vec<Value> = stream.collect();
        assert_eq!(names(&heard), expected);
    }
    vm.finish().assert_code(0);
    let events = read(&path);
    assert_eq!(names(&events)[0], "vm running");
    assert_eq!(names(&events)[1..], expected);
    let before: Vec<_> = events[1..4]
        .iter()
        .map(|event| event["properties"]["previous"].as_str().unwrap())
        .collect();
    assert_eq!(before, ["running", "paused", "running"]);
    assert_eq!(events.last().unwrap()["properties"]["outcome"], "stopped");
}

/// On a terminal a bar shows how much is loaded; not on one that is the guest's.
#[test]
fn a_bar_shows_the_fill_where_the_terminal_is_free() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("64M", SEED, "order=random");
    let memory = format!(
        "source=file:{},fill=sequential,source-delay=20ms",
        image.display()
    );
    let (free, owned) = (Terminal::new(), Terminal::new());
    let script = "exec \"$0\" run --memory \"$1\" </dev/null >\"$2\"";
    let output = scratch.path("output");
    let shown = Program::new("sh")
        .args(["-c", script])
        .arg(umem())
        .arg(&memory)
        .arg(&output)
        .on_terminal(&free.device)
        .run();
    shown.assert_code(0);
    assert!(std::fs::read_to_string(&output).unwrap().contains("result=ok"));
    assert!(free.screen().contains("loading"), "{}", free.screen());
    assert!(free.screen().contains("/64.00 MiB"), "{}", free.screen());
    let hidden = Program::umem(["run", "--memory", &memory])
        .on_terminal(&owned.device)
        .run();
    hidden.assert_code(0);
    assert!(owned.screen().contains("result=ok"), "{}", owned.screen());
    assert!(!owned.screen().contains("loading"), "{}", owned.screen());
}

/// The source goes and comes back: that is told, and that the VM waits for it is seen.
#[test]
fn a_page_server_that_goes_and_comes_back_is_told_of() {
    need!(tests::host::kvm());
    assert_told_of_a_server_that_comes_back("fill=off");
}

/// By way of what makes its pages late.
#[test]
fn a_page_server_that_is_made_slow_is_told_of_too() {
    need!(tests::host::kvm());
    assert_told_of_a_server_that_comes_back("source-delay=1us");
}

fn assert_told_of_a_server_that_comes_back(memory: &str) {
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("256M", SEED, "order=random");
    let listen = socket(&scratch);
    let waited = (0..10).any(|round| {
        let path = scratch.path(&format!("events{round}"));
        let server = Server::start(&listen, &[("base", &image)]);
        let url = server.url().to_owned();
        let (vm, api) = Api::start(monitored(served(&[&url]).memory(memory).cpus(2), &path));
        let mut stream = api.events();
        vm.wait_until("pages arrive", |_| {
            api.info()["pages"]["present"]
                .as_u64()
                .is_some_and(|present| present > 2048)
        });
        server.kill();
        if vm.wait_for_exit(Duration::ZERO) {
            return false;
        }
        let lost = stream.wait_for("page-source", "lost");
        assert_eq!(lost["properties"]["url"], url.as_str());
        let why = lost["properties"]["error"].as_str().unwrap();
        assert!(why.contains("connection"), "{why}");
        let waiting = stream.wait_for("vm", "waiting-for-pages");
        assert_eq!(waiting["properties"]["previous"], "running");
        assert_eq!(api.state(), "waiting-for-pages");
        // It can be asked anything.
        let text = api.ctl(&["info"]);
        assert!(
            text.stdout.starts_with("state          waiting-for-pages\n"),
            "{text}"
        );
        let server = Server::start(&listen, &[("base", &image)]);
        // The source is back with its last connection; the guest may run with the first.
        let mut ends: Vec<_> = stream
            .by_ref()
            .filter(|event| event["event"] == "back" || event["event"] == "running")
            .take(2)
            .collect();
        ends.sort_by_key(|event| event["source"].to_string());
        let [back, running] = &ends[..] else {
            panic!("{ends:?}");
        };
        assert!(back["properties"]["lost_ms"].as_f64().unwrap() >= 900.0, "{back}");
        assert_eq!(running["properties"]["previous"], "waiting-for-pages");
        let vm = vm.finish();
        assert_right(&vm, 256);
        server.stop();
        let events = read(&path);
        assert_eq!(
            of(&events, "page-source", "lost").count(),
            of(&events, "page-source", "back").count()
        );
        true
    });
    assert!(waited, "the server was killed too late each time");
}

/// A source that is lost for good ends the VM, which says why.
#[test]
fn a_source_that_is_lost_for_good_is_the_last_to_be_told() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("256M", SEED, "order=random");
    let lost = (0..10).any(|round| {
        let path = scratch.path(&format!("events{round}"));
        let server = Server::start(&socket(&scratch), &[("base", &image)]);
        let vm = Vm::default().memory(&format!("source={},source-timeout=1s", server.url()));
        let (vm, api) = Api::start(monitored(vm, &path));
        vm.wait_until("pages arrive", |_| {
            api.info()["pages"]["present"]
                .as_u64()
                .is_some_and(|present| present > 2048)
        });
        server.kill();
        let vm = vm.finish();
        if vm.code() == Some(0) {
            return false;
        }
        vm.assert_code(4);
        let events = read(&path);
        let told = names(&events);
        assert_eq!(told.first().map(String::as_str), Some("vm running"));
        assert_eq!(
            told[told.len() - 3..],
            ["page-source lost", "vm stopped", "vmm exit"],
            "{events:#?}"
        );
        let exit = &events.last().unwrap()["properties"];
        assert_eq!(exit["outcome"], "source-lost");
        assert_eq!(exit["error"], vm.report().text("/error"));
        true
    });
    assert!(lost, "the server was killed too late each time");
}

/// Whoever reads a pipe late, or never, holds up nobody.
#[test]
fn a_pipe_that_nobody_reads_holds_up_nobody() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let pipe = scratch.path("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    monitored(Vm::with_memory("64M"), &pipe).run().assert_ended_well();
    let vm = Vm::with_memory("64M").command_line("workload=dirty pages=16 rounds=forever");
    let (vm, api) = Api::start_until(monitored(vm, &pipe), "round=2 ");
    api.pause();
    let mut lines = BufReader::new(File::open(&pipe).unwrap()).lines();
    let mut next = || event(&lines.next().unwrap().unwrap());
    assert_eq!(next()["event"], "running");
    assert_eq!(next()["event"], "paused");
    api.shutdown();
    assert_eq!(next()["event"], "stopped");
    assert_eq!(next()["event"], "exit");
    vm.finish().assert_code(0);
}

/// A client that does not read misses events and is told how many; nobody else notices.
#[test]
fn a_client_that_reads_too_slowly_is_told_what_it_missed() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let path = scratch.path("events");
    let vm = Vm::with_memory("64M").command_line("workload=dirty pages=16 rounds=forever");
    let (vm, api) = Api::start_until(monitored(vm, &path), "round=2 ");
    let slow = api.events();
    // More than the socket and the backlog hold.
    for _ in 0..4000 {
        api.pause();
        api.resume();
    }
    api.shutdown();
    let heard: Vec<Value> = slow.collect();
    vm.finish().assert_code(0);
    let missed: u64 = of(&heard, "events", "missed")
        .map(|event| event["properties"]["count"].as_u64().unwrap())
        .sum();
    let heard = heard.len() - of(&heard, "events", "missed").count();
    println!("heard {heard}, missed {missed}");
    let written = read(&path);
    assert_eq!(
        of(&written, "events", "missed").count(),
        0,
        "the file misses something"
    );
    assert!(missed > 0, "there is room for more than is thought");
    // The file has one more: that it runs, which was before.
    assert_eq!(heard as u64 + missed, written.len() as u64 - 1);
}

#[test]
fn where_events_cannot_go_is_said_at_once() {
    let scratch = Scratch::new();
    let run = |option: &str| Vm::with_memory("64M").option("--event-monitor", option).run();
    run("events").assert_error(2, &["--event-monitor", "path=FILE"]);
    run("file=events").assert_error(2, &["--event-monitor", "unknown key 'file'"]);
    let missing = format!("path={}", scratch.path("missing/events").display());
    run(&missing).assert_error(2, &["cannot write events", "No such file"]);
    let directory = format!("path={}", scratch.directory().display());
    run(&directory).assert_error(2, &["cannot write events"]);
}

/// A full disk loses events, and is warned of; the guest ends as well as ever.
#[test]
fn a_full_disk_takes_no_events_and_ends_no_vm() {
    need!(tests::host::kvm());
    let vm = monitored(Vm::with_memory("64M"), Path::new("/dev/full")).run();
    vm.assert_code(0);
    vm.line("result=ok");
    assert!(vm.stderr.contains("no more events are written"), "{}", vm.stderr);
}
