use proptest::collection::vec;
use proptest::prelude::*;

use super::super::*;
use super::samples::{any_frame, bits_for, content, fixed, pages_frame};
use super::{decode, encode, split};
use crate::units::{PAGE_SIZE, PageIndex, PageRange};

/// Goes through everything that a decoded message can be asked.
fn use_up(message: &Message<'_>) {
    let mut buffer = vec![0; MAX_PAGES_PER_FRAME * PAGE_SIZE];
    match message {
        Message::Pages(pages) => {
            if let Ok(unpacked) = pages.unpack(&mut buffer) {
                let _ = unpacked.verify();
                let runs = unpacked.runs().map(|run| match run {
                    Run::Zero(range) => range.count,
                    Run::Data(range, data) => {
                        assert_eq!(range.bytes(), data.len());
                        range.count
                    }
                });
                assert_eq!(runs.sum::<u64>(), pages.range.count);
            }
        }
        Message::Bitmap(bitmap) => {
            assert!(
                bitmap
                    .runs()
                    .all(|run| run.count > 0 && run.end() <= bitmap.range.end())
            );
        }
        _ => {}
    }
    assert!(!format!("{message:?}").is_empty());
}

/// A payload with a header that fits it decodes to something sound, or not at all.
fn sound_or_nothing(kind: MessageType, id: u64, payload: &[u8]) {
    let header = Header::for_payload(kind, id, payload);
    let Ok(header) = Header::decode(&header.encode()) else {
        return;
    };
    if let Ok(message) = Message::decode(&header, payload) {
        use_up(&message);
        let again = encode(&message);
        assert_eq!(decode(&again).unwrap(), message);
        // A hello and its answers may be longer than this version knows; every other message has one form only.
        if matches!(
            kind,
            MessageType::Hello | MessageType::Welcome | MessageType::Refused
        ) {
            assert!(payload.starts_with(&again[HEADER_SIZE..]));
        } else {
            assert_eq!(&again[HEADER_SIZE..], payload);
        }
    }
}

/// With a bit flipped, a frame is refused, or is one of pages of which one no longer fits its checksum.
fn is_noticed(frame: &[u8], bit: usize) {
    let mut flipped = frame.to_vec();
    flipped[bit / 8] ^= 1 << (bit % 8);
    match decode(&flipped) {
        Err(_) => {}
        Ok(Message::Pages(pages)) => {
            let mut buffer = vec![0; MAX_PAGES_PER_FRAME * PAGE_SIZE];
            match pages.unpack(&mut buffer).and_then(|unpacked| unpacked.verify()) {
                Err(_) => {}
                // A bit of lz4 may be one that makes no difference.
                Ok(()) => assert_eq!(pages.encoding, Encoding::Lz4, "bit {bit} went unnoticed"),
            }
        }
        Ok(message) => panic!("bit {bit} went unnoticed: {message:?}"),
    }
}

