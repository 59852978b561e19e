//! Memory whose pages a program serves: what `/dev/umem` of the umem v4 patch (I. Yamahata 2012) was, without a driver.
//!
//! ```text
//!   the server half                                     the client half
//!   window    the shmem file: pages are written here    map      once; the memory that is served
//!   read      which pages are waited for
//!   write     these pages are ready          ─────────► who waits goes on
//!   make_anonymous   when all are there      ─────────► ordinary memory, and nothing else is left
//! ```
//!
//! The halves are descriptors. Each can be in any process, by fork or by [`Server::send`] and [`Client::send`]; several may have
//! the server half, and read and write at the same time. The client half maps the memory **once**. In a child of that
//! process the memory is not there.
//!
//! **The device is a pager whose page source is another program.** The pager runs in the process with the memory, so that
//! nobody else is needed where memory is dropped, moved or unmapped. What a fault does:
//!
//! ```text
//! a thread touches an absent page
//!   -> pager     claims it (a page that was claimed is not asked for again), asks the source
//!   -> source    its index goes into a pipe, which is what the server reads and polls
//!   -> server    reads it, fills the page in the window, writes its index
//!   -> install   from the server's process: one UFFDIO_COPY out of the window, and the page is Present in the shared table
//! ```
//!
//! **A page that was served is the client's own.** The window can be dropped and written to again as soon as `write` has returned. What is
//! served before there is a mapping is kept in a second file (the *stash*) until there is. Where the server gives up that
//! right ([`Serving::InPlace`]), the page itself is mapped and nothing is copied. And in the process with the memory, pages of
//! one's own can be given away without a copy ([`Server::donate`]).
//!
//! **When nobody serves any more**, who waits is not left waiting: see [`Server`].

mod client;
mod descriptors;
mod donation;
mod gate;
mod install;
mod keeper;
mod server;
mod shared;
mod source;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{MemfdFlags, OFlags, SealFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::pipe::PipeFlags;

use self::shared::Parts;
use crate::pager::StartError;
use crate::states::PageStates;
use crate::uffd::{InstallError, OpenError};
use crate::units::{PAGE_SIZE, PageIndex};

pub use self::client::{Client, Mapping, Place};
pub use self::donation::PageBuffer;
pub use self::server::Server;

/// The number of requests that the driver had room for: 64 for each of 256 virtual CPUs.
pub const DRIVER_REQUESTS: u32 = 64 * 256;

/// The largest device: what fits into an address space, in bytes.
pub const MAX_SIZE: u64 = 1 << 46;

/// What becomes of a page in the window when it has been served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Serving {
    /// The client gets a page of its own, and the server can do with the window what it likes.
    Copied,
    /// The client gets this very page. The server must neither drop it nor write to it any more.
    InPlace,
}

/// How a device is to be.
#[derive(Clone, Copy, Debug)]
pub struct DeviceOptions {
    /// In bytes; rounded up to whole pages.
    pub size: u64,
    /// How many requests may wait to be read, 512 and a power of 2 at least: it is rounded up to that, and beyond 131,072 needs
    /// CAP_SYS_RESOURCE. Who asks for more pages waits for the next read.
    pub max_requests: u32,
    /// What becomes of a page in the window when it has been served.
    pub serving: Serving,
}

