//! A VM in a file: a RAM image like any other, in whose metadata is the state of everything that is not RAM.
//!
//! One file is all of it, so it is whole or not there, one page server serves it, and whoever has its digest has all of it named.
//! The image's checksums cover the metadata as they cover each page.
//!
//! **Which version reads which**: this program reads the version that it writes, and the one before. What a version means never
//! changes, so a field that is missing, or one too many, is damage.

mod incremental;
mod save;

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use umem::image::MAX_METADATA;
use vm_memory::GuestAddress;

use crate::address_map::{PAGE_SIZE, ROM_SIZE_MAX, RamMap, RamSizeError, may_be_read_only};
use crate::boot::{ReadOnlyPages, RomError};
use crate::devices::DeviceState;
use crate::kvm::{Blob, ChipsetState, CpuMismatch, CpuModel, VcpuState};

pub use self::incremental::BaseError;
pub(crate) use self::save::{Beside, Complete, Draft, Memory};
pub use self::save::{SnapshotError, SnapshotOptions, SnapshotProgress, SnapshotSummary, Then};

/// The newest version: of a machine that has a balloon. One that has none is written as the version before, which has none either.
pub const VERSION: u32 = 2;
/// What a machine without a balloon is written as.
const WITHOUT_BALLOON: u32 = 1;
/// The oldest version that is read.
const OLDEST: u32 = 1;

/// The file in a snapshot's directory.
pub const FILE_NAME: &str = "snapshot.img";

/// The most pieces of read-only memory: there are two.
const READ_ONLY_MAX: usize = 16;

/// Why a file holds no snapshot that can be restored.
#[derive(Debug, Error)]
pub enum StateError {
    /// It is an image of a VM that never ran.
    #[error("it is an image to be booted and no snapshot: use --memory source=")]
    NotASnapshot,
    /// It was written by another version of this program.
    #[error(
        "it is a snapshot of version {0}, and this program reads {OLDEST} to {VERSION}: restore it with the program that made it"
    )]
    Version(u32),
    /// It is not what a version of that number has.
    #[error("its state makes no sense")]
    Json(#[from] serde_json::Error),
    /// It contradicts itself.
    #[error("its state contradicts itself: {0}")]
    Contradiction(String),
    /// The state is larger than any reader takes.
    #[error("the state of {vcpus} vCPUs is {size} bytes, more than the {MAX_METADATA} that an image takes")]
    TooLarge {
        /// How many vCPUs.
        vcpus: usize,
        /// How large.
        size: usize,
    },
}

/// All of a VM but its RAM.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotState {
    /// [`VERSION`] or the one before.
    version: u32,
    /// Seconds since 1970.
    created: u64,
    /// Bytes of RAM; where it lies follows from that ([`RamMap`]).
    ram_size: u64,
    /// Bytes in a page.
    page_size: u64,
    /// How many vCPUs.
    cpus: u32,
    /// Whether the guest was told of asynchronous page faults.
    async_pf: bool,
    /// The CPU that it has found.
    cpu: CpuModel,
    vcpus: Vec<VcpuState>,
    chipset: ChipsetState,
    devices: DeviceState,
    /// What the guest reads outside RAM: the firmware and the tables that describe the machine.
    read_only: Vec<SavedPages>,
}

/// Pages that are only read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedPages {
    address: u64,
    size: u64,
    content: Blob,
}

/// The metadata of an image that is a snapshot.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata<T> {
    snapshot: T,
}

/// Looks into metadata of any kind and version.
#[derive(Deserialize)]
struct Probe {
    snapshot: Option<ProbedVersion>,
}

#[derive(Deserialize)]
struct ProbedVersion {
    version: u32,
}

/// Whether an image is a snapshot, of whatever version.
pub fn is_snapshot(metadata: &[u8]) -> bool {
    serde_json::from_slice::<Probe>(metadata).is_ok_and(|probe| probe.snapshot.is_some())
}

