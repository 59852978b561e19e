//! Messages with descriptors over a Unix socket.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use super::Message;

/// Bytes of a message at most: an image's metadata is at most 1 MiB, a number and a comma for each byte of it.
const MAX_MESSAGE: usize = 5 << 20;

/// Descriptors with a message at most: the table, the memory, a working set, and a userfaultfd for each stripe.
pub(super) const MAX_DESCRIPTORS: usize = 3 + 64;

/// Why a message did not go through.
#[derive(Debug, thiserror::Error)]
pub enum PassingError {
    /// The other side is gone.
    #[error("the other side closed the connection")]
    Closed,
    /// Nothing came for as long as was waited.
    #[error("nothing came for too long")]
    Quiet,
    /// The socket failed.
    #[error("the connection is lost")]
    Lost(#[source] io::Error),
    /// What came is no message.
    #[error("the other side does not keep to the protocol: {0}")]
    Protocol(String),
}

impl From<io::Error> for PassingError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                Self::Closed
            }
            _ => Self::Lost(error),
        }
    }
}

/// Sends a message; `descriptors` are duplicated into the other process.
pub(super) fn send(
    mut stream: &UnixStream,
    message: &Message,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), PassingError> {
    let body = serde_json::to_vec(message).map_err(|error| PassingError::Protocol(error.to_string()))?;
    let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
    bytes.extend(body);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(PassingError::Protocol(
            "too many descriptors for one message".into(),
        ));
    }
    let flags = SendFlags::NOSIGNAL;
    let sent = loop {
        match rustix::net::sendmsg(stream, &[IoSlice::new(&bytes)], &mut ancillary, flags) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result.map_err(io::Error::from)?,
        }
    };
    // The descriptors have gone with the first byte.
    stream.write_all(&bytes[sent..])?;
    Ok(())
}

/// Waits for a message, for as long as the socket's time-out says.
pub(super) fn receive(mut stream: &UnixStream) -> Result<(Message, Vec<OwnedFd>), PassingError> {
    let mut length = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut into = [IoSliceMut::new(&mut length)];
        match rustix::net::recvmsg(stream, &mut into, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => return Err(PassingError::Quiet),
            result => break result.map_err(io::Error::from)?,
        }
    };
    if received.bytes == 0 {
        return Err(PassingError::Closed);
    }
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(PassingError::Protocol(
            "more descriptors than a message may have".into(),
        ));
    }
    stream.read_exact(&mut length[received.bytes..])?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_MESSAGE {
        return Err(PassingError::Protocol(format!("a message of {length} bytes")));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    let message = serde_json::from_slice(&body).map_err(|error| PassingError::Protocol(error.to_string()))?;
    Ok((message, descriptors))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_message_brings_its_descriptors() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        send(&a, &Message::Ping, &[file.as_fd(), file.as_fd()]).unwrap();
        send(&a, &Message::Pong, &[]).unwrap();
        let (message, descriptors) = receive(&b).unwrap();
        assert!(matches!(message, Message::Ping));
        assert_eq!(descriptors.len(), 2);
        let mut same = std::fs::File::from(descriptors.into_iter().next().unwrap());
        same.write_all(b"the same file").unwrap();
        let mut text = String::new();
        io::Seek::rewind(&mut file).unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "the same file");
        let (message, descriptors) = receive(&b).unwrap();
        assert!(matches!(message, Message::Pong) && descriptors.is_empty());
        drop(a);
        assert!(matches!(receive(&b), Err(PassingError::Closed)));
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for bytes in [
            &b"\xff\xff\xff\xff"[..],
            b"\x02\0\0\0{}",
            b"\x04\0\0\0nope",
            b"\x10\0",
        ] {
            let (mut a, b) = UnixStream::pair().unwrap();
            a.write_all(bytes).unwrap();
            drop(a);
            assert!(receive(&b).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn quiet_is_told_apart_from_the_end() {
        let (_a, b) = UnixStream::pair().unwrap();
        b.set_nonblocking(true).unwrap();
        assert!(matches!(receive(&b), Err(PassingError::Quiet)));
    }
}
