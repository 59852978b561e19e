//! A balloon, driven by hand: by a driver that does what it should, and by guests that do not.

use super::*;
use proptest::prelude::*;
use umem::region::{Backing, PageSize, Region};

use crate::address_map::RamMap;
use crate::control::Control;
use crate::dirty::{OwnWrites, PageBitmap};
use crate::removal::Ram;

const RAM: u64 = 16 << 20;
/// Nothing takes so long.
const PATIENCE: Duration = Duration::from_secs(20);
const ALL: BalloonOptions = BalloonOptions {
    size: 8 << 20,
    free_page_reporting: true,
    deflate_on_oom: true,
};

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// A machine that is nothing but RAM and a balloon.
struct Machine {
    balloon: Balloon,
    own_writes: Arc<OwnWrites>,
    /// Chains given in each queue.
    given: [u16; 3],
}

/// Where a queue is in RAM: descriptors, available ring, used ring, and a page for what is given.
fn place(queue: usize) -> [u64; 4] {
    [0, 1, 2, 3].map(|part| (1 << 20) + (queue as u64 * 4 + part) * PAGE_SIZE)
}

/// Waits for what the balloon's thread does. `what`: what it has not done.
fn wait(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "{what}");
        thread::yield_now();
    }
}

fn ram(own_writes: &Arc<OwnWrites>) -> Ram {
    let region = Region::new(RAM, Backing::Memfd, PageSize::Small).unwrap();
    Ram::new(
        Arc::new(region),
        RamMap::new(RAM).unwrap(),
        Arc::clone(own_writes),
    )
    .unwrap()
}

impl Machine {
    fn new() -> Self {
        let own_writes = Arc::new(OwnWrites::new(RAM / PAGE_SIZE));
        let remover = Arc::new(Remover::new(ram(&own_writes), Control::new()));
        let balloon = Balloon::new(ALL, remover, EventFd::new(libc::EFD_NONBLOCK).unwrap()).unwrap();
        Self {
            balloon,
            own_writes,
            given: [0; 3],
        }
    }

    /// One whose driver is ready.
    fn ready() -> Self {
        let mut machine = Self::new();
        machine.start_driver(16);
        machine
    }

    fn memory(&self) -> &MappedRam {
        self.balloon.mmio.device().shared.remover.ram().memory()
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.balloon.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        self.balloon.write(offset, &value.to_le_bytes());
    }

    fn start_driver(&mut self, size: u32) {
        self.write(0x70, 0);
        assert_eq!(self.read(0x70), 0);
        self.write(0x70, 1 | 2);
        for (select, features) in [(0, (PAGE_REPORTING | DEFLATE_ON_OOM) as u32), (1, 1)] {
            self.write(0x14, select);
            assert_eq!(self.read(0x10), features);
            self.write(0x24, select);
            self.write(0x20, features);
        }
        self.write(0x70, 1 | 2 | 8);
        assert_eq!(self.read(0x70), 1 | 2 | 8);
        for queue in 0..3 {
            self.memory()
                .write_slice(&[0; 4 * PAGE_SIZE as usize], GuestAddress(place(queue)[0]))
                .unwrap();
            self.write(0x30, queue as u32);
            assert_eq!(self.read(0x34), u32::from(QUEUE_SIZE));
            self.write(0x38, size);
            for (register, at) in [0x80, 0x90, 0xa0].into_iter().zip(place(queue)) {
                self.write(register, at as u32);
                self.write(register + 4, (at >> 32) as u32);
            }
            self.write(0x44, 1);
        }
        self.given = [0; 3];
        self.write(0x70, 1 | 2 | 8 | 4);
        assert_eq!(self.read(0x70), 1 | 2 | 8 | 4);
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory().write_obj(value, GuestAddress(at)).unwrap();
    }

    fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.memory().read_obj(GuestAddress(at)).unwrap()
    }

    /// Descriptors, as address, length, flags and next.
    fn describe(&self, queue: usize, descriptors: &[(u64, u32, u16, u16)]) {
        let table = place(queue)[0];
        for (at, (address, length, flags, next)) in (table..).step_by(16).zip(descriptors) {
            self.put(at, *address);
            self.put(at + 8, *length);
            self.put(at + 12, *flags);
            self.put(at + 14, *next);
        }
    }

    /// Gives the chain that begins with descriptor 0.
    fn give(&mut self, queue: usize) {
        self.given[queue] = self.given[queue].wrapping_add(1);
        self.put(place(queue)[1] + 2, self.given[queue]);
        self.write(0x50, queue as u32);
    }

    fn used(&self, queue: usize) -> u16 {
        self.get(place(queue)[2] + 2)
    }

    /// Gives, and waits until it has come back.
    fn serve(&mut self, queue: usize) {
        self.give(queue);
        wait("a chain does not come back", || {
            self.used(queue) == self.given[queue]
        });
    }

    fn inflate(&mut self, numbers: &[u32]) {
        let buffer = place(INFLATE)[3];
        for (at, number) in (buffer..).step_by(4).zip(numbers) {
            self.put(at, *number);
        }
        self.describe(INFLATE, &[(buffer, numbers.len() as u32 * 4, 0, 0)]);
        self.serve(INFLATE);
    }

    /// Writes something to these pages.
    fn fill(&self, pages: std::ops::Range<u64>) {
        pages.for_each(|page| self.put(page * PAGE_SIZE + 8, 0xfeed_u64 + page));
    }

    /// Of these pages those that read zero.
    fn zero(&self, pages: std::ops::Range<u64>) -> Vec<u64> {
        pages
            .filter(|page| self.get::<u64>(page * PAGE_SIZE + 8) == 0)
            .collect()
    }

    /// It works as it should.
    fn assert_works(&mut self) {
        self.start_driver(16);
        self.fill(3000..3010);
        self.inflate(&[3001, 3002, 3007]);
        assert_eq!(self.zero(3000..3010), [3001, 3002, 3007]);
    }
}

#[test]
fn what_is_put_in_is_taken_out_of_ram_and_nothing_else_is() {
    let mut machine = Machine::ready();
    machine.fill(2000..2020);
    machine.inflate(&[2005, 2003, 2004, 2010, 2005]);
    assert_eq!(machine.zero(2000..2020), [2003, 2004, 2005, 2010]);
    // An interrupt, and no other word: the last that it does.
    wait("no interrupt", || machine.read(0x60) == 1);
    machine.write(0x64, 1);
    assert_eq!(machine.read(0x60), 0);
    // Also for who wants to know what has changed: the ring too, which this process has written to.
    let mut written = PageBitmap::new(RAM / PAGE_SIZE);
    machine.own_writes.take(&mut written);
    let runs: Vec<(u64, u64)> = written.runs().map(|run| (run.start.0, run.count)).collect();
    assert_eq!(runs, [(place(INFLATE)[2] / PAGE_SIZE, 1), (2003, 3), (2010, 1)]);
    let status = machine.balloon.status();
    assert_eq!((status.inflated, status.target), (5 * PAGE_SIZE, ALL.size));
}

#[test]
fn what_is_reported_goes_in_whole_pages() {
    let mut machine = Machine::ready();
    machine.fill(2000..2020);
    let at = |page: u64| page * PAGE_SIZE;
    machine.describe(
        REPORT,
        &[
            (at(2001), 2 * PAGE_SIZE as u32, WRITE | NEXT, 1),
            (at(2005) + 1, 3 * PAGE_SIZE as u32, WRITE | NEXT, 2),
            (at(2015), 100, WRITE, 0),
        ],
    );
    machine.serve(REPORT);
    assert_eq!(machine.zero(2000..2020), [2001, 2002, 2006, 2007]);
    assert_eq!(machine.balloon.status().reported, 4 * PAGE_SIZE);
}

#[test]
fn a_guest_may_give_what_it_has_not_and_what_it_needs() {
    let mut machine = Machine::ready();
    machine.fill(2000..2004);
    let beyond = (RAM / PAGE_SIZE) as u32;
    machine.inflate(&[beyond, u32::MAX, 0xfee00, 2001, 0xfeb00]);
    assert_eq!(machine.zero(2000..2004), [2001]);
    // Its own rings: what it reads there is its own affair.
    let rings: Vec<u32> = place(INFLATE).map(|at| (at / PAGE_SIZE) as u32).into();
    let buffer = 0x20_0000;
    for (at, number) in (buffer..).step_by(4).zip(&rings) {
        machine.put(at, *number);
    }
    machine.describe(INFLATE, &[(buffer, 16, 0, 0)]);
    machine.give(INFLATE);
    wait("the rings do not go", || {
        machine
            .zero(place(INFLATE)[3] / PAGE_SIZE..place(INFLATE)[3] / PAGE_SIZE + 1)
            .len()
            == 1
    });
    machine.assert_works();
}

