//! Service and clients, over a real socket.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::queue::Event;
use crate::random::Random;
use crate::ranges::{AddressRange, Cookie};

const PAGE: u64 = 4096;
/// Nothing takes so long.
const PATIENCE: Duration = Duration::from_secs(20);

struct Fixture {
    directory: tempfile::TempDir,
    service: Service,
}

impl Fixture {
    fn new(limit: Duration) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
        let service = Service::start(listener, ServiceOptions { limit }).unwrap();
        Self { directory, service }
    }

    fn client(&self) -> Client {
        self.connect(ClientOptions::default()).unwrap()
    }

    fn acknowledging(&self) -> Client {
        let acknowledge_within = Some(PATIENCE);
        self.connect(ClientOptions { acknowledge_within }).unwrap()
    }

    fn connect(&self, options: ClientOptions) -> Result<Client, ClientError> {
        Client::connect(&self.directory.path().join("socket"), options)
    }

    fn raw(&self) -> UnixStream {
        let stream = UnixStream::connect(self.directory.path().join("socket")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }
}

fn pages(first: u64, count: u64) -> AddressRange {
    AddressRange::new(first * PAGE, (first + count) * PAGE)
}

fn invalidated(cookie: u64, part: AddressRange) -> Notice {
    Notice::Event(Event::Invalidated {
        cookie: Cookie(cookie),
        part,
        exact: true,
    })
}

fn last(counter: u64) -> Notice {
    Notice::Event(Event::Last { counter })
}

#[test]
fn who_watches_hears_of_just_that_before_it_happens_and_others_hear_nothing() {
    let fixture = Fixture::new(PATIENCE);
    let (mut watcher, mut other) = (fixture.client(), fixture.client());
    for page in 10..20 {
        watcher.register(pages(page, 1), Cookie(page)).unwrap();
    }
    other.register(pages(0, 10), Cookie(1)).unwrap();
    other.register(pages(20, 1000), Cookie(2)).unwrap();
    let changed = fixture.service.change(&[pages(12, 2), pages(17, 1)], || {
        assert_eq!(watcher.counter().load(), 2);
        assert!(watcher.wait(Duration::ZERO).unwrap());
    });
    assert_eq!((changed.told, changed.late), (1, vec![]));
    let heard = watcher.read(100).unwrap();
    let expected = [12, 13, 17].map(|page| invalidated(page, pages(page, 1)));
    assert!(expected.iter().all(|event| heard.contains(event)), "{heard:?}");
    assert_eq!(heard[3..], [last(2)]);
    assert!(!watcher.wait(Duration::ZERO).unwrap());
    assert!(!other.wait(Duration::ZERO).unwrap());
    assert_eq!(other.counter().load(), 0);
    assert_eq!(other.read(100).unwrap(), [last(0)]);
    let status = fixture.service.status();
    assert_eq!((status.changes, status.hits, status.clients.len()), (1, 1, 2));
    assert_eq!(status.clients[0].ranges.len(), 10);
}

#[test]
fn a_change_waits_for_its_acknowledgement_and_its_end_is_told() {
    let fixture = Fixture::new(PATIENCE);
    let mut client = fixture.acknowledging();
    assert_eq!(client.limit(), Some(LONGEST_LIMIT));
    client.register(pages(0, 4), Cookie(3)).unwrap();
    let (made, is_made) = mpsc::channel();
    thread::scope(|scope| {
        let change = scope.spawn(|| fixture.service.change(&[pages(1, 1)], || made.send(()).unwrap()));
        assert!(client.wait(PATIENCE).unwrap());
        let heard = client.read(100).unwrap();
        assert_eq!(
            heard,
            [invalidated(3, pages(1, 1)), Notice::Begin { change: 1 }, last(1)]
        );
        assert!(is_made.try_recv().is_err(), "made before it was acknowledged");
        // One that has not begun.
        let error = client.acknowledge(2).unwrap_err();
        assert!(
            matches!(
                error,
                ClientError::Refused {
                    errno: libc::EINVAL,
                    ..
                }
            ),
            "{error}"
        );
        client.acknowledge(1).unwrap();
        is_made.recv_timeout(PATIENCE).unwrap();
        assert_eq!(change.join().unwrap().late, []);
    });
    assert!(client.wait(PATIENCE).unwrap());
    assert_eq!(client.read(100).unwrap(), [Notice::End { change: 1 }, last(1)]);
    // One that does not hit it does not wait for it.
    assert_eq!(fixture.service.change(&[pages(9, 1)], || 5).result, 5);
    assert_eq!(fixture.service.status().acknowledged, 1);
}

