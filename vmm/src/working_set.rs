//! Working sets as files: one is read before a run, another is written by it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use thiserror::Error;
use umem::pager::TouchRecord;
use umem::publish::{Existing, UnnamedFile};
use umem::working_set::{MAX_SIZE, WorkingSet, WorkingSetError};

/// Why a working set cannot be had, or not be kept.
#[derive(Debug, Error)]
pub enum WorkingSetFileError {
    /// The file cannot be read.
    #[error("cannot read working set '{}'", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What is in it cannot be used.
    #[error("cannot use working set '{}'", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: WorkingSetError,
    },
    /// The file cannot be written.
    #[error("cannot write working set '{}'", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Reads the working set at `path`, which must be one of an image with this digest, whose RAM has `pages` pages.
pub fn load(path: &Path, digest: Option<[u8; 32]>, pages: u64) -> Result<WorkingSet, WorkingSetFileError> {
    let fail = |source| WorkingSetFileError::Read {
        path: path.to_path_buf(),
        source,
    };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(fail)?;
    // Whatever the path leads to, no more is read than a working set can be.
    file.take(MAX_SIZE as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(fail)?;
    WorkingSet::decode(&bytes)
        .and_then(|set| set.check(digest, pages).map(|()| set))
        .map_err(|source| WorkingSetFileError::Unusable {
            path: path.to_path_buf(),
            source,
        })
}

/// What is to be recorded.
#[derive(Clone, Debug)]
pub struct Recording {
    path: PathBuf,
    time: Duration,
    touched: Arc<TouchRecord>,
}

impl Recording {
    /// A record of the first `time` of a run, to be written to `path`. Makes sure, before anything else is done, that it can be.
    pub fn new(path: &Path, time: Duration) -> Result<Self, WorkingSetFileError> {
        let recording = Self {
            path: path.to_path_buf(),
            time,
            touched: Arc::new(TouchRecord::default()),
        };
        recording.file()?;
        Ok(recording)
    }

    /// Where a pager writes down what is touched.
    pub fn touched(&self) -> &Arc<TouchRecord> {
        &self.touched
    }

    fn file(&self) -> Result<UnnamedFile, WorkingSetFileError> {
        UnnamedFile::create(&self.path).map_err(|source| self.failed(source))
    }

    fn failed(&self, source: io::Error) -> WorkingSetFileError {
        WorkingSetFileError::Write {
            path: self.path.clone(),
            source,
        }
    }

    /// Writes what was touched so far of RAM with this digest.
    fn write(&self, digest: Option<[u8; 32]>, pages: u64) -> Result<(), WorkingSetFileError> {
        let touched = self.touched.finish();
        // Without a digest nothing is recorded: see where the options are checked.
        let set = WorkingSet::new(digest.unwrap_or_default(), pages, &touched);
        let file = self.file()?;
        file.file()
            .write_all(&set.encode())
            .and_then(|()| file.publish(Existing::Replace))
            .map_err(|source| self.failed(source))?;
        tracing::info!(path = %self.path.display(), pages = set.pages(), "working set written");
        Ok(())
    }

    /// Begins to wait for the end of the time, in a thread of its own.
    pub(crate) fn start(
        self,
        digest: Option<[u8; 32]>,
        pages: u64,
    ) -> Result<RunningRecording, WorkingSetFileError> {
        let (end, ended) = mpsc::channel();
        let error = {
            let recording = self.clone();
            move |error| recording.failed(error)
        };
        let thread = thread::Builder::new()
            .name("working-set".into())
            .spawn(move || {
                // The time is over, or the VM is: either way what there is is written.
                let _ = ended.recv_timeout(self.time);
                self.write(digest, pages)
            })
            .map_err(error)?;
        Ok(RunningRecording { end, thread })
    }
}

/// A record that is being made.
pub(crate) struct RunningRecording {
    end: Sender<()>,
    thread: JoinHandle<Result<(), WorkingSetFileError>>,
}

impl RunningRecording {
    /// The VM has ended: writes the record now, if that was not done yet.
    pub(crate) fn finish(self) -> Result<(), WorkingSetFileError> {
        drop(self.end);
        // It does not panic, and if it did there would be no record to speak of.
        self.thread.join().unwrap_or(Ok(()))
    }
}
