//! What sockets of this host can do: the least round trip of a page, and a plain copy.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::CpuSet;

use super::{MeasureError, Place, Waits};
use crate::units::PAGE_SIZE;

/// A kind of stream socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Socket {
    /// A Unix socket.
    Unix,
    /// TCP over loopback.
    Tcp,
}

impl Socket {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unix => "unix",
            Self::Tcp => "tcp",
        }
    }

    fn pair(self) -> Result<(Stream, Stream), MeasureError> {
        if self == Self::Unix {
            let (here, there) = UnixStream::pair().map_err(MeasureError::os("socketpair"))?;
            return Ok((Box::new(here), Box::new(there)));
        }
        let fail = MeasureError::os::<std::io::Error>;
        let listener = TcpListener::bind("127.0.0.1:0").map_err(fail("bind"))?;
        let address = listener.local_addr().map_err(fail("getsockname"))?;
        let here = TcpStream::connect(address).map_err(fail("connect"))?;
        let there = listener.accept().map_err(fail("accept"))?.0;
        for stream in [&here, &there] {
            stream.set_nodelay(true).map_err(fail("setsockopt"))?;
        }
        Ok((Box::new(here), Box::new(there)))
    }
}

trait ReadWrite: Read + Write + Send {}

impl<T: Read + Write + Send> ReadWrite for T {}

type Stream = Box<dyn ReadWrite>;

/// Sixteen bytes there and a page back, `count` times. Who answers runs on the CPUs of the thread that calls.
pub fn round_trips(
    socket: Socket,
    place: Place,
    usable: &CpuSet,
    count: usize,
) -> Result<Waits, MeasureError> {
    place.run_as_answering(usable)?;
    let (mut here, mut there) = socket.pair()?;
    let answering = thread::spawn(move || {
        let mut request = [0; 16];
        let page = vec![0x5a; PAGE_SIZE];
        // Until the other side is closed.
        while there.read_exact(&mut request).is_ok() && there.write_all(&page).is_ok() {}
    });
    place.run_as_waiting(usable)?;
    let mut page = vec![0; PAGE_SIZE];
    let mut waits = Waits::default();
    for _ in 0..count {
        let since = Instant::now();
        here.write_all(&[1; 16]).map_err(MeasureError::os("write"))?;
        here.read_exact(&mut page).map_err(MeasureError::os("read"))?;
        waits.push(since.elapsed());
    }
    drop(here);
    answering.join().map_err(|_| MeasureError::Thread)?;
    Ok(waits)
}

/// What `iperf3` does: one connection, one buffer on either side, no look at what comes. The time for that many bytes, a multiple
/// of 256 KiB.
pub fn plain_copy(
    socket: Socket,
    place: Place,
    usable: &CpuSet,
    bytes: usize,
) -> Result<Duration, MeasureError> {
    place.run_as_answering(usable)?;
    let (mut here, mut there) = socket.pair()?;
    let begin = Arc::new(Barrier::new(2));
    let sender = {
        let begin = Arc::clone(&begin);
        thread::spawn(move || {
            let buffer = vec![0x5a; 256 << 10];
            begin.wait();
            (0..bytes / buffer.len()).try_for_each(|_| there.write_all(&buffer))
        })
    };
    place.run_as_waiting(usable)?;
    let mut buffer = vec![0; 256 << 10];
    begin.wait();
    let since = Instant::now();
    let mut got = 0;
    while got < bytes {
        match here.read(&mut buffer).map_err(MeasureError::os("read"))? {
            0 => return Err(MeasureError::Thread),
            length => got += length,
        }
    }
    let time = since.elapsed();
    sender
        .join()
        .map_err(|_| MeasureError::Thread)?
        .map_err(MeasureError::os("write"))?;
    Ok(time)
}
