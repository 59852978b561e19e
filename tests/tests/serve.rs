//! VMs whose RAM comes from a page server, and servers that go, come back, or are lied to.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tests::program::{Finished, PATIENCE, Program};
use tests::random::Random;
use tests::scratch::{PAGE_SIZE, Scratch, flip_bit};
use tests::server::{Server, serve_args};
use tests::vm::{FinishedVm, RunningVm, Vm};
use tests::{need, skip};

const SEED: u64 = 41;

/// Pages of 4 KiB in a MiB.
const PAGES: u64 = 256;

/// The most that the guest and what is loaded with it take of RAM that the guest does not verify.
const NOT_VERIFIED: u64 = 4 * PAGES;

/// What is granted to a slow machine with other work to do, beyond the time that something takes by its nature.
const MARGIN: Duration = Duration::from_secs(10);

const FILLS: [&str; 2] = ["off", "sequential"];

/// A VM whose RAM comes from these servers, which it looks for longer than any test takes.
fn served(urls: &[&str]) -> Vm {
    let vm = urls
        .iter()
        .fold(Vm::default(), |vm, url| vm.memory(&format!("source={url}")));
    vm.memory("source-timeout=300s")
}

fn socket(scratch: &Scratch) -> String {
    format!("unix:{}", scratch.path("socket").display())
}

/// Checks that the guest has verified nearly all of RAM and found every page right, each of which came once. The VM may have
/// said that it lost its server.
#[track_caller]
fn assert_right(vm: &FinishedVm, mib: u64) {
    vm.assert_code(0);
    vm.line("result=ok");
    let line = vm.line("verified=");
    assert!(line.contains(" wrong=0 "), "{line}");
    let verified: u64 = line["verified=".len()..]
        .split(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    let total = mib * PAGES;
    assert!(
        verified <= total && verified >= total - NOT_VERIFIED,
        "{verified} of {total}"
    );
    let report = vm.report();
    assert_eq!(report.text("/outcome"), "guest-exit");
    report.assert_sound();
    assert_eq!(report.count("/pages/total"), total);
    assert_eq!(report.count("/pages/duplicate"), 0, "{report}");
    assert_eq!(report.count("/pages/pushed"), 0, "{report}");
    assert!(report.arrivals() >= verified, "{report}");
    assert!(report.count("/source/bytes") >= verified * PAGE_SIZE, "{report}");
    assert!(report.count("/source/requests") > 0, "{report}");
}

/// The same, where no connection was lost and nothing is to be said.
#[track_caller]
fn assert_right_and_quiet(vm: &FinishedVm, mib: u64) {
    vm.assert_ended_well();
    assert_right(vm, mib);
    let report = vm.report();
    assert_eq!(report.count("/source/reconnects"), 0, "{report}");
    assert!(
        report.count("/source/bytes") <= mib * PAGES * PAGE_SIZE,
        "something came twice: {report}"
    );
}

/// Checks that the VM ended because its source was lost, and that no page was a wrong one.
#[track_caller]
fn assert_source_lost(vm: &FinishedVm, words: &[&str]) {
    assert_eq!(vm.code(), Some(4), "{}{}", vm.stdout, vm.stderr);
    let last = vm.stderr.lines().last().unwrap_or_default();
    for word in words {
        assert!(last.contains(word), "'{word}' is not in the message: {last}");
    }
    assert!(!vm.stdout.contains("wrong_page="), "{}", vm.stdout);
    assert!(!vm.stdout.contains("verified="), "{}", vm.stdout);
    let report = vm.report();
    assert_eq!(report.text("/outcome"), "source-lost");
    assert!(report.text("/error").contains(words[0]), "{report}");
    assert_eq!(report.count("/pages/duplicate"), 0, "{report}");
}

/// Waits until a VM has this much of its RAM.
fn wait_for_ram(vm: &RunningVm, mib: u64) {
    vm.wait_until("pages arrive", |vm| {
        vm.status_kib("RssShmem").is_some_and(|kib| kib >= mib << 10)
    });
}

/// Runs the same guest over `listen` in all ways, and checks that the report says where its pages came from.
fn every_page_over(listen: &str) {
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("64M", SEED, "order=random");
    let server = Server::start(listen, &[("base", &image)]);
    let named = match server.url().strip_prefix("unix:") {
        Some(_) => format!("{}#base", server.url()),
        None => format!("{}/base", server.url()),
    };
    let mut pages = 0;
    for url in [server.url(), &named] {
        for fill in FILLS {
            let vm = served(&[url]).memory(&format!("fill={fill}")).cpus(2).run();
            assert_right_and_quiet(&vm, 64);
            let report = vm.report();
            assert_eq!(report.text("/source/url"), url);
            if fill == "off" {
                assert_eq!(report.count("/pages/prefetched"), 0, "{report}");
                // Each page was asked for by itself.
                assert!(
                    report.count("/source/requests") >= report.count("/pages/demand"),
                    "{report}"
                );
            } else {
                assert!(report.count("/pages/prefetched") > 0, "{report}");
                assert!(report.number("/time_to_all_pages_ms") > 0.0, "{report}");
            }
            pages += report.count("/source/bytes") / PAGE_SIZE;
        }
    }
    let served = server.stop();
    assert_eq!(served.stderr, "");
    assert!(served.count("pages") >= pages, "{served}");
    // A VM that ends need not take what is still on its way.
    assert!(served.count("bytes") >= pages * PAGE_SIZE, "{served}");
    assert_eq!(served.count("refused"), 0, "{served}");
}

#[test]
fn every_page_over_unix_sockets() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    every_page_over(&socket(&scratch));
    assert_eq!(scratch.names(), [""; 0], "the socket stayed");
}

