//! Which descriptors are a device's.

use std::collections::HashMap;
use std::ffi::c_int;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

use crate::device::Device;

/// Descriptors above are not asked for: a program has fewer.
const DESCRIPTORS: usize = 1 << 16;

/// So that for all other descriptors it takes one look.
static IS_DEVICE: [AtomicBool; DESCRIPTORS] = [const { AtomicBool::new(false) }; DESCRIPTORS];

static DEVICES: LazyLock<RwLock<HashMap<c_int, Arc<dyn Device>>>> = LazyLock::new(RwLock::default);

fn flag(fd: c_int) -> Option<&'static AtomicBool> {
    IS_DEVICE.get(usize::try_from(fd).ok()?)
}

/// The device behind a descriptor, if it is one.
pub(crate) fn get(fd: c_int) -> Option<Arc<dyn Device>> {
    if !flag(fd)?.load(Acquire) {
        return None;
    }
    let devices = DEVICES.read().unwrap_or_else(PoisonError::into_inner);
    devices.get(&fd).cloned()
}

/// A descriptor is one for a device, or (`None`) no longer. `false`: its number is too high.
pub(crate) fn set(fd: c_int, device: Option<Arc<dyn Device>>) -> bool {
    let Some(flag) = flag(fd) else {
        return device.is_none();
    };
    if device.is_none() && !flag.load(Acquire) {
        return true;
    }
    let is_device = device.is_some();
    let before = {
        let mut devices = DEVICES.write().unwrap_or_else(PoisonError::into_inner);
        match device {
            Some(device) => devices.insert(fd, device),
            None => devices.remove(&fd),
        }
    };
    flag.store(is_device, Release);
    // Without the lock, because closing a device frees memory.
    drop(before);
    true
}
