//! Checking every byte of a layer.

use crate::checksums::{Block, CHECKSUMS_PER_BLOCK};
use crate::image::{Image, LAYER_DIGEST, ReadError, Wait};
use crate::image_footer::Footer;
use crate::image_layer::Layer;
use crate::units::{PAGE_SIZE, PageIndex, PageRange};

/// Pages read at a time.
const STEP: u64 = CHECKSUMS_PER_BLOCK;

/// What a check of every byte found.
#[derive(Debug, Default)]
pub struct Verified {
    /// Pages of the file that hold something and are right.
    pub data_pages: u64,
    /// Pages that are not what the image's maker put there, in order; the first [`Verified::MOST_LISTED`] of them.
    pub corrupt: Vec<PageIndex>,
    /// How many there are.
    pub corrupt_count: u64,
    /// Whether what the digest in the footer is of gives that digest.
    pub digest_matches: bool,
}

impl Verified {
    /// The most pages that are listed.
    pub const MOST_LISTED: usize = 16;

    fn add_corrupt(&mut self, page: PageIndex) {
        self.corrupt_count += 1;
        if self.corrupt.len() < Self::MOST_LISTED {
            self.corrupt.push(page);
        }
    }

    /// Whether nothing is wrong.
    pub fn is_sound(&self) -> bool {
        self.corrupt_count == 0 && self.digest_matches
    }
}

/// The beginning of the digest of an image whose footer is `footer` and whose map of own pages is `own_pages`, to which the
/// checksum table and the metadata are added.
pub(crate) fn begin_digest(footer: &Footer, own_pages: &[u8]) -> blake3::Hasher {
    let mut digest = match &footer.base {
        None => blake3::Hasher::new(),
        Some(base) => {
            let mut digest = blake3::Hasher::new_derive_key(LAYER_DIGEST);
            digest.update(&base.digest);
            digest
        }
    };
    digest.update(&footer.ram_size.to_le_bytes());
    digest.update(own_pages);
    digest
}

/// The checksums of the pages of a layer in their order, read from the file.
struct Checksums<'a> {
    layer: &'a Layer,
    /// The number of the next among the layer's pages.
    next: u64,
    /// The block that it is in, if that is right.
    block: Option<Block>,
    digest: blake3::Hasher,
}

impl Checksums<'_> {
    /// The next checksum, which is that of `page`. `None`: it is damaged.
    fn next(&mut self, page: PageIndex) -> Result<Option<u64>, ReadError> {
        let at = (self.next % CHECKSUMS_PER_BLOCK) as usize;
        if at == 0 {
            self.block = match self.layer.reread_checksums(self.next / CHECKSUMS_PER_BLOCK, page) {
                Ok(block) => Some(block),
                Err(ReadError::Corrupt { .. }) => None,
                Err(error) => return Err(error),
            };
        }
        self.next += 1;
        let checksum = self.block.as_ref().map(|block| block[at]);
        if let Some(checksum) = checksum {
            self.digest.update(&checksum.to_le_bytes());
        }
        Ok(checksum)
    }
}

impl Image {
    /// Reads every byte of each of its files and checks it; finds a single flipped bit. `progress` is told pages done so far, of
    /// all files.
    pub fn verify(&self, mut progress: impl FnMut(u64)) -> Result<Verified, ReadError> {
        let mut all = Verified {
            digest_matches: true,
            ..Verified::default()
        };
        for (index, layer) in (0..).zip(self.layers()) {
            let before = index * self.pages();
            let verified = layer.verify(|done| progress(before + done))?;
            all.data_pages += verified.data_pages;
            all.corrupt_count += verified.corrupt_count;
            let room = Verified::MOST_LISTED - all.corrupt.len();
            all.corrupt.extend(verified.corrupt.into_iter().take(room));
            all.digest_matches &= verified.digest_matches;
        }
        Ok(all)
    }
}

