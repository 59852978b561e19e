//! The thread beside the pager, in the process with the memory: hears what servers say, and notices when none is left.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::thread::futex;

use super::client::Inherited;
use super::descriptors::Notice;
use super::shared::{Parts, Release};
use super::source::DeviceSource;
use super::{DeviceError, Serving, failed};
use crate::causes::chain;
use crate::pager::{self, Pager};
use crate::source::PageSource;

#[derive(Debug)]
pub(super) struct Keeper {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// With its descriptors; they go when the memory is ordinary or unmapped.
struct Shared {
    parts: Arc<Parts>,
    /// What the pager serves, and from where; nothing when it is not needed any more.
    served: Mutex<Option<Served>>,
    /// The pager has failed.
    failed: AtomicBool,
    ending: AtomicBool,
    wake: OwnedFd,
}

struct Served {
    pager: Pager,
    source: Arc<DeviceSource>,
    inherited: Inherited,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("parts", &self.parts)
            .finish_non_exhaustive()
    }
}

/// A keeper that is not yet one: it needs the pager, and that tells it what goes wrong.
pub(super) struct Starting {
    shared: Arc<Shared>,
    source: Arc<DeviceSource>,
    to_server: OwnedFd,
}

impl Keeper {
    /// One that can be started, and what the pager tells it by.
    pub(super) fn prepare(
        parts: Arc<Parts>,
        source: Arc<DeviceSource>,
        to_server: OwnedFd,
    ) -> Result<(Starting, impl Fn(pager::Notice) + Send + Sync + 'static), DeviceError> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(failed("eventfd"))?;
        let shared = Arc::new(Shared {
            parts,
            served: Mutex::default(),
            failed: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            wake,
        });
        let observed = Arc::downgrade(&shared);
        let observer = move |notice| {
            if let (pager::Notice::Failed(error), Some(shared)) = (notice, observed.upgrade()) {
                tracing::error!(error = chain(&*error), "memory cannot be served any more");
                shared.failed.store(true, SeqCst);
                shared.wake();
            }
        };
        let starting = Starting {
            shared,
            source,
            to_server,
        };
        Ok((starting, observer))
    }

    pub(super) fn is_released(&self) -> bool {
        self.shared.parts.header().release.load(SeqCst) == Release::DONE
    }

    /// The memory was unmapped.
    pub(super) fn end(&mut self) {
        self.shared.ending.store(true, SeqCst);
        self.shared.wake();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread beside a device's pager panicked");
        }
        self.shared.close();
    }

    /// In a child of its process.
    pub(super) fn forget(&mut self) {
        std::mem::forget(self.thread.take());
        std::mem::forget(Arc::clone(&self.shared));
    }
}

impl Starting {
    pub(super) fn start(self, pager: Pager, inherited: Inherited) -> Result<Keeper, DeviceError> {
        let Self {
            shared,
            source,
            to_server,
        } = self;
        *shared.served() = Some(Served {
            pager,
            source,
            inherited,
        });
        let thread = {
            let keeper = Arc::clone(&shared);
            let keep = move || keeper.keep(&to_server);
            std::thread::Builder::new()
                .name("umem-keeper".into())
                .spawn(keep)
                .map_err(failed("clone"))
                .inspect_err(|_| shared.close())?
        };
        Ok(Keeper {
            shared,
            thread: Some(thread),
        })
    }
}

impl Shared {
    fn served(&self) -> MutexGuard<'_, Option<Served>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // The counter cannot overflow, so the write cannot fail.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Ends the pager, with its descriptors.
    fn close(&self) {
        if let Some(served) = self.served().take() {
            served.inherited.forget();
        }
    }

    fn keep(&self, to_server: &OwnedFd) {
        // Processes that serve, by their numbers, and how many halves each has.
        let mut servers: HashMap<u32, (OwnedFd, u32)> = HashMap::new();
        loop {
            let mut ready = vec![
                PollFd::new(&self.wake, PollFlags::IN),
                PollFd::new(to_server, PollFlags::IN),
            ];
            let numbers: Vec<u32> = servers.keys().copied().collect();
            ready.extend(
                servers
                    .values()
                    .map(|(server, _)| PollFd::new(server, PollFlags::IN)),
            );
            if rustix::event::poll(&mut ready, None).is_err() {
                continue;
            }
            let ended: Vec<u32> = numbers
                .into_iter()
                .zip(&ready[2..])
                .filter_map(|(number, ready)| (!ready.revents().is_empty()).then_some(number))
                .collect();
            let nobody = ready[1].revents().contains(PollFlags::HUP);
            drop(ready);
            if self.ending.load(SeqCst) {
                return;
            }
            let mut left = Vec::new();
            while let Some((notice, number, process)) = Notice::receive(to_server) {
                match (notice, process) {
                    (Notice::Attach, Some(process)) => servers.entry(number).or_insert((process, 0)).1 += 1,
                    (Notice::Attach, None) => {}
                    (Notice::Detach, _) => left.push(number),
                    (Notice::Kept, _) => self.install_kept(),
                    (Notice::Release, _) => {
                        if self.release() {
                            return;
                        }
                    }
                }
            }
            let mut gone = false;
            for number in left {
                let Some((_, halves)) = servers.get_mut(&number) else {
                    continue;
                };
                *halves -= 1;
                if *halves == 0 {
                    servers.remove(&number);
                }
                gone = true;
            }
            for number in ended {
                self.parts.header().gate.forget(number);
                gone |= servers.remove(&number).is_some();
            }
            if self.failed.load(SeqCst) || nobody || (gone && servers.is_empty()) {
                self.poison();
                return self.wait_for_end();
            }
            if gone {
                self.ask_again();
            }
        }
    }

    /// Nothing is left to do but to let what is there be dropped, moved and unmapped.
    fn wait_for_end(&self) {
        while !self.ending.load(SeqCst) {
            let _ = rustix::event::poll(&mut [PollFd::new(&self.wake, PollFlags::IN)], None);
            // So that it can be waited on again.
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
    }

    /// The memory becomes ordinary, if every page is there. Answers whether it has.
    fn release(&self) -> bool {
        let released = match &*self.served() {
            Some(served) => served.pager.release(),
            None => false,
        };
        let answer = if released {
            self.close();
            Release::DONE
        } else {
            Release::REFUSED
        };
        let header = self.parts.header();
        header.release.store(answer, SeqCst);
        let _ = futex::wake(&header.release, futex::Flags::empty(), i32::MAX as u32);
        released
    }

    /// Pages were kept because they are no longer where they were mapped.
    fn install_kept(&self) {
        let Some(source) = self.served().as_ref().map(|served| Arc::clone(&served.source)) else {
            return;
        };
        match self.parts.serving {
            Serving::Copied => {
                if let Err(error) = source.install_kept(self.parts.all()) {
                    tracing::warn!(error = chain(&error), "cannot install what was served");
                }
            }
            // Who waits looks again, and finds the page in the file.
            Serving::InPlace => self.ask_again(),
        }
    }

    /// What was asked for and did not come is asked for again.
    fn ask_again(&self) {
        if let Some(served) = &*self.served() {
            served.pager.look_again(self.parts.all());
        }
    }

    /// Nobody serves any more.
    fn poison(&self) {
        let served = self.served();
        let Some(served) = &*served else { return };
        // Nobody looks any more whether a server ends.
        served.source.close();
        if let Err(error) = served.pager.poison_absent() {
            tracing::error!(%error, "who waits for pages that nobody serves any more waits for ever");
        }
    }
}
