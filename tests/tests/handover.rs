//! Whose a VM is while it moves: either side is killed, or the link is cut, at every step of the handover. There are never two VMs that
//! run; before the commit the VM is the source's, and after it nobody's but the destination's.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::time::Duration;

use tests::moving::{Instance, assert_not_moved, assert_one_guest, guest_output, listen};
use tests::need;
use tests::program::Running;
use tests::proxy::{Direction, Plan, Proxy};
use tests::scratch::Scratch;
use tests::vm::Vm;
use umem::wire::{Message, Step};

/// Of 8 MiB of 32.
const PAGES: u64 = 2048;

/// How long a destination waits for a source that is lost.
const SOURCE_TIMEOUT: Duration = Duration::from_secs(2);

/// That, the time after which silence is noticed, and something for a machine with other work to do.
const LONGEST: Duration = Duration::from_secs(2 + 10 + 10);

/// At this rate the guest's pages take many seconds.
const SLOW: u64 = 512 << 10;

/// A message of the control channel, and whither it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Moment {
    Machine,
    Prepared,
    Discard,
    State,
    Loaded,
    Commit,
    Running,
    Complete,
}

use Moment::{Commit, Complete, Discard, Loaded, Machine, Prepared, State};

impl Moment {
    const ALL: [Self; 8] = [
        Machine,
        Prepared,
        Discard,
        State,
        Loaded,
        Commit,
        Self::Running,
        Complete,
    ];

    fn is(self, message: &Message<'_>) -> bool {
        let step = match self {
            Machine => return matches!(message, Message::Machine { .. }),
            Discard => return matches!(message, Message::Discard { .. }),
            State => return matches!(message, Message::State { .. }),
            Prepared => Step::Prepared,
            Loaded => Step::Loaded,
            Commit => Step::Commit,
            Self::Running => Step::Running,
            Complete => Step::Complete,
        };
        matches!(message, Message::Handover(handover) if handover.step == step)
    }

    const fn towards(self) -> Direction {
        match self {
            Machine | Discard | State | Commit => Direction::Server,
            Prepared | Loaded | Self::Running | Complete => Direction::Client,
        }
    }
}

/// A VM that moves, and has come so far.
struct Scene {
    source: Instance,
    destination: Instance,
    proxy: Proxy,
    sent: Running,
    _scratch: Scratch,
}

impl Scene {
    /// `moment` is held back.
    fn at(moment: Moment, mode: &str) -> Self {
        let scratch = Scratch::new();
        let source = Instance::dirty(Vm::with_memory("32M"), PAGES, "forever");
        let timeout = format!("source-timeout={}s", SOURCE_TIMEOUT.as_secs());
        let waiting = Vm::arriving(&listen(&scratch, "unix", "destination")).memory(&timeout);
        let destination = Instance::waiting_with(waiting);
        let proxy = Proxy::start(&listen(&scratch, "unix", "proxy"), &destination.url, Plan::NONE);
        if mode == "postcopy" && moment < Complete {
            proxy.throttle(Some(SLOW));
        } else if moment == Discard {
            // So that the guest writes to something meanwhile, however little it gets of the CPU.
            proxy.throttle(Some(8 << 20));
        }
        // Whether one that has everything says first that it runs is a matter of moments.
        let first = if mode == "precopy" && moment == Complete {
            Moment::Running
        } else {
            moment
        };
        proxy.hold_message(move |towards, message| {
            towards == moment.towards() && (moment.is(message) || first.is(message))
        });
        let sent = source.send(proxy.url(), &format!(",memory_mode={mode}"));
        assert!(
            proxy.wait_for_message(&sent),
            "{moment:?} never came\n{sent}\n{}\n{}",
            *source,
            *destination
        );
        Self {
            source,
            destination,
            proxy,
            sent,
            _scratch: scratch,
        }
    }

    /// What was held back passes, or never comes.
    fn end_hold(&self, delivered: bool) {
        if delivered {
            self.proxy.release_message();
        } else {
            self.proxy.link_down();
            self.proxy.link_up();
        }
    }
}

/// The VM runs on where it was, as if nothing had been.
fn assert_stays(source: Instance) {
    source.wait_for_progress();
    assert!(
        source.phase() == "failed" && source.api.ctl(&["ping"]).code() == Some(0),
        "{:?}",
        source.info()
    );
    assert_one_guest(&[guest_output(&source.stop().stdout)]);
}

/// Whether the source is in doubt while this is held back; otherwise it knows that the VM runs there.
fn in_doubt(moment: Moment, mode: &str) -> bool {
    moment < Complete || mode == "precopy"
}