impl Layer {
    /// Reads every byte of the file and checks it; finds a single flipped bit. `progress` is told pages done so far.
    pub fn verify(&self, mut progress: impl FnMut(u64)) -> Result<Verified, ReadError> {
        let end = PageIndex(self.pages());
        let mut verified = Verified::default();
        let mut checksums = Checksums {
            layer: self,
            next: 0,
            block: None,
            digest: begin_digest(self.footer(), &self.own_pages()),
        };
        let mut content = vec![0; STEP as usize * PAGE_SIZE];
        let mut data = self.next_data(PageIndex(0))?;
        let mut at = PageIndex(0);
        while at < end {
            let pages = PageRange::new(at, STEP).clamp_to(end);
            while data.is_some_and(|data| data.end() <= pages.start) {
                data = self.next_data(pages.start)?;
            }
            let in_hole = data.is_none_or(|data| data.start >= pages.end());
            if !in_hole {
                let _ = self.read(pages, Wait::Yes, &mut content)?;
            }
            while at < pages.end() {
                let (here, count) = self.run(pages.from(at));
                for page in PageRange::new(at, count).pages() {
                    // Where the base has a page, nothing is.
                    let expected = if here { checksums.next(page)? } else { Some(0) };
                    let at = (page.0 - pages.start.0) as usize * PAGE_SIZE;
                    let right = |expected| {
                        if in_hole {
                            expected == 0
                        } else {
                            self.check(page, &content[at..at + PAGE_SIZE], expected).is_ok()
                        }
                    };
                    match expected {
                        Some(expected) if right(expected) => verified.data_pages += u64::from(expected != 0),
                        _ => verified.add_corrupt(page),
                    }
                }
                at = at.advance(count);
            }
            progress(at.0);
        }
        let mut digest = checksums.digest;
        digest.update(self.metadata());
        verified.digest_matches = digest.finalize().as_bytes() == &self.footer().digest
            && verified.data_pages + verified.corrupt_count >= self.footer().data_pages;
        Ok(verified)
    }
}

#[cfg(test)]
mod tests {
    use crate::image::{Image, ImageWriter, OpenError};
    use crate::publish::Existing;
    use crate::units::{PAGE_SIZE, PageIndex};
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    /// The last block of the checksum table, and one in the middle, are zero.
    const PAGES: u64 = 2100;

    fn make(path: &Path) {
        let mut writer = ImageWriter::create(path, PAGES * PAGE_SIZE as u64).unwrap();
        for page in (0..PAGES).filter(|page| page % 7 < 3 && !(512..1024).contains(page) && *page < 2048) {
            writer
                .write_page(PageIndex(page), &[page as u8 | 1; PAGE_SIZE])
                .unwrap();
        }
        writer.write_page(PageIndex(PAGES - 1), &[0; PAGE_SIZE]).unwrap();
        writer.finish(b"metadata", Existing::Keep).unwrap();
    }

    #[test]
    fn a_sound_image_is_sound() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        make(&path);
        let image = Image::open(&path).unwrap();
        assert_eq!(image.metadata(), b"metadata");
        let mut last = 0;
        let verified = image.verify(|done| last = done).unwrap();
        assert!(verified.is_sound(), "{verified:?}");
        assert_eq!(verified.data_pages, image.footer().data_pages);
        assert_eq!(last, PAGES);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// Any one bit, wherever it lies: RAM, hole, checksum table, metadata, footer.
        #[test]
        fn a_flipped_bit_is_found(position in 0.0..1.0f64, near_end: bool, bit in 0..8u32) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("image");
            make(&path);
            let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
            let length = file.metadata().unwrap().len();
            // Half of the flips into the last bytes, where every byte means something else.
            let offset = if near_end { length - 1 - (position * 130.0) as u64 } else { (position * length as f64) as u64 };
            let mut byte = [0];
            file.read_exact_at(&mut byte, offset).unwrap();
            file.write_all_at(&[byte[0] ^ 1 << bit], offset).unwrap();

            match Image::open(&path) {
                Err(OpenError::Corrupt { .. } | OpenError::NotAnImage { .. }) => {}
                Err(error) => prop_assert!(false, "offset {offset}: {error}"),
                Ok(image) => {
                    let verified = image.verify(|_| {}).unwrap();
                    prop_assert!(!verified.is_sound(), "offset {offset} bit {bit}");
                    if offset < PAGES * PAGE_SIZE as u64 {
                        prop_assert_eq!(&verified.corrupt, &[PageIndex::containing(offset)]);
                    }
                }
            }
        }
    }

    #[test]
    fn a_shortened_image_is_no_image() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        make(&path);
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        for length in [PAGES * PAGE_SIZE as u64, 4096, 10, 0] {
            file.set_len(length).unwrap();
            assert!(
                matches!(Image::open(&path), Err(OpenError::NotAnImage { .. })),
                "{length}"
            );
        }
    }

    #[test]
    fn data_is_found_between_holes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let mut writer = ImageWriter::create(&path, 64 << 20).unwrap();
        for page in [100, 101, 9000] {
            writer.write_page(PageIndex(page), &[1; PAGE_SIZE]).unwrap();
        }
        writer.finish(b"", Existing::Keep).unwrap();
        let image = Image::open(&path).unwrap();
        let mut found = Vec::new();
        let mut at = PageIndex(0);
        while let Some(run) = image.next_data(at).unwrap() {
            found.extend(run.pages().map(|page| page.0));
            at = run.end();
        }
        for page in [100, 101, 9000] {
            assert!(found.contains(&page), "{found:?}");
        }
        assert!(found.len() < 64, "holes were taken for data: {}", found.len());
    }
}
