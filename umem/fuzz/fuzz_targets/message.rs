//! Input: a message type (u16), an id (u64), a payload. The checksums are made right.
#![no_main]

use libfuzzer_sys::fuzz_target;
use umem::units::PAGE_SIZE;
use umem::wire::{HEADER_SIZE, Header, MAX_PAGES_PER_FRAME, Message, MessageType, Run};
use umem_fuzz::without_allocation;

fuzz_target!(|input: &[u8]| {
    let Some((&[k0, k1, id @ ..], payload)) = input.split_first_chunk::<10>() else {
        return;
    };
    let kind = MessageType::from_code(u16::from_le_bytes([k0, k1]));
    let bytes = Header::for_payload(kind, u64::from_le_bytes(id), payload).encode();
    let decoded = without_allocation(|| {
        let header = Header::decode(&bytes)?;
        Message::decode(&header, payload)
    });
    let Ok(message) = decoded else { return };

    let mut again = Vec::new();
    message
        .encode(&mut again)
        .expect("what was decoded can be encoded");
    let (header, encoded) = again
        .split_first_chunk::<HEADER_SIZE>()
        .expect("a frame has a header");
    if matches!(
        kind,
        MessageType::Hello | MessageType::Welcome | MessageType::Refused
    ) {
        assert!(payload.starts_with(encoded));
    } else {
        assert_eq!((header, encoded), (&bytes, payload));
    }

    match message {
        Message::Pages(pages) => {
            let mut buffer = vec![0; MAX_PAGES_PER_FRAME * PAGE_SIZE];
            let count = without_allocation(|| {
                let unpacked = pages.unpack(&mut buffer).ok()?;
                let _ = unpacked.verify();
                let counts = unpacked.runs().map(|run| match run {
                    Run::Zero(range) => range.count,
                    Run::Data(range, data) => {
                        assert_eq!(range.bytes(), data.len());
                        range.count
                    }
                });
                Some(counts.sum::<u64>())
            });
            assert!(count.is_none_or(|count| count == pages.range.count));
        }
        Message::Bitmap(bitmap) => without_allocation(|| {
            let set: u64 = bitmap.runs().map(|run| run.count).sum();
            let ones: u64 = bitmap.bits.iter().map(|byte| u64::from(byte.count_ones())).sum();
            assert_eq!(set, ones);
        }),
        Message::Request(request) => assert!(request.ranges.iter().all(|range| range.count > 0)),
        _ => {}
    }
});
