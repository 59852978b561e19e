//! A process that watches ranges of its own addresses and unmaps pages, once beside them and once of them.

use std::time::Instant;

use anyhow::{Context, Result};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use ummunotify::{AddressRange, Choice, Cookie, Notifier, WatcherKind};

const PAGE: u64 = 4096;

/// Where nothing else is. Pages of even numbers are watched, and the others are not.
const BASE: u64 = 0x2000_0000_0000;

/// Page numbers from which those to be unmapped are drawn, whatever number is watched.
const SPREAD: u64 = 1 << 20;

/// Calls of munmap of each kind.
const CALLS: u64 = 10_000;

/// Watches `ranges` ranges, or nothing at all, and prints what it took.
pub(crate) fn run(ranges: u64) -> Result<()> {
    let before = resident_kib()?;
    let notifier = if ranges > 0 {
        Some(Notifier::open(Choice::Only(WatcherKind::Kvm)).context("watching by KVM's tracepoint")?)
    } else {
        None
    };
    if let Some(notifier) = &notifier {
        let since = Instant::now();
        for range in 0..ranges {
            let at = BASE + range * 2 * PAGE;
            notifier
                .register(AddressRange::new(at, at + PAGE), Cookie(range))
                .context("registering a range")?;
        }
        println!("register_ns={}", since.elapsed().as_nanos() as u64 / ranges);
    }
    println!("memory_kib={}", resident_kib()?.saturating_sub(before));
    println!(
        "miss_ns={}",
        median_munmap(|random| random % SPREAD * 2 + 1, None)?
    );
    if let Some(notifier) = &notifier {
        println!(
            "hit_ns={}",
            median_munmap(|random| random % ranges * 2, Some(notifier))?
        );
    }
    Ok(())
}

fn median_munmap(page: impl Fn(u64) -> u64, notifier: Option<&Notifier>) -> Result<u64> {
    let mut random = 88_172_645_463_325_252_u64;
    let mut times = Vec::new();
    for call in 0..CALLS {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let at = BASE + page(random) * PAGE;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE | MapFlags::POPULATE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: where nothing is mapped, or it fails.
        unsafe { mmap_anonymous(at as *mut _, PAGE as usize, protection, flags) }.context("mmap")?;
        if let Some(notifier) = notifier
            && call % 100 == 0
        {
            while !notifier.try_read(1000).context("reading events")?.is_empty() {}
        }
        let counted = notifier.map(|notifier| notifier.counter().load());
        let since = Instant::now();
        // SAFETY: mapped above, and nobody has a reference to it.
        unsafe { munmap(at as *mut _, PAGE as usize) }.context("munmap")?;
        times.push(since.elapsed().as_nanos() as u64);
        let now = notifier.map(|notifier| notifier.counter().load());
        anyhow::ensure!(
            counted.map(|count| count + 1) == now,
            "an invalidation was not noticed"
        );
    }
    times.sort_unstable();
    Ok(times[times.len() / 2])
}

fn resident_kib() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/status").context("/proc/self/status")?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let line = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    line.context("no VmRSS")
}
