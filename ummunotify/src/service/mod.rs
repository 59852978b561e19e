//! Watchers in other processes: a service that tells its clients when something about addresses changes, whosever they are.
//!
//! A VMM serves guest-physical addresses so. A client registers ranges of them; it is handed a counter page and a descriptor to
//! poll, and has the semantics of [`Notifier`](crate::Notifier): one pending event a range, nothing dropped, the counter moved before
//! the change is made. A client that must do something before the change is made says so when it connects; then the change waits
//! for its acknowledgement, up to a limit.
//!
//! ```text
//! server     Service: who makes changes tells of them here
//! client     Client: in the other process
//! protocol   what the two say to each other, on a Unix socket
//! ```
//!
//! ```
//! use std::os::unix::net::UnixListener;
//! use ummunotify::service::{Client, ClientOptions, Notice, Service, ServiceOptions};
//! use ummunotify::{AddressRange, Cookie, Event};
//!
//! let directory = tempfile::tempdir()?;
//! let path = directory.path().join("invalidations");
//! let service = Service::start(UnixListener::bind(&path)?, ServiceOptions::default())?;
//!
//! // In another process:
//! let mut client = Client::connect(&path, ClientOptions::default())?;
//! client.register(AddressRange::new(0x1000, 0x3000), Cookie(7))?;
//! let valid_at = client.counter().load();
//!
//! // In the first:
//! let page = AddressRange::new(0x2000, 0x3000);
//! service.change(&[page], || { /* the page goes */ });
//!
//! // In the other one:
//! assert_ne!(client.counter().load(), valid_at);
//! let heard = Event::Invalidated { cookie: Cookie(7), part: page, exact: true };
//! assert_eq!(client.read(10)?[0], Notice::Event(heard));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod client;
mod protocol;
mod server;
#[cfg(test)]
mod tests;

pub use client::{Client, ClientError, ClientOptions, Notice};
pub use protocol::{CLIENTS_AT_MOST, EVENTS_AT_MOST, LONGEST_LIMIT, RANGES_AT_MOST};
pub use server::{Changed, ClientStatus, Service, ServiceOptions, ServiceStatus};