/// A wrong checksum would hide what a parser does with wrong fields: gives it the right one.
fn flipped_with_right_checksums(frame: &[u8], bit: usize) {
    let mut flipped = frame.to_vec();
    flipped[bit / 8] ^= 1 << (bit % 8);
    let (header, payload) = split(&flipped);
    let kind = MessageType::from_code(u16::from_le_bytes([header[4], header[5]]));
    let id = u64::from_le_bytes(std::array::from_fn(|i| header[8 + i]));
    sound_or_nothing(kind, id, payload);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn every_frame_decodes_to_what_was_encoded(frame in any_frame()) {
        // That the message is the same was seen when the frame was made; it also encodes to the same bytes.
        let message = decode(&frame).unwrap();
        use_up(&message);
        prop_assert_eq!(encode(&message), frame);
    }

    #[test]
    fn a_frame_that_ends_early_is_none(frame in any_frame(), cut: prop::sample::Index) {
        let (header, payload) = split(&frame);
        let header = Header::decode(header).unwrap();
        if !payload.is_empty() {
            let cut = cut.index(payload.len());
            let is_payload_error = matches!(Message::decode(&header, &payload[..cut]), Err(WireError::Payload { .. }));
            prop_assert!(is_payload_error);
            sound_or_nothing(header.kind, header.id, &payload[..cut]);
        }
    }

    #[test]
    fn a_flipped_bit_is_noticed(frame in any_frame(), bit: prop::sample::Index) {
        let bit = bit.index(frame.len() * 8);
        is_noticed(&frame, bit);
        flipped_with_right_checksums(&frame, bit);
    }

    #[test]
    fn any_header_is_decoded_or_refused(mut bytes in any::<[u8; HEADER_SIZE]>(), kind in 0u16..0x310, flags in 0u16..3) {
        prop_assert_eq!(Header::decode(&bytes), Err(WireError::HeaderChecksum));
        bytes[2..4].fill(0);
        bytes[4..6].copy_from_slice(&kind.to_le_bytes());
        bytes[6..8].copy_from_slice(&flags.to_le_bytes());
        super::super::header::stamp(&mut bytes, 9);
        if let Ok(header) = Header::decode(&bytes) {
            prop_assert!(header.length as usize <= MAX_PAYLOAD);
            prop_assert_eq!(header.encode(), bytes);
        }
    }

    #[test]
    fn any_payload_is_decoded_or_refused(kind in prop::sample::select(MessageType::ALL), id in 0u64..2, payload in vec(any::<u8>(), 0..300)) {
        sound_or_nothing(kind, id, &payload);
    }

    #[test]
    fn any_lz4_block_stays_in_its_buffer(data in vec(any::<u8>(), 0..300), length in 0usize..9000) {
        let mut buffer = vec![0xa5; length + 64];
        let _ = lz4::decompress(&data, &mut buffer[..length]);
        prop_assert!(buffer[length..].iter().all(|byte| *byte == 0xa5));
    }

    #[test]
    fn lz4_gives_back_what_it_took(seed: u64, count in 1usize..6) {
        let (_, data) = content(count, seed);
        let mut buffer = vec![0; lz4::bound(data.len())];
        if let Some(compressed) = lz4::Compressor::default().compress(&data, &mut buffer) {
            prop_assert!(compressed.len() < data.len());
            let mut out = vec![0; data.len()];
            lz4::decompress(compressed, &mut out).unwrap();
            prop_assert_eq!(out, data);
            let mut longer = vec![0; content(count, seed).1.len() + PAGE_SIZE];
            prop_assert!(lz4::decompress(compressed, &mut longer).is_err());
        }
    }

    #[test]
    fn runs_are_the_pages(start in 0..MAX_PAGES - 256, count in 1usize..=32, seed: u64, lz4: bool) {
        let (checksums, data) = content(count, seed);
        let frame = pages_frame(start, count, seed, lz4);
        let Ok(Message::Pages(pages)) = decode(&frame) else { panic!() };
        let mut buffer = vec![0; MAX_PAGES_PER_FRAME * PAGE_SIZE];
        let unpacked = pages.unpack(&mut buffer).unwrap();
        unpacked.verify().unwrap();
        let mut next = start;
        let mut got = Vec::new();
        let mut was = None;
        for run in unpacked.runs() {
            let (range, zero) = match run {
                Run::Zero(range) => (range, true),
                Run::Data(range, bytes) => {
                    got.extend_from_slice(bytes);
                    (range, false)
                }
            };
            prop_assert_eq!(range.start.0, next);
            prop_assert!(was != Some(zero));
            was = Some(zero);
            for page in range.pages() {
                prop_assert_eq!(checksums[(page.0 - start) as usize] == 0, zero);
            }
            next = range.end().0;
        }
        prop_assert_eq!(next, start + count as u64);
        prop_assert_eq!(got, data);
    }

    #[test]
    fn bitmap_runs_are_the_bits(count in 1u64..300, pattern in vec(any::<bool>(), 300)) {
        let bits = bits_for(count, |page| pattern[page as usize]);
        let range = PageRange::new(PageIndex(128), count);
        let bitmap = Bitmap { request: RequestId(1), kind: BitmapKind::Data, range, bits: &bits };
        let set: Vec<u64> = bitmap.runs().flat_map(PageRange::pages).map(|page| page.0 - 128).collect();
        let expected: Vec<u64> = (0..count).filter(|page| pattern[*page as usize]).collect();
        prop_assert_eq!(set, expected);
        let ends: Vec<_> = bitmap.runs().map(PageRange::end).collect();
        prop_assert!(bitmap.runs().skip(1).zip(ends).all(|(run, end)| run.start > end));
    }
}

#[test]
fn every_bit_and_every_end_of_every_fixed_frame() {
    for (name, frame) in fixed() {
        // Page data is long and all alike: every bit of all else, and some of it.
        let all = 512.min(frame.len()) * 8;
        for bit in (0..all).chain((all..frame.len() * 8).step_by(997)) {
            is_noticed(&frame, bit);
            flipped_with_right_checksums(&frame, bit);
        }
        let (header, payload) = split(&frame);
        let header = Header::decode(header).unwrap();
        for end in (0..payload.len()).filter(|end| *end < 512 || end % 97 == 0) {
            assert!(
                Message::decode(&header, &payload[..end]).is_err(),
                "{name} to {end}"
            );
            sound_or_nothing(header.kind, header.id, &payload[..end]);
        }
    }
}