#[test]
fn every_page_over_tcp() {
    need!(tests::host::kvm());
    every_page_over("tcp:127.0.0.1:0");
}

#[test]
fn every_page_over_tcp_on_ipv6() {
    need!(tests::host::kvm());
    need!(TcpListener::bind("[::1]:0").map_err(|error| format!("no IPv6: {error}")));
    every_page_over("tcp:[::1]:0");
}

#[test]
fn in_anonymous_memory_and_without_firmware() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("64M", SEED, "order=random");
    let server = Server::start(&socket(&scratch), &[("base", &image)]);
    for fill in FILLS {
        let vm = served(&[server.url()])
            .memory(&format!("backing=anonymous,fill={fill}"))
            .option("--firmware", "none")
            .run();
        assert_right_and_quiet(&vm, 64);
    }
}

#[test]
fn on_huge_pages() {
    need!(tests::host::kvm());
    let free = tests::host::free_huge_pages();
    if free < 32 {
        skip!("needs 32 free huge pages, this host has {free}: sysctl -w vm.nr_hugepages=64");
    }
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("64M", SEED, "order=random");
    let server = Server::start(&socket(&scratch), &[("base", &image)]);
    for fill in FILLS {
        let vm = served(&[server.url()])
            .memory(&format!("hugepages=on,fill={fill}"))
            .patience(Duration::from_mins(1))
            .run();
        assert_right_and_quiet(&vm, 64);
    }
}

#[test]
fn another_command_line_over_a_served_image() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("32M", SEED, "order=random");
    let server = Server::start(&socket(&scratch), &[("base", &image)]);
    for fill in FILLS {
        let vm = served(&[server.url()])
            .memory(&format!("fill={fill}"))
            .command_line("workload=touch pages=1000 order=random seed=3")
            .run();
        vm.assert_ended_well();
        vm.line("round=1 pages=1000 ");
        let line = format!("workload=verify pages=all seed={SEED} order=seq");
        let vm = served(&[server.url()])
            .memory(&format!("fill={fill}"))
            .cpus(2)
            .command_line(&line)
            .run();
        assert_right_and_quiet(&vm, 32);
    }
}

/// Several images at one server: each VM gets its own.
#[test]
fn an_image_is_chosen_by_its_name() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let other = Scratch::new();
    let image = scratch.fingerprinted("16M", 1, "order=random");
    let other = other.fingerprinted("32M", 2, "order=random");
    let server = Server::start(&socket(&scratch), &[("one", &image), ("two", &other)]);
    let url = |name: &str| format!("{}#{name}", server.url());
    assert_right_and_quiet(&served(&[&url("one")]).run(), 16);
    assert_right_and_quiet(&served(&[&url("two")]).run(), 32);
    for wrong in [url("three"), server.url().to_owned()] {
        let vm = served(&[&wrong]).run();
        vm.assert_error(2, &["no image", "there are: one, two", server.url()]);
        assert!(vm.stdout.is_empty(), "{}", vm.stdout);
    }
}

