//! Against servers that do what each test asks of them.

mod harness;
mod lent;

use std::collections::HashMap;
use std::sync::mpsc;
use std::time::Instant;

use self::harness::*;
use super::*;
use crate::image;
use crate::link::Listener;
use crate::link::test_credentials::Authority;
use crate::units::PAGE_SIZE;
use crate::wire::{
    Checksums, Encoding, Epoch, FailCode, Message, Outgoing, Pages, RefuseCode, Refused, Role, VERSION,
};

#[test]
fn pages_come_raw_and_compressed_and_only_what_was_offered_is_used() {
    for lz4 in [false, true] {
        let place = Place::new();
        let (said, offered) = mpsc::channel();
        place.serve(move |_, mut channel, caller| {
            said.send(caller.features).unwrap();
            channel.welcome(&caller);
            channel.serve();
        });
        let (source, sink) = connect(
            &[&place],
            RemoteOptions {
                lz4,
                ..options(PATIENCE)
            },
        );
        let ranges = [range(0, 600), range(1000, 1), range(2000, 300)];
        assert!(source.submit(&ranges, Class::Background));
        sink.wait_for(&once(&ranges), [0, 1]);
        let expected = if lz4 { Features::LZ4 } else { Features::NONE };
        assert_eq!(offered.recv_timeout(PATIENCE).unwrap(), expected);
        assert_eq!(offered.recv_timeout(PATIENCE).unwrap(), expected);
        // What was not zero.
        let pages = ranges.iter().flat_map(|range| range.pages());
        let data = pages.filter(|page| !page.0.is_multiple_of(7)).count();
        assert_eq!(source.stats().bytes, (data * PAGE_SIZE) as u64);
        let mut buffer = vec![0; 3 * PAGE_SIZE];
        source.read(range(8, 3), Class::Demand, &mut buffer).unwrap();
        assert_eq!(buffer, [content(8), content(9), content(10)].concat());
        assert_eq!(source.next_data(range(7, 100)).unwrap(), Some(range(8, 6)));
        assert_eq!(source.stats().reconnects, 0);
    }
}

/// A server that speaks TLS, and credentials for a client.
fn tls_place() -> (Place, Credentials) {
    let authority = Authority::new("CA");
    let listener = Listener::bind_with(
        &"tcp:127.0.0.1:0".parse().unwrap(),
        Some(authority.credentials("127.0.0.1")),
    )
    .unwrap();
    let url = RemoteUrl {
        address: listener.address().unwrap(),
        image: String::new(),
    };
    let place = Place {
        listener: Arc::new(listener),
        url,
        _directory: tempfile::tempdir().unwrap(),
    };
    (place, authority.credentials("client"))
}

#[test]
fn pages_come_over_tls() {
    let (place, credentials) = tls_place();
    place.serve_well();
    let options = RemoteOptions {
        credentials: Some(credentials),
        connections: 3,
        ..options(PATIENCE)
    };
    let (source, sink) = connect(&[&place], options);
    let mut expected = HashMap::new();
    for start in (0..PAGES).step_by(512) {
        assert!(source.submit(&[range(start, 512)], Class::Background));
        expected.extend(once(&[range(start, 512)]));
    }
    sink.wait_for(&expected, [0, PAGES / 512]);
}

