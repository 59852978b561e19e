//! Making a snapshot of a VM that runs.
//!
//! The guest stands still while its state is read and while the pages that it has are written. The pages that are still to be
//! loaded are written after it runs again: what they hold is the source's, which no guest changes. They are read from the source
//! itself and never touched in the guest's memory, so a snapshot loads nothing and waits for no vCPU's page.
//!
//! A snapshot with a base is written as a layer over that: see `incremental`.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use thiserror::Error;
use umem::image::{Footer, ImageWriter, WriteError};
use umem::publish::UnnamedFile;
use umem::region::Region;
use umem::source::{Class, Content, PageSink, PageSource, SourceError};
use umem::states::{PageState, PageStates};
use umem::units::{PAGE_SIZE, PageIndex, PageRange};

use super::incremental::{Base, BaseError};
use super::{FILE_NAME, SnapshotState, StateError};
use crate::control::{PATIENCE, PauseError, VmState};
use crate::dirty::Changes;
use crate::kvm::{ChipsetStateError, HostError, MsrError, VcpuStateError, VmError};
use crate::machine::ParkError;

/// Pages read at a time.
const STEP: u64 = 256;

/// What is to be made.
#[derive(Clone, Debug)]
pub struct SnapshotOptions {
    /// Where it goes: a directory, which is made if it is not there. A snapshot that is in it is replaced when the new one is
    /// whole.
    pub directory: PathBuf,
    /// What the VM does after it.
    pub then: Then,
    /// How long vCPUs may take to stop.
    pub patience: Duration,
    /// The snapshot, a directory or a file, whose pages are not stored again: the new one is a layer over it, and is of no use
    /// without it.
    pub base: Option<PathBuf>,
}

impl SnapshotOptions {
    /// A snapshot in `directory`, after which the VM goes on.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            then: Then::GoOn,
            patience: PATIENCE,
            base: None,
        }
    }
}

/// What a VM does when its snapshot is made. If none could be made, it always goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// It runs, or stays paused, as before.
    GoOn,
    /// It ends. No instruction runs after those that the snapshot has seen.
    Stop,
}

/// How far a snapshot is. Told about every MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotProgress {
    /// Pages that are done.
    pub done: u64,
    /// Pages in all.
    pub total: u64,
}

/// What was made.
#[derive(Clone, Debug)]
pub struct SnapshotSummary {
    /// The file.
    pub path: PathBuf,
    /// Pages of RAM.
    pub pages: u64,
    /// Pages that are not all zero.
    pub data_pages: u64,
    /// Of all pages those that were still at the source.
    pub absent_pages: u64,
    /// Pages in the file: all, or with a base those that are not the base's.
    pub own_pages: u64,
    /// Every page that could have changed since the base was known, so that no other was compared with it.
    pub tracked: bool,
    /// Its identity.
    pub digest: [u8; 32],
    /// How long the guest stood still for it; nothing, if it was paused anyway.
    pub paused: Duration,
    /// How long it took in all.
    pub took: Duration,
}

