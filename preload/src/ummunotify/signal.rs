//! SIGIO: a thread that waits for events in the program's place, and sends the signal that it asked for.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, epoll, eventfd};

/// The thread; it ends with this.
pub(crate) struct Signals {
    /// The process that has the thread: a child made by fork has the descriptors and not the thread, and ends nothing.
    owner: u32,
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

const EVENT: u64 = 0;
const STOP: u64 = 1;

impl Signals {
    /// `descriptor` is readable when there are events; `fd` is the program's, whose owner is sent the signal.
    pub(crate) fn start(descriptor: RawFd, fd: c_int) -> io::Result<Self> {
        let either = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC)?;
        // SAFETY: the notifier's, which lives longer than the thread: the device stops that first.
        let descriptor = unsafe { BorrowedFd::borrow_raw(descriptor) };
        // A signal when something comes, not as long as it has not been read.
        let when = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&either, descriptor, epoll::EventData::new_u64(EVENT), when)?;
        epoll::add(
            &either,
            &stop,
            epoll::EventData::new_u64(STOP),
            epoll::EventFlags::IN,
        )?;
        let thread = std::thread::Builder::new()
            .name("ummunotify-sigio".to_owned())
            .spawn(move || wait(either.as_fd(), fd))?;
        Ok(Self {
            owner: std::process::id(),
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        if self.owner != std::process::id() {
            std::mem::forget(self.thread.take());
            return;
        }
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn wait(either: BorrowedFd<'_>, fd: c_int) {
    // SAFETY: both sets are written before they are read. A signal that this thread took would interrupt nobody.
    unsafe {
        let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), std::ptr::null_mut());
    }
    let none = epoll::Event {
        flags: epoll::EventFlags::empty(),
        data: epoll::EventData::new_u64(0),
    };
    loop {
        let mut events = [none; 2];
        let Ok(count) = epoll::wait(either, &mut events[..], None) else {
            continue;
        };
        for event in &events[..count] {
            let data = event.data;
            if data.u64() == STOP {
                return;
            }
            send(fd);
        }
    }
}

/// `struct f_owner_ex`.
#[repr(C)]
struct Owner {
    kind: c_int,
    pid: libc::pid_t,
}

const F_GETSIG: c_int = 11;
const F_GETOWN_EX: c_int = 16;
const F_OWNER_TID: c_int = 0;
const F_OWNER_PGRP: c_int = 2;

/// Signals whoever F_SETOWN named, by what F_SETSIG named; the kernel keeps both for any file.
fn send(fd: c_int) {
    let mut owner = Owner { kind: 0, pid: 0 };
    // SAFETY: F_GETOWN_EX takes such a structure; the other numbers are those of this process' descriptor and its owner.
    unsafe {
        if libc::syscall(libc::SYS_fcntl, fd, F_GETOWN_EX, &raw mut owner) < 0 || owner.pid == 0 {
            return;
        }
        let signal = match libc::syscall(libc::SYS_fcntl, fd, F_GETSIG) {
            signal @ 1.. => signal as c_int,
            _ => libc::SIGIO,
        };
        match owner.kind {
            F_OWNER_TID => {
                libc::syscall(libc::SYS_tgkill, libc::getpid(), owner.pid, signal);
            }
            F_OWNER_PGRP => {
                libc::kill(-owner.pid, signal);
            }
            _ => {
                libc::kill(owner.pid, signal);
            }
        }
    }
}
