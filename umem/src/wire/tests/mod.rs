//! What must hold for every frame, and for every string of bytes that is none.

mod channel;
mod corpus;
mod frames;
mod samples;

use super::{HEADER_SIZE, Header, Message, WireError};

/// Splits one frame into what a reader has: its header's bytes and its payload.
fn split(frame: &[u8]) -> (&[u8; HEADER_SIZE], &[u8]) {
    frame.split_first_chunk().unwrap()
}

/// Decodes one whole frame.
fn decode(frame: &[u8]) -> Result<Message<'_>, WireError> {
    let (header, payload) = split(frame);
    Message::decode(&Header::decode(header)?, payload)
}

/// Encodes one frame.
fn encode(message: &Message<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    message.encode(&mut out).unwrap();
    out
}
