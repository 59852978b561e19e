//! A balloon: virtio 1.2, section 5.5. The guest gives pages back, and takes them again.
//!
//! Pages are taken out of RAM when the guest puts them into the balloon, or reports that they are free; what is there reads zero
//! from then on, whenever the guest uses it again. Nothing has to be done when it takes them out of the balloon, so it need not
//! say that before it uses them (`VIRTIO_BALLOON_F_MUST_TELL_HOST` is not offered).
//!
//! All work is done by a thread of its own, since it may have to wait: for a page of the guest's that is still absent, for a pager
//! that learns of what is removed, and for those outside who want to be done with a page before it goes. While vCPUs stand
//! still, so does it.

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{fmt, io, thread};

use serde::{Deserialize, Serialize};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::virtio_mmio::{Interrupt, Registers, VirtioDevice, VirtioMmio};
use crate::address_map::PAGE_SIZE;
use crate::control::Cause;
use crate::removal::{MappedRam, Remover, runs};

/// Feature bits.
const DEFLATE_ON_OOM: u64 = 1 << 2;
const PAGE_REPORTING: u64 = 1 << 5;

/// Queues. There are no statistics and no hints, so that reports come in the third, as Linux numbers them.
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORT: usize = 2;

/// The most descriptors in a queue.
const QUEUE_SIZE: u16 = 256;

/// Page numbers taken from one chain, so that a guest cannot have this process remember any number of them. Drivers send at most a
/// page of them.
const NUMBERS_AT_MOST: usize = 1 << 12;

/// How a balloon begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonOptions {
    /// How much of RAM it is to hold, in bytes.
    pub size: u64,
    /// Whether the guest is to report pages that are free.
    pub free_page_reporting: bool,
    /// Whether the guest may take pages out when it has no others.
    pub deflate_on_oom: bool,
}

/// A balloon's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonState {
    free_page_reporting: bool,
    deflate_on_oom: bool,
    /// In pages.
    target: u32,
    actual: u32,
    registers: Registers,
}

impl BalloonState {
    fn options(&self) -> BalloonOptions {
        BalloonOptions {
            size: u64::from(self.target) * PAGE_SIZE,
            free_page_reporting: self.free_page_reporting,
            deflate_on_oom: self.deflate_on_oom,
        }
    }

    /// Whether it can be what a balloon had.
    pub(crate) fn is_possible(&self) -> bool {
        self.registers
            .is_possible(queues(self.free_page_reporting), QUEUE_SIZE)
    }
}

/// What a balloon holds and has done, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonStatus {
    /// How much it is to hold.
    pub target: u64,
    /// How much it holds, as its driver says.
    pub actual: u64,
    /// Put in so far.
    pub inflated: u64,
    /// Taken out so far.
    pub deflated: u64,
    /// Reported as free so far.
    pub reported: u64,
}

const fn queues(free_page_reporting: bool) -> usize {
    if free_page_reporting { 3 } else { 2 }
}

/// The balloon, and the registers by which the guest drives it.
pub struct Balloon {
    mmio: VirtioMmio<Device>,
}

impl fmt::Debug for Balloon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Balloon")
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

impl Balloon {
    /// One that takes pages out of RAM by `remover`, and raises `interrupt`.
    pub fn new(options: BalloonOptions, remover: Arc<Remover>, interrupt: EventFd) -> io::Result<Self> {
        let interrupt = Arc::new(Interrupt::new(interrupt));
        let device = Device::start(options, remover, Arc::clone(&interrupt))?;
        Ok(Self {
            mmio: VirtioMmio::new(device, interrupt),
        })
    }

    /// The same in a state that is possible.
    pub fn restored(state: &BalloonState, remover: Arc<Remover>, interrupt: EventFd) -> io::Result<Self> {
        let interrupt = Arc::new(Interrupt::new(interrupt));
        let device = Device::start(state.options(), remover, Arc::clone(&interrupt))?;
        device.shared.actual.store(state.actual, Relaxed);
        Ok(Self {
            mmio: VirtioMmio::restored(device, interrupt, &state.registers),
        })
    }

