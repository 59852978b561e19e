//! The control API: what it does to a VM, and that nothing that a client does disturbs the VM or another client.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use tests::api::{Api, Reply, assert_is, routes};
use tests::need;
use tests::program::{Program, Running};
use tests::random::Random;
use tests::scratch::Scratch;
use tests::served::{MARGIN, SEED};
use tests::terminal::Terminal;
use tests::vm::{FinishedVm, RunningVm, Vm};

/// A guest that goes on for ever, checks what it wrote, and says each round.
fn busy() -> Vm {
    Vm::with_memory("64M")
        .cpus(2)
        .command_line("workload=dirty pages=64 rounds=forever")
}

/// A VM in the middle of its work: standing, so that it is still there whatever takes how long.
fn paused_in_the_middle(scratch: &Scratch) -> (RunningVm, Api) {
    let image = scratch.fingerprinted("64M", SEED, "order=random");
    let (vm, api) = Api::start(Vm::from_image(&image).cpus(2).memory("source-delay=100us"));
    vm.wait_until("it can be paused", |_| {
        let reply = api.ask("PUT", "/api/v1/vm.pause", b"");
        if reply.status != 204 {
            reply.assert_error(409, &["booting"]);
        }
        reply.status == 204
    });
    (vm, api)
}

/// It goes on, and every page that its guest verifies is right.
fn assert_ends_right(vm: RunningVm, api: &Api) {
    if api.state() == "paused" {
        api.resume();
    }
    assert_verified(&vm.finish());
}

#[track_caller]
fn assert_verified(vm: &FinishedVm) {
    vm.assert_ended_well();
    assert!(vm.line("verified=").contains(" wrong=0 "), "{}", vm.stdout);
}

fn lines(vm: &Running) -> usize {
    vm.stdout().lines().count()
}

#[test]
fn a_paused_guest_stands_still_and_then_goes_on() {
    need!(tests::host::kvm());
    let (vm, api) = Api::start_until(busy(), "round=2 ");
    assert_eq!(api.state(), "running");
    for _ in 0..10 {
        api.pause();
        // Each character that it says is among them.
        let before = api.counters();
        for _ in 0..50 {
            assert_eq!(api.state(), "paused");
        }
        assert_eq!(api.counters(), before, "something goes on");
        let said = lines(&vm);
        api.resume();
        assert_eq!(api.state(), "running");
        vm.wait_until("it goes on", |vm| lines(vm) > said + 1);
    }
    api.shutdown();
    let vm = vm.finish();
    vm.assert_code(0);
    assert_eq!(vm.report().text("/outcome"), "stopped");
}

#[test]
fn a_guest_that_is_paused_again_and_again_ends_right() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let (vm, api) = paused_in_the_middle(&scratch);
    let (mut random, mut paused) = (Random::seeded(), 0);
    for _ in 0..20 {
        api.resume();
        let moment = random.moment(Duration::from_millis(5));
        if vm.wait_for_exit(moment) {
            break;
        }
        match api.try_ask("PUT", "/api/v1/vm.pause", b"") {
            Ok(reply) if reply.status == 204 => paused += 1,
            // It was over.
            _ => break,
        }
    }
    assert!(paused > 0, "it was over at once");
    if !vm.wait_for_exit(Duration::ZERO) {
        // Or it ends by itself.
        let _ = api.try_ask("PUT", "/api/v1/vm.resume", b"");
    }
    assert_verified(&vm.finish());
}

#[test]
fn what_cannot_be_in_this_state_is_refused_with_the_reason() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let (vm, api) = paused_in_the_middle(&scratch);
    let again = api.ask("PUT", "/api/v1/vm.pause", b"{}");
    again.assert_error(409, &["paused already"]);
    api.resume();
    let reply = api.ask("PUT", "/api/v1/vm.resume", b"");
    // It may have become slow in the meantime, but not paused.
    reply.assert_error(409, &["cannot be resumed", "not paused"]);
    vm.finish().assert_ended_well();
}

#[test]
fn the_end_comes_in_every_state_and_is_heard_of() {
    need!(tests::host::kvm());
    for paused in [false, true] {
        let (vm, api) = Api::start_until(busy(), "round=2 ");
        if paused {
            api.pause();
        }
        api.shutdown();
        let vm = vm.finish();
        vm.assert_code(0);
        assert_eq!(vm.report().text("/outcome"), "stopped");
        assert!(!api.socket().exists(), "the socket's path stayed");
    }
}

