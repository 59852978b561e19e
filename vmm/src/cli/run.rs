//! `umem run`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use umem::causes::chain;
use umem::image::Image;
use umem::pager::PagerOptions;
use umem::region::PageSize;
use umem::source::delayed::{Delay, DelayedSource};
use umem::source::file::FileSource;
use umem::source::remote::{RemoteSource, RemoteUrl};
use umem::source::zero::ZeroSource;
use umem::units::PageIndex;

use super::error::{CommandError, exit_code};
use super::memory::{MEMORY_SYNTAX, MemoryOptions, NO_TCP};
use super::options::{KeyValues, OptionError, SWITCH, Seconds, Size, SourceUrl};
use super::oversight::{Oversight, OversightOptions};
use crate::address_map::{PAGE_SIZE, RamMap};
use crate::boot::{ImageMetadata, Kernel, Layout, LayoutConfig, LayoutError, LayoutSource};
use crate::control::Control;
use crate::devices::{BalloonOptions, EventLoopError};
use crate::ending::Ending;
use crate::kvm::AsyncPageFaults;
use crate::machine::{self, Firmware, MachineConfig, MachineError, Outcome, SerialLine, Start};
use crate::migration::ArrivalError;
use crate::ram_source::{PagerProcess, RamSource};
use crate::report::{Report, ReportTarget, milliseconds};
use crate::signals;
use crate::snapshot;
use crate::thread_placement::Placement;
use crate::working_set::Recording;

mod restore;

/// RAM where neither an image nor the command line says how much.
const DEFAULT_SIZE: Size = Size(256 << 20);

const BALLOON_SYNTAX: &str = "size=N,free-page-reporting=on|off,deflate-on-oom=on|off";
const CPUS_SYNTAX: &str = "boot=N,async_pf=on|off,placement=free|beside|apart";

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
    /// Restore a snapshot, its RAM loaded lazily: its directory or file, or where a server or pager has it (unix:, tcp:, attach:)
    #[arg(long, value_name = "DIR|URL")]
    snapshot: Option<String>,
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
    #[arg(long, value_name = "KEY=VALUE,…", help = format!("A balloon, by which the guest gives RAM back: {BALLOON_SYNTAX}"))]
    balloon: Option<String>,
    /// Write a report of the run to FILE, as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    #[command(flatten)]
    oversight: OversightOptions,
}

pub(super) fn run(options: &RunOptions, started: Instant) -> Result<(), CommandError> {
    run_machine(options.report.as_deref(), &options.oversight, started, |_| {
        configure(options)
    })
}

/// Runs the VM that `configure` makes, and leaves a report behind.
pub(super) fn run_machine(
    report: Option<&Path>,
    options: &OversightOptions,
    started: Instant,
    configure: impl FnOnce(&Control) -> Result<MachineConfig, CommandError>,
) -> Result<(), CommandError> {
    let target = report
        .map(ReportTarget::new)
        .transpose()
        .map_err(CommandError::NoReport)?;
    let mut report = Report::default();
    let mut oversight = None;
    let result = Oversight::start(options, started)
        .and_then(|begun| {
            let oversight = oversight.insert(begun);
            let config = configure(oversight.control())?;
            oversight.watch(&config)?;
            Ok(machine::run(&config, oversight.control(), started, &mut report)?)
        })
        .and_then(|outcome| judge(outcome, &mut report));
    let result = match result {
        Err(CommandError::Arrival(ArrivalError::Stopped)) => {
            report.outcome = "stopped";
            Ok(())
        }
        result => result,
    };
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
                Ending::Migrated => "migrated",
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
                Ending::PowerOff | Ending::Stopped | Ending::Migrated => Ok(()),
                Ending::Reset => guest("the guest asked for a reset", exit_code::GUEST_RESET),
                Ending::TripleFault => guest("the guest crashed: triple fault", exit_code::GUEST_RESET),
                Ending::Panic => guest("the guest reported that it crashed", exit_code::GUEST_RESET),
                Ending::Error(error) => Err(error.into()),
            }
        }
    }
}