    /// What the guest reads at an offset of the register block.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        self.mmio.read(offset, data);
    }

    /// The guest writes there.
    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        self.mmio.write(offset, data);
    }

    /// Its state. It stands still.
    pub(super) fn save(&self) -> BalloonState {
        let shared = &self.mmio.device().shared;
        BalloonState {
            free_page_reporting: shared.options.free_page_reporting,
            deflate_on_oom: shared.options.deflate_on_oom,
            target: shared.target.load(Relaxed),
            actual: shared.actual.load(Relaxed),
            registers: self.mmio.save(),
        }
    }

    /// To be called when the interrupt controllers have their state.
    pub(super) fn repeat_interrupt(&self) {
        self.mmio.repeat_interrupt();
    }

    /// How much of RAM it is to hold from now on; whole pages, and no more than RAM has. Answers how much that is.
    pub fn resize(&self, bytes: u64) -> u64 {
        let shared = &self.mmio.device().shared;
        let pages = shared.pages(bytes);
        shared.target.store(pages, Relaxed);
        shared.interrupt.configuration_changed();
        u64::from(pages) * PAGE_SIZE
    }

    /// What it holds and has done.
    pub fn status(&self) -> BalloonStatus {
        let shared = &self.mmio.device().shared;
        let bytes = |pages: u64| pages * PAGE_SIZE;
        BalloonStatus {
            target: bytes(shared.target.load(Relaxed).into()),
            actual: bytes(shared.actual.load(Relaxed).into()),
            inflated: bytes(shared.inflated.load(Relaxed)),
            deflated: bytes(shared.deflated.load(Relaxed)),
            reported: bytes(shared.reported.load(Relaxed)),
        }
    }

    /// Makes it stand still. False: it does not within this time, and goes on as before.
    pub(crate) fn stand_still(&self, patience: Duration) -> bool {
        self.mmio.device().shared.stand_still(patience)
    }

    /// Lets it go on.
    pub(crate) fn go_on(&self) {
        let shared = &self.mmio.device().shared;
        shared.go_on(&mut shared.turn());
    }
}

/// The device behind the registers.
struct Device {
    shared: Arc<Shared>,
}

struct Shared {
    options: BalloonOptions,
    remover: Arc<Remover>,
    interrupt: Arc<Interrupt>,
    /// In pages.
    target: AtomicU32,
    actual: AtomicU32,
    inflated: AtomicU64,
    deflated: AtomicU64,
    reported: AtomicU64,
    turn: Mutex<Turn>,
    changed: Condvar,
    /// Held by the thread while it works on a chain. `None`: there is no driver.
    queues: Mutex<Option<Vec<Queue>>>,
}

/// Whose turn it is.
#[derive(Default)]
struct Turn {
    /// There may be something in the queues.
    kicked: bool,
    working: bool,
    wanted: Wanted,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Wanted {
    #[default]
    Work,
    Stand,
    End,
}

impl VirtioDevice for Device {
    const ID: u32 = 5;
    const QUEUE_SIZE: u16 = QUEUE_SIZE;

    fn features(&self) -> u64 {
        let options = &self.shared.options;
        let offered = |bit, wanted| if wanted { bit } else { 0 };
        offered(PAGE_REPORTING, options.free_page_reporting) | offered(DEFLATE_ON_OOM, options.deflate_on_oom)
    }

    fn queues(&self) -> usize {
        queues(self.shared.options.free_page_reporting)
    }

