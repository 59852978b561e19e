//! `umem check`.

use clap::Args;

use super::error::CommandError;

/// What `umem check` takes.
#[derive(Debug, Args)]
pub(super) struct CheckOptions {
    /// As JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(options: &CheckOptions) -> Result<(), CommandError> {
    let _ = options.json;
    Ok(())
}