#[test]
fn eight_vms_at_once_from_one_server() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("16M", SEED, "order=random");
    let server = Server::start(&socket(&scratch), &[("base", &image)]);
    let vms: Vec<RunningVm> = (0..8)
        .map(|vm| {
            let fill = FILLS[vm % FILLS.len()];
            served(&[server.url()]).memory(&format!("fill={fill}")).start()
        })
        .collect();
    for vm in vms {
        assert_right_and_quiet(&vm.finish(), 16);
    }
    let served = server.stop();
    assert!((8..=16).contains(&served.count("channels")), "{served}");
}

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
    wait_for_ram(&vm, 13);
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
    let image = scratch.fingerprinted("256M", SEED, "order=random");
    let other = Scratch::new();
    let other = other.fingerprinted("256M", SEED + 1, "order=random");
    let listen = socket(&scratch);
    let in_time = (0..10).any(|_| {
        let server = Server::start(&listen, &[("base", &image)]);
        let vm = served(&[&listen]).cpus(2).start();
        wait_for_ram(&vm, 8);
        server.kill();
        let impostor = Server::start(&listen, &[("base", &other)]);
        let since = Instant::now();
        // Long enough that the VM has looked; it says so to nobody.
        vm.wait_until("it was refused", |vm| {
            since.elapsed() > Duration::from_millis(500) || vm.wait_for_exit(Duration::ZERO)
        });
        let refused = impostor.stop().count("refused");
        let server = Server::start(&listen, &[("base", &image)]);
        let vm = vm.finish();
        assert_right(&vm, 256);
        server.stop();
        refused > 0
    });
    assert!(in_time, "the server was killed too late each time");
}

#[test]
fn a_flipped_bit_is_found_before_the_guest_sees_it() {
    need!(tests::host::kvm());
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("64M", SEED, "order=random");
    // From 16 MiB on there is nothing but fingerprints.
    let page = 16 * PAGES + random.below(48 * PAGES);
    let (byte, bit) = (random.below(PAGE_SIZE), random.below(8));
    println!("bit {bit} of byte {byte} of page {page}");
    flip_bit(&image, page * PAGE_SIZE + byte, bit);
    let server = Server::start(&socket(&scratch), &[("base", &image)]);
    let tcp = Server::start("tcp:127.0.0.1:0", &[("base", &image)]);
    for url in [server.url(), tcp.url()] {
        for fill in FILLS {
            for cpus in [1, 2] {
                let vm = served(&[url]).memory(&format!("fill={fill}")).cpus(cpus).run();
                let named = format!("page {page} ");
                assert_eq!(vm.code(), Some(6), "{}{}", vm.stdout, vm.stderr);
                let last = vm.stderr.lines().last().unwrap_or_default();
                for word in [named.as_str(), "checksum", url] {
                    assert!(last.contains(word), "'{word}' is not in the message: {last}");
                }
                assert!(!vm.stdout.contains("wrong_page="), "{}", vm.stdout);
                assert!(!vm.stdout.contains("verified="), "{}", vm.stdout);
                let report = vm.report();
                assert_eq!(report.text("/outcome"), "error");
                assert!(report.text("/error").contains(&named), "{report}");
                assert!(report.arrivals() < 64 * PAGES, "{report}");
            }
        }
    }
    // Another VM that does not need the page is none the worse.
    let vm = served(&[server.url()])
        .command_line("workload=touch pages=1000")
        .run();
    vm.assert_ended_well();
}

fn serve(listen: &str, images: &[(&str, &Path)]) -> Finished {
    Program::umem(serve_args(listen, images)).run()
}

fn is_socket(path: &Path) -> bool {
    path.symlink_metadata()
        .is_ok_and(|metadata| metadata.file_type().is_socket())
}

#[test]
fn a_socket_path_that_was_left_behind_is_replaced() {
    let scratch = Scratch::new();
    let image = scratch.image("8M", "workload=hello");
    let (listen, path) = (socket(&scratch), scratch.path("socket"));
    for _ in 0..3 {
        let server = Server::start(&listen, &[("base", &image)]);
        assert_eq!(server.url(), listen);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        server.kill();
        assert!(
            is_socket(&path),
            "a server that was killed cannot remove its path"
        );
    }
    for signal in [Signal::TERM, Signal::INT] {
        let server = Server::start(&listen, &[("base", &image)]);
        server.signal(signal);
        let served = server.stop();
        assert_eq!(served.count("channels"), 0, "{served}");
        assert_eq!(served.stderr, "");
        assert_eq!(scratch.names(), ["image"]);
    }
}

