//! Input: what comes after a hello, frame after frame: length (u16), type (u16), id (u64), payload. Checksums and sequence
//! numbers are made right; the hello says what the channel is.
#![no_main]

use libfuzzer_sys::fuzz_target;
use umem::wire::{HEADER_SIZE, Header, Incoming, Message, MessageType, Outgoing};
use umem_fuzz::without_allocation;

fuzz_target!(|input: &[u8]| {
    let mut incoming = Incoming::acceptor();
    let mut outgoing = Outgoing::default();
    let mut rest = input;
    let mut goodbye = false;
    while let Some((&[l0, l1, k0, k1, id @ ..], after)) = rest.split_first_chunk::<12>() {
        let length = usize::from(u16::from_le_bytes([l0, l1])).min(after.len());
        let (payload, next) = after.split_at(length);
        rest = next;
        let kind = MessageType::from_code(u16::from_le_bytes([k0, k1]));
        let mut bytes: [u8; HEADER_SIZE] =
            Header::for_payload(kind, u64::from_le_bytes(id), payload).encode();
        outgoing.stamp(&mut bytes);
        let accepted = without_allocation(|| {
            let header = Header::decode(&bytes)?;
            incoming.accept(&header)?;
            Message::decode(&header, payload)
        });
        let Ok(message) = accepted else { return };
        match message {
            Message::Hello(hello) => incoming.open(hello.channel, hello.role, hello.features),
            Message::Goodbye(_) => {
                assert!(!goodbye, "there is one goodbye");
                goodbye = true;
            }
            Message::Request(_) | Message::Cancel { .. } => {
                assert!(!goodbye, "nothing is asked after a goodbye")
            }
            Message::Welcome(_) | Message::Refused(_) => panic!("nobody called"),
            _ => {}
        }
        assert_eq!(incoming.is_draining(), goodbye);
    }
});
