//! What a server serves.

use std::fmt;

use crate::image::{ReadError, Wait};
use crate::units::PageRange;
use crate::wire::FailCode;

/// Pages that can be served: those of an image, or of a machine that has left. Asked from several threads at once.
pub trait Provider: Send + Sync + fmt::Debug {
    /// How many there are.
    fn pages(&self) -> u64;

    /// Reads `pages` into `buffer`, which is as long, and their checksums, 0 of a page that is all zero. Where all are zero, the
    /// buffer need not be written. `None`: it would have to wait.
    fn read(
        &self,
        pages: PageRange,
        wait: Wait,
        checksums: &mut [u64],
        buffer: &mut [u8],
    ) -> Result<Option<()>, Unreadable>;

    /// The first run of pages in `within` that may hold something. May wait.
    fn next_data(&self, within: PageRange) -> Result<Option<PageRange>, Unreadable>;

    /// What a VMM has to know of them.
    fn metadata(&self) -> &[u8];
}

/// Why pages cannot be served, as the client is told.
#[derive(Clone, Debug)]
pub struct Unreadable {
    /// In a word.
    pub code: FailCode,
    /// For people.
    pub text: String,
}

impl From<ReadError> for Unreadable {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Io { .. } => Self {
                code: FailCode::Unreadable,
                text: error.to_string(),
            },
            ReadError::Corrupt { .. } | ReadError::Truncated { .. } => Self {
                code: FailCode::Corrupt,
                text: format!("the image cannot be used, it was damaged or replaced in place: {error}"),
            },
        }
    }
}
