//! How one page server bears many VMs at once: a benchmark, which `scripts/bench-many` runs. It fails only if a page is a wrong
//! one.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use std::time::Instant;

use tests::need;
use tests::random::number;
use tests::scratch::Scratch;
use tests::served::{FILLS, SEED, assert_right_and_quiet, served, socket};
use tests::server::Server;
use tests::vm::RunningVm;

/// RAM of each VM.
const MIB: u64 = 64;

#[test]
#[ignore = "a benchmark: scripts/bench-many"]
fn many_vms_at_once_from_one_server() {
    need!(tests::host::kvm());
    let count = number("UMEM_BENCH_VMS").unwrap_or(32);
    let scratch = Scratch::new();
    let image = scratch.fingerprinted(&format!("{MIB}M"), SEED, "order=random");
    for listen in [socket(&scratch).as_str(), "tcp:127.0.0.1:0"] {
        for fill in FILLS {
            let server = Server::start(listen, &[("base", &image)]);
            let memory = |key| server.status_kib(key).unwrap();
            let vm = || served(&[server.url()]).memory(&format!("fill={fill}"));
            // One alone, to compare with; and what the server takes of memory once and for all it has taken then.
            let alone = vm().run();
            assert_right_and_quiet(&alone, MIB);
            let before = memory("VmRSS");
            let since = Instant::now();
            let vms: Vec<RunningVm> = (0..count).map(|_| vm().start()).collect();
            let mut seconds: Vec<f64> = vms
                .into_iter()
                .map(|vm| {
                    let vm = vm.finish();
                    assert_right_and_quiet(&vm, MIB);
                    vm.report().number("/total_ms") / 1000.0
                })
                .collect();
            let elapsed = since.elapsed().as_secs_f64();
            seconds.sort_by(f64::total_cmp);
            let (fastest, median, slowest) =
                (seconds[0], seconds[seconds.len() / 2], seconds[seconds.len() - 1]);
            let socket = listen.split(':').next().unwrap();
            println!(
                "socket={socket} fill={fill} vms={count} mib={MIB} wrong=0 elapsed_s={elapsed:.2} alone_s={:.2} \
                 fastest_s={fastest:.2} median_s={median:.2} slowest_s={slowest:.2} slowest_to_median={:.2} \
                 server_rss_kib_before={before} server_rss_kib_after={} server_rss_kib_peak={}",
                alone.report().number("/total_ms") / 1000.0,
                slowest / median,
                memory("VmRSS"),
                memory("VmHWM"),
            );
            let all: Vec<String> = seconds.iter().map(|seconds| format!("{seconds:.2}")).collect();
            println!("durations_s={}", all.join(","));
            server.stop();
        }
    }
}