/// What is asked in the background goes where least is outstanding, and demand has a connection of its own.
#[test]
fn background_goes_where_least_is_outstanding() {
    let place = Place::new();
    let channels = place.channels();
    let options = RemoteOptions {
        connections: 3,
        ..options(PATIENCE)
    };
    let (source, sink) = connect(&[&place], options);
    let mut all: Vec<(Channel, Caller)> = (0..4).map(|_| channels.recv_timeout(PATIENCE).unwrap()).collect();
    // A channel counts when its lane has seen the welcome.
    while source.shared.lanes.iter().any(|lane| lane.load().0) {
        thread::yield_now();
    }
    for (pages, class) in [
        (range(0, 100), Class::Background),
        (range(100, 10), Class::Background),
        (range(200, 20), Class::Background),
        (range(300, 1), Class::Demand),
        (range(400, 5), Class::Background),
        (range(500, 50), Class::Background),
    ] {
        source.submit(&[pages], class);
    }
    let mut asked: Vec<Vec<u64>> = Vec::new();
    for (channel, caller) in &mut all {
        // The first three go to one channel each; then the one with 10 gets 5 and, still the least, 50.
        let mut starts = Vec::new();
        let count = |first| if first == 100 { 3 } else { 1 };
        loop {
            let Said::Request(request, ranges) = channel.hear() else {
                panic!()
            };
            starts.push(ranges[0].start.0);
            channel.answer(request, ranges[0]);
            if starts.len() == count(starts[0]) {
                break;
            }
        }
        assert_eq!(caller.kind == ChannelKind::Demand, starts == [300]);
        asked.push(starts);
    }
    asked.sort();
    assert_eq!(asked, [vec![0], vec![100, 400, 500], vec![200], vec![300]]);
    let ranges = [
        range(0, 100),
        range(100, 10),
        range(200, 20),
        range(300, 1),
        range(400, 5),
        range(500, 50),
    ];
    sink.wait_for(&once(&ranges), [1, 5]);
    // All channels of one VM are one session, from the second on.
    assert_eq!(
        all.iter()
            .filter(|(_, caller)| caller.session == SessionId::NEW)
            .count(),
        1
    );
}

/// Of what was asked on several connections, only what was pending on the lost one is asked again, and of that only what
/// has not come.
#[test]
fn only_what_was_lost_is_asked_again() {
    let place = Place::new();
    let channels = place.channels();
    let options = RemoteOptions {
        connections: 2,
        ..options(PATIENCE)
    };
    let (source, sink) = connect(&[&place], options);
    let mut others = Vec::new();
    let mut first = next_of(&channels, ChannelKind::Background, &mut others);
    let mut second = next_of(&channels, ChannelKind::Background, &mut others);
    while source.shared.lanes.iter().any(|lane| lane.load().0) {
        thread::yield_now();
    }
    source.submit(&[range(0, 10), range(20, 10)], Class::Background);
    source.submit(&[range(100, 10)], Class::Background);
    let (Said::Request(id, mut asked), Said::Request(other_id, other)) = (first.hear(), second.hear()) else {
        panic!();
    };
    // Whichever of them has the two ranges is lost.
    let (mut lost, mut kept, lost_id, kept_id) = (first, second, id, other_id);
    if asked.len() == 1 {
        (lost, kept) = (kept, lost);
    }
    let (lost_id, kept_id) = if asked.len() == 1 {
        (kept_id, lost_id)
    } else {
        (lost_id, kept_id)
    };
    if asked.len() == 1 {
        asked = other;
    }
    assert_eq!(asked, [range(0, 10), range(20, 10)]);
    lost.answer(lost_id, range(3, 4));
    drop(sink.wait("the first pages", |seen| seen.pages.len() == 4));
    lost.stream.shutdown().unwrap();
    let mut successor = next_of(&channels, ChannelKind::Background, &mut others);
    let Said::Request(id, again) = successor.hear() else {
        panic!()
    };
    assert_eq!(again, [range(0, 3), range(7, 3), range(20, 10)]);
    for range in again {
        successor.answer(id, range);
    }
    kept.answer(kept_id, range(100, 10));
    sink.wait_for(&once(&[range(0, 10), range(20, 10), range(100, 10)]), [0, 2]);
    assert_eq!(source.stats().reconnects, 1);
    assert_eq!(sink.seen.lock().unwrap().told, ["lost", "back"]);
    drop(source);
    // Nothing else was said on any of them.
    for channel in others.iter_mut().chain([&mut kept, &mut successor]) {
        assert_eq!(channel.hear(), Said::Gone);
    }
}

