//! Preloaded into a program (`LD_PRELOAD`, as `umem exec` does), lets it open `/dev/ummunotify` where there is no such device.
//!
//! The functions of the C library by which a program uses the device are replaced ([`functions`]). For every other file they
//! call the C library's own. The descriptor that the program gets is one that poll, select and epoll know of; what else it
//! does with it comes to [`device`]. A program that calls the kernel without the C library is not reached.
//!
//! `UMMUNOTIFY_WATCHER` names the watcher.

mod device;
mod functions;
mod next;
mod signal;
mod table;
mod user;
