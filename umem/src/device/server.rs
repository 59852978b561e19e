//! The half that serves.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::thread::futex;

use super::descriptors::{HALF, Mail, Notice, receive_half, send_half};
use super::donation::PageBuffer;
use super::gate::Place;
use super::install::{By, Installer, Left, Way};
use super::shared::{Parts, Release, STEP, Shared};
use super::{DeviceError, Serving, failed};
use crate::uffd::Userfaultfd;
use crate::units::{PAGE_SIZE, PageIndex, PageRange};

/// Bytes of a page index in a buffer.
const INDEX: usize = size_of::<u64>();

/// What this half is called in a message.
const KIND: u8 = b'S';

/// How long the client may take to make its memory ordinary, and how often it is looked whether it is there at all.
const PATIENCE: Duration = Duration::from_secs(10);
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};

/// The half of a device that serves pages. Any process and any thread may have it and use it; each request comes to one of them.
///
/// [`AsFd`] is for poll, select and epoll: readable while a request waits to be read, and at its end (POLLHUP) when there is no
/// client any more. Setting O_NONBLOCK there makes `read` fail where it would wait, in every process that has it.
///
/// **Who serves** is whoever has read, or has written since the memory was mapped. When the last process that has done so ends, or lets
/// go of its half, what is absent will not come any more, and who waits for it or touches it gets SIGBUS (before Linux 6.6: SIGSEGV).
/// When one of several ends, what it was asked for and did not serve is asked for again.
#[derive(Debug)]
pub struct Server {
    parts: Arc<Parts>,
    /// The pipe's end that is read.
    requests: OwnedFd,
    to_client: OwnedFd,
    connection: RwLock<Option<Arc<Connection>>>,
    /// The process that has told the client that it serves.
    attached: AtomicU32,
    /// Held to tell it.
    attaching: Mutex<()>,
    /// Its place at the gate by its number, in the lower half; in the upper one the process that has it.
    place: AtomicU64,
    window: OnceLock<Shared>,
}

/// The mapping, once there is one.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) installer: Installer,
    pub(super) can_move: bool,
    client: OwnedFd,
}

impl Server {
    pub(super) fn new(parts: Arc<Parts>, requests: OwnedFd, to_client: OwnedFd) -> Self {
        Self {
            parts,
            requests,
            to_client,
            connection: RwLock::default(),
            attached: AtomicU32::new(0),
            attaching: Mutex::default(),
            place: AtomicU64::new(0),
            window: OnceLock::new(),
        }
    }

    /// Sends this half to who receives it at the other end of a Unix socket. Here it stays what it is.
    pub fn send(&self, socket: impl AsFd) -> Result<(), DeviceError> {
        let mut descriptors = [self.requests.as_fd(); HALF];
        descriptors[1] = self.to_client.as_fd();
        for (descriptor, file) in descriptors[2..].iter_mut().zip(self.parts.files()) {
            *descriptor = file;
        }
        send_half(socket.as_fd(), KIND, &descriptors)
    }

    /// Waits for a half that was [sent](Self::send).
    pub fn receive(socket: impl AsFd) -> Result<Self, DeviceError> {
        let [requests, to_client, files @ ..] = receive_half(socket.as_fd(), KIND)?;
        Ok(Self::new(Parts::from_files(files)?, requests, to_client))
    }

    /// Pages of the device.
    pub fn pages(&self) -> u64 {
        self.parts.pages
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.parts.pages * PAGE_SIZE as u64
    }

