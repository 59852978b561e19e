//! The socket at which other processes learn that the memory behind guest-physical addresses changes
//! (`docs/invalidations.md`).

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use thiserror::Error;
use umem::link::{Address, ListenError, Listener};
use umem::region::Region;
use ummunotify::service::{Service, ServiceOptions, ServiceStatus};
use ummunotify::{AddressRange, Choice, OpenError, Stream, WatcherKind};
use vmm_sys_util::eventfd::EventFd;

use crate::address_map::RamMap;

/// How it is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidationsOptions {
    /// The socket's path.
    pub socket: PathBuf,
    /// The longest that a change waits for an acknowledgement.
    pub acknowledge_within: Duration,
    /// Whether it is told too what the kernel does to RAM by itself, and whoever else does something to this process' memory.
    pub kernel: bool,
}

/// Why there is no such socket.
#[derive(Debug, Error)]
pub enum InvalidationsError {
    /// Nobody can listen there.
    #[error("cannot tell others of invalidations")]
    Listen(#[from] ListenError),
    /// No thread, or no descriptor.
    #[error("cannot tell others of invalidations")]
    Os(#[source] io::Error),
    /// What the kernel does is not to be heard.
    #[error(
        "cannot hear what the kernel does to RAM: leave kernel=on away, or run as root on a kernel that has BPF"
    )]
    Kernel(#[from] OpenError),
}

/// Those who want to know, at a socket that is its owner's alone. When it is dropped, they are told that there is no more to
/// be heard.
#[derive(Debug)]
pub struct Invalidations {
    /// Before the service, which it uses.
    kernel: OnceLock<Kernel>,
    service: Arc<Service>,
    options: InvalidationsOptions,
    /// Whose path goes with it.
    _listener: Listener,
}

impl Invalidations {
    /// Listens.
    pub fn start(options: &InvalidationsOptions) -> Result<Self, InvalidationsError> {
        let listener = Listener::bind(&Address::Unix(options.socket.clone()))?;
        let accepting = listener.as_fd().try_clone_to_owned().map(UnixListener::from);
        let service = accepting.and_then(|accepting| {
            let limit = options.acknowledge_within;
            Service::start(accepting, ServiceOptions { limit })
        });
        Ok(Self {
            kernel: OnceLock::new(),
            service: Arc::new(service.map_err(InvalidationsError::Os)?),
            options: options.clone(),
            _listener: listener,
        })
    }

    /// RAM is in this region from now on, and is told of what the kernel does to it if that is wanted.
    pub fn watch_ram(&self, region: &Region, map: RamMap) -> Result<(), InvalidationsError> {
        if self.options.kernel {
            let kernel = Kernel::start(Arc::clone(&self.service), region, map)?;
            // There is one RAM.
            let _ = self.kernel.set(kernel);
        }
        Ok(())
    }

    /// Its path.
    pub fn socket(&self) -> &Path {
        &self.options.socket
    }

    /// Makes a change of what is behind these guest-physical addresses, when who watches them has been told, and who wants to be
    /// done with them before is.
    pub fn change<T>(&self, ranges: &[AddressRange], make: impl FnOnce() -> T) -> T {
        let (mut others, mut turn) = (Vec::new(), self.kernel.get().map(Kernel::turn));
        let changed = self.service.change(ranges, || {
            let made = make();
            // What this made the kernel do was told already.
            if let Some(turn) = &mut turn {
                others = turn.take();
                others.retain(|other| !ranges.iter().any(|own| other.clipped_to(*own) == *other));
            }
            made
        });
        drop(turn);
        if !others.is_empty() {
            self.service.changed(&others);
        }
        for pid in changed.late {
            tracing::warn!(
                pid,
                "a watcher did not acknowledge an invalidation in time, and is told of no more"
            );
        }
        changed.result
    }

