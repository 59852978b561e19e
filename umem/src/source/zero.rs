//! Nothing but zero pages.

use super::{Class, Content, PageSource, SourceError, SourceStats};
use crate::units::PageRange;

/// The source of memory that begins empty.
#[derive(Debug)]
pub struct ZeroSource;

impl PageSource for ZeroSource {
    fn url(&self) -> String {
        "zero:".into()
    }

    fn try_read(&self, _: PageRange, _: &mut [u8]) -> Result<Option<Content>, SourceError> {
        Ok(Some(Content::Zero))
    }

    fn read(&self, _: PageRange, _: Class, _: &mut [u8]) -> Result<Content, SourceError> {
        Ok(Content::Zero)
    }

    fn next_data(&self, _: PageRange) -> Result<Option<PageRange>, SourceError> {
        Ok(None)
    }

    fn digest(&self) -> Option<[u8; 32]> {
        None
    }

    fn stats(&self) -> SourceStats {
        SourceStats::default()
    }
}
