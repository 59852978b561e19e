//! Making an image.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use crate::image::{BaseFields, Footer, Image, MAX_LAYERS, MAX_METADATA, checksum, is_zero};
use crate::image_footer::MAX_BASE_PATH;
use crate::image_verify::begin_digest;
use crate::own_pages::OwnPages;
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
    /// The base has as many layers as an image can have.
    #[error(
        "cannot lay image '{}' over '{}', which has {MAX_LAYERS} layers already: make one of all pages",
        path.display(),
        base.display()
    )]
    TooManyLayers {
        /// The file.
        path: PathBuf,
        /// Its base.
        base: PathBuf,
    },
    /// There is no way from the file to its base that could be written down.
    #[error("cannot say where '{}' is, which image '{}' is to be laid over", base.display(), path.display())]
    BasePath {
        /// The file.
        path: PathBuf,
        /// Its base.
        base: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What is known of the pages of an image that is being written.
enum Table {
    /// The checksum of each page.
    All(Vec<u64>),
    /// Of a layer.
    Own {
        /// Numbers and checksums of the pages written, in the order in which they came.
        pages: Vec<(PageIndex, u64)>,
        base_digest: [u8; 32],
        /// From the file's directory.
        base_path: PathBuf,
    },
}

/// What is written behind RAM.
struct Tables {
    base: Option<BaseFields>,
    /// The map of own pages; empty without a base.
    own_pages: Vec<u8>,
    /// Empty without a base.
    base_path: Vec<u8>,
    checksums: Vec<u64>,
}

impl Table {
    /// The tables of an image of `page_count` pages.
    fn finish(self, page_count: u64) -> Tables {
        let (mut pages, digest, path) = match self {
            Self::All(checksums) => {
                return Tables {
                    base: None,
                    own_pages: Vec::new(),
                    base_path: Vec::new(),
                    checksums,
                };
            }
            Self::Own {
                pages,
                base_digest,
                base_path,
            } => (pages, base_digest, base_path.into_os_string()),
        };
        pages.sort_unstable();
        let mut words = vec![0; page_count.div_ceil(64) as usize];
        for (page, _) in &pages {
            words[(page.0 / 64) as usize] |= 1 << (page.0 % 64);
        }
        let own_pages = OwnPages::new(words).to_bytes();
        let base_path = path.as_bytes().to_vec();
        Tables {
            base: Some(BaseFields {
                own_pages: pages.len() as u64,
                own_checksum: xxhash_rust::xxh3::xxh3_64(&own_pages),
                digest,
                path_length: base_path.len() as u64,
                path_checksum: xxhash_rust::xxh3::xxh3_64(&base_path),
            }),
            own_pages,
            base_path,
            checksums: pages.iter().map(|(_, checksum)| *checksum).collect(),
        }
    }
}

/// An image being written. Pages that are never written are zero, or the base's.
pub struct ImageWriter {
    unnamed: UnnamedFile,
    path: PathBuf,
    ram_size: u64,
    table: Table,
    data_pages: u64,
    /// Pages that follow one another from `piece_start` on, not yet handed to the file.
    piece: Vec<u8>,
    piece_start: u64,
}

impl ImageWriter {
    /// Begins an image of `ram_size` bytes, a page multiple, that is going to be `path`.
    pub fn create(path: &Path, ram_size: u64) -> Result<Self, WriteError> {
        let pages = ram_size / PAGE_SIZE as u64;
        Self::begin(path, ram_size, Table::All(vec![0; pages as usize]))
    }

    /// Begins a layer over `base` that is going to be `path`. Pages that are never written are the base's. It finds its base
    /// again as long as the way from one to the other stays the same.
    pub fn create_layer(path: &Path, base: &Image) -> Result<Self, WriteError> {
        let of = base.path();
        if base.layer_count() >= MAX_LAYERS {
            return Err(WriteError::TooManyLayers {
                path: path.to_path_buf(),
                base: of.to_path_buf(),
            });
        }
        let base_path = way_between(path, of).map_err(|source| WriteError::BasePath {
            path: path.to_path_buf(),
            base: of.to_path_buf(),
            source,
        })?;
        let table = Table::Own {
            pages: Vec::new(),
            base_digest: base.footer().digest,
            base_path,
        };
        Self::begin(path, base.footer().ram_size, table)
    }

    fn begin(path: &Path, ram_size: u64, table: Table) -> Result<Self, WriteError> {
        let unnamed = UnnamedFile::create(path).map_err(|source| WriteError::Create {
            path: path.to_path_buf(),
            source,
        })?;
        Ok(Self {
            unnamed,
            path: path.to_path_buf(),
            ram_size,
            table,
            data_pages: 0,
            piece: Vec::with_capacity(PIECE),
            piece_start: 0,
        })
    }

    /// Writes a page. Each page at most once, in any order (in rising order it is quickest).
    pub fn write_page(&mut self, page: PageIndex, content: &[u8; PAGE_SIZE]) -> Result<(), WriteError> {
        let checksum = checksum(content);
        match &mut self.table {
            Table::All(checksums) => checksums[page.0 as usize] = checksum,
            Table::Own { pages, .. } => pages.push((page, checksum)),
        }
        if checksum == 0 {
            return Ok(());
        }
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
        let table = std::mem::replace(&mut self.table, Table::All(Vec::new()));
        let Tables {
            base,
            own_pages,
            base_path,
            checksums,
        } = table.finish(self.ram_size / PAGE_SIZE as u64);
        let mut footer = Footer {
            ram_size: self.ram_size,
            data_pages: self.data_pages,
            metadata_length: metadata.len() as u64,
            metadata_checksum: xxhash_rust::xxh3::xxh3_64(metadata),
            blocks_checksum: 0,
            digest: [0; 32],
            base,
        };
        self.write_sparse(&own_pages, footer.own_offset())?;
        let mut digest = begin_digest(&footer, &own_pages);
        let mut offset = footer.table_offset();
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
        digest.update(metadata);
        footer.blocks_checksum = xxhash_rust::xxh3::xxh3_64(&blocks);
        footer.digest = digest.finalize().into();
        let end = [&blocks, metadata, &base_path, &footer.encode()].concat();
        self.write(&end, footer.blocks_offset())?;
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

    /// Writes `bytes`, but for blocks that are all zero.
    fn write_sparse(&self, bytes: &[u8], offset: u64) -> Result<(), WriteError> {
        let blocks = (offset..).step_by(PAGE_SIZE).zip(bytes.chunks(PAGE_SIZE));
        for (offset, block) in blocks.filter(|(_, block)| !is_zero(block)) {
            self.write(block, offset)?;
        }
        Ok(())
    }
}

/// The path to `base` from the directory that the file `path` is in or is going to be in.
fn way_between(path: &Path, base: &Path) -> io::Result<PathBuf> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.canonicalize()?,
        _ => Path::new(".").canonicalize()?,
    };
    let base = base.canonicalize()?;
    let common = directory.components().zip(base.components());
    let common = common.take_while(|(from, to)| from == to).count();
    let up = directory.components().skip(common).map(|_| Component::ParentDir);
    let way: PathBuf = up.chain(base.components().skip(common)).collect();
    if way.as_os_str().len() > MAX_BASE_PATH {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    Ok(way)
}
