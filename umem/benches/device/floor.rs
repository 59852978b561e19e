//! The least that answers page faults: poll, read, UFFDIO_COPY, each by its raw system call, from one page of content that
//! stays in the processor's cache. Nobody who answers faults from another thread does so with less.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::thread::JoinHandle;

use linux_raw_sys::general as sys;
use linux_raw_sys::ioctl::UFFDIO_COPY;
use umem::region::{Backing, PageSize, Region};
use umem::uffd::Userfaultfd;
use umem::units::{HostAddress, PAGE_SIZE, PageIndex, PageRange};

#[repr(align(4096))]
struct Content([u8; PAGE_SIZE]);

static CONTENT: Content = Content([0x5a; PAGE_SIZE]);

/// A region whose faults the loop answers. Dropping it ends the loop.
pub(crate) struct Floor {
    region: Region,
    handler: Option<JoinHandle<()>>,
}

impl Floor {
    /// Serves `pages` pages by a thread that runs on the CPUs of the calling one.
    pub(crate) fn start(pages: u64, backing: Backing) -> Self {
        // One page more: the loop has nothing but faults to wait for, so a fault on that page is what ends it.
        let size = (pages + 1) * PAGE_SIZE as u64;
        let region = Region::new(size, backing, PageSize::Small).expect("memory for the floor");
        // Registered as the pager does: that alone decides what the kernel does on the way to the handler (for minor faults
        // too, and it no longer looks for neighbours of a missing page to map with it).
        let (features, mode) = region.registration();
        let uffd = Userfaultfd::open(features).expect("a userfaultfd for the floor");
        uffd.register(region.all_addresses(), mode)
            .expect("registration of the floor's memory");
        let last = last_page(&region);
        let handler = std::thread::spawn(move || serve(&uffd, last));
        Self {
            region,
            handler: Some(handler),
        }
    }

    pub(crate) fn region(&self) -> &Region {
        &self.region
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        let address = last_page(&self.region).0 as *const u8;
        // SAFETY: within the region.
        unsafe { address.read_volatile() };
        if let Some(handler) = self.handler.take() {
            handler.join().expect("the floor's loop");
        }
    }
}

/// Where the page is whose fault ends the loop.
pub(crate) fn last_page(region: &Region) -> HostAddress {
    region
        .addresses(PageRange::single(PageIndex(region.pages() - 1)))
        .start
}

/// Answers faults up to that on the page at `last`.
pub(crate) fn serve(uffd: &Userfaultfd, last: HostAddress) {
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
        let address = unsafe { message.assume_init().arg.pagefault.address };
        let mut copy = sys::uffdio_copy {
            dst: address & !(PAGE_SIZE as u64 - 1),
            src: CONTENT.0.as_ptr() as u64,
            len: PAGE_SIZE as u64,
            mode: 0,
            copy: 0,
        };
        // SAFETY: UFFDIO_COPY takes this structure and writes only a page that did not exist.
        let result = unsafe { libc::ioctl(fd, UFFDIO_COPY.into(), &raw mut copy) };
        assert_eq!(result, 0, "UFFDIO_COPY: {}", io::Error::last_os_error());
        if copy.dst == last.0 {
            return;
        }
    }
}
