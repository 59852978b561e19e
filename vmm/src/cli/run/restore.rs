//! `umem run --snapshot`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{CpuOptions, Guest, OpenImage, RunOptions, open_image};
use crate::boot::LayoutError;
use crate::cli::error::CommandError;
use crate::cli::memory::MemoryOptions;
use crate::cli::options::{OptionError, SourceUrl};
use crate::kvm::AsyncPageFaults;
use crate::machine::Start;
use crate::snapshot::{FILE_NAME, SnapshotState};

/// The VM in the snapshot at `location`. The snapshot is the source of RAM, for which all of `--memory` holds but `source=`.
pub(super) fn configure(
    options: &RunOptions,
    memory: &mut MemoryOptions,
    cpus: &CpuOptions,
    location: &str,
) -> Result<Guest, CommandError> {
    for (given, option) in [
        (options.kernel.is_some(), "--kernel"),
        (options.initramfs.is_some(), "--initramfs"),
        (options.cmdline.is_some(), "--cmdline"),
        (options.firmware.is_some(), "--firmware"),
        (options.balloon.is_some(), "--balloon"),
        (!memory.sources.is_empty(), "--memory source="),
    ] {
        if given {
            return Err(CommandError::Usage(format!(
                "{option} and --snapshot exclude each other: a snapshot has all that in it"
            )));
        }
    }
    memory.sources = vec![source(location)?];
    let image = open_image(memory)?;
    // It is only missing for `zero:`.
    let image = image.ok_or_else(|| CommandError::Usage("--snapshot zero: there is nothing in it".into()))?;
    image.check_size(memory)?;
    let OpenImage {
        name,
        source,
        size,
        metadata,
    } = image;
    let saved = SnapshotState::decode(&metadata, size)
        .map_err(|source| CommandError::Snapshot { path: name, source })?;
    if let Some(count) = cpus.count
        && count != saved.cpus()
    {
        return Err(CommandError::Usage(format!(
            "--cpus boot={count} is not what the snapshot has, which is {}: leave it away",
            saved.cpus()
        )));
    }
    let async_pf = async_page_faults(cpus, &saved)?;
    Ok(Guest {
        source,
        ram: saved.ram().map_err(LayoutError::RamSize)?,
        cpus: saved.cpus(),
        async_pf,
        start: Start::Restore(Arc::new(saved)),
    })
}

/// A directory, a file, or a URL of a server or pager.
fn source(location: &str) -> Result<SourceUrl, CommandError> {
    let scheme = location.split_once(':').map(|(scheme, _)| scheme);
    if matches!(scheme, Some("file" | "unix" | "tcp" | "attach")) {
        return location.parse().map_err(|reason| CommandError::Option {
            option: "--snapshot",
            source: OptionError::Value {
                key: "snapshot",
                value: location.to_owned(),
                reason,
            },
        });
    }
    let path = Path::new(location);
    let file = if path.is_dir() {
        path.join(FILE_NAME)
    } else {
        PathBuf::from(path)
    };
    Ok(SourceUrl::File(file))
}

/// The guest has been told whether there are any.
fn async_page_faults(cpus: &CpuOptions, saved: &SnapshotState) -> Result<AsyncPageFaults, CommandError> {
    let has = saved.async_pf();
    match cpus.async_pf {
        Some(AsyncPageFaults::Off) if has => Err("off"),
        Some(AsyncPageFaults::Required) if !has => Err("on"),
        Some(asked) => Ok(asked),
        None if has => Ok(AsyncPageFaults::IfThere),
        None => Ok(AsyncPageFaults::Off),
    }
    .map_err(|word| {
        CommandError::Usage(format!(
            "--cpus async_pf={word} is not what the guest in the snapshot was told: leave it away"
        ))
    })
}