#[test]
fn chains_that_make_no_sense_come_back_or_end_the_driver() {
    let end = RAM - 8;
    for descriptors in [
        // Round in circles, into itself, beyond the table.
        vec![(0x20_0000, 16, NEXT, 1), (0x20_0000, 16, NEXT, 0)],
        vec![(0x20_0000, 16, NEXT, 0)],
        vec![(0x20_0000, 16, NEXT, 9999)],
        // Beyond RAM, across its end, around the end of all addresses, endless, empty, not a number long.
        vec![(RAM, 4096, 0, 0)],
        vec![(end, 4096, 0, 0)],
        vec![(u64::MAX - 7, 4096, 0, 0)],
        vec![(0x20_0000, u32::MAX, 0, 0)],
        vec![(0x20_0000, 0, 0, 0)],
        vec![(0x20_0000, 3, 0, 0)],
        // For the device to write.
        vec![(0x20_0000, 16, WRITE, 0)],
        // Tables of tables.
        vec![(place(INFLATE)[0], 4096, 4, 0)],
        vec![(RAM, 4096, 4, 0)],
    ] {
        for queue in [INFLATE, DEFLATE, REPORT] {
            let mut machine = Machine::ready();
            machine.describe(queue, &descriptors);
            machine.give(queue);
            wait("nothing comes of it", || {
                machine.used(queue) == 1 || machine.read(0x70) & 64 != 0
            });
            machine.assert_works();
        }
    }
}

#[test]
fn a_driver_that_gives_more_than_there_is_has_to_begin_anew() {
    let mut machine = Machine::ready();
    machine.put(place(INFLATE)[1] + 2, 17_u16);
    machine.write(0x50, 0);
    wait("it is not told", || machine.read(0x60) & 2 != 0);
    assert_eq!(machine.read(0x70) & 64, 64);
    // Until then nothing is done.
    machine.fill(2000..2001);
    machine.put(place(REPORT)[1] + 2, 1_u16);
    machine.write(0x50, 2);
    assert_eq!(machine.zero(2000..2001), [0; 0]);
    machine.assert_works();
}

#[test]
fn registers_take_only_what_is_due() {
    let machine = Machine::new();
    assert_eq!(machine.read(0), 0x7472_6976);
    assert_eq!((machine.read(4), machine.read(8)), (2, 5));
    // Neither queues nor readiness before features.
    machine.write(0x44, 1);
    machine.write(0x70, 1 | 2 | 4);
    assert_eq!((machine.read(0x44), machine.read(0x70)), (0, 3));
    // A feature that there is not; virtio 1 not wanted.
    machine.write(0x24, 0);
    machine.write(0x20, 1 << 7);
    machine.write(0x70, 1 | 2 | 8);
    assert_eq!(machine.read(0x70), 3);
    machine.write(0x20, 0);
    machine.write(0x70, 1 | 2 | 8);
    assert_eq!(machine.read(0x70), 3);
    machine.write(0x24, 1);
    machine.write(0x20, 1);
    machine.write(0x70, 1 | 2 | 8);
    assert_eq!(machine.read(0x70), 11);
    // Sizes that cannot be, and a queue that is not there.
    for size in [0, 3, 512, 1 << 31] {
        machine.write(0x38, size);
    }
    machine.write(0x30, 3);
    assert_eq!(machine.read(0x34), 0);
    machine.write(0x44, 1);
    machine.write(0x50, 77);
    // Other widths and odd places.
    for (offset, data) in [
        (1_u64, &[1_u8, 2, 3, 4][..]),
        (0x70, &[0]),
        (0x70, &[0; 8]),
        (0x1fe, &[9; 8]),
    ] {
        machine.balloon.write(offset, data);
    }
    assert_eq!(machine.read(0x70), 11);
    assert_eq!(machine.read(0x100), (ALL.size / PAGE_SIZE) as u32);
    let mut wide = [1; 16];
    machine.balloon.read(0x100, &mut wide);
    assert_eq!(wide[4..], [0; 12]);
}

