//! Memory that is handed to a pager behind a socket, which here is in the same process: what two processes share is the same.

#![allow(clippy::unwrap_used)] // a test's helpers panic as its tests do

mod common;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use common::{BACKINGS, expected, image_file, read_page, shuffled};
use umem::handoff::{AttachError, AttachedPager, PagerAddress, PagerHost};
use umem::image::Image;
use umem::link::{Address, Listener};
use umem::pager::{Fill, Notice, PagerError, PagerOptions};
use umem::region::{Backing, PageSize, Region};
use umem::units::{PAGE_SIZE, PageIndex};
use umem::working_set::WorkingSet;

const PAGES: u64 = 3 * 512 + 100;
const LONG: Duration = Duration::from_mins(1);

/// A pager behind a socket.
struct Host {
    end: Box<dyn Fn()>,
    thread: Option<JoinHandle<()>>,
}

impl Host {
    fn start(socket: &Path, image: &Path) -> Self {
        let images = HashMap::from([("image".to_owned(), Arc::new(Image::open(image).unwrap()))]);
        let host = PagerHost::new(images).unwrap();
        let stopper = host.stopper();
        let listener = Listener::bind(&Address::Unix(socket.to_path_buf())).unwrap();
        let thread = thread::spawn(move || host.serve(&listener).unwrap());
        Self {
            end: Box::new(move || stopper.stop()),
            thread: Some(thread),
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        (self.end)();
        self.thread.take().unwrap().join().unwrap();
    }
}

struct Attached {
    pager: AttachedPager,
    region: Arc<Region>,
    notices: Receiver<Notice>,
}

fn attach(socket: &Path, backing: Backing, options: PagerOptions, timeout: Duration) -> Attached {
    let address: PagerAddress = format!("{}#image", socket.display()).parse().unwrap();
    let image = address.describe().unwrap();
    assert_eq!(image.pages, PAGES);
    let region = Arc::new(Region::new(PAGES * PAGE_SIZE as u64, backing, PageSize::Small).unwrap());
    let (sender, notices) = channel();
    let observer = move |notice| drop(sender.send(notice));
    let own = [(PageIndex(11), vec![0xab; PAGE_SIZE])];
    let pager = AttachedPager::start(
        address,
        image.digest,
        timeout,
        Arc::clone(&region),
        options,
        &own,
        observer,
    )
    .unwrap();
    Attached {
        pager,
        region,
        notices,
    }
}

fn right(page: u64) -> [u8; PAGE_SIZE] {
    if page == 11 {
        [0xab; PAGE_SIZE]
    } else {
        expected(page)
    }
}

#[test]
fn pages_come_from_the_other_side() {
    let (directory, image) = image_file(PAGES);
    let socket = directory.path().join("pager");
    let _host = Host::start(&socket, &image);
    for (round, fill) in [Fill::Off, Fill::Sequential, Fill::NearFaults]
        .into_iter()
        .enumerate()
    {
        let options = PagerOptions {
            stripes: 1 + round,
            ..fill.into()
        };
        let Attached {
            mut pager,
            region,
            notices,
        } = attach(&socket, BACKINGS[round % 2], options, LONG);
        for page in shuffled(PAGES, round as u64) {
            assert_eq!(read_page(&region, page), right(page), "round {round} page {page}");
        }
        assert!(matches!(notices.recv().unwrap(), Notice::AllPagesPresent));
        pager.stop();
        let stats = pager.stats();
        assert_eq!(stats.states.present, PAGES);
        assert_eq!(stats.demand + stats.prefetched + stats.zero, PAGES);
        assert!(round > 0 || stats.faults.count > 0, "{stats:?}");
    }
}

/// The pager goes and another comes, again and again, while threads read and a fill loads.
#[test]
fn the_next_pager_goes_on_where_the_last_one_was() {
    let (directory, image) = image_file(PAGES);
    let socket = directory.path().join("pager");
    for round in 0..10 {
        let mut host = Some(Host::start(&socket, &image));
        let fill = if round % 2 == 0 {
            Fill::Off
        } else {
            Fill::NearFaults
        };
        let Attached { pager, region, .. } = &attach(&socket, BACKINGS[round / 2 % 2], fill.into(), LONG);
        thread::scope(|scope| {
            let readers: Vec<_> = (0..3)
                .map(|seed| {
                    scope.spawn(move || {
                        for page in shuffled(PAGES, seed + 7 * round as u64) {
                            assert_eq!(read_page(region, page), right(page), "round {round} page {page}");
                        }
                    })
                })
                .collect();
            while !readers.iter().all(thread::ScopedJoinHandle::is_finished) {
                drop(host.take());
                host = Some(Host::start(&socket, &image));
                let present = pager.stats().states.present;
                // Every one gets something done.
                while pager.stats().states.present == present
                    && !readers.iter().all(thread::ScopedJoinHandle::is_finished)
                {
                    thread::yield_now();
                }
            }
        });
    }
}

#[test]
fn a_pager_that_stays_away_is_a_lost_source() {
    let (directory, image) = image_file(PAGES);
    let socket = directory.path().join("pager");
    let host = Host::start(&socket, &image);
    let Attached {
        pager,
        region,
        notices,
    } = attach(
        &socket,
        Backing::Memfd,
        Fill::Off.into(),
        Duration::from_millis(50),
    );
    assert_eq!(read_page(&region, 1), right(1));
    drop(host);
    let toucher = {
        let region = Arc::clone(&region);
        thread::spawn(move || std::hint::black_box(read_page(&region, 3)))
    };
    let mut notices = notices.iter();
    let error = loop {
        match notices.next().unwrap() {
            Notice::Failed(error) => break error,
            // If there was time to tell of it before.
            Notice::SourceLost(_) => {}
            notice => panic!("a pager that is gone: {notice:?}"),
        }
    };
    let PagerError::Source { source, .. } = &*error else {
        panic!("{error:?}")
    };
    assert!(
        source.to_string().starts_with("no pager was found at attach:"),
        "{source}"
    );
    drop(pager);
    toucher.join().unwrap();
}

#[test]
fn what_does_not_fit_is_refused() {
    let (directory, image) = image_file(PAGES);
    let socket = directory.path().join("pager");
    let _host = Host::start(&socket, &image);
    let unknown: PagerAddress = format!("{}#other", socket.display()).parse().unwrap();
    let error = unknown.describe().unwrap_err();
    assert!(
        matches!(&error, AttachError::Refused { text, .. } if text.contains("there are: image")),
        "{error}"
    );
    let nobody: PagerAddress = directory
        .path()
        .join("nobody")
        .display()
        .to_string()
        .parse()
        .unwrap();
    assert!(matches!(nobody.describe(), Err(AttachError::Connect { .. })));
}

#[test]
fn a_working_set_is_replayed_by_the_other_side() {
    let (directory, image) = image_file(PAGES);
    let socket = directory.path().join("pager");
    let _host = Host::start(&socket, &image);
    let digest = Image::open(&image).unwrap().footer().digest;
    let touched: Vec<PageIndex> = shuffled(PAGES, 3).take(300).map(PageIndex).collect();
    let set = Arc::new(WorkingSet::new(digest, PAGES, &touched));
    let Attached { pager, region, .. } = &attach(&socket, Backing::Memfd, Fill::Recorded(set).into(), LONG);
    let there = 300 + u64::from(!touched.contains(&PageIndex(11)));
    while pager.stats().states.present < there {
        thread::yield_now();
    }
    assert_eq!(region.populated().unwrap(), there);
}
