//! Descriptors and what is said with them.
//!
//! Between the halves there is a socket pair. What goes to the client is a [`Notice`]. What comes back is one message, the
//! [`Mail`] of the mapping, with the userfaultfd; it stays where it is, and every process with the server half looks at it
//! (MSG_PEEK gives each of them descriptors of its own).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use rustix::process::{Pid, PidfdFlags};

use super::shared::Parts;
use super::{DeviceError, failed};
use crate::units::{HostAddress, PageIndex, PageRange};

/// Descriptors of a half: the files, and its two own.
pub(super) const HALF: usize = Parts::FILES + 2;

/// What a server's process tells the client's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Notice {
    /// This process serves; with its pidfd.
    Attach,
    /// It no longer does.
    Detach,
    /// Pages were kept that could not be installed where the memory was mapped.
    Kept,
    /// The memory is to become ordinary.
    Release,
}

impl Notice {
    const ALL: [Self; 4] = [Self::Attach, Self::Detach, Self::Kept, Self::Release];

    /// Tells it, if there is room to.
    pub(super) fn send(self, socket: &OwnedFd) -> Result<(), Errno> {
        let own = match self {
            Self::Attach => Some(own_pidfd()?),
            _ => None,
        };
        let mut message = [0; 8];
        message[..4].copy_from_slice(&(self as u32).to_le_bytes());
        message[4..].copy_from_slice(&std::process::id().to_le_bytes());
        let descriptors: Vec<BorrowedFd<'_>> = own.iter().map(AsFd::as_fd).collect();
        send(socket.as_fd(), &message, &descriptors)
    }

    /// What was told, by which process. `None`: nothing more for now.
    pub(super) fn receive(socket: &OwnedFd) -> Option<(Self, u32, Option<OwnedFd>)> {
        let mut message = [0; 8];
        loop {
            let (length, descriptors) = receive(socket.as_fd(), &mut message, RecvFlags::DONTWAIT).ok()?;
            if length == 0 {
                return None;
            }
            let (words, _) = message.as_chunks::<4>();
            let (kind, pid) = (u32::from_le_bytes(words[0]), u32::from_le_bytes(words[1]));
            let notice = Self::ALL.into_iter().find(|notice| *notice as u32 == kind);
            if let Some(notice) = notice.filter(|_| length == message.len()) {
                return Some((notice, pid, descriptors.into_iter().next()));
            }
        }
    }
}

/// The mapping: where it is, and what serves it.
#[derive(Debug)]
pub(super) struct Mail {
    pub(super) start: HostAddress,
    pub(super) pages: PageRange,
    /// Whether pages of the same process can be moved there.
    pub(super) can_move: bool,
}

impl Mail {
    pub(super) fn send(&self, socket: &OwnedFd, uffd: BorrowedFd<'_>) -> Result<(), DeviceError> {
        let pidfd = own_pidfd().map_err(failed("pidfd_open"))?;
        let words = [
            self.start.0,
            self.pages.start.0,
            self.pages.count,
            u64::from(self.can_move),
        ];
        let mut message = [0; 32];
        for (bytes, word) in message.as_chunks_mut().0.iter_mut().zip(words) {
            *bytes = word.to_le_bytes();
        }
        send(socket.as_fd(), &message, &[uffd, pidfd.as_fd()]).map_err(failed("sendmsg"))
    }

    /// With the userfaultfd and the client's pidfd. `None`: there is no mapping yet. `take`: nobody else is to have them.
    pub(super) fn receive(
        socket: &OwnedFd,
        pages: u64,
        take: bool,
    ) -> Result<Option<(Self, OwnedFd, OwnedFd)>, DeviceError> {
        let mut message = [0; 32];
        let flags = if take {
            RecvFlags::DONTWAIT
        } else {
            RecvFlags::DONTWAIT | RecvFlags::PEEK
        };
        let mut received = receive(socket.as_fd(), &mut message, flags);
        if matches!(received, Err(Errno::CONNRESET)) {
            // The client ended without reading everything. It is told once; what it sent is there.
            received = receive(socket.as_fd(), &mut message, flags);
        }
        let (length, descriptors) = match received {
            Ok(received) => received,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(errno) => return Err(failed("recvmsg")(errno)),
        };
        if length == 0 {
            // The client's end is closed, and nothing was mapped.
            return Ok(None);
        }
        let mut words = message
            .as_chunks::<8>()
            .0
            .iter()
            .map(|word| u64::from_le_bytes(*word));
        let mut next = || words.next().unwrap_or_default();
        let mail = Self {
            start: HostAddress(next()),
            pages: PageRange::new(PageIndex(next()), next()),
            can_move: next() != 0,
        };
        let fits = mail.pages.start.0 < pages && mail.pages.count <= pages - mail.pages.start.0;
        let mut descriptors = descriptors.into_iter();
        match (descriptors.next(), descriptors.next()) {
            (Some(uffd), Some(pidfd)) if fits => Ok(Some((mail, uffd, pidfd))),
            _ => Err(DeviceError::NotADevice("a mapping that does not fit")),
        }
    }
}

fn own_pidfd() -> Result<OwnedFd, Errno> {
    let own = Pid::from_raw(std::process::id() as i32).ok_or(Errno::SRCH)?;
    rustix::process::pidfd_open(own, PidfdFlags::empty())
}

/// Sends the descriptors of a half over a Unix socket, as one message of one byte.
pub(super) fn send_half(
    socket: BorrowedFd<'_>,
    kind: u8,
    descriptors: &[BorrowedFd<'_>; HALF],
) -> Result<(), DeviceError> {
    send(socket, &[kind], descriptors).map_err(failed("sendmsg"))
}

/// Waits for the descriptors of a half.
pub(super) fn receive_half(socket: BorrowedFd<'_>, kind: u8) -> Result<[OwnedFd; HALF], DeviceError> {
    let mut byte = [0];
    let (length, descriptors) = loop {
        match receive(socket, &mut byte, RecvFlags::empty()) {
            Err(Errno::INTR) => {}
            received => break received.map_err(failed("recvmsg"))?,
        }
    };
    if length == 0 {
        return Err(failed("recvmsg")(io::Error::from(io::ErrorKind::UnexpectedEof)));
    }
    if byte[0] != kind {
        return Err(DeviceError::NotADevice("it is the other half, or something else"));
    }
    descriptors
        .try_into()
        .map_err(|_| DeviceError::NotADevice("another number of descriptors"))
}

fn send(socket: BorrowedFd<'_>, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(HALF))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Errno::INVAL);
    }
    loop {
        match rustix::net::sendmsg(
            socket,
            &[IoSlice::new(message)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        ) {
            Err(Errno::INTR) => {}
            result => return result.map(drop),
        }
    }
}

fn receive(
    socket: BorrowedFd<'_>,
    message: &mut [u8],
    flags: RecvFlags,
) -> Result<(usize, Vec<OwnedFd>), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(HALF))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(message)],
        &mut ancillary,
        flags | RecvFlags::CMSG_CLOEXEC,
    )?;
    let descriptors = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(Errno::BADMSG);
    }
    Ok((received.bytes, descriptors))
}
