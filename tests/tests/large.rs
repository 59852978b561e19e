//! RAM that is large: above the hole below 4 GiB, and what it costs the process.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use rustix::process::Signal;
use tests::need;
use tests::scratch::Scratch;
use tests::vm::Vm;

const MIB_IN_KIB: u64 = 1024;

/// RAM of 3 GiB lies below 4 GiB, the rest above. Every page of this much is fetched and checked.
#[test]
fn pages_above_the_hole_are_the_right_ones() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("3136M", 3, "order=random full=off");
    for cpus in [1, 2] {
        let vm = Vm::from_image(&image)
            .memory("fill=sequential,checksums=off")
            .cpus(cpus)
            .patience(Duration::from_mins(5))
            .run();
        vm.assert_ended_well();
        assert!(vm.line("verified=").contains(" wrong=0 "));
        assert_eq!(vm.report().arrivals(), 3136 * 256);
    }
}

/// Of 5 GiB, two fifths lie above the hole, and so do about as many of the pages that are touched.
#[test]
fn pages_above_the_hole_are_fetched_when_they_are_touched() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.image("5G", "workload=touch pages=20000 order=random seed=2 rounds=2");
    for memory in ["backing=memfd", "backing=anonymous"] {
        for cpus in [1, 2] {
            let vm = Vm::from_image(&image).memory(memory).cpus(cpus).run();
            vm.assert_ended_well();
            vm.line("round=2 pages=20000 sum=0x0 ");
            let report = vm.report();
            assert_eq!(report.count("/pages/total"), 5 << 18);
            assert!((20_000..20_300).contains(&report.arrivals()), "{report}");
        }
    }
}

/// An image is as large as what is in it.
#[test]
fn an_image_is_sparse() {
    let scratch = Scratch::new();
    let image = scratch.image("16G", "workload=hello");
    let metadata = image.metadata().unwrap();
    assert!(metadata.len() > 16 << 30);
    assert!(metadata.blocks() * 512 < 4 << 20, "{} blocks", metadata.blocks());
}

/// At most 16 MiB beyond guest pages and page-state table, and a table of at most 1 MiB a GiB: as the report has it, and as
/// the kernel has it while the VM runs.
#[test]
fn the_process_itself_takes_little_memory() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    for (size, gib) in [("64M", 1), ("16G", 16)] {
        let scratch_image = scratch.path(size);
        scratch.create(size, size).run().assert_code(0);
        let table_kib = gib * MIB_IN_KIB;
        let limit_kib = 16 * MIB_IN_KIB + table_kib;
        // As many pages as there are in 16 MiB: a cost for each page that arrives would show.
        let vm = Vm::from_image(&scratch_image)
            .command_line("workload=dirty pages=8192 rounds=forever order=random")
            .cpus(4)
            .start();
        vm.wait_for_output("round=3 ");
        // Guest memory is a memfd, which is RssShmem.
        let own_kib = vm.status_kib("RssAnon").unwrap() + vm.status_kib("RssFile").unwrap();
        vm.signal(Signal::TERM);
        let vm = vm.finish();
        vm.assert_code(0);
        assert!(own_kib < limit_kib, "{size}: {own_kib} KiB");
        let report = vm.report();
        assert!(report.count("/process/own_memory_kib") < limit_kib, "{report}");
        assert!(report.count("/process/own_memory_kib") > 0, "{report}");
        assert!(
            report.count("/process/page_state_table_kib") <= table_kib,
            "{report}"
        );
    }
}
