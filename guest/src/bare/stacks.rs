//! Tasks with a stack each, on one CPU, all in ring 3.

use core::arch::global_asm;
use core::cell::Cell;
use core::ptr;
use core::sync::atomic::{AtomicUsize, Ordering, compiler_fence};

use guest::fingerprint::PAGE_SIZE;
use guest::workload::tasks::{Job, Stacks, Step, Stopped};

use super::async_pf::{self, Area};
use super::machine::PhysicalMachine;

/// Pages of a task's stack.
pub(super) const STACK_PAGES: u64 = 2;
const STACK_SIZE: u64 = STACK_PAGES * PAGE_SIZE as u64;

/// No task runs.
const NOBODY: usize = usize::MAX;

/// Words that [`switch_stacks`] takes from a stack that it goes on with: six registers and where to.
const SAVED_WORDS: u64 = 7;

unsafe extern "C" {
    /// Leaves this stack, of which the pointer is stored at `save`, for the one that was left at `to`.
    fn switch_stacks(save: *mut u64, to: u64);
    /// Where a stack's first switch leads: RBX is the tasks, R12 the number of the task.
    fn task_entry();
}

global_asm!(
    r#"
    .section .text.stacks, "ax", @progbits
    .global switch_stacks
switch_stacks:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret

    .global task_entry
task_entry:
    mov %rbx, %rdi
    mov %r12, %rsi
    call {main}
    ud2
    .text
    "#,
    main = sym task_main,
    options(att_syntax),
);

/// The tasks of one CPU. Each keeps its stack pointer, while it does not run, in the lowest word of its stack.
pub(super) struct Fibers<'a> {
    area: &'static Area,
    job: &'a Job<'a, PhysicalMachine>,
    /// The lowest address of the first stack.
    stacks: u64,
    /// The stack of the scheduler while a task runs.
    scheduler: Cell<u64>,
    /// The task whose code runs. Set and taken on the task's own stack, so that an event in between finds nobody.
    running: AtomicUsize,
    stopped: Cell<Stopped>,
}

/// The same, for the scheduler.
pub(super) struct OwnFibers<'a>(Fibers<'a>);

impl<'a> OwnFibers<'a> {
    /// `count` tasks on the stacks at `stacks`, one behind the other, which belong to them from now on. Lets events in if there are
    /// any, when the tasks are first given a turn.
    ///
    /// # Safety
    ///
    /// The stacks are mapped memory that nobody else uses, [`STACK_PAGES`] for each task.
    pub(super) unsafe fn new(
        area: &'static Area,
        job: &'a Job<'a, PhysicalMachine>,
        stacks: u64,
        count: usize,
    ) -> Self {
        let fibers = Self(Fibers {
            area,
            job,
            stacks,
            scheduler: Cell::new(0),
            running: AtomicUsize::new(NOBODY),
            stopped: Cell::new(Stopped::Turn(Step::Again)),
        });
        for task in 0..count {
            let bottom = fibers.0.saved(task);
            let top = bottom.addr() as u64 + STACK_SIZE;
            // Aligned as before a call when the words have been taken.
            let first = top - 16 - SAVED_WORDS * 8;
            // SAFETY: within the stack, which the caller vouches for. Its lower pages are touched here and now.
            unsafe {
                for page in 0..STACK_PAGES {
                    bottom
                        .byte_add((page * PAGE_SIZE as u64) as usize)
                        .write_volatile(0);
                }
                bottom.write_volatile(first);
                let words = first as *mut u64;
                // R15, R14, R13, R12, RBP, RBX, where to.
                for (index, word) in [0, 0, 0, task as u64, 0, 0, task_entry as *const () as u64]
                    .into_iter()
                    .enumerate()
                {
                    words.add(index).write_volatile(word);
                }
            }
        }
        fibers
    }

    /// Runs `work` with the tasks in the place where they stay.
    pub(super) fn run<R>(&self, count: usize, work: impl FnOnce(&Self) -> R) -> R {
        let here = ptr::from_ref(&self.0).cast::<Fibers<'static>>();
        for task in 0..count {
            let rbx = self.0.first_words(task).wrapping_add(5);
            // SAFETY: the stack's first words, as `new` wrote them.
            unsafe { rbx.write_volatile(here.addr() as u64) };
        }
        if async_pf::is_offered() {
            async_pf::touch_own_memory();
            self.0.area.fibers.store(here.cast_mut(), Ordering::Release);
            async_pf::enable();
        }
        let result = work(self);
        self.0.area.fibers.store(ptr::null_mut(), Ordering::Release);
        result
    }
}

impl Stacks for OwnFibers<'_> {
    const CLOCK_HZ: u32 = async_pf::TICKS_HZ;

    fn has_events(&self) -> bool {
        async_pf::is_offered()
    }

    fn resume(&self, task: usize) -> Stopped {
        // SAFETY: the task's stack is one that `new` made or that `stop` left.
        unsafe { switch_stacks(self.0.scheduler.as_ptr(), *self.0.saved(task)) };
        compiler_fence(Ordering::SeqCst);
        self.0.stopped.get()
    }

    fn next_ready(&self) -> Option<u32> {
        self.0.area.next_ready()
    }

    fn wait(&self) {
        async_pf::wait();
    }

    fn clock(&self) -> u32 {
        self.0.area.ticks()
    }
}

impl Fibers<'_> {
    /// Where a task's stack pointer is kept.
    fn saved(&self, task: usize) -> *mut u64 {
        (self.stacks + task as u64 * STACK_SIZE) as *mut u64
    }

    fn first_words(&self, task: usize) -> *mut u64 {
        self.saved(task)
            .wrapping_byte_add((STACK_SIZE - 16 - SAVED_WORDS * 8) as usize)
    }

    /// On the stack of a task that is not `running` any more: gives the CPU back to the scheduler, until it is given back.
    fn stop(&self, task: usize, why: Stopped) {
        self.stopped.set(why);
        compiler_fence(Ordering::SeqCst);
        // SAFETY: the scheduler waits on its stack in `resume`.
        unsafe { switch_stacks(self.saved(task), self.scheduler.get()) };
        self.running.store(task, Ordering::SeqCst);
    }
}

/// What a task does on its stack.
extern "C" fn task_main(fibers: &Fibers<'_>, task: usize) -> ! {
    loop {
        fibers.running.store(task, Ordering::SeqCst);
        fibers.area.set_parkable(true);
        let step = fibers.job.step(task);
        fibers.area.set_parkable(false);
        fibers.running.store(NOBODY, Ordering::SeqCst);
        fibers.stop(task, Stopped::Turn(step));
    }
}

/// Parks the task that runs on the CPU of `area`, until the scheduler lets it go on.
pub(super) fn park(area: &Area, token: u32) {
    let fibers = area.fibers.load(Ordering::Acquire);
    if fibers.is_null() {
        return;
    }
    // SAFETY: they are where `run` has said until it takes that back, on this CPU.
    let fibers = unsafe { &*fibers };
    match fibers.running.swap(NOBODY, Ordering::SeqCst) {
        NOBODY => {}
        task => fibers.stop(task, Stopped::NotPresent(token)),
    }
}
