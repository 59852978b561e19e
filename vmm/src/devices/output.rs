//! The guest's output, on its way from single characters to few system calls.
//!
//! A line is written when it is complete or [`BUFFER_SIZE`] long. Anything else (a prompt, the echo of a key) is written by
//! the event loop when the [`Tick`] is over. So each character is on its way within ten milliseconds, and a chatty guest
//! costs about a system call a line.

use std::{
    io::{self, Write},
    os::fd::OwnedFd,
    sync::Arc,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use tracing::{info, warn};

use super::tick::Tick;

/// Less than `PIPE_BUF`, so that a pipe that is reported as writable takes it all without waiting.
const BUFFER_SIZE: usize = 128;

/// How long the last of the guest's output may wait to be read.
const LAST_WORDS: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// Where the guest's output goes.
#[derive(Debug)]
pub(super) struct Output {
    /// `None` once nobody can read it any more; then output is dropped.
    sink: Option<OwnedFd>,
    buffer: Vec<u8>,
    tick: Arc<Tick>,
}

impl Output {
    pub(super) fn new(sink: OwnedFd, tick: Arc<Tick>) -> Self {
        Self {
            sink: Some(sink),
            buffer: Vec::with_capacity(BUFFER_SIZE),
            tick,
        }
    }

    /// Writes what there is, and waits until it is written. A slow reader slows the guest down; nothing is lost.
    pub(super) fn flush_now(&mut self) {
        let mut rest = &self.buffer[..];
        while let (Some(sink), false) = (&self.sink, rest.is_empty()) {
            match rustix::io::write(sink, rest) {
                Ok(written) => rest = &rest[written..],
                Err(Errno::INTR) => {}
                // Somebody else made the terminal or pipe non-blocking.
                Err(Errno::AGAIN) => {
                    let _ = poll(&mut [PollFd::new(sink, PollFlags::OUT)], None);
                }
                Err(Errno::PIPE) => {
                    info!("nobody reads the guest's output any more; it is dropped from here on");
                    self.sink = None;
                }
                Err(error) => {
                    warn!(%error, "cannot write the guest's output; it is dropped from here on");
                    self.sink = None;
                }
            }
        }
        self.buffer.clear();
    }

    /// Writes what there is if that needs no waiting; false if there is something left.
    pub(super) fn try_flush(&mut self) -> bool {
        if self.buffer.is_empty() {
            return true;
        }
        if let Some(sink) = &self.sink {
            let now = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            if poll(&mut [PollFd::new(sink, PollFlags::OUT)], Some(&now)) != Ok(1) {
                return false;
            }
        }
        self.flush_now();
        true
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            self.buffer.push(*byte);
            if *byte == b'\n' || self.buffer.len() == BUFFER_SIZE {
                self.flush_now();
            }
        }
        if !self.buffer.is_empty() {
            self.tick.arm();
        }
        Ok(bytes.len())
    }

    /// The serial port calls it after every character, so it is not the time to write.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Output {
    /// What a reader does not take within a while is lost: the report and the exit code do not wait for it.
    fn drop(&mut self) {
        let Some(sink) = &self.sink else { return };
        if self.buffer.is_empty() {
            return;
        }
        match poll(&mut [PollFd::new(sink, PollFlags::OUT)], Some(&LAST_WORDS)) {
            Ok(0) => warn!(
                bytes = self.buffer.len(),
                "nobody reads the guest's last output; it is lost"
            ),
            _ => self.flush_now(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs::File, io::Read};

    fn output() -> (Output, File) {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
        (Output::new(writer, Arc::new(Tick::new().unwrap())), reader.into())
    }

    fn read(reader: &mut File) -> Vec<u8> {
        let mut bytes = [0; 4096];
        match reader.read(&mut bytes) {
            Ok(length) => bytes[..length].to_vec(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Vec::new(),
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn a_line_is_written_when_it_is_complete() {
        let (mut output, mut reader) = output();
        output.write_all(b"round=3 ").unwrap();
        assert_eq!(read(&mut reader), b"");
        output.write_all(b"worst_gap_us=812\n").unwrap();
        assert_eq!(read(&mut reader), b"round=3 worst_gap_us=812\n");
    }

    #[test]
    fn a_long_line_does_not_wait_for_its_end() {
        let (mut output, mut reader) = output();
        output.write_all(&[b'x'; BUFFER_SIZE + 1]).unwrap();
        assert_eq!(read(&mut reader).len(), BUFFER_SIZE);
        assert!(output.try_flush());
        assert_eq!(read(&mut reader).len(), 1);
    }

    #[test]
    fn what_is_left_is_written_at_the_end() {
        let (mut output, mut reader) = output();
        output.write_all(b"no newline").unwrap();
        drop(output);
        assert_eq!(read(&mut reader), b"no newline");
    }

    #[test]
    fn a_full_pipe_is_not_waited_for_when_it_need_not_be() {
        let (mut output, mut reader) = output();
        let sink = output.sink.as_ref().unwrap();
        while rustix::io::write(sink, &[0; 4096]).is_ok() {}
        output.write_all(b"$ ").unwrap();
        assert!(!output.try_flush());
        while !read(&mut reader).is_empty() {}
        assert!(output.try_flush());
        assert_eq!(read(&mut reader), b"$ ");
    }

    #[test]
    fn the_end_does_not_wait_for_ever_for_a_reader() {
        let (mut output, _reader) = output();
        let sink = output.sink.as_ref().unwrap();
        while rustix::io::write(sink, &[0; 4096]).is_ok() {}
        // As a program's standard output is: a write to it waits.
        rustix::io::ioctl_fionbio(sink, false).unwrap();
        output.write_all(b"$ ").unwrap();
        drop(output);
    }

    #[test]
    fn output_that_nobody_reads_is_dropped() {
        let (mut output, reader) = output();
        drop(reader);
        for _ in 0..3 {
            output.write_all(b"lost\n").unwrap();
        }
        assert!(output.sink.is_none());
        assert!(output.buffer.is_empty());
    }
}
