//! How long a thread waits for one page.

use serde::Serialize;
use umem::link::Address;
use umem::measure::floor::{Answer, Floor};
use umem::measure::served::{Constant, Served, Serving, file, touch_many};
use umem::measure::sockets::{Socket, round_trips};
use umem::measure::{MeasureError, Place, Waits, bulk, shuffled, touch};
use umem::pager::{FaultClass, Fill};
use umem::region::Backing;
use umem::source::PageSource;
use umem::source::file::Checksums;

use std::sync::Arc;
use std::time::Duration;

use super::{Bench, PAGES};

/// Touches in a slice.
const TOUCHES: usize = 1000;

/// How many measurements [`measure`] announces at most.
pub(super) const STEPS: u64 = 1 + 3 + 3 + 6 + 1;

/// What was measured of one kind of fault.
#[derive(Serialize)]
pub(super) struct Fault {
    pub(super) what: String,
    pub(super) cpus: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) floor: Option<Wait>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) umem: Option<Wait>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) p50_ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) p99_ratio: Option<f64>,
    /// In which picture it is.
    #[serde(skip)]
    pub(super) plot: Option<&'static str>,
    #[serde(skip)]
    pub(super) floor_waits: Waits,
    #[serde(skip)]
    pub(super) umem_waits: Waits,
}

/// In nanoseconds.
#[derive(Clone, Copy, Serialize)]
pub(super) struct Wait {
    pub(super) p50_ns: u64,
    pub(super) p99_ns: u64,
}

impl Wait {
    fn of(waits: &Waits) -> Option<Self> {
        (waits.count() > 0).then(|| Self {
            p50_ns: waits.percentile(50),
            p99_ns: waits.percentile(99),
        })
    }
}

impl Fault {
    fn new(what: String, place: Place, floor: Waits, umem: Waits) -> Self {
        let (floor_wait, umem_wait) = (Wait::of(&floor), Wait::of(&umem));
        let ratio = |of: fn(Wait) -> u64| Some(of(umem_wait?) as f64 / of(floor_wait?) as f64);
        Self {
            what,
            cpus: place.name(),
            floor: floor_wait,
            umem: umem_wait,
            p50_ratio: ratio(|wait| wait.p50_ns),
            p99_ratio: ratio(|wait| wait.p99_ns),
            plot: None,
            floor_waits: floor,
            umem_waits: umem,
        }
    }

    fn in_plot(mut self, name: &'static str) -> Self {
        self.plot = Some(name);
        self
    }
}

pub(super) fn measure(bench: &Bench) -> Result<Vec<Fault>, MeasureError> {
    bench.step("plain faults");
    Place::Same.run_as_waiting(&bench.usable)?;
    let plain = bulk::plain_faults(PAGES, TOUCHES * bench.slices as usize)?;
    let mut faults = vec![Fault::new(
        "no userfaultfd: first write, anonymous memory".into(),
        Place::Same,
        plain,
        Waits::default(),
    )];
    let places = Place::all(&bench.usable);
    for place in &places {
        bench.step("faults on a local image");
        faults.push(local(bench, *place)?.in_plot("local"));
    }
    for place in &places {
        bench.step("minor faults");
        faults.push(minor(bench, *place)?);
    }
    for socket in [Socket::Unix, Socket::Tcp] {
        for place in &places {
            bench.step("faults on a page server");
            let fault = remote(bench, socket, *place)?;
            faults.push(match socket {
                Socket::Tcp => fault.in_plot("remote"),
                Socket::Unix => fault,
            });
        }
    }
    bench.step("faults under a fill");
    faults.push(under_fill(bench)?);
    Ok(faults)
}

/// A page of an image that is in the page cache, with its checksum, against UFFDIO_COPY from a page in the processor's cache.
fn local(bench: &Bench, place: Place) -> Result<Fault, MeasureError> {
    let source = file(&bench.image, Checksums::On)?;
    let (mut floors, mut waits) = (Waits::default(), Waits::default());
    for slice in 0..bench.slices {
        place.run_as_answering(&bench.usable)?;
        let floor = Floor::start(PAGES, Backing::Memfd, Answer::Copy)?;
        place.run_as_waiting(&bench.usable)?;
        floors.append(touch_many(floor.region(), PAGES, TOUCHES, slice));
        drop(floor);
        place.run_as_answering(&bench.usable)?;
        let served = Served::start(PAGES, Backing::Memfd, Arc::clone(&source), Fill::Off)?;
        place.run_as_waiting(&bench.usable)?;
        waits.append(touch_many(served.region(), PAGES, TOUCHES, slice));
        served.check_class(FaultClass::Immediate)?;
    }
    let what = "an image of this host (floor: COPY)";
    Ok(Fault::new(what.into(), place, floors, waits))
}

