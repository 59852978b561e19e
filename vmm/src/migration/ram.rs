//! The RAM of a VM that is leaving or has left, to be sent page by page: what this process has from memory, what is still absent from
//! the page source, beside the guest and its pager.

use std::sync::{Arc, OnceLock};

use umem::image::{Wait, checksum};
use umem::region::{CollapsePutOff, Region};
use umem::server::{Provider, Unreadable};
use umem::source::Content;
use umem::states::PageState;
use umem::units::{PAGE_SIZE, PageIndex, PageRange};
use umem::wire::FailCode;
use vm_memory::GuestAddress;

use super::MigrationError;
use crate::dirty::PageBitmap;
use crate::kvm::pages_at_hand;
use crate::snapshot::{Beside, Memory, SnapshotState};

/// A few pages: 256 KiB.
const FEW: u64 = 64;

/// As many pages as are looked at for being alike at a time: 256 MiB.
const MANY: u64 = 1 << 16;

/// RAM, to be read.
pub(super) struct LeavingRam {
    memory: Memory,
    /// Opened when the first absent page is wanted.
    beside: OnceLock<Result<Beside, String>>,
    /// Huge pages would be put together to be sent page by page.
    _small: CollapsePutOff,
}

impl std::fmt::Debug for LeavingRam {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LeavingRam").finish_non_exhaustive()
    }
}

/// Whether a page is in this process' memory. One that is on its way may be: it is installed, and then `Present`, and the guest may have
/// written to it in between.
fn is_here(memory: &Memory, page: PageIndex) -> Result<bool, String> {
    match memory.states.get(page) {
        PageState::Present | PageState::Removed => Ok(true),
        PageState::InFlight => memory.region.holds(page).map_err(|error| error.to_string()),
        PageState::Absent => Ok(false),
    }
}

impl LeavingRam {
    /// # Errors
    /// Pages are absent, and their source is another process's.
    pub(super) fn new(memory: Memory) -> Result<Self, MigrationError> {
        let counts = memory.states.counts();
        let absent = counts.absent + counts.in_flight;
        if memory.source.is_none() && absent > 0 {
            return Err(MigrationError::SourceElsewhere(absent));
        }
        Ok(Self {
            _small: memory.region.put_off_collapse(),
            memory,
            beside: OnceLock::new(),
        })
    }

    /// The first pages of `within` that are all here or all absent, and which of it.
    fn alike(&self, within: PageRange) -> Result<(PageRange, bool), String> {
        if self.memory.states.all_settled() {
            return Ok((within, true));
        }
        let within = within.clamp_to(within.start.advance(MANY));
        let here = is_here(&self.memory, within.start)?;
        let mut run = PageRange::new(within.start, 1);
        while run.end() < within.end() && is_here(&self.memory, run.end())? == here {
            run.count += 1;
        }
        Ok((run, here))
    }

    fn beside(&self) -> Result<&Beside, String> {
        let opened = self.beside.get_or_init(|| {
            let Some(source) = &self.memory.source else {
                return Err("their source is another process's".into());
            };
            Beside::open(source).map_err(|error| umem::causes::chain(&error))
        });
        opened.as_ref().map_err(Clone::clone)
    }

    /// The first pages in `within` that may hold something: what is before them is zero. `here` finds them in memory.
    fn first_found(
        &self,
        within: PageRange,
        here: impl Fn(&Region, PageRange) -> std::io::Result<Option<PageRange>>,
    ) -> Result<Option<PageRange>, String> {
        let mut rest = within;
        while rest.count > 0 {
            let (run, is_here) = self.alike(rest)?;
            let found = if is_here {
                here(&self.memory.region, run).map_err(|error| error.to_string())?
            } else {
                let data = self.beside()?.next_data(run);
                data.map_err(|error| umem::causes::chain(&error))?
            };
            if let Some(found) = found {
                return Ok(Some(found.from(run.start).clamp_to(run.end())));
            }
            rest = rest.from(run.end());
        }
        Ok(None)
    }

    /// The first pages in `within` that may hold something, to their end.
    pub(super) fn next_data(&self, within: PageRange) -> Result<Option<PageRange>, String> {
        self.first_found(within, Region::next_populated)
    }

