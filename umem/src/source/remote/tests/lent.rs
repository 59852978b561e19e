//! While the receiving of demand is lent, and comes and goes.

use std::cell::Cell;
use std::sync::atomic::AtomicBool;

use rustix::event::{PollFd, PollFlags, Timespec};

use super::*;
use crate::wire::{Outgoing, RequestId};

/// A sink that counts what a borrower hands to it.
struct Counting<'a> {
    sink: &'a Sink,
    pages: Cell<u64>,
}

impl PageSink for Counting<'_> {
    fn arrived(&self, pages: PageRange, content: Content, buffer: &[u8], class: Class) {
        self.pages.set(self.pages.get() + pages.count);
        self.sink.arrived(pages, content, buffer, class);
    }

    fn completed(&self, class: Class) {
        self.sink.completed(class);
    }

    fn failed(&self, error: SourceError) {
        self.sink.failed(error);
    }
}

/// Borrows, as soon as there is a connection that the keeper does not have in hand.
fn borrow(source: &RemoteSource) -> Box<dyn Inbox> {
    let since = Instant::now();
    loop {
        if let Some(inbox) = source.lend_inbox() {
            return inbox;
        }
        assert!(since.elapsed() < PATIENCE, "there is nothing to be lent");
        thread::yield_now();
    }
}

/// Waits until something is there; false: for `patience` nothing was.
fn wait(inbox: &dyn Inbox, patience: Duration) -> bool {
    let patience = Timespec::try_from(patience).unwrap();
    let descriptor = PollFd::from_borrowed_fd(inbox.as_fd(), PollFlags::IN);
    rustix::event::poll(&mut [descriptor], Some(&patience)).unwrap() > 0
}

/// Receives until `condition` or the end of the loan, which it answers.
fn receive_until(inbox: &dyn Inbox, sink: &dyn PageSink, condition: impl Fn() -> bool) -> Received {
    let mut received = Received::All;
    while !condition() {
        if received == Received::All {
            assert!(wait(inbox, PATIENCE), "nothing came");
        }
        received = inbox.receive(sink);
        if received == Received::Over {
            break;
        }
    }
    received
}

/// Borrows again and again, receives for a while, and gives it back, until `ended`. Answers how often, and how many pages came.
pub(super) fn borrow_at_random(
    source: &RemoteSource,
    sink: &Sink,
    seed: u64,
    ended: &AtomicBool,
) -> (u64, u64) {
    let sink = Counting {
        sink,
        pages: Cell::new(0),
    };
    let (mut random, mut loans) = (Random(seed), 0);
    while !ended.load(Relaxed) {
        if let Some(inbox) = source.lend_inbox() {
            loans += 1;
            for _ in 0..random.below(20) {
                wait(&*inbox, Duration::from_millis(random.below(3)));
                if inbox.receive(&sink) == Received::Over {
                    break;
                }
            }
        }
        for _ in 0..random.below(50) {
            thread::yield_now();
        }
    }
    (loans, sink.pages.get())
}

/// Over TLS what has come need not show in the descriptor.
#[test]
fn pages_come_to_a_borrower_over_tls() {
    let (place, credentials) = tls_place();
    place.serve_well();
    let options = RemoteOptions {
        credentials: Some(credentials),
        ..options(PATIENCE)
    };
    let (source, sink) = connect(&[&place], options);
    let inbox = borrow(&source);
    let counting = Counting {
        sink: &sink,
        pages: Cell::new(0),
    };
    let mut expected = HashMap::new();
    for start in (0..PAGES).step_by(1024) {
        for range in [range(start, 512), range(start + 700, 1)] {
            assert!(source.submit(&[range], Class::Demand));
            expected.extend(once(&[range]));
        }
    }
    let count = expected.len() as u64;
    receive_until(&*inbox, &counting, || counting.pages.get() == count);
    sink.wait_for(&expected, [PAGES / 512, 0]);
}

