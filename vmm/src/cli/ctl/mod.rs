//! `umem ctl`: a client of a running VM's API.

mod client;
mod text;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::Value;

use self::client::Client;
use super::answer;
use super::error::CommandError;

pub(super) use self::client::CtlError;

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

#[derive(Clone, Copy, Debug, Subcommand)]
enum CtlVerb {
    /// What the VM does, its pages, and how long faults took so far
    Info,
    /// Let the guest stand still
    Pause,
    /// Let a paused guest run on
    Resume,
    /// Everything that is counted
    Counters,
    /// Whether anybody answers
    Ping,
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
    match options.verb {
        CtlVerb::Info => print(&client.get("/api/v1/vm.info")?, text::info),
        CtlVerb::Counters => print(&client.get("/api/v1/vm.counters")?, text::counters),
        CtlVerb::Ping => print(&client.get("/api/v1/vmm.ping")?, text::ping),
        CtlVerb::Pause => print(&client.put("/api/v1/vm.pause")?, |_| "paused\n".into()),
        CtlVerb::Resume => print(&client.put("/api/v1/vm.resume")?, |_| "running\n".into()),
        CtlVerb::Shutdown => print(&client.put("/api/v1/vm.shutdown")?, |_| "stopping\n".into()),
        CtlVerb::Events => client.events(|line| {
            if options.json {
                answer(line)
            } else {
                answer(&text::event(line))
            }
        }),
    }
}
