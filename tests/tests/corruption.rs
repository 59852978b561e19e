//! Images that are damaged, before they are used or while they are.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use tests::need;
use tests::program::{Finished, Program};
use tests::random::Random;
use tests::scratch::{PAGE_SIZE, Scratch, flip_bit, truncate};
use tests::vm::Vm;

const SEED: u64 = 99;
const SIZE: &str = "64M";
const PAGES: u64 = 64 * 256;

/// A bit of a page that the guest looks at: from 16 MiB on there is nothing but fingerprints.
fn damage(scratch: &Scratch, random: &mut Random) -> (PathBuf, u64) {
    let image = scratch.fingerprinted(SIZE, SEED, "order=random");
    let page = 4096 + random.below(PAGES - 4096);
    let (byte, bit) = (random.below(PAGE_SIZE), random.below(8));
    println!("bit {bit} of byte {byte} of page {page}");
    flip_bit(&image, page * PAGE_SIZE + byte, bit);
    (image, page)
}

/// Found on demand, in the background, on every backing: never does the guest see it.
#[test]
fn a_flipped_bit_is_found_before_the_guest_sees_it() {
    need!(tests::host::kvm());
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let (image, page) = damage(&scratch, &mut random);
    for memory in [
        "backing=memfd",
        "backing=anonymous",
        "backing=memfd,fill=sequential",
        "backing=anonymous,fill=sequential",
    ] {
        for cpus in [1, 2] {
            let vm = Vm::from_image(&image).memory(memory).cpus(cpus).run();
            vm.assert_error(
                6,
                &[&format!("page {page} "), "checksum", image.to_str().unwrap()],
            );
            assert!(!vm.stdout.contains("wrong_page="), "{}", vm.stdout);
            assert!(!vm.stdout.contains("verified="), "{}", vm.stdout);
            let report = vm.report();
            assert_eq!(report.text("/outcome"), "error");
            assert!(
                report.text("/error").contains(&format!("page {page} ")),
                "{report}"
            );
            assert!(report.arrivals() < PAGES, "{report}");
        }
    }
}

/// A guest that is busy with other pages is ended too.
#[test]
fn a_flipped_bit_is_found_by_the_background_fill_alone() {
    need!(tests::host::kvm());
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let (image, page) = damage(&scratch, &mut random);
    let vm = Vm::from_image(&image)
        .memory("fill=sequential")
        .command_line("workload=dirty pages=16 rounds=forever")
        .run();
    vm.assert_error(6, &[&format!("page {page} ")]);
}

#[test]
fn with_checksums_off_the_guest_finds_it() {
    need!(tests::host::kvm());
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let (image, page) = damage(&scratch, &mut random);
    for backing in ["memfd", "anonymous"] {
        let vm = Vm::from_image(&image)
            .memory(&format!("checksums=off,backing={backing}"))
            .run();
        vm.assert_code(65);
        vm.line(&format!("wrong_page={page:#x} "));
        assert!(vm.line("verified=").contains(" wrong=1 "));
        let report = vm.report();
        assert_eq!(report.text("/outcome"), "guest-exit");
        assert_eq!(report.count("/guest_exit"), 1);
    }
}

#[test]
fn verifying_the_image_finds_it() {
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let (image, page) = damage(&scratch, &mut random);
    let verify = || Program::umem(["image", "verify"]).arg(&image).run();
    let verified = verify();
    verified.assert_code(6);
    let named = |verified: &Finished| -> Vec<String> {
        let lines = verified.stdout.lines().filter(|line| line.starts_with("page="));
        lines
            .map(|line| line.split(' ').next().unwrap().to_owned())
            .collect()
    };
    assert_eq!(named(&verified), [format!("page={page}")]);
    verified.assert_error(6, &[&format!("page {page}"), "corrupt", image.to_str().unwrap()]);
    // Another one, below.
    flip_bit(&image, 3000 * PAGE_SIZE, 0);
    assert_eq!(named(&verify()), ["page=3000".to_owned(), format!("page={page}")]);
}

#[test]
fn a_sound_image_is_said_to_be_sound() {
    let scratch = Scratch::new();
    let image = scratch.fingerprinted(SIZE, SEED, "");
    let verified = Program::umem(["image", "verify"]).arg(&image).run();
    verified.assert_code(0);
    assert!(!verified.stdout.contains("page="), "{verified}");
    assert_eq!(verified.stderr, "");
}

