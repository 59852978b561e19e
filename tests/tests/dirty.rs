//! Which pages change, on the real KVM of this host, in RAM that a pager fills while the guest runs.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::sync::Arc;

use firmware::boot_info::{BootInfo, Protocol};
use proptest::prelude::*;
use tests::need;
use umem::image::{Image, ImageWriter};
use umem::pager::{Fill, Pager};
use umem::publish::Existing;
use umem::region::{Backing, PageSize, Region};
use umem::source::file::{Checksums, FileSource};
use umem::units::{PAGE_SIZE, PageIndex, PageRange};
use vm_memory::GuestAddress;
use vmm::address_map::{LOW_RAM_END, RamMap};
use vmm::dirty::{DirtyTracker, PageBitmap};
use vmm::ending::Ending;
use vmm::kvm::{AsyncPageFaults, Bus, CpuModel, Exit, Host, Vcpu, Vm, VmError};
use vmm::memory::GuestMemory;

/// RAM has two slots, the second of which is as large as this.
const HIGH_SIZE: u64 = 64 << 20;

/// Where in RAM the second slot begins, in pages.
const HIGH: u64 = LOW_RAM_END / PAGE_SIZE as u64;

/// Page tables are in the pages from here on, and end before the next.
const TABLES: u64 = 0x1;
const TABLES_END: u64 = 0x10;

/// The code, in a page of its own.
const CODE: u64 = 0x100;

/// Pages from here on are for nothing else.
const FREE: u64 = 0x200;

/// again: mov [rdi], eax; add rdi, rdx; dec rcx; jnz again; out 0xf4, al
const WRITE: [u8; 12] = [
    0x89, 0x07, 0x48, 0x01, 0xd7, 0x48, 0xff, 0xc9, 0x75, 0xf6, 0xe6, 0xf4,
];

/// The same with mov eax, [rdi].
const READ: [u8; 12] = [
    0x8b, 0x07, 0x48, 0x01, 0xd7, 0x48, 0xff, 0xc9, 0x75, 0xf6, 0xe6, 0xf4,
];

/// Where the one that reads is in the page of the code.
const READ_AT: u64 = 0x80;

/// Where the guest's instructions run. On a host without nested page tables KVM emulates ring 0.
#[derive(Clone, Copy, Debug)]
enum Ring {
    Kernel,
    User,
}

struct Exits;

impl Bus for Exits {
    fn read_port(&self, _port: u16, _data: &mut [u8]) {}

    fn write_port(&self, port: u16, _data: &[u8]) -> Option<Ending> {
        (port == 0xf4).then_some(Ending::GuestExit(0))
    }

    fn write_memory(&self, address: GuestAddress, _data: &[u8]) -> Option<Ending> {
        panic!("{address:?} is no memory")
    }
}

struct Machine {
    // Dropped in this order: nothing that the guest sees goes before the VM.
    vcpu: Vcpu,
    vm: Vm,
    memory: GuestMemory,
    region: Arc<Region>,
    map: RamMap,
    _pager: Pager,
    _directory: tempfile::TempDir,
}

impl Machine {
    fn new(backing: Backing) -> Self {
        Self::with(LOW_RAM_END + HIGH_SIZE, backing, PageSize::Small)
    }

    fn with(size: u64, backing: Backing, page_size: PageSize) -> Self {
        let map = RamMap::new(size).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let mut writer = ImageWriter::create(&path, size).unwrap();
        let pages = content().into_iter();
        for (page, content) in pages.filter(|(page, _)| *page < size / PAGE_SIZE as u64) {
            writer.write_page(PageIndex(page), &content).unwrap();
        }
        writer.finish(b"", Existing::Keep).unwrap();
        let source = FileSource::new(Image::open(&path).unwrap(), Checksums::On);
        let region = Arc::new(Region::new(size, backing, page_size).unwrap());
        let pager = Pager::start(Arc::clone(&region), Arc::new(source), Fill::Off, |notice| {
            panic!("{notice:?}");
        });
        let pager = pager.unwrap();

        let host = Host::open().unwrap();
        let vm = Vm::new(&host).unwrap();
        let memory = GuestMemory::new(Arc::clone(&region), map, Vec::new());
        // SAFETY: it is dropped after the VM and its vCPU.
        unsafe { memory.map_into(&vm) }.unwrap();
        let model = CpuModel::new(&host, 1, AsyncPageFaults::Off).unwrap();
        let mut vcpu = Vcpu::new(&vm, 0, &model).unwrap();
        vcpu.enter_directly(&BootInfo {
            protocol: Protocol::LongMode,
            entry: CODE * PAGE_SIZE as u64,
            argument: 0,
            page_table_root: TABLES * PAGE_SIZE as u64,
        })
        .unwrap();
        Self {
            vcpu,
            vm,
            memory,
            region,
            map,
            _pager: pager,
            _directory: directory,
        }
    }