/// What the manual promises of everything that is refused, for every route.
#[test]
fn nonsense_is_refused_on_every_route() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let (vm, api) = paused_in_the_middle(&scratch);
    let bodies: [(&[u8], &str); 9] = [
        (b"{", "EOF"),
        (b"nonsense", "expected"),
        (b"{} {}", "trailing"),
        (b"[]", "invalid type: sequence"),
        (b"\"text\"", "invalid type: string"),
        (b"17", "invalid type: integer"),
        (b"null", "invalid type: null"),
        (b"{\"no_such_field\": 1}", "no_such_field"),
        (b"{\"\xff\xfe\": 1}", "not understood"),
    ];
    let routes = routes();
    assert!(routes.len() >= 9, "{routes:?}");
    for (method, path) in &routes {
        for (body, word) in bodies {
            let reply = api.ask(method, path, body);
            reply.assert_error(400, &[word]);
        }
        for other in ["GET", "HEAD", "PUT", "POST", "PATCH", "DELETE", "OPTIONS", "BREW"] {
            // What can be had can be asked about.
            if other == method || (other, method.as_str()) == ("HEAD", "GET") {
                continue;
            }
            let reply = api.ask(other, path, b"");
            assert_eq!(reply.status, 405, "{other} {path}: {reply:?}");
            assert!(
                reply.head.contains(&format!("allow: {}", method.to_lowercase())),
                "{}",
                reply.head
            );
            if other != "HEAD" {
                reply.assert_error(405, &[other, path, method]);
            }
        }
        for other in [format!("{path}/"), format!("{path}x"), path.to_uppercase()] {
            api.ask(method, &other, b"").assert_error(404, &[&other]);
        }
    }
    for path in ["/", "/api", "/api/v2/vm.info", "/..", "//"] {
        api.ask("GET", path, b"").assert_error(404, &[path]);
    }
    assert_eq!(api.state(), "paused");
    assert_ends_right(vm, &api);
}

/// Far more than anything needs.
const BODY: usize = 100 << 20;

/// A body of 100 MB is refused without being read, whether it says how long it is or not.
#[test]
fn a_body_of_100_mb_is_refused_on_every_route() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let (vm, api) = paused_in_the_middle(&scratch);
    let resident = vm.status_kib("RssAnon").unwrap();
    for (method, path) in routes() {
        // Nothing of it is sent, and still there is an answer.
        let mut stream = api.connect();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {BODY}\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        Api::reply(stream).unwrap().assert_error(413, &["65536"]);
        // All of it is sent, by who does not listen meanwhile.
        let mut stream = api.connect();
        stream.write_all(head.as_bytes()).unwrap();
        let sent = send_until_refused(&mut stream, BODY, UnixStream::write_all);
        assert!(sent < BODY, "{path}: all of it was taken");
        Api::reply(stream).unwrap().assert_error(413, &["65536"]);
        // In chunks nobody knows what is still to come.
        let mut stream = api.connect();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        let sent = send_until_refused(&mut stream, BODY, |stream, part| {
            stream.write_all(format!("{:x}\r\n", part.len()).as_bytes())?;
            stream.write_all(part)?;
            stream.write_all(b"\r\n")
        });
        assert!(sent < BODY, "{path}: all of it was taken");
        Api::reply(stream).unwrap().assert_error(413, &["65536"]);
    }
    let grown = vm.status_kib("RssAnon").unwrap().saturating_sub(resident);
    assert!(grown < 16 << 10, "{grown} KiB were kept");
    assert_ends_right(vm, &api);
}

/// Sends `length` bytes or as many as are taken, and says how many that was.
fn send_until_refused(
    stream: &mut UnixStream,
    length: usize,
    send: impl Fn(&mut UnixStream, &[u8]) -> std::io::Result<()>,
) -> usize {
    let part = vec![b' '; 1 << 16];
    let mut sent = 0;
    while sent < length {
        match send(stream, &part) {
            Ok(()) => sent += part.len(),
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => break,
            Err(error) => panic!("{error}"),
        }
    }
    sent
}