/// Wherever a bit is flipped behind RAM, somebody finds it: whoever opens the image, or else `verify`.
#[test]
fn a_flipped_bit_behind_ram_is_found() {
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("8M", SEED, "");
    let length = image.metadata().unwrap().len();
    // In the part of the checksum table that is all zero, because it is that of the guest's own memory; and anywhere.
    let in_zeros = (8 << 20) + 5000;
    for round in 0..20 {
        let byte = if round == 0 {
            in_zeros
        } else {
            (8 << 20) + random.below(length - (8 << 20))
        };
        let bit = random.below(8);
        println!("bit {bit} of byte {byte} of {length}");
        flip_bit(&image, byte, bit);
        let verified = Program::umem(["image", "verify"]).arg(&image).run();
        verified.assert_error(6, &[image.to_str().unwrap()]);
        flip_bit(&image, byte, bit);
    }
    Program::umem(["image", "verify"])
        .arg(&image)
        .run()
        .assert_code(0);
}

/// The guest is in the middle of its pages when they go. No signal may kill the process, and nothing may hang.
#[test]
fn an_image_truncated_while_running_ends_the_vm_with_a_message() {
    need!(tests::host::kvm());
    for (memory, resident, length) in [
        ("backing=memfd", "RssShmem", 0),
        ("backing=anonymous", "RssAnon", 128 << 20),
        ("backing=memfd,fill=sequential", "RssShmem", 4096),
        ("backing=memfd,checksums=off", "RssShmem", 0),
    ] {
        // All of it may have been loaded before this test gets to run again.
        let in_time = (0..10).any(|_| truncated_while_running(memory, resident, length));
        assert!(in_time, "{memory}: the truncation came too late each time");
    }
}

/// Truncates the image when the kernel's figure `resident` shows that a tenth of it is loaded; false if that was too late.
fn truncated_while_running(memory: &str, resident: &str, length: u64) -> bool {
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("256M", SEED, "order=random");
    let vm = Vm::from_image(&image).memory(memory).cpus(2).start();
    vm.wait_until("pages arrive", |vm| {
        vm.status_kib(resident).is_some_and(|kib| kib > 24 << 10)
    });
    truncate(&image, length);
    let vm = vm.finish();
    assert_eq!(vm.signal(), None, "{}", vm.stderr);
    if vm.code() == Some(0) {
        vm.assert_ended_well();
        return false;
    }
    vm.assert_error(6, &["truncated while in use", "page ", image.to_str().unwrap()]);
    assert_eq!(vm.report().text("/outcome"), "error");
    assert!(!vm.stdout.contains("wrong_page="), "{}", vm.stdout);
    true
}

/// At any moment: while it starts, while it runs, at its end.
#[test]
fn an_image_truncated_at_any_moment_never_goes_unnoticed() {
    need!(tests::host::kvm());
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("32M", SEED, "order=random");
    let whole = std::fs::read(&image).unwrap();
    let start = Instant::now();
    Vm::from_image(&image).run().assert_ended_well();
    let longest = start.elapsed();
    let mut noticed = 0;
    for _ in 0..12 {
        let length = random.below(whole.len() as u64);
        let moment = random.moment(longest);
        println!("to {length} bytes after {moment:?}");
        std::fs::write(&image, &whole).unwrap();
        let vm = Vm::from_image(&image).start();
        vm.wait_for_exit(moment);
        truncate(&image, length);
        let vm = vm.finish();
        if vm.code() == Some(0) {
            // It was too late, or only what was loaded already was cut off.
            vm.assert_ended_well();
        } else {
            vm.assert_error(6, &[image.to_str().unwrap()]);
            noticed += 1;
        }
    }
    assert!(noticed > 0, "every moment was too late");
}

/// Bytes that change under a running VM are found like those that had changed before.
#[test]
fn an_image_damaged_while_running_is_found() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("256M", SEED, "order=seq");
    let vm = Vm::from_image(&image).patience(Duration::from_mins(1)).start();
    vm.wait_until("pages arrive", |vm| {
        vm.status_kib("RssShmem").is_some_and(|kib| kib > 24 << 10)
    });
    let last = 256 * 256 - 1;
    flip_bit(&image, last * PAGE_SIZE + 77, 3);
    let vm = vm.finish();
    vm.assert_error(6, &[&format!("page {last} ")]);
}
