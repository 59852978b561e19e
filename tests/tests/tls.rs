//! Page servers over TLS: who is trusted, and what is said where nobody is.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use tests::certificates::Authority;
use tests::need;
use tests::program::Program;
use tests::random::Random;
use tests::scratch::Scratch;
use tests::server::{Server, serve_args};
use tests::vm::{FinishedVm, Vm};

const SEED: u64 = 43;

/// Pages of 4 KiB in a MiB.
const PAGES: u64 = 256;

/// A server at a port of loopback, with TLS.
fn serve(listen: &str, image: &Path, credentials: &Path) -> Server {
    Server::start_with(listen, &[("base", image)], |program| {
        program.arg("--tls-dir").arg(credentials)
    })
}

/// A VM whose RAM comes from `url`.
fn served(url: &str, credentials: &Path) -> Vm {
    Vm::default().memory(&format!("source={url},tls-dir={}", credentials.display()))
}

#[track_caller]
fn assert_right(vm: &FinishedVm, mib: u64) {
    vm.assert_code(0);
    vm.line("result=ok");
    let line = vm.line("verified=");
    assert!(line.contains(" wrong=0 "), "{line}");
    let report = vm.report();
    report.assert_sound();
    assert_eq!(report.count("/pages/total"), mib * PAGES);
    assert_eq!(report.count("/pages/duplicate"), 0, "{report}");
    assert!(report.count("/source/bytes") > 0, "{report}");
}

#[test]
fn every_page_over_tls() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let authority = Authority::new("CA");
    let server_side = authority.issue(scratch.path("server"), "127.0.0.1");
    let vm_side = authority.issue(scratch.path("vm"), "a.vm.example");
    let image = scratch.fingerprinted("64M", SEED, "order=random");
    let server = serve("tcp:127.0.0.1:0", &image, &server_side);
    for options in [
        "fill=off",
        "fill=sequential",
        "fill=sequential,connections=4,lz4=on",
        "fill=off,lz4=on",
    ] {
        let vm = served(server.url(), &vm_side).memory(options).cpus(2).run();
        vm.assert_ended_well();
        assert_right(&vm, 64);
        assert_eq!(vm.report().count("/source/reconnects"), 0, "{}", vm.report());
    }
    let served = server.stop();
    assert_eq!(served.stderr, "");
    assert_eq!(served.count("refused"), 0, "{served}");
}

#[test]
fn a_server_is_known_by_its_dns_name() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let authority = Authority::new("CA");
    let server_side = authority.issue(scratch.path("server"), "localhost");
    let vm_side = authority.issue(scratch.path("vm"), "vm");
    let image = scratch.fingerprinted("16M", SEED, "order=random");
    let server = serve("tcp:127.0.0.1:0", &image, &server_side);
    let named = server.url().replace("127.0.0.1", "localhost");
    let vm = served(&named, &vm_side).run();
    vm.assert_ended_well();
    assert_right(&vm, 16);
    // By its address it is somebody else.
    let vm = served(server.url(), &vm_side).run();
    vm.assert_error(4, &["certificate is for another host", "127.0.0.1", server.url()]);
    server.stop();
}

#[test]
fn a_server_killed_and_restarted_under_tls() {
    need!(tests::host::kvm());
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let authority = Authority::new("CA");
    let server_side = authority.issue(scratch.path("server"), "127.0.0.1");
    let vm_side = authority.issue(scratch.path("vm"), "vm");
    let image = scratch.fingerprinted("128M", SEED, "order=random");
    let in_time = (0..10).any(|_| {
        let mut server = serve("tcp:127.0.0.1:0", &image, &server_side);
        let vm = served(server.url(), &vm_side)
            .memory("source-timeout=300s,fill=sequential,connections=3")
            .cpus(2)
            .start();
        for _ in 0..4 {
            let moment = random.moment(Duration::from_millis(100));
            println!("killed after {moment:?}");
            if vm.wait_for_exit(moment) {
                break;
            }
            let url = server.url().to_owned();
            server.kill();
            server = serve(&url, &image, &server_side);
        }
        let vm = vm.finish();
        // Before the first page there is nothing to be lost yet.
        if vm.code() == Some(4) {
            return false;
        }
        assert_right(&vm, 128);
        vm.report().count("/source/reconnects") > 1
    });
    assert!(in_time, "every moment was too early or too late");
}

/// Each side says what it knows, and the VM ends at once with exit code 4.
#[test]
fn who_is_not_trusted_is_sent_away() {
    let scratch = Scratch::new();
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let server_side = ours.issue(scratch.path("server"), "127.0.0.1");
    let image = scratch.image("8M", "workload=hello");
    let server = serve("tcp:127.0.0.1:0", &image, &server_side);
    let url = server.url();

    let stranger = theirs.issue(scratch.path("stranger"), "vm");
    let vm = served(url, &stranger).run();
    vm.assert_error(
        4,
        &[url, "other side's certificate is not signed by the CA in ca.pem"],
    );
    // One that trusts the server, and is not trusted.
    ours.trust(&stranger);
    let vm = served(url, &stranger).run();
    vm.assert_error(4, &[url, "not signed by the CA that it trusts"]);

    let expired = ours.issue_until(scratch.path("expired"), "vm", 2001);
    let vm = served(url, &expired).run();
    vm.assert_error(
        4,
        &[url, "does not accept this side's certificate, which has expired"],
    );

    // Without TLS.
    let vm = Vm::default().memory(&format!("source={url}")).run();
    vm.assert_error(4, &[url, "the other side speaks TLS", "tls-dir"]);

    let finished = server.stop();
    assert_eq!(finished.count("channels"), 0, "{finished}");
    for words in [
        "certificate is not signed by the CA in ca.pem",
        "certificate has expired",
        "does not speak TLS",
        "does not accept this side's certificate",
    ] {
        assert!(
            finished.stderr.contains(words),
            "'{words}' was not said\n{finished}"
        );
    }

    let late = ours.issue_until(scratch.path("late"), "127.0.0.1", 2001);
    let server = serve("tcp:127.0.0.1:0", &image, &late);
    let trusted = ours.issue(scratch.path("trusted"), "vm");
    let vm = served(server.url(), &trusted).run();
    vm.assert_error(4, &[server.url(), "the other side's certificate has expired"]);
    server.stop();

    let plain = Server::start("tcp:127.0.0.1:0", &[("base", &image)]);
    let vm = served(plain.url(), &trusted).run();
    vm.assert_error(4, &[plain.url(), "does it speak TLS"]);
    plain.stop();
}

