//! The half that maps.

use std::ffi::c_int;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicI32, Ordering::SeqCst};
use std::sync::{Arc, Once};

use super::descriptors::{HALF, Mail, receive_half, send_half};
use super::install::{By, Installer, Way};
use super::keeper::Keeper;
use super::shared::Parts;
use super::source::DeviceSource;
use super::{DeviceError, Serving, failed};
use crate::pager::{Fill, Memory, Pager, RegisteredStripe, StartError};
use crate::region::PageSize;
use crate::uffd::{Features, RegisterMode, Userfaultfd};
use crate::units::{HostAddress, PAGE_SIZE, PageIndex, PageRange};

/// What this half is called in a message.
const KIND: u8 = b'C';

/// What a caller of mmap may say of where it wants memory; the rest is as the device has it.
const PLACING: c_int = libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE | libc::MAP_32BIT;

/// Where the memory is to be, and which part of the device.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// The first page.
    pub first: PageIndex,
    /// Bytes; rounded up to whole pages.
    pub length: usize,
    /// Where it is to be, or null.
    pub address: *mut u8,
    /// PROT_ flags.
    pub protection: c_int,
    /// MAP_ flags, of which those that say more of the address are taken.
    pub flags: c_int,
}

/// The half of a device that is mapped, once.
#[derive(Debug)]
pub struct Client {
    parts: Arc<Parts>,
    /// The pipe's end that is written.
    requests: OwnedFd,
    to_server: OwnedFd,
}

impl Client {
    pub(super) fn new(parts: Arc<Parts>, requests: OwnedFd, to_server: OwnedFd) -> Self {
        Self {
            parts,
            requests,
            to_server,
        }
    }

    /// Sends this half to who receives it at the other end of a Unix socket. What stays here should be dropped: a server
    /// sees that there is no client any more when nobody has this half.
    pub fn send(&self, socket: impl AsFd) -> Result<(), DeviceError> {
        let mut descriptors = [self.requests.as_fd(); HALF];
        descriptors[1] = self.to_server.as_fd();
        for (descriptor, file) in descriptors[2..].iter_mut().zip(self.parts.files()) {
            *descriptor = file;
        }
        send_half(socket.as_fd(), KIND, &descriptors)
    }

    /// Waits for a half that was [sent](Self::send).
    pub fn receive(socket: impl AsFd) -> Result<Self, DeviceError> {
        let [requests, to_server, files @ ..] = receive_half(socket.as_fd(), KIND)?;
        Ok(Self::new(Parts::from_files(files)?, requests, to_server))
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.parts.pages * PAGE_SIZE as u64
    }

    /// All of it, anywhere, to be read and written.
    pub fn everything(&self) -> Place {
        Place {
            first: PageIndex(0),
            length: self.size() as usize,
            address: std::ptr::null_mut(),
            protection: libc::PROT_READ | libc::PROT_WRITE,
            flags: 0,
        }
    }

    /// Maps the memory. Once and for all: not even when it was unmapped can it be mapped again.
    pub fn map(&self, place: Place) -> Result<Mapping, DeviceError> {
        let mapped = &self.parts.header().mapped;
        if mapped.load(SeqCst) != 0 {
            return Err(DeviceError::Mapped);
        }
        let pages = (place.length as u64).div_ceil(PAGE_SIZE as u64);
        let left = self.parts.pages.checked_sub(place.first.0);
        if pages == 0 || left.is_none_or(|left| pages > left) {
            return Err(DeviceError::BeyondEnd {
                page: PageIndex(place.first.0.saturating_add(pages.saturating_sub(1))),
                pages: self.parts.pages,
            });
        }
        let pages = PageRange::new(place.first, pages);
        // From here on this process is it, unless it fails.
        if mapped
            .compare_exchange(0, std::process::id(), SeqCst, SeqCst)
            .is_err()
        {
            return Err(DeviceError::Mapped);
        }
        let memory = OwnMemory::map(&self.parts, pages, &place).inspect_err(|_| mapped.store(0, SeqCst))?;
        self.serve(memory, pages).inspect_err(|_| mapped.store(0, SeqCst))
    }