/// A server that welcomes and closes, again and again, is called less and less often, and not for ever.
#[test]
fn a_server_that_only_welcomes_is_given_up() {
    let place = Place::new();
    let (count, welcomed) = mpsc::channel();
    place.serve(move |number, mut channel, caller| {
        channel.welcome(&caller);
        if number == 0 {
            let metadata = channel.hear();
            channel.serve_other(&metadata);
            // Until something is asked, after which nothing goes well.
            channel.hear();
        }
        count.send(caller.kind).unwrap();
    });
    let (source, sink) = connect(&[&place], options(Duration::from_millis(700)));
    let since = Instant::now();
    source.submit(&[range(1, 1)], Class::Demand);
    let failure = sink.wait_for_failure();
    assert!(
        since.elapsed() >= Duration::from_millis(600),
        "{:?}",
        since.elapsed()
    );
    assert!(failure.contains("for 0.7 s"), "{failure}");
    // Closed, or reset where it had not read what was asked.
    assert!(failure.contains("the connection to"), "{failure}");
    drop(source);
    let calls = welcomed
        .try_iter()
        .filter(|kind| *kind == ChannelKind::Demand)
        .count();
    // 20, 40, 80, ... ms.
    assert!((2..=10).contains(&calls), "{calls} calls in 700 ms");
}

/// A server that answers something each time is of use, however often it closes.
#[test]
fn a_server_that_closes_after_each_answer_is_good_enough() {
    let place = Place::new();
    place.serve(|number, mut channel, caller| {
        channel.welcome(&caller);
        if number == 0 {
            let metadata = channel.hear();
            channel.serve_other(&metadata);
        }
        if let Said::Request(id, ranges) = channel.hear() {
            channel.answer(id, PageRange::new(ranges[0].start, 1));
        }
    });
    let (source, sink) = connect(&[&place], options(Duration::from_secs(1)));
    let since = Instant::now();
    source.submit(&[range(0, 200)], Class::Demand);
    sink.wait_for(&once(&[range(0, 200)]), [1, 0]);
    assert!(source.stats().reconnects >= 199, "{:?}", source.stats());
    // No pauses: with the shortest there can be it would be 4 s.
    println!("{:?}", since.elapsed());
}

/// A server that shows signs of life and gives no page is of no more use than one that is gone.
#[test]
fn a_server_that_answers_nothing_but_pings_is_given_up() {
    let place = Place::new();
    place.serve(|_, mut channel, caller| {
        channel.welcome(&caller);
        loop {
            let pong = match channel.receiver.receive() {
                Ok(Message::MetadataRequest { request }) => Message::Metadata {
                    request,
                    bytes: METADATA,
                },
                Ok(Message::Ping { token }) => Message::Pong { token },
                Ok(_) => continue,
                Err(_) => break,
            };
            if channel.sender.send(&pong).is_err() {
                break;
            }
        }
    });
    let (source, sink) = connect(&[&place], options(Duration::from_secs(1)));
    source.submit(&[range(1, 1)], Class::Demand);
    let failure = sink.wait_for_failure();
    assert!(failure.contains("gave an answer for 1 s"), "{failure}");
}

/// A server that was stopped takes connections, because the kernel does, and says nothing.
#[test]
fn a_frozen_server_is_noticed_in_time() {
    let good = Place::new();
    good.serve_well();
    // With another server in place of it, and without.
    for alone in [false, true] {
        let frozen = Place::new();
        let places = if alone { &[&frozen][..] } else { &[&frozen, &good] };
        let channels = Arc::clone(&frozen.listener);
        let (asked, hears) = mpsc::channel();
        let thread = thread::spawn(move || {
            let (mut channel, _) = Channel::open(&channels);
            let metadata = channel.hear();
            channel.serve_other(&metadata);
            let request = loop {
                match channel.receiver.receive() {
                    Ok(Message::Request(request)) => break request.request,
                    Ok(_) => {}
                    Err(error) => panic!("{error}"),
                }
            };
            asked.send(request).unwrap();
            // Kept until the client gives it up, without a word.
            while channel.receiver.receive().is_ok() {}
        });
        let (source, sink) = connect(places, options(Duration::from_secs(2)));
        let since = Instant::now();
        source.submit(&[range(1, 1)], Class::Demand);
        hears.recv_timeout(PATIENCE).unwrap();
        if alone {
            let failure = sink.wait_for_failure();
            assert!(failure.contains("for 2 s"), "{failure}");
        } else {
            sink.wait_for(&once(&[range(1, 1)]), [1, 0]);
        }
        let elapsed = since.elapsed();
        assert!(elapsed < Duration::from_secs(6), "{elapsed:?}");
        drop(source);
        thread.join().unwrap();
    }
}

