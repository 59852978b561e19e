//! `umem run`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use umem::causes::chain;
use umem::image::Image;
use umem::link::{Address, Credentials};
use umem::pager::{Fill, PagerOptions};
use umem::region::{Backing, PageSize};
use umem::source::delayed::{Delay, DelayedSource};
use umem::source::file::{Checksums, FileSource};
use umem::source::remote::{MAX_CONNECTIONS, RemoteOptions, RemoteSource, RemoteUrl};
use umem::source::zero::ZeroSource;
use umem::units::PageIndex;

use super::error::{CommandError, exit_code};
use super::options::{Between, KeyValues, OptionError, SWITCH, Seconds, Size, SourceUrl};
use super::oversight::{Oversight, OversightOptions};
use crate::address_map::{PAGE_SIZE, RamMap};
use crate::boot::{ImageMetadata, Kernel, Layout, LayoutConfig, LayoutError, LayoutSource};
use crate::devices::EventLoopError;
use crate::ending::Ending;
use crate::kvm::AsyncPageFaults;
use crate::machine::{self, Firmware, MachineConfig, MachineError, Outcome};
use crate::ram_source::{PagerProcess, RamSource};
use crate::report::{Report, ReportTarget, milliseconds};
use crate::signals;
use crate::working_set::{self, Recording};

/// RAM where neither an image nor the command line says how much.
const DEFAULT_SIZE: Size = Size(256 << 20);

const MEMORY_SYNTAX: &str = "size=N,source=zero:|file:IMAGE|unix:PATH[#NAME]|tcp:HOST:PORT[/NAME]|attach:PATH[#NAME],source-timeout=30s,\
                             connections=N,lz4=on|off,tls-dir=DIR,\
                             backing=memfd|anonymous,hugepages=on|off,fill=off|sequential|near-faults|recorded,working-set=FILE,\
                             stripes=N,checksums=on|off,source-delay=TIME|MIN-MAX,source-delay-seed=N";
const NO_TCP: &str = "--memory tls-dir= is for sources over TCP (tcp:HOST:PORT), and there is none: a Unix socket is guarded by its \
                      file's permissions and needs no TLS";
/// More userfaultfds would serve nobody: one is enough for many vCPUs.
const MAX_STRIPES: usize = 64;

const CPUS_SYNTAX: &str = "boot=N,async_pf=on|off";

/// What `umem run` takes.
#[derive(Debug, Args)]
pub(super) struct RunOptions {
    /// Kernel: a bzImage (vmlinuz), or an ELF file with a PVH entry (vmlinux). Without it, what is in the image, else the built-in guest
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk for the kernel
    #[arg(long, value_name = "FILE")]
    initramfs: Option<PathBuf>,
    /// Kernel command line; with an image, in place of the one in it
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,
    /// Firmware ROM that the VM starts in; 'none' enters the kernel directly [default: the built-in ROM]
    #[arg(long, value_name = "FILE|none")]
    firmware: Option<PathBuf>,
    #[arg(long, value_name = "KEY=VALUE,…", help = format!("vCPUs: {CPUS_SYNTAX}"))]
    cpus: Option<String>,
    #[arg(long, value_name = "KEY=VALUE,…", help = format!("RAM and where it comes from: {MEMORY_SYNTAX}"))]
    memory: Option<String>,
    /// Write which pages of the image the guest touches to FILE, for fill=recorded; needs fill=off and small pages
    #[arg(long, value_name = "FILE")]
    record_working_set: Option<PathBuf>,
    /// How long to record, from the start
    #[arg(
        long,
        value_name = "TIME",
        default_value = "60s",
        requires = "record_working_set"
    )]
    record_for: Seconds,
    /// Write a report of the run to FILE, as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    #[command(flatten)]
    oversight: OversightOptions,
}

