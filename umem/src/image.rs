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
//!
//! # Layers
//!
//! An image may hold only the pages in which it differs from another one, its base: an incremental snapshot does. Such a file is
//! a layer, and its base may be one too. It has version 2, checksums of its own pages alone, and two parts more:
//!
//! ```text
//! offset              content
//! 0                   RAM, raw; a page that is all zero, or the base's, is a hole
//! ram_size            map of own pages: one bit a page, padded to 8 bytes
//! ... + 8 * words     checksum table: one little-endian u64 for every own page
//! ... + 8 * own       block checksums
//! metadata_offset     metadata
//! ... + length        path of the base, from the directory in which this file is
//! file end - 184      what the base is
//! file end - 112      footer
//!
//! what the base is (little-endian)
//!      0     8  own_pages: pages of this file, zero ones included
//!      8     8  xxh3-64 of the map of own pages
//!     16    32  digest of the base
//!     48     8  bytes in the path of the base, at most 4096
//!     56     8  xxh3-64 of the path
//!     64     8  xxh3-64 of this up to here
//! ```
//!
//! The digest of a layer is the blake3 (key derivation, context [`LAYER_DIGEST`]) of its base's digest, ram_size, map of own
//! pages, checksum table and metadata. So it covers every layer below, and says as much of what RAM holds as that of one file
//! does. A base is known by its digest, and another image in its place is refused; the path is only where it is looked for.

use std::io;
use std::path::{Path, PathBuf};

use crate::checksums::CHECKSUMS_PER_BLOCK;
pub use crate::image_footer::{BaseFields, Footer, FooterError, MAX_METADATA};
use crate::image_footer::{LAYER_VERSION, VERSION};
pub use crate::image_layer::Layer;
pub use crate::image_writer::{ImageWriter, WriteError};
use crate::units::{PAGE_SIZE, PageIndex, PageRange};

/// What tells the digest of a layer from every other hash.
pub const LAYER_DIGEST: &str = "umem image layer, version 2";