#[test]
fn a_server_without_metadata_is_passed_over() {
    let bad = Place::new();
    bad.serve(|_, mut channel, caller| {
        channel.welcome(&caller);
        let Said::Metadata(request) = channel.hear() else {
            return;
        };
        channel.fail(request, range(0, 1), FailCode::Unreadable);
        channel.hear();
    });
    let good = Place::new();
    good.serve_well();
    connect(&[&bad, &good], options(PATIENCE));
    let urls = [bad.url.clone()];
    let error = RemoteSource::connect(&urls, options(PATIENCE)).err().unwrap();
    assert!(matches!(error, RemoteError::Failed { .. }), "{error}");
}

/// A page that one server cannot give may be had from another: each is asked, and then it is enough.
#[test]
fn what_one_server_cannot_give_another_may() {
    for code in [FailCode::Corrupt, FailCode::Unreadable] {
        let failing = || {
            let place = Place::new();
            place.serve(move |_, mut channel, caller| {
                channel.welcome(&caller);
                loop {
                    match channel.hear() {
                        Said::Request(id, ranges) => channel.fail(id, ranges[0], code),
                        other => {
                            if !channel.serve_other(&other) {
                                return;
                            }
                        }
                    }
                }
            });
            place
        };
        let (first, second) = (failing(), failing());
        let good = Place::new();
        good.serve_well();
        let (source, sink) = connect(&[&first, &second, &good], options(PATIENCE));
        source.submit(&[range(5, 3)], Class::Demand);
        sink.wait_for(&once(&[range(5, 3)]), [1, 0]);
        drop(source);

        let (source, sink) = connect(&[&first, &second], options(PATIENCE));
        source.submit(&[range(5, 3)], Class::Demand);
        let failure = sink.wait_for_failure();
        // The last that was asked is the one that is named.
        assert!(failure.contains(&second.url.to_string()), "{failure}");
        let seen = sink.seen.lock().unwrap();
        assert_eq!(
            matches!(seen.failed[0], SourceError::Corrupt(_)),
            code == FailCode::Corrupt
        );
        drop(source);
    }
}

#[test]
fn a_damaged_page_is_asked_for_once_more_or_elsewhere() {
    let damaging = |times: usize| {
        let place = Place::new();
        place.serve(move |number, mut channel, caller| {
            channel.welcome(&caller);
            loop {
                match channel.hear() {
                    Said::Request(id, ranges) if caller.kind == ChannelKind::Demand && number < times + 2 => {
                        let range = ranges[0];
                        let checksums = [image::checksum(&content(range.start.0))];
                        let mut data = content(range.start.0);
                        data[100] ^= 1;
                        channel.send(&Message::Pages(Pages {
                            request: id,
                            range,
                            epoch: Epoch(0),
                            encoding: Encoding::Raw,
                            checksums: Checksums::from(&checksums[..]),
                            data: &data,
                        }));
                    }
                    Said::Request(id, ranges) => channel.answer(id, ranges[0]),
                    other => {
                        if !channel.serve_other(&other) {
                            return;
                        }
                    }
                }
            }
        });
        place
    };
    let always = damaging(usize::MAX - 2);
    let (source, sink) = connect(&[&always], options(PATIENCE));
    source.submit(&[range(5, 1)], Class::Demand);
    let failure = sink.wait_for_failure();
    assert!(
        failure.contains("page 5 ") && failure.contains("checksum"),
        "{failure}"
    );
    assert!(matches!(
        sink.seen.lock().unwrap().failed[0],
        SourceError::Corrupt(_)
    ));
    drop(source);
    let good = Place::new();
    good.serve_well();
    let (source, sink) = connect(&[&always, &good], options(PATIENCE));
    source.submit(&[range(5, 1)], Class::Demand);
    sink.wait_for(&once(&[range(5, 1)]), [1, 0]);
    drop(source);
}

