//! What perf has to know of KVM's tracepoint: its number, and where its records have the addresses.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

const FORMAT: &str = "events/kvm/kvm_unmap_hva_range/format";

/// Where a system has tracefs, if it has.
const PLACES: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// The tracepoint `kvm_unmap_hva_range`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tracepoint {
    pub(super) id: u64,
    /// Where a record has the first address, in bytes.
    pub(super) start: usize,
    /// And the one after the last.
    pub(super) end: usize,
}

impl Tracepoint {
    /// Looks it up in tracefs, be it mounted or not. The tracepoint is there as long as KVM is.
    pub(super) fn find() -> io::Result<Self> {
        let mut text = String::new();
        File::from(open_format()?).read_to_string(&mut text)?;
        Self::parse(&text).ok_or_else(|| io::Error::other("the tracepoint's format is not one that is known"))
    }

    /// Of the file `format` of an event.
    fn parse(text: &str) -> Option<Self> {
        let id = text.lines().find_map(|line| line.strip_prefix("ID: "))?;
        // "field:unsigned long start;	offset:8;	size:8;	signed:0;"
        let offset = |name: &str| -> Option<usize> {
            let mut words = text
                .lines()
                .find(|line| line.contains(&format!(" {name};")))?
                .split(';')
                .map(str::trim);
            let offset = words
                .find_map(|word| word.strip_prefix("offset:"))?
                .parse()
                .ok()?;
            // An address, that is read as two halves.
            (words.next() == Some("size:8") && offset % 4 == 0).then_some(offset)
        };
        Some(Self {
            id: id.trim().parse().ok()?,
            start: offset("start")?,
            end: offset("end")?,
        })
    }
}

fn open_format() -> io::Result<OwnedFd> {
    let (flags, mode) = (OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let mut failed = io::Error::from(io::ErrorKind::NotFound);
    for place in PLACES {
        match openat(CWD, format!("{place}/{FORMAT}"), flags, mode) {
            Ok(file) => return Ok(file),
            Err(error) => failed = error.into(),
        }
    }
    // Who may mount it does so for this one look, at no place that others see.
    let mounted = || -> rustix::io::Result<OwnedFd> {
        let tracefs = fsopen("tracefs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(&tracefs)?;
        fsmount(&tracefs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
    };
    match mounted() {
        Ok(root) => Ok(openat(root, FORMAT, flags, mode)?),
        Err(_) => Err(failed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMAT: &str = "name: kvm_unmap_hva_range
ID: 27
format:
	field:unsigned short common_type;	offset:0;	size:2;	signed:0;
	field:int common_pid;	offset:4;	size:4;	signed:1;

	field:unsigned long start;	offset:8;	size:8;	signed:0;
	field:unsigned long end;	offset:16;	size:8;	signed:0;

print fmt: \"mmu notifier unmap range: %#016lx -- %#016lx\", REC->start, REC->end
";

    #[test]
    fn the_format_says_where_addresses_are() {
        let tracepoint = Tracepoint::parse(FORMAT).unwrap();
        let expected = Tracepoint {
            id: 27,
            start: 8,
            end: 16,
        };
        assert_eq!(tracepoint, expected);
    }

    #[test]
    fn another_format_is_refused() {
        for (what, with) in [
            ("ID: ", "id: "),
            ("long end;", "long last;"),
            ("size:8", "size:4"),
        ] {
            assert_eq!(Tracepoint::parse(&FORMAT.replace(what, with)), None, "{what}");
        }
        assert_eq!(Tracepoint::parse(&FORMAT.replace("offset:16", "offset:17")), None);
    }
}