pub(super) fn run(options: &RunOptions, started: Instant) -> Result<(), CommandError> {
    let target = options
        .report
        .as_deref()
        .map(ReportTarget::new)
        .transpose()
        .map_err(CommandError::NoReport)?;
    let mut report = Report::default();
    let mut oversight = None;
    let result = Oversight::start(&options.oversight, started)
        .and_then(|begun| {
            let oversight = oversight.insert(begun);
            let config = configure(options)?;
            oversight.watch(&config)?;
            Ok(machine::run(&config, oversight.control(), started, &mut report)?)
        })
        .and_then(|outcome| judge(outcome, &mut report));
    if report.outcome.is_empty() {
        report.outcome = "error";
    }
    report.error = result.as_ref().err().map(|error| chain(error));
    report.total_ms = milliseconds(started.elapsed());
    if let Some(oversight) = oversight {
        oversight.finish(&report);
    }
    let written = target.map_or(Ok(()), |target| report.write(target));
    match (result, written) {
        (Ok(()), written) => Ok(written?),
        (Err(error), Ok(())) => Err(error),
        (Err(error), Err(report_error)) => {
            // The first error is the one to end with; the second must not go unsaid.
            eprintln!("umem: {}", chain(&report_error));
            Err(error)
        }
    }
}

/// What the ending means: the outcome's name in the report, and success or failure.
fn judge(outcome: Outcome, report: &mut Report) -> Result<(), CommandError> {
    let guest = |what: &str, code| {
        Err(CommandError::Guest {
            what: what.to_owned(),
            code,
        })
    };
    match outcome {
        Outcome::PagerFailed(error) => {
            let error = CommandError::from(error);
            report.outcome = if error.exit_code() == exit_code::SOURCE_LOST {
                "source-lost"
            } else {
                "error"
            };
            Err(error)
        }
        Outcome::Ended(ending) => {
            report.outcome = match &ending {
                Ending::GuestExit(_) => "guest-exit",
                Ending::PowerOff => "poweroff",
                Ending::Reset => "reset",
                Ending::TripleFault => "triple-fault",
                Ending::Panic => "panic",
                Ending::Stopped => "stopped",
                Ending::Error(_) => "error",
            };
            match ending {
                Ending::GuestExit(code) => {
                    report.guest_exit = Some(code);
                    match u8::try_from(code).unwrap_or(u8::MAX) {
                        0 => Ok(()),
                        low => guest(
                            &format!("the guest ended with code {code}"),
                            low.saturating_add(exit_code::GUEST),
                        ),
                    }
                }
                Ending::PowerOff | Ending::Stopped => Ok(()),
                Ending::Reset => guest("the guest asked for a reset", exit_code::GUEST_RESET),
                Ending::TripleFault => guest("the guest crashed: triple fault", exit_code::GUEST_RESET),
                Ending::Panic => guest("the guest reported that it crashed", exit_code::GUEST_RESET),
                Ending::Error(error) => Err(error.into()),
            }
        }
    }
}

fn configure(options: &RunOptions) -> Result<MachineConfig, CommandError> {
    let memory = MemoryOptions::parse(options.memory.as_deref())?;
    let (cpus, async_pf) = parse_cpus(options.cpus.as_deref())?;
    let firmware = match &options.firmware {
        None => Firmware::BuiltIn,
        Some(path) if path.as_os_str() == "none" => Firmware::None,
        Some(path) => Firmware::File(path.clone()),
    };
    let mut guest = match open_image(&memory)? {
        None => Guest::from_kernel(options, &memory)?,
        Some(image) => Guest::from_image(options, &memory, image)?,
    };
    if let Some(delay) = memory.delay {
        guest.source = make_late(guest.source, delay)?;
    }
    let fill = memory.fill(guest.source.digest(), guest.ram)?;
    let recording = options
        .record_working_set
        .as_deref()
        .map(|path| {
            memory.check_recordable(&guest.source)?;
            Recording::new(path, options.record_for.0).map_err(CommandError::from)
        })
        .transpose()?;
    Ok(MachineConfig {
        source: guest.source,
        ram: guest.ram,
        entry: guest.entry,
        backing: memory.backing,
        page_size: memory.page_size,
        pager: PagerOptions {
            fill,
            stripes: memory.stripes,
            record: recording
                .as_ref()
                .map(|recording| Arc::clone(recording.touched())),
        },
        recording,
        firmware,
        cpus,
        async_pf,
    })
}

/// Lets every page come later than it would.
fn make_late(source: RamSource, delay: Delay) -> Result<RamSource, CommandError> {
    let RamSource::Source(source) = source else {
        let text = "--memory source-delay= is for sources that this process asks, and the pager in another process is none";
        return Err(CommandError::Usage(text.into()));
    };
    let start = || DelayedSource::new(source, delay);
    let delayed = signals::with_ending_held_back(start).map_err(EventLoopError::Signals);
    let delayed = delayed.map_err(MachineError::from)?.map_err(MachineError::Os)?;
    Ok(RamSource::Source(Arc::new(delayed)))
}

