//! What all who have a part of a device share: four files in memory.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use rustix::fs::{FallocateFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use super::gate::Gate;
use super::{DeviceError, Serving, failed, new_states, sealed_memfd};
use crate::states::{Arrival, PageState, PageStates};
use crate::units::{PAGE_SIZE, PageIndex, PageRange};

const MAGIC: u64 = u64::from_le_bytes(*b"umemdev\0");
const VERSION: u32 = 2;

/// Pages copied or installed at a time.
pub(super) const STEP: u64 = 64;

/// The map of served pages begins on the second page.
const SERVED_OFFSET: usize = PAGE_SIZE;

/// The first page of the control file. What is not atomic never changes.
#[repr(C)]
pub(super) struct Header {
    magic: u64,
    version: u32,
    in_place: u32,
    size: u64,
    /// 0: no; else the process that maps it, or did.
    pub(super) mapped: AtomicU32,
    /// Somebody had to be left waiting who is not in the pipe.
    pub(super) overflowed: AtomicU32,
    /// What became of making it anonymous: see [`Release`].
    pub(super) release: AtomicU32,
    pub(super) gate: Gate,
}

const _: () = assert!(size_of::<Header>() <= SERVED_OFFSET);

/// Values of [`Header::release`].
pub(super) struct Release;

impl Release {
    /// Not asked for, or not answered.
    pub(super) const NONE: u32 = 0;
    /// The memory is ordinary.
    pub(super) const DONE: u32 = 1;
    /// It cannot be yet.
    pub(super) const REFUSED: u32 = 2;
}

