//! End-to-end tests of the built program `umem`, and what they share.
//!
//! - [`program`]: running a program with a deadline, and what is left of it afterwards;
//! - [`scratch`]: a directory of one test, and the images in it;
//! - [`vm`]: `umem run` and its report;
//! - [`in_process`]: VMs in the test's own process;
//! - [`snapshot`]: snapshots restored by it;
//! - [`server`]: `umem serve`;
//! - [`certificates`]: a CA, and directories for `--tls-dir`;
//! - [`api`]: the control API of a running VM;
//! - [`moving`]: VMs that move from one instance to another;
//! - [`served`]: VMs whose RAM comes from page servers;
//! - [`proxy`]: a network between them that does what it should not;
//! - [`peer`]: one end of it that says what it likes;
//! - [`errors`]: what every error message must be like;
//! - [`linux`]: an unmodified Linux as a guest;
//! - [`host`]: what this machine offers, and skipping what needs more;
//! - [`random`]: moments that nobody chose, and seeds to have them again;
//! - [`terminal`]: a terminal to run the program in.
//!
//! A test that this machine cannot run says so in a line `skipped: NAME: reason` on standard error.

#![allow(clippy::unwrap_used)] // It is used by tests alone, where a panic is how failure is reported.

pub mod api;
pub mod certificates;
pub mod errors;
pub mod host;
pub mod in_process;
pub mod linux;
pub mod moving;
pub mod peer;
pub mod program;
pub mod proxy;
pub mod random;
pub mod scratch;
pub mod served;
pub mod server;
pub mod snapshot;
pub mod terminal;
pub mod vm;