/// What is in RAM, and how it is entered.
struct Guest {
    source: RamSource,
    ram: RamMap,
    entry: firmware::boot_info::BootInfo,
}

impl Guest {
    /// A kernel without an image is a layout over zero pages.
    fn from_kernel(options: &RunOptions, memory: &MemoryOptions) -> Result<Self, CommandError> {
        let layout = Layout::build(&LayoutConfig {
            ram_size: memory.size.unwrap_or(DEFAULT_SIZE).0,
            kernel: options.kernel.clone().map_or(Kernel::BuiltIn, Kernel::File),
            initramfs: options.initramfs.clone(),
            command_line: options.cmdline.clone(),
        })?;
        let (ram, entry) = (layout.ram(), layout.boot_info());
        Ok(Self {
            source: RamSource::Source(Arc::new(LayoutSource::new(layout, Arc::new(ZeroSource)))),
            ram,
            entry,
        })
    }

    /// An image has everything in it; another command line is laid over it.
    fn from_image(
        options: &RunOptions,
        memory: &MemoryOptions,
        image: OpenImage,
    ) -> Result<Self, CommandError> {
        let OpenImage {
            name,
            source,
            size,
            metadata,
        } = image;
        for (given, option) in [(&options.kernel, "--kernel"), (&options.initramfs, "--initramfs")] {
            if given.is_some() {
                return Err(CommandError::Usage(format!(
                    "{option} and --memory source={name} exclude each other: the image has its kernel in it (see 'umem image create')"
                )));
            }
        }
        if let Some(asked) = memory.size
            && asked.0 != size
        {
            return Err(CommandError::Usage(format!(
                "--memory size={asked} is not the size of image '{name}', which is {}: leave size away",
                Size(size)
            )));
        }
        let metadata = ImageMetadata::decode(&metadata)
            .map_err(|source| CommandError::Metadata { path: name, source })?;
        let entry = metadata.entry.into();
        let ram = RamMap::new(size).map_err(LayoutError::RamSize)?;
        let source = match &options.cmdline {
            None => source,
            Some(command_line) => {
                let layout =
                    Layout::with_command_line(size, entry, metadata.initramfs, metadata.linux, command_line)?;
                lay_over(source, layout, memory)?
            }
        };
        Ok(Self { source, ram, entry })
    }
}

/// Lays the pages that a layout wrote over RAM from `source`.
fn lay_over(source: RamSource, layout: Layout, memory: &MemoryOptions) -> Result<RamSource, CommandError> {
    let mut pager = match source {
        RamSource::Source(source) => {
            return Ok(RamSource::Source(Arc::new(LayoutSource::new(layout, source))));
        }
        RamSource::Pager(pager) => pager,
    };
    if memory.page_size == PageSize::Huge {
        let text = "--cmdline with another command line than the image's needs small pages when a pager in another process \
                    serves them: leave hugepages=on away";
        return Err(CommandError::Usage(text.into()));
    }
    let written = layout.pages().filter(|(_, written)| *written);
    pager.own_pages = written
        .map(|(index, _)| {
            let mut page = [0; PAGE_SIZE as usize];
            layout.read_page(index, &mut page);
            (PageIndex(index), page.to_vec())
        })
        .collect();
    Ok(RamSource::Pager(pager))
}

/// An image, wherever it is.
struct OpenImage {
    name: String,
    source: RamSource,
    size: u64,
    metadata: Vec<u8>,
}

