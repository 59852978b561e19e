//! `/dev/umem`: what the driver of the umem v4 patch (I. Yamahata 2012) did.

use std::ffi::{c_int, c_void};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, OnceLock, PoisonError};

use ::umem::abi::{INIT, Init, MAKE_VMA_ANONYMOUS};
use ::umem::device::{DRIVER_REQUESTS, DeviceError, Place, Requests, Serving};
use ::umem::units::{PAGE_SIZE, PageIndex};

use crate::device::{Errno, MapRequest, Mapped, complain};
use crate::user;

/// Indices that are taken from the program at a time.
const PART: usize = 64;

/// Bytes of an index.
const INDEX: usize = size_of::<u64>();

/// An open file of the device.
pub(crate) struct Device {
    /// O_RDONLY, O_WRONLY or O_RDWR.
    access: c_int,
    /// The program has a duplicate of it from the start.
    descriptor: OwnedFd,
    /// Until there is a device.
    requests: Mutex<Option<Requests>>,
    memory: OnceLock<::umem::device::Device>,
}

impl Device {
    /// As the driver's open.
    pub(crate) fn open(flags: c_int) -> Result<Self, Errno> {
        let requests = Requests::new(DRIVER_REQUESTS).map_err(|error| refuse(&error))?;
        let descriptor = requests.as_fd().try_clone_to_owned().map_err(|_| libc::EMFILE)?;
        if flags & libc::O_NONBLOCK != 0 {
            let nonblocking = rustix::fs::OFlags::NONBLOCK;
            rustix::fs::fcntl_setfl(&descriptor, nonblocking).map_err(rustix::io::Errno::raw_os_error)?;
        }
        Ok(Self {
            access: flags & libc::O_ACCMODE,
            descriptor,
            requests: Mutex::new(Some(requests)),
            memory: OnceLock::new(),
        })
    }

    fn get(&self) -> Result<&::umem::device::Device, Errno> {
        self.memory.get().ok_or(libc::ENXIO)
    }

    /// UMEM_INIT.
    fn init(&self, argument: *mut c_void) -> Result<c_int, Errno> {
        let mut init: Init = user::copy_from(argument)?;
        if init.size == 0 {
            return Err(libc::EINVAL);
        }
        if self.memory.get().is_some() {
            return Err(libc::EBUSY);
        }
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let own = requests.take().ok_or(libc::EBUSY)?;
        let device = ::umem::device::Device::with_requests(init.size, Serving::Copied, own);
        let device = device.map_err(|(error, own)| {
            *requests = Some(own);
            refuse(&error)
        })?;
        let server = device.server().map_err(|error| refuse(&error))?;
        init.size = server.size();
        // The program's own, which it closes, and which its children and what they execute have too.
        init.shmem_fd = duplicate(server.window_file().as_raw_fd())?;
        if self.memory.set(device).is_err() {
            return Err(libc::EBUSY);
        }
        user::copy_to(argument, &[init])?;
        Ok(0)
    }
}

impl crate::device::Device for Device {
    fn descriptor(&self) -> Result<RawFd, Errno> {
        Ok(self.descriptor.as_raw_fd())
    }

    fn flags(&self, native: c_int) -> c_int {
        native & !libc::O_ACCMODE | self.access
    }

    fn set_flags(&self, _: c_int, _: c_int) -> Option<Result<(), Errno>> {
        None
    }

    fn ioctl(&self, _: c_int, request: u64, argument: *mut c_void) -> Option<Result<c_int, Errno>> {
        Some(match request as u32 {
            INIT => self.init(argument),
            MAKE_VMA_ANONYMOUS => self
                .get()
                .and_then(|device| device.make_anonymous().map_err(|error| refuse(&error)))
                .map(|()| 0),
            _ if matches!(request, libc::FIONBIO | libc::FIOASYNC) => return None,
            _ => Err(libc::EINVAL),
        })
    }

    fn read(&self, buffer: *mut c_void, length: usize) -> Result<usize, Errno> {
        if self.access == libc::O_WRONLY {
            return Err(libc::EBADF);
        }
        if length < INDEX {
            return Err(libc::EINVAL);
        }
        // SAFETY: the program says that there is room; where there is none, the kernel says EFAULT.
        unsafe { self.get()?.read_to(buffer.cast(), length) }.map_err(|error| refuse(&error))
    }

    fn write(&self, buffer: *const c_void, length: usize) -> Result<usize, Errno> {
        if self.access == libc::O_RDONLY {
            return Err(libc::EBADF);
        }
        let count = length / INDEX;
        if count == 0 {
            return Err(libc::EINVAL);
        }
        let device = self.get()?;
        for start in (0..count).step_by(PART) {
            let mut indices = [0_u64; PART];
            let indices = &mut indices[..PART.min(count - start)];
            let from = buffer.cast::<u64>().wrapping_add(start);
            user::copy_all_from(from.cast(), indices)?;
            let pages: Vec<PageIndex> = indices.iter().map(|index| PageIndex(*index)).collect();
            device.write(&pages).map_err(|error| refuse(&error))?;
        }
        Ok(count * INDEX)
    }

    fn mmap(&self, request: MapRequest) -> Result<Mapped, Errno> {
        let MapRequest {
            address,
            length,
            protection,
            flags,
            offset,
        } = request;
        // What the kernel sees to before it asks a driver.
        let shared = flags & libc::MAP_TYPE != libc::MAP_PRIVATE;
        let unreadable = self.access == libc::O_WRONLY;
        let unwritable = shared && protection & libc::PROT_WRITE != 0 && self.access == libc::O_RDONLY;
        if unreadable || unwritable {
            return Err(libc::EACCES);
        }
        let aligned = offset >= 0 && offset % PAGE_SIZE as i64 == 0;
        if length == 0 || !aligned {
            return Err(libc::EINVAL);
        }
        let place = Place {
            first: PageIndex(offset as u64 / PAGE_SIZE as u64),
            length,
            address: address.cast(),
            protection,
            flags,
        };
        let mapping = self.get()?.map(place).map_err(|error| {
            if !matches!(error, DeviceError::Mapped | DeviceError::BeyondEnd { .. }) {
                complain("/dev/umem", &error);
            }
            error.errno()
        })?;
        // The program's to unmap.
        Ok(Mapped::At(mapping.into_raw().cast()))
    }
}

/// The errno; what no driver would have said is explained.
fn refuse(error: &DeviceError) -> Errno {
    if matches!(
        error,
        DeviceError::Os { .. } | DeviceError::NoAnswer | DeviceError::Install(_)
    ) {
        complain("/dev/umem", error);
    }
    error.errno()
}

fn duplicate(fd: RawFd) -> Result<RawFd, Errno> {
    // SAFETY: duplicates a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_fcntl, fd, libc::F_DUPFD, 0) } as c_int;
    if fd < 0 {
        return Err(std::io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EMFILE));
    }
    Ok(fd)
}