    /// The guest reads or writes a word of `count` pages from `first` on, each `stride` pages after the one before; returns
    /// which they were.
    fn access(&mut self, ring: Ring, write: bool, (first, count, stride): Pages) -> BTreeSet<u64> {
        let mut registers = self.vcpu.fd().get_regs().unwrap();
        let offset = if write { 0 } else { READ_AT };
        registers.rip = CODE * PAGE_SIZE as u64 + offset;
        registers.rdi = self.map.address_of(first * PAGE_SIZE as u64).unwrap().0;
        registers.rcx = count;
        registers.rdx = stride * PAGE_SIZE as u64;
        registers.rax = registers.rax.wrapping_add(1);
        let mut special = self.vcpu.fd().get_sregs().unwrap();
        let privilege = match ring {
            Ring::Kernel => 0,
            Ring::User => 3,
        };
        // With I/O privilege level 3, so that ring 3 may say that it is done.
        registers.rflags = 0x3002;
        for segment in [&mut special.cs, &mut special.ss, &mut special.ds, &mut special.es] {
            segment.selector = segment.selector & !3 | privilege;
            segment.dpl = privilege as u8;
        }
        self.vcpu.fd().set_sregs(&special).unwrap();
        self.vcpu.fd().set_regs(&registers).unwrap();
        loop {
            match self.vcpu.run(&Exits) {
                Exit::Ended(Ending::GuestExit(0)) => break,
                Exit::Ended(ending) => panic!("{ending:?}"),
                _ => {}
            }
        }
        (0..count).map(|index| first + index * stride).collect()
    }

    fn write(&mut self, ring: Ring, pages: Pages) -> BTreeSet<u64> {
        self.access(ring, true, pages)
    }

    /// This process reads a word of a page, which the pager installs if it is absent.
    fn touch(&self, page: u64) {
        assert!(page < self.region.pages());
        // SAFETY: within the region, which lives as long as this.
        unsafe { self.region.start().add(page as usize * PAGE_SIZE).read_volatile() };
    }

    fn start(&self) -> DirtyTracker {
        DirtyTracker::start(&self.vm, &self.memory).unwrap()
    }

    /// What has changed; without what every guest changes by running.
    fn take(&self, tracker: &mut DirtyTracker) -> BTreeSet<u64> {
        set(&tracker.take(&self.vm).unwrap())
            .into_iter()
            .filter(|page| !(TABLES..TABLES_END).contains(page) && *page != CODE)
            .collect()
    }
}

/// The first page, how many, and how far one is from the next.
type Pages = (u64, u64, u64);

fn set(bitmap: &PageBitmap) -> BTreeSet<u64> {
    bitmap
        .runs()
        .flat_map(|run| run.pages().map(|page| page.0))
        .collect()
}

/// What RAM begins with: code, page tables that show 5 GiB one to one and to ring 3, and something in the pages behind.
fn content() -> Vec<(u64, [u8; PAGE_SIZE])> {
    const ALL: u64 = 0b111;
    const LARGE: u64 = 1 << 7;
    let table = |entries: &mut dyn Iterator<Item = u64>| {
        let mut page = [0; PAGE_SIZE];
        for (word, entry) in page.as_chunks_mut::<8>().0.iter_mut().zip(entries) {
            *word = entry.to_le_bytes();
        }
        page
    };
    let at = |page: u64| page << 12 | ALL;
    let mut code = [0; PAGE_SIZE];
    code[..WRITE.len()].copy_from_slice(&WRITE);
    code[READ_AT as usize..][..READ.len()].copy_from_slice(&READ);
    let mut pages = vec![
        (TABLES, table(&mut [at(TABLES + 1)].into_iter())),
        (TABLES + 1, table(&mut (0..5).map(|gib| at(TABLES + 2 + gib)))),
        (CODE, code),
    ];
    for gib in 0..5 {
        let entries = &mut (0..512).map(|index| (gib << 30 | index << 21) | LARGE | ALL);
        pages.push((TABLES + 2 + gib, table(entries)));
    }
    for page in (FREE..FREE + 2048).chain(HIGH..HIGH + 2048) {
        pages.push((page, [page as u8 | 1; PAGE_SIZE]));
    }
    pages
}