/// What is no HTTP ends the connection, and nothing else.
#[test]
fn garbage_in_place_of_http_disturbs_nobody() {
    need!(tests::host::kvm());
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let (vm, api) = paused_in_the_middle(&scratch);
    let long_line = [b"GET /".as_slice(), &vec![b'x'; 1 << 20]].concat();
    let many_fields = [
        b"GET / HTTP/1.1\r\n".as_slice(),
        &b"x: y\r\n".repeat(10_000),
        b"\r\n",
    ]
    .concat();
    let mut said: Vec<Vec<u8>> = vec![
        b"\r\n\r\n\r\n".to_vec(),
        b"GET\r\n\r\n".to_vec(),
        b"PUT /api/v1/vm.pause HTTP/9.9\r\n\r\n".to_vec(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        b"PUT /api/v1/vm.resume HTTP/1.1\r\nContent-Length: -1\r\n\r\n".to_vec(),
        b"PUT /api/v1/vm.resume HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n".to_vec(),
        b"PUT /api/v1/vm.resume HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".to_vec(),
        long_line,
        many_fields,
    ];
    said.extend((0..50).map(|_| (0..random.below(4096)).map(|_| random.number() as u8).collect()));
    for bytes in said {
        let mut stream = api.connect();
        // It may be refused before it is read.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        match Api::reply(stream) {
            Ok(reply) => assert!((400..600).contains(&reply.status), "{reply:?} to {bytes:?}"),
            Err(error) => assert!(
                matches!(
                    error.kind(),
                    ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset
                ),
                "{error}"
            ),
        }
        assert_eq!(api.state(), "paused");
    }
    assert_ends_right(vm, &api);
}

/// Clients that begin something and say no more, in every way that there is.
fn hang(api: &Api, count: usize) -> Vec<UnixStream> {
    let beginnings: [&[u8]; 5] = [
        b"",
        b"GET /api/v1/vm.in",
        b"GET /api/v1/vm.info HTTP/1.1\r\nHost: x\r\n",
        b"PUT /api/v1/vm.pause HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{",
        // It reads nothing of what comes.
        b"GET /api/v1/vm.info HTTP/1.1\r\nHost: x\r\n\r\n",
    ];
    let mut hanging = Vec::new();
    for index in 0..count {
        let mut stream = api.connect();
        stream.write_all(beginnings[index % beginnings.len()]).unwrap();
        hanging.push(stream);
    }
    hanging
}

#[test]
fn clients_that_hang_hold_up_nobody() {
    need!(tests::host::kvm());
    let (vm, api) = Api::start_until(busy(), "round=2 ");
    // They are let go after ten seconds.
    let limit = Duration::from_secs(5);
    let hanging = hang(&api, 40);
    let deaf: Vec<_> = (0..10).map(|_| api.events()).collect();
    let begun = Instant::now();
    for _ in 0..20 {
        api.pause();
        assert_eq!(api.state(), "paused");
        api.resume();
    }
    let said = lines(&vm);
    vm.wait_until("the guest goes on", |vm| lines(vm) > said);
    assert!(begun.elapsed() < limit, "{:?}", begun.elapsed());
    assert_eq!(api.ctl(&["ping"]).code(), Some(0));
    api.shutdown();
    let ended = vm.wait_for_exit(MARGIN);
    assert!(ended, "the clients keep it\n{}", *vm);
    drop((hanging, deaf));
    let vm = vm.finish();
    vm.assert_code(0);
    assert_eq!(vm.report().text("/outcome"), "stopped");
}

/// More clients hang than there is room for: the next one is served when they are let go.
#[test]
fn more_clients_that_hang_than_there_is_room_for_are_let_go() {
    need!(tests::host::kvm());
    let (vm, api) = Api::start_until(busy(), "round=2 ");
    let mut hanging = hang(&api, 100);
    assert_eq!(api.state(), "running");
    let mut rest = Vec::new();
    // A request whose body does not come gets an answer first.
    for (index, stream) in hanging.iter_mut().enumerate().take(10) {
        rest.clear();
        let _ = stream.read_to_end(&mut rest);
        match index % 5 {
            3 => assert!(
                rest.starts_with(b"HTTP/1.1 408 "),
                "{}",
                String::from_utf8_lossy(&rest)
            ),
            4 => assert!(
                rest.starts_with(b"HTTP/1.1 200 "),
                "{}",
                String::from_utf8_lossy(&rest)
            ),
            _ => {}
        }
    }
    api.shutdown();
    vm.finish().assert_code(0);
}