/// Damage that the wire does hits another page each time, and is not the server's. It is not waited for without end.
#[test]
fn pages_of_one_request_that_are_damaged_once_each_are_no_fault_of_the_server() {
    // Of answer N, page 1 + N is damaged, as long as N is less than `answers`.
    let damaging = |answers: u64| {
        let place = Place::new();
        let answered = AtomicU64::new(0);
        place.serve(move |_, mut channel, caller| {
            channel.welcome(&caller);
            loop {
                match channel.hear() {
                    Said::Request(id, ranges) => {
                        let range = ranges[0];
                        let answer = answered.fetch_add(1, Relaxed);
                        // As if no page were zero: what is damaged is never taken.
                        let mut data: Vec<u8> = range
                            .pages()
                            .flat_map(|page| if answers < 6 { content(page.0) } else { content(1) })
                            .collect();
                        let checksums: Vec<u64> = data.chunks(PAGE_SIZE).map(image::checksum).collect();
                        if answer < answers {
                            data[answer as usize * PAGE_SIZE] ^= 1;
                        }
                        channel.send(&Message::Pages(Pages {
                            request: id,
                            range,
                            epoch: Epoch(0),
                            encoding: Encoding::Raw,
                            checksums: Checksums::from(&checksums[..]),
                            data: &data,
                        }));
                    }
                    other => {
                        if !channel.serve_other(&other) {
                            return;
                        }
                    }
                }
            }
        });
        place
    };
    // None of them is zero.
    let wanted = range(1, 6);
    let place = damaging(5);
    let (source, sink) = connect(&[&place], options(PATIENCE));
    source.submit(&[wanted], Class::Demand);
    sink.wait_for(&once(&[wanted]), [1, 0]);
    drop(source);

    // 1 to 20, without those that are zero; each answer damages another page, until it is no longer the wire.
    let place = damaging(20);
    let (source, sink) = connect(&[&place], options(PATIENCE));
    source.submit(&[range(1, 20)], Class::Demand);
    let failure = sink.wait_for_failure();
    assert!(failure.contains("checksum"), "{failure}");
    drop(source);
}

/// A frame that came with the welcome is taken at once, though nothing more comes.
#[test]
fn what_comes_together_with_the_welcome_is_taken() {
    let place = Place::new();
    let (pongs, ponged) = mpsc::channel();
    place.serve(move |number, mut channel, caller| {
        // The first connection asks for the metadata, and takes what came with the welcome with that.
        if caller.kind != ChannelKind::Demand || number == 0 {
            channel.welcome(&caller);
            let metadata = channel.hear();
            channel.serve_other(&metadata);
            if caller.kind != ChannelKind::Demand {
                channel.serve();
            }
            // The demand connection is lost, and made anew.
            return;
        }
        let welcome = Message::Welcome(channel.welcome_to(&caller));
        let (mut outgoing, mut bytes) = (Outgoing::default(), Vec::new());
        for message in [&welcome, &Message::Ping { token: 9 }] {
            outgoing.append(message, &mut bytes).unwrap();
        }
        std::io::Write::write_all(&mut &*channel.stream, &bytes).unwrap();
        channel
            .receiver
            .incoming
            .open(caller.kind, Role::Fetcher, channel.features);
        let answer = channel.receiver.receive();
        let _ = pongs.send(matches!(answer, Ok(Message::Pong { token: 9 })));
        // It stays open until the test ends.
        channel.serve();
    });
    let (_source, _sink) = connect(&[&place], options(PATIENCE));
    assert!(
        ponged.recv_timeout(PATIENCE).unwrap(),
        "something else came first"
    );
}

/// A server that is gone before pages have anywhere to go is told of when they have.
#[test]
fn a_loss_before_there_is_a_sink_is_told() {
    let place = Place::new();
    let channels = place.channels();
    let (source, _) = RemoteSource::connect(std::slice::from_ref(&place.url), options(PATIENCE)).unwrap();
    let channel = next_of(&channels, ChannelKind::Demand, &mut Vec::new());
    // Its address is gone: nobody can connect any more.
    drop(place);
    drop(channel);
    let since = Instant::now();
    while *source.shared.lost() == 0 {
        assert!(since.elapsed() < PATIENCE, "the loss was not noticed");
        std::thread::yield_now();
    }
    let sink = Arc::new(Sink::default());
    let weak: Weak<Sink> = Arc::downgrade(&sink);
    source.attach(weak);
    assert_eq!(sink.seen.lock().unwrap().told, ["lost"]);
}

