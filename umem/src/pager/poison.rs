//! The end of waiting: pages that nobody will bring any more.

use std::io;

use super::Pager;
use super::stripe::{Piece, Stripe};
use crate::states::PageStates;
use crate::uffd::{InstallError, Installed};
use crate::units::{PAGE_SIZE, PageIndex, PageRange};

impl Pager {
    /// Nobody brings what is absent any more: who waits for it, or touches it from now on, gets SIGBUS; where the kernel cannot do
    /// that for single pages (before Linux 6.6), SIGSEGV. For memory of this process alone.
    pub fn poison_absent(&self) -> io::Result<()> {
        let shared = &self.shared;
        let mut at = PageIndex(0);
        while let Some(pages) = next_unsettled(&shared.states, at) {
            for stripe in &shared.stripes {
                let placement = stripe.placement();
                for piece in placement.pieces_of(pages) {
                    poison(stripe, piece, &shared.states)?;
                }
            }
            at = pages.end();
        }
        Ok(())
    }
}

/// The first run of pages from `from` on that are not settled.
fn next_unsettled(states: &PageStates, from: PageIndex) -> Option<PageRange> {
    let mut rest = states.all().from(from).pages();
    let start = rest.find(|page| !states.is_settled(*page))?;
    let more = rest.take_while(|page| !states.is_settled(*page)).count();
    Some(PageRange::new(start, 1 + more as u64))
}

fn poison(stripe: &Stripe, mut piece: Piece, states: &PageStates) -> io::Result<()> {
    while piece.pages.count > 0 {
        let Installed { bytes, stopped } = stripe.uffd.poison(piece.addresses());
        let mut done = bytes / PAGE_SIZE as u64;
        match stopped {
            None => return Ok(()),
            // Who installed it was gone before it could say so.
            Some(InstallError::Exists) => {
                let unit = states.unit_of(piece.pages.start);
                stripe.wake(piece.addresses());
                states.claim(unit);
                states.arrive(unit, crate::states::Arrival::Demand);
                done = done.max(unit.count);
            }
            // The event is read by who reads it, with the placement let go of; the rest of its pages is looked for there next time.
            Some(InstallError::Changing) if bytes > 0 => {}
            Some(_) => {
                let (start, length) = (piece.start.0 as *mut libc::c_void, piece.pages.bytes());
                // SAFETY: of these pages none is there, so nobody loses anything that could be read.
                if unsafe { libc::mprotect(start, length, libc::PROT_NONE) } != 0 {
                    return Err(io::Error::last_os_error());
                }
                stripe.wake(piece.addresses());
                return Ok(());
            }
        }
        piece.start.0 += done * PAGE_SIZE as u64;
        piece.pages = piece.pages.from(piece.pages.start.advance(done));
    }
    Ok(())
}
