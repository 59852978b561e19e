//! Images that are laid over others.

#![allow(clippy::unwrap_used)] // Helpers of tests fail as tests do.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use umem::image::{Footer, Image, ImageWriter, MAX_LAYERS, OpenError, ReadError, Wait, WriteError};
use umem::publish::Existing;
use umem::source::file::{Checksums, FileSource};
use umem::source::{Class, Content, PageSource, SourceError};
use umem::units::{PAGE_SIZE, PageIndex, PageRange};

/// What a page holds: nothing, or a number in every word.
type Page = u64;

fn content(page: Page) -> [u8; PAGE_SIZE] {
    let mut content = [0; PAGE_SIZE];
    for word in content.as_chunks_mut::<8>().0 {
        *word = page.to_le_bytes();
    }
    content
}

fn write(mut writer: ImageWriter, pages: impl IntoIterator<Item = (u64, Page)>) -> Footer {
    for (index, page) in pages {
        writer.write_page(PageIndex(index), &content(page)).unwrap();
    }
    writer.finish(b"metadata", Existing::Keep).unwrap()
}

/// An image of `pages` at `path`.
fn make(path: &Path, pages: &[Page]) -> Footer {
    let writer = ImageWriter::create(path, (pages.len() * PAGE_SIZE) as u64).unwrap();
    write(writer, (0..).zip(pages.iter().copied()))
}

/// A layer at `path` over the image at `base`.
fn lay(path: &Path, base: &Path, pages: &[(u64, Page)]) -> Footer {
    let base = Image::open(base).unwrap();
    write(
        ImageWriter::create_layer(path, &base).unwrap(),
        pages.iter().copied(),
    )
}

/// `count` images, each a layer over the one before, the last of which is the last of the paths.
fn chain(directory: &Path, pages: u64, count: u64) -> Vec<PathBuf> {
    let paths: Vec<PathBuf> = (0..count)
        .map(|index| directory.join(index.to_string()))
        .collect();
    let bottom: Vec<Page> = (0..pages).collect();
    make(&paths[0], &bottom);
    for (index, two) in (1..).zip(paths.windows(2)) {
        // Some of each layer's pages are shown through the next one.
        let own: Vec<(u64, Page)> = (0..pages)
            .filter(|page| page % (index + 2) == 0)
            .map(|page| (page, (index << 32) | (page % 5)))
            .collect();
        lay(&two[1], &two[0], &own);
    }
    paths
}

/// Where in a file something is.
fn flip(path: &Path, offset: u64, bit: u32) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1 << bit], offset).unwrap();
}

/// Reads an image as a source; all of it.
fn read_all(path: &Path) -> Result<Vec<u8>, SourceError> {
    let image = Image::open(path).unwrap();
    let pages = PageRange::new(PageIndex(0), image.pages());
    let mut buffer = vec![0xa5; pages.bytes()];
    let source = FileSource::new(image, Checksums::On);
    if source.read(pages, Class::Background, &mut buffer)? == Content::Zero {
        buffer.fill(0);
    }
    Ok(buffer)
}

/// A page, of which a few are zero.
fn page() -> impl Strategy<Value = Page> {
    prop_oneof![1 => Just(0), 4 => any::<u64>()]
}