#[test]
fn certificates_that_cannot_be_used_are_named() {
    let scratch = Scratch::new();
    let authority = Authority::new("CA");
    let image = scratch.image("8M", "workload=hello");
    let good = authority.issue(scratch.path("good"), "127.0.0.1");
    let other = authority.issue(scratch.path("other"), "127.0.0.1");
    let spoilt = |name: &str, spoil: &dyn Fn(&Path)| {
        let directory = authority.issue(scratch.path(name), "127.0.0.1");
        spoil(&directory);
        directory
    };
    let nowhere = scratch.path("nowhere");
    let mut cases = vec![(nowhere, vec!["cannot read", "ca.pem", "No such file"])];
    for (file, what) in [
        ("ca.pem", "certificate"),
        ("cert.pem", "certificate"),
        ("key.pem", "private key"),
    ] {
        let missing = spoilt(&format!("missing-{file}"), &|directory| {
            fs::remove_file(directory.join(file)).unwrap();
        });
        cases.push((missing, vec!["cannot read", file, "No such file"]));
        let nonsense = spoilt(&format!("nonsense-{file}"), &|directory| {
            fs::write(directory.join(file), "nonsense").unwrap();
        });
        cases.push((nonsense, vec![file, what, "PEM"]));
    }
    let mismatch = spoilt("mismatch", &|directory| {
        fs::copy(other.join("key.pem"), directory.join("key.pem")).unwrap();
    });
    cases.push((mismatch, vec!["is not the key of", "cert.pem"]));
    let open = spoilt("open", &|directory| {
        fs::set_permissions(directory.join("key.pem"), Permissions::from_mode(0o644)).unwrap();
    });
    cases.push((open, vec!["key.pem", "every user", "chmod o="]));
    for (directory, words) in cases {
        served("tcp:127.0.0.1:1", &directory)
            .run()
            .assert_error(2, &words);
        Program::umem(serve_args("tcp:127.0.0.1:0", &[("base", &image)]))
            .arg("--tls-dir")
            .arg(&directory)
            .run()
            .assert_error(2, &words);
    }
    // Those are fine, where they make sense.
    let unix = format!("unix:{}", scratch.path("socket").display());
    served(&unix, &good)
        .run()
        .assert_error(2, &["tls-dir", "over TCP", "Unix socket"]);
    served("zero:", &good)
        .run()
        .assert_error(2, &["tls-dir", "over TCP"]);
    Program::umem(serve_args(&unix, &[("base", &image)]))
        .arg("--tls-dir")
        .arg(&good)
        .run()
        .assert_error(2, &["--tls-dir", "Unix socket"]);
    Program::umem(serve_args("tcp:127.0.0.1:0", &[("base", &image)]))
        .arg("--allow-plaintext")
        .arg("--tls-dir")
        .arg(&good)
        .run()
        .assert_error(2, &["--tls-dir", "--allow-plaintext"]);
}

/// With TLS nobody needs to be warned of other hosts.
#[test]
fn tls_may_be_reached_from_other_hosts() {
    let scratch = Scratch::new();
    let credentials = Authority::new("CA").issue(scratch.path("server"), "127.0.0.1");
    let image = scratch.image("8M", "workload=hello");
    let server = serve("tcp:0.0.0.0:0", &image, &credentials);
    server.signal(Signal::TERM);
    server.stop();
}

/// The commands of the manual, as they are written there.
#[test]
fn the_manuals_certificates_are_good() {
    need!(tests::host::succeeds("openssl", &["version"]));
    let manual = include_str!("../../docs/page-service.md");
    let (_, section) = manual.split_once("### Certificates\n").unwrap();
    let commands: Vec<&str> = section
        .lines()
        .skip_while(|line| !line.starts_with("    "))
        .take_while(|line| line.starts_with("    "))
        .collect();
    let commands = commands.join("\n");
    assert!(commands.contains("openssl"), "{commands}");
    let scratch = Scratch::new();
    let made = Command::new("sh")
        .args(["-e", "-c", &commands])
        .current_dir(scratch.directory())
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let image = scratch.image("8M", "workload=hello");
    let server = serve("tcp:127.0.0.1:0", &image, &scratch.path("server"));
    let vm = served(server.url(), &scratch.path("vm"));
    if tests::host::kvm().is_ok() {
        vm.run().assert_code(0);
    }
    server.stop();
}
