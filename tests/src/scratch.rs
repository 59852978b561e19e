//! A directory of one test, and the images in it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::program::Program;

/// Bytes in a page.
pub const PAGE_SIZE: u64 = 4096;

/// A directory that is gone when the test is.
#[derive(Debug)]
pub struct Scratch {
    directory: tempfile::TempDir,
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Scratch {
    /// A new one.
    pub fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("umem-test-").tempdir().unwrap();
        Self { directory }
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory().join(name)
    }

    /// The names of all that is in it, hidden files too, in order.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.directory())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort_unstable();
        names
    }

    /// A file with this content.
    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// `umem image create` of an image of this name and size, to which more arguments may be added.
    pub fn create(&self, name: &str, memory: &str) -> Program {
        Program::umem(["image", "create", "--memory", memory, "-o"]).arg(self.path(name))
    }

    /// An image whose guest is told `command_line`, without fill.
    pub fn image(&self, memory: &str, command_line: &str) -> PathBuf {
        self.make("image", memory, &["--cmdline", command_line])
    }

    /// An image in which every page that the guest does not use itself has its fingerprint, and whose guest verifies them.
    /// `options` are of the workload.
    pub fn fingerprinted(&self, memory: &str, seed: u64, options: &str) -> PathBuf {
        let fill = format!("pattern:{seed}");
        let command_line = format!("workload=verify pages=all seed={seed} {options}");
        self.make(
            "image",
            memory,
            &["--fill", &fill, "--cmdline", command_line.trim_end()],
        )
    }

    fn make(&self, name: &str, memory: &str, options: &[&str]) -> PathBuf {
        let created = self.create(name, memory).args(options).run();
        created.assert_code(0);
        assert_eq!(created.stderr, "", "nothing is said where there is no terminal");
        self.path(name)
    }
}

/// Changes one bit.
pub fn flip_bit(path: &Path, byte: u64, bit: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut content = [0];
    file.read_exact_at(&mut content, byte).unwrap();
    file.write_all_at(&[content[0] ^ 1 << bit], byte).unwrap();
}

/// Makes a file this long.
pub fn truncate(path: &Path, length: u64) {
    File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_len(length)
        .unwrap();
}