#[test]
fn every_type_has_a_fixed_frame() {
    let frames = fixed();
    for kind in MessageType::ALL {
        let found = frames
            .iter()
            .any(|(_, frame)| decode(frame).unwrap().kind() == *kind);
        assert!(found, "{kind}");
    }
}

#[test]
fn numbers_are_what_they_always_were() {
    let numbers: Vec<u16> = MessageType::ALL.iter().map(|kind| kind.code()).collect();
    assert_eq!(
        numbers,
        [
            0x0001, 0x0002, 0x0003, 0x0004, 0x0101, 0x0102, 0x0103, 0x0104, 0x0201, 0x0202, 0x0203, 0x0204,
            0x0205, 0x0206, 0x0207, 0x0301, 0x0302, 0x0303, 0x0304, 0x0401, 0x0402, 0x0403
        ]
    );
}

#[test]
fn the_largest_frames_fit_and_larger_ones_are_refused() {
    let frame = pages_frame(0, MAX_PAGES_PER_FRAME, 1, false);
    assert!(frame.len() <= HEADER_SIZE + MAX_PAYLOAD);

    let (checksums, data) = content(MAX_PAGES_PER_FRAME + 1, 1);
    let mut out = b"before".to_vec();
    let too_many = Message::Pages(Pages {
        request: RequestId(1),
        range: PageRange::new(PageIndex(0), checksums.len() as u64),
        epoch: Epoch(0),
        encoding: Encoding::Raw,
        checksums: (&checksums[..]).into(),
        data: &data,
    });
    assert!(matches!(too_many.encode(&mut out), Err(WireError::Range { .. })));
    assert_eq!(out, b"before");

    let most = [PageRange::new(PageIndex(0), MAX_REQUEST_PAGES)];
    let request = |ranges| {
        Message::Request(Request {
            request: RequestId(1),
            ranges,
        })
    };
    request((&most[..]).into()).encode(&mut out).unwrap();
    let more = [most[0], PageRange::single(PageIndex(0))];
    assert!(request((&more[..]).into()).encode(&mut out).is_err());
    let many = [PageRange::single(PageIndex(0)); MAX_REQUEST_RANGES + 1];
    assert!(request((&many[..]).into()).encode(&mut out).is_err());
    let beyond = [PageRange::new(PageIndex(MAX_PAGES - 1), 2)];
    assert!(request((&beyond[..]).into()).encode(&mut out).is_err());
    let overflow = [PageRange::new(PageIndex(u64::MAX), 2)];
    assert!(request((&overflow[..]).into()).encode(&mut out).is_err());
}

#[test]
fn a_length_beyond_all_bounds_is_refused_before_the_payload() {
    let mut header = Header::for_payload(MessageType::Other(0xf000), 0, &[]);
    header.length = MAX_PAYLOAD as u32;
    Header::decode(&header.encode()).unwrap();
    header.length += 1;
    assert!(matches!(
        Header::decode(&header.encode()),
        Err(WireError::Length { .. })
    ));
    header.kind = MessageType::Ping;
    header.flags = 0;
    header.length = 1;
    assert!(matches!(
        Header::decode(&header.encode()),
        Err(WireError::Length { .. })
    ));
}

#[test]
fn what_is_unknown_is_skipped_only_if_it_may_be() {
    let mut header = Header::for_payload(MessageType::Other(0x0501), 0, b"state");
    assert_eq!(
        Message::decode(&header, b"state"),
        Ok(Message::Unknown {
            code: 0x0501,
            id: 0,
            payload: b"state"
        })
    );
    Header::decode(&header.encode()).unwrap();
    header.flags = 0;
    assert_eq!(
        Header::decode(&header.encode()),
        Err(WireError::UnknownMessage(0x0501))
    );
    header.flags = 2;
    assert_eq!(Header::decode(&header.encode()), Err(WireError::UnknownFlags(2)));
}

#[test]
fn text_for_people_is_cut_and_cleaned() {
    let text = format!("line\nline {}", "\u{e9}".repeat(400));
    let frame = encode(&Message::Goodbye(Goodbye {
        reason: GoodbyeReason::ProtocolError,
        text: &text,
    }));
    let Ok(Message::Goodbye(goodbye)) = decode(&frame) else {
        panic!()
    };
    assert!(goodbye.text.len() <= MAX_TEXT && goodbye.text.len() > MAX_TEXT - 2);
    assert!(goodbye.text.starts_with("line line \u{e9}"));
}