/// Why something cannot be done with a device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// There is no such device.
    #[error("a device of {0} bytes cannot be: it has at least a byte and at most {MAX_SIZE}")]
    Size(u64),
    /// It was not initialised, or this half of it is not here.
    #[error("this half of the device is not here")]
    NotHere,
    /// A buffer that holds no page index.
    #[error("a buffer of {0} bytes does not hold a page index, which has 8")]
    ShortBuffer(usize),
    /// A page that there is not.
    #[error("there is no page {page}: the device has {pages}")]
    BeyondEnd {
        /// The page asked for.
        page: PageIndex,
        /// How many there are.
        pages: u64,
    },
    /// It can be mapped once.
    #[error("the device was mapped before")]
    Mapped,
    /// Not every page is there.
    #[error("not every page is there yet")]
    Incomplete,
    /// Nobody waits for a page, and the descriptor is not to be waited on.
    #[error("no page is asked for")]
    WouldBlock,
    /// A signal was handled.
    #[error("interrupted by a signal")]
    Interrupted,
    /// The client does not answer.
    #[error("the process with the memory does not answer")]
    NoAnswer,
    /// What was received is not a half of a device.
    #[error("what came is no half of a device: {0}")]
    NotADevice(&'static str),
    /// No userfaultfd.
    #[error(transparent)]
    Userfaultfd(#[from] OpenError),
    /// The memory cannot be served.
    #[error(transparent)]
    Pager(#[from] StartError),
    /// The kernel does not take the page.
    #[error("cannot install a page")]
    Install(#[source] InstallError),
    /// A system call failed.
    #[error("{call}")]
    Os {
        /// The call.
        call: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl DeviceError {
    /// What the driver would have said.
    pub fn errno(&self) -> i32 {
        let errno = match self {
            Self::Size(size) if *size > MAX_SIZE => Errno::NOMEM,
            Self::Size(_) | Self::ShortBuffer(_) | Self::BeyondEnd { .. } => Errno::INVAL,
            Self::NotHere => Errno::NXIO,
            Self::Mapped | Self::Incomplete => Errno::BUSY,
            Self::WouldBlock => Errno::AGAIN,
            Self::Interrupted => Errno::INTR,
            Self::NoAnswer => Errno::TIMEDOUT,
            Self::NotADevice(_) => Errno::BADMSG,
            Self::Userfaultfd(_) => Errno::NODEV,
            Self::Pager(StartError::NoMemory) | Self::Install(InstallError::OutOfMemory) => Errno::NOMEM,
            Self::Pager(_) | Self::Install(_) => Errno::IO,
            Self::Os { source, .. } => return source.raw_os_error().unwrap_or(Errno::IO.raw_os_error()),
        };
        errno.raw_os_error()
    }
}

/// An error of the system call named.
fn failed<E: Into<io::Error>>(call: &'static str) -> impl Fn(E) -> DeviceError {
    move |error| DeviceError::Os {
        call,
        source: error.into(),
    }
}

/// A device: either half of it, or both.
#[derive(Debug)]
pub struct Device {
    server: Option<Server>,
    client: Mutex<Option<Client>>,
}

impl Device {
    /// A new one, with both halves.
    pub fn create(options: DeviceOptions) -> Result<Self, DeviceError> {
        let requests = Requests::new(options.max_requests)?;
        Self::with_requests(options.size, options.serving, requests).map_err(|(error, _)| error)
    }

    /// The same, with a pipe that there is already; an error gives it back.
    pub fn with_requests(
        size: u64,
        serving: Serving,
        requests: Requests,
    ) -> Result<Self, (DeviceError, Requests)> {
        match prepare(size, serving) {
            Ok((parts, to_client, to_server)) => {
                let server = Server::new(Arc::clone(&parts), requests.read_end, to_client);
                let client = Client::new(parts, requests.write_end, to_server);
                Ok(Self::from_halves(Some(server), Some(client)))
            }
            Err(error) => Err((error, requests)),
        }
    }

    /// One with these halves.
    pub fn from_halves(server: Option<Server>, client: Option<Client>) -> Self {
        Self {
            server,
            client: Mutex::new(client),
        }
    }

    /// Its halves.
    pub fn into_halves(self) -> (Option<Server>, Option<Client>) {
        let client = self.client.into_inner().unwrap_or_else(PoisonError::into_inner);
        (self.server, client)
    }

    /// The server half.
    pub fn server(&self) -> Result<&Server, DeviceError> {
        self.server.as_ref().ok_or(DeviceError::NotHere)
    }

    /// The client half.
    pub fn client(&self) -> MutexGuard<'_, Option<Client>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps the memory: see [`Client::map`]. Another half that was to do it is let go of.
    pub fn map(&self, place: Place) -> Result<Mapping, DeviceError> {
        let mut half = self.client();
        match &*half {
            Some(client) => {
                let mapping = client.map(place)?;
                // It is of no more use, and a server sees the end of the client when nobody has it.
                *half = None;
                Ok(mapping)
            }
            // This process let go of it because another one has mapped.
            None if self.server.as_ref().is_some_and(Server::is_mapped) => Err(DeviceError::Mapped),
            None => Err(DeviceError::NotHere),
        }
    }

    /// Maps all of it, anywhere.
    pub fn map_all(&self) -> Result<Mapping, DeviceError> {
        let everything = self.client().as_ref().map(Client::everything);
        match (everything, &self.server) {
            (Some(place), _) => self.map(place),
            (None, Some(server)) if server.is_mapped() => Err(DeviceError::Mapped),
            (None, _) => Err(DeviceError::NotHere),
        }
    }

    /// As [`Server::read`].
    pub fn read(&self, pages: &mut [PageIndex]) -> Result<usize, DeviceError> {
        // SAFETY: an index is a u64 of any bits, and there is room for as many.
        let read = unsafe { self.read_to(pages.as_mut_ptr().cast(), size_of_val(pages)) }?;
        Ok(read / size_of::<u64>())
    }

    /// As [`Server::read_to`].
    ///
    /// # Safety
    ///
    /// The same.
    pub unsafe fn read_to(&self, buffer: *mut u8, length: usize) -> Result<usize, DeviceError> {
        let server = self.server()?;
        if length >= size_of::<u64>() {
            self.let_go(server)?;
        }
        // SAFETY: by this function's own condition.
        unsafe { server.read_to(buffer, length) }
    }

    /// As [`Server::write`].
    pub fn write(&self, pages: &[PageIndex]) -> Result<usize, DeviceError> {
        self.server()?.write(pages)
    }

    /// As [`Server::make_anonymous`].
    pub fn make_anonymous(&self) -> Result<(), DeviceError> {
        self.server()?.make_anonymous()
    }

    /// Lets go of a client half that will never map, because another process has. Otherwise a server with both halves would never see the
    /// end of the client: it would itself be one who might still ask. Before there is a mapping it is waited for here, not in
    /// the read.
    fn let_go(&self, server: &Server) -> Result<(), DeviceError> {
        while self.client().is_some() {
            if server.is_mapped() {
                if !server.is_mapped_here() {
                    self.client().take();
                }
                return Ok(());
            }
            if !server.wait_for_mapping()? {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// The files of a device, and the two ends of what the halves say to each other.
fn prepare(size: u64, serving: Serving) -> Result<(Arc<Parts>, OwnedFd, OwnedFd), DeviceError> {
    if size == 0 || size > MAX_SIZE {
        return Err(DeviceError::Size(size));
    }
    let parts = Parts::create(size.next_multiple_of(PAGE_SIZE as u64), serving)?;
    let (to_client, to_server) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(failed("socketpair"))?;
    Ok((parts, to_client, to_server))
}

/// The pipe that requests go through: its descriptor is the server half's.
#[derive(Debug)]
pub struct Requests {
    read_end: OwnedFd,
    write_end: OwnedFd,
}

impl Requests {
    /// One with room for as many: see [`DeviceOptions::max_requests`].
    pub fn new(max_requests: u32) -> Result<Self, DeviceError> {
        let (read_end, write_end) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(failed("pipe"))?;
        let room = max_requests.max(1) as usize * size_of::<u64>();
        rustix::pipe::fcntl_setpipe_size(&write_end, room).map_err(failed("fcntl(F_SETPIPE_SZ)"))?;
        // This end's own flag; at the server's a read may wait.
        rustix::fs::fcntl_setfl(&write_end, OFlags::NONBLOCK).map_err(failed("fcntl(F_SETFL)"))?;
        Ok(Self { read_end, write_end })
    }
}

impl AsFd for Requests {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.read_end.as_fd()
    }
}

/// A file in memory of this length, which nobody can change.
fn sealed_memfd(name: &str, size: u64) -> Result<OwnedFd, DeviceError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memfd = rustix::fs::memfd_create(name, flags).map_err(failed("memfd_create"))?;
    rustix::fs::ftruncate(&memfd, size).map_err(failed("ftruncate"))?;
    // A file that cannot become shorter is a mapping that cannot raise SIGBUS.
    rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW)
        .map_err(failed("fcntl(F_ADD_SEALS)"))?;
    Ok(memfd)
}

/// The state of no page is known yet.
fn new_states(pages: u64) -> Result<(PageStates, OwnedFd), DeviceError> {
    PageStates::new_shared(pages, 1).map_err(failed("memfd_create"))
}