#[test]
fn a_client_that_dies_is_not_waited_for() {
    let fixture = Fixture::new(PATIENCE);
    let mut client = fixture.acknowledging();
    client.register(pages(0, 4), Cookie(3)).unwrap();
    let began = Instant::now();
    let changed = thread::scope(|scope| {
        let change = scope.spawn(|| fixture.service.change(&[pages(1, 1)], || {}));
        assert!(client.wait(PATIENCE).unwrap());
        drop(client);
        change.join().unwrap()
    });
    assert_eq!((changed.told, changed.late), (1, vec![]));
    assert!(began.elapsed() < LONGEST_LIMIT, "{:?}", began.elapsed());
}

#[test]
fn a_client_that_hangs_is_waited_for_until_the_limit_and_let_go() {
    let limit = Duration::from_millis(100);
    let fixture = Fixture::new(limit);
    let mut client = fixture.acknowledging();
    assert_eq!(client.limit(), Some(limit));
    client.register(pages(0, 4), Cookie(3)).unwrap();
    let began = Instant::now();
    let changed = fixture.service.change(&[pages(1, 1)], || began.elapsed());
    assert!(changed.result >= limit, "{changed:?}");
    assert_eq!(changed.late, [std::process::id() as i32]);
    assert!(matches!(client.wait(PATIENCE), Err(ClientError::Closed)));
    assert!(matches!(client.read(10), Err(ClientError::Closed)));
    assert_eq!(
        client.counter().load(),
        2,
        "who only looks at it must see that too"
    );
    // The next one waits for nobody.
    let changed = fixture.service.change(&[pages(1, 1)], || {});
    assert_eq!((changed.told, changed.late), (0, vec![]));
    assert_eq!(fixture.service.status().late, 1);
}

#[test]
fn what_is_registered_while_a_change_goes_on_hears_of_it() {
    let fixture = Fixture::new(PATIENCE);
    let mut early = fixture.client();
    let late = fixture.service.change(&[pages(5, 1)], || {
        early.register(pages(5, 1), Cookie(1)).unwrap();
        let mut late = fixture.client();
        late.register(pages(5, 1), Cookie(1)).unwrap();
        assert_eq!((early.counter().load(), late.counter().load()), (0, 0));
        late
    });
    for mut client in [early, late.result] {
        assert!(client.wait(PATIENCE).unwrap());
        assert_eq!(client.read(10).unwrap()[0], invalidated(1, pages(5, 1)));
    }
}

#[test]
fn who_registers_without_end_is_stopped() {
    let fixture = Fixture::new(PATIENCE);
    let mut client = fixture.client();
    for cookie in 0..RANGES_AT_MOST as u64 {
        client.register(pages(cookie, 1), Cookie(cookie)).unwrap();
    }
    let error = client.register(pages(0, 1), Cookie(u64::MAX)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "65536 ranges are registered, and a client can have no more"
    );
    client.unregister(Cookie(7)).unwrap();
    client.register(pages(0, 1), Cookie(u64::MAX)).unwrap();
    // All of them at once come in parts.
    fixture.service.changed(&[AddressRange::ALL]);
    let mut heard = 0;
    loop {
        let events = client.read(usize::MAX).unwrap();
        heard += events.len();
        assert!(events.len() <= EVENTS_AT_MOST);
        if events.last() == Some(&last(1)) {
            break;
        }
    }
    assert_eq!(heard, RANGES_AT_MOST + 1);
}

