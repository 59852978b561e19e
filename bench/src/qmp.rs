//! QEMU's machine protocol: one JSON object a line, commands answered in order, events in between.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// How long QEMU may take for an answer.
const PATIENCE: Duration = Duration::from_mins(1);

/// A connection to one QEMU.
pub(crate) struct Qmp {
    reader: BufReader<UnixStream>,
    /// A line of which a part has come.
    partial: String,
    /// Events that nobody has waited for yet.
    events: VecDeque<Value>,
}

impl Qmp {
    /// Takes QEMU's greeting and answers it.
    pub(crate) fn begin(stream: UnixStream) -> Result<Self> {
        let mut qmp = Self {
            reader: BufReader::new(stream),
            partial: String::new(),
            events: VecDeque::new(),
        };
        let greeting = qmp.read(Instant::now() + PATIENCE)?;
        if greeting.get("QMP").is_none() {
            bail!("QEMU greets with {greeting}");
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// The next message; an error if none comes in time.
    fn read(&mut self, deadline: Instant) -> Result<Value> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = left.max(Duration::from_millis(1));
            self.reader
                .get_ref()
                .set_read_timeout(Some(left))
                .context("a time-out")?;
            // What was read before a time-out stays in `partial`.
            match self.reader.read_line(&mut self.partial) {
                Ok(0) => bail!("QEMU has closed its monitor"),
                Ok(_) if self.partial.ends_with('\n') => {
                    let message = serde_json::from_str(&self.partial);
                    self.partial.clear();
                    return message.context("QEMU says what is no JSON");
                }
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("QEMU says nothing"),
            }
        }
    }

    /// Has a command done and returns its answer.
    #[expect(clippy::needless_pass_by_value, reason = "it is made for this call")]
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.reader
            .get_mut()
            .write_all(line.as_bytes())
            .context("QEMU's monitor")?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut message = self.read(deadline).with_context(|| format!("QMP {command}"))?;
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
            if let Some(error) = message.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
            self.events.push_back(message);
        }
    }

    /// Waits until the migration has one of these states, and says which.
    pub(crate) fn migration_state(&mut self, states: &[&str], timeout: Duration) -> Result<String> {
        let deadline = Instant::now() + timeout;
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self
                    .read(deadline)
                    .with_context(|| format!("waiting for the migration to be {states:?}"))?,
            };
            let status = event.pointer("/data/status").and_then(Value::as_str);
            if event["event"] == "MIGRATION"
                && let Some(status) = status.filter(|status| states.contains(status))
            {
                return Ok(status.to_owned());
            }
        }
    }
}