#[test]
fn a_path_at_which_somebody_listens_is_refused() {
    let scratch = Scratch::new();
    let image = scratch.image("8M", "workload=hello");
    let listen = socket(&scratch);
    let server = Server::start(&listen, &[("base", &image)]);
    let path = scratch.path("socket");
    for _ in 0..3 {
        serve(&listen, &[("base", &image)]).assert_error(2, &["in use", path.to_str().unwrap()]);
    }
    assert!(is_socket(&path));
    if tests::host::kvm().is_ok() {
        served(&[&listen]).run().assert_ended_well();
    } else {
        UnixStream::connect(&path).unwrap();
    }
    server.stop();
    assert_eq!(scratch.names(), ["image"]);

    let server = Server::start("tcp:127.0.0.1:0", &[("base", &image)]);
    serve(server.url(), &[("base", &image)]).assert_error(2, &["in use", server.url()]);
    server.stop();
}

#[test]
fn what_is_no_socket_is_refused_and_kept() {
    let scratch = Scratch::new();
    let image = scratch.image("8M", "workload=hello");
    let path = scratch.file("socket", b"precious");
    let serve = |path: &Path| serve(&format!("unix:{}", path.display()), &[("base", &image)]);
    serve(&path).assert_error(2, &["no socket", path.to_str().unwrap()]);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    serve(scratch.directory()).assert_error(2, &["no socket", scratch.directory().to_str().unwrap()]);
    let link = scratch.path("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    serve(&link).assert_error(2, &["no socket", link.to_str().unwrap()]);
    assert_eq!(std::fs::read_link(&link).unwrap(), path);
    let nowhere = scratch.path("missing/socket");
    serve(&nowhere).assert_error(2, &["No such file", nowhere.to_str().unwrap()]);
    assert_eq!(scratch.names(), ["image", "link", "socket"]);
}

/// A successor's socket is not taken away by a server that ends late.
#[test]
fn a_path_that_belongs_to_another_server_by_now_is_kept() {
    let scratch = Scratch::new();
    let image = scratch.image("8M", "workload=hello");
    let (listen, path) = (socket(&scratch), scratch.path("socket"));
    let first = Server::start(&listen, &[("base", &image)]);
    std::fs::remove_file(&path).unwrap();
    let second = Server::start(&listen, &[("base", &image)]);
    first.stop();
    assert!(is_socket(&path));
    second.stop();
    assert_eq!(scratch.names(), ["image"]);
}

#[test]
fn tcp_that_others_can_reach_needs_to_be_allowed() {
    let scratch = Scratch::new();
    let image = scratch.image("8M", "workload=hello");
    for listen in ["tcp:0.0.0.0:0", "tcp:[::]:0"] {
        serve(listen, &[("base", &image)]).assert_error(2, &["--allow-plaintext", "other hosts", listen]);
    }
    let allowed = Program::umem(serve_args("tcp:0.0.0.0:0", &[("base", &image)]))
        .arg("--allow-plaintext")
        .start();
    allowed.wait_for_output("serving at tcp:0.0.0.0:");
    allowed.signal(Signal::TERM);
    allowed.finish().assert_code(0);
}

#[test]
fn what_cannot_be_served_is_refused() {
    let scratch = Scratch::new();
    let image = scratch.image("8M", "workload=hello");
    let damaged = scratch.file("damaged", &[7; 3 * 4096]);
    let missing = scratch.path("missing");
    let listen = socket(&scratch);
    serve(&listen, &[("base", &missing)]).assert_error(2, &["No such file", missing.to_str().unwrap()]);
    serve(&listen, &[("base", &image), ("gone", &missing)])
        .assert_error(2, &["No such file", missing.to_str().unwrap()]);
    serve(&listen, &[("base", &image), ("base", &image)]).assert_error(2, &["two images", "'base'"]);
    serve(&listen, &[("base", &damaged)]).assert_error(6, &[damaged.to_str().unwrap()]);
    serve(&listen, &[]).assert_error(2, &["--image"]);
    serve(&listen, &[("", &image)]).assert_error(2, &["NAME=FILE"]);
    serve(&listen, &[("base", Path::new(""))]).assert_error(2, &["NAME=FILE"]);
    let long = "x".repeat(256);
    serve(&listen, &[(long.as_str(), &image)]).assert_error(2, &["NAME=FILE"]);
    Program::umem(["serve", "--listen", &listen, "--image", "base"])
        .run()
        .assert_error(2, &["NAME=FILE", "base"]);
    Program::umem(["serve", "--image"])
        .arg(format!("base={}", image.display()))
        .run()
        .assert_error(2, &["--listen"]);
    for wrong in [
        "",
        "base",
        "unix:",
        "tcp:",
        "tcp:127.0.0.1",
        "tcp:127.0.0.1:66000",
        "tcp:::1:0",
        "file:x",
    ] {
        serve(wrong, &[("base", &image)]).assert_error(2, &["--listen"]);
    }
    let too_long = format!("unix:{}", scratch.path(&"x".repeat(150)).display());
    let refused = serve(&too_long, &[("base", &image)]);
    refused.assert_error(2, &["cannot listen"]);
    assert_eq!(scratch.names(), ["damaged", "image"]);
}

#[test]
fn sources_that_make_no_sense() {
    let scratch = Scratch::new();
    let image = scratch.image("8M", "workload=hello");
    let file = format!("source=file:{}", image.display());
    for (memory, words) in [
        ("source=unix:", &["unix:PATH"][..]),
        ("source=tcp:127.0.0.1", &["tcp:HOST:PORT"]),
        ("source=tcp:127.0.0.1/base", &["tcp:HOST:PORT"]),
        ("source=unix:a,source-timeout=never", &["source-timeout", "30s"]),
        (
            "source=unix:a,source-timeout=1s,source-timeout=1s",
            &["source-timeout", "more than once"],
        ),
        (
            &format!("{file},source=unix:a"),
            &["source=", "several times", "page servers"],
        ),
    ] {
        Program::umem(["run", "--memory", memory])
            .run()
            .assert_error(2, words);
    }
}

/// Who passes on what a VM and its server say to each other, and keeps what the VM says, channel by channel.
struct Eavesdropper {
    path: PathBuf,
    said: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Eavesdropper {
    fn start(path: PathBuf, server: PathBuf) -> Self {
        let listener = UnixListener::bind(&path).unwrap();
        let said = Arc::new(Mutex::new(Vec::new()));
        let kept: Arc<Mutex<Vec<Vec<u8>>>> = Arc::clone(&said);
        // They end with the connections, and with the test's process.
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = UnixStream::connect(&server) else {
                    return;
                };
                let index = {
                    let mut said = kept.lock().unwrap();
                    said.push(Vec::new());
                    said.len() - 1
                };
                let (from_server, to_client) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                let kept = Arc::clone(&kept);
                thread::spawn(move || {
                    pass_on(&client, &server, |bytes| {
                        kept.lock().unwrap()[index].extend_from_slice(bytes);
                    });
                });
                thread::spawn(move || pass_on(&from_server, &to_client, |_| {}));
            }
        });
        Self { path, said }
    }

    fn url(&self) -> String {
        format!("unix:{}", self.path.display())
    }

    /// What the VM said on each of its channels.
    fn said(&self) -> Vec<Vec<u8>> {
        self.said.lock().unwrap().clone()
    }
}