/// Two clients want it paused and running, again and again: each is obeyed, or told why not.
#[test]
fn two_clients_at_once_get_what_can_be_or_a_reason() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let (vm, api) = paused_in_the_middle(&scratch);
    let ask = |path: &str| {
        let check = |reply: Reply| match reply.status {
            204 => 1,
            503 => {
                reply.assert_error(503, &["another request"]);
                0
            }
            _ => {
                reply.assert_error(409, &["pause"]);
                0
            }
        };
        (0..200).map(|_| check(api.ask("PUT", path, b""))).sum::<u32>()
    };
    let (paused, resumed) = thread::scope(|scope| {
        let resume = scope.spawn(|| ask("/api/v1/vm.resume"));
        let info = scope.spawn(|| (0..200).for_each(|_| drop(api.info())));
        let paused = ask("/api/v1/vm.pause");
        info.join().unwrap();
        (paused, resume.join().unwrap())
    });
    println!("paused {paused} times, resumed {resumed} times");
    // It was paused at first, and neither comes twice in a row.
    assert!(
        resumed >= 1 && resumed.abs_diff(paused) <= 1,
        "{paused} {resumed}"
    );
    assert_ends_right(vm, &api);
}

#[test]
fn the_socket_is_for_its_owner_and_goes_with_the_vm() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let socket = scratch.path("stale");
    drop(UnixListener::bind(&socket).unwrap());
    let vm = busy().option("--api-socket", &socket).start();
    vm.wait_for_output("round=2 ");
    assert_eq!(socket.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let other = busy().option("--api-socket", &socket).run();
    other.assert_error(2, &["is in use", "another process listens there"]);
    vm.signal(rustix::process::Signal::TERM);
    vm.finish().assert_code(0);
    assert!(!socket.exists());
    // The end of the guest is as good.
    let vm = Vm::with_memory("64M").option("--api-socket", &socket).run();
    vm.assert_ended_well();
    assert!(!socket.exists());
}

#[test]
fn a_socket_that_cannot_be_is_refused() {
    let scratch = Scratch::new();
    let file = scratch.file("file", b"precious");
    let no_socket = busy().option("--api-socket", &file).run();
    no_socket.assert_error(2, &["is no socket"]);
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    let nowhere = scratch.path("missing/api");
    let nowhere = busy().option("--api-socket", &nowhere).run();
    nowhere.assert_error(2, &["cannot listen", "No such file"]);
}

/// A guest goes on from its snapshot where it was, in the VM that it was made of and in another one.
#[test]
fn a_snapshot_is_made_and_restored() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let (vm, api) = Api::start_until(busy(), "round=2 ");
    let directory = scratch.path("snapshot");
    let option = format!("destination_url=file:{}", directory.display());
    let mut events = api.events();
    let made = api.ctl(&["snapshot", &option, "--json"]);
    made.assert_code(0);
    assert_eq!(made.stderr, "", "nothing is shown where there is no terminal");
    let made: serde_json::Value = serde_json::from_str(&made.stdout).unwrap();
    assert_is("Snapshot", &made);
    assert_eq!(made["pages"], 64 * 256);
    let progress = events.wait_for("snapshot", "progress");
    assert_eq!(progress["properties"]["total"], 64 << 20);
    assert_eq!(api.state(), "running");
    let said = lines(&vm);
    vm.wait_until("it goes on", |vm| lines(vm) > said);
    // Another, of what has changed since.
    let above = scratch.path("above");
    let layer = format!(
        "destination_url=file:{},base_url=file:{}",
        above.display(),
        directory.display()
    );
    let layer = api.ctl(&["snapshot", &layer, "--json"]);
    layer.assert_code(0);
    let layer: serde_json::Value = serde_json::from_str(&layer.stdout).unwrap();
    assert_is("Snapshot", &layer);
    assert_eq!(made["own_pages"], made["pages"]);
    let own = layer["own_pages"].as_u64().unwrap();
    assert!(own > 0 && own < 64 * 256 / 2, "{layer}");
    Program::umem(["image", "verify"])
        .arg(above.join("snapshot.img"))
        .run()
        .assert_code(0);
    // Once more, elsewhere, and that is the end of it; on a terminal a bar shows how far it is.
    let terminal = Terminal::new();
    let last_one = scratch.path("last");
    let shown = Program::umem(["ctl", "--api-socket"])
        .arg(api.socket())
        .args([
            "snapshot",
            &format!("destination_url=file:{},then=stop", last_one.display()),
        ])
        .on_terminal(&terminal.device)
        .run();
    shown.assert_code(0);
    let vm = vm.finish();
    vm.assert_code(0);
    assert_eq!(vm.report().text("/outcome"), "stopped");
    assert!(
        terminal.screen().contains("pages hold something"),
        "{}",
        terminal.screen()
    );
    assert!(terminal.screen().contains("64.00 MiB"), "{}", terminal.screen());
    let last = vm
        .stdout
        .lines()
        .filter(|line| line.starts_with("round="))
        .count();
    let (vm, api) = Api::start(Vm::default().option("--snapshot", &last_one));
    vm.wait_until("it goes on", |vm| lines(vm) > 2);
    assert!(
        last > 2 && !vm.stdout().contains("round=1 "),
        "it began anew: {}",
        vm.stdout()
    );
    api.shutdown();
    vm.finish().assert_code(0);
}