    /// Starts the pager of mapped memory, tells the servers, and installs what was served before.
    fn serve(&self, memory: OwnMemory, pages: PageRange) -> Result<Mapping, DeviceError> {
        let (parts, start) = (&self.parts, memory.address());
        let there = Userfaultfd::probe()?;
        let (needed, mode) = match parts.serving {
            Serving::Copied => (Features::none(), RegisterMode::Missing),
            Serving::InPlace => (
                Features::MISSING_SHMEM.and(Features::MINOR_SHMEM),
                RegisterMode::MissingAndMinor,
            ),
        };
        let events = Features::EVENT_REMOVE
            .and(Features::EVENT_UNMAP)
            .and(Features::EVENT_REMAP);
        let wanted = Features::MOVE.and(Features::POISON).common(there);
        let uffd = Userfaultfd::open(needed.and(events).and(wanted))?;
        let addresses = start..HostAddress(start.0 + pages.bytes() as u64);
        uffd.register(addresses, mode).map_err(StartError::Register)?;
        memory.open()?;
        // What is not mapped will never be there.
        let before = PageRange::new(PageIndex(0), pages.start.0);
        for outside in [before, parts.all().from(pages.end())] {
            parts.states.remove(outside);
        }
        let duplicate = failed("fcntl(F_DUPFD)");
        let installer = Installer {
            uffd: uffd.duplicate().map_err(&duplicate)?,
            pages,
            start,
        };
        let requests = self.requests.try_clone().map_err(&duplicate)?;
        let to_server = self.to_server.try_clone().map_err(&duplicate)?;
        let slot = Inherited::note(requests.as_raw_fd());
        let source = Arc::new(DeviceSource::new(Arc::clone(parts), requests));
        let keeper = without_signals(|| {
            let (keeper, observer) = Keeper::prepare(Arc::clone(parts), Arc::clone(&source), to_server)?;
            let stripe = RegisteredStripe { uffd, pages, start };
            let memory = Memory {
                stripes: vec![stripe],
                page_size: PageSize::Small,
                states: Arc::clone(&parts.states),
            };
            let pager = Pager::take_over(memory, source, Fill::Off, observer)?;
            keeper.start(pager, slot)
        })?;
        let mail = Mail {
            start,
            pages,
            can_move: wanted.has(Features::MOVE),
        };
        mail.send(&self.to_server, installer.uffd.as_fd())?;
        // What is kept from now on finds the mail, and is installed by who keeps it.
        install_kept(parts, &installer, pages)?;
        Ok(Mapping {
            memory,
            keeper,
            process: std::process::id(),
        })
    }
}

/// Installs what was served before there was a mapping.
fn install_kept(parts: &Parts, installer: &Installer, pages: PageRange) -> Result<(), DeviceError> {
    let mut buffer = Vec::new();
    let mut rest = pages;
    while let Some(run) = parts.waiting(rest) {
        rest = rest.from(run.end());
        let mut left = run;
        while let Some((step, arrival)) = parts.claim_next(&mut left) {
            let way = match parts.serving {
                Serving::InPlace => Way::Continue,
                Serving::Copied => {
                    buffer.resize(step.bytes(), 0);
                    parts.read_stash(step, &mut buffer)?;
                    Way::Copy(&buffer)
                }
            };
            installer
                .install(&By::Client, &parts.states, step, arrival, way)
                .map_err(DeviceError::Install)?;
        }
        parts.drop_kept(run);
    }
    Ok(())
}

/// Mapped memory whose pages are served. Dropping it unmaps it.
#[derive(Debug)]
pub struct Mapping {
    memory: OwnMemory,
    keeper: Keeper,
    process: u32,
}

impl Mapping {
    /// Its first byte.
    pub fn start(&self) -> *mut u8 {
        self.memory.start.as_ptr()
    }

    /// Bytes, a multiple of the page size.
    pub fn length(&self) -> usize {
        self.memory.length
    }

    /// Whether it is ordinary memory by now.
    pub fn is_ordinary(&self) -> bool {
        self.keeper.is_released()
    }

    /// Leaves it to the caller to unmap it, as with memory from mmap.
    pub fn into_raw(self) -> *mut u8 {
        let start = self.start();
        let mut this = ManuallyDrop::new(self);
        // SAFETY: not used again. The keeper's thread goes on without it, and keeps what it needs.
        unsafe { std::ptr::drop_in_place(&raw mut this.keeper) };
        start
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.process != std::process::id() {
            // A child of the process that mapped it, in which there is neither memory nor thread.
            self.memory.length = 0;
            self.keeper.forget();
            return;
        }
        // As long as somebody reads that it goes away.
        self.memory.unmap();
        self.keeper.end();
    }
}

