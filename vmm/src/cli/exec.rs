//! `umem exec`.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use clap::Args;
use umem::causes::chain;
use ummunotify::{Choice, Notifier};

use super::error::CommandError;

/// The library that stands in for the device.
const LIBRARY: &str = "libummunotify_preload.so";

/// Where it is, from the directory of this program: the last is where cargo leaves it when it builds tests.
const PLACES: [&str; 3] = [".", "../lib", "deps"];

/// What `umem exec` takes.
#[derive(Debug, Args)]
pub(super) struct ExecOptions {
    /// Who notices invalidations: auto, kvm, perf, userfaultfd
    #[arg(long, value_name = "WATCHER", default_value = "auto")]
    watcher: String,
    /// The program, and its arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "PROGRAM"
    )]
    program: Vec<OsString>,
}

/// Becomes the program, which finds `/dev/ummunotify`.
pub(super) fn run(options: &ExecOptions) -> Result<(), CommandError> {
    let choice = options
        .watcher
        .parse::<Choice>()
        .map_err(|error| CommandError::Usage(format!("--watcher: {error}")))?
        .with_page();
    // The program would only hear that there is no device.
    Notifier::open(choice).map_err(|error| CommandError::HostLacks(chain(&error)))?;
    let library = library()?;
    let Some((program, arguments)) = options.program.split_first() else {
        return Err(CommandError::Usage("no program".to_owned()));
    };
    let mut preload = library.into_os_string();
    if let Some(others) = std::env::var_os("LD_PRELOAD").filter(|others| !others.is_empty()) {
        preload.push(OsStr::new(":"));
        preload.push(others);
    }
    let error = Command::new(program)
        .args(arguments)
        .env("LD_PRELOAD", preload)
        .env("UMMUNOTIFY_WATCHER", &options.watcher)
        .exec();
    Err(CommandError::Usage(format!(
        "cannot run {}: {error}",
        program.to_string_lossy()
    )))
}

fn library() -> Result<PathBuf, CommandError> {
    let program = std::env::current_exe().ok();
    let directory = program.as_deref().and_then(|program| program.parent());
    let mut places = directory
        .into_iter()
        .flat_map(|directory| PLACES.map(|place| directory.join(place).join(LIBRARY)));
    places.find(|library| library.exists()).ok_or_else(|| {
        CommandError::HostLacks(format!(
            "{LIBRARY} is not where this program is, nor in lib beside it: cargo build -p ummunotify-preload makes it"
        ))
    })
}
