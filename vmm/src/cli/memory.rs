//! `--memory`.

use std::path::PathBuf;
use std::sync::Arc;

use umem::link::{Address, Credentials};
use umem::pager::Fill;
use umem::region::{Backing, PageSize};
use umem::source::delayed::Delay;
use umem::source::file::Checksums;
use umem::source::remote::{MAX_CONNECTIONS, RemoteOptions, RemoteUrl};

use super::error::CommandError;
use super::options::{Between, KeyValues, OptionError, SWITCH, Seconds, Size, SourceUrl};
use crate::address_map::{PAGE_SIZE, RamMap};
use crate::ram_source::RamSource;
use crate::working_set;

pub(super) const MEMORY_SYNTAX: &str = "size=N,source=zero:|file:IMAGE|unix:PATH[#NAME]|tcp:HOST:PORT[/NAME]|attach:PATH[#NAME],source-timeout=30s,\
                             connections=N,lz4=on|off,tls-dir=DIR,\
                             backing=memfd|anonymous,hugepages=on|off,fill=off|sequential|near-faults|recorded,working-set=FILE,\
                             stripes=N,checksums=on|off,track-dirty=on|off,source-delay=TIME|MIN-MAX,source-delay-seed=N";
pub(super) const NO_TCP: &str = "--memory tls-dir= is for sources over TCP (tcp:HOST:PORT), and there is none: a Unix socket is guarded by its \
                      file's permissions and needs no TLS";
/// More userfaultfds would serve nobody: one is enough for many vCPUs.
const MAX_STRIPES: usize = 64;

/// `--memory`.
pub(super) struct MemoryOptions {
    pub(super) size: Option<Size>,
    /// Tried in turn.
    pub(super) sources: Vec<SourceUrl>,
    /// How long a lost page server is looked for.
    pub(super) source_timeout: Seconds,
    /// Connections for what is loaded while nobody waits.
    pub(super) connections: usize,
    pub(super) lz4: bool,
    /// The certificates for TLS.
    pub(super) tls_directory: Option<PathBuf>,
    pub(super) backing: Backing,
    pub(super) page_size: PageSize,
    pub(super) fill: FillPolicy,
    pub(super) working_set: Option<PathBuf>,
    /// Userfaultfds that RAM is divided among.
    pub(super) stripes: usize,
    pub(super) checksums: Checksums,
    pub(super) track_dirty: bool,
    /// For experiments: how late pages come.
    pub(super) delay: Option<Delay>,
}

/// `fill=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FillPolicy {
    Off,
    Sequential,
    NearFaults,
    Recorded,
}

impl MemoryOptions {
    pub(super) fn parse(text: Option<&str>) -> Result<Self, CommandError> {
        Self::parse_keys(text).map_err(|source| CommandError::Option {
            option: "--memory",
            source,
        })
    }

    fn parse_keys(text: Option<&str>) -> Result<Self, OptionError> {
        let mut options = Self {
            size: None,
            sources: Vec::new(),
            source_timeout: Seconds(RemoteOptions::default().timeout),
            connections: RemoteOptions::default().connections,
            lz4: RemoteOptions::default().lz4,
            tls_directory: None,
            backing: Backing::Memfd,
            page_size: PageSize::Small,
            fill: FillPolicy::Off,
            working_set: None,
            stripes: 1,
            checksums: Checksums::On,
            track_dirty: false,
            delay: None,
        };
        let Some(text) = text else { return Ok(options) };
        let keys = [
            "size",
            "source",
            "source-timeout",
            "connections",
            "lz4",
            "tls-dir",
            "backing",
            "hugepages",
            "fill",
            "working-set",
            "stripes",
            "checksums",
            "track-dirty",
            "source-delay",
            "source-delay-seed",
        ];
        let given = KeyValues::parse_repeating(text, &keys, &["source"], MEMORY_SYNTAX)?;
        options.size = given.get("size")?;
        options.sources = given.get_all("source")?;
        options.source_timeout = given.get("source-timeout")?.unwrap_or(options.source_timeout);
        let connections = given.get_in("connections", 1..=MAX_CONNECTIONS)?;
        options.connections = connections.unwrap_or(options.connections);
        options.lz4 = given.choose("lz4", &SWITCH)?.unwrap_or(options.lz4);
        options.tls_directory = given.get("tls-dir")?;
        let backings = [("memfd", Backing::Memfd), ("anonymous", Backing::Anonymous)];
        options.backing = given.choose("backing", &backings)?.unwrap_or(options.backing);
        let huge = given.choose("hugepages", &SWITCH)?.unwrap_or(false);
        options.page_size = if huge { PageSize::Huge } else { PageSize::Small };
        let fills = [
            ("off", FillPolicy::Off),
            ("sequential", FillPolicy::Sequential),
            ("near-faults", FillPolicy::NearFaults),
            ("recorded", FillPolicy::Recorded),
        ];
        options.working_set = given.get("working-set")?;
        let implied = options.working_set.as_ref().map(|_| FillPolicy::Recorded);
        options.fill = given.choose("fill", &fills)?.or(implied).unwrap_or(options.fill);
        options.stripes = given
            .get_in("stripes", 1..=MAX_STRIPES)?
            .unwrap_or(options.stripes);
        let check = given.choose("checksums", &SWITCH)?.unwrap_or(true);
        options.checksums = if check { Checksums::On } else { Checksums::Off };
        options.track_dirty = given.choose("track-dirty", &SWITCH)?.unwrap_or(false);
        let seed: Option<u64> = given.get("source-delay-seed")?;
        let delay = given.get("source-delay")?;
        if let (Some(seed), None) = (seed, &delay) {
            return Err(OptionError::Value {
                key: "source-delay-seed",
                value: seed.to_string(),
                reason: "it is for source-delay, and there is none".into(),
            });
        }
        options.delay = delay.map(|Between { min, max }| Delay {
            min,
            max,
            seed: seed.unwrap_or(0),
        });
        Ok(options)
    }

