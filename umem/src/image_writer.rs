//! Making an image.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::image::{Footer, MAX_METADATA, checksum};
use crate::publish::{Existing, UnnamedFile};
use crate::units::{PAGE_SIZE, PageIndex};

/// Content is handed to the file in pieces of up to this many bytes.
const PIECE: usize = 1 << 20;

/// Why an image could not be made. Nothing is left of it.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The directory takes no file.
    #[error("cannot create image '{}'", path.display())]
    Create {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is a file of that name.
    #[error("'{}' exists already: remove it, or replace it with --force", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The disk is full, or something like it.
    #[error("cannot write image '{}'", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// More metadata than any reader takes.
    #[error("image '{}' would have {length} bytes of metadata, more than {MAX_METADATA}", path.display())]
    Metadata {
        /// The file.
        path: PathBuf,
        /// Bytes of metadata.
        length: usize,
    },
}

/// An image being written. Pages that are never written are zero.
pub struct ImageWriter {
    unnamed: UnnamedFile,
    path: PathBuf,
    ram_size: u64,
    checksums: Vec<u64>,
    data_pages: u64,
    /// Pages that follow one another from `piece_start` on, not yet handed to the file.
    piece: Vec<u8>,
    piece_start: u64,
}

impl ImageWriter {
    /// Begins an image of `ram_size` bytes, a page multiple, that is going to be `path`.
    pub fn create(path: &Path, ram_size: u64) -> Result<Self, WriteError> {
        let unnamed = UnnamedFile::create(path).map_err(|source| WriteError::Create {
            path: path.to_path_buf(),
            source,
        })?;
        let pages = ram_size / PAGE_SIZE as u64;
        Ok(Self {
            unnamed,
            path: path.to_path_buf(),
            ram_size,
            checksums: vec![0; pages as usize],
            data_pages: 0,
            piece: Vec::with_capacity(PIECE),
            piece_start: 0,
        })
    }

    /// Writes a page. Each page at most once, in any order (in rising order it is quickest).
    pub fn write_page(&mut self, page: PageIndex, content: &[u8; PAGE_SIZE]) -> Result<(), WriteError> {
        let checksum = checksum(content);
        if checksum == 0 {
            return Ok(());
        }
        self.checksums[page.0 as usize] = checksum;
        self.data_pages += 1;
        let follows = self.piece_start + self.piece.len() as u64 == page.byte_offset();
        if !follows || self.piece.len() == PIECE {
            self.flush()?;
            self.piece_start = page.byte_offset();
        }
        self.piece.extend_from_slice(content);
        Ok(())
    }

    /// Completes the image and gives it its name.
    pub fn finish(mut self, metadata: &[u8], existing: Existing) -> Result<Footer, WriteError> {
        let footer = self.complete(metadata)?;
        self.unnamed
            .publish(existing)
            .map_err(|source| match source.kind() {
                io::ErrorKind::AlreadyExists => WriteError::Exists {
                    path: self.path.clone(),
                },
                _ => WriteError::Create {
                    path: self.path.clone(),
                    source,
                },
            })?;
        Ok(footer)
    }

    /// Completes the image and puts it, in one step, in the place of another that there may be; it is on disk then
    /// ([`UnnamedFile::replace_durably`]).
    pub fn finish_durably(mut self, metadata: &[u8]) -> Result<Footer, WriteError> {
        let footer = self.complete(metadata)?;
        let path = self.path;
        self.unnamed
            .replace_durably()
            .map_err(|source| WriteError::Write { path, source })?;
        Ok(footer)
    }

    /// Writes all that is not written yet.
    fn complete(&mut self, metadata: &[u8]) -> Result<Footer, WriteError> {
        if metadata.len() > MAX_METADATA {
            return Err(WriteError::Metadata {
                path: self.path.clone(),
                length: metadata.len(),
            });
        }
        self.flush()?;
        let mut digest = blake3::Hasher::new();
        digest.update(&self.ram_size.to_le_bytes());
        let mut offset = self.ram_size;
        let checksums = std::mem::take(&mut self.checksums);
        let mut bytes = Vec::with_capacity(PAGE_SIZE);
        let mut blocks = Vec::new();
        for block in checksums.chunks(PAGE_SIZE / 8) {
            bytes.clear();
            bytes.extend(block.iter().flat_map(|checksum| checksum.to_le_bytes()));
            digest.update(&bytes);
            let block_checksum = checksum(&bytes);
            if block_checksum != 0 {
                self.write(&bytes, offset)?;
            }
            blocks.extend_from_slice(&block_checksum.to_le_bytes());
            offset += bytes.len() as u64;
        }
        self.write(&blocks, offset)?;
        offset += blocks.len() as u64;
        digest.update(metadata);
        let footer = Footer {
            ram_size: self.ram_size,
            data_pages: self.data_pages,
            metadata_length: metadata.len() as u64,
            metadata_checksum: xxhash_rust::xxh3::xxh3_64(metadata),
            blocks_checksum: xxhash_rust::xxh3::xxh3_64(&blocks),
            digest: digest.finalize().into(),
        };
        self.write(metadata, offset)?;
        self.write(&footer.encode(), offset + metadata.len() as u64)?;
        Ok(footer)
    }

    fn flush(&mut self) -> Result<(), WriteError> {
        let piece = std::mem::take(&mut self.piece);
        let result = self.write(&piece, self.piece_start);
        self.piece = piece;
        self.piece.clear();
        result
    }

    fn write(&self, bytes: &[u8], offset: u64) -> Result<(), WriteError> {
        self.unnamed
            .file()
            .write_all_at(bytes, offset)
            .map_err(|source| WriteError::Write {
                path: self.path.clone(),
                source,
            })
    }
}