#[test]
fn head_and_data_are_the_frame() {
    let (checksums, data) = content(9, 4);
    let pages = Pages {
        request: RequestId(8),
        range: PageRange::new(PageIndex(3), 9),
        epoch: Epoch(1),
        encoding: Encoding::Raw,
        checksums: (&checksums[..]).into(),
        data: &data,
    };
    let mut out = Vec::new();
    pages.head().encode(&mut out).unwrap();
    out.extend_from_slice(&data);
    assert_eq!(out, encode(&Message::Pages(pages)));
}

#[test]
fn pages_compressed_to_something_else_are_refused() {
    let frame = pages_frame(0, 3, 1, true);
    let Ok(Message::Pages(pages)) = decode(&frame) else {
        panic!()
    };
    assert_eq!(pages.encoding, Encoding::Lz4);
    let mut small = vec![0; PAGE_SIZE];
    assert!(matches!(pages.unpack(&mut small), Err(WireError::Buffer { .. })));
    let mut buffer = vec![0; MAX_PAGES_PER_FRAME * PAGE_SIZE];
    let cut = Pages {
        data: &pages.data[..pages.data.len() - 1],
        ..pages
    };
    assert!(matches!(cut.unpack(&mut buffer), Err(WireError::Lz4 { .. })));
}

#[test]
fn a_swapped_page_is_found() {
    let (mut checksums, data) = content(4, 2);
    checksums.retain(|checksum| *checksum != 0);
    checksums.swap(0, 1);
    let pages = Pages {
        request: RequestId(1),
        range: PageRange::new(PageIndex(40), 3),
        epoch: Epoch(0),
        encoding: Encoding::Raw,
        checksums: (&checksums[..]).into(),
        data: &data,
    };
    assert_eq!(
        pages.unpack(&mut []).unwrap().verify(),
        Err(WireError::PageChecksum { page: PageIndex(40) })
    );
}

#[test]
fn compressed_data_is_shorter_than_what_it_stands_for() {
    let head = |encoding, checksums: &'static [u64], data_length| {
        let head = PagesHead {
            request: RequestId::PUSH,
            range: PageRange::new(PageIndex(0), checksums.len() as u64),
            epoch: Epoch(0),
            encoding,
            checksums: checksums.into(),
            data_length,
        };
        head.encode(&mut Vec::new())
    };
    head(Encoding::Lz4, &[5, 0], PAGE_SIZE - 1).unwrap();
    head(Encoding::Raw, &[5, 0], PAGE_SIZE).unwrap();
    head(Encoding::Raw, &[0, 0], 0).unwrap();
    for (encoding, checksums, length) in [
        (Encoding::Lz4, &[5, 0], PAGE_SIZE),
        (Encoding::Lz4, &[5, 0], 0),
        (Encoding::Lz4, &[0, 0], 0),
        (Encoding::Raw, &[5, 0], 0),
        (Encoding::Raw, &[5, 6], PAGE_SIZE),
    ] {
        let result = head(encoding, checksums, length);
        assert!(
            matches!(result, Err(WireError::DataLength { .. })),
            "{encoding:?} {length}"
        );
    }
}

#[test]
fn the_frames_checksum_covers_the_pages_checksums() {
    let mut frame = pages_frame(0, 3, 1, false);
    frame[HEADER_SIZE + 24 + 3] ^= 1;
    assert_eq!(
        decode(&frame),
        Err(WireError::PayloadChecksum {
            kind: MessageType::Pages
        })
    );
}

#[test]
fn a_bitmap_has_its_bits_and_no_more() {
    let encode = |start, count, bits: &[u8]| {
        let bitmap = Bitmap {
            request: RequestId(1),
            kind: BitmapKind::Received,
            range: PageRange::new(PageIndex(start), count),
            bits,
        };
        Message::Bitmap(bitmap).encode(&mut Vec::new())
    };
    encode(64, 9, &[0xff, 0x01]).unwrap();
    assert!(matches!(
        encode(64, 9, &[0xff, 0x03]),
        Err(WireError::Field { .. })
    ));
    assert!(matches!(
        encode(64, 9, &[0xff, 1, 0]),
        Err(WireError::Layout { .. })
    ));
    assert!(matches!(
        encode(8, 9, &[0xff, 0x01]),
        Err(WireError::Field { .. })
    ));
    let most = vec![0xff; MAX_BITMAP_PAGES as usize / 8 + 1];
    encode(0, MAX_BITMAP_PAGES, &most[1..]).unwrap();
    assert!(matches!(
        encode(0, MAX_BITMAP_PAGES + 8, &most),
        Err(WireError::Range { .. })
    ));
}
