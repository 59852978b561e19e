//! Whose a VM is, on disk: what each side of a migration has reached, by the session's token. It decides nothing by itself, because
//! a process that is gone does not run a VM. It is for who has to decide, after one of them is gone.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde_json::json;

/// What is written is filled up with spaces to this length, so that each text takes the place of the one before in one write: a guest
/// stands still meanwhile, and to replace a file takes some file systems a hundred times as long.
const LENGTH: usize = 256;

/// A file that always says one thing, whole.
#[derive(Debug)]
pub(super) struct Record {
    path: Option<PathBuf>,
    token: String,
    side: &'static str,
    /// Once it is there.
    file: Mutex<Option<File>>,
}

impl Record {
    /// At `path`, if it is to be written.
    pub(super) fn new(path: Option<PathBuf>, token: String, side: &'static str) -> Self {
        Self {
            path,
            token,
            side,
            file: Mutex::new(None),
        }
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
        let line = format!("{:<width$}\n", text.to_string(), width = LENGTH - 1);
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = &*file {
            return file.write_all_at(line.as_bytes(), 0);
        }
        // The one of a session before is replaced when there is a whole new one.
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        let created = File::create(&new)?;
        created.write_all_at(line.as_bytes(), 0)?;
        fs::rename(&new, path)?;
        *file = Some(created);
        Ok(())
    }

    /// Takes it away: there is nothing to be decided any more. What another session has put in its place stays.
    pub(super) fn remove(&self) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let (Some(path), Some(file)) = (&self.path, file.take()) else {
            return;
        };
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let own = file.metadata().map(identity).ok();
        if own.is_some() && own == fs::metadata(path).map(identity).ok() {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_one_thing_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record");
        fs::write(&path, "of another session\n".repeat(100)).unwrap();
        let record = Record::new(Some(path.clone()), "0123".repeat(8), "destination");
        for phase in ["arriving", "loaded", "running", "x"] {
            record.write(phase).unwrap();
            let text = fs::read_to_string(&path).unwrap();
            assert_eq!(text.len(), LENGTH);
            let said: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(said["phase"], phase);
        }
        let next = Record::new(Some(path.clone()), "4567".repeat(8), "source");
        next.write("sending").unwrap();
        record.remove();
        assert!(path.exists(), "it is another session's");
        next.remove();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
