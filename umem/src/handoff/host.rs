//! The process that serves other processes' memory.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::io::Errno;

use super::passing::{PassingError, receive, send};
use super::{FailureKind, Figures, FillKind, Message, Serve, VERSION};
use crate::causes::chain;
use crate::image::Image;
use crate::link::{Listener, Stream};
use crate::pager::{Fill, Memory, Notice, Pager, PagerError, RegisteredStripe};
use crate::region::PageSize;
use crate::source::file::{Checksums, FileSource};
use crate::source::{PageSource, SourceError};
use crate::states::PageStates;
use crate::uffd::Userfaultfd;
use crate::working_set::{MAX_SIZE, WorkingSet};

/// Processes served at a time.
const MAX_ATTACHED: usize = 256;

/// How long a message may take to be read by the other side.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves the memory of processes that hand it over, from images.
#[derive(Debug)]
pub struct PagerHost {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    images: HashMap<String, Arc<Image>>,
    attached: Mutex<HashMap<u64, Arc<UnixStream>>>,
    all_gone: Condvar,
    next: AtomicU64,
    stopping: AtomicBool,
    stop: OwnedFd,
}

/// Ends a host, from any thread.
#[derive(Clone, Debug)]
pub struct PagerHostStopper(Arc<Shared>);

impl PagerHostStopper {
    /// Nobody is served any more. Processes that were wait for the next pager.
    pub fn stop(&self) {
        self.0.stopping.store(true, SeqCst);
        // The counter cannot overflow, so the write cannot fail.
        let _ = rustix::io::write(&self.0.stop, &1u64.to_ne_bytes());
    }
}

