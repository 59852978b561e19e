//! The register block by which the guest drives a virtio device: virtio 1.2, section 4.2, without legacy.
//!
//! What the guest writes here is kept and checked by the device when the driver says that it is ready; nothing that it writes
//! makes this program do more than that.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::AcqRel, Ordering::Acquire, Ordering::Release};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_queue::QueueState;
use vmm_sys_util::eventfd::EventFd;

/// Bytes of the block: the registers and the device's configuration.
pub const BLOCK_SIZE: u64 = 0x200;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"umem");

/// Its configuration begins there.
const CONFIGURATION: u64 = 0x100;

/// `VIRTIO_F_VERSION_1`: without it there is no driver for this.
const VERSION_1: u64 = 1 << 32;

/// Status bits (2.1).
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;

/// What is behind the registers.
pub(super) trait VirtioDevice: Send + Sync {
    /// Which device (5).
    const ID: u32;
    /// The most descriptors in each of its queues.
    const QUEUE_SIZE: u16;

    /// What it offers, of its own bits.
    fn features(&self) -> u64;

    /// How many queues it has.
    fn queues(&self) -> usize;

    /// Its configuration at an offset, of which it has what it has; the rest is zero.
    fn read_configuration(&self, offset: u64, data: &mut [u8]);

    /// The driver writes to it.
    fn write_configuration(&self, offset: u64, data: &[u8]);

    /// The driver is ready, and has set up these queues.
    fn activate(&self, queues: &[QueueState]);

    /// The driver wants to begin anew. When this returns, the device touches none of the driver's memory any more.
    fn reset(&self);

    /// The driver has put something into a queue.
    fn notify(&self, queue: u32);

    /// The queues as they are, if it is active.
    fn queue_states(&self) -> Option<Vec<QueueState>>;
}

/// How a device says something to its driver.
#[derive(Debug)]
pub(super) struct Interrupt {
    event: EventFd,
    /// The register.
    status: AtomicU32,
    needs_reset: AtomicBool,
}

impl Interrupt {
    const USED_BUFFER: u32 = 1;
    const CONFIGURATION: u32 = 2;

    pub(super) fn new(event: EventFd) -> Self {
        Self {
            event,
            status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
        }
    }

    /// It has given something back in a queue.
    pub(super) fn used(&self) {
        self.raise(Self::USED_BUFFER);
    }

    /// Its configuration has changed.
    pub(super) fn configuration_changed(&self) {
        self.raise(Self::CONFIGURATION);
    }

    /// It cannot go on with what the driver has told it.
    pub(super) fn need_reset(&self) {
        self.needs_reset.store(true, Release);
        self.raise(Self::CONFIGURATION);
    }

    fn raise(&self, why: u32) {
        self.status.fetch_or(why, AcqRel);
        if let Err(error) = self.event.write(1) {
            tracing::warn!(%error, "virtio: no interrupt");
        }
    }
}

/// The registers and the device behind them.
pub(super) struct VirtioMmio<D> {
    registers: Mutex<Registers>,
    device: D,
    interrupt: Arc<Interrupt>,
}

/// What the driver has written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Registers {
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    status: u32,
    interrupt_status: u32,
    needs_reset: bool,
    queues: Vec<QueueRegisters>,
}

/// A queue as the driver has set it up, and how far the device is with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct QueueRegisters {
    size: u16,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    next_available: u16,
    next_used: u16,
}

impl QueueRegisters {
    fn new(size: u16) -> Self {
        Self {
            size,
            ready: false,
            descriptors: 0,
            available: 0,
            used: 0,
            next_available: 0,
            next_used: 0,
        }
    }

    fn state(&self, max_size: u16) -> QueueState {
        QueueState {
            max_size,
            next_avail: self.next_available,
            next_used: self.next_used,
            event_idx_enabled: false,
            size: self.size,
            ready: self.ready,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        }
    }
}

impl Registers {
    fn new(queues: usize, size: u16) -> Self {
        Self {
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            status: 0,
            interrupt_status: 0,
            needs_reset: false,
            queues: vec![QueueRegisters::new(size); queues],
        }
    }

    /// Whether they can be what a device with so many queues had.
    pub(super) fn is_possible(&self, queues: usize, size: u16) -> bool {
        let sizes = self
            .queues
            .iter()
            .all(|queue| queue.size.is_power_of_two() && queue.size <= size);
        self.queues.len() == queues && sizes
    }

    fn selected(&mut self) -> Option<&mut QueueRegisters> {
        self.queues.get_mut(self.queue_select as usize)
    }

    fn read(&mut self, offset: u64, features: u64, queue_size: u16) -> u32 {
        match offset {
            0x010 => half(features | VERSION_1, self.device_features_select),
            0x034 => self.selected().map_or(0, |_| queue_size.into()),
            0x044 => self.selected().is_some_and(|queue| queue.ready).into(),
            // There is no shared memory: its length is -1.
            0x0b0 | 0x0b4 => u32::MAX,
            _ => 0,
        }
    }

    fn write(&mut self, offset: u64, value: u32, features: u64, queue_size: u16) {
        let status = self.status;
        // Features until they are agreed on, queues from then until the driver is ready.
        let negotiating = status & FEATURES_OK == 0 && status & DRIVER != 0;
        let setting_up = status & (FEATURES_OK | DRIVER_OK) == FEATURES_OK;
        match offset {
            0x014 => self.device_features_select = value,
            0x024 => self.driver_features_select = value,
            0x020 if negotiating => {
                if let Some(shift) = shift(self.driver_features_select) {
                    self.driver_features =
                        self.driver_features & !(0xffff_ffff << shift) | u64::from(value) << shift;
                }
            }
            0x030 => self.queue_select = value,
            0x038 | 0x044 | 0x080..=0x0a4 if setting_up => {
                if let Some(queue) = self.selected() {
                    queue.write(offset, value, queue_size);
                }
            }
            0x070 => self.write_status(value, features | VERSION_1),
            _ => {}
        }
    }

