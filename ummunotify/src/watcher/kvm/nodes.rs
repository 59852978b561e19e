//! The filter's memory: an array of the kernel's that user space has mapped, and that is replaced by a greater one at need.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Release;

use rustix::mm::ProtFlags;

use super::filter::{Node, Slots};
use super::program::{Control, DO_NOT_WAKE, WAKE};
use super::sys::{MAPPABLE, Map, MapKind, REPLACEABLE, put_map};
use crate::mapping::Mapping;

/// Nodes to begin with: 2 MiB.
const FIRST: u32 = 1024;

/// The nodes, and the word that says which is the root.
#[derive(Debug)]
pub(crate) struct Nodes {
    /// The map in which the program finds the array.
    outer: OwnedFd,
    memory: Mapping,
    capacity: u32,
    control: OwnedFd,
    control_page: Mapping,
}

impl Nodes {
    pub(crate) fn new() -> io::Result<Self> {
        let (array, memory) = array(FIRST)?;
        let outer = Map {
            kind: MapKind::ArrayOfMaps,
            value_size: 4,
            entries: 1,
            flags: 0,
            inner: Some(array.as_fd()),
        };
        let outer = outer.create()?;
        put_map(outer.as_fd(), array.as_fd())?;
        let control = Map {
            kind: MapKind::Array,
            value_size: size_of::<Control>() as u32,
            entries: 1,
            flags: MAPPABLE,
            inner: None,
        };
        let control = control.create()?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let control_page = Mapping::shared(control.as_fd(), 0, size_of::<Control>(), protection)?;
        let nodes = Self {
            outer,
            memory,
            capacity: FIRST,
            control,
            control_page,
        };
        nodes.set_wake(false);
        Ok(nodes)
    }

    /// The map of the map of nodes.
    pub(crate) fn outer(&self) -> BorrowedFd<'_> {
        self.outer.as_fd()
    }

    /// The map with the root word.
    pub(crate) fn control(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }

    /// Whether the program wakes who waits on the ring.
    pub(crate) fn set_wake(&self, wake: bool) {
        let word = if wake { WAKE } else { DO_NOT_WAKE };
        self.store(std::mem::offset_of!(Control, wake), word);
    }

    fn store(&self, offset: usize, word: u64) {
        // SAFETY: a word of the control page, which is mapped as long as `self` is.
        let place = unsafe { self.control_page.start().add(offset).cast::<AtomicU64>().as_ref() };
        place.store(word, Release);
    }
}

/// An array of that many nodes, and where it is mapped.
fn array(capacity: u32) -> io::Result<(OwnedFd, Mapping)> {
    let array = Map {
        kind: MapKind::Array,
        value_size: size_of::<Node>() as u32,
        entries: capacity,
        flags: MAPPABLE | REPLACEABLE,
        inner: None,
    };
    let array = array.create()?;
    let length = size_of::<Node>() * capacity as usize;
    let memory = Mapping::shared(array.as_fd(), 0, length, ProtFlags::READ | ProtFlags::WRITE)?;
    Ok((array, memory))
}

impl Slots for Nodes {
    fn capacity(&self) -> u32 {
        self.capacity
    }

    fn node(&mut self, slot: u32) -> &mut Node {
        assert!(slot < self.capacity, "slot {slot} of {}", self.capacity);
        // SAFETY: in the mapped array, and any bytes are a node. The program may read it meanwhile, but writes nothing.
        unsafe { self.memory.start().cast::<Node>().add(slot as usize).as_mut() }
    }

    fn publish(&mut self, root: u64) {
        self.store(std::mem::offset_of!(Control, root), root);
    }

    fn grow(&mut self) -> io::Result<()> {
        let capacity = self.capacity * 2;
        let (array, memory) = array(capacity)?;
        // SAFETY: both mappings are at least as long as the shorter, and are different ones.
        unsafe {
            let (from, to) = (self.memory.start(), memory.start());
            to.cast::<Node>()
                .copy_from_nonoverlapping(from.cast::<Node>(), self.capacity as usize);
        }
        put_map(self.outer.as_fd(), array.as_fd())?;
        self.memory = memory;
        self.capacity = capacity;
        Ok(())
    }
}
