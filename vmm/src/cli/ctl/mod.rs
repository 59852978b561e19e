//! `umem ctl`: a client of a running VM's API.

mod client;
mod text;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use self::client::Client;
use super::answer;
use super::error::CommandError;
use super::options::{KeyValues, OptionError, Size};

pub(super) use self::client::CtlError;

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