/// Every mode, where it makes a difference.
fn modes(moment: Moment) -> &'static [&'static str] {
    match moment {
        Discard => &["hybrid"],
        // Who has everything says that alone.
        Moment::Running => &["postcopy"],
        Commit | Complete => &["precopy", "postcopy"],
        _ => &["precopy", "postcopy", "hybrid"],
    }
}

/// Each moment in each mode, the message lost or, if it goes to who lives, arriving after the death of who sent it.
fn scenes(to_the_living: Direction, mut play: impl FnMut(Moment, &'static str, bool)) {
    for moment in Moment::ALL {
        for mode in modes(moment) {
            for delivered in [false, true] {
                // Which message it is in this case, and so what follows from it, is not known.
                let known = moment != Complete || *mode != "precopy";
                if !delivered || (moment.towards() == to_the_living && known) {
                    println!("{moment:?}, {mode}, delivered={delivered}");
                    play(moment, mode, delivered);
                }
            }
        }
    }
}

#[test]
fn the_destination_is_killed_at_every_step() {
    need!(tests::host::kvm());
    scenes(Direction::Client, |moment, mode, delivered| {
        let scene = Scene::at(moment, mode);
        let ran = moment >= Moment::Running;
        let Scene { destination, .. } = scene;
        destination.signal(rustix::process::Signal::KILL);
        destination.wait_for_exit(LONGEST);
        if delivered {
            scene.proxy.release_message();
        } else {
            scene.proxy.link_down();
            scene.proxy.link_up();
        }
        let output = guest_output(&destination.kill().stdout);
        assert!(ran || output.is_empty(), "it was not the destination's\n{output}");
        let source = scene.source;
        if moment < Loaded || (moment == Loaded && !delivered) {
            assert_not_moved(scene.sent, &[]);
            assert_stays(source);
            return;
        }
        if moment == Complete && delivered && mode == "postcopy" {
            // It needs nothing of the source any more, which cannot know better.
            scene.sent.finish().assert_code(0);
            assert_eq!(source.finish().report().text("/outcome"), "migrated");
            return;
        }
        if !in_doubt(moment, mode) || (moment == Moment::Running && delivered) {
            source.wait_for_phase("postcopy");
            source.assert_stands_still();
            let back = source
                .api
                .ctl(&["take-back", &format!("token={}", source.token())]);
            back.assert_code(1);
            assert!(
                back.stderr.contains("the destination has said that it runs"),
                "{back}"
            );
            source.assert_stands_still();
            assert_eq!(source.stop().report().text("/outcome"), "stopped");
            return;
        }
        source.wait_for_phase("in-doubt");
        source.assert_stands_still();
        let token = source.token();
        let wrong = source
            .api
            .ctl(&["take-back", &format!("token={}", "0".repeat(token.len()))]);
        wrong.assert_code(1);
        source.api.ctl(&["cancel-migration"]).assert_code(1);
        assert_ne!(source.api.ctl(&["resume"]).code(), Some(0));
        source.assert_stands_still();
        source
            .api
            .ctl(&["take-back", &format!("token={token}")])
            .assert_code(0);
        assert_not_moved(scene.sent, &["was taken back"]);
        assert_stays(source);
    });
}

#[test]
fn the_source_is_killed_at_every_step() {
    need!(tests::host::kvm());
    scenes(Direction::Server, |moment, mode, delivered| {
        let scene = Scene::at(moment, mode);
        let source = scene.source.kill();
        if delivered {
            scene.proxy.release_message();
        } else {
            scene.proxy.link_down();
            scene.proxy.link_up();
        }
        // Who asked does not know what became of it.
        assert_ne!(scene.sent.finish().code(), Some(0));
        let destination = scene.destination;
        if moment < Commit || (moment == Commit && !delivered) {
            let gone = destination.finish_within(LONGEST);
            gone.assert_code(5);
            assert_eq!(guest_output(&gone.stdout), "", "it was not the destination's");
            return;
        }
        if mode == "postcopy" && moment < Complete {
            let gone = destination.finish_within(LONGEST);
            gone.assert_code(4);
            let report = gone.report();
            assert_eq!(report.text("/outcome"), "source-lost");
            let lost: u64 = (0..)
                .map_while(|index| {
                    let pointer = format!("/lost_pages/{index}/1");
                    report.has(&pointer).then(|| report.count(&pointer))
                })
                .sum();
            assert!(lost > 0, "{report}");
            assert_eq!(report.arrivals() + lost, report.count("/pages/total"), "{report}");
            assert_one_guest(&[guest_output(&source.stdout), guest_output(&gone.stdout)]);
            return;
        }
        destination.wait_for_progress();
        let outputs = [source, destination.stop()].map(|vm| guest_output(&vm.stdout));
        assert_one_guest(&outputs);
    });
}

/// Before the commit that is the end of it; after it, the source calls until it knows.
#[test]
fn the_link_is_cut_at_every_step() {
    need!(tests::host::kvm());
    for moment in Moment::ALL {
        for mode in modes(moment) {
            println!("{moment:?}, {mode}");
            let scene = Scene::at(moment, mode);
            scene.proxy.link_down();
            scene.proxy.throttle(None);
            if moment < Commit {
                assert_not_moved(scene.sent, &[]);
                let gone = scene.destination.finish_within(LONGEST);
                gone.assert_code(5);
                assert_eq!(guest_output(&gone.stdout), "");
                assert_stays(scene.source);
                continue;
            }
            let doubtful = in_doubt(moment, mode);
            scene
                .source
                .wait_for_phase(if doubtful { "in-doubt" } else { "postcopy" });
            scene.source.assert_stands_still();
            scene.proxy.link_up();
            scene.sent.finish().assert_code(0);
            scene.destination.wait_for_progress();
            let source = scene.source.finish();
            assert_eq!(source.report().text("/outcome"), "migrated");
            let outputs = [source, scene.destination.stop()].map(|vm| guest_output(&vm.stdout));
            assert_one_guest(&outputs);
        }
    }
}

/// The commit is lost, and the destination has waited for it for too long: it never runs the VM, and says so to a source that asks.
#[test]
fn a_destination_that_gave_up_never_runs_it() {
    need!(tests::host::kvm());
    let scene = Scene::at(Commit, "precopy");
    scene.proxy.link_down();
    let gone = scene.destination.finish_within(LONGEST);
    gone.assert_code(5);
    assert!(gone.stderr.contains("this side never ran it"), "{}", gone.stderr);
    scene.source.wait_for_phase("in-doubt");
    scene.source.assert_stands_still();
    let token = scene.source.token();
    scene
        .source
        .api
        .ctl(&["take-back", &format!("token={token}")])
        .assert_code(0);
    assert_not_moved(scene.sent, &["was taken back"]);
    assert_stays(scene.source);
}

/// One that was told to end before it heard of the commit says that it never ran the VM.
#[test]
fn a_destination_that_is_stopped_before_the_commit_says_so() {
    need!(tests::host::kvm());
    for moment in [Prepared, State] {
        let scene = Scene::at(moment, "hybrid");
        scene.destination.api.shutdown();
        // Before it has said no, what it said before would be heard, and it would be given the VM.
        scene.destination.wait_for_exit(LONGEST);
        scene.end_hold(true);
        let gone = scene.destination.finish_within(LONGEST);
        assert_eq!(guest_output(&gone.stdout), "");
        let reason = assert_not_moved(scene.sent, &[]);
        println!("{moment:?}: {}", reason.stderr);
        assert_stays(scene.source);
    }
}

/// A source in doubt that is told to end does not run the VM on its way.
#[test]
fn a_source_in_doubt_that_is_stopped_does_not_run_it() {
    need!(tests::host::kvm());
    for _ in 0..5 {
        let scene = Scene::at(Complete, "precopy");
        scene.destination.wait_for_progress();
        scene.source.wait_for_phase("in-doubt");
        let before = scene.source.guest_output();
        let source = scene.source.stop();
        assert_eq!(guest_output(&source.stdout), before, "the guest ran on");
        assert_eq!(source.report().text("/outcome"), "stopped");
        scene.proxy.link_down();
        scene.destination.wait_for_progress();
        assert_one_guest(&[before, guest_output(&scene.destination.stop().stdout)]);
    }
}

/// The link goes down and up again and again while pages are missing, and nothing comes twice.
#[test]
fn the_link_goes_down_again_and_again_after_the_switch() {
    need!(tests::host::kvm());
    let scene = Scene::at(Commit, "postcopy");
    scene.proxy.throttle(Some(4 << 20));
    scene.end_hold(true);
    for _ in 0..5 {
        let bytes = scene.proxy.record().bytes;
        let passed = scene
            .proxy
            .wait_until(&scene.destination, |record| record.bytes > bytes + (1 << 20));
        if !passed || scene.destination.phase() != "postcopy" {
            break;
        }
        scene.proxy.link_down();
        scene.proxy.link_up();
    }
    scene.proxy.throttle(None);
    scene.sent.finish().assert_code(0);
    scene.destination.wait_for_progress();
    let (source, destination) = (scene.source.finish(), scene.destination.stop());
    let report = destination.report();
    assert_eq!(report.count("/pages/duplicate"), 0, "{report}");
    assert!(report.count("/source/reconnects") > 0, "{report}");
    assert_one_guest(&[guest_output(&source.stdout), guest_output(&destination.stdout)]);
}
