//! Page data made shorter: lz4 blocks, of a length that both sides know before.

use lz4_flex::block;

use super::WireError;

/// How long the buffer of [`Compressor::compress`] must be for `length` bytes.
pub const fn bound(length: usize) -> usize {
    block::get_maximum_output_size(length)
}

/// What a thread that compresses keeps from one time to the next.
pub struct Compressor {
    table: block::CompressTable,
}

impl Default for Compressor {
    fn default() -> Self {
        Self {
            table: block::CompressTable::large(),
        }
    }
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compressor").finish_non_exhaustive()
    }
}

impl Compressor {
    /// Compresses `data` into `buffer`, which is at least [`bound`] long. `None`: it does not become shorter, or the buffer
    /// is too small; send it as it is.
    pub fn compress<'b>(&mut self, data: &[u8], buffer: &'b mut [u8]) -> Option<&'b [u8]> {
        let length = block::compress_into_with_table(data, buffer, &mut self.table).ok()?;
        (length < data.len()).then(|| &buffer[..length])
    }
}

/// Decompresses `data` into all of `into`. Nothing is ever written beyond it, and less than all of it is an error.
pub fn decompress(data: &[u8], into: &mut [u8]) -> Result<(), WireError> {
    match block::decompress_into(data, into) {
        Ok(length) if length == into.len() => Ok(()),
        _ => Err(WireError::Lz4 { expected: into.len() }),
    }
}