/// Half a frame keeps nobody waiting, and the other half may come to somebody else.
#[test]
fn half_a_frame_is_kept() {
    let place = Place::new();
    let channels = place.channels();
    let (source, sink) = connect(&[&place], options(PATIENCE));
    let channel = next_of(&channels, ChannelKind::Demand, &mut Vec::new());
    let inbox = borrow(&source);
    assert!(source.lend_inbox().is_none(), "it was lent twice");
    let data = content(1);
    let checksums = [image::checksum(&data)];
    let answer = Message::Pages(Pages {
        request: RequestId(1),
        range: range(1, 1),
        epoch: Epoch(0),
        encoding: Encoding::Raw,
        checksums: Checksums::from(&checksums[..]),
        data: &data,
    });
    let (mut outgoing, mut frame) = (Outgoing::default(), Vec::new());
    // A welcome and the metadata came before it.
    for token in 0..2 {
        outgoing.append(&Message::Ping { token }, &mut frame).unwrap();
    }
    frame.clear();
    outgoing.append(&answer, &mut frame).unwrap();
    source.submit(&[range(1, 1)], Class::Demand);
    let send = |bytes: &[u8]| std::io::Write::write_all(&mut &*channel.stream, bytes).unwrap();
    for piece in [0..10, 10..40, 40..1000] {
        send(&frame[piece]);
        assert!(wait(&*inbox, PATIENCE));
        assert_eq!(inbox.receive(&*sink), Received::All);
    }
    assert!(sink.seen.lock().unwrap().pages.is_empty());
    drop(inbox);
    send(&frame[1000..]);
    sink.wait_for(&once(&[range(1, 1)]), [1, 0]);
}

/// The keeper looks after a connection on which somebody else receives.
#[test]
fn a_server_that_says_nothing_is_left_whoever_receives() {
    let (frozen, good) = (Place::new(), Place::new());
    let channels = frozen.channels();
    good.serve_well();
    let (source, sink) = connect(&[&frozen, &good], options(Duration::from_secs(2)));
    let mut others = Vec::new();
    let _silent = next_of(&channels, ChannelKind::Demand, &mut others);
    let inbox = borrow(&source);
    source.submit(&[range(1, 1)], Class::Demand);
    sink.wait_for(&once(&[range(1, 1)]), [1, 0]);
    assert_eq!(inbox.receive(&*sink), Received::Over);
    assert_eq!(source.stats().reconnects, 1);
}

#[test]
fn what_is_damaged_reaches_no_borrower() {
    let place = Place::new();
    let channels = place.channels();
    let (source, sink) = connect(&[&place], options(PATIENCE));
    let mut others = Vec::new();
    let mut channel = next_of(&channels, ChannelKind::Demand, &mut others);
    let inbox = borrow(&source);
    source.submit(&[range(1, 2)], Class::Demand);
    let Said::Request(id, _) = channel.hear() else {
        panic!()
    };
    let mut data = [content(1), content(2)].concat();
    let checksums: Vec<u64> = data.chunks(PAGE_SIZE).map(image::checksum).collect();
    data[PAGE_SIZE + 5] ^= 1;
    channel.send(&Message::Pages(Pages {
        request: id,
        range: range(1, 2),
        epoch: Epoch(0),
        encoding: Encoding::Raw,
        checksums: Checksums::from(&checksums[..]),
        data: &data,
    }));
    assert_eq!(receive_until(&*inbox, &*sink, || false), Received::Over);
    assert!(sink.seen.lock().unwrap().pages.is_empty());
    // The keeper has it, and asks again.
    let mut channel = next_of(&channels, ChannelKind::Demand, &mut others);
    let Said::Request(id, ranges) = channel.hear() else {
        panic!()
    };
    assert_eq!(ranges, [range(1, 2)]);
    channel.answer(id, range(1, 2));
    sink.wait_for(&once(&ranges), [1, 0]);
}

/// A goodbye ends the loan; what was asked for before it still comes.
#[test]
fn a_goodbye_ends_a_loan() {
    let (old, new) = (Place::new(), Place::new());
    let channels = old.channels();
    new.serve_well();
    let (source, sink) = connect(&[&old, &new], options(PATIENCE));
    let mut channel = next_of(&channels, ChannelKind::Demand, &mut Vec::new());
    let inbox = borrow(&source);
    source.submit(&[range(0, 4)], Class::Demand);
    let Said::Request(id, _) = channel.hear() else {
        panic!()
    };
    channel.answer(id, range(0, 1));
    channel.say_goodbye();
    assert_eq!(receive_until(&*inbox, &*sink, || false), Received::Over);
    assert_eq!(channel.hear(), Said::Goodbye);
    channel.answer(id, range(1, 3));
    source.submit(&[range(10, 1)], Class::Demand);
    sink.wait_for(&once(&[range(0, 4), range(10, 1)]), [2, 0]);
}

#[test]
fn the_end_of_a_source_ends_a_loan() {
    let place = Place::new();
    place.serve_well();
    let (source, sink) = connect(&[&place], options(PATIENCE));
    let inbox = borrow(&source);
    source.submit(&[range(1, 1)], Class::Demand);
    source.close();
    assert_eq!(receive_until(&*inbox, &*sink, || false), Received::Over);
    drop(inbox);
    assert!(source.lend_inbox().is_none());
}
