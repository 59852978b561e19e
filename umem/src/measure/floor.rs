//! The least that answers page faults: poll, read and one ioctl, each by its raw system call. Nobody who answers faults from
//! another thread does so with less.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::thread::JoinHandle;

use linux_raw_sys::general as sys;
use linux_raw_sys::ioctl::{UFFDIO_CONTINUE, UFFDIO_COPY};

use super::MeasureError;
use crate::region::{Backing, PageSize, Region};
use crate::uffd::Userfaultfd;
use crate::units::{HostAddress, PAGE_SIZE, PageIndex, PageRange};

/// How faults are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// By UFFDIO_COPY, from one page of content that stays in the processor's cache.
    Copy,
    /// By UFFDIO_CONTINUE: the pages are in the memfd already. For [`Backing::Memfd`] alone.
    Continue,
}

#[repr(align(4096))]
struct Content([u8; PAGE_SIZE]);

static CONTENT: Content = Content([0x5a; PAGE_SIZE]);

/// A region whose faults the loop answers. Dropping it ends the loop.
pub struct Floor {
    region: Region,
    handler: Option<JoinHandle<()>>,
}

impl Floor {
    /// Serves `pages` pages by a thread that runs on the CPUs of the calling one.
    pub fn start(pages: u64, backing: Backing, answer: Answer) -> Result<Self, MeasureError> {
        // One page more: the loop has nothing but faults to wait for, so a fault on that page is what ends it.
        let size = (pages + 1) * PAGE_SIZE as u64;
        let region = Region::new(size, backing, PageSize::Small)?;
        if let (Answer::Continue, Some(memfd)) = (answer, region.memfd()) {
            rustix::fs::fallocate(memfd, rustix::fs::FallocateFlags::empty(), 0, size)
                .map_err(MeasureError::os("fallocate"))?;
        }
        // Registered as the pager does: that alone decides what the kernel does on the way to the handler (for minor faults
        // too, and it no longer looks for neighbours of a missing page to map with it).
        let (features, mode) = region.registration();
        let uffd = Userfaultfd::open(features)?;
        uffd.register(region.all_addresses(), mode)
            .map_err(MeasureError::os("UFFDIO_REGISTER"))?;
        let last = last_page(&region);
        let handler = std::thread::spawn(move || serve(&uffd, answer, last));
        Ok(Self {
            region,
            handler: Some(handler),
        })
    }

    /// The memory; its last page is not to be touched.
    pub fn region(&self) -> &Region {
        &self.region
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        let address = last_page(&self.region).0 as *const u8;
        // SAFETY: within the region.
        unsafe { address.read_volatile() };
        if let Some(handler) = self.handler.take() {
            // A panic was told by the hook.
            let _ = handler.join();
        }
    }
}

/// Where the page is whose fault ends the loop.
pub fn last_page(region: &Region) -> HostAddress {
    let last = PageRange::single(PageIndex(region.pages() - 1));
    region.addresses(last).start
}

/// Answers faults up to that on the page at `last`.
pub fn serve(uffd: &Userfaultfd, answer: Answer, last: HostAddress) {
    let fd = uffd.as_fd().as_raw_fd();
    loop {
        let mut ready = libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd.
        unsafe { libc::poll(&raw mut ready, 1, -1) };
        let mut message = MaybeUninit::<sys::uffd_msg>::uninit();
        // SAFETY: room for one message.
        let length = unsafe { libc::read(fd, message.as_mut_ptr().cast(), size_of::<sys::uffd_msg>()) };
        if length != size_of::<sys::uffd_msg>() as isize {
            continue;
        }
        // SAFETY: the kernel wrote a whole message, and no event but faults was asked for.
        let address = unsafe { message.assume_init().arg.pagefault.address } & !(PAGE_SIZE as u64 - 1);
        let result = match answer {
            Answer::Copy => {
                let mut copy = sys::uffdio_copy {
                    dst: address,
                    src: CONTENT.0.as_ptr() as u64,
                    len: PAGE_SIZE as u64,
                    mode: 0,
                    copy: 0,
                };
                // SAFETY: UFFDIO_COPY takes this structure and writes only a page that did not exist.
                unsafe { libc::ioctl(fd, UFFDIO_COPY.into(), &raw mut copy) }
            }
            Answer::Continue => {
                let mut continue_ = sys::uffdio_continue {
                    range: sys::uffdio_range {
                        start: address,
                        len: PAGE_SIZE as u64,
                    },
                    mode: 0,
                    mapped: 0,
                };
                // SAFETY: UFFDIO_CONTINUE takes this structure and maps a page that the file holds.
                unsafe { libc::ioctl(fd, UFFDIO_CONTINUE.into(), &raw mut continue_) }
            }
        };
        assert_eq!(result, 0, "{answer:?}: {}", io::Error::last_os_error());
        if address == last.0 {
            return;
        }
    }
}
