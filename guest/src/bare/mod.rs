//! The guest on the bare machine.
//!
//! [`entry`] goes from the PVH entry to ring 3 with as few instructions as it can; from there on everything runs in ring 3 with
//! interrupts off: [`main`] on CPU 0, [`smp::secondary_main`] on the others. Ring 0 is seen again only by an exception, and by the
//! interrupts and page faults of [`async_pf`] if the workload is one of tasks.

mod async_pf;
mod balloon;
mod boot;
mod clock;
mod entry;
mod exceptions;
mod exit;
mod machine;
mod paging;
mod serial;
mod smp;
mod stacks;

use core::panic::PanicInfo;

use guest::command_line::{self, FaultKind, How, Pages as PagesWanted, Tasks, Workload};
use guest::exit_code::ExitCode;
use guest::fingerprint::PAGE_SIZE;
use guest::machine::Machine as _;
use guest::memory_map::MemoryMap;
use guest::order::Order;
use guest::workload::tasks::{self, Job};
use guest::workload::{Pages, balloon as balloon_workload, dirty, hello, touch, verify, watch};

use boot::Boot;
use machine::PhysicalMachine;
use serial::println;
use stacks::{OwnFibers, STACK_PAGES};

/// What CPU 0 has decided and every CPU does.
struct Plan {
    workload: Workload,
    map: MemoryMap,
    ram_bytes: u64,
    cpus: u64,
    ticks_per_millisecond: u64,
    /// Where the tasks' stacks are, those of CPU 0 first.
    stacks: u64,
}

/// Why the guest ends before its workload begins.
struct Refusal {
    code: ExitCode,
}

/// Prints `error=…` and makes a [`Refusal`] of it.
macro_rules! refuse {
    ($code:ident, $($words:tt)*) => {{
        $crate::bare::serial::println(format_args!($($words)*));
        $crate::bare::Refusal { code: $crate::bare::ExitCode::$code }
    }};
}
use refuse;

/// CPU 0 in ring 0, between long mode and ring 3: only what ring 3 cannot do.
extern "C" fn prepare() {
    clock::ask_cpuid();
    async_pf::ask_cpuid();
    smp::start_secondaries();
}

/// CPU 0 in ring 3.
extern "C" fn main(_cpu: u64, start_info: u64) -> ! {
    let cpus = match smp::wait_for_all() {
        Ok(cpus) => cpus,
        Err(refusal) => exit::exit(refusal.code),
    };
    match plan(start_info, cpus) {
        Ok(plan) => run(smp::publish(plan), 0),
        Err(refusal) => exit::exit(refusal.code),
    }
}

/// Reads what the boot loader left, and decides.
fn plan(start_info: u64, cpus: u64) -> Result<Plan, Refusal> {
    let boot = Boot::read(start_info)?;
    for word in command_line::ignored_words(boot.command_line) {
        println(format_args!("ignored={word}"));
    }
    let workload = command_line::parse(boot.command_line).map_err(|error| refuse!(CommandLine, "{error}"))?;
    let mut plan = Plan {
        workload,
        map: boot.memory_map()?,
        ram_bytes: boot.ram_bytes(),
        cpus,
        ticks_per_millisecond: 1,
        stacks: 0,
    };
    match workload {
        Workload::Hello | Workload::Fault(_) => return Ok(plan),
        Workload::Verify { .. }
        | Workload::Touch { .. }
        | Workload::Dirty { .. }
        | Workload::Watch { .. }
        | Workload::Balloon { .. } => {}
        Workload::Tasks(Tasks { tasks, .. }) => plan.take_stacks(tasks as u64 * cpus)?,
    }
    let pages = plan.pages().map_err(|wanted| {
        let available = plan.map.count();
        refuse!(
            CommandLine,
            "error=too_many_pages word=pages={wanted} available={available}"
        )
    })?;
    if let Some(last) = pages.last_frame() {
        paging::map_up_to(&plan.map, last)?;
    }
    plan.ticks_per_millisecond = clock::ticks_per_millisecond()?;
    Ok(plan)
}

impl Plan {
    /// Takes the stacks of so many tasks out of the memory that is mapped from the start.
    fn take_stacks(&mut self, count: u64) -> Result<(), Refusal> {
        const MAPPED_FRAMES: u64 = 1 << 18;
        let frame = self.map.take(count * STACK_PAGES, MAPPED_FRAMES);
        let frame = frame.ok_or_else(|| refuse!(Machine, "error=no_room_for_stacks stacks={count}"))?;
        self.stacks = frame * PAGE_SIZE as u64;
        Ok(())
    }

