//! Snapshots of VMs whose RAM is in huge pages: 512 pages are loaded, and given back, at a time.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use tests::in_process::{Machine, from_file};
use tests::random::{Random, rounds};
use tests::scratch::Scratch;
use tests::snapshot::{assert_goes_on, assert_whole, make_image};
use tests::{need, skip};
use umem::image::{Image, Wait};
use umem::pager::{Fill, PagerOptions};
use umem::region::{Backing, PageSize};
use umem::units::{PAGE_SIZE, PageIndex, PageRange};
use vmm::machine::MachineConfig;
use vmm::snapshot::FILE_NAME;

const RAM: usize = 64 << 20;
const HUGE_PAGE: usize = 2 << 20;

/// Pages in a huge page.
const UNIT: usize = HUGE_PAGE / PAGE_SIZE;

/// Writes to the first pages that are no one else's, and so to the first few huge pages.
const DIRTY_AT_THE_START: &str = "workload=dirty pages=1500 rounds=forever";

/// Writes to pages everywhere.
const DIRTY_EVERYWHERE: &str = "workload=dirty pages=700 order=random seed=3 rounds=forever";

/// Held by the test that has huge pages: there are not enough for two, and RAM is found by being in them.
static TURN: Mutex<()> = Mutex::new(());

/// Waits until no other test of this file has huge pages, and skips one that cannot have them for `vms` VMs.
macro_rules! need_huge_pages {
    ($vms:expr) => {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let (free, wanted) = (tests::host::free_huge_pages(), $vms * (RAM / HUGE_PAGE) as u64);
        if free < wanted {
            skip!("needs {wanted} free huge pages, this host has {free}: sysctl -w vm.nr_hugepages={wanted}");
        }
    };
}

fn start(image: &Path, backing: Backing, fill: Fill, track_dirty: bool) -> Machine {
    Machine::running(MachineConfig {
        page_size: PageSize::Huge,
        backing,
        pager: PagerOptions::from(fill),
        track_dirty,
        cpus: 2,
        ..from_file(image)
    })
}

/// The checksum of each page of an image or snapshot.
fn checksums(file: &Path) -> Vec<u64> {
    let image = Image::open(file).unwrap();
    let mut checksums = vec![0; image.pages() as usize];
    let all = PageRange::new(PageIndex(0), image.pages());
    image.checksums(all, Wait::Yes, &mut checksums).unwrap().unwrap();
    checksums
}

/// Where the only VM of this process with huge pages has its RAM.
fn ram() -> *mut u8 {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut found = Vec::new();
    let mut mapping = 0..0;
    for line in maps.lines() {
        if let Some(range) = address_range(line) {
            mapping = range;
        } else if line.starts_with("KernelPageSize:") && line.ends_with(" 2048 kB") && mapping.len() == RAM {
            found.push(mapping.start);
        }
    }
    let [start] = found[..] else {
        panic!("{found:x?} are RAM:\n{maps}")
    };
    std::ptr::with_exposed_provenance_mut(start)
}

/// The addresses at the start of a line of `/proc/self/smaps`, if it is the first of a mapping.
fn address_range(line: &str) -> Option<Range<usize>> {
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
}