/// A server that is about to end still gives what it was asked for; what comes after that goes elsewhere at once.
#[test]
fn a_goodbye_loses_nothing_and_holds_up_nothing() {
    let (old, new) = (Place::new(), Place::new());
    let (channels, new_channels) = (old.channels(), new.more_channels());
    let (source, sink) = connect(&[&old, &new], options(PATIENCE));
    let mut others = Vec::new();
    let mut draining = next_of(&channels, ChannelKind::Demand, &mut others);
    source.submit(&[range(0, 4)], Class::Demand);
    let Said::Request(id, asked) = draining.hear() else {
        panic!()
    };
    draining.answer(id, range(0, 1));
    draining.say_goodbye();
    assert_eq!(draining.hear(), Said::Goodbye);
    // Elsewhere, while the old one has not answered yet.
    let mut successor = next_of(&new_channels, ChannelKind::Demand, &mut others);
    source.submit(&[range(10, 1)], Class::Demand);
    let Said::Request(other, ranges) = successor.hear() else {
        panic!()
    };
    assert_eq!(
        ranges,
        [range(10, 1)],
        "what the old one still answers was asked again"
    );
    successor.answer(other, range(10, 1));
    drop(sink.wait("what was asked elsewhere", |seen| seen.pages.contains_key(&10)));
    assert_eq!(asked, [range(0, 4)]);
    draining.answer(id, range(1, 2));
    drop(sink.wait("what the old one still gives", |seen| seen.pages.contains_key(&2)));
    // What it does not give before it ends is asked elsewhere then.
    draining.stream.shutdown().unwrap();
    let Said::Request(again, ranges) = successor.hear() else {
        panic!()
    };
    assert_eq!(ranges, [range(3, 1)]);
    successor.answer(again, range(3, 1));
    sink.wait_for(&once(&[range(0, 4), range(10, 1)]), [2, 0]);
    drop(source);
}

/// Who asks waits for nothing, though the server neither reads nor writes; and nothing of it is lost.
#[test]
fn asking_never_waits() {
    let place = Place::new();
    let channels = place.channels();
    let (source, sink) = connect(&[&place], options(PATIENCE));
    let mut others = Vec::new();
    let mut channel = next_of(&channels, ChannelKind::Background, &mut others);
    rustix::net::sockopt::set_socket_recv_buffer_size(&*channel.stream, 4096).unwrap();
    while source.shared.lanes[1].load().0 {
        thread::yield_now();
    }
    // 256 ranges of 16 bytes, a thousand times: more than the sockets hold.
    let ranges: Vec<PageRange> = (0..256).map(|index| range(2 * index, 1)).collect();
    let since = Instant::now();
    for _ in 0..1000 {
        source.submit(&ranges, Class::Background);
    }
    assert!(since.elapsed() < PATIENCE / 2);
    for _ in 0..1000 {
        let Said::Request(id, asked) = channel.hear() else {
            panic!()
        };
        assert_eq!(asked, ranges);
        // Zero throughout, as far as it is told: short answers.
        for range in asked {
            channel.answer(id, range);
        }
    }
    let expected = ranges.iter().map(|range| (range.start.0, 1000)).collect();
    sink.wait_for(&expected, [0, 1000]);
    drop(source);
}

#[test]
fn a_refused_session_is_begun_anew() {
    let place = Place::new();
    let (said, sessions) = mpsc::channel();
    place.serve(move |number, mut channel, caller| {
        said.send(caller.session).unwrap();
        if number > 0 && caller.session != SessionId::NEW {
            let refused = Refused {
                version: VERSION,
                code: RefuseCode::UnknownSession,
                text: "",
            };
            return channel.send(&Message::Refused(refused));
        }
        channel.welcome(&caller);
        channel.serve();
    });
    let (source, sink) = connect(&[&place], options(PATIENCE));
    source.submit(&[range(1, 1)], Class::Background);
    sink.wait_for(&once(&[range(1, 1)]), [0, 1]);
    let said: Vec<SessionId> = (0..3).map(|_| sessions.recv_timeout(PATIENCE).unwrap()).collect();
    assert_eq!(said, [SessionId::NEW, SessionId([7; 16]), SessionId::NEW]);
    assert_eq!(source.stats().reconnects, 0, "no connection was lost");
}