fn pass_on(mut from: &UnixStream, mut to: &UnixStream, mut keep: impl FnMut(&[u8])) {
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        keep(&buffer[..length]);
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    // Gone already, if that fails.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// What a VM says on the channel for the pages that it waits for, from the hello on.
fn requests_of_a_vm(socket: &Path) -> Vec<u8> {
    let scratch = Scratch::new();
    let eavesdropper = Eavesdropper::start(scratch.path("socket"), socket.to_path_buf());
    served(&[&eavesdropper.url()])
        .command_line("workload=touch pages=all order=random")
        .run()
        .assert_ended_well();
    let said = eavesdropper.said();
    said.into_iter().max_by_key(Vec::len).unwrap()
}

/// What a client says that means no good.
fn nonsense(kind: u64, genuine: &[u8], random: &mut Random) -> Vec<u8> {
    let mut noise = |length: u64| (0..length).map(|_| random.below(256) as u8).collect::<Vec<u8>>();
    match kind {
        // Nothing.
        0 => Vec::new(),
        // Less than a header, and more than one.
        1 => noise(16),
        2 => noise(64 << 10),
        // Half of a good header, and a header without its payload.
        3 => genuine[..16].to_vec(),
        4 => genuine[..32].to_vec(),
        // Zeros, and the largest numbers.
        5 => vec![0; 4096],
        6 => vec![0xff; 4096],
        // A hello and then noise.
        7 => [&genuine[..hello_length(genuine)], &noise(4096)].concat(),
        // A hello twice.
        8 => genuine[..hello_length(genuine)].repeat(2),
        // All that a VM asks for, except for one bit.
        _ => {
            let mut bytes = genuine.to_vec();
            let bit = random.below(8 * bytes.len() as u64);
            bytes[(bit / 8) as usize] ^= 1 << (bit % 8);
            bytes
        }
    }
}

/// The first frame's length: a header of 32 bytes that begins with the payload's.
fn hello_length(genuine: &[u8]) -> usize {
    32 + u32::from_le_bytes(*genuine.first_chunk().unwrap()) as usize
}

/// Says something to a server, and keeps the connection. What the server does not want to hear, it need not.
fn say(socket: &Path, bytes: &[u8]) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_nonblocking(true).unwrap();
    // As much as there is room for: nobody waits here.
    let mut rest = bytes;
    while let Ok(length @ 1..) = (&stream).write(rest) {
        rest = &rest[length..];
    }
    stream
}