/// Pages of a layer: few, many, or in a row.
fn own_pages(pages: u64) -> impl Strategy<Value = Vec<(u64, Page)>> {
    let scattered = prop::collection::btree_map(0..pages, page(), 0..40);
    let row = (0..pages, 0..pages, page()).prop_map(move |(start, count, page)| {
        (start..(start + count).min(pages))
            .map(|index| (index, page))
            .collect()
    });
    prop_oneof![scattered, row].prop_map(|own| own.into_iter().collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Every way of reading a chain gives what a plain array gives that is written to.
    #[test]
    fn a_chain_is_what_was_written_last(
        (bottom, layers, ranges) in (1..1200u64).prop_flat_map(|pages| (
            prop::collection::vec(page(), pages as usize),
            prop::collection::vec(own_pages(pages), 0..7),
            prop::collection::vec((0..pages, 1..pages + 1), 10),
        ))
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = |index: usize| directory.path().join(index.to_string());
        let mut model = bottom.clone();
        make(&path(0), &bottom);
        for (index, own) in layers.iter().enumerate() {
            lay(&path(index + 1), &path(index), own);
            for (page, value) in own {
                model[*page as usize] = *value;
            }
        }
        let top = path(layers.len());
        let expected: Vec<u8> = model.iter().flat_map(|page| content(*page)).collect();
        prop_assert!(read_all(&top).unwrap() == expected);

        let image = Image::open(&top).unwrap();
        prop_assert_eq!(image.layer_count(), layers.len() + 1);
        for layer in image.layers() {
            let verified = layer.verify(|_| {}).unwrap();
            prop_assert!(verified.is_sound(), "{}: {verified:?}", layer.path().display());
        }
        let end = PageIndex(image.pages());
        for checksums in [Checksums::On, Checksums::Off] {
            let source = FileSource::new(Image::open(&top).unwrap(), checksums);
            for (start, count) in &ranges {
                let range = PageRange::new(PageIndex(*start), *count).clamp_to(end);
                let slice = &expected[range.start.0 as usize * PAGE_SIZE..][..range.bytes()];
                let mut buffer = vec![0xa5; range.bytes()];
                // In the page cache: it was just written, and holes are not in it.
                for content in [
                    Some(source.read(range, Class::Demand, &mut buffer).unwrap()),
                    source.try_read(range, &mut buffer).unwrap(),
                ].into_iter().flatten() {
                    match content {
                        Content::Zero => prop_assert!(slice.iter().all(|byte| *byte == 0)),
                        Content::Data => prop_assert!(buffer == slice),
                    }
                }
                let data = source.next_data(range).unwrap();
                let zero_until = data.map_or(range.end(), |data| data.start);
                prop_assert!((range.start.0..zero_until.0).all(|page| model[page as usize] == 0));
                if let (Some(data), Checksums::On) = (data, checksums) {
                    prop_assert!(data.end() <= range.end());
                    prop_assert!(data.pages().all(|page| model[page.0 as usize] != 0));
                }
            }
        }
    }

    /// One bit, anywhere in any of the files.
    #[test]
    fn a_flipped_bit_is_found_in_every_layer(layer in 0..4usize, position in 0.0..1.0f64, where_ in 0..3u8, bit in 0..8u32) {
        let directory = tempfile::tempdir().unwrap();
        let paths = chain(directory.path(), 700, 4);
        let length = fs::metadata(&paths[layer]).unwrap().len();
        let ram = 700 * PAGE_SIZE as u64;
        // RAM is most of a file, and what means most is at its end.
        let offset = match where_ {
            0 => (position * ram as f64) as u64,
            1 => ram + (position * (length - ram) as f64) as u64,
            _ => length - 1 - (position * 240.0) as u64,
        };
        flip(&paths[layer], offset, bit);
        match Image::open(&paths[3]) {
            // The damaged file by its own name, whatever is laid over it.
            Err(error) => {
                let error = innermost(error);
                // A path of another length of a base, and the like, are found before the checksum is.
                prop_assert!(
                    matches!(&error, OpenError::Corrupt { path, .. } | OpenError::NotAnImage { path } if path.file_name() == paths[layer].file_name()),
                    "layer {layer} offset {offset}: {error:?}"
                );
            }
            Ok(image) => {
                for (index, file) in image.layers().collect::<Vec<_>>().into_iter().rev().enumerate() {
                    let verified = file.verify(|_| {}).unwrap();
                    prop_assert_eq!(verified.is_sound(), index != layer, "layer {} offset {}: {:?}", index, offset, verified);
                    if index == layer && offset < ram {
                        prop_assert_eq!(&verified.corrupt, &[PageIndex::containing(offset)]);
                    }
                }
            }
        }
    }

    /// A chain with damage anywhere is never read as something else.
    #[test]
    fn damage_is_never_handed_out(layer in 0..4usize, position in 0.0..1.0f64, bit in 0..8u32) {
        let directory = tempfile::tempdir().unwrap();
        let paths = chain(directory.path(), 300, 4);
        let expected = read_all(&paths[3]).unwrap();
        let length = fs::metadata(&paths[layer]).unwrap().len();
        flip(&paths[layer], (position * length as f64) as u64, bit);
        if let Ok(image) = Image::open(&paths[3]) {
            let source = FileSource::new(image, Checksums::On);
            for page in 0..300 {
                let mut buffer = [0; PAGE_SIZE];
                match source.read(PageRange::single(PageIndex(page)), Class::Demand, &mut buffer) {
                    Ok(_) => prop_assert!(buffer[..] == expected[page as usize * PAGE_SIZE..][..PAGE_SIZE]),
                    Err(error) => prop_assert!(matches!(error, SourceError::Corrupt(_)), "{error}"),
                }
            }
        }
    }

    /// A file that ends early, or that goes on.
    #[test]
    fn a_file_of_another_length_is_refused(layer in 0..3usize, position in 0.0..1.0f64, longer: bool) {
        let directory = tempfile::tempdir().unwrap();
        let paths = chain(directory.path(), 40, 3);
        let file = OpenOptions::new().write(true).open(&paths[layer]).unwrap();
        let length = file.metadata().unwrap().len();
        let other = (position * length as f64) as u64;
        file.set_len(if longer { length + 1 + other } else { other }).unwrap();
        let error = innermost(Image::open(&paths[2]).unwrap_err());
        prop_assert!(matches!(error, OpenError::Corrupt { .. } | OpenError::NotAnImage { .. }), "{error:?}");
    }

    /// Whatever the footer says under right checksums, and whatever the rest of the file holds, nothing panics.
    #[test]
    fn any_fields_are_read_without_a_panic(
        pages in 1..200u64, own in 0..200u64, data in 0..200u64, metadata_length in 0..100u64, path_length in 1..60u64,
        rest in prop::collection::vec(any::<u8>(), 0..400), sealed: bool,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let (base, path) = (directory.path().join("base"), directory.path().join("layer"));
        let mut footer = {
            make(&base, &vec![1; pages as usize]);
            lay(&path, &base, &[(0, 1)])
        };
        let fields = footer.base.as_mut().unwrap();
        (fields.own_pages, fields.path_length) = (own.min(pages), path_length);
        footer.metadata_length = metadata_length;
        footer.data_pages = data.min(own).min(pages);
        let file = File::create(&path).unwrap();
        file.set_len(footer.ram_size).unwrap();
        let mut end = vec![0; (footer.path_offset() + path_length - footer.own_offset()) as usize];
        for (byte, random) in end.iter_mut().zip(&rest) {
            *byte = *random;
        }
        if sealed {
            let part = |from: u64, to: u64| {
                xxhash_rust::xxh3::xxh3_64(&end[(from - footer.ram_size) as usize..(to - footer.ram_size) as usize])
            };
            let own = part(footer.own_offset(), footer.table_offset());
            let name = part(footer.path_offset(), footer.path_offset() + path_length);
            footer.blocks_checksum = part(footer.blocks_offset(), footer.metadata_offset());
            footer.metadata_checksum = part(footer.metadata_offset(), footer.path_offset());
            let fields = footer.base.as_mut().unwrap();
            (fields.own_checksum, fields.path_checksum) = (own, name);
        }
        file.write_all_at(&end, footer.own_offset()).unwrap();
        file.write_all_at(&footer.encode(), footer.ram_size + end.len() as u64).unwrap();
        if let Err(error) = Image::open(&path) {
            // It gets as far as to look for its base, or it does not.
            prop_assert!(matches!(error, OpenError::Corrupt { .. } | OpenError::Base { .. }), "{error:?}");
        }
    }
}

/// The error of the file that it is about.
fn innermost(mut error: OpenError) -> OpenError {
    while let OpenError::Base { source, .. } = error {
        error = *source;
    }
    error
}

#[test]
fn a_layer_is_as_large_as_what_it_holds() {
    let directory = tempfile::tempdir().unwrap();
    let (base, layer) = (directory.path().join("base"), directory.path().join("layer"));
    // 1 GiB, all of it there, in the worst case for the tables: spread evenly.
    let pages = 1 << 18;
    write(
        ImageWriter::create(&base, pages * PAGE_SIZE as u64).unwrap(),
        (0..pages).step_by(64).map(|page| (page, 1)),
    );
    let changed: Vec<(u64, Page)> = (0..pages).step_by(100).map(|page| (page, 2)).collect();
    lay(&layer, &base, &changed);
    let allocated = fs::metadata(&layer).unwrap().blocks() * 512;
    let content = (changed.len() * PAGE_SIZE) as u64;
    assert!(
        allocated >= content && allocated < content + content / 50,
        "{allocated} for {content}"
    );
}

#[test]
fn the_digest_says_what_is_below() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let one = make(&path("one"), &[1, 2, 3]);
    let two = make(&path("two"), &[1, 2, 4]);
    let over_one = lay(&path("over one"), &path("one"), &[(0, 9)]);
    let over_two = lay(&path("over two"), &path("two"), &[(0, 9)]);
    let again = lay(&path("again"), &path("one"), &[(0, 9)]);
    assert_ne!(one.digest, two.digest);
    assert_ne!(over_one.digest, over_two.digest);
    assert_eq!(
        over_one.digest, again.digest,
        "the same over the same is the same"
    );
    let zero = lay(&path("zero"), &path("one"), &[(0, 0)]);
    let nothing = lay(&path("nothing"), &path("one"), &[]);
    assert_ne!(zero.digest, nothing.digest);
    assert_eq!((zero.checksums(), zero.data_pages), (1, 0));
    assert_ne!(nothing.digest, one.digest);
    assert_eq!(
        read_all(&path("nothing")).unwrap(),
        read_all(&path("one")).unwrap()
    );
}