/// Why there is no snapshot. Nothing is left of it, and the VM goes on as before.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// The VM does not run.
    #[error("no snapshot can be made: the VM is {0}")]
    WrongState(VmState),
    /// Another request has not ended yet.
    #[error("another request is being served")]
    Busy,
    /// A vCPU does not stop.
    #[error("the VM could not be paused for its snapshot")]
    Pause(#[from] PauseError),
    /// A vCPU does not give its state.
    #[error("cannot read the state of the vCPUs")]
    Vcpus(#[from] ParkError),
    /// KVM is not there any more.
    #[error("cannot read the VM's state")]
    Host(#[from] HostError),
    /// KVM does not say what there is to be read.
    #[error("cannot read the state of the vCPUs")]
    List(#[from] MsrError),
    /// A part of a vCPU's state cannot be read.
    #[error("cannot read the state of the vCPUs")]
    VcpuState(#[from] VcpuStateError),
    /// A part of the VM's state cannot be read.
    #[error("cannot read the VM's state")]
    Chipset(#[from] ChipsetStateError),
    /// The state cannot be stored.
    #[error("cannot store the VM's state")]
    State(#[from] StateError),
    /// There is no directory for it.
    #[error("cannot make directory '{}'", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It cannot be written.
    #[error("cannot write the snapshot")]
    Write(#[from] WriteError),
    /// The snapshot to be laid over is none that can be.
    #[error("cannot lay a snapshot over '{}'", path.display())]
    Base {
        /// The base.
        path: PathBuf,
        /// Why.
        source: Box<BaseError>,
    },
    /// KVM does not say which pages have changed.
    #[error("cannot tell which pages have changed")]
    Changes(#[from] VmError),
    /// The guest's memory cannot be read.
    #[error("cannot read guest memory")]
    Memory(#[source] io::Error),
    /// Pages that are not loaded yet cannot be had.
    #[error("cannot read the pages that are not loaded yet from {url}")]
    Source {
        /// The source.
        url: String,
        /// Why.
        source: SourceError,
    },
    /// Another process has the source.
    #[error(
        "{0} pages are not loaded yet, and only the pager in another process can load them: run with --memory fill=sequential, and \
         make the snapshot after the event all-pages-present"
    )]
    SourceElsewhere(u64),
}

/// Where a VM's pages are.
pub(crate) struct Memory {
    pub(crate) region: Arc<Region>,
    pub(crate) states: Arc<PageStates>,
    /// `None`: in another process.
    pub(crate) source: Option<Arc<dyn PageSource>>,
}

/// A snapshot that is being made.
pub(crate) struct Draft<'a> {
    writer: ImageWriter,
    directory: NewDirectory,
    memory: Memory,
    /// What it is laid over.
    base: Option<Base>,
    /// Units that were not settled when the guest stood still.
    absent: Vec<PageRange>,
    done: u64,
    progress: &'a mut dyn FnMut(SnapshotProgress),
    buffer: Vec<u8>,
}

impl<'a> Draft<'a> {
    /// Begins, while the guest still runs: what cannot be written is known before it stands still.
    pub(crate) fn new(
        directory: &Path,
        base: Option<&Path>,
        memory: Memory,
        progress: &'a mut dyn FnMut(SnapshotProgress),
    ) -> Result<Self, SnapshotError> {
        let directory = NewDirectory::make(directory).map_err(|source| SnapshotError::Directory {
            path: directory.to_path_buf(),
            source,
        })?;
        let path = directory.path.join(FILE_NAME);
        let base = base.map(|base| Base::open(base, &path, memory.region.pages()));
        let base = base.transpose()?;
        UnnamedFile::remove_left_behind(&path).map_err(|source| WriteError::Write {
            path: path.clone(),
            source,
        })?;
        let writer = match &base {
            None => ImageWriter::create(&path, memory.region.size())?,
            Some(base) => ImageWriter::create_layer(&path, base.image())?,
        };
        Ok(Self {
            writer,
            directory,
            memory,
            base,
            absent: Vec::new(),
            done: 0,
            progress,
            buffer: vec![0; PageRange::new(PageIndex(0), STEP).bytes()],
        })
    }

    /// Writes what the guest, which stands still, has of its memory. What it has not is remembered. `changes` is what is known of
    /// what has changed.
    pub(crate) fn write_present(&mut self, changes: Option<&Changes>) -> Result<(), SnapshotError> {
        let states = Arc::clone(&self.memory.states);
        let all = states.all();
        if let Some(base) = &mut self.base {
            base.know(changes, self.memory.source.as_deref());
        }
        // Before anything is read: a page that arrives from now on is not looked at in memory, and holds what the source has.
        self.absent = absent(&states, &self.memory.region, self.memory.source.is_none())
            .map_err(SnapshotError::Memory)?;
        let absent: u64 = self.absent.iter().map(|run| run.count).sum();
        if absent > 0 && self.memory.source.is_none() && !self.has_absent_pages() {
            return Err(SnapshotError::SourceElsewhere(absent));
        }
        let mut at = all.start;
        for index in 0..=self.absent.len() {
            let run = self.absent.get(index).copied();
            let end = run.map_or(all.end(), |run| run.start);
            self.write_settled(PageRange::new(at, end.0 - at.0))?;
            at = run.map_or(all.end(), PageRange::end);
        }
        Ok(())
    }

    /// Whether the base has every page that the guest has not.
    fn has_absent_pages(&self) -> bool {
        self.base.as_ref().is_some_and(Base::has_absent_pages)
    }

    /// Writes what may have changed of pages that the guest has.
    fn write_settled(&mut self, pages: PageRange) -> Result<(), SnapshotError> {
        let mut rest = pages;
        loop {
            let run = match &self.base {
                None => Some(rest).filter(|rest| rest.count > 0),
                Some(base) => base.next_changed(rest),
            };
            let Some(run) = run else {
                self.advance(rest.count);
                return Ok(());
            };
            self.advance(run.start.0 - rest.start.0);
            self.write_memory(run)?;
            rest = rest.from(run.end());
        }
    }

    fn write_memory(&mut self, pages: PageRange) -> Result<(), SnapshotError> {
        let region = Arc::clone(&self.memory.region);
        let mut rest = pages;
        while let Some(run) = region.next_populated(rest).map_err(SnapshotError::Memory)? {
            self.write_zero(PageRange::new(rest.start, run.start.0 - rest.start.0))?;
            for step in steps(run) {
                let buffer = &mut self.buffer[..step.bytes()];
                region.read(step, buffer).map_err(SnapshotError::Memory)?;
                self.write(step)?;
            }
            rest = rest.from(run.end());
        }
        self.write_zero(rest)
    }

    /// Writes what is still at the source, and completes the snapshot with the VM's state. Meanwhile the guest may run.
    pub(crate) fn complete(mut self, state: &SnapshotState) -> Result<Complete, SnapshotError> {
        let metadata = state.encode()?;
        let absent = std::mem::take(&mut self.absent);
        let absent_pages = absent.iter().map(|run| run.count).sum();
        if self.has_absent_pages() {
            self.advance(absent_pages);
        } else if let (Some(source), false) = (&self.memory.source, absent.is_empty()) {
            let source = Beside::open(source)?;
            for run in &absent {
                self.write_from(&source, *run)?;
            }
        }
        let path = self.directory.path.join(FILE_NAME);
        let footer = self.writer.finish_durably(&metadata)?;
        self.directory.keep();
        Ok(Complete {
            path,
            footer,
            absent_pages,
            tracked: self.base.is_some_and(|base| base.is_tracked()),
        })
    }

    fn write_from(&mut self, source: &Beside, pages: PageRange) -> Result<(), SnapshotError> {
        let mut rest = pages;
        while let Some(run) = source.next_data(rest)? {
            let run = run.from(rest.start);
            self.write_zero(PageRange::new(rest.start, run.start.0 - rest.start.0))?;
            for step in steps(run) {
                let buffer = &mut self.buffer[..step.bytes()];
                match source.read(step, buffer)? {
                    Content::Zero => self.write_zero(step)?,
                    Content::Data => self.write(step)?,
                }
            }
            rest = rest.from(run.end());
        }
        self.write_zero(rest)
    }

    /// Writes `pages`, which are in the buffer.
    fn write(&mut self, pages: PageRange) -> Result<(), SnapshotError> {
        let (contents, _) = self.buffer[..pages.bytes()].as_chunks::<PAGE_SIZE>();
        for (page, content) in pages.pages().zip(contents) {
            let known = match &mut self.base {
                None => false,
                Some(base) => base.has(page, content)?,
            };
            if !known {
                self.writer.write_page(page, content)?;
            }
        }
        self.advance(pages.count);
        Ok(())
    }

    /// Writes `pages`, which are all zero: where the base has something.
    fn write_zero(&mut self, pages: PageRange) -> Result<(), SnapshotError> {
        let mut rest = pages;
        while let Some(base) = &self.base
            && let Some(run) = base.next_data(rest)?
        {
            for page in run.pages() {
                self.writer.write_page(page, &[0; PAGE_SIZE])?;
            }
            rest = rest.from(run.end());
        }
        self.advance(pages.count);
        Ok(())
    }

    fn advance(&mut self, pages: u64) {
        self.done += pages;
        if pages > 0 {
            (self.progress)(SnapshotProgress {
                done: self.done,
                total: self.memory.states.pages(),
            });
        }
    }
}

/// A snapshot that is made.
pub(crate) struct Complete {
    pub(crate) path: PathBuf,
    pub(crate) footer: Footer,
    pub(crate) absent_pages: u64,
    pub(crate) tracked: bool,
}

/// Runs of pages that are still at the source, or on their way from it; the guest stands still.
///
/// The race: a page is installed, which wakes who waits for it, and is `Present` only after that. The guest may have written to
/// it in between. So a page that is on its way is absent only if it is not in memory. Nor is one that is said to be absent where
/// the pager is another process: the one before it may have been killed in between.
fn absent(states: &PageStates, region: &Region, pager_elsewhere: bool) -> io::Result<Vec<PageRange>> {
    let mut runs: Vec<PageRange> = Vec::new();
    for unit in states.units(states.all()) {
        match states.get(unit.start) {
            PageState::Present | PageState::Removed => continue,
            PageState::InFlight if region.holds(unit.start)? => continue,
            PageState::Absent if pager_elsewhere && region.holds(unit.start)? => continue,
            PageState::InFlight | PageState::Absent => {}
        }
        match runs.last_mut() {
            Some(run) if run.end() == unit.start => run.count += unit.count,
            _ => runs.push(unit),
        }
    }
    Ok(runs)
}

/// Pieces of at most [`STEP`] pages.
fn steps(pages: PageRange) -> impl Iterator<Item = PageRange> {
    let starts = (pages.start.0..pages.end().0).step_by(STEP as usize);
    starts.map(move |start| PageRange::new(PageIndex(start), STEP).clamp_to(pages.end()))
}

/// The source, read beside the pager: what happens to it here does not end the VM.
pub(crate) struct Beside {
    source: Arc<dyn PageSource>,
    url: String,
    failure: Arc<Failure>,
    /// It is this reader's alone.
    own: bool,
}

/// Why a source does not answer any more, which its reads do not say.
#[derive(Default)]
struct Failure(Mutex<Option<SourceError>>);

impl PageSink for Failure {
    fn arrived(&self, _: PageRange, _: Content, _: &[u8], _: Class) {}

    fn completed(&self, _: Class) {}

    fn failed(&self, error: SourceError) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }
}

impl Beside {
    pub(crate) fn open(source: &Arc<dyn PageSource>) -> Result<Self, SnapshotError> {
        let url = source.url();
        let failure = Arc::new(Failure::default());
        let own = source.beside().map_err(|source| SnapshotError::Source {
            url: url.clone(),
            source,
        })?;
        if let Some(own) = &own {
            let sink: std::sync::Weak<Failure> = Arc::downgrade(&failure);
            own.attach(sink);
        }
        Ok(Self {
            url,
            failure,
            own: own.is_some(),
            source: own.unwrap_or_else(|| Arc::clone(source)),
        })
    }

    fn failed(&self, error: SourceError) -> SnapshotError {
        let mut failure = self.failure.0.lock().unwrap_or_else(PoisonError::into_inner);
        SnapshotError::Source {
            url: self.url.clone(),
            source: failure.take().unwrap_or(error),
        }
    }

    pub(crate) fn next_data(&self, within: PageRange) -> Result<Option<PageRange>, SnapshotError> {
        if within.count == 0 {
            return Ok(None);
        }
        let run = self
            .source
            .next_data(within)
            .map_err(|error| self.failed(error))?;
        Ok(run
            .map(|run| run.clamp_to(within.end()))
            .filter(|run| run.count > 0))
    }

    pub(crate) fn read(&self, pages: PageRange, buffer: &mut [u8]) -> Result<Content, SnapshotError> {
        let content = self.source.read(pages, Class::Background, buffer);
        content.map_err(|error| self.failed(error))
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        if self.own {
            self.source.close();
        }
    }
}

/// A directory that goes again if nothing comes into it.
struct NewDirectory {
    path: PathBuf,
    made: bool,
}

impl NewDirectory {
    fn make(path: &Path) -> io::Result<Self> {
        let made = match std::fs::create_dir(path) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(error),
        };
        Ok(Self {
            path: path.to_path_buf(),
            made,
        })
    }

    fn keep(&mut self) {
        self.made = false;
    }
}

impl Drop for NewDirectory {
    fn drop(&mut self) {
        if self.made {
            // Somebody else may have put something into it meanwhile.
            let _ = std::fs::remove_dir(&self.path);
        }
    }
}
