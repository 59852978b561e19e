//! User-process-backed memory: a region of memory whose pages somebody else fills in when they are first touched.
//!
//! What a fault does, from the top:
//!
//! ```text
//! a thread touches an absent page
//!   -> uffd      the kernel tells the pager's fault thread
//!   -> states    Absent to InFlight, or join whoever fetches it already
//!   -> source    an immediate answer, else the demand queue (schedule) and a reader thread
//!   -> region    the page is installed, the waiting thread wakes
//!   -> states    InFlight to Present
//! ```

pub mod abi;
pub mod call;
pub mod capi;
pub mod causes;
pub mod channel;
mod checksums;
mod collapse;
pub mod device;
pub mod handoff;
pub mod image;
mod image_footer;
mod image_layer;
mod image_verify;
mod image_writer;
pub mod link;
pub mod measure;
pub mod metrics;
mod own_pages;
pub mod pager;
pub mod publish;
pub mod region;
mod schedule;
pub mod server;
pub mod source;
pub mod states;
pub mod stats;
pub mod uffd;
pub mod units;
pub mod wire;
pub mod working_set;

pub use image_verify::Verified;
pub use schedule::step_forward;
