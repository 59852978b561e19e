//! VMs whose RAM comes from a page server: every page is right, whatever RAM is made of and however it is reached.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::net::TcpListener;
use std::time::Duration;

use tests::random::Random;
use tests::scratch::{PAGE_SIZE, Scratch, flip_bit};
use tests::served::{FILLS, PAGES, SEED, assert_right_and_quiet, served, socket};
use tests::server::Server;
use tests::vm::RunningVm;
use tests::{need, skip};

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
