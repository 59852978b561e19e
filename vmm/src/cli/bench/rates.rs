//! How fast many pages come.

use std::time::Duration;

use serde::Serialize;
use umem::link::Address;
use umem::measure::served::{Serving, file, fill_time};
use umem::measure::sockets::{Socket, plain_copy};
use umem::measure::{MeasureError, Place, bulk};
use umem::region::Backing;
use umem::source::file::Checksums;
use umem::units::PAGE_SIZE;

use super::{Bench, PAGES};

/// How many measurements [`measure`] announces at most.
pub(super) const STEPS: u64 = 1 + 3 + 1 + 2 * 4;

/// Pages that one call installs: as many as the pager does.
const STEP: u64 = 16;

/// What was measured of one way for many pages.
#[derive(Serialize)]
pub(super) struct Rate {
    pub(super) what: String,
    pub(super) cpus: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) floor_gib_per_s: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) umem_gib_per_s: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ratio: Option<f64>,
}

impl Rate {
    fn new(what: impl Into<String>, place: Place, floor: &[Duration], umem: &[Duration]) -> Self {
        let (floor, umem) = (gib_per_s(floor), gib_per_s(umem));
        Self {
            what: what.into(),
            cpus: place.name(),
            floor_gib_per_s: floor,
            umem_gib_per_s: umem,
            ratio: umem.zip(floor).map(|(umem, floor)| umem / floor),
        }
    }
}

/// Of the median of times that all pages took.
fn gib_per_s(times: &[Duration]) -> Option<f64> {
    let mut times = times.to_vec();
    times.sort_unstable();
    let median = times.get(times.len() / 2)?;
    Some(PAGES as f64 * PAGE_SIZE as f64 / f64::from(1 << 30) / median.as_secs_f64())
}

pub(super) fn measure(bench: &Bench) -> Result<Vec<Rate>, MeasureError> {
    let rounds = bench.slices.div_ceil(4);
    let mut rates = Vec::new();
    Place::Same.run_as_waiting(&bench.usable)?;
    bench.step("memcpy");
    let copies: Vec<Duration> = (0..rounds)
        .map(|_| bulk::copy_into_memory(PAGES))
        .collect::<Result<_, _>>()?;
    rates.push(Rate::new(
        "memcpy, from the cache into memory",
        Place::Same,
        &copies,
        &[],
    ));
    // One copy of the image in the page cache, which every fill reads.
    let image = || file(&bench.image, Checksums::On);
    for (way, step) in [
        (bulk::Way::Copy, STEP),
        (bulk::Way::Continue, 512),
        (bulk::Way::Zeropage, 512),
    ] {
        bench.step(way.name());
        let (mut floors, mut fills) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            Place::Same.run_as_waiting(&bench.usable)?;
            floors.push(bulk::populate(way, Backing::Memfd, PAGES, step)?);
            if way == bulk::Way::Copy {
                fills.push(fill_time(PAGES, image()?)?);
            }
        }
        let what = match way {
            bulk::Way::Copy => format!(
                "a fill from an image (floor: {}, {step} pages a call)",
                way.name()
            ),
            _ => format!("{}, {step} pages a call", way.name()),
        };
        rates.push(Rate::new(what, Place::Same, &floors, &fills));
    }
    bench.step("a fill from an image");
    Place::Free.run_as_waiting(&bench.usable)?;
    let fills: Vec<Duration> = (0..rounds)
        .map(|_| fill_time(PAGES, image()?))
        .collect::<Result<_, _>>()?;
    rates.push(Rate::new("a fill from an image", Place::Free, &[], &fills));
    for socket in [Socket::Unix, Socket::Tcp] {
        sockets(bench, socket, rounds, &mut rates)?;
    }
    Ok(rates)
}

/// A plain copy through a socket, and fills from a page server over one and over four connections.
fn sockets(bench: &Bench, socket: Socket, rounds: u64, rates: &mut Vec<Rate>) -> Result<(), MeasureError> {
    const CONNECTIONS: [usize; 2] = [1, 4];
    let bytes = PAGES as usize * PAGE_SIZE;
    for place in Place::all(&bench.usable) {
        bench.step("a plain copy through a socket");
        if place != Place::Free {
            let copies: Vec<Duration> = (0..rounds)
                .map(|_| plain_copy(socket, place, &bench.usable, bytes))
                .collect::<Result<_, _>>()?;
            let what = format!("a plain copy, {}", socket.name());
            rates.push(Rate::new(what, place, &copies, &[]));
        }
    }
    bench.step("fills from a page server");
    Place::Free.run_as_waiting(&bench.usable)?;
    let listen = match socket {
        Socket::Unix => Address::Unix(bench.directory.path().join("fill.sock")),
        Socket::Tcp => Address::Tcp("127.0.0.1:0".into()),
    };
    let serving = Serving::start(&bench.image, &listen)?;
    let mut copies = Vec::new();
    let mut fills = CONNECTIONS.map(|_| Vec::new());
    for _ in 0..rounds {
        copies.push(plain_copy(socket, Place::Free, &bench.usable, bytes)?);
        for (connections, fills) in CONNECTIONS.into_iter().zip(&mut fills) {
            fills.push(fill_time(PAGES, serving.source(connections)?)?);
        }
    }
    for (connections, fills) in CONNECTIONS.into_iter().zip(&fills) {
        let name = socket.name();
        let what = format!("a fill, {name}, {connections} connections (floor: plain copy)");
        rates.push(Rate::new(what, Place::Free, &copies, fills));
    }
    Ok(())
}