/// Numbers by a seed (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}

/// A server that closes, says goodbye, or damages what it sends at any point, over several connections, while the receiving of
/// demand is borrowed and given back: each page of each request arrives once, and each request is completed once.
#[test]
fn whatever_is_lost_each_page_comes_once() {
    let seed = std::env::var("UMEM_TEST_SEED").map_or_else(
        |_| std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64,
        |seed| seed.parse().unwrap(),
    );
    println!("seed: UMEM_TEST_SEED={seed}");
    let places = [Place::new(), Place::new()];
    for (index, place) in places.iter().enumerate() {
        place.serve(move |number, mut channel, caller| {
            let mut random = Random(seed ^ ((index as u64) << 32) ^ number as u64);
            channel.welcome(&caller);
            // The first brings the metadata. The others last for so many frames.
            let mut frames = if number == 0 { 20 } else { random.below(40) };
            loop {
                match channel.hear() {
                    Said::Request(id, ranges) => {
                        let mut pieces: Vec<PageRange> = Vec::new();
                        for range in ranges {
                            let mut at = range.start;
                            while at < range.end() {
                                let piece = PageRange::new(at, 1 + random.below(64)).clamp_to(range.end());
                                pieces.push(piece);
                                at = piece.end();
                            }
                        }
                        // In any order.
                        for end in (1..pieces.len()).rev() {
                            pieces.swap(end, random.below(end as u64 + 1) as usize);
                        }
                        for piece in pieces {
                            if frames == 0 {
                                if random.below(3) == 0 {
                                    channel.say_goodbye();
                                    frames = u64::MAX;
                                } else {
                                    // Half a frame, sometimes.
                                    if random.below(2) == 0 {
                                        let _ = std::io::Write::write(&mut &*channel.stream, &[1, 2, 3]);
                                    }
                                    let _ = channel.stream.shutdown();
                                    return;
                                }
                            }
                            frames -= 1;
                            channel.answer(id, piece);
                        }
                    }
                    other => {
                        if !channel.serve_other(&other) {
                            return;
                        }
                    }
                }
            }
        });
    }
    let options = RemoteOptions {
        connections: 3,
        lz4: seed.is_multiple_of(2),
        ..options(PATIENCE)
    };
    let (source, sink) = connect(&[&places[0], &places[1]], options);
    let mut random = Random(seed);
    let mut expected: HashMap<u64, u64> = HashMap::new();
    let mut submits = [0, 0];
    let (source, ended) = (Arc::new(source), Arc::new(AtomicBool::new(false)));
    let borrower = {
        let (source, sink, ended) = (Arc::clone(&source), Arc::clone(&sink), Arc::clone(&ended));
        thread::spawn(move || lent::borrow_at_random(&source, &sink, seed, &ended))
    };
    for _ in 0..300 {
        let demand = random.below(3) == 0;
        let mut ranges = Vec::new();
        for _ in 0..=random.below(4) {
            let count = 1 + if demand { 0 } else { random.below(200) };
            ranges.push(range(random.below(PAGES - count), count));
        }
        for page in ranges.iter().flat_map(|range| range.pages()) {
            *expected.entry(page.0).or_default() += 1;
        }
        submits[usize::from(!demand)] += 1;
        source.submit(&ranges, if demand { Class::Demand } else { Class::Background });
        // Not faster than it is answered, or few requests see a loss.
        drop(sink.wait("most of it", |seen| {
            !seen.failed.is_empty() || submits.iter().sum::<u64>() < seen.completed.values().sum::<u64>() + 16
        }));
    }
    sink.wait_for(&expected, submits);
    let stats = source.stats();
    ended.store(true, Relaxed);
    let (loans, borrowed) = borrower.join().unwrap();
    println!("{stats:?}, {loans} loans, {borrowed} pages by them");
    assert!(stats.reconnects > 5, "nothing was lost: {stats:?}");
    assert!(loans > 5 && borrowed > 0, "nothing was borrowed");
    assert_eq!(stats.requests, submits.iter().sum::<u64>());
    source.close();
    drop(source);
    let seen = sink.seen.lock().unwrap();
    assert_eq!(seen.pages, expected, "something came after the end");
}
