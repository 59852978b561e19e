//! How a VM is driven and watched from outside while it runs: the API socket, the event file, the bar on the terminal.

use std::io::{IsTerminal, stdin, stdout};
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use indicatif::ProgressBar;
use umem::link::{Address, Listener};
use umem::pager::Fill;
use ummunotify::service::{LONGEST_LIMIT, ServiceOptions};

use super::error::CommandError;
use super::options::{KeyValues, OptionError, SWITCH, Seconds};
use super::progress;
use crate::address_map::PAGE_SIZE;
use crate::api::ApiServer;
use crate::control::Control;
use crate::devices::EventLoopError;
use crate::events::{Event, EventFile, EventWriter, Events, Watch, WatchOptions};
use crate::invalidations::{Invalidations, InvalidationsOptions};
use crate::machine::{MachineConfig, MachineError};
use crate::migration;
use crate::report::Report;
use crate::signals;

const EVENT_MONITOR: &str = "--event-monitor";
const INVALIDATIONS: &str = "--invalidations";
const INVALIDATIONS_SYNTAX: &str = "socket=PATH,acknowledge-within=TIME,kernel=on|off";
const EVENT_MONITOR_SYNTAX: &str = "path=FILE";

/// The options for it.
#[derive(Debug, Args)]
pub(super) struct OversightOptions {
    /// Let the VM be driven through a Unix socket at PATH, which `umem ctl` speaks to (docs/api.md)
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,
    #[arg(
        long,
        value_name = "KEY=VALUE",
        help = format!("Write events as JSON lines to a file or pipe: {EVENT_MONITOR_SYNTAX}")
    )]
    event_monitor: Option<String>,
    #[arg(
        long,
        value_name = "KEY=VALUE,…",
        help = format!("Tell other processes when the memory behind guest-physical addresses changes: {INVALIDATIONS_SYNTAX}")
    )]
    invalidations: Option<String>,
}

impl OversightOptions {
    /// Where it is written down whose a VM is that moves: beside the API socket, if there is one.
    pub(super) fn migration_record(&self) -> Option<PathBuf> {
        self.api_socket.as_deref().map(migration::record_beside)
    }
}

/// Everything that drives or watches a VM from outside.
pub(super) struct Oversight {
    control: Control,
    events: Events,
    watch: Option<Watch>,
    writer: Option<EventWriter>,
    /// Last, so that clients may hear of the end.
    api: Option<ApiServer>,
}

impl Oversight {
    /// Begins, before there is a VM. `started` is when the program did.
    pub(super) fn start(options: &OversightOptions, started: Instant) -> Result<Self, CommandError> {
        let (control, events) = (Control::new(), Events::new(started));
        let invalidations = options
            .invalidations
            .as_deref()
            .map(invalidations_options)
            .transpose()?;
        let file = options.event_monitor.as_deref().map(open_monitor).transpose()?;
        // Before the API: who finds that, finds this too.
        if let Some(options) = &invalidations {
            let started = signals::with_ending_held_back(|| Invalidations::start(options));
            let started = started
                .map_err(EventLoopError::Signals)
                .map_err(MachineError::from)?;
            control.tell_of_invalidations(started?);
        }
        let socket = options.api_socket.clone().map(Address::Unix);
        let listener = socket.as_ref().map(Listener::bind).transpose()?;
        let begin = || {
            let writer = file.map(|file| EventWriter::start(&events, file)).transpose()?;
            let serve = |listener| ApiServer::start(listener, control.clone(), events.clone(), started);
            let api = listener.map(serve).transpose()?;
            Ok((writer, api))
        };
        let (writer, api) = held_back(begin)?;
        Ok(Self {
            control,
            events,
            watch: None,
            writer,
            api,
        })
    }

    /// The handle that the VM is to be run under.
    pub(super) fn control(&self) -> &Control {
        &self.control
    }

    /// Begins to tell what becomes of the VM.
    pub(super) fn watch(&mut self, config: &MachineConfig) -> Result<(), CommandError> {
        let ram = config.ram.size();
        let loaded = match &config.pager.fill {
            Fill::Off => None,
            Fill::Sequential | Fill::NearFaults => Some(ram),
            Fill::Recorded(set) => Some(set.pages() * PAGE_SIZE),
        };
        // A guest that has the terminal shares it with nobody.
        let free = !stdin().is_terminal() && !stdout().is_terminal();
        let bar = match loaded {
            Some(bytes) if free => progress::bar("loading", bytes),
            _ => ProgressBar::hidden(),
        };
        if self.api.is_none() && self.writer.is_none() && bar.is_hidden() {
            return Ok(());
        }
        let options = WatchOptions {
            source_url: config.source.url(),
            pages: ram / PAGE_SIZE,
            bar,
        };
        let watch = held_back(|| Watch::start(&self.control, &self.events, options))?;
        self.watch = Some(watch);
        Ok(())
    }

    /// Tells of the end, and ends.
    pub(super) fn finish(mut self, report: &Report) {
        drop(self.watch.take());
        self.events.tell(&Event::Exit {
            outcome: report.outcome,
            code: report.guest_exit,
            error: report.error.clone(),
        });
        self.events.end();
        if let Some(writer) = self.writer.take() {
            writer.finish();
        }
        drop(self.api.take());
    }
}

/// Starts threads that leave the signals that end a VM to its event loop.
fn held_back<T>(begin: impl FnOnce() -> std::io::Result<T>) -> Result<T, CommandError> {
    let begun = signals::with_ending_held_back(begin).map_err(EventLoopError::Signals);
    Ok(begun.map_err(MachineError::from)?.map_err(MachineError::Os)?)
}

fn invalidations_options(text: &str) -> Result<InvalidationsOptions, CommandError> {
    let wrong = |source| CommandError::Option {
        option: INVALIDATIONS,
        source,
    };
    let keys = ["socket", "acknowledge-within", "kernel"];
    let given = KeyValues::parse(text, &keys, INVALIDATIONS_SYNTAX).map_err(wrong)?;
    let socket: Option<PathBuf> = given.get("socket").map_err(wrong)?;
    let socket = socket.ok_or_else(|| {
        wrong(OptionError::NoValue {
            word: "socket".into(),
            syntax: INVALIDATIONS_SYNTAX,
        })
    })?;
    let within: Option<Seconds> = given.get("acknowledge-within").map_err(wrong)?;
    let within = within.map_or(ServiceOptions::default().limit, |within| within.0);
    if within > LONGEST_LIMIT {
        return Err(wrong(OptionError::Value {
            key: "acknowledge-within",
            value: format!("{} ms", within.as_millis()),
            reason: format!("expected at most {} s", LONGEST_LIMIT.as_secs()),
        }));
    }
    Ok(InvalidationsOptions {
        socket,
        acknowledge_within: within,
        kernel: given.choose("kernel", &SWITCH).map_err(wrong)?.unwrap_or(false),
    })
}

fn open_monitor(text: &str) -> Result<EventFile, CommandError> {
    let wrong = |source| CommandError::Option {
        option: EVENT_MONITOR,
        source,
    };
    let given = KeyValues::parse(text, &["path"], EVENT_MONITOR_SYNTAX).map_err(wrong)?;
    // There is no other key, and no text without one.
    let path: Option<PathBuf> = given.get("path").map_err(wrong)?;
    let path = path.ok_or_else(|| {
        wrong(OptionError::NoValue {
            word: "path".into(),
            syntax: EVENT_MONITOR_SYNTAX,
        })
    })?;
    Ok(EventFile::open(&path)?)
}
