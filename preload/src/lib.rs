//! Preloaded into a program (`LD_PRELOAD`, as `umem exec` does), lets it open `/dev/umem` and `/dev/ummunotify` where there are no such
//! devices.
//!
//! The functions of the C library by which a program uses a device are replaced ([`functions`]). For every other file they
//! call the C library's own. The descriptor that the program gets is one that poll, select and epoll know of; what else it
//! does with it comes to the [`device`] that it is of. A program that calls the kernel without the C library is not reached.
//!
//! `UMMUNOTIFY_WATCHER` names the watcher of `/dev/ummunotify`.

mod device;
mod functions;
mod next;
mod table;
mod umem;
mod ummunotify;
mod user;