    /// Bits are only set, and in their order.
    fn write_status(&mut self, value: u32, features: u64) {
        let set = |bit| value & bit != 0;
        self.status |= value & (ACKNOWLEDGE | FAILED);
        if set(DRIVER) && self.status & ACKNOWLEDGE != 0 {
            self.status |= DRIVER;
        }
        let agreed = self.driver_features & !features == 0 && self.driver_features & VERSION_1 != 0;
        if set(FEATURES_OK) && self.status & DRIVER != 0 && agreed {
            self.status |= FEATURES_OK;
        }
        if set(DRIVER_OK) && self.status & FEATURES_OK != 0 {
            self.status |= DRIVER_OK;
        }
    }
}

impl QueueRegisters {
    fn write(&mut self, offset: u64, value: u32, most: u16) {
        let word = |at: &mut u64, high: bool| {
            let shift = if high { 32 } else { 0 };
            *at = *at & !(0xffff_ffff << shift) | u64::from(value) << shift;
        };
        match offset {
            0x038 => {
                if let Some(size) = u16::try_from(value)
                    .ok()
                    .filter(|size| size.is_power_of_two() && *size <= most)
                {
                    self.size = size;
                }
            }
            0x044 => self.ready = value & 1 != 0,
            0x080 | 0x084 => word(&mut self.descriptors, offset == 0x084),
            0x090 | 0x094 => word(&mut self.available, offset == 0x094),
            0x0a0 | 0x0a4 => word(&mut self.used, offset == 0x0a4),
            _ => {}
        }
    }
}

impl<D: VirtioDevice> VirtioMmio<D> {
    pub(super) fn new(device: D, interrupt: Arc<Interrupt>) -> Self {
        let registers = Registers::new(device.queues(), D::QUEUE_SIZE);
        Self {
            registers: Mutex::new(registers),
            device,
            interrupt,
        }
    }

    /// The same with registers as they were, which are possible.
    pub(super) fn restored(device: D, interrupt: Arc<Interrupt>, registers: &Registers) -> Self {
        interrupt.status.store(registers.interrupt_status, Release);
        interrupt.needs_reset.store(registers.needs_reset, Release);
        let restored = Self {
            registers: Mutex::new(registers.clone()),
            device,
            interrupt,
        };
        if registers.status & DRIVER_OK != 0 && !registers.needs_reset {
            restored.activate(registers);
        }
        restored
    }

    pub(super) fn device(&self) -> &D {
        &self.device
    }

    /// The registers of a device that stands still.
    pub(super) fn save(&self) -> Registers {
        let mut registers = self.registers().clone();
        registers.interrupt_status = self.interrupt.status.load(Acquire);
        registers.needs_reset = self.interrupt.needs_reset.load(Acquire);
        let states = self.device.queue_states().into_iter().flatten();
        for (queue, state) in registers.queues.iter_mut().zip(states) {
            (queue.next_available, queue.next_used) = (state.next_avail, state.next_used);
        }
        registers
    }

    /// Raises its interrupt once more if there is something that the driver has not seen.
    pub(super) fn repeat_interrupt(&self) {
        if self.interrupt.status.load(Acquire) != 0 {
            self.interrupt.raise(0);
        }
    }

    /// What the guest reads at an offset of the block.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIGURATION {
            return self.device.read_configuration(offset - CONFIGURATION, data);
        }
        // Registers are read as they are: 32 bits, aligned (4.2.2.2).
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else {
            return;
        };
        let value = match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => D::ID,
            0x00c => VENDOR,
            0x060 => self.interrupt.status.load(Acquire),
            0x070 => {
                let needs_reset = self.interrupt.needs_reset.load(Acquire);
                self.registers().status | if needs_reset { NEEDS_RESET } else { 0 }
            }
            _ => self
                .registers()
                .read(offset, self.device.features(), D::QUEUE_SIZE),
        };
        *data = value.to_le_bytes();
    }

    /// The guest writes at an offset of the block.
    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        if offset >= CONFIGURATION {
            return self.device.write_configuration(offset - CONFIGURATION, data);
        }
        let Ok(data) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(data);
        match offset {
            0x050 => self.device.notify(value),
            0x064 => drop(self.interrupt.status.fetch_and(!value, AcqRel)),
            0x070 if value == 0 => self.reset(),
            _ => {
                let mut registers = self.registers();
                let before = registers.status;
                registers.write(offset, value, self.device.features(), D::QUEUE_SIZE);
                if registers.status & !before & DRIVER_OK != 0 {
                    self.activate(&registers);
                }
            }
        }
    }

    fn activate(&self, registers: &Registers) {
        let queues = registers.queues.iter().map(|queue| queue.state(D::QUEUE_SIZE));
        self.device.activate(&queues.collect::<Vec<_>>());
    }

    fn reset(&self) {
        // Held, so that no other vCPU makes it ready before this is done.
        let mut registers = self.registers();
        self.device.reset();
        *registers = Registers::new(self.device.queues(), D::QUEUE_SIZE);
        self.interrupt.status.store(0, Release);
        self.interrupt.needs_reset.store(false, Release);
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The half of 64 feature bits that is selected; there are no others.
fn half(features: u64, select: u32) -> u32 {
    shift(select).map_or(0, |shift| (features >> shift) as u32)
}

fn shift(select: u32) -> Option<u32> {
    (select < 2).then_some(select * 32)
}
