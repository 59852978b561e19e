//! Those who say that they send a VM, or take one, and say what no such instance would. A VM that is to leave stays; where one is waited
//! for, nothing runs that did not arrive.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tests::moving::{Instance, assert_not_moved, assert_one_guest, guest_output, listen};
use tests::need;
use tests::peer::{HELLO, Liar, Peer};
use tests::random::Random;
use tests::scratch::Scratch;
use tests::vm::Vm;
use umem::units::{PageIndex, PageRange};
use umem::wire::{
    ChannelKind, Epoch, Features, Handover, Hello, Message, RefuseCode, Role, SessionId, Step, VERSION,
    Version, Welcome,
};

/// Of 32 MiB.
const PAGES: u64 = 8192;

/// What a side of a migration is able to do.
const FEATURES: Features = Features(Features::PUSH.0 | Features::DISCARD.0 | Features::HANDOVER.0);

/// What a source says first.
const SENDER: Hello<'static> = Hello {
    features: FEATURES,
    pages: Some(PAGES),
    channel: ChannelKind::Control,
    role: Role::Provider,
    ..HELLO
};

/// Silence is noticed after 10 s, and preparing may take 30.
const LONGEST: Duration = Duration::from_secs(45);

fn step(step: Step, value: u32) -> Message<'static> {
    Message::Handover(Handover {
        step,
        value,
        text: "because",
    })
}

fn welcome() -> Message<'static> {
    Message::Welcome(Welcome {
        version: VERSION,
        features: FEATURES,
        pages: PAGES,
        epoch: Epoch(0),
        keep_alive_ms: 5000,
        window: 64,
        session: SessionId([7; 16]),
        digest: None,
    })
}

/// A VM that runs, and what it says that it is.
fn a_vm_and_its_description(scratch: &Scratch) -> (Instance, Value) {
    let source = Instance::dirty(Vm::with_memory("32M"), 512, "forever");
    let described = Arc::new(Mutex::new(None));
    let keep = Arc::clone(&described);
    let listener = Liar::start(scratch.path("listener"), move |mut peer| {
        let _hello = peer.receive();
        peer.send(&welcome());
        while let Some(frame) = peer.receive() {
            if let Message::Machine { bytes } = frame.message() {
                *keep.lock().unwrap() = Some(serde_json::from_slice(bytes).unwrap());
                peer.send(&step(Step::Abort, 0));
            }
        }
    });
    assert_not_moved(source.send(&listener.url(), ""), &["because"]);
    source.wait_for_progress();
    let description = described.lock().unwrap().take().unwrap();
    (source, description)
}

/// A destination, and a control channel to it.
fn called(scratch: &Scratch, name: &str) -> (Instance, Peer) {
    let destination = Instance::waiting(&listen(scratch, "unix", name));
    let mut peer = Peer::connect(&PathBuf::from(destination.url.strip_prefix("unix:").unwrap()));
    peer.send(&Message::Hello(SENDER));
    let frame = peer.receive().unwrap();
    assert!(matches!(frame.message(), Message::Welcome(_)), "{frame:?}");
    (destination, peer)
}

/// Waits for a step on a control channel; `None`: it ended before.
fn hear(peer: &mut Peer, wanted: Step) -> Option<String> {
    loop {
        let frame = peer.receive()?;
        match frame.message() {
            Message::Handover(Handover { step, text, .. }) if step == wanted => return Some(text.to_owned()),
            Message::Ping { token } => peer.send(&Message::Pong { token }),
            _ => {}
        }
    }
}

/// Checks that nothing came of it, and that the reason has these words in it.
#[track_caller]
fn assert_no_vm(destination: Instance, words: &[&str]) {
    let gone = destination.finish_within(LONGEST);
    assert_eq!(guest_output(&gone.stdout), "");
    assert!(!matches!(gone.code(), None | Some(0 | 101)), "{}", *gone);
    for word in words {
        assert!(
            gone.stderr.contains(word),
            "'{word}' is not in the message\n{}",
            *gone
        );
    }
}

