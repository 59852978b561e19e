//! One file of an image: all of its pages, or those that are not its base's.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, SeekFrom, fstat};
use rustix::io::{Errno, ReadWriteFlags};

use crate::checksums::{Block, ChecksumTable};
use crate::image::{OpenError, ReadError, Wait, checksum};
use crate::image_footer::{FOOTER_SIZE, Footer, FooterError, TAIL_SIZE};
use crate::own_pages::OwnPages;
use crate::units::{PAGE_SIZE, PageIndex, PageRange};

/// A file that holds pages, and knows which.
#[derive(Debug)]
pub struct Layer {
    pub(crate) file: File,
    path: PathBuf,
    footer: Footer,
    metadata: Vec<u8>,
    checksums: ChecksumTable,
    base: Option<LaidOver>,
    /// The file lives in memory (tmpfs): a read never waits, and RWF_NOWAIT may be unknown to it.
    in_memory: bool,
}

/// What a layer that has a base knows of it.
#[derive(Debug)]
struct LaidOver {
    /// The pages that are not the base's.
    own: OwnPages,
    /// Where the base is.
    path: PathBuf,
}

impl Layer {
    /// Opens a file and checks what can be checked without reading its RAM.
    pub(crate) fn open(path: &Path) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io {
            path: path.to_path_buf(),
            source,
        };
        let corrupt = |what: String| OpenError::Corrupt {
            path: path.to_path_buf(),
            what,
        };
        // Without waiting: a pipe that nobody writes to would be waited for.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        // Reading is not to dirty the file's inode; who does not own the file may not ask for that.
        let file = match rustix::fs::open(path, flags | OFlags::NOATIME, Mode::empty()) {
            Err(Errno::PERM) => rustix::fs::open(path, flags, Mode::empty()),
            other => other,
        };
        let file = File::from(file.map_err(|errno| io(errno.into()))?);
        let stat = file.metadata().map_err(io)?;
        if stat.is_dir() {
            return Err(io(io::ErrorKind::IsADirectory.into()));
        }
        let footer = read_footer(&file, stat.len())
            .map_err(io)?
            .map_err(|error| match error {
                FooterError::NoMagic => OpenError::NotAnImage {
                    path: path.to_path_buf(),
                },
                FooterError::Version(version) => OpenError::Version {
                    path: path.to_path_buf(),
                    version,
                },
                FooterError::Damaged(what) => corrupt(what),
            })?;
        if footer.file_size() != stat.len() {
            return Err(corrupt(format!(
                "it has {} bytes where its footer says {}",
                stat.len(),
                footer.file_size()
            )));
        }
        let part = |from: u64, length: u64, expected: u64, what: &str| {
            let mut bytes = vec![0; length as usize];
            file.read_exact_at(&mut bytes, from).map_err(io)?;
            if xxhash_rust::xxh3::xxh3_64(&bytes) == expected {
                Ok(bytes)
            } else {
                Err(corrupt(format!("its {what} does not match its checksum")))
            }
        };
        let metadata = part(
            footer.metadata_offset(),
            footer.metadata_length,
            footer.metadata_checksum,
            "metadata",
        )?;
        let blocks = part(
            footer.blocks_offset(),
            footer.metadata_offset() - footer.blocks_offset(),
            footer.blocks_checksum,
            "list of block checksums",
        )?;
        let base = match &footer.base {
            None => None,
            Some(base) => {
                let own = part(
                    footer.own_offset(),
                    footer.own_length(),
                    base.own_checksum,
                    "map of own pages",
                )?;
                let own = OwnPages::from_bytes(&own);
                if own.count() != base.own_pages || !own.is_within(footer.pages()) {
                    return Err(corrupt("its footer contradicts its map of own pages".into()));
                }
                let base_path = part(
                    footer.path_offset(),
                    base.path_length,
                    base.path_checksum,
                    "base's path",
                )?;
                // From where the file is, wherever a symbolic link to it may be.
                let here = std::fs::canonicalize(path).map_err(io)?;
                let path = here.with_file_name("").join(OsStr::from_bytes(&base_path));
                Some(LaidOver { own, path })
            }
        };
        let in_memory = rustix::fs::fstatfs(&file).is_ok_and(|fs| IN_MEMORY.contains(&(fs.f_type as u64)));
        let checksums = ChecksumTable::new(footer.table_offset(), footer.checksums(), &blocks);
        Ok(Self {
            file,
            path: path.to_path_buf(),
            footer,
            metadata,
            checksums,
            base,
            in_memory,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the footer says.
    pub fn footer(&self) -> &Footer {
        &self.footer
    }

    /// The metadata.
    pub fn metadata(&self) -> &[u8] {
        &self.metadata
    }

    /// Where its base is, and which that is. `None`: it has none.
    pub fn base(&self) -> Option<(&Path, &[u8; 32])> {
        let base = self.base.as_ref()?;
        let fields = self.footer.base.as_ref()?;
        Some((&base.path, &fields.digest))
    }

    /// Whether both are the same file.
    pub(crate) fn is_same_file(&self, other: &Self) -> bool {
        match (fstat(&self.file), fstat(&other.file)) {
            (Ok(one), Ok(two)) => (one.st_dev, one.st_ino) == (two.st_dev, two.st_ino),
            _ => false,
        }
    }

    /// How many pages of RAM there are, the base's included.
    pub(crate) fn pages(&self) -> u64 {
        self.footer.pages()
    }

    /// Whether the first of `pages` is in this file, and how many of them in a row are like it.
    pub(crate) fn run(&self, pages: PageRange) -> (bool, u64) {
        match &self.base {
            None => (true, pages.count),
            Some(base) => base.own.run(pages),
        }
    }

    /// The set of own pages as it is stored; empty without a base.
    pub(crate) fn own_pages(&self) -> Vec<u8> {
        self.base
            .as_ref()
            .map_or_else(Vec::new, |base| base.own.to_bytes())
    }

    /// The next run of pages, at or after `from`, that may hold something here; what is before it is a hole.
    pub(crate) fn next_data(&self, from: PageIndex) -> Result<Option<PageRange>, ReadError> {
        let end = PageIndex(self.pages());
        if from >= end {
            return Ok(None);
        }
        let seek = |whence, page| {
            rustix::fs::seek(&self.file, whence).map_err(|errno| ReadError::Io {
                page,
                path: self.path.clone(),
                source: errno.into(),
            })
        };
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(from.byte_offset())) {
            Ok(offset) => PageIndex::containing(offset).max(from),
            // Only holes from here on, the kernel says. But behind RAM there is always the footer.
            Err(Errno::NXIO) => {
                return Err(ReadError::Truncated {
                    page: from,
                    path: self.path.clone(),
                });
            }
            Err(_) => seek(SeekFrom::Data(from.byte_offset()), from).map(PageIndex::containing)?,
        };
        if start >= end {
            return Ok(None);
        }
        let hole = seek(SeekFrom::Hole(start.byte_offset()), start)?;
        let stop = PageIndex(hole.div_ceil(PAGE_SIZE as u64)).min(end);
        Ok(Some(PageRange::new(start, stop.0 - start.0)))
    }

    /// The checksums of `pages`, all of which are in this file. `None`: it would have to wait.
    pub(crate) fn checksums(
        &self,
        pages: PageRange,
        wait: Wait,
        into: &mut [u64],
    ) -> Result<Option<()>, ReadError> {
        let first = match &self.base {
            None => pages.start.0,
            Some(base) => base.own.rank(pages.start),
        };
        // The table knows pages by their number among those that are here.
        let page = |entry: PageIndex| pages.start.advance(entry.0 - first);
        let read = |offset, block: &mut [u8], entry| self.read_at(offset, block, page(entry), wait);
        let damaged = |entry| self.corrupt(page(entry));
        let entries = PageRange::new(PageIndex(first), pages.count);
        self.checksums.get(entries, into, read, damaged)
    }

    /// All checksums of a block of the table, read from the file and checked, also where they are known to be zero. An error
    /// names `page`.
    pub(crate) fn reread_checksums(&self, block: u64, page: PageIndex) -> Result<Block, ReadError> {
        let damaged = || self.corrupt(page);
        let read = |offset, bytes: &mut [u8]| self.read_at(offset, bytes, page, Wait::Yes);
        self.checksums
            .read_block(block, read, damaged)?
            .ok_or_else(damaged)
    }

    /// Reads `pages` into `buffer` and checks nothing. `None`: it would have to wait.
    pub(crate) fn read(
        &self,
        pages: PageRange,
        wait: Wait,
        buffer: &mut [u8],
    ) -> Result<Option<()>, ReadError> {
        self.read_at(
            pages.start.byte_offset(),
            &mut buffer[..pages.bytes()],
            pages.start,
            wait,
        )
    }

    /// Whether `content` is what belongs to `page`, whose checksum is `expected`.
    pub(crate) fn check(&self, page: PageIndex, content: &[u8], expected: u64) -> Result<(), ReadError> {
        if checksum(content) == expected {
            Ok(())
        } else {
            Err(self.corrupt(page))
        }
    }

    fn corrupt(&self, page: PageIndex) -> ReadError {
        ReadError::Corrupt {
            page,
            path: self.path.clone(),
        }
    }

    /// Fills `buffer` from `offset`, for the sake of `page`.
    fn read_at(
        &self,
        offset: u64,
        buffer: &mut [u8],
        page: PageIndex,
        wait: Wait,
    ) -> Result<Option<()>, ReadError> {
        let flags = match wait {
            Wait::No if !self.in_memory => ReadWriteFlags::NOWAIT,
            _ => ReadWriteFlags::empty(),
        };
        let mut done = 0;
        while done < buffer.len() {
            let rest = io::IoSliceMut::new(&mut buffer[done..]);
            match rustix::io::preadv2(self.file.as_fd(), &mut [rest], offset + done as u64, flags) {
                // Without waiting an empty answer may also mean "not here"; whoever may wait finds out.
                Ok(0) | Err(Errno::AGAIN | Errno::OPNOTSUPP) if wait == Wait::No => return Ok(None),
                Ok(0) => {
                    return Err(ReadError::Truncated {
                        page,
                        path: self.path.clone(),
                    });
                }
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(errno) => {
                    return Err(ReadError::Io {
                        page,
                        path: self.path.clone(),
                        source: errno.into(),
                    });
                }
            }
        }
        Ok(Some(()))
    }

    /// Whether the file's end still is what it was, `size` bytes from its start.
    pub(crate) fn footer_is_there(&self, size: u64) -> bool {
        matches!(read_footer(&self.file, size), Ok(Ok(footer)) if footer == self.footer)
    }
}

/// The footer of a file that is `size` bytes long.
fn read_footer(file: &File, size: u64) -> io::Result<Result<Footer, FooterError>> {
    if size < FOOTER_SIZE as u64 {
        return Ok(Err(FooterError::NoMagic));
    }
    let mut tail = [0; TAIL_SIZE];
    let tail = &mut tail[..size.min(TAIL_SIZE as u64) as usize];
    file.read_exact_at(tail, size - tail.len() as u64)?;
    Ok(Footer::decode(tail))
}

/// f_type of tmpfs and ramfs, as in statfs(2).
const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];
