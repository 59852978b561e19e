//! Files that are either whole or not there: written without a name, given one when they are complete.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

/// A file without a name. A process that dies leaves nothing of it behind.
#[derive(Debug)]
pub struct UnnamedFile {
    file: File,
    target: PathBuf,
}

/// What to do about a file that has the name already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Keep it and fail with [`io::ErrorKind::AlreadyExists`].
    Keep,
    /// Replace it.
    Replace,
}

impl UnnamedFile {
    /// A file that is going to be `target`, on the same file system.
    ///
    /// Fails where `target` is there and is no file: nothing else is ever replaced.
    pub fn create(target: &Path) -> io::Result<Self> {
        if let Ok(metadata) = target.symlink_metadata()
            && !metadata.is_file()
            && !metadata.is_symlink()
        {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "it exists and is no regular file",
            ));
        }
        let directory = directory_of(target);
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = rustix::fs::open(directory, flags, Mode::from_raw_mode(0o644))?;
        Ok(Self {
            file: file.into(),
            target: target.to_path_buf(),
        })
    }

    /// The file, to write to.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Gives the file its name in one step, in place of a file that has it already, and sees to it that file and name are there
    /// after a crash of the machine too.
    ///
    /// Whoever is killed on the way leaves the old file or the new one, each whole. For the length of two system calls the new
    /// one has a name of its own, with `.new` at the end; who is killed there leaves it, and the next one to come here, or to
    /// [`Self::remove_left_behind`], removes it.
    pub fn replace_durably(self) -> io::Result<()> {
        self.file.sync_all()?;
        Self::remove_left_behind(&self.target)?;
        let temporary = second_name(&self.target);
        self.link_to(&temporary)?;
        if let Err(error) = std::fs::rename(&temporary, &self.target) {
            let _ = std::fs::remove_file(&temporary);
            return Err(error);
        }
        File::open(directory_of(&self.target))?.sync_all()
    }

    /// Removes what somebody has left who was killed when a file was to take the place of `target` ([`Self::replace_durably`]): the
    /// room that it takes may be what the next file lacks.
    pub fn remove_left_behind(target: &Path) -> io::Result<()> {
        remove_if_there(&second_name(target))
    }

    /// Gives the file its name.
    pub fn publish(self, existing: Existing) -> io::Result<()> {
        if existing == Existing::Replace {
            // A link cannot replace a name, so the old file goes first. Whoever is killed in between has neither, which is
            // still no half-written file.
            remove_if_there(&self.target)?;
        }
        self.link_to(&self.target)
    }

    fn link_to(&self, name: &Path) -> io::Result<()> {
        let descriptor = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        match rustix::fs::linkat(CWD, descriptor, CWD, name, AtFlags::SYMLINK_FOLLOW) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => Err(io::ErrorKind::AlreadyExists.into()),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// The name of a file that is whole and about to take the place of `target` ([`UnnamedFile::replace_durably`]).
pub fn second_name(target: &Path) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn the_name_is_there_only_after_publishing() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("a");
        let unnamed = UnnamedFile::create(&target).unwrap();
        unnamed.file().write_all(b"new").unwrap();
        assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 0);
        unnamed.publish(Existing::Keep).unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"new");
    }

    #[test]
    fn what_is_no_file_is_never_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&target).unwrap();
        assert!(UnnamedFile::create(&target).is_err());
        assert!(UnnamedFile::create(directory.path()).is_err());
        assert!(target.exists());
    }

    #[test]
    fn an_existing_file_is_kept_or_replaced_as_asked() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("a");
        std::fs::write(&target, b"old").unwrap();
        let error = UnnamedFile::create(&target)
            .unwrap()
            .publish(Existing::Keep)
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&target).unwrap(), b"old");
        UnnamedFile::create(&target)
            .unwrap()
            .publish(Existing::Replace)
            .unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"");
    }

    #[test]
    fn one_file_takes_the_place_of_another() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("a");
        for content in ["first", "second"] {
            // Left by somebody who was killed.
            std::fs::write(directory.path().join("a.new"), b"half").unwrap();
            let unnamed = UnnamedFile::create(&target).unwrap();
            unnamed.file().write_all(content.as_bytes()).unwrap();
            unnamed.replace_durably().unwrap();
            assert_eq!(std::fs::read_to_string(&target).unwrap(), content);
            assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 1);
        }
    }
}
