//! The BPF program at KVM's tracepoint `kvm_unmap_hva_range`.
//!
//! It runs in the middle of each invalidation of an address space that has a VM, of this process or another, in whatever
//! context invalidates. Its arguments are the first address and the one after the last; whose they are it cannot know. If they
//! overlap a watched range ([`super::filter`]) it puts them into the ring and adds 1 to the counter; so an invalidation of the
//! same addresses in another process is one event too many, and never one too few.

use std::mem::offset_of;
use std::os::fd::RawFd;

use super::assembler::{Alu, Assembler, Helper, If, Instruction, Label, Width};
use super::assembler::{R0, R1, R2, R3, R6, R7, R8, R9, R10};
use super::filter::{GRACE, GROUP, GROUPS, KEY_MAX, LEVELS, LEVELS_SHIFT, Node, VERSION_SHIFT};

/// What user space tells the program.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Control {
    /// The filter's root word.
    pub(crate) root: u64,
    /// How to hand over what was hit: [`WAKE`] or [`DO_NOT_WAKE`].
    pub(crate) wake: u64,
}

/// Who waits on the ring is woken, if it was empty.
pub(crate) const WAKE: u64 = 0;
/// `BPF_RB_NO_WAKEUP`.
pub(crate) const DO_NOT_WAKE: u64 = 1;

/// What the program tells user space, beside the ring. The first word is the counter.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Published {
    /// Invalidations that hit something.
    pub(crate) counter: u64,
    /// Those of them for which the ring had no room.
    pub(crate) lost: u64,
}

/// An invalidation in the ring.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Record {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

/// The maps that the program uses, by their descriptors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Maps {
    /// A map of one map: the nodes of the filter.
    pub(crate) nodes: RawFd,
    pub(crate) control: RawFd,
    pub(crate) published: RawFd,
    pub(crate) ring: RawFd,
}

// Places in the frame.
const ROOT: i16 = -8;
const LEVEL_COUNT: i16 = -16;
const SLOT: i16 = -20;

// What registers hold from one function of the kernel to the next.
const START: super::assembler::Reg = R6;
const END: super::assembler::Reg = R7;
const CONTROL: super::assembler::Reg = R8;
const NODES: super::assembler::Reg = R9;

/// The program. It returns 1 if it took the invalidation for a hit.
pub(crate) fn assemble(maps: Maps) -> Vec<Instruction> {
    let mut p = Assembler::default();
    let (hit, miss) = (p.label(), p.label());

    p.load(Width::Word64, START, R1, 0);
    p.load(Width::Word64, END, R1, 8);
    let end_is_low = p.label();
    p.load_constant(R2, KEY_MAX);
    p.jump_if(END, If::AtMost, R2, end_is_low);
    p.alu(Alu::Move, END, R2);
    p.place(end_is_low);

    p.load_map_value(CONTROL, maps.control);
    p.load(Width::Word64, R1, CONTROL, offset_of!(Control, root) as i16);
    p.store(Width::Word64, R10, ROOT, R1);
    p.alu(Alu::Move, R2, R1);
    p.alu_with(Alu::ShiftRight, R2, LEVELS_SHIFT as i32);
    p.alu_with(Alu::And, R2, 0xff);
    p.store(Width::Word64, R10, LEVEL_COUNT, R2);

    // The map of nodes; it is another one when the filter has grown.
    p.store_value(Width::Word32, R10, SLOT, 0);
    p.load_map(R1, maps.nodes);
    look_up(&mut p, hit);
    p.alu(Alu::Move, NODES, R0);

    p.load(Width::Word64, R1, R10, ROOT);
    p.alu_with(Alu::And, R1, (1 << LEVELS_SHIFT) - 1);
    p.store(Width::Word32, R10, SLOT, R1);
    for level in (1..=LEVELS).rev() {
        search_node(&mut p, level, hit, miss);
    }

    // No overlap, if what was read is what was there.
    p.place(miss);
    p.load(Width::Word64, R1, CONTROL, offset_of!(Control, root) as i16);
    p.alu_with(Alu::ShiftRight, R1, VERSION_SHIFT as i32);
    p.load(Width::Word64, R2, R10, ROOT);
    p.alu_with(Alu::ShiftRight, R2, VERSION_SHIFT as i32);
    p.alu_32(Alu::Sub, R1, R2);
    p.jump_if_value(R1, If::AtLeast, GRACE as i32, hit);
    p.alu_with(Alu::Move, R0, 0);
    p.exit();

    p.place(hit);
    report(&mut p, maps);
    p.finish()
}