const RINGS: [Ring; 2] = [Ring::User, Ring::Kernel];

#[test]
fn what_the_guest_writes_is_told_once_and_exactly() {
    need!(tests::host::kvm());
    for (backing, ring) in [Backing::Memfd, Backing::Anonymous].into_iter().zip(RINGS) {
        let mut machine = Machine::new(backing);
        // Before it begins.
        machine.write(ring, (FREE, 64, 1));
        let mut tracker = machine.start();
        assert_eq!(machine.take(&mut tracker), BTreeSet::new());
        // Written before and absent so far, in either slot.
        let mut written = machine.write(ring, (FREE + 32, 64, 1));
        written.extend(machine.write(ring, (HIGH + 3, 40, 7)));
        assert_eq!(machine.take(&mut tracker), written, "{ring:?}");
        assert_eq!(machine.take(&mut tracker), BTreeSet::new());
        // Again, now that they are there and have been told of.
        let again = machine.write(ring, (HIGH + 3, 20, 14));
        assert_eq!(machine.take(&mut tracker), again);
        tracker.stop(&machine.vm).unwrap();

        machine.write(ring, (FREE, 64, 1));
        let mut tracker = machine.start();
        let after = machine.write(ring, (FREE + 5, 3, 2));
        assert_eq!(
            machine.take(&mut tracker),
            after,
            "what came before the second start is told"
        );
    }
}

#[test]
fn a_page_that_a_pager_installs_has_not_changed() {
    need!(tests::host::kvm());
    let machine = Machine::new(Backing::Memfd);
    let mut tracker = machine.start();
    for page in (FREE..FREE + 512).chain(HIGH..HIGH + 512) {
        machine.touch(page);
    }
    assert_eq!(machine.take(&mut tracker), BTreeSet::new());
}

#[test]
fn nothing_is_told_but_what_the_guest_has_touched() {
    need!(tests::host::kvm());
    let mut machine = Machine::new(Backing::Memfd);
    let mut tracker = machine.start();
    let read = machine.access(Ring::User, false, (FREE, 300, 3));
    let told = machine.take(&mut tracker);
    // See the module: a host may let the guest write what it has read.
    println!("{} of {} pages that were read are told", told.len(), read.len());
    assert!(told.is_subset(&read), "{told:?}");
}

#[test]
fn what_could_not_be_used_is_told_again_with_what_this_process_wrote() {
    need!(tests::host::kvm());
    let mut machine = Machine::new(Backing::Memfd);
    let mut tracker = machine.start();
    let mut expected = machine.write(Ring::User, (FREE, 8, 8));
    let taken = tracker.take(&machine.vm).unwrap();
    tracker.give_back(&taken);
    tracker.own_writes().note(PageRange::new(PageIndex(HIGH - 2), 4));
    expected.extend(HIGH - 2..HIGH + 2);
    expected.extend(machine.write(Ring::User, (FREE + 1, 8, 8)));
    assert_eq!(machine.take(&mut tracker), expected);
    assert_eq!(machine.take(&mut tracker), BTreeSet::new());
}

/// Pages that are forgotten right before they are read: exactly those, in either slot, and what is written after that is told.
#[test]
fn what_is_looked_at_stays_until_it_is_forgotten() {
    need!(tests::host::kvm());
    let mut machine = Machine::new(Backing::Memfd);
    let mut tracker = machine.start();
    let guest = |bitmap: &PageBitmap| -> BTreeSet<u64> {
        let told = set(bitmap).into_iter();
        told.filter(|page| !(TABLES..TABLES_END).contains(page) && *page != CODE)
            .collect()
    };
    let mut expected = machine.write(Ring::User, (FREE + 60, 140, 1));
    expected.extend(machine.write(Ring::User, (HIGH - 3, 3, 1)));
    expected.extend(machine.write(Ring::User, (HIGH, 67, 1)));
    for _ in 0..2 {
        assert_eq!(guest(&tracker.look(&machine.vm).unwrap()), expected);
    }
    // Within a word, over words, and over both slots.
    for (first, count) in [(FREE + 63, 2), (FREE + 70, 127), (HIGH - 2, 5)] {
        let pages = PageRange::new(PageIndex(first), count);
        vmm::dirty::forget(&machine.vm, &machine.memory, pages).unwrap();
        expected.retain(|page| !pages.contains(PageIndex(*page)));
        assert_eq!(guest(&tracker.look(&machine.vm).unwrap()), expected);
    }
    expected.extend(machine.write(Ring::User, (FREE + 64, 3, 40)));
    expected.extend(machine.write(Ring::User, (HIGH, 1, 1)));
    assert_eq!(guest(&tracker.look(&machine.vm).unwrap()), expected);
    assert_eq!(machine.take(&mut tracker), expected);
    assert_eq!(machine.take(&mut tracker), BTreeSet::new());
}