#[test]
fn another_image_in_the_bases_place_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let paths = chain(directory.path(), 20, 3);
    let image = Image::open(&paths[1]).unwrap();
    let expected = image.footer().digest;
    fs::remove_file(&paths[1]).unwrap();
    let found = make(&paths[1], &[7; 20]).digest;
    let error = Image::open(&paths[2]).unwrap_err();
    assert!(
        matches!(&error, OpenError::OtherBase { expected: e, found: f, .. } if (*e, *f) == (expected, found)),
        "{error}"
    );
    assert!(
        error
            .to_string()
            .contains(&blake3::Hash::from(expected).to_hex().to_string()),
        "{error}"
    );
    // The base itself, by another way, is the base.
    fs::remove_file(&paths[1]).unwrap();
    lay(&paths[1], &paths[0], &[(0, 3)]);
    assert!(matches!(Image::open(&paths[2]), Err(OpenError::OtherBase { .. })));
}

#[test]
fn a_base_of_another_size_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (base, layer) = (directory.path().join("base"), directory.path().join("layer"));
    make(&base, &[1; 10]);
    lay(&layer, &base, &[]);
    // Only somebody who writes footers by hand gets that far: the digest is of the size too.
    let expected = Image::open(&base).unwrap().footer().digest;
    fs::remove_file(&base).unwrap();
    let mut footer = make(&base, &[1; 11]);
    footer.digest = expected;
    let file = OpenOptions::new().write(true).open(&base).unwrap();
    let bytes = footer.encode();
    file.write_all_at(&bytes, footer.file_size() - bytes.len() as u64)
        .unwrap();
    let error = Image::open(&layer).unwrap_err();
    assert!(matches!(error, OpenError::Corrupt { .. }), "{error}");
    assert!(
        error.to_string().ends_with("it has 10 pages and its base has 11"),
        "{error}"
    );
}