/// Opens what `--memory source=` names; `None`: RAM begins as zero.
fn open_image(memory: &MemoryOptions) -> Result<Option<OpenImage>, CommandError> {
    let remote = |url: &SourceUrl| matches!(url, SourceUrl::Remote(_));
    if memory.tls_directory.is_some() && !memory.sources.iter().any(remote) {
        return Err(CommandError::Usage(NO_TCP.into()));
    }
    match memory.sources.as_slice() {
        [] | [SourceUrl::Zero] => Ok(None),
        [SourceUrl::File(path)] => {
            let image = Image::open(path)?;
            let (size, metadata) = (image.footer().ram_size, image.metadata().to_vec());
            let source = Arc::new(FileSource::new(image, memory.checksums));
            Ok(Some(OpenImage {
                name: path.display().to_string(),
                source: RamSource::Source(source),
                size,
                metadata,
            }))
        }
        [SourceUrl::Pager(address)] => {
            let connect = || address.describe();
            let described = signals::with_ending_held_back(connect).map_err(EventLoopError::Signals);
            let image = described.map_err(MachineError::from)??;
            Ok(Some(OpenImage {
                name: address.to_string(),
                source: RamSource::Pager(PagerProcess {
                    address: address.clone(),
                    digest: image.digest,
                    timeout: memory.source_timeout.0,
                    own_pages: Vec::new(),
                }),
                size: image.pages.saturating_mul(PAGE_SIZE),
                metadata: image.metadata,
            }))
        }
        several => {
            let urls: Option<Vec<RemoteUrl>> = several
                .iter()
                .map(|url| match url {
                    SourceUrl::Remote(url) => Some(url.clone()),
                    SourceUrl::Zero | SourceUrl::File(_) | SourceUrl::Pager(_) => None,
                })
                .collect();
            let Some(urls) = urls else {
                let text = "--memory source= may be given several times only for page servers (unix:, tcp:)";
                return Err(CommandError::Usage(text.into()));
            };
            let name = urls
                .iter()
                .map(RemoteUrl::to_string)
                .collect::<Vec<_>>()
                .join(",");
            let options = memory.remote_options(&urls)?;
            let connect = || RemoteSource::connect(&urls, options);
            let connected = signals::with_ending_held_back(connect).map_err(EventLoopError::Signals);
            let (source, metadata) = connected.map_err(MachineError::from)??;
            let size = source.pages() * PAGE_SIZE;
            Ok(Some(OpenImage {
                name,
                source: RamSource::Source(Arc::new(source)),
                size,
                metadata,
            }))
        }
    }
}

/// `--memory`.
struct MemoryOptions {
    size: Option<Size>,
    /// Tried in turn.
    sources: Vec<SourceUrl>,
    /// How long a lost page server is looked for.
    source_timeout: Seconds,
    /// Connections for what is loaded while nobody waits.
    connections: usize,
    lz4: bool,
    /// The certificates for TLS.
    tls_directory: Option<PathBuf>,
    backing: Backing,
    page_size: PageSize,
    fill: FillPolicy,
    working_set: Option<PathBuf>,
    /// Userfaultfds that RAM is divided among.
    stripes: usize,
    checksums: Checksums,
    /// For experiments: how late pages come.
    delay: Option<Delay>,
}

/// `fill=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FillPolicy {
    Off,
    Sequential,
    NearFaults,
    Recorded,
}

impl MemoryOptions {
    fn parse(text: Option<&str>) -> Result<Self, CommandError> {
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
    fn remote_options(&self, urls: &[RemoteUrl]) -> Result<RemoteOptions, CommandError> {
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
    fn fill(&self, digest: Option<[u8; 32]>, ram: RamMap) -> Result<Fill, CommandError> {
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
    fn check_recordable(&self, source: &RamSource) -> Result<(), CommandError> {
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

/// `--cpus`: how many, and whether they get async page faults.
fn parse_cpus(text: Option<&str>) -> Result<(u32, AsyncPageFaults), CommandError> {
    let wrong = |source| CommandError::Option {
        option: "--cpus",
        source,
    };
    let default = AsyncPageFaults::IfThere;
    let Some(text) = text else {
        return Ok((1, default));
    };
    let given = KeyValues::parse(text, &["boot", "async_pf"], CPUS_SYNTAX).map_err(wrong)?;
    let count = given.get("boot").map_err(wrong)?.unwrap_or(1);
    if count == 0 {
        let reason = "a VM needs at least one vCPU".into();
        return Err(wrong(OptionError::Value {
            key: "boot",
            value: "0".into(),
            reason,
        }));
    }
    let choices = [("on", AsyncPageFaults::Required), ("off", AsyncPageFaults::Off)];
    let async_pf = given.choose("async_pf", &choices).map_err(wrong)?;
    Ok((count, async_pf.unwrap_or(default)))
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
