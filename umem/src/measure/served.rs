//! Memory that a pager serves: from an image of this host, from memory that is there, or from a page server.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::mm::Advice;

use super::{MeasureError, Waits, shuffled, touch};
use crate::causes::chain;
use crate::image::Image;
use crate::link::{Address, Listener};
use crate::pager::{FaultClass, Fill, Notice, Pager, PagerStats};
use crate::region::{Backing, PageSize, Region};
use crate::server::{Server, ServerStopper};
use crate::source::file::{Checksums, FileSource};
use crate::source::remote::{RemoteOptions, RemoteSource, RemoteUrl};
use crate::source::{Class, Content, PageSource, SourceError, SourceStats};
use crate::units::{PAGE_SIZE, PageRange};

/// Touches at the start of a slice that are not counted: the threads begin to wait, the first page tables are made.
const UNCOUNTED: usize = 64;

/// Memory that a pager serves. If a page does not come, the process ends: who touched it would wait for ever.
pub struct Served {
    pager: Pager,
    region: Arc<Region>,
    present: Receiver<()>,
}

impl Served {
    /// `pages` pages from `source`. The pager's threads run where the calling thread does.
    pub fn start(
        pages: u64,
        backing: Backing,
        source: Arc<dyn PageSource>,
        fill: Fill,
    ) -> Result<Self, MeasureError> {
        let size = pages * PAGE_SIZE as u64;
        let region = Arc::new(Region::new(size, backing, PageSize::Small)?);
        let (sender, present) = channel();
        let observer = move |notice| match notice {
            Notice::AllPagesPresent => drop(sender.send(())),
            Notice::Failed(error) => {
                eprintln!("umem: {}", chain(&error));
                std::process::exit(1);
            }
            Notice::SourceLost(_) | Notice::SourceBack => {}
        };
        let pager = Pager::start(Arc::clone(&region), source, fill, observer)?;
        Ok(Self {
            pager,
            region,
            present,
        })
    }

    /// The memory.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// What the pager has done.
    pub fn stats(&self) -> PagerStats {
        self.pager.stats()
    }

    /// Whether all pages are there.
    pub fn is_complete(&self) -> bool {
        self.present.try_recv().is_ok()
    }

    /// Waits until all pages are there.
    pub fn wait_until_complete(&self) -> Result<(), MeasureError> {
        self.present.recv().map_err(|_| MeasureError::Thread)
    }

    /// Whether a page is in memory, without touching it.
    pub fn has(&self, page: u64) -> Result<bool, MeasureError> {
        let address = self.region.start().wrapping_add(page as usize * PAGE_SIZE);
        let mut state = 0;
        // SAFETY: mincore writes one byte for one page, which is within the region.
        let result = unsafe { libc::mincore(address.cast(), PAGE_SIZE, &raw mut state) };
        if result != 0 {
            return Err(MeasureError::os("mincore")(std::io::Error::last_os_error()));
        }
        Ok(state & 1 != 0)
    }

    /// Takes the mappings of the first `pages` away and leaves what the memfd holds, so that the next touch of each is a minor
    /// fault. They must be there.
    pub fn unmap(&self, pages: u64) -> Result<(), MeasureError> {
        let size = pages as usize * PAGE_SIZE;
        // SAFETY: within the region, and pages of a memfd lose nothing by it.
        unsafe { rustix::mm::madvise(self.region.start().cast(), size, Advice::LinuxDontNeed) }
            .map_err(MeasureError::os("madvise"))
    }

    /// All that was measured was of one class, or nothing is said of it.
    pub fn check_class(&self, expected: FaultClass) -> Result<(), MeasureError> {
        let stats = self.stats();
        let others = FaultClass::ALL.into_iter().filter(|class| *class != expected);
        for class in others {
            let count = stats.fault_classes[class as usize].count;
            if count > 0 {
                return Err(MeasureError::OtherWay {
                    count,
                    way: class.name(),
                });
            }
        }
        Ok(())
    }
}

