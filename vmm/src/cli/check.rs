//! `umem check`: what this host offers, and the fix for what it lacks.

use clap::Args;
use kvm_ioctls::Cap;
use rustix::process::{Resource, getrlimit};
use serde::Serialize;
use umem::causes::chain;
use umem::uffd::{Features, Userfaultfd};
use ummunotify::{Choice, Notifier, WatcherKind};

use super::error::CommandError;
use super::options::Size;
use crate::kvm::{Host, Vm};

/// What `umem check` takes.
#[derive(Debug, Args)]
pub(super) struct CheckOptions {
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// How an item stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// It is there.
    Ok,
    /// It is not there, and something is slower or cannot be asked for.
    Optional,
    /// It is not there, and no VM can be run.
    Missing,
}

/// One line of the answer.
#[derive(Debug, Serialize)]
struct Item {
    #[serde(rename = "item")]
    name: &'static str,
    status: Status,
    /// What was found.
    found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

impl Item {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Ok,
            found: found.into(),
            fix: None,
        }
    }

    fn lacking(name: &'static str, status: Status, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            name,
            status,
            found: found.into(),
            fix: Some(fix.into()),
        }
    }
}

pub(super) fn run(options: &CheckOptions) -> Result<(), CommandError> {
    let mut items = Vec::new();
    check_kvm(&mut items);
    check_userfaultfd(&mut items);
    check_watchers(&mut items);
    check_memory(&mut items);
    check_limits(&mut items);
    print(&items, options.json)?;

    let missing: Vec<&str> = items
        .iter()
        .filter(|item| item.status == Status::Missing)
        .map(|item| item.name)
        .collect();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(CommandError::HostLacks(format!(
            "this host cannot run VMs yet, it lacks: {}",
            missing.join(", ")
        )))
    }
}

fn print(items: &[Item], json: bool) -> Result<(), CommandError> {
    if json {
        say!("{:#}", serde_json::json!({ "items": items }));
        return Ok(());
    }
    for item in items {
        let mark = match item.status {
            Status::Ok => "ok",
            Status::Optional => "--",
            Status::Missing => "MISSING",
        };
        say!("{mark:7}  {:24}  {}", item.name, item.found);
        if let Some(fix) = &item.fix {
            say!("{:35}  to mend: {fix}", "");
        }
    }
    Ok(())
}

fn check_kvm(items: &mut Vec<Item>) {
    let host = match Host::open() {
        Ok(host) => host,
        Err(error) => {
            // The message is "what is wrong; what to do".
            let text = chain(&error);
            let (found, fix) = text.split_once("; ").unwrap_or((&text, "see the kernel log"));
            items.push(Item::lacking("/dev/kvm", Status::Missing, found, fix));
            return;
        }
    };
    items.push(Item::ok("/dev/kvm", "opens, and has all that is needed"));
    let bits = host.physical_address_bits();
    items.push(Item::ok("guest-physical addresses", format!("{bits} bits")));
    items.push(Item::ok("vCPUs", format!("{} at most", Vm::max_vcpus_on(&host))));
    let optional = [
        ("async page faults", Cap::AsyncPf, "5.8"),
        ("dirty ring", Cap::DirtyLogRing, "5.11"),
        ("guest_memfd", Cap::GuestMemfd, "6.8"),
        ("TSC scaling", Cap::TscControl, "2.6.39, on a CPU that can"),
    ];
    for (item, capability, since) in optional {
        items.push(if host.kvm().check_extension(capability) {
            Item::ok(item, "KVM has it")
        } else {
            Item::lacking(item, Status::Optional, "KVM lacks it", format!("Linux {since}"))
        });
    }
}

