//! `umem ctl`: a client of a running VM's API.

mod client;
mod text;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use umem::link::Address;
use umem::source::remote::MAX_CONNECTIONS;

use self::client::Client;
use super::answer;
use super::error::CommandError;
use super::options::{KeyValues, OptionError, SWITCH, Size};
use crate::migration::Mode;

pub(super) use self::client::CtlError;

const MIGRATION_SYNTAX: &str = "destination_url=tcp:HOST:PORT|unix:PATH,memory_mode=hybrid|precopy|postcopy,downtime_ms=300,timeout_s=60,\
                                timeout_strategy=switch|cancel,connections=N,tls_dir=DIR,wait=on|off";
const SNAPSHOT_SYNTAX: &str = "destination_url=file:DIR,base_url=file:DIR,then=go-on|stop";

/// What `umem ctl` takes.
#[derive(Debug, Args)]
pub(super) struct CtlOptions {
    /// The socket that the VM was given with --api-socket
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,
    /// Print what the VM answers as it is, in JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: CtlVerb,
}

#[derive(Debug, Subcommand)]
enum CtlVerb {
    /// What the VM does, its pages, and how long faults took so far
    Info,
    /// Let the guest stand still
    Pause,
    /// Let a paused guest run on
    Resume,
    /// Write the VM to a directory, to be restored from there
    Snapshot {
        #[arg(value_name = "KEY=VALUE,…", help = format!("Where, and what the VM does then: {SNAPSHOT_SYNTAX}"))]
        options: String,
    },
    /// Send the VM to another host, where 'umem receive' waits for it; returns when it is not needed here any more
    SendMigration {
        #[arg(value_name = "KEY=VALUE,…", help = format!("Where to, and how: {MIGRATION_SYNTAX}"))]
        options: String,
    },
    /// Let a VM that is being sent stay where it is; too late once it was handed over
    CancelMigration,
    /// Let a VM run here again that was handed over, when it is not known whether it runs at its destination. Only when the destination
    /// has been fenced: if it runs there, or ever will, there are two of it
    TakeBack {
        #[arg(
            value_name = "token=TOKEN",
            help = "The migration's token, which 'umem ctl info' says"
        )]
        options: String,
    },
    /// Everything that is counted
    Counters,
    /// Whether anybody answers
    Ping,
    /// Let the balloon hold so much of RAM
    ResizeBalloon {
        /// How much: bytes, or with K, M, G
        size: Size,
    },
    /// Who is told that what is behind guest-physical addresses changes (docs/invalidations.md)
    Invalidations {
        /// What is told from now on, until the VM ends
        #[arg(long)]
        follow: bool,
    },
    /// End the VM
    Shutdown,
    /// What happens from now on, until the VM ends
    Events,
}

pub(super) fn run(options: &CtlOptions) -> Result<(), CommandError> {
    let client = Client::new(&options.api_socket)?;
    let print = |value: &Value, text: fn(&Value) -> String| {
        if options.json {
            answer(&format!("{value:#}\n"))
        } else {
            answer(&text(value))
        }
    };
    let print_event = |line: &str| {
        if options.json {
            answer(line)
        } else {
            answer(&text::event(line))
        }
    };
    match &options.verb {
        CtlVerb::Info => print(&client.get("/api/v1/vm.info")?, text::info),
        CtlVerb::Counters => print(&client.get("/api/v1/vm.counters")?, text::counters),
        CtlVerb::Ping => print(&client.get("/api/v1/vmm.ping")?, text::ping),
        CtlVerb::Pause => print(&client.put("/api/v1/vm.pause")?, |_| "paused\n".into()),
        CtlVerb::Resume => print(&client.put("/api/v1/vm.resume")?, |_| "running\n".into()),
        CtlVerb::Snapshot { options } => {
            print(&client.snapshot(&snapshot_request(options)?)?, text::snapshot)
        }
        CtlVerb::SendMigration { options } => {
            let sent = client.send_migration(&migration_request(options)?);
            print(&sent.map_err(not_migrated)?, text::migrated)
        }
        CtlVerb::CancelMigration => print(&client.put("/api/v1/vm.cancel-migration")?, |_| {
            "cancelled\n".into()
        }),
        CtlVerb::TakeBack { options } => {
            let request = take_back_request(options)?;
            print(&client.put_with("/api/v1/vm.take-back", &request)?, |_| {
                "the VM runs here again: make sure that its destination never does\n".into()
            })
        }
        CtlVerb::Shutdown => print(&client.put("/api/v1/vm.shutdown")?, |_| "stopping\n".into()),
        CtlVerb::ResizeBalloon { size } => {
            let wanted = json!({ "desired_balloon": size.0 });
            print(&client.put_with("/api/v1/vm.resize", &wanted)?, |_| {
                "told\n".into()
            })
        }
        CtlVerb::Invalidations { follow: false } => {
            print(&client.get("/api/v1/vm.invalidations")?, text::invalidations)
        }
        CtlVerb::Invalidations { follow: true } => {
            // Refused where there are none.
            client.get("/api/v1/vm.invalidations")?;
            client.events(|line| {
                if is_of(line, "invalidations") {
                    print_event(line)
                } else {
                    Ok(())
                }
            })
        }
        CtlVerb::Events => client.events(print_event),
    }
}

