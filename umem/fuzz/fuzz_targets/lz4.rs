//! Input: a number of pages (u8), and a block that claims to hold them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use umem::units::PAGE_SIZE;
use umem::wire::lz4;
use umem_fuzz::without_allocation;

const GUARD: [u8; 64] = [0xa5; 64];

fuzz_target!(|input: &[u8]| {
    let Some((count, data)) = input.split_first() else {
        return;
    };
    let length = usize::from(*count) * PAGE_SIZE;
    let mut buffer = vec![0; length];
    buffer.extend_from_slice(&GUARD);
    let _ = without_allocation(|| lz4::decompress(data, &mut buffer[..length]));
    assert_eq!(buffer[length..], GUARD);

    // And what is compressed comes back.
    let mut compressed = vec![0; lz4::bound(data.len())];
    if let Some(compressed) = lz4::Compressor::default().compress(data, &mut compressed) {
        let mut back = vec![0; data.len()];
        lz4::decompress(compressed, &mut back).expect("it was compressed here");
        assert_eq!(back, data);
    }
});
