//! The program under measurement.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::child::Running;

/// How long one of its commands may take.
const PATIENCE: Duration = Duration::from_mins(2);

/// Where the program is.
#[derive(Clone, Debug)]
pub(crate) struct Umem(pub(crate) PathBuf);

impl Umem {
    /// Runs it to its good end and returns what it printed.
    pub(crate) fn run<S: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<String> {
        let mut running = self.start(args)?;
        running.succeed(PATIENCE)?;
        Ok(running.text_from(0))
    }

    /// Starts it.
    pub(crate) fn start<S: AsRef<std::ffi::OsStr>>(
        &self,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Running> {
        let mut command = Command::new(&self.0);
        command.args(args);
        let mut words = command.get_args().map(|word| word.to_string_lossy());
        let name = format!("umem {}", words.next().unwrap_or_default());
        Running::start(&name, &mut command)
    }

    /// Sends a running VM a command.
    pub(crate) fn ctl(&self, socket: &Path, words: &[&str]) -> Result<String> {
        let socket = socket.display().to_string();
        self.run(["ctl", "--api-socket", &socket].iter().chain(words))
    }

    /// Whether this build has a verb, or an option of it.
    pub(crate) fn has(&self, verb: &[&str]) -> bool {
        let output = Command::new(&self.0).args(verb).arg("--help").output();
        output.is_ok_and(|output| output.status.success())
    }

    /// What it says it is.
    pub(crate) fn version(&self) -> Result<String> {
        let text = self.run(["--version"])?;
        Ok(text.trim().to_owned())
    }
}

/// A page server that runs.
pub(crate) struct Server {
    pub(crate) running: Running,
    pub(crate) url: String,
}

impl Server {
    /// Serves `image`.
    pub(crate) fn start(umem: &Umem, listen: &str, image: &Path) -> Result<Self> {
        let image = format!("image={}", image.display());
        let running = umem.start(["serve", "--listen", listen, "--image", &image])?;
        let line = running.wait_for_line(0, PATIENCE, |_| true)?;
        let url = line
            .text
            .split_whitespace()
            .find(|word| word.starts_with("unix:") || word.starts_with("tcp:"))
            .with_context(|| format!("umem serve says '{}'", line.text))?
            .to_owned();
        Ok(Self { running, url })
    }
}

/// A report that `umem run` has written.
pub(crate) struct Report(Value);

impl Report {
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self(serde_json::from_str(&text).context("the report")?))
    }

    /// The number at a JSON pointer.
    pub(crate) fn number(&self, pointer: &str) -> Result<f64> {
        match self.0.pointer(pointer).and_then(Value::as_f64) {
            Some(number) => Ok(number),
            None => bail!("the report has no {pointer}: {}", self.0),
        }
    }
}