fn check_userfaultfd(items: &mut Vec<Item>) {
    let features = match Userfaultfd::probe() {
        Ok(features) => features,
        Err(error) => {
            let text = chain(&error);
            let (found, fix) = text.split_once(": ").unwrap_or((&text, "see the kernel log"));
            items.push(Item::lacking("userfaultfd", Status::Missing, found, fix));
            return;
        }
    };
    items.push(Item::ok("userfaultfd", "opens for kernel-mode faults"));
    let needed = Features::MISSING_SHMEM
        .and(Features::MINOR_SHMEM)
        .and(Features::EVENT_REMOVE);
    if !features.has(needed) {
        let fix = "Linux 5.14 or newer";
        items.push(Item::lacking(
            "userfaultfd features",
            Status::Missing,
            "no faults on shared memory",
            fix,
        ));
    }
    let (have, lack): (Vec<_>, Vec<_>) = features.survey().partition(|(_, _, have)| *have);
    let names = |list: &[(&'static str, &'static str, bool)]| -> String {
        list.iter()
            .map(|(name, _, _)| *name)
            .collect::<Vec<_>>()
            .join(" ")
    };
    items.push(Item::ok("userfaultfd features", names(&have)));
    if let Some((_, newest, _)) = lack.last() {
        let fix = format!("Linux {newest}");
        items.push(Item::lacking(
            "userfaultfd features",
            Status::Optional,
            format!("not: {}", names(&lack)),
            fix,
        ));
    }
}

/// Who can notice that mappings go away.
fn check_watchers(items: &mut Vec<Item>) {
    let watchers = [
        (
            "ummunotify: kvm",
            WatcherKind::Kvm,
            "Linux 5.10, /dev/kvm, and CAP_BPF with CAP_PERFMON (or root)",
        ),
        (
            "ummunotify: perf",
            WatcherKind::Perf,
            "/dev/kvm, CAP_PERFMON (or root, or kernel.perf_event_paranoid=-1), and tracefs on /sys/kernel/tracing",
        ),
        (
            "ummunotify: userfaultfd",
            WatcherKind::Userfaultfd,
            "Linux 5.7 with CONFIG_USERFAULTFD=y",
        ),
    ];
    for (item, kind, fix) in watchers {
        items.push(match Notifier::open(Choice::Only(kind)) {
            Ok(_) => Item::ok(item, "notices invalidated mappings"),
            Err(error) => Item::lacking(item, Status::Optional, chain(&error), fix),
        });
    }
}

fn check_memory(items: &mut Vec<Item>) {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let number = |key: &str| -> Option<u64> {
        meminfo
            .lines()
            .find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse().ok())
    };
    if let Some(kib) = number("MemAvailable:") {
        items.push(Item::ok("memory", format!("{} MiB available", kib >> 10)));
    }
    match number("HugePages_Free:") {
        Some(free) if free > 0 => {
            items.push(Item::ok(
                "huge pages",
                format!("{free} of 2 MiB free: {}", Size(free << 21)),
            ));
        }
        _ => items.push(Item::lacking(
            "huge pages",
            Status::Optional,
            "none free, so no hugepages=on",
            "sysctl -w vm.nr_hugepages=N (N times 2 MiB)",
        )),
    }
    let transparent =
        std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let chosen = transparent.split(['[', ']']).nth(1);
    items.push(match chosen {
        Some(mode) if mode != "never" => Item::ok("transparent huge pages", mode),
        _ => Item::lacking(
            "transparent huge pages",
            Status::Optional,
            "off",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        ),
    });
    let overcommit = std::fs::read_to_string("/proc/sys/vm/overcommit_memory").unwrap_or_default();
    items.push(if overcommit.trim() == "2" {
        let fix = "sysctl -w vm.overcommit_memory=0";
        Item::lacking(
            "overcommit",
            Status::Optional,
            "strict: RAM counts before it is populated",
            fix,
        )
    } else {
        Item::ok("overcommit", "RAM counts when it is populated")
    });
}

fn check_limits(items: &mut Vec<Item>) {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    items.push(Item::ok("CPUs", cpus.to_string()));
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    items.push(if files < 256 {
        Item::lacking(
            "open files",
            Status::Optional,
            format!("{files}, few for many vCPUs"),
            "ulimit -n 1024",
        )
    } else {
        Item::ok("open files", files.to_string())
    });
    let address_space = getrlimit(Resource::As).current;
    items.push(match address_space {
        Some(bytes) => {
            let found = format!("{bytes} bytes, which RAM must fit into");
            Item::lacking("address space", Status::Optional, found, "ulimit -v unlimited")
        }
        None => Item::ok("address space", "unlimited"),
    });
}
