//! What a page server costs who asks it, and how it shares itself.
//!
//!     cargo bench -p umem --bench serve -- URL [URL…]
//!
//! Of each server: the time from a request for one page to its answer, servers in turn, round after round; and how much a client
//! with one channel gets while another has 16 that always ask. The servers have one image, without zero pages, of 64 MiB or more.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use umem::channel::{Receiver, Sender};
use umem::link::{Address, Stream};
use umem::units::{PageIndex, PageRange};
use umem::wire::{
    ChannelKind, Epoch, Features, Hello, Incoming, Message, Request, RequestId, Role, SessionId, VERSION,
};

/// How long a server may take to be reached.
const PATIENCE: Duration = Duration::from_secs(5);

const ROUNDS: usize = 30;
const REQUESTS: usize = 2000;
const GREEDY: usize = 16;
const WINDOW: u64 = 32;
const SHARE_FOR: Duration = Duration::from_secs(5);
const PAGES: u64 = 16384;

fn main() {
    let urls: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with("--"))
        .collect();
    let mut clients: Vec<Client> = urls
        .iter()
        .map(|url| Client::connect(url, SessionId::NEW))
        .collect();
    let mut times = vec![Vec::new(); urls.len()];
    for _ in 0..ROUNDS {
        for (client, times) in clients.iter_mut().zip(&mut times) {
            for request in 0..REQUESTS as u64 {
                let since = Instant::now();
                client.ask(PageRange::single(PageIndex(request * 7919 % PAGES)));
                client.take(1);
                times.push(since.elapsed().as_nanos());
            }
        }
    }
    for (url, times) in urls.iter().zip(&mut times) {
        times.sort_unstable();
        let at = |percent: usize| times[times.len() * percent / 100];
        println!(
            "{url} demand_ns p10={} p50={} p90={} p99={}",
            at(10),
            at(50),
            at(90),
            at(99)
        );
    }
    for url in &urls {
        share(url);
    }
}

fn share(url: &str) {
    let stop = AtomicBool::new(false);
    let (greedy, modest) = (AtomicU64::new(0), AtomicU64::new(0));
    let first = Client::connect(url, SessionId::NEW);
    let session = first.session;
    let mut all: Vec<(Client, &AtomicU64)> = vec![(first, &greedy)];
    all.extend((1..GREEDY).map(|_| (Client::connect(url, session), &greedy)));
    all.push((Client::connect(url, SessionId::NEW), &modest));
    thread::scope(|scope| {
        for (mut client, pages) in all {
            let stop = &stop;
            scope.spawn(move || {
                let range = |number: u64| PageRange::new(PageIndex(number * 64 % PAGES), 64);
                (0..WINDOW).for_each(|number| client.ask(range(number)));
                let mut number = WINDOW;
                while !stop.load(Relaxed) {
                    client.take(64);
                    pages.fetch_add(64, Relaxed);
                    client.ask(range(number));
                    number += 1;
                }
            });
        }
        thread::sleep(SHARE_FOR);
        stop.store(true, Relaxed);
    });
    let (greedy, modest) = (greedy.load(Relaxed), modest.load(Relaxed));
    println!(
        "{url} greedy_pages={greedy} modest_pages={modest} modest_of_equal_share={:.2}",
        modest as f64 / ((greedy + modest) as f64 / 2.0)
    );
}

struct Client {
    sender: Sender,
    receiver: Receiver,
    session: SessionId,
    next: u64,
}

impl Client {
    fn connect(url: &str, session: SessionId) -> Self {
        let address = url.parse::<Address>().expect("a URL");
        let stream = Arc::new(Stream::connect(&address, PATIENCE, None).expect("a server"));
        let mut sender = Sender::new(Arc::clone(&stream));
        let mut receiver = Receiver::new(stream, Incoming::connector());
        let channel = ChannelKind::Demand;
        let hello = Hello {
            version: VERSION,
            features: Features::NONE,
            pages: None,
            epoch: Epoch(0),
            keep_alive_ms: 0,
            channel,
            role: Role::Fetcher,
            session,
            digest: None,
            image: "",
        };
        sender.send(&Message::Hello(hello)).expect("a hello");
        let Message::Welcome(welcome) = receiver.receive().expect("an answer") else {
            panic!("refused");
        };
        receiver.incoming.open(channel, Role::Provider, welcome.features);
        Self {
            sender,
            receiver,
            session: welcome.session,
            next: 1,
        }
    }

    fn ask(&mut self, range: PageRange) {
        let request = RequestId(self.next);
        self.next += 1;
        let ranges = [range];
        let ranges = (&ranges[..]).into();
        self.sender
            .send(&Message::Request(Request { request, ranges }))
            .expect("asked");
    }

    fn take(&mut self, mut pages: u64) {
        while pages > 0 {
            pages -= match self.receiver.receive().expect("an answer") {
                Message::Pages(came) => came.range.count,
                Message::Zero(zero) => zero.range.count,
                other => panic!("{other:?}"),
            };
        }
    }
}
