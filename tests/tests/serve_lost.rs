//! Page servers that are lost: killed, stopped, gone for good, come back as they were or with another image.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tests::need;
use tests::proxy::{Plan, Proxy};
use tests::random::{Random, rounds};
use tests::scratch::Scratch;
use tests::served::{
    FILLS, MARGIN, SEED, assert_right, assert_right_and_quiet, assert_source_lost, served, socket,
    wait_for_ram,
};
use tests::server::Server;
use tests::vm::{FinishedVm, RunningVm, Vm};

/// Kills the server of a running VM at moments that nobody chose, and starts it again, for as long as the VM runs but no more
/// than this many times. Answers how often.
fn kill_and_restart(vm: &RunningVm, mut server: Server, image: &Path, random: &mut Random) -> u32 {
    const MOST: u32 = 6;
    for kills in 0..MOST {
        let (moment, pause) = (
            random.moment(Duration::from_millis(150)),
            random.moment(Duration::from_millis(50)),
        );
        println!("killed after {moment:?}, started again after {pause:?}");
        if vm.wait_for_exit(moment) {
            return kills;
        }
        let url = server.url().to_owned();
        server.kill();
        vm.wait_for_exit(pause);
        server = Server::start(&url, &[("base", image)]);
    }
    // It is there for as long as the VM runs.
    vm.wait_until("it ends", |vm| vm.wait_for_exit(Duration::from_millis(100)));
    server.stop();
    MOST
}

fn survives_kills(listen: impl Fn(&Scratch) -> String) {
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("128M", SEED, "order=random");
    for fill in FILLS {
        // All of it may have been loaded before this test gets to run again.
        let in_time = (0..10).any(|_| {
            let server = Server::start(&listen(&scratch), &[("base", &image)]);
            let vm = served(&[server.url()])
                .memory(&format!("fill={fill}"))
                .cpus(2)
                .start();
            wait_for_ram(&vm, 4);
            let kills = kill_and_restart(&vm, server, &image, &mut random);
            let vm = vm.finish();
            assert_right(&vm, 128);
            let reconnects = vm.report().count("/source/reconnects");
            println!("fill={fill}: killed {kills} times, connected anew {reconnects} times");
            kills > 1 && reconnects > 1
        });
        assert!(in_time, "fill={fill}: every moment was too late");
    }
}

#[test]
fn a_server_killed_and_restarted_at_any_moment_over_unix_sockets() {
    need!(tests::host::kvm());
    survives_kills(socket);
}

#[test]
fn a_server_killed_and_restarted_at_any_moment_over_tcp() {
    need!(tests::host::kvm());
    survives_kills(|_| "tcp:127.0.0.1:0".to_owned());
}

/// An orderly end of the server is no worse for a VM than any other.
#[test]
fn a_server_stopped_and_restarted_while_a_vm_runs() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("128M", SEED, "order=random");
    for fill in FILLS {
        let in_time = (0..10).any(|_| {
            let server = Server::start(&socket(&scratch), &[("base", &image)]);
            let vm = served(&[server.url()]).memory(&format!("fill={fill}")).start();
            wait_for_ram(&vm, 8);
            let url = server.url().to_owned();
            let first = server.stop();
            assert!(first.count("pages") > 0, "{first}");
            let server = Server::start(&url, &[("base", &image)]);
            let vm = vm.finish();
            assert_right(&vm, 128);
            let second = server.stop();
            vm.report().count("/source/reconnects") > 0 && second.count("pages") > 0
        });
        assert!(in_time, "fill={fill}: every moment was too late");
    }
}

/// Runs a VM whose server is killed for good when this much is loaded. `None`: that was too late.
fn server_gone_for_good(listen: &str, image: &Path, fill: &str) -> Option<(FinishedVm, String, Duration)> {
    let server = Server::start(listen, &[("base", image)]);
    let url = server.url().to_owned();
    let vm = Vm::default()
        .memory(&format!("source={url},source-timeout=1s,fill={fill}"))
        .cpus(2)
        .start();
    wait_for_ram(&vm, 8);
    server.kill();
    let since = Instant::now();
    let vm = vm.finish();
    let elapsed = since.elapsed();
    if vm.code() == Some(0) {
        assert_right(&vm, 256);
        return None;
    }
    Some((vm, url, elapsed))
}

#[test]
fn a_server_that_is_gone_for_good_ends_the_vm_in_time() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("256M", SEED, "order=random");
    for listen in [socket(&scratch).as_str(), "tcp:127.0.0.1:0"] {
        for fill in FILLS {
            let (vm, url, elapsed) = (0..10)
                .find_map(|_| server_gone_for_good(listen, &image, fill))
                .expect("the server was killed too late each time");
            assert_source_lost(&vm, &[&url, "no page server was reached"]);
            assert!(
                elapsed >= Duration::from_millis(900) && elapsed < Duration::from_secs(1) + MARGIN,
                "{listen}, fill={fill}: {elapsed:?}"
            );
        }
    }
}

