//! RAM images: a guest's memory in a file, with what is needed to check it page by page.
//!
//! ```text
//! offset              content
//! 0                   RAM, raw; a page that is all zero is a hole
//! ram_size            checksum table: one little-endian u64 a page; a block of zeros is a hole
//! ... + 8 * pages     block checksums: one little-endian u64 for every 4096 bytes of the checksum table
//! metadata_offset     metadata: bytes that mean nothing here (the VMM's: how to start the guest)
//! file end - 112      footer
//!
//! footer (little-endian)
//! offset  size  field
//!      0     8  magic "umemimg\0"
//!      8     4  version, 1
//!     12     4  page size, 4096
//!     16     8  ram_size in bytes, a page multiple
//!     24     8  data_pages: pages that are not all zero
//!     32     8  metadata_offset = ram_size + 8 * pages + 8 * blocks
//!     40     8  metadata_length, at most 1 MiB
//!     48     8  xxh3-64 of the metadata
//!     56     8  xxh3-64 of the block checksums
//!     64    32  digest: blake3 of ram_size, checksum table and metadata
//!     96     8  xxh3-64 of the footer up to here
//!    104     8  magic again
//! ```
//!
//! A checksum is the xxh3-64 of the bytes (of a page, of a block of the table), or 0 for bytes that are all zero (others whose
//! hash is 0 have 1). It is there to find damage, not to keep out somebody who can write the file. The table decides which
//! pages are zero, so each block of it is checked before it is believed: a part of the file that reads as zeros, as it does
//! after a crash or a bad copy, is damage and not zero pages. Blocks are read when they are needed, so opening an image of any
//! size takes the same few reads.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

use crate::checksums::{Block, CHECKSUMS_PER_BLOCK, ChecksumTable};
pub use crate::image_writer::{ImageWriter, WriteError};
use crate::units::{PAGE_SIZE, PageIndex, PageRange};

/// The first and the last bytes of the footer.
pub(crate) const MAGIC: [u8; 8] = *b"umemimg\0";
/// The one version there is.
pub(crate) const VERSION: u32 = 1;
/// Bytes in the footer.
pub(crate) const FOOTER_SIZE: usize = 112;
/// The most metadata that is read.
pub const MAX_METADATA: usize = 1 << 20;

/// Why a file is no image that can be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It cannot be opened or read.
    #[error("cannot read image '{}'", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its end does not say that it is one.
    #[error(
        "'{}' is not a umem image, or its end is missing: no trailer in its last bytes (make one with 'umem image create')",
        path.display()
    )]
    NotAnImage {
        /// The file.
        path: PathBuf,
    },
    /// It is an image of another version.
    #[error("image '{}' has format version {version}, this program reads version {VERSION}: make it anew", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// What it says of itself does not fit together.
    #[error("image '{}' is corrupt: {what}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
}

/// Why a page could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The content is not what the image's maker put there.
    #[error("page {page} of image '{}' does not match its checksum", path.display())]
    Corrupt {
        /// The page.
        page: PageIndex,
        /// The file.
        path: PathBuf,
    },
    /// The file has become shorter.
    #[error("image '{}' ends before page {page}: it was truncated while in use", path.display())]
    Truncated {
        /// The page.
        page: PageIndex,
        /// The file.
        path: PathBuf,
    },
    /// The file cannot be read.
    #[error("cannot read page {page} of image '{}'", path.display())]
    Io {
        /// The page.
        page: PageIndex,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The footer's fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Size of the guest's RAM in bytes.
    pub ram_size: u64,
    /// Pages that are not all zero.
    pub data_pages: u64,
    /// Bytes of metadata.
    pub metadata_length: u64,
    /// xxh3-64 of the metadata.
    pub metadata_checksum: u64,
    /// xxh3-64 of the block checksums.
    pub blocks_checksum: u64,
    /// The image's identity.
    pub digest: [u8; 32],
}

impl Footer {
    /// How many pages of RAM there are.
    pub fn pages(&self) -> u64 {
        self.ram_size / PAGE_SIZE as u64
    }

    /// Where the block checksums lie.
    pub fn blocks_offset(&self) -> u64 {
        self.ram_size + self.pages() * 8
    }