/// A page that is in the memfd and not mapped, against UFFDIO_CONTINUE.
fn minor(bench: &Bench, place: Place) -> Result<Fault, MeasureError> {
    // One page is never loaded: with it the pager would leave.
    let among = TOUCHES as u64 + 64;
    let (mut floors, mut waits) = (Waits::default(), Waits::default());
    for slice in 0..bench.slices {
        place.run_as_answering(&bench.usable)?;
        let floor = Floor::start(among, Backing::Memfd, Answer::Continue)?;
        place.run_as_waiting(&bench.usable)?;
        floors.append(touch_many(floor.region(), among, TOUCHES, slice));
        drop(floor);
        place.run_as_answering(&bench.usable)?;
        let served = Served::start(among + 1, Backing::Memfd, Arc::new(Constant), Fill::Off)?;
        place.run_as_waiting(&bench.usable)?;
        for page in 0..among {
            touch(served.region(), page);
        }
        served.unmap(among)?;
        waits.append(touch_many(served.region(), among, TOUCHES, slice));
        let minor = served.stats().fault_classes[FaultClass::Minor as usize].count;
        // The last one is counted when this thread has been woken already.
        if minor + 1 < among {
            return Err(MeasureError::OtherWay {
                count: among - 1 - minor,
                way: "not as minor faults",
            });
        }
    }
    let what = "in shared memory already (floor: CONTINUE)";
    Ok(Fault::new(what.into(), place, floors, waits))
}

fn listen(bench: &Bench, socket: Socket) -> Address {
    match socket {
        Socket::Unix => Address::Unix(bench.directory.path().join("pages.sock")),
        Socket::Tcp => Address::Tcp("127.0.0.1:0".into()),
    }
}

/// A page of a page server, against a fault that is answered at once and a round trip. The pager is where the thread is that waits;
/// `place` says where the server is.
fn remote(bench: &Bench, socket: Socket, place: Place) -> Result<Fault, MeasureError> {
    place.run_as_answering(&bench.usable)?;
    let serving = Serving::start(&bench.image, &listen(bench, socket))?;
    let (mut floors, mut trips, mut waits) = (Waits::default(), Waits::default(), Waits::default());
    for slice in 0..bench.slices {
        place.run_as_waiting(&bench.usable)?;
        let floor = Floor::start(PAGES, Backing::Memfd, Answer::Copy)?;
        floors.append(touch_many(floor.region(), PAGES, TOUCHES, slice));
        drop(floor);
        trips.append(round_trips(socket, place, &bench.usable, TOUCHES)?);
        let source = serving.source(1)?;
        let served = Served::start(PAGES, Backing::Memfd, source, Fill::Off)?;
        waits.append(touch_many(served.region(), PAGES, TOUCHES, slice));
    }
    let what = format!("a page server, {} (floor: COPY + round trip)", socket.name());
    Ok(Fault::new(what, place, floors.and(&trips), waits))
}

/// What a fault takes while a fill loads everything as fast as it can, against the same without the fill.
fn under_fill(bench: &Bench) -> Result<Fault, MeasureError> {
    let place = Place::Free;
    place.run_as_answering(&bench.usable)?;
    let serving = Serving::start(&bench.image, &listen(bench, Socket::Tcp))?;
    let start = |fill| -> Result<Served, MeasureError> {
        let source: Arc<dyn PageSource> = serving.source(1)?;
        Served::start(PAGES, Backing::Memfd, source, fill)
    };
    let (mut quiet, mut filled) = (Waits::default(), Waits::default());
    for slice in 0..bench.slices {
        quiet.append(touch_many(start(Fill::Off)?.region(), PAGES, TOUCHES, slice));
        let served = start(Fill::Sequential)?;
        for page in shuffled(PAGES, slice).take(TOUCHES) {
            // Those alone that had to be waited for, and only for as long as there is a fill.
            if served.is_complete() {
                break;
            }
            if !served.has(page)? {
                filled.push(touch(served.region(), page));
            }
            // A guest does something with what it has touched, and the fill is to have its turn.
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    let what = "a page server, tcp, while a fill runs (floor: without)";
    Ok(Fault::new(what.into(), place, quiet, filled))
}
