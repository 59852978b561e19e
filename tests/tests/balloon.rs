//! A guest gives pages back by its balloon, and uses them again.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use serde_json::{Value, json};
use tests::api::Api;
use tests::host::free_huge_pages;
use tests::need;
use tests::scratch::{PAGE_SIZE, Scratch};
use tests::vm::{FinishedVm, Vm};

const PAGES: u64 = 2000;

/// The guest has found nothing wrong.
#[track_caller]
fn assert_ended_well(vm: &FinishedVm) {
    vm.assert_code(0);
    assert_eq!(vm.stderr, "", "{}", vm.stdout);
    vm.line("result=ok");
    assert!(vm.stdout.contains("wrong=0"), "{}", vm.stdout);
}

/// What they held before, in the image and by the guest's own hand, is never seen again.
#[test]
fn pages_that_were_given_back_read_zero() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("64M", 5, "");
    for backing in ["memfd", "anonymous"] {
        for fill in ["off", "sequential"] {
            for how in ["inflate", "report"] {
                let vm = Vm::from_image(&image)
                    .memory(&format!("backing={backing},fill={fill}"))
                    .option("--balloon", "size=0,free-page-reporting=on")
                    .command_line(&format!("workload=balloon pages={PAGES} how={how} rounds=3"))
                    .run();
                assert_ended_well(&vm);
                let last = format!("round=3 zero={PAGES} wrong=0");
                assert_eq!(vm.line("round=3 zero="), last, "{backing} {fill} {how}");
                // Once all others are there, removed pages are the kernel's to give.
                let report = vm.report();
                let zero = report.count("/pages/zero") + report.count("/pages/removed");
                assert!(fill != "off" || zero >= PAGES, "{report}");
            }
        }
    }
}

fn resize(api: &Api, pages: u64) {
    let body = json!({ "desired_balloon": pages * PAGE_SIZE }).to_string();
    let reply = api.ask("PUT", "/api/v1/vm.resize", body.as_bytes());
    assert_eq!(reply.status, 204, "{}", String::from_utf8_lossy(&reply.body));
}

fn balloon(api: &Api) -> Value {
    api.info()["balloon"].clone()
}

#[test]
fn its_size_follows_what_is_asked_for() {
    need!(tests::host::kvm());
    let vm = Vm::with_memory("64M")
        .option("--balloon", format!("size={}", 100 * PAGE_SIZE))
        .command_line(&format!("workload=balloon pages={PAGES} how=target"));
    let (vm, api) = Api::start_until(vm, "held=100 wrong=0");
    assert_eq!(api.info()["pages"]["removed"], 100);
    resize(&api, 1500);
    vm.wait_for_output("held=1500 wrong=0");
    let info = api.info();
    assert_eq!(info["pages"]["removed"], 1500, "{info:#}");
    assert_eq!(info["balloon"]["target"], 1500 * PAGE_SIZE);
    assert_eq!(info["balloon"]["inflated"], 1500 * PAGE_SIZE);
    assert!(info["pages"]["resident"].as_u64().unwrap() < 1000, "{info:#}");
    vm.wait_until("the guest says what it holds", |_| {
        balloon(&api)["actual"] == 1500 * PAGE_SIZE
    });
    let resized = api.ctl(&["resize-balloon", "400K"]);
    resized.assert_code(0);
    vm.wait_until("it holds less", |vm| {
        vm.stdout().matches("held=100 wrong=0").count() == 2
    });
    let said = api.ctl(&["info"]).stdout;
    assert!(said.contains("balloon "), "{said}");
    for (size, words) in [
        (
            json!(64 << 20 | 4096),
            "does not fit into RAM, which has 67108864",
        ),
        (json!(5), "a multiple of 4096"),
    ] {
        let body = json!({ "desired_balloon": size }).to_string();
        api.ask("PUT", "/api/v1/vm.resize", body.as_bytes())
            .assert_error(400, &[words]);
    }
    for body in ["{}", r#"{"desired_balloon":-1}"#, r#"{"desired_balloon":"1G"}"#] {
        api.ask("PUT", "/api/v1/vm.resize", body.as_bytes())
            .assert_error(400, &["not understood"]);
    }
    resize(&api, 0);
    assert_ended_well(&vm.finish());
}

