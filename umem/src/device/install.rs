//! Putting pages that were served into the memory, from the server's process.

use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::gate::{Gate, Inside, Place};
use crate::image::is_zero;
use crate::pager::INSTALL_STEP;
use crate::states::{Arrival, Claim, PageStates};
use crate::uffd::{InstallError, Installed, Userfaultfd};
use crate::units::{HostAddress, PAGE_SIZE, PageIndex, PageRange};

/// How long the client may take to read the event that is in the way. After that it installs the page itself.
const PATIENCE: Duration = Duration::from_millis(100);

/// How pages are to be installed.
#[derive(Clone, Copy)]
pub(super) enum Way<'a> {
    /// As copies of these bytes.
    Copy(&'a [u8]),
    /// As they are in the file behind the memory.
    Continue,
    /// They are moved from here on, in this process.
    Move(*mut u8),
}

impl Way<'_> {
    /// Without the first `pages` of them.
    fn skip(self, pages: u64) -> Self {
        let bytes = pages as usize * PAGE_SIZE;
        match self {
            Self::Copy(content) => Self::Copy(&content[bytes..]),
            Self::Continue => Self::Continue,
            Self::Move(from) => Self::Move(from.wrapping_add(bytes)),
        }
    }

    /// The first of `count` pages that are all zero, or are not, and whether they are.
    fn alike(self, count: u64) -> (u64, bool) {
        let Self::Copy(content) = self else {
            return (count, false);
        };
        let mut zero = content.chunks(PAGE_SIZE).take(count as usize).map(is_zero);
        let first = zero.next().unwrap_or(false);
        (1 + zero.take_while(|zero| *zero == first).count() as u64, first)
    }
}

/// What is left to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// Nothing.
    Nothing,
    /// The pages from here on, for the pager: they may not be where they were mapped, and it knows where they are.
    Elsewhere(PageRange),
}

/// Who installs.
pub(super) enum By<'a> {
    /// The client itself, before its memory is anybody's to drop or to move.
    Client,
    /// A server, by its place at the gate if it has one.
    Server {
        gate: &'a Gate,
        place: Option<Place>,
        is_client_gone: &'a dyn Fn() -> bool,
    },
}

/// Whether a page may be installed now.
enum Entry<'a> {
    /// Yes, while this is held.
    Inside(Option<Inside<'a>>),
    /// No, but the pager can.
    Elsewhere,
    /// There is no client.
    Gone,
}

impl By<'_> {
    fn enter(&self) -> Entry<'_> {
        let (gate, place, is_client_gone) = match self {
            Self::Client => return Entry::Inside(None),
            Self::Server {
                gate,
                place,
                is_client_gone,
            } => (gate, place, is_client_gone),
        };
        let Some(place) = place else {
            return Entry::Elsewhere;
        };
        match gate.enter(*place, is_client_gone) {
            None => Entry::Gone,
            Some(_) if gate.has_moved() => Entry::Elsewhere,
            Some(inside) => Entry::Inside(Some(inside)),
        }
    }
}

/// The memory as it was mapped.
#[derive(Debug)]
pub(super) struct Installer {
    pub(super) uffd: Userfaultfd,
    /// Which pages are mapped, and where the first of them is.
    pub(super) pages: PageRange,
    pub(super) start: HostAddress,
}

impl Installer {
    pub(super) fn addresses(&self, pages: PageRange) -> Range<HostAddress> {
        let offset = (pages.start.0 - self.pages.start.0) * PAGE_SIZE as u64;
        let start = self.start.0 + offset;
        HostAddress(start)..HostAddress(start + pages.bytes() as u64)
    }

    /// Wakes all who wait, to look again.
    pub(super) fn wake_all(&self) {
        self.wake(self.pages);
    }

    pub(super) fn wake(&self, pages: PageRange) {
        if let Err(error) = self.uffd.wake(self.addresses(pages)) {
            tracing::debug!(%error, "cannot wake");
        }
    }

    /// Installs claimed pages, which are among those mapped, wakes who waits for them, and marks them: those that are wanted still.
    pub(super) fn install(
        &self,
        by: &By<'_>,
        states: &PageStates,
        pages: PageRange,
        arrival: Arrival,
        way: Way<'_>,
    ) -> Result<Left, InstallError> {
        let mut rest = pages;
        let mut stuck = None;
        while rest.count > 0 {
            let inside = match by.enter() {
                Entry::Inside(inside) => inside,
                Entry::Elsewhere => return Ok(Left::Elsewhere(rest)),
                Entry::Gone => return Ok(Left::Nothing),
            };
            let is_wanted = |page: &PageIndex| !states.is_settled(*page);
            let wanted = rest
                .pages()
                .take(INSTALL_STEP as usize)
                .take_while(is_wanted)
                .count() as u64;
            if wanted == 0 {
                // Dropped since it was claimed, or served by somebody else.
                rest = rest.from(rest.start.advance(1));
                continue;
            }
            let way = way.skip(rest.start.0 - pages.start.0);
            let (count, zero) = way.alike(wanted);
            let run = PageRange::new(rest.start, count);
            let Installed { bytes, stopped } = self.place(run, way, zero);
            let mut done = PageRange::new(run.start, bytes / PAGE_SIZE as u64);
            let mut how = if zero { Arrival::Zero } else { arrival };
            match stopped {
                None => {}
                // Somebody else served it at the same time.
                Some(InstallError::Exists) => {
                    done = PageRange::single(run.start);
                    self.wake(done);
                }
                Some(InstallError::Changing) if bytes > 0 => stuck = None,
                Some(InstallError::Changing) => {
                    if stuck.get_or_insert_with(Instant::now).elapsed() >= PATIENCE {
                        return Ok(Left::Elsewhere(rest));
                    }
                    // Outside, or the client could not read it.
                    drop(inside);
                    thread::yield_now();
                    continue;
                }
                Some(InstallError::NotRegistered) => return Ok(Left::Elsewhere(rest)),
                // Nobody is left who could miss it.
                Some(InstallError::Gone) => return Ok(Left::Nothing),
                // A page that the server never wrote to.
                Some(InstallError::Other(Errno::FAULT)) if matches!(way, Way::Continue) => {
                    done = PageRange::single(run.start);
                    how = Arrival::Zero;
                    match self.uffd.zero(self.addresses(done)).stopped {
                        None => {}
                        Some(InstallError::Exists) => self.wake(done),
                        Some(error) => return Err(error),
                    }
                }
                Some(error) => return Err(error),
            }
            for page in done.pages() {
                mark(states, PageRange::single(page), how);
            }
            rest = rest.from(done.end());
        }
        Ok(Left::Nothing)
    }

    fn place(&self, pages: PageRange, way: Way<'_>, zero: bool) -> Installed {
        let addresses = self.addresses(pages);
        match way {
            Way::Copy(_) if zero => self.uffd.zero(addresses),
            Way::Copy(content) => self.uffd.copy(addresses.start, &content[..pages.bytes()]),
            Way::Continue => self.uffd.continue_(addresses),
            // SAFETY: who asked for it gave its pages away.
            Way::Move(from) => unsafe { self.uffd.move_(addresses, from) },
        }
    }
}

/// The page is there. It stays what it is where the client has dropped it meanwhile, or another has marked it; where it was given up
/// (what was asked for is asked for again), it is claimed once more.
fn mark(states: &PageStates, page: PageRange, how: Arrival) {
    if !states.arrive(page, how) && states.claim(page) == Claim::Granted {
        states.arrive(page, how);
    }
}
