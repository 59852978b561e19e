//! End-to-end tests of the built program `umem`, and what they share.
