//! Another source, made slow: a tool for experiments with sources that are far away.
//!
//! Nothing is handed out before a delay has passed since it was asked for. As with a server that is far away, any number of requests
//! are on their way at a time.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::{Class, Content, PageSink, PageSource, SourceError, SourceStats};
use crate::units::{PAGE_SIZE, PageRange};

/// Pages read at a time on behalf of one request.
const STEP: u64 = 64;

/// How long requests take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delay {
    /// The least.
    pub min: Duration,
    /// The most, not less than the least. Each request gets its own in between.
    pub max: Duration,
    /// Chooses them.
    pub seed: u64,
}

impl Delay {
    /// That of one request.
    fn of(self, request: u64) -> Duration {
        let spread = self.max.saturating_sub(self.min).as_nanos();
        let random = mix(self.seed ^ mix(request));
        self.min + Duration::from_nanos(((u128::from(random) * spread) >> 64) as u64)
    }
}

/// The finaliser of splitmix64 (Steele, Lea, Flood 2014), with its increment.
fn mix(z: u64) -> u64 {
    let z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A source whose pages come late.
pub struct DelayedSource {
    shared: Arc<Shared>,
}

struct Shared {
    inner: Arc<dyn PageSource>,
    delay: Delay,
    sink: OnceLock<Weak<dyn PageSink + Send + Sync>>,
    queue: Mutex<Queue>,
    /// There is a new request, or the end.
    changed: Condvar,
}

struct Queue {
    /// The earliest first.
    requests: BinaryHeap<Reverse<Request>>,
    /// Requests so far.
    count: u64,
    closed: bool,
}

struct Request {
    due: Instant,
    number: u64,
    ranges: Vec<PageRange>,
    class: Class,
}

/// By when they are due, and those that are due at the same time, as they were made.
impl Ord for Request {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.due, self.number).cmp(&(other.due, other.number))
    }
}

