//! One end of a channel of the page service that says what it likes, to see how the program at the other end takes it.

use std::io::{BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use umem::image::{Image, Wait};
use umem::units::{PAGE_SIZE, PageRange};
use umem::wire::{
    Bitmap, BitmapRequest, ChannelKind, Checksums, Encoding, Epoch, Features, HEADER_SIZE, Header, Hello,
    Message, MessageType, Outgoing, PagesHead, RequestId, Role, SessionId, VERSION, Welcome,
};

use crate::program::PATIENCE;

/// A connection.
#[derive(Debug)]
pub struct Peer {
    stream: BufReader<UnixStream>,
    outgoing: Outgoing,
}

/// A frame that came.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Its header.
    pub header: Header,
    payload: Vec<u8>,
}

impl Frame {
    /// What it says.
    pub fn message(&self) -> Message<'_> {
        Message::decode(&self.header, &self.payload).unwrap()
    }
}

/// What a fetcher of any image says first.
pub const HELLO: Hello<'static> = Hello {
    version: VERSION,
    features: Features::NONE,
    pages: None,
    epoch: Epoch(0),
    keep_alive_ms: 0,
    channel: ChannelKind::Demand,
    role: Role::Fetcher,
    session: SessionId::NEW,
    digest: None,
    image: "",
};

/// What a provider of this image answers.
pub fn welcome(image: &Image) -> Welcome {
    Welcome {
        version: VERSION,
        features: Features::NONE,
        pages: image.pages(),
        epoch: Epoch(0),
        keep_alive_ms: 5000,
        window: 64,
        session: SessionId([1; 16]),
        digest: Some(image.footer().digest),
    }
}

/// A frame of any content, as the first of a channel.
pub fn frame(kind: MessageType, id: u64, payload: &[u8]) -> Vec<u8> {
    [&Header::for_payload(kind, id, payload).encode(), payload].concat()
}

impl Peer {
    /// At this end of a connection.
    pub fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            stream: BufReader::new(stream),
            outgoing: Outgoing::default(),
        }
    }

    /// Connects to a server.
    pub fn connect(path: &Path) -> Self {
        Self::new(UnixStream::connect(path).unwrap())
    }

    /// Sends bytes. Who does not want to hear them need not.
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        let _ = self.stream.get_mut().write_all(bytes);
    }

    /// Sends a message, as the next frame of the channel.
    pub fn send(&mut self, message: &Message<'_>) {
        let mut bytes = Vec::new();
        self.outgoing.append(message, &mut bytes).unwrap();
        self.send_bytes(&bytes);
    }

    /// Sends a frame of any content, as the next one of the channel.
    pub fn send_frame(&mut self, kind: MessageType, id: u64, payload: &[u8]) {
        let mut bytes = frame(kind, id, payload);
        self.outgoing.stamp(&mut bytes);
        self.send_bytes(&bytes);
    }

    /// Waits for a frame; `None`: the other side has ended the connection.
    pub fn receive(&mut self) -> Option<Frame> {
        let mut header = [0; HEADER_SIZE];
        if let Err(error) = self.stream.read_exact(&mut header) {
            let ended = !matches!(
                error.kind(),
                std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
            );
            assert!(ended, "the other side keeps the connection and says nothing");
            return None;
        }
        let header = Header::decode(&header).unwrap();
        let mut payload = vec![0; header.length as usize];
        self.stream.read_exact(&mut payload).ok()?;
        Some(Frame { header, payload })
    }

    /// Whether the other side has ended the connection, whatever is still to be read.
    pub fn has_ended(&mut self) -> bool {
        let mut fds = [PollFd::new(self.stream.get_ref(), PollFlags::empty())];
        poll(&mut fds, Some(&Timespec::default())).unwrap();
        fds[0].revents().contains(PollFlags::HUP)
    }

    /// Answers a frame as it should be. False: the other side said goodbye.
    pub fn answer(&mut self, image: &Image, frame: &Frame) -> bool {
        match frame.message() {
            Message::Hello(_) => self.send(&Message::Welcome(welcome(image))),
            Message::MetadataRequest { request } => {
                let bytes = image.metadata();
                self.send(&Message::Metadata { request, bytes });
            }
            Message::Request(request) => {
                for range in request.ranges.iter() {
                    self.send_pages(image, request.request, range, |_, _| {});
                }
            }
            Message::BitmapRequest(request) => self.send_bitmap(image, request),
            Message::Ping { token } => self.send(&Message::Pong { token }),
            _ => return false,
        }
        true
    }

    /// Sends pages, their checksums and data changed by `change`.
    pub fn send_pages(
        &mut self,
        image: &Image,
        request: RequestId,
        range: PageRange,
        change: impl Fn(&mut [u64], &mut [u8]),
    ) {
        for page in range.pages() {
            let range = PageRange::new(page, 1);
            let (mut checksums, mut data) = ([0], vec![0; PAGE_SIZE]);
            image.checksums(range, Wait::Yes, &mut checksums).unwrap();
            image.read(range, Wait::Yes, &mut data).unwrap();
            change(&mut checksums, &mut data);
            data.truncate(if checksums[0] == 0 { 0 } else { PAGE_SIZE });
            let head = PagesHead {
                request,
                range,
                epoch: Epoch(0),
                encoding: Encoding::Raw,
                checksums: Checksums::from(&checksums[..]),
                data_length: data.len(),
            };
            let mut bytes = Vec::new();
            head.encode(&mut bytes).unwrap();
            self.outgoing.stamp(&mut bytes);
            bytes.append(&mut data);
            self.send_bytes(&bytes);
        }
    }

    fn send_bitmap(&mut self, image: &Image, wanted: BitmapRequest) {
        let BitmapRequest { request, kind, range } = wanted;
        let mut bits = vec![0; range.count.div_ceil(8) as usize];
        let mut rest = range;
        while let Some(run) = image.next_with_checksum(rest).unwrap() {
            for page in run.pages() {
                let bit = page.0 - range.start.0;
                bits[(bit / 8) as usize] |= 1 << (bit % 8);
            }
            rest = rest.from(run.end());
        }
        let bits = &bits;
        self.send(&Message::Bitmap(Bitmap {
            request,
            kind,
            range,
            bits,
        }));
    }
}