    /// The shmem file: page i is at byte 4096 i of it, until it is served.
    pub fn window_file(&self) -> BorrowedFd<'_> {
        self.parts.window()
    }

    /// The same, mapped for reading and writing once and for all: `size()` bytes. It is any process' to write that has this half.
    pub fn window(&self) -> Result<*mut u8, DeviceError> {
        if let Some(window) = self.window.get() {
            return Ok(window.start());
        }
        let window = Shared::new(self.parts.window(), self.size() as usize)?;
        Ok(self.window.get_or_init(|| window).start())
    }

    /// Writes `content` (at most a page) to the start of a page of the window.
    pub fn fill(&self, page: PageIndex, content: &[u8]) -> Result<(), DeviceError> {
        self.check(page)?;
        let content = &content[..content.len().min(PAGE_SIZE)];
        let at = self.window()?.wrapping_add(page.byte_offset() as usize);
        // SAFETY: within the window, which is mapped for as long as `self`.
        unsafe { std::ptr::copy_nonoverlapping(content.as_ptr(), at, content.len()) };
        Ok(())
    }

    /// Whether the memory was mapped.
    pub fn is_mapped(&self) -> bool {
        self.parts.header().mapped.load(SeqCst) != 0
    }

    /// Whether this process did it.
    pub(super) fn is_mapped_here(&self) -> bool {
        self.parts.header().mapped.load(SeqCst) == std::process::id()
    }

    /// Reads the pages that are waited for, in the order in which they were touched: as many as there are and fit. Each is
    /// told once, however many wait for it. (One that was served after it was touched is told all the same.) Waits for
    /// the first, unless the descriptor is O_NONBLOCK. None: there is no client any more.
    pub fn read(&self, pages: &mut [PageIndex]) -> Result<usize, DeviceError> {
        // SAFETY: an index is a u64 of any bits, and there is room for as many.
        let read = unsafe { self.read_to(pages.as_mut_ptr().cast(), size_of_val(pages)) }?;
        Ok(read / INDEX)
    }

    /// The same by bytes: indices as u64, as many as have room. Answers how many bytes.
    ///
    /// # Safety
    ///
    /// At `buffer` there is room for `length` bytes, or nothing is mapped, which is EFAULT.
    pub unsafe fn read_to(&self, buffer: *mut u8, length: usize) -> Result<usize, DeviceError> {
        let length = length - length % INDEX;
        if length == 0 {
            return Err(DeviceError::ShortBuffer(length));
        }
        self.attach();
        // SAFETY: by this function's own condition.
        let read = unsafe { libc::read(self.requests.as_raw_fd(), buffer.cast(), length) };
        if read < 0 {
            return Err(match Errno::from_io_error(&io::Error::last_os_error()) {
                Some(Errno::AGAIN) => DeviceError::WouldBlock,
                Some(Errno::INTR) => DeviceError::Interrupted,
                errno => failed("read")(errno.unwrap_or(Errno::IO)),
            });
        }
        // There is room now. Who was left waiting for that asks again.
        if self.parts.header().overflowed.load(SeqCst) != 0 {
            self.parts.header().overflowed.store(0, SeqCst);
            if let Some(connection) = self.connection()? {
                connection.installer.wake_all();
            }
        }
        Ok(read as usize)
    }

    /// These pages are ready in the window. Who waits for them goes on; who touches them later does not wait. Pages that
    /// were served before, or dropped by the client, are left as they are. At the first that there is not it ends, with those before
    /// it served. Answers how many.
    pub fn write(&self, pages: &[PageIndex]) -> Result<usize, DeviceError> {
        if pages.is_empty() {
            return Err(DeviceError::ShortBuffer(0));
        }
        let mut rest = pages;
        while let Some(first) = rest.first() {
            self.check(*first)?;
            let follows = |(at, page): &(usize, &PageIndex)| {
                page.0.wrapping_sub(first.0) == *at as u64 && page.0 < self.parts.pages
            };
            let count = rest.iter().enumerate().take_while(follows).count();
            self.serve(PageRange::new(*first, count as u64), None)?;
            rest = &rest[count..];
        }
        Ok(pages.len())
    }

    /// Serves `content`, whole pages, as the pages from `first` on: as [`write`](Self::write), but straight from where it is, and
    /// not through the window. The least work there is for pages that come from a socket or a file, if the buffer stays in the
    /// processor's cache.
    pub fn write_from(&self, first: PageIndex, content: &[u8]) -> Result<(), DeviceError> {
        let pages = PageRange::new(first, (content.len() / PAGE_SIZE) as u64);
        if pages.count == 0 {
            return Err(DeviceError::ShortBuffer(content.len()));
        }
        self.check_all(pages)?;
        if self.parts.serving == Serving::InPlace {
            for (page, content) in pages.pages().zip(content.chunks(PAGE_SIZE)) {
                self.fill(page, content)?;
            }
        }
        self.serve(pages, Some(content))
    }

    /// Serves what is in the buffer as the pages from `first` on, and gives it away: where the memory is this process' own it
    /// is moved there and not copied (Linux 6.8). What the buffer has afterwards is not said.
    pub fn donate(&self, first: PageIndex, content: &mut PageBuffer) -> Result<(), DeviceError> {
        let pages = PageRange::new(first, content.pages());
        self.check_all(pages)?;
        let movable = self.connection()?.filter(|connection| {
            connection.can_move && self.is_mapped_here() && self.parts.serving == Serving::Copied
        });
        let Some(connection) = movable else {
            return self.write_from(first, content);
        };
        self.attach();
        let start = content.as_mut_ptr();
        self.install(&connection, pages, |step| {
            let offset = (step.start.0 - first.0) as usize * PAGE_SIZE;
            Way::Move(start.wrapping_add(offset))
        })
    }

    /// Makes the memory ordinary, which is refused until every page of it is there: then the userfaultfd is gone, a moment later
    /// nothing of the device is left in the client's process, neither thread nor descriptor, and the memory stays. A client that has ended is no error.
    pub fn make_anonymous(&self) -> Result<(), DeviceError> {
        let header = self.parts.header();
        if header.release.load(SeqCst) == Release::DONE {
            return Ok(());
        }
        let Some(connection) = self.connection()? else {
            return Err(DeviceError::Incomplete);
        };
        let since = Instant::now();
        loop {
            if connection.client_is_gone() {
                // For who asks again.
                header.release.store(Release::DONE, SeqCst);
                break;
            }
            if !self.parts.states.is_all_settled() {
                return Err(DeviceError::Incomplete);
            }
            // The client may have refused one that came too early, from another process.
            let _ = header
                .release
                .compare_exchange(Release::REFUSED, Release::NONE, SeqCst, SeqCst);
            // No room: it is told already.
            let _ = Notice::Release.send(&self.to_client);
            let _ = futex::wait(&header.release, futex::Flags::empty(), Release::NONE, Some(&LOOK));
            if header.release.load(SeqCst) == Release::DONE {
                break;
            }
            if since.elapsed() >= PATIENCE {
                return Err(DeviceError::NoAnswer);
            }
        }
        // Here too nothing is to be left of it.
        drop(Mail::receive(&self.to_client, self.parts.pages, true));
        *self.connection.write().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(())
    }

    /// Waits until the memory was mapped, or there is something to read. False: not to be waited for, or there is.
    pub(super) fn wait_for_mapping(&self) -> Result<bool, DeviceError> {
        let flags = rustix::fs::fcntl_getfl(&self.requests).map_err(failed("fcntl(F_GETFL)"))?;
        if flags.contains(OFlags::NONBLOCK) {
            return Ok(false);
        }
        let mut ready = [
            PollFd::new(&self.requests, PollFlags::IN),
            PollFd::new(&self.to_client, PollFlags::IN),
        ];
        match rustix::event::poll(&mut ready, None) {
            Ok(_) => Ok(ready[0].revents().is_empty() && self.is_mapped()),
            Err(Errno::INTR) => Err(DeviceError::Interrupted),
            Err(errno) => Err(failed("poll")(errno)),
        }
    }

    fn check(&self, page: PageIndex) -> Result<(), DeviceError> {
        let pages = self.parts.pages;
        if page.0 < pages {
            Ok(())
        } else {
            Err(DeviceError::BeyondEnd { page, pages })
        }
    }

    fn check_all(&self, pages: PageRange) -> Result<(), DeviceError> {
        let last = pages.start.0.checked_add(pages.count.saturating_sub(1));
        self.check(PageIndex(last.unwrap_or(u64::MAX)))
    }

    /// Tells the client that this process serves, once.
    fn attach(&self) {
        let own = std::process::id();
        if self.attached.load(SeqCst) == own {
            return;
        }
        let _alone = self.attaching.lock().unwrap_or_else(PoisonError::into_inner);
        // Told before it is believed: who is inside the gate must not be somebody whose end the client would not see.
        if self.attached.load(SeqCst) != own && Notice::Attach.send(&self.to_client).is_ok() {
            self.attached.store(own, SeqCst);
        }
    }

    /// This process' place at the client's gate. `None`: the client does not know of this process, and would not see it end there; or
    /// all places are taken.
    fn place(&self) -> Option<Place> {
        let own = std::process::id();
        let taken = self.place.load(SeqCst);
        if (taken >> 32) as u32 == own {
            return Place::from_number(taken as u32);
        }
        if self.attached.load(SeqCst) != own {
            return None;
        }
        let gate = &self.parts.header().gate;
        let place = gate.take_place()?;
        let number = u64::from(own) << 32 | u64::from(place.to_number());
        match self.place.compare_exchange(taken, number, SeqCst, SeqCst) {
            Ok(_) => Some(place),
            // Another thread was faster.
            Err(taken) => {
                gate.give_back(place);
                Place::from_number(taken as u32)
            }
        }
    }

    /// The mapping, if there is one.
    fn connection(&self) -> Result<Option<Arc<Connection>>, DeviceError> {
        if let Some(connection) = &*self.connection.read().unwrap_or_else(PoisonError::into_inner) {
            return Ok(Some(Arc::clone(connection)));
        }
        // Before it is sent; what is not seen here is installed by the client, which looks for what was kept after it has sent it.
        if !self.is_mapped() {
            return Ok(None);
        }
        let Some((mail, uffd, client)) = Mail::receive(&self.to_client, self.parts.pages, false)? else {
            return Ok(None);
        };
        let connection = Arc::new(Connection {
            installer: Installer {
                uffd: Userfaultfd::from_descriptor(uffd),
                pages: mail.pages,
                start: mail.start,
            },
            can_move: mail.can_move,
            client,
        });
        let mut known = self.connection.write().unwrap_or_else(PoisonError::into_inner);
        Ok(Some(Arc::clone(known.get_or_insert(connection))))
    }

    /// Serves pages out of `content`, or (`None`) the window.
    fn serve(&self, pages: PageRange, content: Option<&[u8]>) -> Result<(), DeviceError> {
        let mut connection = self.connection()?;
        if connection.is_none() {
            self.parts.keep(pages, content)?;
            // The race: it was mapped meanwhile, and the client has looked already.
            connection = self.connection()?;
        }
        let Some(connection) = connection else {
            return Ok(());
        };
        self.attach();
        if self.parts.serving == Serving::InPlace {
            // First: who finds the page in the file is let have it.
            self.parts.hand_over(pages);
            return self.install(&connection, pages, |_| Way::Continue);
        }
        match (content, self.window.get()) {
            (Some(content), _) => self.install_copy(&connection, pages, content),
            (None, Some(window)) => {
                let start = window.start().wrapping_add(pages.start.byte_offset() as usize);
                // SAFETY: within the window, which is mapped for as long as `self`. Who says that a page is ready writes to it no
                // more until this has returned.
                let content = unsafe { std::slice::from_raw_parts(start, pages.bytes()) };
                self.install_copy(&connection, pages, content)
            }
            (None, None) => self.install_from_file(&connection, pages),
        }
    }

    fn install_copy(
        &self,
        connection: &Connection,
        pages: PageRange,
        content: &[u8],
    ) -> Result<(), DeviceError> {
        self.install(connection, pages, |step| {
            let offset = (step.start.0 - pages.start.0) as usize * PAGE_SIZE;
            Way::Copy(&content[offset..offset + step.bytes()])
        })
    }

    /// Of a window that this process has not mapped here, through a buffer that stays in the processor's cache.
    fn install_from_file(&self, connection: &Connection, pages: PageRange) -> Result<(), DeviceError> {
        const PART: u64 = 4;
        let mut buffer = [0; PART as usize * PAGE_SIZE];
        let mut rest = pages;
        while rest.count > 0 {
            let part = PageRange::new(rest.start, PART).clamp_to(rest.end());
            self.parts.read_window(part, &mut buffer)?;
            self.install_copy(connection, part, &buffer)?;
            rest = rest.from(part.end());
        }
        Ok(())
    }

    /// Installs what is wanted of `pages`, each step of at most [`STEP`] of them by the way that `way` says.
    fn install<'a>(
        &self,
        connection: &Connection,
        pages: PageRange,
        way: impl Fn(PageRange) -> Way<'a>,
    ) -> Result<(), DeviceError> {
        let parts = &self.parts;
        let mut rest = pages;
        while let Some((step, arrival)) = parts.claim_next(&mut rest) {
            debug_assert!(step.count <= STEP);
            let by = By::Server {
                gate: &parts.header().gate,
                place: self.place(),
                is_client_gone: &|| connection.client_is_gone(),
            };
            let installed = connection
                .installer
                .install(&by, &parts.states, step, arrival, way(step));
            let left = installed.map_err(|error| {
                // Who touches them later asks for them.
                step.pages().for_each(|page| {
                    parts.states.cancel(PageRange::single(page));
                });
                connection.installer.wake(step);
                DeviceError::Install(error)
            })?;
            match left {
                Left::Nothing => {}
                Left::Elsewhere(pages) => {
                    let content = match way(pages) {
                        Way::Copy(content) => Some(content),
                        Way::Continue => None,
                        // SAFETY: of these pages none was moved, and nobody else uses them meanwhile.
                        Way::Move(from) => Some(unsafe { std::slice::from_raw_parts(from, pages.bytes()) }),
                    };
                    parts.keep(pages, content)?;
                    // No room: it is told already.
                    let _ = Notice::Kept.send(&self.to_client);
                }
            }
        }
        Ok(())
    }
}

impl Connection {
    fn client_is_gone(&self) -> bool {
        let mut ended = [PollFd::new(&self.client, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        rustix::event::poll(&mut ended, Some(&now)).is_ok_and(|ended| ended > 0)
    }
}

impl AsFd for Server {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.requests.as_fd()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A child that has it from before a fork neither took a place nor attached.
        let own = std::process::id();
        let taken = self.place.load(SeqCst);
        if (taken >> 32) as u32 == own
            && let Some(place) = Place::from_number(taken as u32)
        {
            self.parts.header().gate.give_back(place);
        }
        if self.attached.load(SeqCst) == own {
            let _ = Notice::Detach.send(&self.to_client);
        }
    }
}
