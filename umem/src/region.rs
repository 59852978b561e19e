//! A region: memory of this process that begins without a single page.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};

use linux_raw_sys::general as sys;
use rustix::fs::{MemfdFlags, SealFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::uffd::{Features, RegisterMode};
use crate::units::{HUGE_PAGE_SIZE, HostAddress, PAGE_SIZE, PageIndex, PageRange};

/// What is behind a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A memfd, which other processes can be given.
    Memfd,
    /// Private anonymous memory.
    Anonymous,
}

/// In which size a region's memory is installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// 4 KiB.
    Small,
    /// 2 MiB, from the host's reserve of huge pages.
    Huge,
}

impl PageSize {
    /// In bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Small => PAGE_SIZE as u64,
            Self::Huge => HUGE_PAGE_SIZE as u64,
        }
    }

    /// In pages of 4 KiB.
    pub const fn pages(self) -> u64 {
        self.bytes() / PAGE_SIZE as u64
    }
}

/// Why there is no region.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// The size is zero or not a multiple of the page size.
    #[error("a region of {size} bytes cannot be: its size must be a multiple of {unit} and not 0")]
    Size {
        /// Bytes asked for.
        size: u64,
        /// The page size in bytes.
        unit: u64,
    },
    /// The process has no address space for it.
    #[error("a region of {size} bytes does not fit into this process's address space")]
    TooLarge {
        /// Bytes asked for.
        size: u64,
    },
    /// The host has not enough huge pages in reserve.
    #[error(
        "this host has no {count} free huge pages of 2 MiB: reserve them with 'sysctl -w vm.nr_hugepages={count}'"
    )]
    NoHugePages {
        /// Huge pages needed.
        count: u64,
    },
    /// A system call failed.
    #[error("cannot make a region of {size} bytes: {call}")]
    Os {
        /// Bytes asked for.
        size: u64,
        /// The call.
        call: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Memory of this process, page by page without content until somebody installs it.
#[derive(Debug)]
pub struct Region {
    start: *mut u8,
    size: usize,
    page_size: PageSize,
    memfd: Option<OwnedFd>,
    /// Held alone while pages are collapsed, and shared by who asks the file where it has data: before Linux 6.4 a huge page that is
    /// being put together is said to be a hole, and what is in it would be taken for zero.
    collapsing: RwLock<()>,
    /// Who does not want that now.
    put_off: AtomicUsize,
}

/// See [`Region::put_off_collapse`].
#[derive(Debug)]
pub struct CollapsePutOff(Arc<Region>);

impl Drop for CollapsePutOff {
    fn drop(&mut self) {
        self.0.put_off.fetch_sub(1, Relaxed);
    }
}

// SAFETY: the region is memory, which any thread may use; it is unmapped when the last owner lets go of it.
unsafe impl Send for Region {}
// SAFETY: nothing in it changes after it was made, but for what has a lock of its own.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `size` bytes, of which none is populated.
    pub fn new(size: u64, backing: Backing, page_size: PageSize) -> Result<Self, RegionError> {
        if size == 0 || !size.is_multiple_of(page_size.bytes()) {
            return Err(RegionError::Size {
                size,
                unit: page_size.bytes(),
            });
        }
        // The largest size that neither the file's offsets nor the mapping can express is far above any address space.
        let length = usize::try_from(size)
            .ok()
            .filter(|length| i64::try_from(*length).is_ok())
            .ok_or(RegionError::TooLarge { size })?;
        let fail = |call| {
            move |errno: Errno| match (errno, page_size) {
                (Errno::NOMEM, PageSize::Huge) => RegionError::NoHugePages {
                    count: size / PageSize::Huge.bytes(),
                },
                (Errno::NOMEM | Errno::FBIG | Errno::OVERFLOW, _) => RegionError::TooLarge { size },
                _ => RegionError::Os {
                    size,
                    call,
                    source: errno.into(),
                },
            }
        };
        // Of small pages none is set aside in advance; of huge ones all, so that a lack shows now and not as a SIGBUS.
        let (map_flags, memfd_flags) = match page_size {
            PageSize::Small => (MapFlags::NORESERVE, MemfdFlags::empty()),
            PageSize::Huge => (
                MapFlags::HUGETLB | MapFlags::HUGE_2MB,
                MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
            ),
        };
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let address = Reservation::aligned(length).map_err(fail("mmap"))?;
        let (start, memfd) = match backing {
            Backing::Anonymous => {
                let flags = MapFlags::PRIVATE | MapFlags::FIXED | map_flags;
                // SAFETY: replaces nothing but the reservation.
                let start = unsafe { rustix::mm::mmap_anonymous(address.start, length, protection, flags) };
                (start.map_err(fail("mmap"))?, None)
            }
            Backing::Memfd => {
                let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | memfd_flags;
                let memfd = rustix::fs::memfd_create("umem", flags).map_err(fail("memfd_create"))?;
                rustix::fs::ftruncate(&memfd, size).map_err(fail("ftruncate"))?;
                // A file that cannot become shorter is a mapping that cannot raise SIGBUS.
                rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW)
                    .map_err(fail("fcntl(F_ADD_SEALS)"))?;
                let huge = MapFlags::HUGETLB | MapFlags::HUGE_2MB;
                let flags = MapFlags::SHARED | MapFlags::FIXED | map_flags.difference(huge);
                // SAFETY: replaces nothing but the reservation.
                let start = unsafe { rustix::mm::mmap(address.start, length, protection, flags, &memfd, 0) };
                (start.map_err(fail("mmap"))?, Some(memfd))
            }
        };
        address.release_rest();
        let region = Self {
            start: start.cast(),
            size: length,
            page_size,
            memfd,
            collapsing: RwLock::new(()),
            put_off: AtomicUsize::new(0),
        };
        // A child would have the mapping without the userfaultfd, and so zero pages; a core dump would fetch every page.
        for advice in [Advice::LinuxDontFork, Advice::LinuxDontDump] {
            // SAFETY: neither changes what the memory holds.
            unsafe { rustix::mm::madvise(start, length, advice) }.map_err(fail("madvise"))?;
        }
        Ok(region)
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size as u64
    }

    /// Size in pages.
    pub fn pages(&self) -> u64 {
        self.size() / PAGE_SIZE as u64
    }

    /// In which size its memory is installed.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// Its first byte.
    pub fn start(&self) -> *mut u8 {
        self.start
    }

    /// The memfd behind it, if there is one.
    pub fn memfd(&self) -> Option<BorrowedFd<'_>> {
        self.memfd.as_ref().map(AsFd::as_fd)
    }

    /// The addresses of `pages`.
    pub fn addresses(&self, pages: PageRange) -> Range<HostAddress> {
        let start = self.start as u64 + pages.start.byte_offset();
        HostAddress(start)..HostAddress(start + pages.bytes() as u64)
    }

    /// The addresses of all of it.
    pub fn all_addresses(&self) -> Range<HostAddress> {
        self.addresses(PageRange::new(PageIndex(0), self.pages()))
    }

    /// The features that a userfaultfd needs to serve it, and how it is registered.
    pub fn registration(&self) -> (Features, RegisterMode) {
        let small = self.page_size == PageSize::Small;
        match (&self.memfd, small) {
            (None, true) => (Features::none(), RegisterMode::Missing),
            (None, false) => (Features::MISSING_HUGETLBFS, RegisterMode::Missing),
            (Some(_), true) => (
                Features::MISSING_SHMEM.and(Features::MINOR_SHMEM),
                RegisterMode::MissingAndMinor,
            ),
            (Some(_), false) => (
                Features::MISSING_HUGETLBFS.and(Features::MINOR_HUGETLBFS),
                RegisterMode::MissingAndMinor,
            ),
        }
    }

    /// How many pages of it the kernel holds in memory, by the kernel's own count.
    pub fn populated(&self) -> io::Result<u64> {
        match &self.memfd {
            // Blocks of 512 bytes.
            Some(memfd) => Ok(rustix::fs::fstat(memfd)?.st_blocks as u64 * 512 / PAGE_SIZE as u64),
            None => self.populated_by_scan().or_else(|_| self.populated_by_pagemap()),
        }
    }

    /// By PAGEMAP_SCAN (Linux 6.7), which skips what has no page table.
    fn populated_by_scan(&self) -> io::Result<u64> {
        let pagemap = File::open("/proc/self/pagemap")?;
        let Range { start, end } = self.all_addresses();
        let mut found = [NO_REGION; 64];
        let mut at = start.0;
        let mut pages = 0;
        while at < end.0 {
            let (count, walked) = scan(&pagemap, at..end.0, &mut found)?;
            pages += found[..count]
                .iter()
                .map(|run| (run.end - run.start) / PAGE_SIZE as u64)
                .sum::<u64>();
            at = walked;
        }
        Ok(pages)
    }

    /// By reading the page map entry by entry.
    fn populated_by_pagemap(&self) -> io::Result<u64> {
        const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
        let pagemap = File::open("/proc/self/pagemap")?;
        let mut bytes = vec![0; 1 << 20];
        let mut offset = self.start as u64 / PAGE_SIZE as u64 * 8;
        let end = offset + self.pages() * 8;
        let mut pages = 0;
        while offset < end {
            let length = (end - offset).min(bytes.len() as u64) as usize;
            pagemap.read_exact_at(&mut bytes[..length], offset)?;
            let (entries, _) = bytes[..length].as_chunks::<8>();
            pages += entries
                .iter()
                .filter(|entry| u64::from_le_bytes(**entry) & PRESENT_OR_SWAPPED != 0)
                .count() as u64;
            offset += length as u64;
        }
        Ok(pages)
    }

    /// The first run of pages in `within` that the kernel holds in memory, or may hold. What comes before it reads zero, unless it
    /// is still to be loaded.
    ///
    /// It is looked for to its end, also where that is far behind `within`: who goes through a region in small steps asks for the
    /// [first page](Self::first_populated).
    pub fn next_populated(&self, within: PageRange) -> io::Result<Option<PageRange>> {
        let run = match &self.memfd {
            Some(memfd) => self.next_data(memfd, within)?,
            // Where the kernel does not say, all may be there.
            None => self.next_mapped(within).unwrap_or(Some(within)),
        };
        Ok(run
            .map(|run| run.from(within.start).clamp_to(within.end()))
            .filter(|run| run.count > 0))
    }

    /// The first page of `within` that the kernel holds in memory, or may hold.
    pub fn first_populated(&self, within: PageRange) -> io::Result<Option<PageIndex>> {
        let first = match &self.memfd {
            Some(memfd) => {
                let _whole = self.collapsing.read().unwrap_or_else(PoisonError::into_inner);
                seek_data(memfd, within.start)?
            }
            None => self.next_populated(within)?.map(|run| run.start),
        };
        // The page may be one of a large one that begins before.
        Ok(first
            .map(|first| first.max(within.start))
            .filter(|first| *first < within.end()))
    }

    fn next_data(&self, memfd: &OwnedFd, within: PageRange) -> io::Result<Option<PageRange>> {
        let _whole = self.collapsing.read().unwrap_or_else(PoisonError::into_inner);
        let Some(start) = seek_data(memfd, within.start)? else {
            return Ok(None);
        };
        let hole = rustix::fs::seek(memfd, SeekFrom::Hole(start.byte_offset()))?;
        Ok(Some(PageRange::new(
            start,
            hole.div_ceil(PAGE_SIZE as u64) - start.0,
        )))
    }

    fn next_mapped(&self, within: PageRange) -> io::Result<Option<PageRange>> {
        let pagemap = File::open("/proc/self/pagemap")?;
        let Range { start, end } = self.addresses(within);
        let mut found = [NO_REGION];
        let (count, _) = scan(&pagemap, start.0..end.0, &mut found)?;
        let page = |address: u64| PageIndex::containing(address - self.start as u64);
        let run = found[..count].first();
        Ok(run.map(|run| PageRange::new(page(run.start), page(run.end).0 - page(run.start).0)))
    }

    /// Whether a page is in memory, or swapped out of it, and so has content of its own.
    pub fn holds(&self, page: PageIndex) -> io::Result<bool> {
        // Of huge pages the file says nothing: hugetlbfs calls all of it data. Who installs one maps it too, which the page map tells.
        if let (Some(_), PageSize::Small) = (&self.memfd, self.page_size) {
            return Ok(self.first_populated(PageRange::single(page))?.is_some());
        }
        let address = self.addresses(PageRange::single(page)).start.0;
        let mut entry = [0; 8];
        // One entry a page; bits 62 and 63 say that it is swapped out or present (Linux Documentation/admin-guide/mm/pagemap.rst).
        File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, address / PAGE_SIZE as u64 * 8)?;
        Ok(u64::from_le_bytes(entry) >> 62 != 0)
    }

    /// Reads `pages` into `buffer`, which is as long: pages none of which is still to be loaded, and to which nobody writes
    /// meanwhile. Of a memfd nothing is populated by that.
    pub fn read(&self, pages: PageRange, buffer: &mut [u8]) -> io::Result<()> {
        let buffer = &mut buffer[..pages.bytes()];
        if let Some(memfd) = &self.memfd {
            let mut done = 0;
            while done < buffer.len() {
                let offset = pages.start.byte_offset() + done as u64;
                match rustix::io::pread(memfd, &mut buffer[done..], offset) {
                    Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(count) => done += count,
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
            return Ok(());
        }
        let start = self.addresses(pages).start.0 as *const u8;
        assert!(pages.end().0 <= self.pages(), "{pages} are not in the region");
        // SAFETY: the pages are of this region, which is mapped, and nobody writes to them; the buffer is as long.
        unsafe { std::ptr::copy_nonoverlapping(start, buffer.as_mut_ptr(), buffer.len()) };
        Ok(())
    }

    /// Writes `content`, which is as long as `pages`, to them: pages that nobody else uses meanwhile, of a region that is not served.
    pub fn write(&self, pages: PageRange, content: &[u8]) -> io::Result<()> {
        assert!(
            pages.end().0 <= self.pages() && content.len() == pages.bytes(),
            "{pages} are not in the region"
        );
        // The file takes whole pages as they are, which spares zeroing and mapping them. Of huge pages the kernel takes none so.
        if let (Some(memfd), PageSize::Small) = (&self.memfd, self.page_size) {
            let mut done = 0;
            while done < content.len() {
                match rustix::io::pwrite(memfd, &content[done..], pages.start.byte_offset() + done as u64) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(count) => done += count,
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
            return Ok(());
        }
        let start = self.addresses(pages).start.0 as *mut u8;
        // SAFETY: the pages are of this region, which is mapped, and nobody else uses them; the content is as long.
        unsafe { std::ptr::copy_nonoverlapping(content.as_ptr(), start, content.len()) };
        Ok(())
    }

    /// Takes the memory of `pages` away, whole units of a region that is not served: they read zero, or are loaded when it is.
    pub fn discard(&self, pages: PageRange) -> io::Result<()> {
        assert!(pages.end().0 <= self.pages(), "{pages} are not in the region");
        let start = self.addresses(pages).start.0 as *mut _;
        let advice = match &self.memfd {
            // The hole in the file takes it out of all mappings too.
            Some(_) => Advice::LinuxRemove,
            None => Advice::LinuxDontNeed,
        };
        // SAFETY: nobody uses these pages, so nobody minds that they read zero.
        Ok(unsafe { rustix::mm::madvise(start, pages.bytes(), advice) }?)
    }

    /// Whether all of `pages` have memory. Where the kernel does not say: no.
    pub(crate) fn is_populated(&self, pages: PageRange) -> bool {
        let start = self.addresses(pages).start.0 as *mut _;
        let mut resident = vec![0; pages.count as usize];
        // SAFETY: the pages are of the region; mincore(2) writes one byte for each into the vector.
        let result = unsafe { libc::mincore(start, pages.bytes(), resident.as_mut_ptr()) };
        result == 0 && resident.iter().all(|byte| byte & 1 == 1)
    }

    /// Asks the kernel to back `pages`, all populated and no longer registered, by huge pages again. Whether it does is its
    /// affair: nothing but speed depends on it. False: not now, because it is put off.
    pub fn collapse(&self, pages: PageRange) -> bool {
        if self.put_off.load(Relaxed) > 0 {
            return false;
        }
        let start = self.addresses(pages).start.0;
        let _alone = self.collapsing.write().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: MADV_COLLAPSE changes how memory is backed, not what it holds.
        if unsafe { libc::madvise(start as *mut _, pages.bytes(), libc::MADV_COLLAPSE) } != 0 {
            tracing::debug!(error = %io::Error::last_os_error(), %pages, "not backed by a huge page");
        }
        true
    }

    /// Lets no page be collapsed, but for one that may be just now, until what this returns is dropped: for work that would have
    /// to wait for it.
    pub fn put_off_collapse(self: &Arc<Self>) -> CollapsePutOff {
        self.put_off.fetch_add(1, Relaxed);
        CollapsePutOff(Arc::clone(self))
    }

    /// Gives the memory of `pages` back, which are whole units; they read zero from then on. While the region is served, this
    /// returns when the pager has noted it.
    pub fn remove(&self, pages: PageRange) -> io::Result<()> {
        if pages.end().0 > self.pages() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // Of a file the pages go from the file too, which they would otherwise be mapped from again.
        let advice = match self.memfd {
            Some(_) => Advice::LinuxRemove,
            None => Advice::LinuxDontNeed,
        };
        let start = self.addresses(pages).start.0 as *mut _;
        // SAFETY: the pages are of this region, in which no Rust object lives.
        Ok(unsafe { rustix::mm::madvise(start, pages.bytes(), advice) }?)
    }
}

/// Address space that begins at a multiple of 2 MiB, where huge pages can be, with what was left over to find it.
struct Reservation {
    mapped: *mut std::ffi::c_void,
    mapped_length: usize,
    start: *mut std::ffi::c_void,
    length: usize,
}

impl Reservation {
    fn aligned(length: usize) -> Result<Self, Errno> {
        let mapped_length = length.checked_add(HUGE_PAGE_SIZE).ok_or(Errno::NOMEM)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice, which nobody can use.
        let mapped = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), mapped_length, ProtFlags::empty(), flags)
        }?;
        let start = mapped.map_addr(|address| address.next_multiple_of(HUGE_PAGE_SIZE));
        Ok(Self {
            mapped,
            mapped_length,
            start,
            length,
        })
    }

    /// Keeps what is at the aligned address and gives back the rest.
    fn release_rest(self) {
        let before = self.start.addr() - self.mapped.addr();
        // SAFETY: both ends are of this reservation, and nothing else was mapped there.
        unsafe {
            if before > 0 {
                let _ = rustix::mm::munmap(self.mapped, before);
            }
            let _ = rustix::mm::munmap(
                self.start.byte_add(self.length),
                self.mapped_length - before - self.length,
            );
        }
        std::mem::forget(self);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: nothing of it was handed out.
        let _ = unsafe { rustix::mm::munmap(self.mapped, self.mapped_length) };
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new`, and who could use it holds a reference to this region.
        let _ = unsafe { rustix::mm::munmap(self.start.cast(), self.size) };
    }
}

const NO_REGION: sys::page_region = sys::page_region {
    start: 0,
    end: 0,
    categories: 0,
};

/// Finds runs of pages that are in memory or swapped out. Answers how many were found, and where the search ended.
fn scan(pagemap: &File, within: Range<u64>, found: &mut [sys::page_region]) -> io::Result<(usize, u64)> {
    let in_memory = u64::from(sys::PAGE_IS_PRESENT | sys::PAGE_IS_SWAPPED);
    let mut scan = sys::pm_scan_arg {
        size: size_of::<sys::pm_scan_arg>() as u64,
        flags: 0,
        start: within.start,
        end: within.end,
        walk_end: 0,
        vec: found.as_mut_ptr() as u64,
        vec_len: found.len() as u64,
        max_pages: 0,
        category_inverted: 0,
        category_mask: 0,
        category_anyof_mask: in_memory,
        return_mask: in_memory,
    };
    // SAFETY: PAGEMAP_SCAN takes this structure, and writes to `found` at most as many entries as it is told.
    let count = unsafe { rustix::ioctl::ioctl(pagemap, PagemapScan(&mut scan)) }?;
    Ok((count, scan.walk_end))
}

/// PAGEMAP_SCAN: takes its argument by pointer and answers how many entries it wrote.
struct PagemapScan<'a>(&'a mut sys::pm_scan_arg);

// SAFETY: the pointer is to the structure that the ioctl takes, and the result is a count.
unsafe impl rustix::ioctl::Ioctl for PagemapScan<'_> {
    type Output = usize;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> rustix::ioctl::Opcode {
        rustix::ioctl::opcode::read_write::<sys::pm_scan_arg>(b'f', 16)
    }

    fn as_ptr(&mut self) -> *mut rustix::ffi::c_void {
        std::ptr::from_mut(self.0).cast()
    }

    unsafe fn output_from_ptr(
        output: rustix::ioctl::IoctlOutput,
        _: *mut rustix::ffi::c_void,
    ) -> rustix::io::Result<usize> {
        Ok(output as usize)
    }
}

/// The first page from `from` on that a file has content of.
fn seek_data(memfd: &OwnedFd, from: PageIndex) -> io::Result<Option<PageIndex>> {
    match rustix::fs::seek(memfd, SeekFrom::Data(from.byte_offset())) {
        Ok(offset) => Ok(Some(PageIndex::containing(offset))),
        // None from here on.
        Err(Errno::NXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(region: &Region, page: u64) {
        // SAFETY: within the region.
        unsafe { region.start().add(page as usize * PAGE_SIZE).write_volatile(1) };
    }

    #[test]
    fn the_kernel_counts_what_is_populated() {
        for backing in [Backing::Memfd, Backing::Anonymous] {
            let region = Region::new(1024 * PAGE_SIZE as u64, backing, PageSize::Small).unwrap();
            // SAFETY: changes only how the region is backed.
            let _ =
                unsafe { rustix::mm::madvise(region.start().cast(), region.size, Advice::LinuxNoHugepage) };
            assert_eq!(region.populated().unwrap(), 0, "{backing:?}");
            for page in [0, 1, 2, 500, 502, 1023] {
                touch(&region, page);
            }
            assert_eq!(region.populated().unwrap(), 6, "{backing:?}");
        }
    }

    #[test]
    fn both_counts_of_anonymous_memory_agree() {
        let region = Region::new(4096 * PAGE_SIZE as u64, Backing::Anonymous, PageSize::Small).unwrap();
        // SAFETY: changes only how the region is backed.
        let _ = unsafe { rustix::mm::madvise(region.start().cast(), region.size, Advice::LinuxNoHugepage) };
        // More runs than one scan answers.
        (0..1000).for_each(|page| touch(&region, page * 4));
        assert_eq!(region.populated_by_pagemap().unwrap(), 1000);
        match region.populated_by_scan() {
            Ok(pages) => assert_eq!(pages, 1000),
            Err(error) => println!("skipped: PAGEMAP_SCAN: {error}"),
        }
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        let new = |size| Region::new(size, Backing::Memfd, PageSize::Small).unwrap_err();
        assert!(matches!(new(0), RegionError::Size { .. }));
        assert!(matches!(new(4097), RegionError::Size { .. }));
        assert!(matches!(new(1 << 62), RegionError::TooLarge { .. }));
        assert!(matches!(new(1 << 63), RegionError::TooLarge { .. }));
        let huge = Region::new(PAGE_SIZE as u64, Backing::Memfd, PageSize::Huge).unwrap_err();
        assert!(matches!(huge, RegionError::Size { unit: 0x20_0000, .. }));
    }

    #[test]
    fn of_huge_pages_too_it_is_known_which_are_there() {
        for backing in [Backing::Memfd, Backing::Anonymous] {
            let region = match Region::new(2 * HUGE_PAGE_SIZE as u64, backing, PageSize::Huge) {
                Ok(region) => region,
                Err(error) => {
                    println!("skipped: huge pages: {error}");
                    return;
                }
            };
            let unit = PageSize::Huge.pages();
            touch(&region, unit + 3);
            let holds = |page| region.holds(PageIndex(page)).unwrap();
            assert_eq!([0, 1, unit, 2 * unit - 1].map(holds), [false, false, true, true]);
        }
    }

    #[test]
    fn what_is_in_memory_is_found_and_read_and_nothing_else_is_made() {
        for backing in [Backing::Memfd, Backing::Anonymous] {
            let region = Region::new(64 << 20, backing, PageSize::Small).unwrap();
            // SAFETY: changes only how the region is backed.
            let _ =
                unsafe { rustix::mm::madvise(region.start().cast(), region.size, Advice::LinuxNoHugepage) };
            for page in [3, 4, 9000] {
                touch(&region, page);
            }
            let populated = region.populated().unwrap();
            let mut found = Vec::new();
            let mut rest = PageRange::new(PageIndex(4), region.pages() - 4);
            while let Some(run) = region.next_populated(rest).unwrap() {
                assert!(run.start >= rest.start && run.end() <= rest.end());
                found.extend(run.pages().map(|page| page.0));
                rest = rest.from(run.end());
            }
            // An old kernel does not say it of anonymous memory.
            let says = backing == Backing::Memfd || region.populated_by_scan().is_ok();
            assert!(!says || found == [4, 9000], "{backing:?}: {found:?}");
            let mut content = [0xff; 2 * PAGE_SIZE];
            region
                .read(PageRange::new(PageIndex(9000), 2), &mut content)
                .unwrap();
            assert_eq!(content[0], 1);
            assert!(content[1..].iter().all(|byte| *byte == 0));
            if backing == Backing::Memfd {
                assert_eq!(region.populated().unwrap(), populated);
            }
        }
    }
}
