//! Where the threads of a VM run: `--cpus placement=`.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::collections::HashMap;
use std::fs;

use rustix::process::Signal;
use tests::need;
use tests::program::{Program, Running};
use tests::scratch::Scratch;
use tests::vm::Vm;

/// Which CPUs each thread of a program may run on, by its name.
fn placed(program: &Running) -> HashMap<String, String> {
    let tasks = format!("/proc/{}/task", program.pid().as_raw_nonzero());
    fs::read_dir(tasks)
        .unwrap()
        .filter_map(|task| {
            // A thread may just have ended.
            let task = task.unwrap().path();
            let name = fs::read_to_string(task.join("comm")).ok()?;
            let status = fs::read_to_string(task.join("status")).ok()?;
            let cpus = status
                .lines()
                .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
            Some((name.trim().to_owned(), cpus.trim().to_owned()))
        })
        .collect()
}

/// Starts a VM whose first page does not come, and waits until the CPUs of its vCPU and of the thread that reads its faults are
/// right. The main thread keeps `all`.
#[track_caller]
fn assert_places(options: &str, right: impl Fn(&str, &str) -> bool) {
    let all = placed_of_this_thread();
    let scratch = Scratch::new();
    let image = scratch.image("8M", "workload=hello");
    let vm = Vm::from_image(&image)
        .memory("source-delay=100s")
        .option("--cpus", options)
        .start();
    vm.wait_until(&format!("threads where {options} says"), |vm| {
        let placed = placed(vm);
        let cpus_of = |name: &str| placed.get(name).map(String::as_str);
        matches!((cpus_of("vcpu-0"), cpus_of("umem-faults-0")), (Some(vcpu), Some(faults)) if right(vcpu, faults))
            && cpus_of("umem") == Some(&all)
    });
    vm.signal(Signal::TERM);
    vm.finish().assert_code(0);
}

fn placed_of_this_thread() -> String {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap();
    let cpus = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    cpus.unwrap().trim().to_owned()
}

fn is_one(cpus: &str) -> bool {
    cpus.parse::<u32>().is_ok()
}

#[test]
fn threads_run_where_the_policy_says() {
    need!(tests::host::kvm());
    let all = placed_of_this_thread();
    assert_places("placement=free", |vcpu, faults| vcpu == all && faults == all);
    assert_places("boot=1", |vcpu, faults| vcpu == all && faults == all);
    assert_places("placement=beside", |vcpu, faults| is_one(vcpu) && faults == vcpu);
    need!(tests::host::two_cpus());
    assert_places("placement=apart", |vcpu, faults| {
        is_one(vcpu) && faults != vcpu && faults != all
    });
}

#[test]
fn placements_that_cannot_be() {
    need!(tests::host::kvm());
    Program::umem(["run", "--cpus", "placement=near"])
        .run()
        .assert_error(2, &["placement=near", "free or beside or apart"]);
    let cpus = std::thread::available_parallelism().unwrap().get();
    Program::umem(["run", "--cpus", &format!("boot={cpus},placement=apart")])
        .run()
        .assert_error(
            2,
            &["placement=apart", &format!("{cpus} vCPUs"), "placement=free"],
        );
}
