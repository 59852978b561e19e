//! Whose a VM is, on disk: what each side of a migration has reached, by the session's token. It decides nothing by itself, because
//! a process that is gone does not run a VM. It is for who has to decide, after one of them is gone.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::json;

/// A file that always says one thing, whole.
#[derive(Debug)]
pub(super) struct Record {
    path: Option<PathBuf>,
    token: String,
    side: &'static str,
}

impl Record {
    /// At `path`, if it is to be written.
    pub(super) fn new(path: Option<PathBuf>, token: String, side: &'static str) -> Self {
        Self { path, token, side }
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        self.path.as_deref().unwrap_or(Path::new(""))
    }

    /// Writes `phase` in place of what was there. It survives the end of this process at once; that of the host soon, which ends
    /// both this process and the VM anyway.
    pub(super) fn write(&self, phase: &str) -> io::Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let text =
            json!({ "token": self.token, "side": self.side, "phase": phase, "pid": std::process::id() });
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        fs::write(&new, format!("{text}\n"))?;
        fs::rename(&new, path)
    }

    /// Takes it away: there is nothing to be decided any more.
    pub(super) fn remove(&self) {
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }
}
