//! A program that is measured: its output with the time at which each line came, its memory and its processor time.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// A program that runs. It is killed if it is dropped.
pub(crate) struct Running {
    name: String,
    child: Child,
    started: Instant,
    output: Arc<Output>,
    /// What it writes to standard error, for messages.
    errors: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
}

/// What a program has written to standard output so far.
#[derive(Default)]
struct Output {
    written: Mutex<Written>,
    grown: Condvar,
}

#[derive(Default)]
struct Written {
    text: Vec<u8>,
    /// Where each line ends, and when that came.
    lines: Vec<(usize, Instant)>,
    ended: bool,
}

impl Output {
    fn lock(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn collect(&self, mut source: ChildStdout) {
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = source.read(&mut buffer) {
            let now = Instant::now();
            let mut written = self.lock();
            for byte in &buffer[..length] {
                written.text.push(*byte);
                if *byte == b'\n' {
                    let end = written.text.len();
                    written.lines.push((end, now));
                }
            }
            drop(written);
            self.grown.notify_all();
        }
        self.lock().ended = true;
        self.grown.notify_all();
    }
}

impl Running {
    /// Starts `command`; messages call it `name`.
    pub(crate) fn start(name: &str, command: &mut Command) -> Result<Self> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // SAFETY: one system call between fork and exec, which allocates nothing.
        unsafe {
            command.pre_exec(|| {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(Into::into)
            });
        }
        let started = Instant::now();
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot run {}", command.get_program().display()))?;
        let output = Arc::new(Output::default());
        let errors = Arc::new(Mutex::new(String::new()));
        let mut readers = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            let output = Arc::clone(&output);
            readers.push(std::thread::spawn(move || output.collect(stdout)));
        }
        if let Some(mut stderr) = child.stderr.take() {
            let errors = Arc::clone(&errors);
            readers.push(std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(length @ 1..) = stderr.read(&mut buffer) {
                    let text = String::from_utf8_lossy(&buffer[..length]);
                    errors
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push_str(&text);
                }
            }));
        }
        Ok(Self {
            name: name.to_owned(),
            child,
            started,
            output,
            errors,
            readers,
        })
    }

    /// When it was started.
    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    /// How many bytes it has written.
    pub(crate) fn written(&self) -> usize {
        self.output.lock().text.len()
    }

    /// What it has written from byte `start` on.
    pub(crate) fn text_from(&self, start: usize) -> String {
        let written = self.output.lock();
        String::from_utf8_lossy(written.text.get(start..).unwrap_or_default()).into_owned()
    }

    /// The last line of what it has written to standard error.
    fn errors(&self) -> String {
        let errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        errors.lines().last().unwrap_or_default().to_owned()
    }

    /// Waits for the first line that begins in or after byte `start` and of which `wanted` holds, and says when it was complete and
    /// where it ended.
    pub(crate) fn wait_for_line(
        &self,
        start: usize,
        timeout: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<Line> {
        let deadline = Instant::now() + timeout;
        let mut seen = 0;
        let mut written = self.output.lock();
        loop {
            while let Some((end, at)) = written.lines.get(seen).copied() {
                let begin = seen.checked_sub(1).map_or(0, |before| written.lines[before].0);
                seen += 1;
                let text = String::from_utf8_lossy(&written.text[begin..end]);
                let text = text.trim_end();
                if begin >= start && wanted(text) {
                    let text = text.to_owned();
                    return Ok(Line { text, end, at });
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if written.ended || left.is_zero() {
                let why = if written.ended { "ended" } else { "took too long" };
                let text = String::from_utf8_lossy(&written.text);
                let last = text.lines().last().unwrap_or_default();
                let errors = self.errors();
                bail!(
                    "{} {why} before the line that was waited for; it said '{last}' {errors}",
                    self.name
                );
            }
            let result = self.output.grown.wait_timeout(written, left);
            written = result.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Processor time so far of all its threads, in user and kernel mode, without the guest's own.
    pub(crate) fn cpu_time(&self) -> Result<Duration> {
        let path = format!("/proc/{}/stat", self.child.id());
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        // The second field, the program's name, is in parentheses and may hold anything.
        let fields: Vec<u64> = text
            .rsplit_once(')')
            .map_or("", |(_, rest)| rest)
            .split_whitespace()
            .map(|field| field.parse().unwrap_or(0))
            .collect();
        // proc_pid_stat(5) counts from 1, and two fields are gone: utime 14, stime 15, guest_time 43.
        let field = |number: usize| fields.get(number - 3).copied().unwrap_or(0);
        let ticks = (field(14) + field(15)).saturating_sub(field(43));
        let per_second = rustix::param::clock_ticks_per_second();
        Ok(Duration::from_secs_f64(ticks as f64 / per_second as f64))
    }

    /// A figure of `/proc/PID/status` in KiB.
    pub(crate) fn status_kib(&self, key: &str) -> Result<u64> {
        let path = format!("/proc/{}/status", self.child.id());
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
            .and_then(|value| value.split_whitespace().next()?.parse().ok())
            .with_context(|| format!("{path} has no {key}"))
    }

    /// Waits until it has ended. Its processor time can still be asked for.
    pub(crate) fn wait_until_ended(&self, timeout: Duration) -> Result<()> {
        let fd = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty()).context("pidfd_open")?;
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).context("a time-out")?;
            match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&left)) {
                Ok(0) => bail!("{} does not end", self.name),
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("poll"),
            }
        }
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        self.wait_until_ended(timeout)?;
        let status = self.child.wait().context("wait")?;
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        Ok(status)
    }

    /// Waits for its end, which must be a good one.
    pub(crate) fn succeed(&mut self, timeout: Duration) -> Result<()> {
        let status = self.wait(timeout)?;
        if !status.success() {
            bail!("{} ended with {status}: {}", self.name, self.errors());
        }
        Ok(())
    }

    /// Asks it to end, and waits until it has.
    pub(crate) fn terminate(&mut self) -> Result<ExitStatus> {
        kill_process(Pid::from_child(&self.child), Signal::TERM).context("kill")?;
        self.wait(Duration::from_secs(30))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Neither can fail for a child that is not waited for yet, and for another one neither does anything.
        let _ = self.child.kill();
        let _ = self.child.wait();
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }
}

/// A line of output.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) text: String,
    /// The byte of the output behind it.
    pub(crate) end: usize,
    /// When it had come.
    pub(crate) at: Instant,
}

impl Line {
    /// The number behind `key=`.
    pub(crate) fn number(&self, key: &str) -> Result<u64> {
        number(&self.text, key).with_context(|| format!("the guest's line '{}' has no {key}", self.text))
    }
}

/// The number behind `key=` in a line of `key=value` words.
pub(crate) fn number(line: &str, key: &str) -> Option<u64> {
    line.split_whitespace()
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
}
