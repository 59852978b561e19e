//! The reset-vector firmware.

fn main() {}