/// Who waits for nothing needs no server.
#[test]
fn a_vm_that_has_all_its_pages_outlives_its_server() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("16M", SEED, "");
    // When it has all pages is told to nobody before its end.
    let outlived = (0..10).any(|_| outlives_its_server(&socket(&scratch), &image));
    assert!(outlived, "the server was killed too early each time");
}

fn outlives_its_server(listen: &str, image: &Path) -> bool {
    let server = Server::start(listen, &[("base", image)]);
    let timeout = Duration::from_millis(200);
    let vm = Vm::default()
        .memory(&format!(
            "source={},source-timeout={}ms,fill=sequential",
            server.url(),
            timeout.as_millis()
        ))
        .command_line("workload=dirty pages=16 rounds=forever")
        .start();
    // Nearly all that holds something.
    wait_for_ram(&vm, 12);
    vm.wait_for_output("round=3 ");
    server.kill();
    let (since, rounds) = (Instant::now(), vm.stdout().lines().count());
    vm.wait_until("the guest goes on", |vm| {
        vm.wait_for_exit(Duration::ZERO)
            || since.elapsed() > 5 * timeout && vm.stdout().lines().count() > rounds + 10
    });
    if !vm.wait_for_exit(Duration::ZERO) {
        vm.signal(Signal::TERM);
    }
    let vm = vm.finish();
    if vm.code() == Some(4) {
        return false;
    }
    vm.assert_code(0);
    assert_eq!(vm.report().text("/outcome"), "stopped");
    true
}

/// A VM that waits for its server can be stopped all the same.
#[test]
fn a_vm_that_waits_for_its_server_can_be_stopped() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("256M", SEED, "order=random");
    let listen = socket(&scratch);
    for fill in FILLS {
        let stopped = (0..10).any(|_| {
            let server = Server::start(&listen, &[("base", &image)]);
            let vm = served(&[server.url()]).memory(&format!("fill={fill}")).start();
            wait_for_ram(&vm, 8);
            server.kill();
            vm.signal(Signal::TERM);
            let ended = vm.wait_for_exit(MARGIN);
            assert!(ended, "fill={fill}: the VM does not end\n{}", *vm);
            let vm = vm.finish();
            vm.assert_code(0);
            vm.report().text("/outcome") == "stopped"
        });
        assert!(stopped, "fill={fill}: every signal came too late");
    }
}

#[test]
fn a_second_server_takes_over() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("256M", SEED, "order=random");
    for fill in FILLS {
        let in_time = (0..10).any(|_| {
            let first = Server::start(&socket(&scratch), &[("base", &image)]);
            let second = Server::start("tcp:127.0.0.1:0", &[("copy", &image)]);
            let second_url = format!("{}/copy", second.url());
            let vm = served(&[first.url(), &second_url])
                .memory(&format!("fill={fill}"))
                .cpus(2)
                .start();
            let urls = format!("{},{second_url}", first.url());
            wait_for_ram(&vm, 8);
            first.kill();
            let vm = vm.finish();
            assert_right(&vm, 256);
            let report = vm.report();
            assert_eq!(report.text("/source/url"), urls);
            let second = second.stop();
            report.count("/source/reconnects") > 0 && second.count("pages") > 0
        });
        assert!(
            in_time,
            "fill={fill}: the first server was killed too late each time"
        );
    }
}

/// From the start: the first is not there, or does not have the image.
#[test]
fn the_second_server_is_as_good_as_the_first() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("16M", SEED, "order=random");
    let server = Server::start(&socket(&scratch), &[("base", &image)]);
    let missing = format!("unix:{}", scratch.path("missing").display());
    let unknown = format!("{}#unknown", server.url());
    for first in [missing, unknown] {
        for fill in FILLS {
            let vm = served(&[&first, server.url()])
                .memory(&format!("fill={fill}"))
                .run();
            assert_right_and_quiet(&vm, 16);
        }
    }
}

#[test]
fn no_server_at_all() {
    let scratch = Scratch::new();
    let missing = socket(&scratch);
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let closed = format!("tcp:127.0.0.1:{port}");
    for url in [&missing, &closed] {
        let vm = served(&[url]).run();
        vm.assert_error(4, &["cannot connect", url]);
        assert!(vm.stdout.is_empty(), "{}", vm.stdout);
    }
}

