//! How long a VM takes to its first instruction, against KVM alone.

use std::path::Path;
use std::process::{Command, Stdio};

use serde::Serialize;
use serde_json::Value;

use super::{Bench, CommandError};
use crate::slot_setup::{self, SlotSetup};

/// RAM sizes in GiB; the image is sparse.
const SIZES: [u64; 2] = [1, 16];

/// How many measurements [`measure`] announces at most.
pub(super) const STEPS: u64 = SIZES.len() as u64;

/// What was measured of one size of RAM.
#[derive(Serialize)]
pub(super) struct Start {
    pub(super) what: String,
    pub(super) floor_ms: f64,
    pub(super) umem_ms: f64,
    pub(super) ratio: f64,
    /// Resident memory that is not the guest's.
    pub(super) own_memory_kib: f64,
}

/// Nothing where there is no KVM.
pub(super) fn measure(bench: &Bench) -> Result<Vec<Start>, CommandError> {
    let mut starts = Vec::new();
    for gib in SIZES {
        bench.step("the start of a VM");
        if slot_setup::measure(1 << 20).is_err() {
            continue;
        }
        let size = format!("{gib}G");
        let image = bench.directory.path().join(&size);
        umem(&["image", "create", "--memory", &size, "-o", &text(&image)])?;
        let (mut floors, mut umems, mut owns) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..bench.slices {
            if let Ok(SlotSetup { vm, slots }) = slot_setup::measure(gib << 30) {
                floors.push((vm + slots).as_secs_f64() * 1e3);
            }
            let report = bench.directory.path().join("report.json");
            let source = format!("source=file:{}", image.display());
            umem(&["run", "--memory", &source, "--report", &text(&report)])?;
            let report = std::fs::read(&report).map_err(CommandError::Scratch)?;
            let report: Value = serde_json::from_slice(&report)
                .map_err(|error| CommandError::Scratch(std::io::Error::from(error)))?;
            umems.extend(report["time_to_first_instruction_ms"].as_f64());
            owns.extend(report["process"]["own_memory_kib"].as_f64());
        }
        let (floor_ms, umem_ms) = (median(floors), median(umems));
        starts.push(Start {
            what: format!("{size} of RAM from an image (floor: VM and slots)"),
            floor_ms,
            umem_ms,
            ratio: umem_ms / floor_ms,
            own_memory_kib: median(owns),
        });
    }
    Ok(starts)
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// This program, in a process of its own.
fn umem(args: &[&str]) -> Result<(), CommandError> {
    let program = std::env::current_exe().map_err(CommandError::Scratch)?;
    let status = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .map_err(CommandError::Scratch)?;
    if status.success() {
        Ok(())
    } else {
        let what = format!("umem {} ended with {status}", args.join(" "));
        Err(CommandError::Scratch(std::io::Error::other(what)))
    }
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(f64::NAN)
}