    /// Where the metadata lies.
    pub fn metadata_offset(&self) -> u64 {
        self.blocks_offset() + self.pages().div_ceil(CHECKSUMS_PER_BLOCK) * 8
    }

    /// How long the whole file is.
    pub fn file_size(&self) -> u64 {
        self.metadata_offset() + self.metadata_length + FOOTER_SIZE as u64
    }

    /// The footer as it is stored.
    pub fn encode(&self) -> [u8; FOOTER_SIZE] {
        let mut bytes = [0; FOOTER_SIZE];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(12, &(PAGE_SIZE as u32).to_le_bytes());
        put(16, &self.ram_size.to_le_bytes());
        put(24, &self.data_pages.to_le_bytes());
        put(32, &self.metadata_offset().to_le_bytes());
        put(40, &self.metadata_length.to_le_bytes());
        put(48, &self.metadata_checksum.to_le_bytes());
        put(56, &self.blocks_checksum.to_le_bytes());
        put(64, &self.digest);
        put(104, &MAGIC);
        let checksum = xxhash_rust::xxh3::xxh3_64(&bytes[..96]);
        bytes[96..104].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads a footer; the error says what is wrong with it.
    pub fn decode(bytes: &[u8; FOOTER_SIZE]) -> Result<Self, FooterError> {
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        if bytes[..8] != MAGIC && bytes[104..] != MAGIC {
            return Err(FooterError::NoMagic);
        }
        if u64_at(96) != xxhash_rust::xxh3::xxh3_64(&bytes[..96])
            || bytes[..8] != MAGIC
            || bytes[104..] != MAGIC
        {
            return Err(FooterError::Damaged(
                "its footer does not match the footer's checksum".into(),
            ));
        }
        if u32_at(8) != VERSION {
            return Err(FooterError::Version(u32_at(8)));
        }
        let footer = Self {
            ram_size: u64_at(16),
            data_pages: u64_at(24),
            metadata_length: u64_at(40),
            metadata_checksum: u64_at(48),
            blocks_checksum: u64_at(56),
            digest: std::array::from_fn(|i| bytes[64 + i]),
        };
        let page = PAGE_SIZE as u64;
        let sound = u64::from(u32_at(12)) == page
            && footer.ram_size > 0
            && footer.ram_size.is_multiple_of(page)
            && footer.ram_size < 1 << 56
            && footer.metadata_length <= MAX_METADATA as u64
            && footer.data_pages <= footer.ram_size / page
            && footer.metadata_offset() == u64_at(32);
        if sound {
            Ok(footer)
        } else {
            Err(FooterError::Damaged("its footer contradicts itself".into()))
        }
    }
}

/// What is wrong with a footer.
#[derive(Debug, PartialEq, Eq)]
pub enum FooterError {
    /// There is none.
    NoMagic,
    /// It is of another version.
    Version(u32),
    /// It is damaged; how.
    Damaged(String),
}

/// The checksum of a page, or of a block of the checksum table: 0 means all zero.
pub fn checksum(page: &[u8]) -> u64 {
    if is_zero(page) {
        0
    } else {
        xxhash_rust::xxh3::xxh3_64(page).max(1)
    }
}

/// Whether all bytes are zero. Ends at the first one that is not.
pub fn is_zero(bytes: &[u8]) -> bool {
    // SAFETY: any bytes are valid u64s.
    let (head, words, tail) = unsafe { bytes.align_to::<u64>() };
    head.iter().chain(tail).all(|byte| *byte == 0)
        && words
            .chunks(8)
            .all(|chunk| chunk.iter().fold(0, |all, word| all | word) == 0)
}

/// Whether a read may wait for the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// It may.
    Yes,
    /// It may not: what is not in the page cache is not read.
    No,
}

/// An open image.
#[derive(Debug)]
pub struct Image {
    pub(crate) file: File,
    pub(crate) path: PathBuf,
    pub(crate) footer: Footer,
    metadata: Vec<u8>,
    checksums: ChecksumTable,
    /// The file lives in memory (tmpfs): a read never waits, and RWF_NOWAIT may be unknown to it.
    in_memory: bool,
}

