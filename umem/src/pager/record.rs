//! Which pages were touched, in which order.

use std::sync::{Mutex, PoisonError};

use crate::units::PageIndex;

/// Pages that are recorded at most: 16 GiB of memory.
pub const MAX_TOUCHED: usize = 1 << 22;

/// The pages that came from the source because somebody touched them, in the order of these touches.
#[derive(Debug)]
pub struct TouchRecord {
    /// `None`: nothing more is recorded.
    pages: Mutex<Option<Vec<PageIndex>>>,
}

impl Default for TouchRecord {
    fn default() -> Self {
        // Room that costs nothing until it is used, so that nothing is allocated while a fault waits.
        Self {
            pages: Mutex::new(Some(Vec::with_capacity(MAX_TOUCHED))),
        }
    }
}

impl TouchRecord {
    /// A page was touched; beyond [`MAX_TOUCHED`] nothing is recorded.
    pub(super) fn add(&self, page: PageIndex) {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pages) = pages.as_mut().filter(|pages| pages.len() < MAX_TOUCHED) {
            pages.push(page);
        }
    }

    /// Ends the record, and answers what is in it.
    pub fn finish(&self) -> Vec<PageIndex> {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        pages.take().unwrap_or_default()
    }
}
