//! Where a page server listens, and what it refuses to listen at or to serve.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::process::Signal;
use tests::program::{Finished, Program};
use tests::scratch::Scratch;
use tests::served::{served, socket};
use tests::server::{Server, serve_args};

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
