//! The last bytes of an image, which say what is where in it.

use crate::checksums::CHECKSUMS_PER_BLOCK;
use crate::units::PAGE_SIZE;

/// The first and the last bytes of the footer.
pub(crate) const MAGIC: [u8; 8] = *b"umemimg\0";
/// The version of an image that holds every page itself.
pub(crate) const VERSION: u32 = 1;
/// The version of an image that has a base.
pub(crate) const LAYER_VERSION: u32 = 2;
/// Bytes in the footer.
pub(crate) const FOOTER_SIZE: usize = 112;
/// Bytes in front of the footer of a layer, which say what its base is.
pub(crate) const BASE_SIZE: usize = 72;
/// Bytes at the end of a file that tell all that a footer can.
pub(crate) const TAIL_SIZE: usize = BASE_SIZE + FOOTER_SIZE;
/// The most metadata that is read.
pub const MAX_METADATA: usize = 1 << 20;
/// The most bytes that the path of a base has.
pub(crate) const MAX_BASE_PATH: usize = 4096;
/// The most RAM that an image is of: 64 TiB, for whose block checksums 256 MiB are allocated.
const MAX_RAM: u64 = 1 << 46;
/// The most RAM that a layer is of: 16 TiB, for whose map of own pages 512 MiB are allocated.
const MAX_LAYER_RAM: u64 = 1 << 44;

/// The footer's fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Size of the guest's RAM in bytes.
    pub ram_size: u64,
    /// Pages in this file that are not all zero.
    pub data_pages: u64,
    /// Bytes of metadata.
    pub metadata_length: u64,
    /// xxh3-64 of the metadata.
    pub metadata_checksum: u64,
    /// xxh3-64 of the block checksums.
    pub blocks_checksum: u64,
    /// The image's identity.
    pub digest: [u8; 32],
    /// What this file is laid over. `None`: it holds every page itself.
    pub base: Option<BaseFields>,
}

/// What a layer's footer says of its base, and of the pages that are not the base's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseFields {
    /// Pages that this file holds, zero ones included.
    pub own_pages: u64,
    /// xxh3-64 of the map of own pages.
    pub own_checksum: u64,
    /// The base's identity.
    pub digest: [u8; 32],
    /// Bytes in the base's path.
    pub path_length: u64,
    /// xxh3-64 of the base's path.
    pub path_checksum: u64,
}

impl Footer {
    /// How many pages of RAM there are.
    pub fn pages(&self) -> u64 {
        self.ram_size / PAGE_SIZE as u64
    }

    /// How many pages this file has checksums of.
    pub fn checksums(&self) -> u64 {
        self.base.as_ref().map_or(self.pages(), |base| base.own_pages)
    }

    /// Where the map of own pages lies.
    pub fn own_offset(&self) -> u64 {
        self.ram_size
    }

    /// Bytes in the map of own pages.
    pub fn own_length(&self) -> u64 {
        self.base.as_ref().map_or(0, |_| self.pages().div_ceil(64) * 8)
    }

    /// Where the checksum table lies.
    pub fn table_offset(&self) -> u64 {
        self.own_offset() + self.own_length()
    }

    /// Where the block checksums lie.
    pub fn blocks_offset(&self) -> u64 {
        self.table_offset() + self.checksums() * 8
    }

    /// Where the metadata lies.
    pub fn metadata_offset(&self) -> u64 {
        self.blocks_offset() + self.checksums().div_ceil(CHECKSUMS_PER_BLOCK) * 8
    }

    /// Where the path of the base lies.
    pub fn path_offset(&self) -> u64 {
        self.metadata_offset() + self.metadata_length
    }

    /// How long the whole file is.
    pub fn file_size(&self) -> u64 {
        let base = self.base.as_ref();
        let base = base.map_or(0, |base| base.path_length + BASE_SIZE as u64);
        self.path_offset() + base + FOOTER_SIZE as u64
    }