/// The most files that an image is made of.
pub const MAX_LAYERS: usize = 64;

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
    #[error("image '{}' has format version {version}, this program reads {VERSION} and {LAYER_VERSION}: make it anew", path.display())]
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
    /// It is laid over another image that cannot be used.
    #[error("image '{}' cannot be used without its base", path.display())]
    Base {
        /// The file.
        path: PathBuf,
        /// Why its base cannot be used.
        source: Box<OpenError>,
    },
    /// What lies where its base was is another image.
    #[error(
        "image '{}' is laid over an image with digest {}, and '{}' is another one, with digest {}",
        path.display(),
        blake3::Hash::from_bytes(*expected),
        base.display(),
        blake3::Hash::from_bytes(*found)
    )]
    OtherBase {
        /// The file.
        path: PathBuf,
        /// Its base's digest.
        expected: [u8; 32],
        /// What lies there.
        base: PathBuf,
        /// The digest of what lies there.
        found: [u8; 32],
    },
    /// It is laid over itself.
    #[error("image '{}' is corrupt: it is its own base", path.display())]
    Loop {
        /// The file.
        path: PathBuf,
    },
    /// It is made of too many files.
    #[error("image '{}' has more than {MAX_LAYERS} layers: make it anew as one file", path.display())]
    TooManyLayers {
        /// The file.
        path: PathBuf,
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

/// An open image: a file with all pages, or a layer over its base, which may be a layer too.
#[derive(Debug)]
pub struct Image {
    /// The file that was asked for, its base, the base's base, and so on, but for the last.
    above: Vec<Layer>,
    /// The one that has every page.
    bottom: Layer,
}

impl Image {
    /// Opens an image with all that it is laid over, and checks what can be checked without reading RAM.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let mut above = Vec::new();
        let mut bottom = Layer::open(path)?;
        while let Some(base) = open_base(&bottom, &above)? {
            above.push(std::mem::replace(&mut bottom, base));
        }
        Ok(Self { above, bottom })
    }

    /// The files that it is made of: the one that was asked for, its base, the base's base, and so on.
    pub fn layers(&self) -> impl Iterator<Item = &Layer> {
        self.above.iter().chain([&self.bottom])
    }

    /// How many files it is made of.
    pub fn layer_count(&self) -> usize {
        self.above.len() + 1
    }

    fn top(&self) -> &Layer {
        self.above.first().unwrap_or(&self.bottom)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.top().path()
    }

    /// What the file's footer says.
    pub fn footer(&self) -> &Footer {
        self.top().footer()
    }

    /// The metadata.
    pub fn metadata(&self) -> &[u8] {
        self.top().metadata()
    }

    /// How many pages of RAM it has.
    pub fn pages(&self) -> u64 {
        self.top().pages()
    }

    /// The layer that has the first of `pages`, of which there is at least one, and those that follow it in the same layer.
    fn run(&self, mut pages: PageRange) -> (&Layer, PageRange) {
        for layer in &self.above {
            let (here, count) = layer.run(pages);
            pages.count = count;
            if here {
                return (layer, pages);
            }
        }
        (&self.bottom, pages)
    }

    /// `pages` in runs, each with its layer.
    fn runs(&self, pages: PageRange) -> impl Iterator<Item = (&Layer, PageRange)> {
        let mut rest = pages;
        std::iter::from_fn(move || {
            (rest.count > 0).then(|| {
                let (layer, run) = self.run(rest);
                rest = rest.from(run.end());
                (layer, run)
            })
        })
    }

    /// The next run of pages, at or after `from`, that may hold something; everything before it is zero.
    pub fn next_data(&self, from: PageIndex) -> Result<Option<PageRange>, ReadError> {
        if self.above.is_empty() {
            return self.bottom.next_data(from);
        }
        // A hole is also what is in another layer.
        self.next_with_checksum(PageRange::new(from, self.pages().saturating_sub(from.0)))
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
        for (layer, run) in self.runs(pages) {
            let into = &mut into[(run.start.0 - pages.start.0) as usize..][..run.count as usize];
            if layer.checksums(run, wait, into)?.is_none() {
                return Ok(None);
            }
        }
        Ok(Some(()))
    }

    /// Reads `pages` into `buffer` and checks nothing. `None`: it would have to wait.
    pub fn read(&self, pages: PageRange, wait: Wait, buffer: &mut [u8]) -> Result<Option<()>, ReadError> {
        for (layer, run) in self.runs(pages) {
            let buffer = &mut buffer[(run.start.0 - pages.start.0) as usize * PAGE_SIZE..][..run.bytes()];
            if layer.read(run, wait, buffer)?.is_none() {
                return Ok(None);
            }
        }
        Ok(Some(()))
    }

    /// Whether `content` is what belongs to `page`, whose checksum is `expected`.
    pub fn check(&self, page: PageIndex, content: &[u8], expected: u64) -> Result<(), ReadError> {
        let (layer, _) = self.run(PageRange::single(page));
        layer.check(page, content, expected)
    }
}

/// The base of `layer`, over which `above` lie. `None`: it needs none.
fn open_base(layer: &Layer, above: &[Layer]) -> Result<Option<Layer>, OpenError> {
    let Some((path, expected)) = layer.base() else {
        return Ok(None);
    };
    let of = layer.path().to_path_buf();
    if above.len() + 1 == MAX_LAYERS {
        let path = above.first().unwrap_or(layer).path().to_path_buf();
        return Err(OpenError::TooManyLayers { path });
    }
    let base = match Layer::open(path) {
        Ok(base) => base,
        Err(source) => {
            let source = source.into();
            return Err(OpenError::Base { path: of, source });
        }
    };
    if above.iter().chain([layer]).any(|layer| layer.is_same_file(&base)) {
        return Err(OpenError::Loop { path: of });
    }
    if base.footer().digest != *expected {
        return Err(OpenError::OtherBase {
            path: of,
            expected: *expected,
            base: path.to_path_buf(),
            found: base.footer().digest,
        });
    }
    if base.pages() != layer.pages() {
        let what = format!("it has {} pages and its base has {}", layer.pages(), base.pages());
        return Err(OpenError::Corrupt { path: of, what });
    }
    Ok(Some(base))
}