#[test]
fn who_connects_without_end_is_stopped() {
    let fixture = Fixture::new(PATIENCE);
    let clients: Vec<Client> = (0..CLIENTS_AT_MOST).map(|_| fixture.client()).collect();
    let error = fixture.connect(ClientOptions::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "32 clients are served, and there can be no more"
    );
    drop(clients);
    let began = Instant::now();
    while fixture.connect(ClientOptions::default()).is_err() {
        assert!(began.elapsed() < PATIENCE, "nobody is let in any more");
        thread::yield_now();
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let fixture = Fixture::new(PATIENCE);
    let mut client = fixture.client();
    client.register(pages(0, 1), Cookie(1)).unwrap();
    for (result, said) in [
        (
            client.register(AddressRange::new(u64::MAX, 5), Cookie(2)),
            "the range ends before it starts",
        ),
        (
            client.register(pages(8, 1), Cookie(1)),
            "another range is registered with this cookie",
        ),
        (
            client.unregister(Cookie(9)),
            "no range is registered with this cookie",
        ),
    ] {
        let error = result.unwrap_err();
        assert_eq!(error.to_string(), said);
        assert!(matches!(
            error,
            ClientError::Refused {
                errno: libc::EINVAL,
                ..
            }
        ));
    }
    // It is a client as before.
    fixture.service.changed(&[pages(0, 1)]);
    assert_eq!(client.read(10).unwrap()[0], invalidated(1, pages(0, 1)));
    assert!(matches!(client.read(0), Ok(events) if events.is_empty()));
}

#[test]
fn garbage_ends_the_connection_it_came_by_and_no_other() {
    let fixture = Fixture::new(PATIENCE);
    let mut client = fixture.client();
    client.register(pages(0, 1), Cookie(1)).unwrap();
    let mut random = Random::seeded();
    for round in 0..200 {
        let mut stream = fixture.raw();
        let mut bytes: Vec<u8> = (0..random.below(200)).map(|_| random.next() as u8).collect();
        if round % 2 == 0 {
            // A good beginning.
            let hello = protocol::Request::Hello { limit: None };
            bytes.splice(0..0, hello.encode());
        }
        // It may be closed by then.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut said = Vec::new();
        let _ = stream.read_to_end(&mut said);
    }
    fixture.service.changed(&[pages(0, 1)]);
    assert_eq!(client.read(10).unwrap()[0], invalidated(1, pages(0, 1)));
}

#[test]
fn a_client_that_takes_no_reply_holds_up_nobody() {
    let fixture = Fixture::new(PATIENCE);
    let mut deaf = fixture.raw();
    deaf.set_nonblocking(true).unwrap();
    deaf.write_all(&protocol::Request::Hello { limit: None }.encode())
        .unwrap();
    let read = protocol::Request::Read { max: 1000 }.encode();
    while deaf.write_all(&read).is_ok() {}
    let mut client = fixture.client();
    client.register(pages(0, 1), Cookie(1)).unwrap();
    fixture.service.change(&[pages(0, 1)], || {});
    assert_eq!(client.read(10).unwrap()[0], invalidated(1, pages(0, 1)));
}

#[test]
fn the_end_of_the_service_is_seen_everywhere() {
    let fixture = Fixture::new(PATIENCE);
    let mut client = fixture.client();
    client.register(pages(0, 1), Cookie(1)).unwrap();
    drop(fixture.service);
    assert!(matches!(client.wait(PATIENCE), Err(ClientError::Closed)));
    assert!(matches!(client.read(10), Err(ClientError::Closed)));
    assert_eq!(client.counter().load(), 1);
}