/// Gives a huge page back, as a balloon does.
fn remove(ram: *mut u8, unit: usize, backing: Backing) {
    let advice = match backing {
        Backing::Memfd => libc::MADV_REMOVE,
        Backing::Anonymous => libc::MADV_DONTNEED,
    };
    // SAFETY: within RAM, which is mapped as long as its VM runs. The guest does not use this part of it.
    let done = unsafe { libc::madvise(ram.add(unit * HUGE_PAGE).cast(), HUGE_PAGE, advice) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// What has come, what is still to come, and what has been given back before and after it came.
#[test]
fn present_absent_and_removed_ones_are_what_they_are() {
    need!(tests::host::kvm());
    need_huge_pages!(2);
    let scratch = Scratch::new();
    let image = make_image(&scratch, "64M", DIRTY_AT_THE_START);
    let units = RAM / HUGE_PAGE;
    for backing in [Backing::Memfd, Backing::Anonymous] {
        let vm = start(&image, backing, Fill::Off, false);
        vm.wait_for_exits(300);
        let ram = ram();
        let (absent, unused, touched, untouched) = (units - 1, units - 2, units - 3, units - 4);
        for unit in [touched, untouched] {
            // SAFETY: within RAM, which is mapped; nobody writes there. The pager brings it.
            let byte = unsafe { ram.add(unit * HUGE_PAGE).read_volatile() };
            std::hint::black_box(byte);
        }
        remove(ram, unused, backing);
        remove(ram, touched, backing);
        let directory = scratch.path("snapshot");
        let summary = vm.snapshot(&directory).unwrap();
        println!("{backing:?}: {summary:?}");
        assert!(summary.absent_pages > 0 && summary.absent_pages.is_multiple_of(UNIT as u64));
        vm.wait_for_exits(20);
        vm.stop();

        let file = directory.join(FILE_NAME);
        assert_whole(&file);
        let (before, after) = (checksums(&image), checksums(&file));
        let pages = |unit: usize| unit * UNIT..(unit + 1) * UNIT;
        for unit in [absent, untouched] {
            assert_eq!(
                after[pages(unit)],
                before[pages(unit)],
                "unit {unit} is the image's"
            );
        }
        let zero = umem::image::checksum(&[0; PAGE_SIZE]);
        for unit in [unused, touched] {
            assert!(before[pages(unit)].iter().all(|checksum| *checksum != zero));
            assert_eq!(after[pages(unit)], [zero; UNIT], "unit {unit} reads zero");
        }
        let changed = before.iter().zip(&after).filter(|(one, other)| one != other);
        assert!(changed.count() > 1500, "the guest's own");
        for memory in ["hugepages=on", "hugepages=on,backing=anonymous", "hugepages=off"] {
            assert_goes_on(&directory, &["--memory", memory]);
        }
    }
}

/// The same guest at any moment, in whatever state its pages are, and while all of them are loaded.
#[test]
fn a_guest_goes_on_where_it_was() {
    need!(tests::host::kvm());
    need_huge_pages!(2);
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let image = make_image(&scratch, "64M", DIRTY_EVERYWHERE);
    for turn in 0..rounds(6) {
        let backing = random.choose(&[Backing::Memfd, Backing::Anonymous]);
        let fill = random.choose(&[false, true]);
        let vm = start(
            &image,
            backing,
            if fill { Fill::Sequential } else { Fill::Off },
            false,
        );
        let moment = random.moment(Duration::from_millis(150));
        thread::sleep(moment);
        let directory = scratch.path("snapshot");
        let summary = vm.snapshot(&directory).unwrap();
        println!("turn {turn}: {backing:?}, fill {fill}, after {moment:?}: {summary:?}");
        vm.stop();
        assert_whole(&directory.join(FILE_NAME));
        assert_goes_on(
            &directory,
            &["--memory", random.choose(&["hugepages=on", "hugepages=off"])],
        );
    }
}

/// What has changed is told by the small page, so a layer is as small as on small pages.
#[test]
fn incremental_ones_hold_what_has_changed_and_no_more() {
    need!(tests::host::kvm());
    need_huge_pages!(1);
    let scratch = Scratch::new();
    let image = make_image(&scratch, "64M", DIRTY_EVERYWHERE);
    let at = |name: &str| scratch.path(name);
    for backing in [Backing::Memfd, Backing::Anonymous] {
        let vm = start(&image, backing, Fill::Off, true);
        vm.wait_for_exits(100);
        vm.snapshot(&at("base")).unwrap();
        vm.wait_for_exits(100);
        let first = vm.snapshot_over(&at("first"), &at("base")).unwrap();
        vm.wait_for_exits(100);
        vm.control.pause().unwrap();
        let second = vm.snapshot_over(&at("second"), &at("first")).unwrap();
        vm.snapshot(&at("all")).unwrap();
        vm.stop();
        for layer in [&first, &second] {
            assert!(
                layer.tracked && (700..1000).contains(&layer.own_pages),
                "{layer:?}"
            );
        }
        let file = |name: &str| at(name).join(FILE_NAME);
        assert_eq!(checksums(&file("second")), checksums(&file("all")));
        assert_goes_on(at("second"), &["--memory", "hugepages=off"]);
    }
}