fn configure(options: &RunOptions) -> Result<MachineConfig, CommandError> {
    let mut memory = MemoryOptions::parse(options.memory.as_deref())?;
    let cpus = CpuOptions::parse(options.cpus.as_deref())?;
    let mut guest = match &options.snapshot {
        Some(location) => restore::configure(options, &mut memory, &cpus, location)?,
        None => match open_image(&memory)? {
            None => Guest::from_kernel(options, &memory, &cpus)?,
            Some(image) => Guest::from_image(options, &memory, &cpus, image)?,
        },
    };
    if let Some(delay) = memory.delay {
        guest.source = make_late(guest.source, delay)?;
    }
    if cpus.placement != Placement::Free && matches!(guest.source, RamSource::Pager(_)) {
        let text =
            "--cpus placement= is for a pager in this process, and the one of source=attach: is in another";
        return Err(CommandError::Usage(text.into()));
    }
    let balloon = options
        .balloon
        .as_deref()
        .map(|text| balloon_options(text, guest.ram))
        .transpose()?;
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
        start: guest.start,
        serial_line: SerialLine::StandardStreams,
        backing: memory.backing,
        page_size: memory.page_size,
        pager: PagerOptions {
            fill,
            stripes: memory.stripes,
            record: recording
                .as_ref()
                .map(|recording| Arc::clone(recording.touched())),
            demand_cpus: None,
        },
        recording,
        cpus: guest.cpus,
        async_pf: guest.async_pf,
        placement: cpus.placement,
        track_dirty: memory.track_dirty,
        balloon,
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

/// What is in RAM, how it begins, and what runs it.
struct Guest {
    source: RamSource,
    ram: RamMap,
    start: Start,
    cpus: u32,
    async_pf: AsyncPageFaults,
}

impl Guest {
    /// One that begins with its first instruction.
    fn booted(
        options: &RunOptions,
        cpus: &CpuOptions,
        source: RamSource,
        ram: RamMap,
        entry: firmware::boot_info::BootInfo,
    ) -> Self {
        let firmware = match &options.firmware {
            None => Firmware::BuiltIn,
            Some(path) if path.as_os_str() == "none" => Firmware::None,
            Some(path) => Firmware::File(path.clone()),
        };
        Self {
            source,
            ram,
            start: Start::Boot { entry, firmware },
            cpus: cpus.count.unwrap_or(1),
            async_pf: cpus.async_pf.unwrap_or(AsyncPageFaults::IfThere),
        }
    }

    /// A kernel without an image is a layout over zero pages.
    fn from_kernel(
        options: &RunOptions,
        memory: &MemoryOptions,
        cpus: &CpuOptions,
    ) -> Result<Self, CommandError> {
        let layout = Layout::build(&LayoutConfig {
            ram_size: memory.size.unwrap_or(DEFAULT_SIZE).0,
            kernel: options.kernel.clone().map_or(Kernel::BuiltIn, Kernel::File),
            initramfs: options.initramfs.clone(),
            command_line: options.cmdline.clone(),
        })?;
        let (ram, entry) = (layout.ram(), layout.boot_info());
        let source = RamSource::Source(Arc::new(LayoutSource::new(layout, Arc::new(ZeroSource))));
        Ok(Self::booted(options, cpus, source, ram, entry))
    }

    /// An image has everything in it; another command line is laid over it.
    fn from_image(
        options: &RunOptions,
        memory: &MemoryOptions,
        cpus: &CpuOptions,
        image: OpenImage,
    ) -> Result<Self, CommandError> {
        for (given, option) in [(&options.kernel, "--kernel"), (&options.initramfs, "--initramfs")] {
            if given.is_some() {
                return Err(CommandError::Usage(format!(
                    "{option} and --memory source={} exclude each other: the image has its kernel in it (see 'umem image create')",
                    image.name
                )));
            }
        }
        if snapshot::is_snapshot(&image.metadata) {
            return Err(CommandError::Usage(format!(
                "'{}' is a snapshot, not an image to be booted: restore it with --snapshot",
                image.name
            )));
        }
        image.check_size(memory)?;
        let OpenImage {
            name,
            source,
            size,
            metadata,
        } = image;
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
        Ok(Self::booted(options, cpus, source, ram, entry))
    }
}

/// Lays the pages that a layout wrote over RAM from `source`.
fn lay_over(source: RamSource, layout: Layout, memory: &MemoryOptions) -> Result<RamSource, CommandError> {
    let mut pager = match source {
        RamSource::Source(source) => {
            return Ok(RamSource::Source(Arc::new(LayoutSource::new(layout, source))));
        }
        RamSource::Pager(pager) => pager,
        RamSource::Arriving(_) => return Ok(source),
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

impl OpenImage {
    /// Refuses another size of RAM than the image's.
    fn check_size(&self, memory: &MemoryOptions) -> Result<(), CommandError> {
        match memory.size {
            Some(asked) if asked.0 != self.size => Err(CommandError::Usage(format!(
                "--memory size={asked} is not the size of image '{}', which is {}: leave size away",
                self.name,
                Size(self.size)
            ))),
            _ => Ok(()),
        }
    }
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

/// `--balloon`.
fn balloon_options(text: &str, ram: RamMap) -> Result<BalloonOptions, CommandError> {
    let wrong = |source| CommandError::Option {
        option: "--balloon",
        source,
    };
    let keys = ["size", "free-page-reporting", "deflate-on-oom"];
    let given = KeyValues::parse(text, &keys, BALLOON_SYNTAX).map_err(wrong)?;
    let size: Size = given.get("size").map_err(wrong)?.unwrap_or(Size(0));
    if size.0 > ram.size() || !size.0.is_multiple_of(PAGE_SIZE) {
        return Err(wrong(OptionError::Value {
            key: "size",
            value: size.to_string(),
            reason: format!(
                "expected a multiple of 4096 up to the size of RAM, {}",
                ram.size()
            ),
        }));
    }
    let switch = |key| Ok(given.choose(key, &SWITCH)?.unwrap_or(false));
    Ok(BalloonOptions {
        size: size.0,
        free_page_reporting: switch("free-page-reporting").map_err(wrong)?,
        deflate_on_oom: switch("deflate-on-oom").map_err(wrong)?,
    })
}

/// `--cpus`: how many, whether they get async page faults, and where they run.
#[derive(Default)]
struct CpuOptions {
    count: Option<u32>,
    async_pf: Option<AsyncPageFaults>,
    placement: Placement,
}

impl CpuOptions {
    fn parse(text: Option<&str>) -> Result<Self, CommandError> {
        let wrong = |source| CommandError::Option {
            option: "--cpus",
            source,
        };
        let Some(text) = text else {
            return Ok(Self::default());
        };
        let given = KeyValues::parse(text, &["boot", "async_pf", "placement"], CPUS_SYNTAX).map_err(wrong)?;
        let count = given.get("boot").map_err(wrong)?;
        if count == Some(0) {
            let reason = "a VM needs at least one vCPU".into();
            return Err(wrong(OptionError::Value {
                key: "boot",
                value: "0".into(),
                reason,
            }));
        }
        let choices = [("on", AsyncPageFaults::Required), ("off", AsyncPageFaults::Off)];
        let async_pf = given.choose("async_pf", &choices).map_err(wrong)?;
        let choices = [
            ("free", Placement::Free),
            ("beside", Placement::Beside),
            ("apart", Placement::Apart),
        ];
        let placement = given.choose("placement", &choices).map_err(wrong)?;
        Ok(Self {
            count,
            async_pf,
            placement: placement.unwrap_or_default(),
        })
    }
}
