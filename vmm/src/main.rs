//! The program `umem`.

fn main() {}