/// None of them is taken for a source, and who comes after them is.
#[test]
fn callers_who_send_no_vm() {
    need!(tests::host::kvm());
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let destination = Instance::waiting(&listen(&scratch, "unix", "destination"));
    let path = PathBuf::from(destination.url.strip_prefix("unix:").unwrap());
    let mut silent = Vec::new();
    for length in [0, 1, 31, 32, 33, 4096, 1 << 16] {
        let garbage: Vec<u8> = (0..length).map(|_| random.below(256) as u8).collect();
        let mut stream = UnixStream::connect(&path).unwrap();
        // It may be sent away before it has said all.
        let _ = stream.write_all(&garbage);
        silent.push(stream);
    }
    let next = Version {
        major: VERSION.major + 1,
        ..VERSION
    };
    let refused: [(Hello<'_>, RefuseCode); 7] = [
        (HELLO, RefuseCode::NotPermitted),
        (
            Hello {
                role: Role::Fetcher,
                ..SENDER
            },
            RefuseCode::NotPermitted,
        ),
        (
            Hello {
                version: next,
                ..SENDER
            },
            RefuseCode::WrongVersion,
        ),
        (
            Hello {
                features: Features::PUSH,
                ..SENDER
            },
            RefuseCode::MissingFeature,
        ),
        (
            Hello {
                pages: None,
                ..SENDER
            },
            RefuseCode::BadHello,
        ),
        (
            Hello {
                channel: ChannelKind::Background,
                ..SENDER
            },
            RefuseCode::UnknownSession,
        ),
        (
            Hello {
                session: SessionId([9; 16]),
                ..SENDER
            },
            RefuseCode::UnknownSession,
        ),
    ];
    for (hello, code) in refused {
        let mut peer = Peer::connect(&path);
        peer.send(&Message::Hello(hello));
        let frame = peer
            .receive()
            .unwrap_or_else(|| panic!("{hello:?} was not answered"));
        match frame.message() {
            Message::Refused(refused) => assert_eq!(refused.code, code, "{hello:?}"),
            other => panic!("{hello:?} was answered {other:?}"),
        }
    }
    let source = Instance::dirty(Vm::with_memory("32M"), 512, "forever");
    source.send(&destination.url, "").finish().assert_code(0);
    destination.wait_for_progress();
    let outputs = [source.finish(), destination.stop()].map(|vm| guest_output(&vm.stdout));
    assert_one_guest(&outputs);
}

/// A VM that cannot be made here is refused with the reason, before anything of it is sent.
#[test]
fn vms_that_cannot_be_made_here() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let (source, description) = a_vm_and_its_description(&scratch);
    source.stop();
    let edited = |key: &str, value: Value| {
        let mut edited = description.clone();
        edited[key] = value;
        edited
    };
    let mut feature = description.clone();
    more_than_any_cpu(&mut feature["cpu"]);
    assert_ne!(feature, description, "{description:#}");
    let cases = [
        ("ram", edited("ram_size", json!(64 << 20)), &["announced"][..]),
        ("version", edited("version", json!(999_999)), &["version"]),
        ("cpus", edited("cpus", json!(0)), &["no vCPU"]),
        ("many", edited("cpus", json!(100_000)), &[]),
        ("pages", edited("page_size", json!(65536)), &["65536"]),
        (
            "connections",
            edited("connections", json!(100_000)),
            &["connections"],
        ),
        ("unknown", edited("color", json!("blue")), &["color"]),
        ("feature", feature, &["CPU"]),
    ];
    for (name, description, words) in cases {
        println!("{name}");
        let (destination, mut peer) = called(&scratch, name);
        peer.send(&Message::Machine {
            bytes: description.to_string().as_bytes(),
        });
        let reason = hear(&mut peer, Step::Abort);
        for word in words {
            assert!(
                reason.as_ref().is_some_and(|reason| reason.contains(word)),
                "{name}: {reason:?}"
            );
        }
        assert_no_vm(destination, words);
    }
    // And what is no description at all.
    for bytes in [&b"x"[..], b"{}", b"[]", &[0xff; 4096]] {
        let (destination, mut peer) = called(&scratch, &format!("no-{}-{}", bytes.len(), bytes[0]));
        peer.send(&Message::Machine { bytes });
        assert_no_vm(destination, &[]);
    }
}

/// Sets every bit of every register of every CPUID leaf, as far as the shape of the JSON tells where they are.
fn more_than_any_cpu(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                if ["eax", "ebx", "ecx", "edx"].contains(&key.as_str()) {
                    *value = json!(u32::MAX);
                } else {
                    more_than_any_cpu(value);
                }
            }
        }
        Value::Array(list) => {
            if !list.is_empty() && list.iter().all(Value::is_u64) {
                list.iter_mut()
                    .rev()
                    .take(4)
                    .for_each(|value| *value = json!(u32::MAX));
            } else {
                list.iter_mut().for_each(more_than_any_cpu);
            }
        }
        _ => {}
    }
}