    /// How the page servers at `urls` are used.
    pub(super) fn remote_options(&self, urls: &[RemoteUrl]) -> Result<RemoteOptions, CommandError> {
        let tcp = urls.iter().any(|url| matches!(url.address, Address::Tcp(_)));
        let credentials = match &self.tls_directory {
            Some(_) if !tcp => return Err(CommandError::Usage(NO_TCP.into())),
            Some(directory) => Some(Credentials::load(directory)?),
            None => None,
        };
        Ok(RemoteOptions {
            timeout: self.source_timeout.0,
            connections: self.connections,
            lz4: self.lz4,
            credentials,
        })
    }
}

impl MemoryOptions {
    /// The fill of RAM from `source`.
    pub(super) fn fill(&self, digest: Option<[u8; 32]>, ram: RamMap) -> Result<Fill, CommandError> {
        Ok(match (self.fill, &self.working_set) {
            (FillPolicy::Recorded, Some(path)) => {
                Fill::Recorded(Arc::new(working_set::load(path, digest, ram.size() / PAGE_SIZE)?))
            }
            (FillPolicy::Recorded, None) => {
                let text = "--memory fill=recorded needs working-set=FILE, which --record-working-set makes";
                return Err(CommandError::Usage(text.into()));
            }
            (_, Some(_)) => {
                let text = "--memory working-set=FILE is for fill=recorded, and another fill was asked for";
                return Err(CommandError::Usage(text.into()));
            }
            (FillPolicy::Off, None) => Fill::Off,
            (FillPolicy::Sequential, None) => Fill::Sequential,
            (FillPolicy::NearFaults, None) => Fill::NearFaults,
        })
    }

    /// Refuses what would make the record of a working set wrong.
    pub(super) fn check_recordable(&self, source: &RamSource) -> Result<(), CommandError> {
        let reason = if source.digest().is_none() {
            "needs an image (--memory source=…), whose pages they are"
        } else if matches!(source, RamSource::Pager(_)) {
            "needs a source that this process asks: the pager in another process sees what is touched"
        } else if self.fill != FillPolicy::Off {
            "needs fill=off: what a fill has loaded, nobody sees being touched"
        } else if self.page_size == PageSize::Huge {
            "needs hugepages=off: of a huge page nobody sees which part was touched"
        } else {
            return Ok(());
        };
        Err(CommandError::Usage(format!("--record-working-set {reason}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(options: &str) -> Fill {
        let memory = MemoryOptions::parse(Some(options)).unwrap();
        memory.fill(None, RamMap::new(16 << 20).unwrap()).unwrap()
    }

    #[test]
    fn each_word_is_the_fill_that_it_names() {
        assert!(matches!(fill("size=16M"), Fill::Off));
        assert!(matches!(fill("fill=off"), Fill::Off));
        assert!(matches!(fill("fill=sequential"), Fill::Sequential));
        assert!(matches!(fill("fill=near-faults"), Fill::NearFaults));
    }

    #[test]
    fn numbers_reach_what_they_are_for() {
        let memory = MemoryOptions::parse(Some("stripes=3,connections=4,lz4=on,source-timeout=2s")).unwrap();
        assert_eq!(memory.stripes, 3);
        let remote = memory.remote_options(&[]).unwrap();
        assert_eq!((remote.connections, remote.lz4), (4, true));
        assert_eq!(remote.timeout, std::time::Duration::from_secs(2));
    }
}
