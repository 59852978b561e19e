//! The bare-metal test guest.

fn main() {}