/// A snapshot that cannot be has a reason, and the VM goes on.
#[test]
fn a_snapshot_that_cannot_be_made_is_refused_with_the_reason() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let (vm, api) = paused_in_the_middle(&scratch);
    let file = scratch.file("file", b"precious");
    for (body, status, word) in [
        ("{}".to_owned(), 400, "destination_url"),
        ("{\"destination_url\": 7}".into(), 400, "invalid type: integer"),
        (
            "{\"destination_url\": \"file:relative\"}".into(),
            400,
            "file:relative",
        ),
        (
            "{\"destination_url\": \"tcp:127.0.0.1:1\"}".into(),
            400,
            "tcp:127.0.0.1:1",
        ),
        (
            "{\"destination_url\": \"file:/x\", \"then\": \"fly\"}".into(),
            400,
            "fly",
        ),
        (
            "{\"destination_url\": \"file:/x\", \"base\": \"y\"}".into(),
            400,
            "unknown field",
        ),
        (
            format!("{{\"destination_url\": \"file:{}\"}}", file.display()),
            500,
            "directory",
        ),
        (
            "{\"destination_url\": \"file:/dev/null/x\"}".into(),
            500,
            "/dev/null/x",
        ),
    ] {
        let reply = api.ask("PUT", "/api/v1/vm.snapshot", body.as_bytes());
        reply.assert_error(status, &[word]);
        assert_eq!(api.state(), "paused");
    }
    api.ctl(&["snapshot", "destination_url=tcp:x"])
        .assert_error(2, &["expected file:DIR"]);
    api.ctl(&["snapshot", "to=x"])
        .assert_error(2, &["unknown key 'to'"]);
    api.ctl(&["snapshot", "destination_url=file:/dev/null/x"])
        .assert_error(1, &["/dev/null/x"]);
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    // A paused one stays so.
    let directory = scratch.path("snapshot");
    let made = api.ctl(&[
        "snapshot",
        &format!("destination_url=file:{}", directory.display()),
    ]);
    made.assert_code(0);
    assert!(made.stdout.contains("snapshot.img: "), "{made}");
    assert_eq!(api.state(), "paused");
    assert_ends_right(vm, &api);
}

#[test]
fn metrics_say_what_info_says() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let (vm, api) = paused_in_the_middle(&scratch);
    let (info, counters) = (api.info(), api.counters());
    let reply = api.ask("GET", "/metrics", b"");
    assert_eq!(reply.status, 200);
    assert!(
        reply.head.contains("content-type: application/openmetrics-text"),
        "{}",
        reply.head
    );
    let text = String::from_utf8(reply.body).unwrap();
    assert!(text.ends_with("# EOF\n"), "{text}");
    let value = |name: &str| -> u64 {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(&format!("{name} ")));
        let line = line.unwrap_or_else(|| panic!("no {name} in {text}"));
        line.parse().unwrap()
    };
    assert_eq!(value("umem_vm_state{state=\"paused\"}"), 1);
    assert_eq!(value("umem_vm_state{state=\"running\"}"), 0);
    assert_eq!(value("umem_vm_vcpus"), 2);
    for (state, key) in [
        ("absent", "absent"),
        ("in-flight", "in_flight"),
        ("present", "present"),
        ("removed", "removed"),
    ] {
        assert_eq!(
            value(&format!("umem_vm_pages{{state=\"{state}\"}}")),
            info["pages"][key],
            "{state}"
        );
    }
    for way in ["demand", "prefetched", "pushed", "zero"] {
        let arrived = value(&format!("umem_vm_pages_arrived_total{{arrival=\"{way}\"}}"));
        assert_eq!(arrived, info["pages"][way], "{way}");
        assert_eq!(arrived, counters["pages"][way], "{way}");
    }
    assert_eq!(value("umem_vm_source_bytes_total"), info["source"]["bytes"]);
    assert_eq!(value("umem_vm_source_requests_total"), info["source"]["requests"]);
    assert_eq!(value("umem_vm_source_reconnects_total"), 0);
    for (reason, count) in counters["exits"].as_object().unwrap() {
        assert_eq!(
            value(&format!("umem_vm_vcpu_exits_total{{reason=\"{reason}\"}}")),
            *count
        );
    }
    let faults: u64 = counters["faults"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(class, count)| {
            let all = value(&format!("umem_vm_fault_seconds_count{{class=\"{class}\"}}"));
            assert_eq!(all, *count, "{class}");
            let infinite = value(&format!(
                "umem_vm_fault_seconds_bucket{{le=\"+Inf\",class=\"{class}\"}}"
            ));
            assert_eq!(infinite, all, "{class}");
            all
        })
        .sum();
    assert!(faults > 0);
    assert_eq!(info["demand_fault_us"]["count"], faults);
    let pages = &info["pages"];
    let sum: u64 = ["absent", "in_flight", "present", "removed"]
        .iter()
        .map(|state| pages[state].as_u64().unwrap())
        .sum();
    assert_eq!(pages["total"], sum);
    assert_ends_right(vm, &api);
}

