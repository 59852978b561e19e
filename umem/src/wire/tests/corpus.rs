//! The seeds of the fuzz targets are what the encoder makes of the fixed frames. They are kept in the tree, so they also show
//! when a frame comes out other than it did. `UMEM_WRITE_CORPUS=1 cargo test -p umem --lib corpus` writes them anew.

use std::fs;
use std::path::{Path, PathBuf};

use super::super::*;
use super::samples::{fixed, pages_frame};
use super::{decode, split};

/// The targets' inputs, by path below `fuzz/corpus`.
fn seeds() -> Vec<(PathBuf, Vec<u8>)> {
    let mut seeds = Vec::new();
    let mut stream = Vec::new();
    for (name, frame) in fixed() {
        let (header, payload) = split(&frame);
        seeds.push((Path::new("header").join(name), header.to_vec()));
        // The targets put right checksums and numbers on what they are given: type, id, payload.
        let input = [&header[4..6], &header[8..16], payload].concat();
        // The same for many frames, each with its length.
        if payload.len() < 1000 && !matches!(name, "hello_provider" | "welcome" | "refused" | "goodbye") {
            stream.extend_from_slice(&(payload.len() as u16).to_le_bytes());
            stream.extend_from_slice(&input);
        }
        seeds.push((Path::new("message").join(name), input));
        if let Message::Pages(pages) = decode(&frame).unwrap() {
            let count = pages.checksums.data_pages() as u8;
            seeds.push((Path::new("lz4").join(name), [&[count], pages.data].concat()));
        }
    }
    let more = pages_frame(0, 7, 4, true);
    if let Message::Pages(pages) = decode(&more).unwrap() {
        let count = pages.checksums.data_pages() as u8;
        seeds.push(("lz4/seven_pages".into(), [&[count], pages.data].concat()));
    }
    seeds.push(("stream/session".into(), stream));
    seeds
}

#[test]
fn corpus_is_what_the_encoder_makes() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let write = std::env::var_os("UMEM_WRITE_CORPUS").is_some();
    for (name, seed) in seeds() {
        let path = corpus.join(name);
        if write {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, &seed).unwrap();
        }
        assert!(
            fs::read(&path).is_ok_and(|bytes| bytes == seed),
            "{}",
            path.display()
        );
    }
}