#[test]
fn a_missing_base_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let paths = chain(directory.path(), 20, 3);
    fs::remove_file(&paths[0]).unwrap();
    let error = Image::open(&paths[2]).unwrap_err();
    assert!(
        matches!(&error, OpenError::Base { path, .. } if path.file_name() == paths[1].file_name()),
        "{error:?}"
    );
    let error = innermost(error);
    assert!(
        matches!(&error, OpenError::Io { path, source } if path.file_name() == paths[0].file_name() && source.kind() == std::io::ErrorKind::NotFound),
        "{error:?}"
    );
}

#[test]
fn what_is_its_own_base_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let paths = chain(directory.path(), 20, 3);
    // 2 is laid over 1, and 1 is now 2.
    fs::remove_file(&paths[1]).unwrap();
    fs::hard_link(&paths[2], &paths[1]).unwrap();
    let error = Image::open(&paths[2]).unwrap_err();
    assert!(matches!(error, OpenError::Loop { .. }), "{error}");
    fs::remove_file(&paths[1]).unwrap();
    std::os::unix::fs::symlink(&paths[2], &paths[1]).unwrap();
    assert!(matches!(Image::open(&paths[2]), Err(OpenError::Loop { .. })));
}

#[test]
fn there_are_so_many_layers_and_no_more() {
    let directory = tempfile::tempdir().unwrap();
    let paths = chain(directory.path(), 3, MAX_LAYERS as u64);
    let image = Image::open(paths.last().unwrap()).unwrap();
    assert_eq!(image.layer_count(), MAX_LAYERS);
    let error = ImageWriter::create_layer(&directory.path().join("more"), &image)
        .err()
        .unwrap();
    assert!(matches!(error, WriteError::TooManyLayers { .. }), "{error}");
    // Over one layer less it can be made; then one comes in below.
    let base = Image::open(&paths[MAX_LAYERS - 2]).unwrap();
    drop(ImageWriter::create_layer(&directory.path().join("more"), &base).unwrap());
    let bottom = Image::open(&paths[0]).unwrap();
    let below = directory.path().join("below");
    write(ImageWriter::create_layer(&below, &bottom).unwrap(), []);
    relink(&paths[0], &below, bottom.footer());
    let error = Image::open(paths.last().unwrap()).unwrap_err();
    assert!(matches!(error, OpenError::TooManyLayers { .. }), "{error}");
}

