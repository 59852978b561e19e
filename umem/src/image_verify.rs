//! Checking a whole image.

use crate::checksums::CHECKSUMS_PER_BLOCK;
use crate::image::{Image, ReadError, Wait};
use crate::units::{PAGE_SIZE, PageIndex, PageRange};

/// Pages read at a time: those of a block of the checksum table.
const STEP: u64 = CHECKSUMS_PER_BLOCK;

/// What a check of every byte found.
#[derive(Debug, Default)]
pub struct Verified {
    /// Pages that hold something and are right.
    pub data_pages: u64,
    /// Pages that are not what the image's maker put there, in order; the first [`Verified::MOST_LISTED`] of them.
    pub corrupt: Vec<PageIndex>,
    /// How many there are.
    pub corrupt_count: u64,
    /// Whether checksum table and metadata give the digest in the footer.
    pub digest_matches: bool,
}

impl Verified {
    /// The most pages that are listed.
    pub const MOST_LISTED: usize = 16;

    fn add_corrupt(&mut self, pages: PageRange) {
        self.corrupt_count += pages.count;
        let room = Self::MOST_LISTED - self.corrupt.len();
        self.corrupt.extend(pages.pages().take(room));
    }

    /// Whether nothing is wrong.
    pub fn is_sound(&self) -> bool {
        self.corrupt_count == 0 && self.digest_matches
    }
}

impl Image {
    /// Reads every byte of the image and checks it; finds a single flipped bit. `progress` is told pages done so far.
    pub fn verify(&self, mut progress: impl FnMut(u64)) -> Result<Verified, ReadError> {
        let end = PageIndex(self.pages());
        let mut verified = Verified::default();
        let mut digest = blake3::Hasher::new();
        digest.update(&self.footer().ram_size.to_le_bytes());
        let mut content = vec![0; STEP as usize * PAGE_SIZE];
        let mut data = self.next_data(PageIndex(0))?;
        let mut at = PageIndex(0);
        while at < end {
            let pages = PageRange::new(at, STEP).clamp_to(end);
            let block = match self.reread_checksums(at.0 / STEP) {
                Ok(block) => block,
                // The block of the table that says what these pages are: none of them can be vouched for.
                Err(ReadError::Corrupt { .. }) => {
                    verified.add_corrupt(pages);
                    at = pages.end();
                    continue;
                }
                Err(error) => return Err(error),
            };
            let checksums = &block[..pages.count as usize];
            for checksum in checksums {
                digest.update(&checksum.to_le_bytes());
            }
            while data.is_some_and(|data| data.end() <= pages.start) {
                data = self.next_data(pages.start)?;
            }
            let in_hole = data.is_none_or(|data| data.start >= pages.end());
            if !in_hole {
                let _ = self.read(pages, Wait::Yes, &mut content)?;
            }
            for (page, expected) in pages.pages().zip(checksums) {
                let at = (page.0 - pages.start.0) as usize * PAGE_SIZE;
                let right = if in_hole {
                    *expected == 0
                } else {
                    self.check(page, &content[at..at + PAGE_SIZE], *expected).is_ok()
                };
                if !right {
                    verified.add_corrupt(PageRange::single(page));
                } else if *expected != 0 {
                    verified.data_pages += 1;
                }
            }
            at = pages.end();
            progress(at.0);
        }
        digest.update(self.metadata());
        verified.digest_matches = digest.finalize().as_bytes() == &self.footer().digest
            && verified.data_pages + verified.corrupt_count >= self.footer().data_pages;
        Ok(verified)
    }
}

#[cfg(test)]
mod tests {
    use crate::image::{self, Image, ImageWriter, OpenError};
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

        #[test]
        fn any_bytes_as_a_footer_are_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), image::FOOTER_SIZE)) {
            let bytes: [u8; image::FOOTER_SIZE] = bytes.try_into().unwrap();
            prop_assert!(image::Footer::decode(&bytes).is_err());
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