    /// The footer as it is stored, with what says what the base is in front of it.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(TAIL_SIZE);
        if let Some(base) = &self.base {
            bytes.extend_from_slice(&base.own_pages.to_le_bytes());
            bytes.extend_from_slice(&base.own_checksum.to_le_bytes());
            bytes.extend_from_slice(&base.digest);
            bytes.extend_from_slice(&base.path_length.to_le_bytes());
            bytes.extend_from_slice(&base.path_checksum.to_le_bytes());
            bytes.extend_from_slice(&xxhash_rust::xxh3::xxh3_64(&bytes).to_le_bytes());
        }
        let footer_start = bytes.len();
        let version = if self.base.is_some() {
            LAYER_VERSION
        } else {
            VERSION
        };
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&version.to_le_bytes());
        bytes.extend_from_slice(&(PAGE_SIZE as u32).to_le_bytes());
        for field in [
            self.ram_size,
            self.data_pages,
            self.metadata_offset(),
            self.metadata_length,
            self.metadata_checksum,
            self.blocks_checksum,
        ] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        bytes.extend_from_slice(&self.digest);
        bytes.extend_from_slice(&xxhash_rust::xxh3::xxh3_64(&bytes[footer_start..]).to_le_bytes());
        bytes.extend_from_slice(&MAGIC);
        bytes
    }

    /// Reads a footer from the end of a file, of which `tail` is the last `TAIL_SIZE` bytes, or all if it has fewer. The
    /// error says what is wrong with it.
    pub fn decode(tail: &[u8]) -> Result<Self, FooterError> {
        let Some((before, bytes)) = tail.split_last_chunk::<FOOTER_SIZE>() else {
            return Err(FooterError::NoMagic);
        };
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        if bytes[..8] != MAGIC && bytes[104..] != MAGIC {
            return Err(FooterError::NoMagic);
        }
        let damaged = || FooterError::Damaged("its footer does not match the footer's checksum".into());
        if u64_at(96) != xxhash_rust::xxh3::xxh3_64(&bytes[..96])
            || bytes[..8] != MAGIC
            || bytes[104..] != MAGIC
        {
            return Err(damaged());
        }
        let base = match u32_at(8) {
            VERSION => None,
            LAYER_VERSION => {
                let bytes = before.last_chunk::<BASE_SIZE>();
                Some(bytes.and_then(BaseFields::decode).ok_or_else(damaged)?)
            }
            other => return Err(FooterError::Version(other)),
        };
        let footer = Self {
            ram_size: u64_at(16),
            data_pages: u64_at(24),
            metadata_length: u64_at(40),
            metadata_checksum: u64_at(48),
            blocks_checksum: u64_at(56),
            digest: std::array::from_fn(|i| bytes[64 + i]),
            base,
        };
        let page = PAGE_SIZE as u64;
        // Sizes first, so that what is computed of them does not overflow.
        let sound = u64::from(u32_at(12)) == page
            && footer.ram_size > 0
            && footer.ram_size.is_multiple_of(page)
            && footer.ram_size <= MAX_RAM
            && footer.metadata_length <= MAX_METADATA as u64
            && footer.base.as_ref().is_none_or(|base| {
                footer.ram_size <= MAX_LAYER_RAM
                    && base.own_pages <= footer.pages()
                    && (1..=MAX_BASE_PATH as u64).contains(&base.path_length)
            })
            && footer.data_pages <= footer.checksums()
            && footer.metadata_offset() == u64_at(32);
        if sound {
            Ok(footer)
        } else {
            Err(FooterError::Damaged("its footer contradicts itself".into()))
        }
    }
}

impl BaseFields {
    /// `None`: they do not match their checksum.
    fn decode(bytes: &[u8; BASE_SIZE]) -> Option<Self> {
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let sound = u64_at(64) == xxhash_rust::xxh3::xxh3_64(&bytes[..64]);
        sound.then(|| Self {
            own_pages: u64_at(0),
            own_checksum: u64_at(8),
            digest: std::array::from_fn(|i| bytes[16 + i]),
            path_length: u64_at(48),
            path_checksum: u64_at(56),
        })
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn footer() -> impl Strategy<Value = Footer> {
        let base = (
            any::<u64>(),
            any::<[u8; 32]>(),
            1..=MAX_BASE_PATH as u64,
            any::<u64>(),
            0.0..=1.0f64,
        );
        let numbers = (
            any::<u64>(),
            any::<u64>(),
            any::<[u8; 32]>(),
            0..=MAX_METADATA as u64,
        );
        (
            1..=MAX_LAYER_RAM / PAGE_SIZE as u64,
            0.0..=1.0f64,
            numbers,
            prop::option::of(base),
        )
            .prop_map(
                |(pages, data, (metadata_checksum, blocks_checksum, digest, metadata_length), base)| {
                    let base =
                        base.map(
                            |(own_checksum, digest, path_length, path_checksum, own)| BaseFields {
                                own_pages: (pages as f64 * own) as u64,
                                own_checksum,
                                digest,
                                path_length,
                                path_checksum,
                            },
                        );
                    let mut footer = Footer {
                        ram_size: pages * PAGE_SIZE as u64,
                        data_pages: 0,
                        metadata_length,
                        metadata_checksum,
                        blocks_checksum,
                        digest,
                        base,
                    };
                    footer.data_pages = (footer.checksums() as f64 * data) as u64;
                    footer
                },
            )
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(footer in footer(), before in prop::collection::vec(any::<u8>(), 0..100)) {
            let mut tail = before;
            tail.extend(footer.encode());
            prop_assert_eq!(Footer::decode(&tail), Ok(footer));
        }

        #[test]
        fn a_flipped_bit_is_found(footer in footer(), position in 0.0..1.0f64) {
            let mut tail = footer.encode();
            let bit = (position * tail.len() as f64 * 8.0) as usize;
            tail[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Footer::decode(&tail).is_err());
        }

        #[test]
        fn any_bytes_are_refused_without_a_panic(tail in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Footer::decode(&tail).is_err());
        }

        /// Any fields under a right checksum: what is accepted is within the bounds.
        #[test]
        fn fields_that_contradict_each_other_are_refused(
            footer in footer(), changes in prop::collection::vec((0..TAIL_SIZE, any::<u8>()), 0..6)
        ) {
            let mut tail = footer.encode();
            for (at, value) in changes {
                let at = at % tail.len();
                tail[at] = value;
            }
            let start = tail.len() - FOOTER_SIZE;
            let mut seal = |from: usize, to: usize| {
                let checksum = xxhash_rust::xxh3::xxh3_64(&tail[from..to]);
                tail[to..to + 8].copy_from_slice(&checksum.to_le_bytes());
            };
            seal(start, start + 96);
            if start > 0 {
                seal(0, BASE_SIZE - 8);
            }
            if let Ok(footer) = Footer::decode(&tail) {
                prop_assert!(footer.checksums() <= footer.pages() && footer.data_pages <= footer.checksums());
                prop_assert!(footer.metadata_length <= MAX_METADATA as u64);
                prop_assert!(footer.own_length() <= MAX_LAYER_RAM / PAGE_SIZE as u64 / 8);
                prop_assert!(footer.base.as_ref().is_none_or(|base| base.path_length <= MAX_BASE_PATH as u64));
                prop_assert!(footer.file_size() > footer.ram_size);
            }
        }
    }
}
