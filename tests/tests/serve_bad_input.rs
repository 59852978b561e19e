//! Clients of a page server that mean no good, and page servers that mean none.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

use tests::need;
use tests::program::PATIENCE;
use tests::random::Random;
use tests::scratch::Scratch;
use tests::served::{FILLS, SEED, assert_right_and_quiet, served, socket};
use tests::server::Server;

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