#[test]
fn a_machine_without_one_says_so() {
    need!(tests::host::kvm());
    let vm = Vm::with_memory("64M")
        .command_line("workload=balloon pages=10")
        .run();
    assert!(vm.stdout.contains("error=no_balloon"), "{}", vm.stdout);
    let vm = Vm::with_memory("64M").command_line("workload=dirty pages=10 rounds=forever");
    let (vm, api) = Api::start_until(vm, "round=1 ");
    assert!(balloon(&api).is_null());
    api.ask("PUT", "/api/v1/vm.resize", br#"{"desired_balloon":0}"#)
        .assert_error(409, &["no balloon", "--balloon"]);
    api.ctl(&["resize-balloon", "1M"]).assert_code(1);
    api.shutdown();
    vm.finish();
    for wrong in [
        "size=65M",
        "size=5",
        "size",
        "sizes=1M",
        "free-page-reporting=yes",
    ] {
        let vm = Vm::with_memory("64M").option("--balloon", wrong).run();
        vm.assert_code(2);
        assert!(vm.stderr.contains("--balloon"), "{}", vm.stderr);
    }
}

/// Makes a snapshot of a VM under `api`, over another.
fn snapshot(api: &Api, scratch: &Scratch, name: &str, base: Option<&str>, then: &str) -> Value {
    let url = |name: &str| format!("file:{}", scratch.path(name).display());
    let mut body = json!({ "destination_url": url(name), "then": then });
    if let Some(base) = base {
        body["base_url"] = url(base).into();
    }
    let reply = api.ask("PUT", "/api/v1/vm.snapshot", body.to_string().as_bytes());
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
    reply.json()
}

/// A paused guest's balloon stands still with it, and what it holds and is to hold is in the snapshot.
#[test]
fn it_is_restored_with_the_guest() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let vm = Vm::with_memory("64M")
        .option("--balloon", format!("size={}", 300 * PAGE_SIZE))
        .command_line(&format!("workload=balloon pages={PAGES} how=target"));
    let (vm, api) = Api::start_until(vm, "held=300 wrong=0");
    snapshot(&api, &scratch, "running", None, "go-on");
    api.pause();
    resize(&api, 1800);
    snapshot(&api, &scratch, "paused", None, "go-on");
    api.resume();
    vm.wait_for_output("held=1800 wrong=0");
    snapshot(&api, &scratch, "stopped", None, "stop");
    vm.finish().assert_code(0);
    for (name, held) in [("running", 301), ("paused", 1800), ("stopped", 1800)] {
        let vm = Vm::default().option("--snapshot", scratch.path(name));
        let (vm, api) = Api::start(vm);
        if name == "running" {
            vm.wait_until("it runs", |_| api.state() == "running");
            resize(&api, held);
        }
        vm.wait_until("it holds what it is to hold", |_| {
            balloon(&api)["actual"] == held * PAGE_SIZE
        });
        resize(&api, 0);
        assert_ended_well(&vm.finish());
    }
    let vm = Vm::default()
        .option("--snapshot", scratch.path("running"))
        .option("--balloon", "size=0")
        .run();
    vm.assert_code(2);
    assert!(
        vm.stderr.contains("--balloon and --snapshot exclude each other"),
        "{}",
        vm.stderr
    );
}

/// Pages that went are changes, though nobody has written to them.
#[test]
fn an_incremental_snapshot_has_what_went() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let vm = Vm::with_memory("64M")
        .memory("track-dirty=on")
        .option("--balloon", "size=0")
        .command_line(&format!("workload=balloon pages={PAGES} how=inflate wait=on"));
    let (vm, api) = Api::start_until(vm, "waiting=on target=0");
    let first = snapshot(&api, &scratch, "first", None, "go-on");
    assert!(first["data_pages"].as_u64().unwrap() >= PAGES, "{first:#}");
    resize(&api, 1);
    vm.wait_for_output("waiting=on target=1");
    let second = snapshot(&api, &scratch, "second", Some("first"), "stop");
    vm.finish().assert_code(0);
    assert!(second["own_pages"].as_u64().unwrap() >= PAGES, "{second:#}");
    assert!(second["data_pages"].as_u64().unwrap() < PAGES, "{second:#}");
    let vm = Vm::default().option("--snapshot", scratch.path("second"));
    let (vm, api) = Api::start(vm);
    vm.wait_until("it runs", |_| api.state() == "running");
    resize(&api, 0);
    let vm = vm.finish();
    assert_ended_well(&vm);
    assert_eq!(vm.line("round=1 zero="), format!("round=1 zero={PAGES} wrong=0"));
}

/// A page of a huge page stays what it is, and the guest with it.
#[test]
fn of_huge_pages_only_whole_ones_go() {
    need!(tests::host::kvm());
    need!(
        (free_huge_pages() >= 32)
            .then_some(())
            .ok_or("fewer than 32 free huge pages")
    );
    let vm = Vm::with_memory("64M")
        .memory("hugepages=on")
        .option("--balloon", format!("size={}", 100 * PAGE_SIZE))
        .command_line(&format!("workload=balloon pages={PAGES} how=target"));
    let (vm, api) = Api::start_until(vm, "held=100 wrong=0");
    assert_eq!(api.info()["pages"]["removed"], 0);
    api.shutdown();
    vm.finish().assert_code(0);
}