    /// The pages that the workload wants, or how many it wants in vain.
    fn pages(&self) -> Result<Pages<'_>, u64> {
        let (pages, order) = match self.workload {
            Workload::Verify { pages, order, .. }
            | Workload::Touch { pages, order, .. }
            | Workload::Dirty { pages, order, .. }
            | Workload::Balloon { pages, order, .. }
            | Workload::Tasks(Tasks { pages, order, .. }) => (pages, order),
            Workload::Watch { pages, .. } => (pages, Order::Sequential),
            Workload::Hello | Workload::Fault(_) => (PagesWanted::First(0), Order::Sequential),
        };
        let count = match pages {
            PagesWanted::All => self.map.count(),
            PagesWanted::First(count) => count,
        };
        Pages::new(&self.map, count, order).ok_or(count)
    }
}

/// What every CPU does in the end.
fn run(plan: &'static Plan, cpu: u64) -> ! {
    let machine = PhysicalMachine { plan, cpu };
    let code = match plan.pages() {
        Ok(pages) => match plan.workload {
            Workload::Hello => hello::run(&machine),
            Workload::Verify { seed, full, .. } => verify::run(&machine, &pages, seed, full),
            Workload::Touch { rounds, .. } => touch::run(&machine, &pages, rounds),
            Workload::Dirty { rounds, .. } => dirty::run(&machine, &pages, rounds),
            Workload::Watch {
                rounds, period_us, ..
            } => watch::run(&machine, &pages, rounds, period_us),
            Workload::Tasks(options) => run_tasks(&machine, &pages, options),
            Workload::Balloon {
                how, wait, rounds, ..
            } if cpu == 0 => run_balloon(&machine, &pages, how, wait, rounds),
            Workload::Fault(kind) if cpu == 0 => fail(kind),
            Workload::Balloon { .. } | Workload::Fault(_) => exit::park(),
        },
        // The plan has been made with these pages.
        Err(_) => ExitCode::CommandLine,
    };
    if cpu != 0 {
        exit::park();
    }
    let result = if code == ExitCode::Ok { "ok" } else { "failed" };
    machine.print(format_args!("result={result}"));
    exit::exit(code)
}

/// The workload of tasks.
fn run_tasks(machine: &PhysicalMachine, pages: &Pages<'_>, options: Tasks) -> ExitCode {
    let job = Job::new(machine, pages, options);
    let area = async_pf::area(machine.cpu);
    let first = machine.cpu * options.tasks as u64 * STACK_PAGES * PAGE_SIZE as u64;
    // SAFETY: the plan has taken them out of the memory map, for each CPU its own.
    let fibers = unsafe { OwnFibers::new(area, &job, machine.plan.stacks + first, options.tasks) };
    fibers.run(options.tasks, |fibers| tasks::run(&job, fibers))
}

/// The workload of the balloon.
fn run_balloon(machine: &PhysicalMachine, pages: &Pages<'_>, how: How, wait: bool, rounds: u64) -> ExitCode {
    match balloon::Driver::start() {
        Ok(driver) if how == How::Report && !driver.reports() => {
            println(format_args!("error=balloon_takes_no_reports"));
            ExitCode::Machine
        }
        Ok(mut driver) => balloon_workload::run(machine, &mut driver, pages, how, wait, rounds),
        Err(refusal) => refusal.code,
    }
}

/// The workload that fails.
fn fail(kind: FaultKind) -> ExitCode {
    match kind {
        FaultKind::PageFault => exceptions::provoke_page_fault(),
        FaultKind::InvalidOpcode => exceptions::provoke_invalid_opcode(),
        FaultKind::DoubleFault => exceptions::provoke_double_fault(),
        FaultKind::Panic => panic!("as the command line asked"),
    }
    // Not reached, and if it is, the exit code tells.
    ExitCode::CheckFailed
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let cpu = entry::current_cpu();
    let message = info.message();
    match info.location() {
        Some(location) => println(format_args!(
            "panic={message} file={} line={} cpu={cpu}",
            location.file(),
            location.line()
        )),
        None => println(format_args!("panic={message} cpu={cpu}")),
    }
    exit::exit(ExitCode::Panic)
}