impl PartialOrd for Request {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Request {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Request {}

/// The source was closed while somebody waited.
#[derive(Debug, thiserror::Error)]
#[error("the source was closed")]
struct Closed;

impl DelayedSource {
    /// The pages of `inner`, late.
    ///
    /// # Errors
    /// There is no thread for it.
    pub fn new(inner: Arc<dyn PageSource>, delay: Delay) -> std::io::Result<Self> {
        let queue = Queue {
            requests: BinaryHeap::with_capacity(1024),
            count: 0,
            closed: false,
        };
        let shared = Arc::new(Shared {
            inner,
            delay,
            sink: OnceLock::new(),
            queue: Mutex::new(queue),
            changed: Condvar::new(),
        });
        let deliverer = Arc::clone(&shared);
        thread::Builder::new()
            .name("umem-delay".into())
            .spawn(move || deliverer.deliver())?;
        Ok(Self { shared })
    }
}

impl Drop for DelayedSource {
    fn drop(&mut self) {
        // Not waited for: it may be that thread that drops this.
        self.close();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When a request that is made now is due, and its number.
    fn due(&self, queue: &mut Queue) -> (Instant, u64) {
        let number = queue.count;
        queue.count += 1;
        (Instant::now() + self.delay.of(number), number)
    }

    /// The thread: hands out what is due.
    fn deliver(&self) {
        let mut buffer = vec![0; STEP as usize * PAGE_SIZE];
        let mut queue = self.lock();
        while !queue.closed {
            let now = Instant::now();
            let due = queue.requests.peek().map(|Reverse(request)| request.due);
            queue = match due {
                None => self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
                Some(due) if due > now => {
                    let waited = self.changed.wait_timeout(queue, due - now);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                Some(_) => {
                    let request = queue.requests.pop();
                    drop(queue);
                    if let Some(Reverse(request)) = request {
                        self.hand_out(&request, &mut buffer);
                    }
                    self.lock()
                }
            };
        }
    }

    fn hand_out(&self, request: &Request, buffer: &mut [u8]) {
        let Request { ranges, class, .. } = request;
        // What the source brings by itself goes to the sink without us.
        if self.inner.submit(ranges, *class) {
            return;
        }
        let Some(sink) = self.sink.get().and_then(Weak::upgrade) else {
            return;
        };
        for range in ranges {
            let mut rest = *range;
            while rest.count > 0 {
                let step = PageRange::new(rest.start, STEP).clamp_to(rest.end());
                let buffer = &mut buffer[..step.bytes()];
                match self.inner.read(step, *class, buffer) {
                    Ok(content) => sink.arrived(step, content, buffer, *class),
                    Err(error) => return sink.failed(error),
                }
                rest = rest.from(step.end());
            }
        }
        sink.completed(*class);
    }
}

impl PageSource for DelayedSource {
    fn url(&self) -> String {
        self.shared.inner.url()
    }

    fn try_read(&self, _: PageRange, _: &mut [u8]) -> Result<Option<Content>, SourceError> {
        Ok(None)
    }

    fn read(&self, pages: PageRange, class: Class, buffer: &mut [u8]) -> Result<Content, SourceError> {
        let shared = &self.shared;
        let mut queue = shared.lock();
        let (due, _) = shared.due(&mut queue);
        while !queue.closed {
            let now = Instant::now();
            if now >= due {
                drop(queue);
                return shared.inner.read(pages, class, buffer);
            }
            let waited = shared.changed.wait_timeout(queue, due - now);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Err(SourceError::Lost(Closed.into()))
    }

    fn next_data(&self, within: PageRange) -> Result<Option<PageRange>, SourceError> {
        self.shared.inner.next_data(within)
    }

    fn digest(&self) -> Option<[u8; 32]> {
        self.shared.inner.digest()
    }

    fn exact_digest(&self) -> Option<[u8; 32]> {
        self.shared.inner.exact_digest()
    }

    fn attach(&self, sink: Weak<dyn PageSink + Send + Sync>) {
        self.shared.inner.attach(Weak::clone(&sink));
        // Called once.
        let _ = self.shared.sink.set(sink);
    }

    fn submit(&self, ranges: &[PageRange], class: Class) -> bool {
        let shared = &self.shared;
        let mut queue = shared.lock();
        let (due, number) = shared.due(&mut queue);
        queue.requests.push(Reverse(Request {
            due,
            number,
            ranges: ranges.to_vec(),
            class,
        }));
        drop(queue);
        shared.changed.notify_all();
        true
    }

    /// Who reads beside the pager need not be late.
    fn beside(&self) -> Result<Option<Arc<dyn PageSource>>, SourceError> {
        let inner = &self.shared.inner;
        Ok(Some(inner.beside()?.unwrap_or_else(|| Arc::clone(inner))))
    }

    fn close(&self) {
        let mut queue = self.shared.lock();
        queue.closed = true;
        queue.requests.clear();
        drop(queue);
        self.shared.changed.notify_all();
        self.shared.inner.close();
    }

    fn stats(&self) -> SourceStats {
        self.shared.inner.stats()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::zero::ZeroSource;
    use crate::units::PageIndex;
    use std::sync::mpsc::{Receiver, Sender, channel};

    const LONG: Duration = Duration::from_hours(1);

    fn source(min: Duration, max: Duration) -> DelayedSource {
        let delay = Delay { min, max, seed: 1 };
        DelayedSource::new(Arc::new(ZeroSource), delay).unwrap()
    }

    /// What has come, and when; no pages are the end of a request.
    type Arrival = (PageRange, Class, Instant);

    struct Sink(Sender<Arrival>);

    impl PageSink for Sink {
        fn arrived(&self, pages: PageRange, content: Content, _: &[u8], class: Class) {
            assert_eq!(content, Content::Zero);
            self.0.send((pages, class, Instant::now())).unwrap();
        }

        fn completed(&self, class: Class) {
            let end = PageRange::new(PageIndex(0), 0);
            self.0.send((end, class, Instant::now())).unwrap();
        }

        fn failed(&self, error: SourceError) {
            panic!("{error}");
        }
    }

    fn attached(source: &DelayedSource) -> (Arc<dyn PageSink + Send + Sync>, Receiver<Arrival>) {
        let (sender, receiver) = channel();
        let sink: Arc<dyn PageSink + Send + Sync> = Arc::new(Sink(sender));
        source.attach(Arc::downgrade(&sink));
        (sink, receiver)
    }

    #[test]
    fn nothing_comes_before_its_time_and_all_together_take_no_longer_than_one() {
        const DELAY: Duration = Duration::from_millis(200);
        let source = source(DELAY, DELAY);
        let (_sink, arrived) = attached(&source);
        let asked = Instant::now();
        for page in 0..50 {
            assert!(source.submit(&[PageRange::single(PageIndex(page))], Class::Demand));
        }
        for page in 0..50 {
            let (pages, class, at) = arrived.recv().unwrap();
            assert_eq!(
                (pages, class),
                (PageRange::single(PageIndex(page)), Class::Demand)
            );
            assert!(at - asked >= DELAY, "{:?}", at - asked);
            assert_eq!(arrived.recv().unwrap().0.count, 0);
        }
        // One after the other they would take 10 s.
        assert!(asked.elapsed() < DELAY * 25, "{:?}", asked.elapsed());
    }

    #[test]
    fn a_long_request_comes_in_pieces_and_ends_once() {
        let source = source(Duration::ZERO, Duration::ZERO);
        let (_sink, arrived) = attached(&source);
        let ranges = [
            PageRange::new(PageIndex(3), 150),
            PageRange::single(PageIndex(900)),
        ];
        assert!(source.submit(&ranges, Class::Background));
        let counts: Vec<u64> = (0..5).map(|_| arrived.recv().unwrap().0.count).collect();
        assert_eq!(counts, [64, 64, 22, 1, 0]);
    }

    #[test]
    fn delays_are_the_seeds() {
        let (min, max) = (Duration::from_millis(3), Duration::from_millis(7));
        let delay = Delay { min, max, seed: 9 };
        let delays: Vec<_> = (0..1000).map(|request| delay.of(request)).collect();
        assert!(delays.iter().all(|delay| (min..=max).contains(delay)));
        assert!(delays.iter().any(|delay| *delay > Duration::from_millis(6)));
        assert!(delays.iter().any(|delay| *delay < Duration::from_millis(4)));
        assert_eq!(delays[7], Delay { min, max, seed: 9 }.of(7));
        assert_ne!(delays[7], Delay { min, max, seed: 8 }.of(7));
    }

    #[test]
    fn who_waits_is_let_go_when_it_is_closed() {
        let source = Arc::new(source(LONG, LONG));
        let reader = {
            let source = Arc::clone(&source);
            thread::spawn(move || {
                source.read(
                    PageRange::single(PageIndex(0)),
                    Class::Demand,
                    &mut [0; PAGE_SIZE],
                )
            })
        };
        source.close();
        assert!(matches!(reader.join().unwrap(), Err(SourceError::Lost(_))));
    }

    #[test]
    fn nothing_is_known_at_once() {
        let source = source(LONG, LONG);
        let page = PageRange::single(PageIndex(0));
        assert_eq!(source.try_read(page, &mut [0; PAGE_SIZE]).unwrap(), None);
    }
}
