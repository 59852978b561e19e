//! Events written to a file or a pipe.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use thiserror::Error;

use super::{Events, Listener};

/// How long the last events may wait to be read.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Where events are written, opened before anything happens.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

/// Why events cannot be written.
#[derive(Debug, Error)]
#[error("cannot write events to '{}'", path.display())]
pub struct EventFileError {
    path: PathBuf,
    source: io::Error,
}

impl EventFile {
    /// The file at `path`, which is made if there is none and otherwise added to.
    ///
    /// A named pipe need not have a reader: what is written before there is one waits in it, as far as there is room.
    pub fn open(path: &Path) -> Result<Self, EventFileError> {
        let mut options = OpenOptions::new();
        let pipe = path
            .metadata()
            .is_ok_and(|metadata| metadata.file_type().is_fifo());
        if pipe {
            // Linux lets a pipe be opened for both directions without waiting for anybody (fifo(7)).
            options.read(true).write(true);
        } else {
            options.append(true).create(true).custom_flags(libc::O_NOCTTY);
        }
        let file = options.open(path).map_err(|source| EventFileError {
            path: path.to_path_buf(),
            source,
        })?;
        let path = path.to_path_buf();
        Ok(Self { path, file })
    }
}

/// Writes events, in a thread of its own.
#[derive(Debug)]
pub struct EventWriter {
    events: Events,
    /// Disconnected when all is written.
    done: Receiver<()>,
}

impl EventWriter {
    /// Writes all events from now on.
    ///
    /// # Errors
    /// There is no thread for it.
    pub fn start(events: &Events, file: EventFile) -> io::Result<Self> {
        let (running, done) = mpsc::channel();
        let listener = events.listen();
        thread::Builder::new().name("events".into()).spawn(move || {
            write_all(listener, file);
            drop(running);
        })?;
        Ok(Self {
            events: events.clone(),
            done,
        })
    }

    /// Ends the events. What nobody reads within a while is lost.
    pub fn finish(self) {
        self.events.end();
        if self.done.recv_timeout(LAST_WORDS) == Err(mpsc::RecvTimeoutError::Timeout) {
            tracing::warn!("nobody reads the last events; they are lost");
        }
    }
}

fn write_all(mut listener: Listener, mut file: EventFile) {
    while let Some(line) = listener.next() {
        // In one piece, so that the lines of several writers to one file stay lines.
        if let Err(error) = file.file.write_all(line.as_bytes()) {
            tracing::warn!(path = %file.path.display(), %error, "no more events are written");
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Event;
    use std::io::{BufRead, BufReader};
    use std::time::Instant;

    fn exit(code: u32) -> Event {
        Event::Exit {
            outcome: "guest-exit",
            code: Some(code),
            error: None,
        }
    }

    #[test]
    fn a_file_is_added_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events");
        for code in [1, 2] {
            let events = Events::new(Instant::now());
            let writer = EventWriter::start(&events, EventFile::open(&path).unwrap()).unwrap();
            events.tell(&exit(code));
            writer.finish();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let codes: Vec<_> = text
            .lines()
            .map(|line| {
                serde_json::from_str::<serde_json::Value>(line).unwrap()["properties"]["code"].clone()
            })
            .collect();
        assert_eq!(codes, [1, 2]);
    }

    /// Whether anybody reads, and when, holds up nobody.
    #[test]
    fn a_pipe_needs_no_reader() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        let events = Events::new(Instant::now());
        let writer = EventWriter::start(&events, EventFile::open(&path).unwrap()).unwrap();
        // More than a pipe and the backlog take.
        for code in 0..10_000 {
            events.tell(&exit(code));
        }
        let mut lines = BufReader::new(File::open(&path).unwrap())
            .lines()
            .map(Result::unwrap);
        let missed: Vec<_> = lines
            .by_ref()
            .take_while(|line| !line.contains("\"code\":9999"))
            .filter(|line| line.contains("\"missed\""))
            .collect();
        assert!(!missed.is_empty(), "there is room for more than is thought");
        writer.finish();
    }

    #[test]
    fn where_nothing_can_be_written_is_known_at_once() {
        let directory = tempfile::tempdir().unwrap();
        assert!(EventFile::open(directory.path()).is_err());
        assert!(EventFile::open(&directory.path().join("missing/events")).is_err());
    }
}