/// A page server that answers as a test wants. Its threads end with their connections, and with the test's process.
#[derive(Debug)]
pub struct Liar {
    path: PathBuf,
    connections: Arc<AtomicU64>,
}

impl Liar {
    /// Listens at `path`; `talk` is given each connection.
    pub fn start(path: PathBuf, talk: impl Fn(Peer) + Send + Sync + 'static) -> Self {
        let listener = UnixListener::bind(&path).unwrap();
        let talk = Arc::new(talk);
        let connections = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&connections);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                counted.fetch_add(1, Relaxed);
                let talk = Arc::clone(&talk);
                thread::spawn(move || talk(Peer::new(stream)));
            }
        });
        Self { path, connections }
    }

    /// One that answers about an image as it should, except to what `lie` says that it has answered itself.
    pub fn about(
        path: PathBuf,
        image: &Path,
        lie: impl Fn(&mut Peer, &Image, ChannelKind, &Frame) -> Lie + Send + Sync + 'static,
    ) -> Self {
        let image = Image::open(image).unwrap();
        Self::start(path, move |mut peer| {
            let mut channel = ChannelKind::Control;
            while let Some(frame) = peer.receive() {
                if let Message::Hello(hello) = frame.message() {
                    channel = hello.channel;
                }
                match lie(&mut peer, &image, channel, &frame) {
                    Lie::None if !peer.answer(&image, &frame) => return,
                    Lie::AndClose => return,
                    Lie::None | Lie::Told => {}
                }
            }
        })
    }

    /// Where it is.
    pub fn url(&self) -> String {
        format!("unix:{}", self.path.display())
    }

    /// Connections so far.
    pub fn connections(&self) -> u64 {
        self.connections.load(Relaxed)
    }
}

/// What a liar did with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// Nothing: it is still to be answered.
    None,
    /// It was answered.
    Told,
    /// The connection is to end.
    AndClose,
}