#[test]
fn the_client_prints_for_people_and_for_programs() {
    need!(tests::host::kvm());
    let (vm, api) = Api::start_until(busy(), "round=2 ");
    let ctl = |args: &[&str], text: &str| {
        let finished = api.ctl(args);
        finished.assert_code(0);
        assert_eq!(finished.stderr, "", "{finished}");
        assert!(finished.stdout.contains(text), "no '{text}': {finished}");
        finished.stdout.clone()
    };
    let json = |args: &[&str]| -> serde_json::Value { serde_json::from_str(&ctl(args, "{")).unwrap() };
    ctl(&["ping"], &format!("process {}\n", vm.pid()));
    assert_is("Ping", &json(&["ping", "--json"]));
    let info = ctl(&["info"], "state          running\n");
    for word in [
        "vCPUs          2\n",
        "64.00 MiB",
        " present, ",
        "p99 ",
        "first instr.",
    ] {
        assert!(info.contains(word), "no '{word}' in {info}");
    }
    assert_is("Info", &json(&["--json", "info"]));
    ctl(&["counters"], "exits.port-write");
    assert_is("Counters", &json(&["counters", "--json"]));
    ctl(&["pause"], "paused\n");
    ctl(&["info"], "state          paused\n");
    api.ctl(&["pause"]).assert_error(1, &["paused already"]);
    assert_eq!(json(&["resume", "--json"]), serde_json::json!({}));
    api.ctl(&["resume"])
        .assert_error(1, &["cannot be resumed", "it is running"]);
    ctl(&["shutdown"], "stopping\n");
    vm.finish().assert_code(0);
}

#[test]
fn the_client_says_whom_it_did_not_reach() {
    let scratch = Scratch::new();
    let ctl = |name: &str, verb: &str| {
        Program::umem(["ctl", "--api-socket"])
            .arg(scratch.path(name))
            .arg(verb)
            .run()
    };
    ctl("missing", "info").assert_error(1, &["no VM answers", "missing", "No such file"]);
    drop(UnixListener::bind(scratch.path("stale")).unwrap());
    ctl("stale", "pause").assert_error(1, &["no VM answers", "stale", "refused"]);
    scratch.file("file", b"");
    ctl("file", "ping").assert_error(1, &["no VM answers", "file"]);
    ctl("stale", "no-such-verb").assert_error(2, &["no-such-verb"]);
    Program::umem(["ctl", "info"])
        .run()
        .assert_error(2, &["--api-socket"]);
    for (name, answer) in [
        ("closes", b"".as_slice()),
        ("talks", b"220 mail.example.org ESMTP\r\n"),
        (
            "web",
            b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 4\r\n\r\n<p>!",
        ),
        (
            "breaks",
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{",
        ),
        (
            "other",
            b"HTTP/1.1 500 Oops\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
        ),
    ] {
        let listener = UnixListener::bind(scratch.path(name)).unwrap();
        let finished = thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 1024];
                assert!(stream.read(&mut request).unwrap() > 0);
                stream.write_all(answer).unwrap();
            });
            ctl(name, "info")
        });
        finished.assert_error(1, &[name]);
    }
}