impl Image {
    /// Opens an image and checks what can be checked without reading its RAM.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io {
            path: path.to_path_buf(),
            source,
        };
        let corrupt = |what: String| OpenError::Corrupt {
            path: path.to_path_buf(),
            what,
        };
        // Without waiting: a pipe that nobody writes to would be waited for.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        // Reading is not to dirty the file's inode; who does not own the file may not ask for that.
        let file = match rustix::fs::open(path, flags | OFlags::NOATIME, Mode::empty()) {
            Err(Errno::PERM) => rustix::fs::open(path, flags, Mode::empty()),
            other => other,
        };
        let file = File::from(file.map_err(|errno| io(errno.into()))?);
        let stat = file.metadata().map_err(io)?;
        if stat.is_dir() {
            return Err(io(io::ErrorKind::IsADirectory.into()));
        }
        let Some(at) = stat.len().checked_sub(FOOTER_SIZE as u64) else {
            return Err(OpenError::NotAnImage {
                path: path.to_path_buf(),
            });
        };
        let mut bytes = [0; FOOTER_SIZE];
        file.read_exact_at(&mut bytes, at).map_err(io)?;
        let footer = Footer::decode(&bytes).map_err(|error| match error {
            FooterError::NoMagic => OpenError::NotAnImage {
                path: path.to_path_buf(),
            },
            FooterError::Version(version) => OpenError::Version {
                path: path.to_path_buf(),
                version,
            },
            FooterError::Damaged(what) => corrupt(what),
        })?;
        if footer.file_size() != stat.len() {
            return Err(corrupt(format!(
                "it has {} bytes where its footer says {}",
                stat.len(),
                footer.file_size()
            )));
        }
        let mut metadata = vec![0; footer.metadata_length as usize];
        file.read_exact_at(&mut metadata, footer.metadata_offset())
            .map_err(io)?;
        if xxhash_rust::xxh3::xxh3_64(&metadata) != footer.metadata_checksum {
            return Err(corrupt(
                "its metadata does not match the metadata's checksum".into(),
            ));
        }
        let in_memory = rustix::fs::fstatfs(&file).is_ok_and(|fs| IN_MEMORY.contains(&(fs.f_type as u64)));
        let mut blocks = vec![0; (footer.metadata_offset() - footer.blocks_offset()) as usize];
        file.read_exact_at(&mut blocks, footer.blocks_offset())
            .map_err(io)?;
        if xxhash_rust::xxh3::xxh3_64(&blocks) != footer.blocks_checksum {
            return Err(corrupt("its block checksums do not match their checksum".into()));
        }
        let checksums = ChecksumTable::new(footer.ram_size, footer.pages(), &blocks);
        Ok(Self {
            file,
            path: path.to_path_buf(),
            footer,
            metadata,
            checksums,
            in_memory,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the footer says.
    pub fn footer(&self) -> &Footer {
        &self.footer
    }

    /// The metadata.
    pub fn metadata(&self) -> &[u8] {
        &self.metadata
    }

    /// How many pages of RAM it has.
    pub fn pages(&self) -> u64 {
        self.footer.pages()
    }

    /// The next run of pages, at or after `from`, that may hold something; everything before it is zero.
    pub fn next_data(&self, from: PageIndex) -> Result<Option<PageRange>, ReadError> {
        let end = PageIndex(self.pages());
        if from >= end {
            return Ok(None);
        }
        let seek = |whence, page| {
            rustix::fs::seek(&self.file, whence).map_err(|errno| ReadError::Io {
                page,
                path: self.path.clone(),
                source: errno.into(),
            })
        };
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(from.byte_offset())) {
            Ok(offset) => PageIndex::containing(offset).max(from),
            // Only holes from here on, the kernel says. But behind RAM there is always the footer.
            Err(Errno::NXIO) => {
                return Err(ReadError::Truncated {
                    page: from,
                    path: self.path.clone(),
                });
            }
            Err(_) => seek(SeekFrom::Data(from.byte_offset()), from).map(PageIndex::containing)?,
        };
        if start >= end {
            return Ok(None);
        }
        let hole = seek(SeekFrom::Hole(start.byte_offset()), start)?;
        let stop = PageIndex(hole.div_ceil(PAGE_SIZE as u64)).min(end);
        Ok(Some(PageRange::new(start, stop.0 - start.0)))
    }

    /// The first run of pages in `within` that hold something by the checksum table; everything before it is zero.
    pub fn next_with_checksum(&self, within: PageRange) -> Result<Option<PageRange>, ReadError> {
        let end = within.end().min(PageIndex(self.pages()));
        let mut at = within.start;
        let mut block = [0; CHECKSUMS_PER_BLOCK as usize];
        while at < end {
            let step = PageRange::new(at, CHECKSUMS_PER_BLOCK - at.0 % CHECKSUMS_PER_BLOCK).clamp_to(end);
            let checksums = &mut block[..step.count as usize];
            // May wait, so it never answers that it would have to.
            let _ = self.checksums(step, Wait::Yes, checksums)?;
            if let Some(first) = checksums.iter().position(|checksum| *checksum != 0) {
                let count = checksums[first..]
                    .iter()
                    .take_while(|checksum| **checksum != 0)
                    .count();
                return Ok(Some(PageRange::new(at.advance(first as u64), count as u64)));
            }
            at = step.end();
        }
        Ok(None)
    }

    /// The checksums of `pages`. `None`: it would have to wait.
    pub fn checksums(&self, pages: PageRange, wait: Wait, into: &mut [u64]) -> Result<Option<()>, ReadError> {
        let read = |offset, block: &mut [u8], page| self.read_at(offset, block, page, wait);
        let damaged = |page| ReadError::Corrupt {
            page,
            path: self.path.clone(),
        };
        self.checksums.get(pages, into, read, damaged)
    }

    /// The checksums of all pages of a block of the table, read from the file and checked, also where they are known to be
    /// zero.
    pub(crate) fn reread_checksums(&self, block: u64) -> Result<Block, ReadError> {
        let page = PageIndex(block * CHECKSUMS_PER_BLOCK);
        let damaged = || ReadError::Corrupt {
            page,
            path: self.path.clone(),
        };
        let read = |offset, bytes: &mut [u8]| self.read_at(offset, bytes, page, Wait::Yes);
        self.checksums
            .read_block(block, read, damaged)?
            .ok_or_else(damaged)
    }

    /// Reads `pages` into `buffer` and checks nothing. `None`: it would have to wait.
    pub fn read(&self, pages: PageRange, wait: Wait, buffer: &mut [u8]) -> Result<Option<()>, ReadError> {
        self.read_at(
            pages.start.byte_offset(),
            &mut buffer[..pages.bytes()],
            pages.start,
            wait,
        )
    }

    /// Whether `content` is what belongs to `page`, whose checksum is `expected`.
    pub fn check(&self, page: PageIndex, content: &[u8], expected: u64) -> Result<(), ReadError> {
        if checksum(content) == expected {
            Ok(())
        } else {
            Err(ReadError::Corrupt {
                page,
                path: self.path.clone(),
            })
        }
    }

    /// Fills `buffer` from `offset`, for the sake of `page`.
    fn read_at(
        &self,
        offset: u64,
        buffer: &mut [u8],
        page: PageIndex,
        wait: Wait,
    ) -> Result<Option<()>, ReadError> {
        let flags = match wait {
            Wait::No if !self.in_memory => ReadWriteFlags::NOWAIT,
            _ => ReadWriteFlags::empty(),
        };
        let mut done = 0;
        while done < buffer.len() {
            let rest = io::IoSliceMut::new(&mut buffer[done..]);
            match rustix::io::preadv2(self.file.as_fd(), &mut [rest], offset + done as u64, flags) {
                // Without waiting an empty answer may also mean "not here"; whoever may wait finds out.
                Ok(0) | Err(Errno::AGAIN | Errno::OPNOTSUPP) if wait == Wait::No => return Ok(None),
                Ok(0) => {
                    return Err(ReadError::Truncated {
                        page,
                        path: self.path.clone(),
                    });
                }
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(errno) => {
                    return Err(ReadError::Io {
                        page,
                        path: self.path.clone(),
                        source: errno.into(),
                    });
                }
            }
        }
        Ok(Some(()))
    }
}

/// f_type of tmpfs and ramfs, as in statfs(2).
const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];