impl PagerHost {
    /// A host with these images, by name.
    pub fn new(images: HashMap<String, Arc<Image>>) -> io::Result<Self> {
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            shared: Arc::new(Shared {
                images,
                attached: Mutex::default(),
                all_gone: Condvar::new(),
                next: AtomicU64::new(0),
                stopping: AtomicBool::new(false),
                stop,
            }),
        })
    }

    /// What ends it.
    pub fn stopper(&self) -> PagerHostStopper {
        PagerHostStopper(Arc::clone(&self.shared))
    }

    /// Serves who connects to `listener`, a Unix socket, until stopped.
    pub fn serve(&self, listener: &Listener) -> io::Result<()> {
        let shared = &self.shared;
        while !shared.stopping.load(SeqCst) {
            let mut ready = [
                PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(shared.stop.as_fd(), PollFlags::IN),
            ];
            match rustix::event::poll(&mut ready, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            if ready[0].revents().is_empty() || shared.stopping.load(SeqCst) {
                continue;
            }
            match listener.accept() {
                Ok(Stream::Unix(stream)) => shared.welcome(stream),
                Ok(_) => tracing::warn!("memory can only be handed over by a Unix socket"),
                Err(error) => {
                    tracing::warn!(%error, "cannot take a connection");
                    thread::sleep(Duration::from_millis(10));
                }
            }
        }
        let mut attached = shared.lock();
        attached
            .values()
            .for_each(|stream| drop(stream.shutdown(std::net::Shutdown::Both)));
        while !attached.is_empty() {
            attached = shared
                .all_gone
                .wait(attached)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<UnixStream>>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn welcome(self: &Arc<Self>, stream: UnixStream) {
        let stream = Arc::new(stream);
        let number = self.next.fetch_add(1, SeqCst);
        {
            let mut attached = self.lock();
            if attached.len() >= MAX_ATTACHED {
                drop(attached);
                let text = "as many processes as can be are served".into();
                let _ = send(&stream, &Message::Refused { text }, &[]);
                return;
            }
            attached.insert(number, Arc::clone(&stream));
        }
        let shared = Arc::clone(self);
        let thread = thread::Builder::new()
            .name(format!("attached-{number}"))
            .spawn(move || {
                match shared.serve_process(&stream) {
                    Ok(()) | Err(PassingError::Closed) => {}
                    Err(error) => {
                        tracing::info!(
                            number,
                            error = &error as &dyn std::error::Error,
                            "no longer attached"
                        );
                    }
                }
                shared.forget(number);
            });
        if let Err(error) = thread {
            tracing::warn!(%error, "no thread for a connection");
            self.forget(number);
        }
    }

    fn forget(&self, number: u64) {
        if let Some(stream) = self.lock().remove(&number) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        self.all_gone.notify_all();
    }

    /// Answers one process until it goes. Its pager ends with this.
    fn serve_process(&self, stream: &Arc<UnixStream>) -> Result<(), PassingError> {
        stream
            .set_write_timeout(Some(PATIENCE))
            .map_err(PassingError::Lost)?;
        // Messages to it come from the pager's threads too.
        let out = Arc::new(Mutex::new(Arc::clone(stream)));
        let say = |message: &Message| send(&out.lock().unwrap_or_else(PoisonError::into_inner), message, &[]);
        let mut pager: Option<Pager> = None;
        loop {
            let (message, descriptors) = receive(stream)?;
            match message {
                Message::Describe { version, image } => match self.find(version, &image) {
                    Ok(image) => say(&Message::Image {
                        pages: image.pages(),
                        digest: image.footer().digest,
                        metadata: image.metadata().to_vec(),
                    })?,
                    Err(text) => say(&Message::Refused { text })?,
                },
                Message::Serve(serve) if pager.is_none() => {
                    let out = Arc::clone(&out);
                    let observer = move |notice| {
                        let Some(message) = message_of(notice) else { return };
                        let stream = out.lock().unwrap_or_else(PoisonError::into_inner);
                        if let Err(error) = send(&stream, &message, &[]) {
                            // It will not be told, so it must find out: its memory is not served any more.
                            tracing::warn!(%error, "cannot tell the process whose memory is served");
                            let _ = stream.shutdown(std::net::Shutdown::Both);
                        }
                    };
                    match self.take_over(&serve, descriptors, observer) {
                        Ok(started) => {
                            say(&Message::Serving)?;
                            pager = Some(started);
                        }
                        Err(text) => say(&Message::Refused { text })?,
                    }
                }
                Message::Ping => say(&Message::Pong)?,
                Message::Stop => {
                    let mut figures = Figures::default();
                    if let Some(pager) = &mut pager {
                        pager.stop();
                        let stats = pager.stats();
                        figures = Figures {
                            duplicate: stats.duplicate,
                            faults: stats.faults,
                            fault_classes: stats.fault_classes,
                            source: stats.source,
                        };
                    }
                    return say(&Message::Stopped(Box::new(figures)));
                }
                _ => {
                    return Err(PassingError::Protocol(
                        "a message that only this side sends".into(),
                    ));
                }
            }
        }
    }

    fn find(&self, version: u32, name: &str) -> Result<&Arc<Image>, String> {
        if version != VERSION {
            return Err(format!(
                "this pager speaks version {VERSION}, and was asked in version {version}"
            ));
        }
        let image = match (name, self.images.len()) {
            ("", 1) => self.images.values().next(),
            (name, _) => self.images.get(name),
        };
        image.ok_or_else(|| {
            let mut names: Vec<&str> = self.images.keys().map(String::as_str).collect();
            names.sort_unstable();
            format!("no image '{name}' here; there are: {}", names.join(", "))
        })
    }

    /// Begins to serve what was handed over.
    fn take_over(
        &self,
        serve: &Serve,
        descriptors: Vec<OwnedFd>,
        observer: impl Fn(Notice) + Send + Sync + 'static,
    ) -> Result<Pager, String> {
        let image = self.find(serve.version, &serve.image)?;
        if image.footer().digest != serve.digest {
            return Err(format!("image '{}' has another digest", serve.image));
        }
        let page_size = [PageSize::Small, PageSize::Huge]
            .into_iter()
            .find(|size| size.bytes() == serve.page_size)
            .ok_or_else(|| format!("no memory has pages of {} bytes", serve.page_size))?;
        check_stripes(serve, image.pages())?;
        let mut descriptors = descriptors.into_iter();
        let mut next = |what: &str| {
            descriptors
                .next()
                .ok_or_else(|| format!("no descriptor for {what}"))
        };
        let table = next("the page states")?;
        let states = PageStates::from_shared(table.as_fd(), image.pages(), page_size.pages())
            .map_err(|error| format!("the table of page states cannot be used: {error}"))?;
        if serve.memfd {
            check_memory(&next("the memory")?, &states)?;
        }
        let fill = match serve.fill {
            FillKind::Off => Fill::Off,
            FillKind::Sequential => Fill::Sequential,
            FillKind::NearFaults => Fill::NearFaults,
            FillKind::Recorded => Fill::Recorded(Arc::new(read_set(next("the working set")?, image)?)),
        };
        let stripes = serve
            .stripes
            .iter()
            .map(|stripe| {
                Ok(RegisteredStripe {
                    uffd: Userfaultfd::from_descriptor(next("a userfaultfd")?),
                    pages: stripe.pages(),
                    start: stripe.start(),
                })
            })
            .collect::<Result<_, String>>()?;
        let memory = Memory {
            stripes,
            page_size,
            states: Arc::new(states),
        };
        let source: Arc<dyn PageSource> = Arc::new(FileSource::new(Arc::clone(image), Checksums::On));
        Pager::take_over(memory, source, fill, observer).map_err(|error| error.to_string())
    }
}

/// Refuses stripes that a pager could not find its pages in.
fn check_stripes(serve: &Serve, pages: u64) -> Result<(), String> {
    let wrong = || "the stripes are not the image's pages, each of one length but the last".to_owned();
    let first = serve.stripes.first().ok_or_else(wrong)?;
    let mut next = 0;
    for (index, stripe) in serve.stripes.iter().enumerate() {
        let last = index + 1 == serve.stripes.len();
        let fits = stripe.pages > 0 && (stripe.pages == first.pages || (last && stripe.pages < first.pages));
        let bytes = stripe.pages.checked_mul(serve.page_size.max(1));
        let in_memory = bytes.is_some_and(|bytes| stripe.address.checked_add(bytes).is_some());
        if stripe.first_page != next || !fits || !in_memory {
            return Err(wrong());
        }
        next += stripe.pages;
    }
    if next == pages { Ok(()) } else { Err(wrong()) }
}

/// Refuses memory in which there is more than pagers have brought.
fn check_memory(memfd: &OwnedFd, states: &PageStates) -> Result<(), String> {
    let stat =
        rustix::fs::fstat(memfd).map_err(|errno| format!("cannot count the memory's pages: {errno}"))?;
    let populated = stat.st_blocks as u64 * 512 / crate::units::PAGE_SIZE as u64;
    let counts = states.counts();
    // Removed pages that were used again and not yet marked so may be there too.
    let brought = counts.present + counts.in_flight + counts.removed;
    if populated <= brought {
        Ok(())
    } else {
        Err(format!(
            "{populated} pages of the memory are populated, and only {brought} were loaded"
        ))
    }
}

fn read_set(descriptor: OwnedFd, image: &Image) -> Result<WorkingSet, String> {
    let mut bytes = Vec::new();
    File::from(descriptor)
        .take(MAX_SIZE as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("cannot read the working set: {error}"))?;
    let set = WorkingSet::decode(&bytes).map_err(|error| error.to_string())?;
    let checked = set.check(Some(image.footer().digest), image.pages());
    checked.map(|()| set).map_err(|error| error.to_string())
}

/// What the process with the memory is told; of a source that may come back, nothing.
fn message_of(notice: Notice) -> Option<Message> {
    Some(match notice {
        Notice::AllPagesPresent => Message::AllPagesPresent,
        Notice::SourceLost(_) | Notice::SourceBack => return None,
        Notice::Failed(error) => {
            let kind = match &*error {
                PagerError::Source {
                    source: SourceError::Corrupt(_),
                    ..
                } => FailureKind::Corrupt,
                PagerError::Source {
                    source: SourceError::Lost(_),
                    ..
                } => FailureKind::Lost,
                _ => FailureKind::Pager,
            };
            let text = chain(&*error);
            Message::Failed { kind, text }
        }
    })
}