/// Puts the layer `layer`, which is over `path`, in the place of `path`, as if it had that one's digest.
fn relink(path: &Path, layer: &Path, footer: &Footer) {
    let moved = path.with_extension("moved");
    fs::rename(path, &moved).unwrap();
    let image = Image::open(&moved).unwrap();
    fs::remove_file(layer).unwrap();
    let mut sealed = write(ImageWriter::create_layer(path, &image).unwrap(), []);
    sealed.digest = footer.digest;
    let file = OpenOptions::new().write(true).open(path).unwrap();
    let bytes = sealed.encode();
    file.write_all_at(&bytes, sealed.file_size() - bytes.len() as u64)
        .unwrap();
}

#[test]
fn a_chain_may_be_moved_as_a_whole_and_found_by_a_link() {
    let directory = tempfile::tempdir().unwrap();
    let at = |path: &str| directory.path().join(path);
    for name in ["a/base", "a/layer", "b"] {
        fs::create_dir_all(at(name)).unwrap();
    }
    make(&at("a/base/ram"), &[1, 2, 3]);
    lay(&at("a/layer/ram"), &at("a/base/ram"), &[(1, 9)]);
    let expected = read_all(&at("a/layer/ram")).unwrap();
    fs::rename(at("a"), at("b/c")).unwrap();
    std::os::unix::fs::symlink(at("b/c/layer/ram"), at("link")).unwrap();
    assert_eq!(read_all(&at("link")).unwrap(), expected);
    assert_eq!(expected[PAGE_SIZE..2 * PAGE_SIZE], content(9));
    // Apart from its base it says where it looked.
    fs::rename(at("b/c/layer"), at("layer")).unwrap();
    let error = innermost(Image::open(&at("layer/ram")).unwrap_err());
    assert!(
        matches!(&error, OpenError::Io { path, .. } if path.ends_with("base/ram")),
        "{error:?}"
    );
}

#[test]
fn errors_name_the_layer_that_is_damaged() {
    let directory = tempfile::tempdir().unwrap();
    let (base, layer) = (directory.path().join("base"), directory.path().join("layer"));
    make(&base, &[1, 2, 3]);
    lay(&layer, &base, &[(1, 9)]);
    let image = Image::open(&layer).unwrap();
    flip(&base, 0, 3);
    flip(&layer, PAGE_SIZE as u64, 3);
    for (page, file) in [(0, "base"), (1, "layer")] {
        let (mut checksum, mut buffer) = ([0], [0; PAGE_SIZE]);
        let range = PageRange::single(PageIndex(page));
        image.checksums(range, Wait::Yes, &mut checksum).unwrap().unwrap();
        image.read(range, Wait::Yes, &mut buffer).unwrap().unwrap();
        let error = image.check(PageIndex(page), &buffer, checksum[0]).unwrap_err();
        assert!(
            matches!(&error, ReadError::Corrupt { page: found, path } if found.0 == page && path.ends_with(file)),
            "{error}"
        );
    }
}
