//! `umem receive`.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use umem::link::{Address, Credentials, Listener};
use umem::pager::PagerOptions;

use super::error::CommandError;
use super::memory::{FillPolicy, MemoryOptions};
use super::oversight::OversightOptions;
use super::run::run_machine;
use super::serve::refuse_exposure;
use crate::address_map::RamMap;
use crate::boot::LayoutError;
use crate::control::Control;
use crate::devices::EventLoopError;
use crate::kvm::AsyncPageFaults;
use crate::machine::{MachineConfig, MachineError, SerialLine, Start};
use crate::migration::{Arrival, ArrivalOptions};
use crate::ram_source::RamSource;
use crate::signals;
use crate::thread_placement::Placement;

const MEMORY_SYNTAX: &str = "backing=memfd|anonymous,hugepages=on|off,fill=near-faults|sequential|off,source-timeout=30s,stripes=N,\
                             track-dirty=on|off";

/// What `umem receive` takes.
#[derive(Debug, Args)]
pub(super) struct ReceiveOptions {
    /// Where the VM is waited for: unix:PATH or tcp:HOST:PORT
    #[arg(long, value_name = "URL")]
    listen: Address,
    /// TLS 1.3 over TCP, with ca.pem, cert.pem and key.pem in DIR: only who has a certificate of that CA is taken
    #[arg(long, value_name = "DIR", conflicts_with = "allow_plaintext")]
    tls_dir: Option<PathBuf>,
    /// Let TCP be reached from other hosts, unencrypted and by anybody
    #[arg(long)]
    allow_plaintext: bool,
    #[arg(long, value_name = "KEY=VALUE,…", help = format!("How RAM is kept, and how what is missing is loaded: {MEMORY_SYNTAX}"))]
    memory: Option<String>,
    /// Write a report of the run to FILE, as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    #[command(flatten)]
    oversight: OversightOptions,
}

pub(super) fn run(options: &ReceiveOptions, started: Instant) -> Result<(), CommandError> {
    run_machine(
        options.report.as_deref(),
        &options.oversight,
        started,
        |control| configure(options, control),
    )
}

/// Waits until somebody sends a VM, and makes one like it.
fn configure(options: &ReceiveOptions, control: &Control) -> Result<MachineConfig, CommandError> {
    let memory = memory_options(options.memory.as_deref())?;
    refuse_exposure(
        &options.listen,
        options.tls_dir.is_some(),
        options.allow_plaintext,
    )?;
    let credentials = options.tls_dir.as_deref().map(Credentials::load).transpose()?;
    let listener = Listener::bind_with(&options.listen, credentials)?;
    let address = listener.address().map_err(CommandError::Serve)?;
    let arrival = ArrivalOptions {
        timeout: memory.source_timeout.0,
        record: options.oversight.migration_record(),
    };
    // Until the event loop takes them, which it does with those that come before, they are looked for here.
    let signals: Vec<_> = signals::ENDING
        .into_iter()
        .filter(|signal| *signal == libc::SIGTERM || !signals::is_ignored(*signal))
        .collect();
    signals::block(&signals)
        .map_err(EventLoopError::Signals)
        .map_err(MachineError::from)?;
    let arrival = Arrival::listen(listener, arrival)?;
    control.arriving(&arrival);
    say!("waiting for a VM at {address}");
    let machine = arrival.await_machine(|| !control.is_ending() && !signals::is_pending(&signals))?;
    let ram = RamMap::new(machine.ram_size).map_err(LayoutError::RamSize)?;
    Ok(MachineConfig {
        source: RamSource::Arriving(arrival.clone()),
        ram,
        serial_line: SerialLine::StandardStreams,
        backing: memory.backing,
        page_size: memory.page_size,
        pager: PagerOptions {
            fill: memory.fill(None, ram)?,
            stripes: memory.stripes,
            record: None,
            demand_cpus: None,
        },
        recording: None,
        balloon: None,
        cpus: machine.cpus,
        async_pf: if machine.async_pf {
            AsyncPageFaults::IfThere
        } else {
            AsyncPageFaults::Off
        },
        placement: Placement::default(),
        track_dirty: memory.track_dirty,
        start: Start::Arrive(arrival, machine),
    })
}

fn memory_options(text: Option<&str>) -> Result<MemoryOptions, CommandError> {
    let mut memory = MemoryOptions::parse(text)?;
    if memory.size.is_some()
        || !memory.sources.is_empty()
        || memory.working_set.is_some()
        || memory.delay.is_some()
    {
        return Err(CommandError::Usage(format!(
            "--memory: what RAM is and where it comes from is the sender's to say; here there is {MEMORY_SYNTAX}"
        )));
    }
    let said = text.is_some_and(|text| text.split(',').any(|word| word.starts_with("fill=")));
    if !said {
        memory.fill = FillPolicy::NearFaults;
    }
    Ok(memory)
}
