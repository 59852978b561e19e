//! The watcher `kvm`: KVM's MMU notifier, heard through its tracepoint, with no kernel module.
//!
//! KVM registers an MMU notifier on the address space of every process that makes a VM, be it an empty one. Its tracepoint
//! `kvm_unmap_hva_range` is hit in the middle of every invalidation, before the call that invalidates returns; a BPF program
//! there ([`program`]) compares the addresses with those that are watched ([`filter`]), moves the counter and puts the
//! addresses into a ring ([`ring`]). Nobody waits for user space, which works out what was hit when it is asked.

mod assembler;
mod filter;
mod nodes;
mod program;
mod ring;
mod sys;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering::SeqCst, fence};

use self::filter::Filter;
use self::nodes::Nodes;
use self::program::{Maps, Published};
use self::ring::Ring;
use self::sys::{MAPPABLE, Map, MapKind};
use super::{Noticed, Watcher, vm};
use crate::counter::{Counter, CounterPage};
use crate::ranges::{AddressRange, Ranges};

/// Why KVM's notifier cannot be heard.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no VM to be had.
    #[error("cannot make a VM: /dev/kvm is not there, or not for this user")]
    Vm(#[source] io::Error),
    /// BPF is not for this process.
    #[error("no permission to use BPF: it needs CAP_BPF and CAP_PERFMON, or root")]
    Permission,
    /// There is no memory for the maps, or the kernel does not know them.
    #[error("cannot make BPF maps: they need Linux 5.10")]
    Maps(#[source] io::Error),
    /// The program was refused.
    #[error("the kernel refuses the BPF program")]
    Load(#[source] io::Error),
    /// There is no such tracepoint.
    #[error("cannot attach to the tracepoint kvm_unmap_hva_range")]
    Attach(#[source] io::Error),
}

/// The watcher.
#[derive(Debug)]
pub(crate) struct Kvm {
    filter: Filter<Nodes>,
    ring: Ring,
    counter: CounterPage,
    /// How many invalidations the ring had no room for when it was last drained.
    lost: u64,
    /// What keeps the program at the tracepoint; then what keeps the tracepoint being hit.
    _attached: OwnedFd,
    #[cfg(test)]
    program: OwnedFd,
    _vm: Arc<OwnedFd>,
}

impl Kvm {
    /// Opens it: from now on invalidations are noticed.
    pub(crate) fn open() -> Result<(Self, Counter), KvmError> {
        let vm = vm::get().map_err(KvmError::Vm)?;
        let nodes = Nodes::new().map_err(refused_map)?;
        let published = Map {
            kind: MapKind::Array,
            value_size: size_of::<Published>() as u32,
            entries: 1,
            flags: MAPPABLE,
            inner: None,
        };
        let published = published.create().map_err(refused_map)?;
        sys::freeze(published.as_fd()).map_err(refused_map)?;
        let ring = Ring::new().map_err(refused_map)?;
        let program = program::assemble(Maps {
            nodes: nodes.outer().as_raw_fd(),
            control: nodes.control().as_raw_fd(),
            published: published.as_raw_fd(),
            ring: ring.map().as_raw_fd(),
        });
        let program = sys::load(&program).map_err(|error| match error.raw_os_error() {
            Some(libc::EPERM) => KvmError::Permission,
            _ => KvmError::Load(error),
        })?;
        let attached = sys::attach(program.as_fd(), c"kvm_unmap_hva_range").map_err(KvmError::Attach)?;
        let counter = CounterPage::map(published).map_err(KvmError::Maps)?;
        let watcher = Self {
            filter: Filter::new(nodes),
            ring,
            counter: counter.clone(),
            lost: 0,
            _attached: attached,
            #[cfg(test)]
            program,
            _vm: vm,
        };
        Ok((watcher, Counter::of(counter)))
    }
}

fn refused_map(error: io::Error) -> KvmError {
    match error.raw_os_error() {
        Some(libc::EPERM) => KvmError::Permission,
        _ => KvmError::Maps(error),
    }
}

impl Watcher for Kvm {
    fn watch(&mut self, range: AddressRange) -> io::Result<()> {
        self.filter.add(range)
    }

    fn unwatch(&mut self, range: AddressRange, _: &Ranges) {
        // Without memory for it, the program goes on to take for a hit what no longer is one; the queue knows better.
        let _ = self.filter.remove(range);
    }

    fn drain(&mut self, noticed: &mut dyn FnMut(Noticed)) -> u64 {
        // Before the ring: what is counted by now is in there.
        let counter = self.counter.load();
        self.ring
            .drain(|record| noticed(Noticed::Invalidated(AddressRange::new(record.start, record.end))));
        let lost = self.counter.word(std::mem::offset_of!(Published, lost) / 8);
        if lost != self.lost {
            self.lost = lost;
            noticed(Noticed::Everything);
        }
        counter
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.ring.map())
    }

    fn wake(&mut self) {
        self.filter.slots.set_wake(true);
        // Either the program, which has moved the counter before, sees this, or who drains now sees the counter.
        fence(SeqCst);
    }
}

#[cfg(test)]
mod tests;
