//! `umem exec`.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use clap::Args;
use umem::causes::chain;
use umem::uffd::Userfaultfd;
use ummunotify::{Choice, Notifier};

use super::error::CommandError;

/// The library that stands in for the devices.
const LIBRARY: &str = "libumem_preload.so";

/// Where it is, from the directory of this program: the last is where cargo leaves it when it builds tests.
const PLACES: [&str; 3] = [".", "../lib", "deps"];

/// What `umem exec` takes.
#[derive(Debug, Args)]
pub(super) struct ExecOptions {
    /// Who notices invalidations for /dev/ummunotify: auto, kvm, perf, userfaultfd
    #[arg(long, value_name = "WATCHER")]
    watcher: Option<String>,
    /// The program, and its arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "PROGRAM"
    )]
    program: Vec<OsString>,
}

/// Becomes the program, which finds `/dev/umem` and `/dev/ummunotify`.
pub(super) fn run(options: &ExecOptions) -> Result<(), CommandError> {
    let watcher = options.watcher.as_deref().unwrap_or("auto");
    let choice = watcher
        .parse::<Choice>()
        .map_err(|error| CommandError::Usage(format!("--watcher: {error}")))?
        .with_page();
    // The program would only hear that there is no device. Which of the two it opens is not known, unless it is said.
    let lacking = match (Notifier::open(choice).err(), &options.watcher) {
        (Some(error), Some(_)) => Some(chain(&error)),
        (Some(error), None) if Userfaultfd::probe().is_err() => Some(chain(&error)),
        _ => None,
    };
    if let Some(text) = lacking {
        return Err(CommandError::HostLacks(text));
    }
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
        .env("UMMUNOTIFY_WATCHER", watcher)
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
            "{LIBRARY} is not where this program is, nor in lib beside it: cargo build -p umem-preload makes it"
        ))
    })
}