/// The value at index `SLOT` of the map in R1, into R0. A value that is not there is as good as a hit.
fn look_up(p: &mut Assembler, hit: Label) {
    p.alu(Alu::Move, R2, R10);
    p.alu_with(Alu::Add, R2, SLOT.into());
    p.call(Helper::MapLookup);
    p.jump_if_value(R0, If::Equal, 0, hit);
}

/// Searches the node in `SLOT`, if the tree has so many levels, and puts the next one there.
fn search_node(p: &mut Assembler, level: u32, hit: Label, miss: Label) {
    let below = p.label();
    p.load(Width::Word64, R1, R10, LEVEL_COUNT);
    p.jump_if_value(R1, If::Less, level as i32, below);
    p.alu(Alu::Move, R1, NODES);
    look_up(p, hit);

    // How many keys are less than END, into R1: first how many groups are, then how many of the next one.
    p.alu_with(Alu::Move, R1, 0);
    count_less(p, offset_of!(Node, group_ends), GROUPS);
    p.alu_with(Alu::ShiftLeft, R1, GROUP.ilog2() as i32);
    count_less(p, offset_of!(Node, keys), GROUP);
    p.alu(Alu::Move, R2, R1);
    p.alu_with(Alu::ShiftLeft, R2, 3);
    p.alu(Alu::Add, R2, R0);
    if level == 1 {
        p.load(Width::Word64, R3, R2, offset_of!(Node, before) as i16);
        p.jump_if(R3, If::Greater, START, hit);
    } else {
        p.jump_if_value(R1, If::Equal, 0, miss);
        // Of the entries before the last of these; that one is the node to search next.
        p.load(Width::Word64, R3, R2, offset_of!(Node, before) as i16 - 8);
        p.jump_if(R3, If::Greater, START, hit);
        p.alu_with(Alu::ShiftLeft, R1, 2);
        p.alu(Alu::Add, R1, R0);
        p.load(Width::Word32, R1, R1, offset_of!(Node, children) as i16 - 4);
        p.store(Width::Word32, R10, SLOT, R1);
    }
    p.place(below);
}

/// Adds to R1 how many keys are less than END, of `width` from the index R1 on in the node R0, the last of which is not: by
/// halving, without branches, so that the verifier has one way to follow.
fn count_less(p: &mut Assembler, keys: usize, width: usize) {
    let mut step = width / 2;
    while step > 0 {
        p.alu(Alu::Move, R2, R1);
        p.alu_with(Alu::ShiftLeft, R2, 3);
        p.alu(Alu::Add, R2, R0);
        p.load(Width::Word64, R3, R2, (keys + (step - 1) * 8) as i16);
        p.alu(Alu::Sub, R3, END);
        p.alu_with(Alu::ShiftRightSigned, R3, 63);
        p.alu_with(Alu::And, R3, step as i32);
        p.alu(Alu::Add, R1, R3);
        step /= 2;
    }
}

/// Tells user space of the invalidation.
///
/// The record is in the ring (though not yet valid) before the counter moves, so who has seen the counter finds the record.
/// And the counter moves, which is a full barrier, before it is looked up whether anybody waits: who first says that he waits
/// and then finds the ring empty will be woken.
fn report(p: &mut Assembler, maps: Maps) {
    let lost = p.label();
    p.load_map(R1, maps.ring);
    p.alu_with(Alu::Move, R2, size_of::<Record>() as i32);
    p.alu_with(Alu::Move, R3, 0);
    p.call(Helper::RingReserve);
    p.load_map_value(R2, maps.published);
    p.alu_with(Alu::Move, R3, 1);
    p.jump_if_value(R0, If::Equal, 0, lost);

    p.store(Width::Word64, R0, offset_of!(Record, start) as i16, START);
    p.store(Width::Word64, R0, offset_of!(Record, end) as i16, END);
    p.atomic_add(R2, offset_of!(Published, counter) as i16, R3);
    p.alu(Alu::Move, R1, R0);
    p.load(Width::Word64, R2, CONTROL, offset_of!(Control, wake) as i16);
    p.call(Helper::RingSubmit);
    p.alu_with(Alu::Move, R0, 1);
    p.exit();

    p.place(lost);
    p.atomic_add(R2, offset_of!(Published, lost) as i16, R3);
    p.atomic_add(R2, offset_of!(Published, counter) as i16, R3);
    p.alu_with(Alu::Move, R0, 1);
    p.exit();
}