/// A shared mapping of a file.
#[derive(Debug)]
pub(super) struct Shared {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: memory that any thread may use, unmapped when the owner goes.
unsafe impl Send for Shared {}
// SAFETY: the same; what is read and written in it is atomic, or a page of which the server says who has it.
unsafe impl Sync for Shared {}

impl Shared {
    pub(super) fn new(file: BorrowedFd<'_>, length: usize) -> Result<Self, DeviceError> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                length,
                protection,
                MapFlags::SHARED,
                file,
                0,
            )
        }
        .map_err(failed("mmap"))?;
        let start = NonNull::new(start.cast())
            .ok_or(Errno::NOMEM)
            .map_err(failed("mmap"))?;
        Ok(Self { start, length })
    }

    pub(super) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// What is at that byte, which is aligned for it.
    fn at<T>(&self, offset: usize) -> *mut T {
        self.start().wrapping_add(offset).cast()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nobody borrows from it any more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// The files of a device, mapped as far as need be.
#[derive(Debug)]
pub(super) struct Parts {
    control: Shared,
    pub(super) states: Arc<PageStates>,
    pub(super) pages: u64,
    pub(super) serving: Serving,
    /// The control file, the page states, the window, the stash.
    files: [OwnedFd; Self::FILES],
}

impl Parts {
    pub(super) const FILES: usize = 4;

    pub(super) fn create(size: u64, serving: Serving) -> Result<Arc<Self>, DeviceError> {
        let pages = size / PAGE_SIZE as u64;
        let control_length = control_length(pages);
        let control_file = sealed_memfd("umem-control", control_length as u64)?;
        let (states, table) = new_states(pages)?;
        let window = sealed_memfd("umem-window", size)?;
        let stash = sealed_memfd("umem-stash", size)?;
        let control = Shared::new(control_file.as_fd(), control_length)?;
        let header = Header {
            magic: MAGIC,
            version: VERSION,
            in_place: u32::from(serving == Serving::InPlace),
            size,
            mapped: AtomicU32::new(0),
            overflowed: AtomicU32::new(0),
            release: AtomicU32::new(Release::NONE),
            gate: Gate::new(),
        };
        // SAFETY: a page of this process' own, which nobody else has seen.
        unsafe { control.at::<Header>(0).write(header) };
        Ok(Arc::new(Self {
            control,
            states: Arc::new(states),
            pages,
            serving,
            files: [control_file, table, window, stash],
        }))
    }

    /// Those that another process made.
    pub(super) fn from_files(files: [OwnedFd; Self::FILES]) -> Result<Arc<Self>, DeviceError> {
        let not = DeviceError::NotADevice;
        let [control_file, table, window, stash] = &files;
        let length = |file: &OwnedFd| {
            let sealed =
                rustix::fs::fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
            let stat = rustix::fs::fstat(file).ok().filter(|_| sealed);
            stat.map(|stat| stat.st_size as u64)
                .ok_or(not("a file that can become shorter"))
        };
        let control_length = length(control_file)?;
        let size = length(window)?;
        let pages = size / PAGE_SIZE as u64;
        let wrong_size = size == 0 || !size.is_multiple_of(PAGE_SIZE as u64) || length(stash)? != size;
        if wrong_size || control_length != self::control_length(pages) as u64 {
            return Err(not("files whose lengths do not fit"));
        }
        let states = PageStates::from_shared(table.as_fd(), pages, 1)
            .map_err(|_| not("page states that do not fit"))?;
        let control = Shared::new(control_file.as_fd(), control_length as usize)?;
        // SAFETY: mapped, long enough, and of numbers alone.
        let header = unsafe { &*control.at::<Header>(0) };
        if (header.magic, header.version, header.size) != (MAGIC, VERSION, size) {
            return Err(not("it is of another version"));
        }
        let serving = if header.in_place == 0 {
            Serving::Copied
        } else {
            Serving::InPlace
        };
        Ok(Arc::new(Self {
            control,
            states: Arc::new(states),
            pages,
            serving,
            files,
        }))
    }

    pub(super) fn header(&self) -> &Header {
        // SAFETY: mapped for as long as `self`; what changes in it is atomic.
        unsafe { &*self.control.at::<Header>(0) }
    }

    pub(super) fn files(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.files.iter().map(AsFd::as_fd)
    }

    pub(super) fn window(&self) -> BorrowedFd<'_> {
        self.files[2].as_fd()
    }

    fn stash(&self) -> BorrowedFd<'_> {
        self.files[3].as_fd()
    }

    pub(super) fn all(&self) -> PageRange {
        PageRange::new(PageIndex(0), self.pages)
    }

    /// The words of the map of served pages.
    fn served(&self) -> &[AtomicU64] {
        let words = self.pages.div_ceil(64) as usize;
        // SAFETY: `control_length` says that there are as many, aligned to a page; they are used by atomics alone.
        unsafe { std::slice::from_raw_parts(self.control.at(SERVED_OFFSET), words) }
    }

    /// Whether a page was served that the server could not install itself.
    pub(super) fn is_served(&self, page: PageIndex) -> bool {
        self.served()[(page.0 / 64) as usize].load(SeqCst) >> (page.0 % 64) & 1 == 1
    }

    fn set_served(&self, page: PageIndex) {
        self.served()[(page.0 / 64) as usize].fetch_or(1 << (page.0 % 64), SeqCst);
    }

    /// Those among `within` that were served and are not in the memory.
    pub(super) fn waiting(&self, within: PageRange) -> Option<PageRange> {
        let mut rest = within;
        while rest.count > 0 {
            let word = self.served()[(rest.start.0 / 64) as usize].load(SeqCst) >> (rest.start.0 % 64);
            if word == 0 {
                let next = (rest.start.0 / 64 + 1) * 64;
                rest = rest.from(PageIndex(next));
                continue;
            }
            rest = rest.from(rest.start.advance(u64::from(word.trailing_zeros())));
            if rest.count > 0 && !self.states.is_settled(rest.start) {
                let ready = |page: &PageIndex| self.is_served(*page) && !self.states.is_settled(*page);
                let count = rest.pages().take(STEP as usize).take_while(ready).count().max(1);
                return Some(PageRange::new(rest.start, count as u64));
            }
            rest = rest.from(rest.start.advance(1));
        }
        None
    }

    /// Marks pages that the server gives up its rights to.
    pub(super) fn hand_over(&self, pages: PageRange) {
        pages.pages().for_each(|page| self.set_served(page));
    }

    /// Keeps the content of `pages` (`None`: as it is in the window), of those that are wanted and not kept, until it can be installed.
    pub(super) fn keep(&self, pages: PageRange, content: Option<&[u8]>) -> Result<(), DeviceError> {
        if self.serving == Serving::InPlace {
            self.hand_over(pages);
            return Ok(());
        }
        let mut buffer = [0; PAGE_SIZE];
        for (at, page) in pages.pages().enumerate() {
            if self.is_served(page) || self.states.is_settled(page) {
                continue;
            }
            let bytes = if let Some(content) = content {
                &content[at * PAGE_SIZE..][..PAGE_SIZE]
            } else {
                self.read_window(PageRange::single(page), &mut buffer)?;
                &buffer
            };
            rustix::io::pwrite(self.stash(), bytes, page.byte_offset()).map_err(failed("pwrite"))?;
            self.set_served(page);
        }
        Ok(())
    }

    /// What the window has of `pages`; a hole reads zero.
    pub(super) fn read_window(&self, pages: PageRange, buffer: &mut [u8]) -> Result<(), DeviceError> {
        read_whole(self.window(), pages, buffer)
    }

    /// What was kept of `pages`.
    pub(super) fn read_stash(&self, pages: PageRange, buffer: &mut [u8]) -> Result<(), DeviceError> {
        read_whole(self.stash(), pages, buffer)
    }

    /// What was kept of `pages` is in the memory now.
    pub(super) fn drop_kept(&self, pages: PageRange) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // It costs memory, and nothing else, where that fails.
        let _ = rustix::fs::fallocate(
            self.stash(),
            flags,
            pages.start.byte_offset(),
            pages.bytes() as u64,
        );
    }

    /// Takes the first pages off `rest` that are still wanted, [`STEP`] of them at most, and claims them for the caller, who installs
    /// them. Whoever else does so at the same time finds them there.
    pub(super) fn claim_next(&self, rest: &mut PageRange) -> Option<(PageRange, Arrival)> {
        let mut step: Option<(PageRange, Arrival)> = None;
        while rest.count > 0 {
            let page = PageRange::single(rest.start);
            let arrival = match self.states.get(rest.start) {
                PageState::Absent => Some(Arrival::Prefetched),
                PageState::InFlight => Some(Arrival::Demand),
                PageState::Present | PageState::Removed => None,
            };
            match (&mut step, arrival) {
                (None, None) => {}
                (None, Some(arrival)) => step = Some((page, arrival)),
                (Some((run, same)), Some(arrival)) if arrival == *same && run.count < STEP => run.count += 1,
                _ => break,
            }
            if arrival.is_some() {
                self.states.claim(page);
            }
            *rest = rest.from(page.end());
        }
        step
    }
}

fn control_length(pages: u64) -> usize {
    SERVED_OFFSET + (pages.div_ceil(64) as usize * 8).next_multiple_of(PAGE_SIZE)
}

fn read_whole(file: BorrowedFd<'_>, pages: PageRange, buffer: &mut [u8]) -> Result<(), DeviceError> {
    let buffer = &mut buffer[..pages.bytes()];
    let mut done = 0;
    while done < buffer.len() {
        match rustix::io::pread(file, &mut buffer[done..], pages.start.byte_offset() + done as u64) {
            Ok(0) => return Err(failed("pread")(Errno::IO)),
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(failed("pread")(errno)),
        }
    }
    Ok(())
}
