//! Pages from an image file.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::{Class, Content, PageSource, SourceError, SourceStats};
use crate::image::{Image, ReadError, Wait};
use crate::units::{PAGE_SIZE, PageRange};

/// The most pages whose checksums are looked up at a time.
const STEP: usize = 512;

/// Whether pages are compared with the image's checksums before they are handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksums {
    /// They are; a page that does not match is never handed out.
    On,
    /// They are not.
    Off,
}

/// An image as a source.
#[derive(Debug)]
pub struct FileSource {
    image: Arc<Image>,
    checksums: Checksums,
    bytes: AtomicU64,
    requests: AtomicU64,
}

impl FileSource {
    /// The pages of `image`.
    pub fn new(image: impl Into<Arc<Image>>, checksums: Checksums) -> Self {
        Self {
            image: image.into(),
            checksums,
            bytes: AtomicU64::new(0),
            requests: AtomicU64::new(0),
        }
    }

    /// The image.
    pub fn image(&self) -> &Image {
        &self.image
    }

    fn get(&self, pages: PageRange, wait: Wait, buffer: &mut [u8]) -> Result<Option<Content>, SourceError> {
        let content = match self.checksums {
            // A demand fault is for one page: it does not pay for room for 512 checksums.
            Checksums::On if pages.count == 1 => self.get_checked(pages, wait, buffer, &mut [0; 1])?,
            Checksums::On => self.get_checked(pages, wait, buffer, &mut [0; STEP])?,
            Checksums::Off => self.image.read(pages, wait, buffer)?.map(|()| Content::Data),
        };
        if content.is_some() {
            self.requests.fetch_add(1, Relaxed);
        }
        if content == Some(Content::Data) {
            self.bytes.fetch_add(pages.bytes() as u64, Relaxed);
        }
        Ok(content)
    }

    fn get_checked(
        &self,
        pages: PageRange,
        wait: Wait,
        buffer: &mut [u8],
        expected: &mut [u64],
    ) -> Result<Option<Content>, SourceError> {
        let mut content = Content::Zero;
        let mut at = pages.start;
        while at < pages.end() {
            let step = PageRange::new(at, expected.len() as u64).clamp_to(pages.end());
            let expected = &mut expected[..step.count as usize];
            if self.image.checksums(step, wait, expected)?.is_none() {
                return Ok(None);
            }
            let buffer = &mut buffer[(at.0 - pages.start.0) as usize * PAGE_SIZE..][..step.bytes()];
            if expected.iter().all(|checksum| *checksum == 0) {
                buffer.fill(0);
            } else {
                if self.image.read(step, wait, buffer)?.is_none() {
                    return Ok(None);
                }
                for ((page, expected), content) in step.pages().zip(expected).zip(buffer.chunks(PAGE_SIZE)) {
                    self.image.check(page, content, *expected)?;
                }
                content = Content::Data;
            }
            at = step.end();
        }
        Ok(Some(content))
    }
}

impl PageSource for FileSource {
    fn url(&self) -> String {
        format!("file:{}", self.image.path().display())
    }

    fn try_read(&self, pages: PageRange, buffer: &mut [u8]) -> Result<Option<Content>, SourceError> {
        self.get(pages, Wait::No, buffer)
    }

    fn read(&self, pages: PageRange, _: Class, buffer: &mut [u8]) -> Result<Content, SourceError> {
        let answer = self.get(pages, Wait::Yes, buffer)?;
        // It may wait, so it has an answer; were there none, a guess would be a wrong page.
        answer.ok_or_else(|| {
            let (page, path) = (pages.start, self.image.path().to_path_buf());
            SourceError::from(ReadError::Io {
                page,
                path,
                source: io::ErrorKind::WouldBlock.into(),
            })
        })
    }

    fn next_data(&self, within: PageRange) -> Result<Option<PageRange>, SourceError> {
        // What is a hole in the file is zero only if the checksums agree: it may be damage.
        let found = match self.checksums {
            Checksums::On => self.image.next_with_checksum(within)?,
            Checksums::Off => self.image.next_data(within.start)?,
        };
        Ok(found
            .map(|run| run.clamp_to(within.end()))
            .filter(|run| run.count > 0))
    }

    fn digest(&self) -> Option<[u8; 32]> {
        Some(self.image.footer().digest)
    }

    fn stats(&self) -> SourceStats {
        SourceStats {
            bytes: self.bytes.load(Relaxed),
            requests: self.requests.load(Relaxed),
            reconnects: 0,
        }
    }
}