    /// The first pages in `within`, of a few, that may hold something. Some of them may be zero.
    pub(super) fn next_few(&self, within: PageRange) -> Result<Option<PageRange>, String> {
        // Not to the end of what is there, which may be all of RAM: for each few pages that would be looked for anew.
        self.first_found(within, |region, run| {
            let first = region.first_populated(run)?;
            Ok(first.map(|first| PageRange::new(first, FEW - first.0 % FEW)))
        })
    }

    /// Reads `pages`, and their checksums. `false`: it would have to wait, and was not to.
    pub(super) fn read(
        &self,
        pages: PageRange,
        wait: Wait,
        checksums: &mut [u64],
        buffer: &mut [u8],
    ) -> Result<bool, String> {
        let mut rest = pages;
        while rest.count > 0 {
            let (run, here) = self.alike(rest)?;
            if !here && wait == Wait::No {
                return Ok(false);
            }
            let offset = PageRange::new(pages.start, run.start.0 - pages.start.0).bytes();
            let into = &mut buffer[offset..offset + run.bytes()];
            if here {
                self.read_memory(run, into)?;
            } else {
                let content = self.beside()?.read(run, into);
                if content.map_err(|error| umem::causes::chain(&error))? == Content::Zero {
                    into.fill(0);
                }
            }
            rest = rest.from(run.end());
        }
        let (contents, _) = buffer[..pages.bytes()].as_chunks::<PAGE_SIZE>();
        for (content, into) in contents.iter().zip(checksums) {
            *into = checksum(content);
        }
        Ok(true)
    }

    /// What has no memory is not touched: it would have some then.
    fn read_memory(&self, pages: PageRange, buffer: &mut [u8]) -> Result<(), String> {
        let region = &self.memory.region;
        let said = |error: std::io::Error| error.to_string();
        if region.memfd().is_some() {
            return region.read(pages, buffer).map_err(said);
        }
        buffer[..pages.bytes()].fill(0);
        let mut rest = pages;
        while rest.count > 0
            && let Some(run) = region.next_populated(rest).map_err(said)?
        {
            let offset = PageRange::new(pages.start, run.start.0 - pages.start.0).bytes();
            let into = &mut buffer[offset..offset + run.bytes()];
            region.read(run, into).map_err(said)?;
            rest = rest.from(run.end());
        }
        Ok(())
    }

    pub(super) fn pages(&self) -> u64 {
        self.memory.states.pages()
    }

    /// The pages that the vCPUs need to go on from `state`, of those that are here.
    pub(super) fn at_hand(&self, state: &SnapshotState) -> PageBitmap {
        let mut pages = PageBitmap::new(self.pages());
        let Ok(map) = state.ram() else { return pages };
        let page_at = |address| map.offset_of(GuestAddress(address)).map(PageIndex::containing);
        let table = |address| {
            let page = page_at(address).filter(|page| is_here(&self.memory, *page) == Ok(true))?;
            let mut content = [0; PAGE_SIZE];
            self.read_memory(PageRange::single(page), &mut content).ok()?;
            let (entries, _) = content.as_chunks::<8>();
            let entries: Vec<u64> = entries.iter().map(|entry| u64::from_le_bytes(*entry)).collect();
            entries.into_boxed_slice().try_into().ok()
        };
        for vcpu in state.vcpus() {
            for page in pages_at_hand(vcpu, table).into_iter().filter_map(page_at) {
                if is_here(&self.memory, page) == Ok(true) {
                    pages.insert(page);
                }
            }
        }
        pages
    }
}

fn unreadable(text: String) -> Unreadable {
    Unreadable {
        code: FailCode::Unreadable,
        text,
    }
}

impl Provider for LeavingRam {
    fn pages(&self) -> u64 {
        self.memory.states.pages()
    }

    fn read(
        &self,
        pages: PageRange,
        wait: Wait,
        checksums: &mut [u64],
        buffer: &mut [u8],
    ) -> Result<Option<()>, Unreadable> {
        let read = Self::read(self, pages, wait, checksums, buffer).map_err(unreadable)?;
        Ok(read.then_some(()))
    }

    fn next_data(&self, within: PageRange) -> Result<Option<PageRange>, Unreadable> {
        Self::next_data(self, within).map_err(unreadable)
    }

    fn metadata(&self) -> &[u8] {
        &[]
    }
}

/// Shared by all channels.
pub(super) type SharedRam = Arc<LeavingRam>;