/// What comes when it is not its turn ends it, at every step.
#[test]
fn steps_in_the_wrong_order() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let (source, description) = a_vm_and_its_description(&scratch);
    source.stop();
    let text = description.to_string();
    let machine = Message::Machine {
        bytes: text.as_bytes(),
    };
    let state = Message::State { bytes: b"{}" };
    let commit = step(Step::Commit, 0);
    let pages = [PageRange::new(PageIndex(0), 1)];
    let beyond = [PageRange::new(PageIndex(PAGES - 1), 2)];
    let discard = |pages: &'static [PageRange]| Message::Discard {
        epoch: Epoch(1),
        ranges: pages.into(),
    };
    let (pages, beyond) = (
        discard(Vec::leak(pages.to_vec())),
        discard(Vec::leak(beyond.to_vec())),
    );
    let orders: [(&str, &[&Message<'_>]); 8] = [
        ("state-first", &[&state]),
        ("commit-first", &[&commit]),
        ("discard-first", &[&pages]),
        ("machine-twice", &[&machine, &machine]),
        ("commit-early", &[&machine, &commit]),
        ("state-of-another", &[&machine, &state]),
        ("discard-beyond", &[&machine, &beyond]),
        ("discard-late", &[&machine, &state, &pages]),
    ];
    for (name, messages) in orders {
        println!("{name}");
        let (destination, mut peer) = called(&scratch, name);
        for (index, message) in messages.iter().enumerate() {
            peer.send(message);
            if index == 0 && messages.len() > 1 {
                hear(&mut peer, Step::Prepared).unwrap();
            }
        }
        assert_no_vm(destination, &[]);
    }
    // Who says nothing more is not waited for for ever, nor who goes.
    for (name, stays) in [("silent", true), ("gone", false)] {
        let (destination, mut peer) = called(&scratch, name);
        peer.send(&machine);
        let peer = stays.then_some(peer);
        assert_no_vm(destination, &[]);
        drop(peer);
    }
}

/// What one who is none does with a channel.
type Talk = fn(Peer);

/// Welcomes a channel.
fn opened(peer: &mut Peer) -> ChannelKind {
    let channel = match peer.receive().unwrap().message() {
        Message::Hello(hello) => hello.channel,
        other => panic!("{other:?}"),
    };
    peer.send(&welcome());
    channel
}

/// Prepared, and then what `then` does on the control channel when the state has come.
fn until_state(mut peer: Peer, then: fn(&mut Peer)) {
    if opened(&mut peer) != ChannelKind::Control {
        while peer.receive().is_some() {}
        return;
    }
    while let Some(frame) = peer.receive() {
        match frame.message() {
            Message::Machine { .. } => peer.send(&step(Step::Prepared, 1)),
            Message::State { .. } => return then(&mut peer),
            Message::Ping { token } => peer.send(&Message::Pong { token }),
            _ => {}
        }
    }
}

/// One who is sent a VM and says what makes no sense: the VM stays.
#[test]
fn destinations_that_are_none() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let source = Instance::dirty(Vm::with_memory("32M"), 512, "forever");
    let talks: [(&str, Talk); 9] = [
        ("closes", |peer| drop(peer)),
        ("no-answer", |mut peer| drop(peer.receive())),
        ("garbage", |mut peer| {
            let _hello = peer.receive();
            peer.send_bytes(&[0xa5; 4096]);
        }),
        ("welcome", |mut peer| {
            opened(&mut peer);
        }),
        ("units", |mut peer| {
            opened(&mut peer);
            peer.send(&step(Step::Prepared, 0));
            while peer.receive().is_some() {}
        }),
        ("no-channels", |mut peer| {
            if opened(&mut peer) == ChannelKind::Control {
                peer.send(&step(Step::Prepared, 1));
                while peer.receive().is_some() {}
            }
        }),
        ("aborts", |peer| {
            until_state(peer, |peer| peer.send(&step(Step::Abort, 0)));
        }),
        ("goes", |peer| until_state(peer, |_| {})),
        ("runs-at-once", |peer| {
            until_state(peer, |peer| {
                // Before it was given the VM. It says so in place of `Loaded`, and is not believed.
                peer.send(&step(Step::Running, 0));
                peer.send(&step(Step::Complete, 0));
            });
        }),
    ];
    for (name, talk) in talks {
        println!("{name}");
        let liar = Liar::start(scratch.path(name), talk);
        let sent = source.send(&liar.url(), ",memory_mode=postcopy");
        assert!(sent.wait_for_exit(LONGEST), "{name}: it does not end");
        assert_not_moved(sent, &[]);
        source.wait_for_progress();
    }
    assert_one_guest(&[guest_output(&source.stop().stdout)]);
}
