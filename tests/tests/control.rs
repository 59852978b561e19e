//! A VM in the hands of another thread.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use tests::in_process::{self, Machine};
use tests::need;
use umem::image::ReadError;
use umem::source::zero::ZeroSource;
use umem::source::{Class, Content, PageSource, SourceError, SourceStats};
use umem::units::PageRange;
use vmm::boot::{Kernel, Layout, LayoutConfig, LayoutSource};
use vmm::control::{Control, Event, PauseError, ResumeError, VmState};
use vmm::ending::Ending;
use vmm::kvm::{AsyncPageFaults, ExitReason};
use vmm::machine::{Firmware, MachineConfig, Outcome, Start};

const RAM: u64 = 64 << 20;

/// The built-in guest that is told `command_line`, over pages from `base`.
fn config(command_line: &str, base: Arc<dyn PageSource>) -> MachineConfig {
    let layout = Layout::build(&LayoutConfig {
        ram_size: RAM,
        kernel: Kernel::BuiltIn,
        initramfs: None,
        command_line: Some(command_line.into()),
    })
    .unwrap();
    let start = Start::Boot {
        entry: layout.boot_info(),
        firmware: Firmware::BuiltIn,
    };
    MachineConfig {
        async_pf: AsyncPageFaults::Off,
        ..in_process::config(layout.ram(), start, Arc::new(LayoutSource::new(layout, base)))
    }
}

fn port_writes(control: &Control) -> u64 {
    let exits = control.counters().unwrap().exits;
    let mut exits = exits.iter();
    exits
        .find(|(reason, _)| *reason == ExitReason::PortWrite)
        .unwrap()
        .1
}

#[test]
fn paused_vcpus_stand_still_and_go_on() {
    need!(tests::host::kvm());
    let control = Control::new();
    let states = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&states);
    control.observe(move |event| {
        if let Event::State(state) = event {
            seen.lock().unwrap().push(*state);
        }
    });
    assert!(matches!(
        control.pause(),
        Err(PauseError::WrongState(VmState::Booting))
    ));
    assert!(control.counters().is_none());
    let vm = Machine::start_under(
        control.clone(),
        MachineConfig {
            cpus: 2,
            ..config("workload=dirty pages=64 rounds=forever", Arc::new(ZeroSource))
        },
    );
    vm.wait_until_it_runs();
    for _ in 0..50 {
        control.pause().unwrap();
        assert_eq!(control.state(), VmState::Paused);
        assert!(matches!(control.pause(), Err(PauseError::AlreadyPaused)));
        let before = port_writes(&control);
        thread::sleep(Duration::from_millis(5));
        assert_eq!(port_writes(&control), before, "a paused vCPU made an exit");
        control.resume().unwrap();
        assert!(matches!(control.resume(), Err(ResumeError::WrongState(_))));
        let deadline = Instant::now() + Duration::from_secs(30);
        while port_writes(&control) == before {
            assert!(Instant::now() < deadline, "a resumed vCPU makes no exit");
            thread::yield_now();
        }
    }
    control.pause().unwrap();
    control.shutdown().unwrap();
    assert!(matches!(vm.end(), Outcome::Ended(Ending::Stopped)));
    assert_eq!(control.state(), VmState::Stopped);
    assert!(control.shutdown().is_err());
    assert!(matches!(
        control.pause(),
        Err(PauseError::WrongState(VmState::Stopped))
    ));
    let states = states.lock().unwrap();
    assert_eq!(states.first(), Some(&VmState::Running));
    assert_eq!(states.last(), Some(&VmState::Stopped));
    assert_eq!(
        states.iter().filter(|state| **state == VmState::Paused).count(),
        51
    );
}

/// Zero pages, which do not come before it is told so.
struct HeldBack(Mutex<bool>, std::sync::Condvar);

impl PageSource for HeldBack {
    fn url(&self) -> String {
        "held back".into()
    }

    fn try_read(&self, _: PageRange, _: &mut [u8]) -> Result<Option<Content>, SourceError> {
        Ok(self.0.lock().unwrap().then_some(Content::Zero))
    }

    fn read(&self, pages: PageRange, _: Class, _: &mut [u8]) -> Result<Content, SourceError> {
        let (mut open, _) = self
            .1
            .wait_timeout_while(self.0.lock().unwrap(), Duration::from_mins(1), |open| !*open)
            .unwrap();
        if std::mem::replace(&mut *open, true) {
            Ok(Content::Zero)
        } else {
            Err(SourceError::from(ReadError::Truncated {
                page: pages.start,
                path: "held back".into(),
            }))
        }
    }

    fn next_data(&self, _: PageRange) -> Result<Option<PageRange>, SourceError> {
        Ok(None)
    }

    fn digest(&self) -> Option<[u8; 32]> {
        None
    }

    fn stats(&self) -> SourceStats {
        SourceStats::default()
    }
}

/// Where the wait can be interrupted, the VM is paused; where it cannot, that is said, and the VM is as it was.
#[test]
fn a_pause_ends_though_a_vcpu_waits_for_a_page() {
    need!(tests::host::kvm());
    let source = Arc::new(HeldBack(Mutex::new(false), std::sync::Condvar::new()));
    let vm = Machine::running(config("workload=dirty rounds=2", source.clone()));
    let control = vm.control.clone();
    let deadline = Instant::now() + Duration::from_secs(30);
    while control.state() != VmState::WaitingForPages {
        assert!(Instant::now() < deadline, "it does not wait for a page");
        thread::sleep(Duration::from_millis(10));
    }
    let since = Instant::now();
    let paused = control.pause_within(Duration::from_millis(300));
    assert!(since.elapsed() < Duration::from_secs(5));
    match paused {
        Ok(()) => control.resume().unwrap(),
        Err(
            error @ PauseError::VcpuWaits {
                index: 0,
                page: Some(_),
                ..
            },
        ) => {
            assert_eq!(control.state(), VmState::WaitingForPages);
            assert!(error.to_string().contains("waits for a page"), "{error}");
        }
        Err(error) => panic!("{error}"),
    }
    *source.0.lock().unwrap() = true;
    source.1.notify_all();
    let outcome = vm.end();
    assert!(
        matches!(outcome, Outcome::Ended(Ending::GuestExit(0))),
        "{outcome:?}"
    );
}