/// What is wrong with pieces of read-only memory, if anything is.
pub(crate) fn check_read_only(pieces: &[SavedPages]) -> Result<(), String> {
    if pieces.len() > READ_ONLY_MAX {
        return Err(format!("it has {} pieces of read-only memory", pieces.len()));
    }
    for (index, pages) in pieces.iter().enumerate() {
        pages.check()?;
        if pieces[..index].iter().any(|other| other.overlaps(pages)) {
            return Err("its read-only pages overlap".into());
        }
    }
    Ok(())
}

/// Whether a state of this version is understood.
pub(crate) fn check_version(version: u32) -> Result<(), StateError> {
    if (OLDEST..=VERSION).contains(&version) {
        Ok(())
    } else {
        Err(StateError::Version(version))
    }
}

/// What a VM's state is put together from.
pub(crate) struct Saved<'a> {
    pub(crate) ram: RamMap,
    pub(crate) cpu: CpuModel,
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) chipset: ChipsetState,
    pub(crate) devices: DeviceState,
    pub(crate) read_only: &'a [ReadOnlyPages],
}

impl SnapshotState {
    pub(crate) fn new(saved: Saved<'_>) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            version: match saved.devices.balloon {
                Some(_) => VERSION,
                None => WITHOUT_BALLOON,
            },
            created: now.map_or(0, |now| now.as_secs()),
            ram_size: saved.ram.size(),
            page_size: PAGE_SIZE,
            cpus: saved.vcpus.len() as u32,
            async_pf: saved.cpu.has_async_page_faults(),
            cpu: saved.cpu,
            vcpus: saved.vcpus,
            chipset: saved.chipset,
            devices: saved.devices,
            read_only: saved.read_only.iter().map(SavedPages::save).collect(),
        }
    }

    /// As an image's metadata.
    pub fn encode(&self) -> Result<Vec<u8>, StateError> {
        let metadata = serde_json::to_vec(&Metadata { snapshot: self })?;
        if metadata.len() > MAX_METADATA {
            return Err(StateError::TooLarge {
                vcpus: self.vcpus.len(),
                size: metadata.len(),
            });
        }
        Ok(metadata)
    }

    /// Reads an image's metadata, of an image with `ram_size` bytes of RAM.
    pub fn decode(metadata: &[u8], ram_size: u64) -> Result<Self, StateError> {
        let probe: Probe = serde_json::from_slice(metadata)?;
        let ProbedVersion { version } = probe.snapshot.ok_or(StateError::NotASnapshot)?;
        check_version(version)?;
        let Metadata { snapshot } = serde_json::from_slice::<Metadata<Self>>(metadata)?;
        snapshot.check(ram_size).map_err(StateError::Contradiction)?;
        Ok(snapshot)
    }

    /// What contradicts itself, if anything does.
    fn check(&self, ram_size: u64) -> Result<(), String> {
        if self.ram_size != ram_size {
            return Err(format!(
                "it is for {} bytes of RAM, and the image has {ram_size}",
                self.ram_size
            ));
        }
        RamMap::new(ram_size).map_err(|error| error.to_string())?;
        if self.page_size != PAGE_SIZE {
            return Err(format!("its pages are of {} bytes", self.page_size));
        }
        if self.cpus == 0 || self.vcpus.len() != self.cpus as usize {
            return Err(format!(
                "it has {} vCPUs and the state of {}",
                self.cpus,
                self.vcpus.len()
            ));
        }
        if self.async_pf != self.cpu.has_async_page_faults() {
            return Err("its CPUID says something else of asynchronous page faults".into());
        }
        if self.devices.balloon.is_some() != (self.version > WITHOUT_BALLOON) {
            return Err(format!(
                "a snapshot of version {} has {} balloon",
                self.version,
                if self.devices.balloon.is_some() { "no" } else { "a" }
            ));
        }
        if self
            .devices
            .balloon
            .as_ref()
            .is_some_and(|balloon| !balloon.is_possible())
        {
            return Err("its balloon has queues that there cannot be".into());
        }
        if !self.devices.serial.is_possible() {
            return Err("its serial port holds more than fits".into());
        }
        check_read_only(&self.read_only)
    }

    /// Whether it can be restored on this host, whose CPU is `here`; else why not.
    pub fn check_cpu(&self, here: &CpuModel) -> Result<(), CpuMismatch> {
        self.cpu.check_on(here)
    }

    /// The version that it was written in.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// How many vCPUs.
    pub fn cpus(&self) -> u32 {
        self.cpus
    }

    /// Where RAM lies.
    pub fn ram(&self) -> Result<RamMap, RamSizeError> {
        RamMap::new(self.ram_size)
    }

    /// Seconds since 1970 when it was made.
    pub fn created(&self) -> u64 {
        self.created
    }

    /// Whether the guest was told of asynchronous page faults.
    pub fn async_pf(&self) -> bool {
        self.async_pf
    }

    /// The CPU that the guest has found.
    pub fn cpu(&self) -> &CpuModel {
        &self.cpu
    }

    /// How long ago it was saved, by the hosts' clocks.
    pub fn age(&self) -> std::time::Duration {
        self.chipset.age()
    }

    /// Each vCPU's state.
    pub fn vcpus(&self) -> &[VcpuState] {
        &self.vcpus
    }

    /// The state of interrupt controllers, timer and clock.
    pub fn chipset(&self) -> &ChipsetState {
        &self.chipset
    }

    /// The devices' state.
    pub fn devices(&self) -> &DeviceState {
        &self.devices
    }

    /// What the guest reads outside RAM.
    pub fn read_only_pages(&self) -> Result<Vec<ReadOnlyPages>, RomError> {
        self.read_only.iter().map(SavedPages::restore).collect()
    }
}

