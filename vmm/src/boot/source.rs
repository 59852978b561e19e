//! A layout as a page source.

use std::sync::{Arc, Weak};

use umem::source::{Class, Content, Inbox, PageSink, PageSource, SourceError, SourceStats};
use umem::units::{PAGE_SIZE, PageIndex, PageRange};

use super::Layout;

/// The pages that a layout wrote, over another source that has all others.
#[derive(Clone)]
pub struct LayoutSource {
    layout: Arc<Layout>,
    base: Arc<dyn PageSource>,
}

impl LayoutSource {
    /// `layout` over `base`.
    pub fn new(layout: Layout, base: Arc<dyn PageSource>) -> Self {
        Self {
            layout: Arc::new(layout),
            base,
        }
    }

    /// Whether the layout wrote all of `pages`.
    fn is_written(&self, pages: PageRange) -> bool {
        pages.pages().all(|page| self.layout.is_written(page.0))
    }

    /// Puts the layout's pages over what the base said of `pages`.
    fn overlay(&self, pages: PageRange, base: Content, buffer: &mut [u8]) -> Content {
        let mut content = base;
        let chunks = buffer.as_chunks_mut::<PAGE_SIZE>().0;
        for (index, page) in pages.pages().enumerate() {
            if !self.layout.is_written(page.0) {
                continue;
            }
            if content == Content::Zero {
                chunks.as_flattened_mut().fill(0);
                content = Content::Data;
            }
            self.layout.read_page(page.0, &mut chunks[index]);
        }
        content
    }

    fn next_written(&self, within: PageRange) -> Option<PageRange> {
        let mut written = self
            .layout
            .pages()
            .filter(|(page, written)| *written && within.contains(PageIndex(*page)));
        let (first, _) = written.next()?;
        let more = written
            .zip(first + 1..)
            .take_while(|((page, _), expected)| page == expected)
            .count();
        Some(PageRange::new(PageIndex(first), 1 + more as u64))
    }
}

impl PageSource for LayoutSource {
    fn url(&self) -> String {
        self.base.url()
    }

    fn try_read(&self, pages: PageRange, buffer: &mut [u8]) -> Result<Option<Content>, SourceError> {
        // What the layout wrote needs nothing of the base.
        let base = if self.is_written(pages) {
            Some(Content::Zero)
        } else {
            self.base.try_read(pages, buffer)?
        };
        Ok(base.map(|base| self.overlay(pages, base, buffer)))
    }

    fn read(&self, pages: PageRange, class: Class, buffer: &mut [u8]) -> Result<Content, SourceError> {
        let base = if self.is_written(pages) {
            Content::Zero
        } else {
            self.base.read(pages, class, buffer)?
        };
        Ok(self.overlay(pages, base, buffer))
    }

    fn attach(&self, sink: Weak<dyn PageSink + Send + Sync>) {
        self.base.attach(sink);
    }

    fn submit(&self, ranges: &[PageRange], class: Class) -> bool {
        // What is submitted comes as the base has it.
        let written = |range: &PageRange| range.pages().any(|page| self.layout.is_written(page.0));
        !ranges.iter().any(written) && self.base.submit(ranges, class)
    }

    fn lend_inbox(&self) -> Option<Box<dyn Inbox>> {
        self.base.lend_inbox()
    }

    fn next_data(&self, within: PageRange) -> Result<Option<PageRange>, SourceError> {
        let (base, own) = (self.base.next_data(within)?, self.next_written(within));
        // Whichever comes first; what of the other lies in it is asked for page by page anyway.
        Ok(base.into_iter().chain(own).min_by_key(|run| run.start))
    }

    /// The base's: the few pages over it are this VM's own, and are not what anybody keeps it for.
    fn digest(&self) -> Option<[u8; 32]> {
        self.base.digest()
    }

    fn exact_digest(&self) -> Option<[u8; 32]> {
        None
    }

    fn beside(&self) -> Result<Option<Arc<dyn PageSource>>, SourceError> {
        let layout = &self.layout;
        let over = |base| -> Arc<dyn PageSource> {
            Arc::new(Self {
                layout: Arc::clone(layout),
                base,
            })
        };
        Ok(self.base.beside()?.map(over))
    }

    fn close(&self) {
        self.base.close();
    }

    fn stats(&self) -> SourceStats {
        self.base.stats()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::{Kernel, LayoutConfig};
    use umem::source::zero::ZeroSource;

    fn source() -> LayoutSource {
        let config = LayoutConfig {
            ram_size: 16 << 20,
            kernel: Kernel::BuiltIn,
            initramfs: None,
            command_line: None,
        };
        LayoutSource::new(Layout::build(&config).unwrap(), Arc::new(ZeroSource))
    }

    #[test]
    fn one_page_or_many_read_the_same() {
        let source = source();
        let all = PageRange::new(PageIndex(0), 4096);
        let mut whole = vec![0xaa; all.bytes()];
        assert_eq!(
            source.read(all, Class::Demand, &mut whole).unwrap(),
            Content::Data
        );
        for page in all.pages() {
            let mut one = [0xaa; PAGE_SIZE];
            match source.try_read(PageRange::single(page), &mut one).unwrap() {
                Some(Content::Zero) => one.fill(0),
                Some(Content::Data) => assert!(source.layout.is_written(page.0)),
                None => panic!("it would not have to wait"),
            }
            let offset = page.byte_offset() as usize;
            assert_eq!(one, whole[offset..offset + PAGE_SIZE], "page {page}");
        }
    }

    #[test]
    fn data_is_what_the_layout_wrote() {
        let source = source();
        let mut found = Vec::new();
        let mut rest = PageRange::new(PageIndex(0), 4096);
        while let Some(run) = source.next_data(rest).unwrap() {
            found.extend(run.pages().map(|page| page.0));
            rest = rest.from(run.end());
        }
        let written: Vec<u64> = source
            .layout
            .pages()
            .filter(|page| page.1)
            .map(|page| page.0)
            .collect();
        assert_eq!(found, written);
    }
}