    /// How many pages it is to hold, and how many it holds.
    fn read_configuration(&self, offset: u64, data: &mut [u8]) {
        let shared = &self.shared;
        let words = [shared.target.load(Relaxed), shared.actual.load(Relaxed)];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let from = bytes.iter().skip(offset as usize);
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    fn write_configuration(&self, offset: u64, data: &[u8]) {
        if let (4, Ok(actual)) = (offset, <[u8; 4]>::try_from(data)) {
            self.shared.actual.store(u32::from_le_bytes(actual), Relaxed);
        }
    }

    fn activate(&self, states: &[QueueState]) {
        let shared = &self.shared;
        let queues: Result<Vec<Queue>, _> = states.iter().map(|state| Queue::try_from(*state)).collect();
        match queues {
            Ok(queues) => {
                *shared.queues() = Some(queues);
                shared.kick();
            }
            Err(error) => shared.give_up(&error),
        }
    }

    fn reset(&self) {
        // The thread has them while it works on a chain.
        *self.shared.queues() = None;
        self.shared.actual.store(0, Relaxed);
    }

    fn notify(&self, _queue: u32) {
        self.shared.kick();
    }

    fn queue_states(&self) -> Option<Vec<QueueState>> {
        Some(self.shared.queues().as_ref()?.iter().map(Queue::state).collect())
    }
}

impl Device {
    fn start(options: BalloonOptions, remover: Arc<Remover>, interrupt: Arc<Interrupt>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            options,
            remover,
            interrupt,
            target: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            inflated: AtomicU64::new(0),
            deflated: AtomicU64::new(0),
            reported: AtomicU64::new(0),
            turn: Mutex::default(),
            changed: Condvar::new(),
            queues: Mutex::new(None),
        });
        shared.target.store(shared.pages(options.size), Relaxed);
        let working = Arc::clone(&shared);
        thread::Builder::new()
            .name("balloon".into())
            .spawn(move || working.work())?;
        Ok(Self { shared })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // It is not waited for: it may be waiting for a page that does not come, and has what it uses.
        self.shared.turn().wanted = Wanted::End;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn turn(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queues(&self) -> MutexGuard<'_, Option<Vec<Queue>>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of so many bytes.
    fn pages(&self, bytes: u64) -> u32 {
        let pages = (bytes / PAGE_SIZE).min(self.remover.ram().pages());
        u32::try_from(pages).unwrap_or(u32::MAX)
    }

    fn kick(&self) {
        self.turn().kicked = true;
        self.changed.notify_all();
    }

    fn stand_still(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut turn = self.turn();
        if turn.wanted == Wanted::Work {
            turn.wanted = Wanted::Stand;
        }
        while turn.working {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.go_on(&mut turn);
                return false;
            }
            let waited = self.changed.wait_timeout(turn, left);
            turn = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn go_on(&self, turn: &mut Turn) {
        if turn.wanted == Wanted::Stand {
            turn.wanted = Wanted::Work;
            self.changed.notify_all();
        }
    }

    /// The thread.
    fn work(&self) {
        let mut turn = self.turn();
        loop {
            if turn.wanted == Wanted::End {
                return;
            }
            if !turn.kicked || turn.wanted == Wanted::Stand {
                turn = self.changed.wait(turn).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            turn.kicked = false;
            turn.working = true;
            drop(turn);
            // A chain at a time, so that who wants it to stand still or the driver to begin anew waits for no more.
            let more = self.serve_chain();
            turn = self.turn();
            turn.working = false;
            turn.kicked |= more;
            self.changed.notify_all();
        }
    }

    /// Does what one chain asks for. True: there may be more.
    fn serve_chain(&self) -> bool {
        let mut queues = self.queues();
        let ram = self.remover.ram();
        for (index, queue) in queues
            .iter_mut()
            .flatten()
            .enumerate()
            .filter(|(_, queue)| queue.ready())
        {
            match self.next_chain(queue) {
                Ok(None) => {}
                Ok(Some(chain)) => {
                    let head = chain.head_index();
                    match index {
                        INFLATE => self.inflate(&chain),
                        DEFLATE => {
                            let pages = page_numbers(&chain).len() as u64;
                            self.deflated.fetch_add(pages, Relaxed);
                        }
                        REPORT => self.report(chain),
                        _ => {}
                    }
                    let given_back = queue.add_used(ram.memory(), head, 0);
                    // This process has written there, which KVM does not see.
                    let used = 6 + 8 * u64::from(queue.size());
                    ram.note_write(GuestAddress(queue.used_ring()), used);
                    if let Err(error) = given_back {
                        self.give_up(&error);
                        *queues = None;
                        return false;
                    }
                    self.interrupt.used();
                    return true;
                }
                Err(error) => {
                    self.give_up(&error);
                    *queues = None;
                    return false;
                }
            }
        }
        false
    }

    fn next_chain(&self, queue: &mut Queue) -> Result<Option<Chain<'_>>, virtio_queue::Error> {
        let memory = self.remover.ram().memory();
        if !queue.is_valid(memory) {
            return Err(virtio_queue::Error::QueueNotReady);
        }
        Ok(queue.iter(memory)?.next())
    }

    fn inflate(&self, chain: &Chain<'_>) {
        let numbers = page_numbers(chain);
        let ram = self.remover.ram();
        let mut pages: Vec<u64> = numbers
            .iter()
            .filter_map(|number| ram.page_at(u64::from(*number) * PAGE_SIZE))
            .collect();
        self.inflated.fetch_add(pages.len() as u64, Relaxed);
        if pages.len() < numbers.len() {
            tracing::debug!(
                given = numbers.len(),
                in_ram = pages.len(),
                "balloon: page numbers outside RAM"
            );
        }
        pages.sort_unstable();
        pages.dedup();
        self.remover.remove(&runs(&pages), Cause::Balloon);
    }

    fn report(&self, chain: Chain<'_>) {
        let ram = self.remover.ram();
        let pages: Vec<_> = chain
            .take(QUEUE_SIZE.into())
            .flat_map(|descriptor| ram.pages_within(descriptor.addr().0, descriptor.len().into()))
            .collect();
        let count: u64 = pages.iter().map(|run| run.count).sum();
        self.reported.fetch_add(count, Relaxed);
        self.remover.remove(&pages, Cause::FreePageReporting);
    }

    /// What the driver has set up makes no sense.
    fn give_up(&self, error: &virtio_queue::Error) {
        tracing::warn!(%error, "balloon: the driver has to begin anew");
        self.interrupt.need_reset();
    }
}

type Chain<'a> = DescriptorChain<&'a MappedRam>;

/// The page numbers in what the driver has given; not more than a driver gives, and what cannot be read is left out.
fn page_numbers(chain: &Chain<'_>) -> Vec<u32> {
    let memory = chain.memory();
    let mut numbers = Vec::new();
    let mut bytes = [0; PAGE_SIZE as usize];
    for descriptor in chain
        .clone()
        .take(QUEUE_SIZE.into())
        .filter(|descriptor| !descriptor.is_write_only())
    {
        let (mut at, mut left) = (descriptor.addr(), descriptor.len() as usize);
        while left >= 4 && numbers.len() < NUMBERS_AT_MOST {
            let step = &mut bytes[..left.min(PAGE_SIZE as usize) & !3];
            if memory.read_slice(step, at).is_err() {
                break;
            }
            let (words, _) = step.as_chunks::<4>();
            numbers.extend(words.iter().map(|word| u32::from_le_bytes(*word)));
            left -= step.len();
            at = GuestAddress(at.0 + step.len() as u64);
        }
    }
    numbers
}