/// Touches `count` pages of the first `among`, one after another, in an order without pattern, after some that are not counted.
pub fn touch_many(region: &Region, among: u64, count: usize, seed: u64) -> Waits {
    let mut order = shuffled(among, seed);
    for page in order.by_ref().take(UNCOUNTED) {
        touch(region, page);
    }
    let mut waits = Waits::default();
    order.take(count).for_each(|page| waits.push(touch(region, page)));
    waits
}

/// The image at `path` as a page source.
pub fn file(path: &Path, checksums: Checksums) -> Result<Arc<dyn PageSource>, MeasureError> {
    Ok(Arc::new(FileSource::new(Image::open(path)?, checksums)))
}

/// A page server in threads of this process, which run where the thread does that starts it.
pub struct Serving {
    url: RemoteUrl,
    stopper: ServerStopper,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

impl Serving {
    /// Serves the image at `path`.
    pub fn start(path: &Path, listen: &Address) -> Result<Self, MeasureError> {
        let image = Arc::new(Image::open(path)?);
        let images = HashMap::from([("image".into(), image)]);
        let server = Server::new(images).map_err(MeasureError::os("starting a page server"))?;
        let listener = Listener::bind(listen)?;
        let address = listener.address().map_err(MeasureError::os("getsockname"))?;
        let url = address.to_string().parse::<RemoteUrl>();
        let url = url.map_err(|_| MeasureError::Thread)?;
        let stopper = server.stopper();
        let thread = std::thread::spawn(move || server.serve(listener));
        Ok(Self {
            url,
            stopper,
            thread: Some(thread),
        })
    }

    /// Connects to it.
    pub fn source(&self, connections: usize) -> Result<Arc<dyn PageSource>, MeasureError> {
        let options = RemoteOptions {
            connections,
            ..RemoteOptions::default()
        };
        let (source, _) = RemoteSource::connect(std::slice::from_ref(&self.url), options)?;
        Ok(Arc::new(source))
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.stopper.stop();
        if let Some(thread) = self.thread.take() {
            // What it served is gone with it, which is noticed where it matters.
            let _ = thread.join();
        }
    }
}

/// How long all of `pages` take to be loaded by a fill, with nobody touching any.
pub fn fill_time(pages: u64, source: Arc<dyn PageSource>) -> Result<Duration, MeasureError> {
    let since = Instant::now();
    let served = Served::start(pages, Backing::Memfd, source, Fill::Sequential)?;
    served.wait_until_complete()?;
    let time = since.elapsed();
    let missing = pages - served.stats().prefetched.min(pages);
    if missing > 0 {
        return Err(MeasureError::OtherWay {
            count: missing,
            way: "not by the fill",
        });
    }
    Ok(time)
}

/// A source that costs a copy from the processor's cache: what remains is the pager itself.
#[derive(Debug)]
pub struct Constant;

static CONTENT: [u8; PAGE_SIZE] = [0x5a; PAGE_SIZE];

impl PageSource for Constant {
    fn url(&self) -> String {
        "bench:constant".into()
    }

    fn try_read(&self, pages: PageRange, buffer: &mut [u8]) -> Result<Option<Content>, SourceError> {
        self.read(pages, Class::Demand, buffer).map(Some)
    }

    fn read(&self, _: PageRange, _: Class, buffer: &mut [u8]) -> Result<Content, SourceError> {
        for page in buffer.chunks_mut(PAGE_SIZE) {
            page.copy_from_slice(&CONTENT);
        }
        Ok(Content::Data)
    }

    fn next_data(&self, _: PageRange) -> Result<Option<PageRange>, SourceError> {
        Ok(None)
    }

    fn digest(&self) -> Option<[u8; 32]> {
        None
    }

    fn stats(&self) -> SourceStats {
        SourceStats::default()
    }
}
