//! Input: a header, whose checksum may be wrong.
#![no_main]

use libfuzzer_sys::fuzz_target;
use umem::wire::{HEADER_SIZE, Header, Incoming, MAX_PAYLOAD, Outgoing};
use umem_fuzz::without_allocation;

fuzz_target!(|input: &[u8]| {
    let Some(&input) = input.first_chunk::<HEADER_SIZE>() else {
        return;
    };
    let mut stamped = input;
    Outgoing::default().stamp(&mut stamped);
    for bytes in [input, stamped] {
        without_allocation(|| {
            if let Ok(header) = Header::decode(&bytes) {
                assert!(header.length as usize <= MAX_PAYLOAD);
                assert_eq!(header.encode(), bytes);
                let _ = Incoming::acceptor().accept(&header);
                let _ = Incoming::connector().accept(&header);
            }
        });
    }
});
