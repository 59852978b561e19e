//! What the kernel takes for many pages at once, and for plain faults: nobody waits, nothing is looked up.

use std::time::{Duration, Instant};

use rustix::mm::{Advice, MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::{MeasureError, Waits, shuffled};
use crate::region::{Backing, PageSize, Region};
use crate::uffd::Userfaultfd;
use crate::units::{PAGE_SIZE, PageIndex, PageRange};

/// A way to populate memory that is registered with a userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// UFFDIO_COPY from a buffer that stays in the processor's cache.
    Copy,
    /// UFFDIO_CONTINUE of pages that are in the memfd.
    Continue,
    /// UFFDIO_ZEROPAGE.
    Zeropage,
}

impl Way {
    /// Its name, as the kernel has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Copy => "UFFDIO_COPY",
            Self::Continue => "UFFDIO_CONTINUE",
            Self::Zeropage => "UFFDIO_ZEROPAGE",
        }
    }
}

/// The time to populate `pages` pages, `step` pages a call.
pub fn populate(way: Way, backing: Backing, pages: u64, step: u64) -> Result<Duration, MeasureError> {
    let region = Region::new(pages * PAGE_SIZE as u64, backing, PageSize::Small)?;
    if let (Way::Continue, Some(memfd)) = (way, region.memfd()) {
        rustix::fs::fallocate(memfd, rustix::fs::FallocateFlags::empty(), 0, region.size())
            .map_err(MeasureError::os("fallocate"))?;
    }
    let (features, mode) = region.registration();
    let uffd = Userfaultfd::open(features)?;
    uffd.register(region.all_addresses(), mode)
        .map_err(MeasureError::os("UFFDIO_REGISTER"))?;
    let buffer = vec![0x5a; step as usize * PAGE_SIZE];
    let since = Instant::now();
    for start in (0..pages).step_by(step as usize) {
        let range = PageRange::new(PageIndex(start), step.min(pages - start));
        let addresses = region.addresses(range);
        let installed = match way {
            Way::Copy => uffd.copy(addresses.start, &buffer[..range.bytes()]),
            Way::Continue => uffd.continue_(addresses),
            Way::Zeropage => uffd.zero(addresses),
        };
        if installed.bytes != range.bytes() as u64 {
            return Err(MeasureError::OtherWay {
                count: range.count - installed.bytes / PAGE_SIZE as u64,
                way: "not at all",
            });
        }
    }
    Ok(since.elapsed())
}

/// Plain anonymous memory, unmapped when it is dropped.
struct Plain {
    start: *mut u8,
    size: usize,
}

impl Plain {
    fn new(pages: u64) -> Result<Self, MeasureError> {
        let size = pages as usize * PAGE_SIZE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), size, protection, MapFlags::PRIVATE) }
            .map_err(MeasureError::os("mmap"))?;
        // One fault a page is to be measured. Without huge pages in the kernel the call fails and is not needed.
        // SAFETY: changes nothing of what the memory holds.
        let _ = unsafe { rustix::mm::madvise(start, size, Advice::LinuxNoHugepage) };
        Ok(Self {
            start: start.cast(),
            size,
        })
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        // SAFETY: nobody has a reference to it. It cannot fail for a mapping that is there.
        let _ = unsafe { munmap(self.start.cast(), self.size) };
    }
}

/// The first write to each of `count` pages among `pages` of plain anonymous memory.
pub fn plain_faults(pages: u64, count: usize) -> Result<Waits, MeasureError> {
    let plain = Plain::new(pages)?;
    let mut waits = Waits::default();
    for page in shuffled(pages, 1).take(count) {
        let address = plain.start.wrapping_add(page as usize * PAGE_SIZE);
        let since = Instant::now();
        // SAFETY: within the mapping, which nobody else has.
        unsafe { address.write_volatile(1) };
        waits.push(since.elapsed());
    }
    Ok(waits)
}

/// The time to copy `pages` pages from a buffer that stays in the processor's cache into memory that is there and does not.
pub fn copy_into_memory(pages: u64) -> Result<Duration, MeasureError> {
    let plain = Plain::new(pages)?;
    let buffer = vec![0x5a_u8; 64 << 10];
    let mut time = Duration::ZERO;
    // The first time takes the memory from the system.
    for _ in 0..2 {
        let since = Instant::now();
        for offset in (0..plain.size).step_by(buffer.len()) {
            let length = buffer.len().min(plain.size - offset);
            // SAFETY: within the mapping, which nobody else has.
            unsafe {
                std::ptr::copy_nonoverlapping(buffer.as_ptr(), plain.start.wrapping_add(offset), length);
            }
        }
        std::hint::black_box(plain.start);
        time = since.elapsed();
    }
    Ok(time)
}