impl SavedPages {
    pub(crate) fn save(pages: &ReadOnlyPages) -> Self {
        Self {
            address: pages.guest_address().0,
            size: pages.size(),
            content: Blob::new(pages.content()),
        }
    }

    fn check(&self) -> Result<(), String> {
        let sound = self.size > 0
            && self.size <= ROM_SIZE_MAX
            && self.size.is_multiple_of(PAGE_SIZE)
            && self.address.is_multiple_of(PAGE_SIZE)
            && self.content.used().len() as u64 <= self.size
            && may_be_read_only(self.address, self.size);
        if sound {
            Ok(())
        } else {
            Err(format!(
                "there can be no read-only pages of {} bytes at {:#x}",
                self.size, self.address
            ))
        }
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.address < other.address + other.size && other.address < self.address + self.size
    }

    pub(crate) fn restore(&self) -> Result<ReadOnlyPages, RomError> {
        let mut content = self.content.used().to_vec();
        content.resize(self.size as usize, 0);
        ReadOnlyPages::restored(GuestAddress(self.address), &content)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_image_is_no_snapshot() {
        let image = br#"{"entry":{"protocol":"pvh","entry":1,"argument":2},"command_line":"","kernel":"x"}"#;
        assert!(!is_snapshot(image));
        assert!(matches!(
            SnapshotState::decode(image, 1 << 20),
            Err(StateError::NotASnapshot)
        ));
        assert!(matches!(
            SnapshotState::decode(b"{", 1 << 20),
            Err(StateError::Json(_))
        ));
    }

    #[test]
    fn other_versions_are_named() {
        for version in [0, VERSION + 1, u32::MAX] {
            let metadata = format!(r#"{{"snapshot":{{"version":{version},"of":"another time"}},"and":1}}"#);
            let error = SnapshotState::decode(metadata.as_bytes(), 1 << 20).unwrap_err();
            assert!(
                matches!(error, StateError::Version(named) if named == version),
                "{error}"
            );
            assert!(is_snapshot(metadata.as_bytes()));
        }
    }

    /// Deep nesting and long lists end in an error, not in a stack or a heap.
    #[test]
    fn hostile_metadata_is_refused() {
        let deep = [b"{\"snapshot\":".repeat(50_000), b"1".to_vec()].concat();
        assert!(SnapshotState::decode(&deep, 1 << 20).is_err());
        let deep = [b"[".repeat(500_000)].concat();
        assert!(SnapshotState::decode(&deep, 1 << 20).is_err());
        let long = [
            br#"{"snapshot":{"version":1,"vcpus":["#.to_vec(),
            b"{},".repeat(100_000),
            b"{}]}}".to_vec(),
        ]
        .concat();
        assert!(SnapshotState::decode(&long, 1 << 20).is_err());
    }
}