#[test]
fn while_it_stands_still_nothing_is_done_and_then_all_is() {
    let mut machine = Machine::ready();
    machine.fill(2000..2001);
    assert!(machine.balloon.stand_still(PATIENCE));
    machine.put(place(INFLATE)[3], 2000_u32);
    machine.describe(INFLATE, &[(place(INFLATE)[3], 4, 0, 0)]);
    machine.give(INFLATE);
    let state = machine.balloon.save();
    assert_eq!((machine.used(INFLATE), machine.zero(2000..2001).len()), (0, 0));
    machine.balloon.go_on();
    wait("it does not go on", || machine.used(INFLATE) == 1);
    assert_eq!(machine.zero(2000..2001), [2000]);

    // What was saved goes on by itself, in other RAM with the same content, and without being told.
    let text = serde_json::to_string(&state).unwrap();
    let state: BalloonState = serde_json::from_str(&text).unwrap();
    assert!(state.is_possible());
    let own_writes = Arc::new(OwnWrites::new(RAM / PAGE_SIZE));
    let ram = ram(&own_writes);
    for at in place(INFLATE) {
        let mut page = [0; PAGE_SIZE as usize];
        machine.memory().read_slice(&mut page, GuestAddress(at)).unwrap();
        ram.memory().write_slice(&page, GuestAddress(at)).unwrap();
    }
    // As it was then.
    ram.memory()
        .write_obj(0_u16, GuestAddress(place(INFLATE)[2] + 2))
        .unwrap();
    ram.memory()
        .write_obj(7_u64, GuestAddress(2000 * PAGE_SIZE + 8))
        .unwrap();
    let remover = Arc::new(Remover::new(ram, Control::new()));
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let mut restored = Machine {
        balloon: Balloon::restored(&state, remover, event).unwrap(),
        own_writes,
        given: machine.given,
    };
    wait("it does not go on elsewhere", || restored.used(INFLATE) == 1);
    assert_eq!(restored.zero(2000..2001), [2000]);
    restored.fill(2100..2102);
    restored.inflate(&[2101]);
    assert_eq!(restored.zero(2100..2102), [2101]);
}

#[test]
fn another_size_is_told() {
    let machine = Machine::ready();
    assert_eq!(machine.balloon.resize(5 * PAGE_SIZE), 5 * PAGE_SIZE);
    assert_eq!((machine.read(0x100), machine.read(0x60) & 2), (5, 2));
    assert_eq!(machine.balloon.resize(u64::MAX), RAM);
    machine.write(0x104, 5);
    assert_eq!(machine.balloon.status().actual, 5 * PAGE_SIZE);
}

#[test]
fn a_state_that_cannot_be_is_found() {
    let machine = Machine::ready();
    assert!(machine.balloon.stand_still(PATIENCE));
    let state = serde_json::to_value(machine.balloon.save()).unwrap();
    let is_possible = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut changed = state.clone();
        change(&mut changed);
        serde_json::from_value::<BalloonState>(changed).is_ok_and(|state| state.is_possible())
    };
    assert!(is_possible(&|_| {}));
    assert!(!is_possible(
        &|state| state["registers"]["queues"][0]["size"] = 3.into()
    ));
    assert!(!is_possible(
        &|state| state["registers"]["queues"][0]["size"] = 512.into()
    ));
    assert!(!is_possible(&|state| state["free_page_reporting"] = false.into()));
    assert!(!is_possible(&|state| state["more"] = 1.into()));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever is in the rings and registers, the next driver finds a balloon that works.
    #[test]
    fn no_guest_breaks_it(
        garbage in prop::collection::vec(any::<u64>(), 64),
        writes in prop::collection::vec((0..0x40_u64, prop_oneof![0..20_u32, any::<u32>()]), 0..40),
    ) {
        let mut machine = Machine::ready();
        for (queue, words) in garbage.chunks(21).take(3).enumerate() {
            for (at, word) in (place(queue)[0]..).step_by(8).zip(words) {
                // Some of it is nearly right.
                machine.put(at, if word % 3 == 0 { word % RAM } else { *word });
            }
            machine.put(place(queue)[1] + 2, (words[0] % 18) as u16);
            machine.write(0x50, queue as u32);
        }
        for (register, value) in writes {
            machine.write(register * 4, value);
        }
        machine.assert_works();
    }
}
