//! The command line. One file a verb.

/// Writes a line of what a command answers; ends the function if that fails.
macro_rules! say {
    ($($words:tt)*) => {
        crate::cli::answer(&format!("{}\n", format_args!($($words)*)))?
    };
}

mod bench;
mod check;
mod ctl;
mod error;
mod exec;
mod image;
mod memory;
mod options;
mod oversight;
mod progress;
mod receive;
mod run;
mod serve;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, Parser, Subcommand};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use tracing_subscriber::EnvFilter;

use error::{CommandError, exit_code};
use umem::causes::chain;

/// Runs KVM virtual machines whose memory is still somewhere else.
#[derive(Debug, Parser)]
#[command(name = "umem", version, max_term_width = 110)]
struct CommandLine {
    #[command(subcommand)]
    verb: Verb,
    #[command(flatten)]
    log: LogOptions,
}

#[derive(Debug, Args)]
struct LogOptions {
    /// Say more (twice: much more)
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
    /// Write the log to FILE instead of standard error
    #[arg(long, value_name = "FILE", global = true)]
    log_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Boot a VM, its RAM loaded lazily from a page source
    Run(run::RunOptions),
    /// Wait for a VM to move here, then run it
    Receive(receive::ReceiveOptions),
    /// Serve RAM images to any number of VMs
    Serve(serve::ServeOptions),
    /// Make, describe and check RAM images, without running the guest
    Image {
        #[command(subcommand)]
        verb: image::ImageVerb,
    },
    /// Drive a running VM through its API socket
    Ctl(ctl::CtlOptions),
    /// Run a program that was written for /dev/ummunotify
    Exec(exec::ExecOptions),
    /// Say what this host offers, and how to get what it lacks
    Check(check::CheckOptions),
    /// Measure what this host can do at best, and what umem makes of it
    Bench(bench::BenchOptions),
}

/// The program: reads the command line, does what it says, answers with the exit code.
pub fn main() -> ExitCode {
    let started = Instant::now();
    // A thread that panics would leave the others waiting for it for ever; and the terminal as the guest wants it.
    let default_hook = std::panic::take_hook();
    let terminal = tcgetattr(std::io::stdin()).ok();
    std::panic::set_hook(Box::new(move |panic| {
        if let Some(terminal) = &terminal {
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, terminal);
        }
        default_hook(panic);
        std::process::exit(exit_code::RUNTIME.into());
    }));
    let command_line = match CommandLine::try_parse() {
        Ok(command_line) => command_line,
        Err(error) => {
            // Help and version come this way too, and are no errors.
            let code = if error.use_stderr() {
                exit_code::USAGE
            } else {
                exit_code::OK
            };
            let _ = error.print();
            return code.into();
        }
    };
    let result = start_log(&command_line.log).and_then(|()| match &command_line.verb {
        Verb::Run(options) => run::run(options, started),
        Verb::Receive(options) => receive::run(options, started),
        Verb::Serve(options) => serve::run(options),
        Verb::Image { verb } => {
            end_when_nobody_reads();
            image::run(verb)
        }
        Verb::Ctl(options) => {
            end_when_nobody_reads();
            ctl::run(options)
        }
        Verb::Exec(options) => exec::run(options),
        Verb::Check(options) => {
            end_when_nobody_reads();
            check::run(options)
        }
        Verb::Bench(options) => bench::run(options),
    });
    match result {
        Ok(()) => exit_code::OK.into(),
        Err(error) => {
            eprintln!("umem: {}", chain(&error));
            error.exit_code().into()
        }
    }
}

/// Writes what a command answers.
fn answer(text: &str) -> Result<(), CommandError> {
    let mut output = std::io::stdout().lock();
    output
        .write_all(text.as_bytes())
        .and_then(|()| output.flush())
        .map_err(CommandError::Output)
}

/// Commands whose output is what they are for end quietly when nobody reads on, as programs in a pipeline do.
fn end_when_nobody_reads() {
    // SAFETY: no other thread is running yet, and no handler of this program is replaced.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

fn start_log(options: &LogOptions) -> Result<(), CommandError> {
    let level = match options.verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let log = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(level))
        .with_target(false);
    match &options.log_file {
        None => log
            .with_ansi(std::io::stderr().is_terminal())
            .with_writer(std::io::stderr)
            .init(),
        Some(path) => {
            let file = std::fs::File::options().create(true).append(true).open(path);
            let file = file.map_err(|source| CommandError::LogFile {
                path: path.display().to_string(),
                source,
            })?;
            log.with_ansi(false).with_writer(file).init();
        }
    }
    Ok(())
}
