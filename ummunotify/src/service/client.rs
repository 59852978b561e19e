//! The client's side.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::SealFlags;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

pub use super::protocol::Notice;
use super::protocol::{self, EVENT_SIZE, EVENTS_AT_MOST, HEAD_SIZE, Head, Request};
use crate::counter::{COUNTER_PAGE, CounterPage};
use crate::ranges::{AddressRange, Cookie};

/// How long a service may take for an answer: it waits for nobody.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a client wants.
#[derive(Clone, Copy, Debug, Default)]
pub struct ClientOptions {
    /// Changes are to wait until this client has acknowledged them, but no longer than this, and than the service allows.
    pub acknowledge_within: Option<Duration>,
}

/// Why a client is not served.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("cannot connect to '{}'", path.display())]
    Connect {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The service has ended, or takes this client for dead: whatever was learnt of its addresses may be wrong.
    #[error("the service has closed the connection")]
    Closed,
    /// The connection failed.
    #[error("the connection to the service failed")]
    Io(#[source] io::Error),
    /// A request makes no sense, or there is no room.
    #[error("{text}")]
    Refused {
        /// As of a system call.
        errno: i32,
        /// Why.
        text: String,
    },
    /// It is no such service.
    #[error("the service does not keep to the protocol: {0}")]
    Protocol(&'static str),
}

impl From<Errno> for ClientError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::PIPE | Errno::CONNRESET => Self::Closed,
            errno => Self::Io(errno.into()),
        }
    }
}

/// A connection to a [`Service`](super::Service). Dropped, it ends.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    ready: OwnedFd,
    counter: CounterPage,
    limit: Option<Duration>,
}

impl Client {
    /// Connects.
    pub fn connect(path: &Path, options: ClientOptions) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).map_err(|source| ClientError::Connect {
            path: path.to_path_buf(),
            source,
        })?;
        let limited = |stream: &UnixStream| {
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))
        };
        limited(&stream).map_err(ClientError::Io)?;
        let hello = Request::Hello {
            limit: options.acknowledge_within,
        };
        let sent = send(&stream, hello);
        let mut descriptors = Vec::new();
        // Who is refused may be so before he has said anything: why, is to be read all the same.
        let head = match (receive(&stream, hello, &mut descriptors), sent) {
            (Ok((head, _)), Ok(())) => head,
            (Err(ClientError::Closed) | Ok(_), Err(error)) | (Err(error), _) => return Err(error),
        };
        let [ready, counter] = <[OwnedFd; 2]>::try_from(descriptors)
            .map_err(|_| ClientError::Protocol("its welcome has not two descriptors with it"))?;
        let limit = (head.value > 0).then(|| Duration::from_micros(head.value));
        Ok(Self {
            stream,
            ready,
            counter: map(counter)?,
            limit,
        })
    }

    /// How long a change waits for the acknowledgement of this client, if it does.
    pub fn limit(&self) -> Option<Duration> {
        self.limit
    }

    /// The counter. It has moved before a change is made that hits a registered range, and when this is a client no longer.
    pub fn counter(&self) -> &CounterPage {
        &self.counter
    }

    /// Wants to hear of a range. It may overlap others or be the same, but no two have one cookie.
    pub fn register(&mut self, range: AddressRange, cookie: Cookie) -> Result<(), ClientError> {
        self.ask(Request::Register { range, cookie }).map(drop)
    }

    /// Wants to hear no more of a range, not even of what happened already.
    pub fn unregister(&mut self, cookie: Cookie) -> Result<(), ClientError> {
        self.ask(Request::Unregister { cookie }).map(drop)
    }

    /// Up to `max` of what there is to tell. When it is all, [`Event::Last`](crate::Event::Last) is the last of it.
    pub fn read(&mut self, max: usize) -> Result<Vec<Notice>, ClientError> {
        let max = max.min(EVENTS_AT_MOST) as u32;
        let body = self.ask(Request::Read { max })?;
        let (events, rest) = body.as_chunks::<EVENT_SIZE>();
        let notices: Option<Vec<Notice>> = events.iter().map(protocol::notice).collect();
        notices
            .filter(|_| rest.is_empty())
            .ok_or(ClientError::Protocol("it tells what there is no word for"))
    }

    /// The change of this number, and all before it, may be made.
    pub fn acknowledge(&mut self, change: u64) -> Result<(), ClientError> {
        self.ask(Request::Acknowledge { change }).map(drop)
    }

    /// Readable while there is something to read, and hung up when this is a client no longer.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }

    /// Waits until there is something to read. False: nothing came in this time.
    pub fn wait(&self, patience: Duration) -> Result<bool, ClientError> {
        let timeout = Timespec {
            tv_sec: patience.as_secs() as i64,
            tv_nsec: patience.subsec_nanos().into(),
        };
        let mut descriptors = [PollFd::new(&self.ready, PollFlags::IN)];
        rustix::io::retry_on_intr(|| poll(&mut descriptors, Some(&timeout)))?;
        let found = descriptors[0].revents();
        if found.contains(PollFlags::HUP) {
            return Err(ClientError::Closed);
        }
        Ok(!found.is_empty())
    }

    fn ask(&mut self, request: Request) -> Result<Vec<u8>, ClientError> {
        send(&self.stream, request)?;
        Ok(receive(&self.stream, request, &mut Vec::new())?.1)
    }
}

/// The counter, if nobody can take its page away again.
fn map(counter: OwnedFd) -> Result<CounterPage, ClientError> {
    let seals = rustix::fs::fcntl_get_seals(&counter)?;
    let size = rustix::fs::fstat(&counter)?.st_size;
    if !seals.contains(SealFlags::SHRINK) || size < COUNTER_PAGE as i64 {
        return Err(ClientError::Protocol("its counter could go away"));
    }
    CounterPage::map(counter).map_err(ClientError::Io)
}

fn send(stream: &UnixStream, request: Request) -> Result<(), ClientError> {
    let bytes = request.encode();
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let flags = rustix::net::SendFlags::NOSIGNAL;
        let sent = rustix::io::retry_on_intr(|| rustix::net::send(stream, rest, flags))?;
        rest = &rest[sent..];
    }
    Ok(())
}

/// The reply, and the descriptors that come with it.
fn receive(
    stream: &UnixStream,
    request: Request,
    descriptors: &mut Vec<OwnedFd>,
) -> Result<(Head, Vec<u8>), ClientError> {
    let mut head = [0; HEAD_SIZE];
    receive_all(stream, &mut head, descriptors)?;
    let head = Head::decode(&head);
    if head.size as usize > EVENTS_AT_MOST * EVENT_SIZE {
        return Err(ClientError::Protocol("its reply is longer than any"));
    }
    let mut body = vec![0; head.size as usize];
    receive_all(stream, &mut body, descriptors)?;
    if head.is_error() {
        return Err(ClientError::Refused {
            errno: head.value as i32,
            text: String::from_utf8_lossy(&body).into_owned(),
        });
    }
    if !head.is_for(request) {
        return Err(ClientError::Protocol("it replies to another request"));
    }
    Ok((head, body))
}

fn receive_all(
    stream: &UnixStream,
    mut into: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> Result<(), ClientError> {
    while !into.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = {
            let mut bytes = [io::IoSliceMut::new(into)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            rustix::io::retry_on_intr(|| rustix::net::recvmsg(stream, &mut bytes, &mut ancillary, flags))?
        };
        if received.bytes == 0 {
            return Err(ClientError::Closed);
        }
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                descriptors.extend(received);
            }
        }
        into = &mut into[received.bytes..];
    }
    Ok(())
}