/// More memory than 50 clients and a VM can make a server use, and less than their requests would take if it kept them.
const MEMORY_MAX_KIB: u64 = 64 << 10;

#[test]
fn clients_that_mean_no_good_disturb_nobody() {
    need!(tests::host::kvm());
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("32M", SEED, "order=random");
    let server = Server::start(&socket(&scratch), &[("base", &image)]);
    let path = scratch.path("socket");
    let genuine = requests_of_a_vm(&path);
    for fill in FILLS {
        let vm = served(&[server.url()])
            .memory(&format!("fill={fill}"))
            .cpus(2)
            .start();
        let mut most = 0;
        // None of them reads, and all stay for as long as the VM runs.
        let mut clients = Vec::new();
        for client in 0..50 {
            clients.push(say(&path, &nonsense(client % 10, &genuine, &mut random)));
            most = most.max(server.status_kib("VmRSS").unwrap());
        }
        let vm = vm.finish();
        most = most.max(server.status_kib("VmRSS").unwrap());
        assert_right_and_quiet(&vm, 32);
        assert!(most < MEMORY_MAX_KIB, "the server took {most} KiB");
        drop(clients);
    }
    let memory = || server.status_kib("VmRSS").unwrap();
    // What they took is not kept: ten times as many take no more.
    let before = memory();
    for round in 0..500 {
        drop(say(&path, &nonsense(round % 10, &genuine, &mut random)));
    }
    let vm = served(&[server.url()]).run();
    assert_right_and_quiet(&vm, 32);
    assert!(
        memory() < before + (16 << 10),
        "from {before} KiB to {} KiB",
        memory()
    );
    let served = server.stop();
    assert_eq!(served.stderr, "", "nobody is to be told of it");
}

/// Waits until the server has closed the connection.
fn wait_until_closed(mut stream: UnixStream) {
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return,
            Err(error) => panic!("the server keeps the connection: {error}"),
        }
    }
}

/// Connections that say nothing, or nothing sensible, do not stay.
#[test]
fn clients_that_say_nothing_sensible_are_let_go() {
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let image = scratch.image("8M", "workload=hello");
    let server = Server::start(&socket(&scratch), &[("base", &image)]);
    let path = scratch.path("socket");
    let noise: Vec<u8> = (0..4096).map(|_| random.below(256) as u8).collect();
    for bytes in [&[][..], &noise[..16], &noise, &[0; 32]] {
        wait_until_closed(say(&path, bytes));
    }
    let served = server.stop();
    assert_eq!(served.count("channels"), 0, "{served}");
}

/// Neither who says nothing nor who does not read what it asked for holds up the end of a server.
#[test]
fn a_server_ends_in_time_whatever_its_clients_do() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("32M", SEED, "");
    let listen = socket(&scratch);
    let path = scratch.path("socket");
    let genuine = {
        let server = Server::start(&listen, &[("base", &image)]);
        let genuine = requests_of_a_vm(&path);
        server.stop();
        genuine
    };
    // What each has to read, and does not, when the server is told to end.
    for (what, said, unread) in [
        ("nothing", &[][..], 0),
        ("half a header", &genuine[..16], 0),
        ("a hello", &genuine[..hello_length(&genuine)], 1),
        ("requests", &genuine, 64 << 10),
    ] {
        let server = Server::start(&listen, &[("base", &image)]);
        let clients: Vec<UnixStream> = (0..5).map(|_| say(&path, said)).collect();
        server.wait_until("it answers", |_| {
            clients
                .iter()
                .all(|client| rustix::io::ioctl_fionread(client).unwrap() >= unread)
        });
        println!("clients that say {what}");
        let served = server.stop();
        assert_eq!(served.stderr, "");
        drop(clients);
    }
}