/// A mapping, until it is unmapped.
#[derive(Debug)]
struct OwnMemory {
    start: NonNull<u8>,
    length: usize,
    protection: c_int,
}

// SAFETY: memory, which any thread may use.
unsafe impl Send for OwnMemory {}
// SAFETY: the same.
unsafe impl Sync for OwnMemory {}

impl OwnMemory {
    /// Maps what is behind `pages`, for now such that nobody can touch it: not even a process all of whose memory is locked, which
    /// otherwise would be given its pages now and never ask for them.
    fn map(parts: &Parts, pages: PageRange, place: &Place) -> Result<Self, DeviceError> {
        let (flags, file, offset) = match parts.serving {
            Serving::Copied => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0),
            Serving::InPlace => {
                let offset = pages.start.byte_offset() as i64;
                (libc::MAP_SHARED, parts.window().as_raw_fd(), offset)
            }
        };
        let flags = flags | libc::MAP_NORESERVE | place.flags & PLACING;
        let length = pages.bytes();
        // SAFETY: the caller says where, as with mmap; where it does not, it is an address of the kernel's choice.
        let start = unsafe { libc::mmap(place.address.cast(), length, libc::PROT_NONE, flags, file, offset) };
        let start = NonNull::new(start.cast::<u8>())
            .filter(|start| start.as_ptr().cast() != libc::MAP_FAILED)
            .ok_or_else(io::Error::last_os_error)
            .map_err(failed("mmap"))?;
        let memory = Self {
            start,
            length,
            protection: place.protection,
        };
        // SAFETY: this process' own new memory, of which this changes neither content nor place.
        unsafe {
            libc::munlock(start.as_ptr().cast(), length);
            // A child would have it without its pager.
            if libc::madvise(start.as_ptr().cast(), length, libc::MADV_DONTFORK) != 0 {
                return Err(failed("madvise")(io::Error::last_os_error()));
            }
        }
        Ok(memory)
    }

    /// Lets it be touched, as was asked for.
    fn open(&self) -> Result<(), DeviceError> {
        // SAFETY: as above.
        if unsafe { libc::mprotect(self.start.as_ptr().cast(), self.length, self.protection) } != 0 {
            return Err(failed("mprotect")(io::Error::last_os_error()));
        }
        Ok(())
    }

    fn address(&self) -> HostAddress {
        HostAddress(self.start.as_ptr() as u64)
    }

    fn unmap(&mut self) {
        if self.length > 0 {
            // SAFETY: mapped by `map`; who uses it has borrowed from its owner.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
            self.length = 0;
        }
    }
}

impl Drop for OwnMemory {
    fn drop(&mut self) {
        self.unmap();
    }
}

/// Starts threads that take none of the program's signals.
fn without_signals<T>(start: impl FnOnce() -> T) -> T {
    let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: both sets are written before they are read.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
        let started = start();
        libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut());
        started
    }
}

/// The ends of pipes that a child of the process with the memory must not keep: a server sees the end of the client when nobody has
/// one any more. They are noted where a child can look them up without a lock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Inherited(Option<&'static AtomicI32>);

const NONE: RawFd = -1;
static ENDS: [AtomicI32; 256] = [const { AtomicI32::new(NONE) }; 256];
static AT_FORK: Once = Once::new();

impl Inherited {
    /// Beyond so many, those of a child are closed when it executes another program.
    fn note(descriptor: RawFd) -> Self {
        // SAFETY: the handler does nothing but close descriptors.
        AT_FORK.call_once(|| unsafe {
            libc::pthread_atfork(None, None, Some(close_in_child));
        });
        let free = |slot: &&AtomicI32| slot.compare_exchange(NONE, descriptor, SeqCst, SeqCst).is_ok();
        Self(ENDS.iter().find(free))
    }

    /// Before it is closed.
    pub(super) fn forget(self) {
        if let Some(slot) = self.0 {
            slot.store(NONE, SeqCst);
        }
    }
}

extern "C" fn close_in_child() {
    for slot in &ENDS {
        let descriptor = slot.swap(NONE, SeqCst);
        if descriptor != NONE {
            // SAFETY: whose owner was the thread that is not in the child. By the system call, which no library replaces.
            unsafe { libc::syscall(libc::SYS_close, descriptor) };
        }
    }
}