/// The same name, the same size, other pages: not one of them may reach the guest.
#[test]
fn another_image_of_the_same_name_is_refused() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("256M", SEED, "order=random");
    let other = Scratch::new();
    let other = other.fingerprinted("256M", SEED + 1, "order=random");
    let listen = socket(&scratch);
    for fill in FILLS {
        let refused = (0..10).any(|_| {
            let server = Server::start(&listen, &[("base", &image)]);
            let vm = Vm::default()
                .memory(&format!("source={listen}#base,source-timeout=2s,fill={fill}"))
                .cpus(2)
                .start();
            wait_for_ram(&vm, 8);
            server.kill();
            let impostor = Server::start(&listen, &[("base", &other)]);
            let vm = vm.finish();
            let impostor = impostor.stop();
            assert_eq!(impostor.count("pages"), 0, "{impostor}");
            if vm.code() == Some(0) {
                assert_right(&vm, 256);
                return false;
            }
            assert_source_lost(&vm, &[&listen, "another digest"]);
            assert!(impostor.count("refused") > 0, "{impostor}");
            true
        });
        assert!(refused, "fill={fill}: the server was killed too late each time");
    }
}

/// The right one comes back in time: then nothing was lost by the wrong one.
#[test]
fn the_right_image_after_another_one_is_taken() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("64M", SEED, "order=random");
    let other = Scratch::new();
    let other = other.fingerprinted("64M", SEED + 1, "order=random");
    let listen = socket(&scratch);
    let server = Server::start(&listen, &[("base", &image)]);
    let between = format!("unix:{}", scratch.path("between").display());
    let proxy = Proxy::start(&between, &listen, Plan::NONE);
    proxy.hold_after(8 << 20);
    let vm = served(&[proxy.url()]).cpus(2).start();
    assert!(proxy.wait_until_held(&vm), "it did not need its server\n{}", *vm);
    server.kill();
    let impostor = Server::start(&listen, &[("base", &other)]);
    proxy.go_on();
    let refused = proxy.wait_until(&vm, |record| record.refusals > 0);
    assert!(refused, "it did not need its server again\n{}", *vm);
    assert_eq!(impostor.stop().count("pages"), 0);
    let server = Server::start(&listen, &[("base", &image)]);
    assert_right(&vm.finish(), 64);
    server.stop();
}

/// Kills the server of a running VM when any number of bytes has passed between them, at times within a frame's way, and
/// starts it again, at once or when the VM has looked for it in vain. Answers how often the VM connected anew.
fn killed_by_bytes(bench: &Path, listen: &str, fill: &str, random: &mut Random) -> u64 {
    let mib = if fill == "off" { 16 } else { 32 };
    let (image, between) = (bench.join(format!("{mib}M")), bench.join("between"));
    let mut server = Server::start(listen, &[("base", &image)]);
    let between = match listen.strip_prefix("unix:") {
        Some(_) => format!("unix:{}", between.display()),
        None => listen.to_owned(),
    };
    let proxy = Proxy::start(&between, server.url(), Plan::NONE);
    let far = mib << 19;
    proxy.hold_after(random.below(far));
    let vm = served(&[proxy.url()]).memory(&format!("fill={fill}")).start();
    for _ in 0..=random.below(4) {
        if !proxy.wait_until_held(&vm) {
            break;
        }
        let (passed, in_vain) = (proxy.record(), random.below(4));
        println!(
            "fill={fill}: killed after {} bytes, {in_vain} times in vain",
            passed.bytes
        );
        let url = server.url().to_owned();
        server.kill();
        proxy.go_on();
        proxy.wait_until(&vm, |record| record.connections >= passed.connections + in_vain);
        server = Server::start(&url, &[("base", &image)]);
        proxy.hold_after(random.below(far));
    }
    proxy.go_on();
    let vm = vm.finish();
    assert_right(&vm, mib);
    server.stop();
    vm.report().count("/source/reconnects")
}

fn survives_kills_by_bytes(listen: impl Fn(&Scratch) -> String) {
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    for size in ["16M", "32M"] {
        let image = scratch.fingerprinted(size, SEED, "order=random");
        std::fs::rename(image, scratch.path(size)).unwrap();
    }
    for fill in FILLS {
        let reconnects: u64 = (0..rounds(3))
            .map(|_| killed_by_bytes(scratch.directory(), &listen(&scratch), fill, &mut random))
            .sum();
        println!("fill={fill}: connected anew {reconnects} times");
        assert!(reconnects > 0, "fill={fill}: no server was missed");
    }
}

#[test]
fn a_server_killed_after_any_number_of_bytes_over_unix_sockets() {
    need!(tests::host::kvm());
    survives_kills_by_bytes(socket);
}

#[test]
fn a_server_killed_after_any_number_of_bytes_over_tcp() {
    need!(tests::host::kvm());
    survives_kills_by_bytes(|_| "tcp:127.0.0.1:0".to_owned());
}