    /// What was told, and to whom.
    pub fn status(&self) -> ServiceStatus {
        self.service.status()
    }
}

/// Hears what the kernel does to RAM, and tells it, a moment after it was done.
#[derive(Debug)]
struct Kernel {
    ram: Arc<Mutex<Ram>>,
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

/// RAM where it is in this process, and what happens to it there. Whoever does something to it by himself holds this meanwhile, and
/// takes what came of it.
#[derive(Debug)]
struct Ram {
    stream: Stream,
    start: u64,
    map: RamMap,
}

impl Ram {
    /// Where the guest sees what was invalidated.
    fn take(&mut self) -> Vec<AddressRange> {
        let taken = self.stream.take();
        let seen = |host: AddressRange| {
            let (start, map) = (self.start, self.map);
            map.addresses_of(host.start - start..host.end - start)
        };
        taken
            .into_iter()
            .flat_map(seen)
            .map(|range| AddressRange::new(range.start.0, range.end.0))
            .collect()
    }
}

impl Kernel {
    fn start(service: Arc<Service>, region: &Region, map: RamMap) -> Result<Self, InvalidationsError> {
        let addresses = region.all_addresses();
        let range = AddressRange::new(addresses.start.0, addresses.end.0);
        let ram = Ram {
            stream: Stream::open(Choice::Only(WatcherKind::Kvm), range)?,
            start: addresses.start.0,
            map,
        };
        let descriptor = ram.stream.descriptor().map(|fd| fd.try_clone_to_owned());
        let descriptor = descriptor.unwrap_or_else(|| Err(io::ErrorKind::Unsupported.into()));
        let descriptor = descriptor.map_err(InvalidationsError::Os)?;
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let stop = event().map_err(InvalidationsError::Os)?;
        let stopped = stop.try_clone().map_err(InvalidationsError::Os)?;
        let ram = Arc::new(Mutex::new(ram));
        let heard = Arc::clone(&ram);
        let thread = std::thread::Builder::new()
            .name("invalidations-ram".into())
            .spawn(move || {
                // SAFETY: the descriptor is the event's, which this thread has.
                let stop =
                    unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(&stopped)) };
                loop {
                    let mut ready = [
                        PollFd::new(&stop, PollFlags::IN),
                        PollFd::new(&descriptor, PollFlags::IN),
                    ];
                    // Interrupted, there is nothing to take, or there is.
                    let _ = poll(&mut ready, None);
                    if !ready[0].revents().is_empty() {
                        return;
                    }
                    let changed = heard.lock().unwrap_or_else(PoisonError::into_inner).take();
                    if !changed.is_empty() {
                        service.changed(&changed);
                    }
                }
            })
            .map_err(InvalidationsError::Os)?;
        Ok(Self {
            ram,
            stop,
            thread: Some(thread),
        })
    }

    fn turn(&self) -> MutexGuard<'_, Ram> {
        self.ram.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        // Written once, so that it is not full.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // It has nothing to say.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use umem::region::{Backing, PageSize};
    use umem::units::{PageIndex, PageRange};
    use ummunotify::service::{Client, ClientOptions, Notice};
    use ummunotify::{Cookie, Event};

    const PAGE: u64 = crate::address_map::PAGE_SIZE;
    const GIB: u64 = 1 << 30;
    /// The first page of RAM above the hole.
    const HIGH: u64 = 3 * GIB / PAGE;

    /// What the kernel does to RAM is told once where the guest sees it, whoever made it do so.
    #[test]
    fn what_the_kernel_does_is_told_too_and_once() {
        let directory = tempfile::tempdir().unwrap();
        let options = InvalidationsOptions {
            socket: directory.path().join("socket"),
            acknowledge_within: Duration::from_secs(1),
            kernel: true,
        };
        let map = RamMap::new(4 * GIB).unwrap();
        let region = Region::new(map.size(), Backing::Memfd, PageSize::Small).unwrap();
        let invalidations = Invalidations::start(&options).unwrap();
        if let Err(error) = invalidations.watch_ram(&region, map) {
            println!("skipped: {}", umem::causes::chain(&error));
            return;
        }
        let pages = PageRange::new(PageIndex(HIGH + 4), 4);
        let touch = || {
            for page in pages.pages() {
                // SAFETY: in the region, to which nobody has a reference.
                unsafe { region.start().add(page.byte_offset() as usize).write_volatile(1) };
            }
        };
        let seen = AddressRange::new(4 * GIB + 4 * PAGE, 4 * GIB + 8 * PAGE);
        let mut client = Client::connect(&options.socket, ClientOptions::default()).unwrap();
        client
            .register(AddressRange::new(4 * GIB, 5 * GIB), Cookie(1))
            .unwrap();
        client.register(AddressRange::new(0, 3 * GIB), Cookie(2)).unwrap();
        let heard = |client: &mut Client, counter| {
            assert!(client.wait(Duration::from_secs(20)).unwrap(), "nothing is told");
            let (cookie, part, exact) = (Cookie(1), seen, true);
            let expected = Event::Invalidated { cookie, part, exact };
            assert_eq!(
                client.read(10).unwrap(),
                [Notice::Event(expected), Notice::Event(Event::Last { counter })]
            );
        };
        touch();
        // By somebody who does not say so.
        region.remove(pages).unwrap();
        heard(&mut client, 1);
        touch();
        invalidations.change(&[seen], || region.remove(pages).unwrap());
        heard(&mut client, 2);
        touch();
        region.remove(pages).unwrap();
        heard(&mut client, 3);
    }
}
