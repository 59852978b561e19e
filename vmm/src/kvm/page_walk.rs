//! The pages that a vCPU needs to go on from where it stands: those that its registers point to, and the page tables that lead there.
//!
//! Intel SDM volume 3, 4.5: 4-level and 5-level paging. Of a vCPU in another paging mode nothing is followed that is paged: its guest
//! has a few more page faults, and that is all.

use std::collections::{BTreeMap, BTreeSet};

use super::VcpuState;
use crate::address_map::PAGE_SIZE;

/// Eight bytes an entry.
type Table = [u64; 512];

/// Where in an entry, and in CR3, the address is.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const PRESENT: u64 = 1;
/// In an entry of a higher level: it maps a large page.
const LARGE: u64 = 1 << 7;

/// What of a vCPU's state points to memory.
#[derive(Debug, Default)]
pub(super) struct Pointers {
    /// Whether linear addresses are translated, and by how many levels of tables.
    pub(super) paging: Paging,
    /// Guest-physical address of the highest table.
    pub(super) root: u64,
    pub(super) linear: Vec<u64>,
    pub(super) physical: Vec<u64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Paging {
    /// Linear addresses are physical ones.
    Off,
    /// By 4 or 5 levels.
    Levels(u32),
    /// By tables that are not followed here.
    #[default]
    Other,
}

/// Guest-physical addresses of the pages that a vCPU in this state is going to touch at once, as far as its state tells. `table` answers
/// what is in a page, where it can.
pub(crate) fn pages_at_hand(
    state: &VcpuState,
    table: impl FnMut(u64) -> Option<Box<Table>>,
) -> BTreeSet<u64> {
    walk(&state.pointers(), table)
}

fn walk(pointers: &Pointers, mut table: impl FnMut(u64) -> Option<Box<Table>>) -> BTreeSet<u64> {
    let mut tables: BTreeMap<u64, Option<Box<Table>>> = BTreeMap::new();
    let mut pages: BTreeSet<u64> = pointers
        .physical
        .iter()
        .map(|address| page_of(*address))
        .collect();
    for linear in &pointers.linear {
        let levels = match pointers.paging {
            Paging::Off => {
                pages.insert(page_of(*linear));
                continue;
            }
            Paging::Levels(levels) => levels,
            Paging::Other => continue,
        };
        let mut at = pointers.root & ADDRESS;
        for level in (0..levels).rev() {
            pages.insert(at);
            let content = tables.entry(at).or_insert_with(|| table(at));
            let shift = 12 + 9 * level;
            let entry = content
                .as_ref()
                .map_or(0, |content| content[(linear >> shift & 511) as usize]);
            if entry & PRESENT == 0 {
                break;
            }
            if level == 0 || (level <= 2 && entry & LARGE != 0) {
                let within = (1 << shift) - 1;
                pages.insert(page_of(entry & ADDRESS & !within | linear & within));
                break;
            }
            at = entry & ADDRESS;
        }
    }
    pages
}

fn page_of(address: u64) -> u64 {
    address - address % PAGE_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tables at their addresses, made of what their entries are.
    fn tables(entries: &'static [(u64, usize, u64)]) -> impl FnMut(u64) -> Option<Box<Table>> {
        move |at| {
            let mut table = Box::new([0; 512]);
            let mut there = false;
            for (_, index, entry) in entries.iter().filter(|(of, ..)| *of == at) {
                table[*index] = *entry;
                there = true;
            }
            there.then_some(table)
        }
    }

    fn pointers(levels: u32, linear: &[u64]) -> Pointers {
        Pointers {
            paging: Paging::Levels(levels),
            // Its lower bits are flags.
            root: 0x1018,
            linear: linear.to_vec(),
            physical: vec![0x9_9123],
        }
    }

    #[test]
    fn tables_and_pages_of_every_size_are_found() {
        const NO_EXECUTE: u64 = 1 << 63;
        let found = walk(
            &pointers(
                4,
                &[
                    0x0000_0000_0060_3004,
                    0x0000_0000_0080_1234,
                    0xffff_8000_4012_3456,
                    0x0000_0000_00a0_0000,
                    0x0000_7000_0000_0000,
                ],
            ),
            tables(&[
                (0x1000, 0, 0x2000 | 3),
                (0x1000, 256, 0x5000 | 3),
                (0x2000, 0, 0x3000 | 3),
                // 0x60_0000: a table; 0x80_0000: a page of 2 MiB; 0xa0_0000: nothing.
                (0x3000, 3, 0x4000 | 3),
                (0x3000, 4, NO_EXECUTE | 0x40_0000 | LARGE | 3),
                (0x4000, 3, NO_EXECUTE | 0x7000 | 3),
                // A page of 1 GiB.
                (0x5000, 1, 0x8000_0000 | LARGE | 3),
            ]),
        );
        let expected = [
            0x9_9000,
            0x1000,
            0x2000,
            0x3000,
            0x4000,
            0x7000,
            0x40_1000,
            0x5000,
            0x8012_3000,
        ];
        assert_eq!(found, BTreeSet::from(expected));
    }

    #[test]
    fn five_levels_are_followed() {
        let found = walk(
            &pointers(5, &[0x0001_0000_0000_0000]),
            tables(&[
                (0x1000, 1, 0x2001),
                (0x2000, 0, 0x3001),
                (0x3000, 0, 0x4001),
                (0x4000, 0, 0x5001),
                (0x5000, 0, 0x6001),
            ]),
        );
        let expected = [0x9_9000, 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000];
        assert_eq!(found, BTreeSet::from(expected));
    }

    #[test]
    fn what_is_not_paged_is_where_it_is_said_to_be() {
        let off = Pointers {
            paging: Paging::Off,
            ..pointers(4, &[0x7c05])
        };
        assert_eq!(walk(&off, |_| None), BTreeSet::from([0x7000, 0x9_9000]));
        let other = Pointers {
            paging: Paging::Other,
            ..pointers(4, &[0x7c05])
        };
        assert_eq!(walk(&other, |_| None), BTreeSet::from([0x9_9000]));
    }

    /// Tables that point to each other make no endless walk.
    #[test]
    fn a_loop_ends() {
        let found = walk(&pointers(4, &[0, 0x1000]), |_| Some(Box::new([0x1001; 512])));
        assert_eq!(found, BTreeSet::from([0x1000, 0x9_9000]));
    }
}