/// A VM that says no has not moved; whether one has that does not answer is not known.
fn not_migrated(error: CtlError) -> CommandError {
    match error {
        refused @ CtlError::Refused(_) => CommandError::NotMigrated(refused),
        error => error.into(),
    }
}

fn migration_request(text: &str) -> Result<Value, CommandError> {
    let wrong = |source| CommandError::Option {
        option: "send-migration",
        source,
    };
    let keys = [
        "destination_url",
        "memory_mode",
        "downtime_ms",
        "timeout_s",
        "timeout_strategy",
        "connections",
        "tls_dir",
        "wait",
    ];
    let given = KeyValues::parse(text, &keys, MIGRATION_SYNTAX).map_err(wrong)?;
    let destination: Option<Address> = given.get("destination_url").map_err(wrong)?;
    let Some(destination) = destination else {
        return Err(wrong(OptionError::NoValue {
            word: "destination_url".into(),
            syntax: MIGRATION_SYNTAX,
        }));
    };
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let destination = match destination {
        Address::Unix(path) => Address::Unix(absolute(&path)),
        address @ Address::Tcp(_) => address,
    };
    let mut request = json!({ "destination_url": destination.to_string() });
    let modes = Mode::ALL.map(|mode| (mode.name(), mode.name()));
    if let Some(mode) = given.choose("memory_mode", &modes).map_err(wrong)? {
        request["memory_mode"] = mode.into();
    }
    for key in ["downtime_ms", "timeout_s"] {
        if let Some(number) = given.get::<u64>(key).map_err(wrong)? {
            request[key] = number.into();
        }
    }
    if let Some(connections) = given.get_in("connections", 1..=MAX_CONNECTIONS).map_err(wrong)? {
        request["connections"] = connections.into();
    }
    let strategies = [("cancel", "cancel"), ("switch", "switch")];
    if let Some(strategy) = given.choose("timeout_strategy", &strategies).map_err(wrong)? {
        request["timeout_strategy"] = strategy.into();
    }
    if let Some(directory) = given.get::<PathBuf>("tls_dir").map_err(wrong)? {
        request["tls_dir"] = absolute(&directory).display().to_string().into();
    }
    if let Some(wait) = given.choose("wait", &SWITCH).map_err(wrong)? {
        request["wait"] = wait.into();
    }
    Ok(request)
}

fn take_back_request(text: &str) -> Result<Value, CommandError> {
    let wrong = |source| CommandError::Option {
        option: "take-back",
        source,
    };
    let given = KeyValues::parse(text, &["token"], "token=TOKEN").map_err(wrong)?;
    let token: Option<String> = given.get("token").map_err(wrong)?;
    Ok(json!({ "token": token.unwrap_or_default() }))
}

/// Whether an event has this source.
fn is_of(line: &str, source: &str) -> bool {
    serde_json::from_str::<Value>(line).is_ok_and(|event| event["source"] == source)
}

/// What is asked of the VM, whose current directory may be another one.
fn snapshot_request(text: &str) -> Result<Value, CommandError> {
    let wrong = |source| CommandError::Option {
        option: "snapshot",
        source,
    };
    let given =
        KeyValues::parse(text, &["destination_url", "base_url", "then"], SNAPSHOT_SYNTAX).map_err(wrong)?;
    let absolute = |key: &'static str, url: &str| {
        let path = url.strip_prefix("file:").filter(|path| !path.is_empty());
        let path = path.and_then(|path| std::path::absolute(path).ok());
        let path = path.as_deref().and_then(Path::to_str);
        path.map(|path| format!("file:{path}")).ok_or_else(|| {
            wrong(OptionError::Value {
                key,
                value: url.to_owned(),
                reason: "expected file:DIR".into(),
            })
        })
    };
    let url: Option<String> = given.get("destination_url").map_err(wrong)?;
    let destination = absolute("destination_url", url.as_deref().unwrap_or_default())?;
    let base: Option<String> = given.get("base_url").map_err(wrong)?;
    let base = base.map(|base| absolute("base_url", &base)).transpose()?;
    let choices = [("go-on", "go-on"), ("stop", "stop")];
    let then = given.choose("then", &choices).map_err(wrong)?.unwrap_or("go-on");
    let mut request = json!({ "destination_url": destination, "then": then });
    if let Some(base) = base {
        request["base_url"] = base.into();
    }
    Ok(request)
}