#[test]
fn huge_pages_are_told_of_by_the_small_page() {
    need!(tests::host::kvm());
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let free = free.ok().and_then(|free| free.trim().parse().ok()).unwrap_or(0);
    if free < HIGH_SIZE >> 21 {
        eprintln!(
            "skipped: needs {} free huge pages, this host has {free}",
            HIGH_SIZE >> 21
        );
        return;
    }
    let mut machine = Machine::with(HIGH_SIZE, Backing::Memfd, PageSize::Huge);
    machine.write(Ring::User, (FREE, 64, 1));
    let mut tracker = machine.start();
    let written = machine.write(Ring::User, (FREE, 9, 50));
    assert_eq!(machine.take(&mut tracker), written);
}

#[test]
fn a_slot_that_is_not_there_is_an_error() {
    need!(tests::host::kvm());
    let machine = Machine::new(Backing::Memfd);
    assert!(matches!(
        machine.vm.log_dirty_pages(9, true),
        Err(VmError::NoSlot(9))
    ));
    assert!(matches!(machine.vm.take_dirty_log(9), Err(VmError::NoSlot(9))));
    let error = machine.vm.take_dirty_log(0).unwrap_err();
    assert!(
        matches!(error, VmError::DirtyLog { slot: 0, .. }),
        "nothing is logged: {error}"
    );
}

#[derive(Clone, Debug)]
enum Step {
    Write(Ring, Pages),
    Read(Ring, Pages),
    Install(u64),
    OwnWrite(u64),
    Take,
    GiveBack,
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let page = || prop_oneof![FREE..FREE + 1024, HIGH..HIGH + 1024];
    let pages = || (page(), 1..60u64, 1..17u64);
    let ring = || prop_oneof![Just(Ring::Kernel), Just(Ring::User)];
    prop_oneof![
        4 => (ring(), pages()).prop_map(|(ring, pages)| Step::Write(ring, pages)),
        2 => (ring(), pages()).prop_map(|(ring, pages)| Step::Read(ring, pages)),
        1 => page().prop_map(Step::Install),
        1 => page().prop_map(Step::OwnWrite),
        3 => Just(Step::Take),
        1 => Just(Step::GiveBack),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]

    /// Whatever is done in whatever order, each write is told once after it, and only what was touched is told.
    #[test]
    fn every_write_is_told(steps in prop::collection::vec(step(), 1..40)) {
        if tests::host::kvm().is_err() {
            // The other tests of this file say so.
            return Ok(());
        }
        let mut machine = Machine::new(Backing::Memfd);
        let mut tracker = machine.start();
        let (mut written, mut touched) = (BTreeSet::new(), BTreeSet::new());
        for step in steps.into_iter().chain([Step::Take]) {
            match step {
                Step::Write(ring, pages) => written.extend(machine.write(ring, pages)),
                Step::Read(ring, pages) => touched.extend(machine.access(ring, false, pages)),
                Step::Install(page) => machine.touch(page),
                Step::OwnWrite(page) => {
                    tracker.own_writes().note(PageRange::single(PageIndex(page)));
                    written.insert(page);
                }
                Step::Take => {
                    let told = machine.take(&mut tracker);
                    prop_assert!(written.is_subset(&told), "not told: {:?}", written.difference(&told));
                    touched.append(&mut written);
                    prop_assert!(told.is_subset(&touched), "told: {:?}", told.difference(&touched));
                    touched.clear();
                }
                Step::GiveBack => {
                    let taken = tracker.take(&machine.vm).unwrap();
                    tracker.give_back(&taken);
                }
                Step::Restart => {
                    tracker.stop(&machine.vm).unwrap();
                    tracker = machine.start();
                    written.clear();
                    touched.clear();
                }
            }
        }
    }
}
