//! Running a program with a deadline.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, test_kill_process_group};

/// The most that anything here takes, on a slow machine with other work to do.
pub const PATIENCE: Duration = Duration::from_mins(2);

/// How often a state is looked at that nothing announces.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// The program under test: `UMEM_BIN`, or what cargo built beside this test.
pub fn umem() -> PathBuf {
    if let Some(path) = env::var_os("UMEM_BIN") {
        return path.into();
    }
    // target/PROFILE/deps/TEST-HASH
    let test = env::current_exe().unwrap();
    let path = test.parent().and_then(|deps| deps.parent()).unwrap().join("umem");
    assert!(
        path.is_file(),
        "{} is not built: run `cargo build --package vmm` first, or set UMEM_BIN",
        path.display()
    );
    path
}

/// A program to be run. It gets no input unless it is given some.
#[derive(Debug)]
pub struct Program {
    command: Command,
    patience: Duration,
    own_session: bool,
    streams_given: bool,
}

impl Program {
    /// The program at `path`.
    pub fn new(path: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(path);
        command.stdin(Stdio::null()).env_remove("RUST_LOG");
        Self {
            command,
            patience: PATIENCE,
            own_session: false,
            streams_given: false,
        }
    }

    /// The program under test with these arguments.
    pub fn umem<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Self {
        Self::new(umem()).args(args)
    }

    /// A shell in a mount namespace of its own that does what `script` says; `"$0"` in it is the program under test. What it
    /// mounts is gone with it.
    pub fn in_mount_namespace(script: &str) -> Self {
        Self::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-e", "-c", script])
            .arg(umem())
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// Where it runs.
    pub fn current_dir(mut self, path: &std::path::Path) -> Self {
        self.command.current_dir(path);
        self
    }

    /// Adds a variable to its environment.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// What it reads.
    pub fn stdin(mut self, stdin: impl Into<Stdio>) -> Self {
        self.command.stdin(stdin);
        self
    }

    /// How long it may take.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Runs it on this terminal, which becomes the controlling terminal of a session of its own.
    pub fn on_terminal(mut self, terminal: &OwnedFd) -> Self {
        let stream = || Stdio::from(terminal.try_clone().unwrap());
        self.command.stdin(stream()).stdout(stream()).stderr(stream());
        self.own_session = true;
        self.streams_given = true;
        self
    }

    /// Where its output goes; nothing of it can be looked at then.
    pub fn stdout(mut self, stdout: impl Into<Stdio>) -> Self {
        self.command.stdout(stdout).stderr(Stdio::null());
        self.streams_given = true;
        self
    }

    /// Starts it.
    pub fn start(mut self) -> Running {
        if !self.streams_given {
            self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        let own_session = self.own_session;
        if !own_session {
            self.command.process_group(0);
        }
        // SAFETY: system calls that may be made between fork and exec; nothing is allocated.
        unsafe {
            self.command.pre_exec(move || {
                // The test's thread, and with it the test, may be killed.
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                if own_session {
                    rustix::process::setsid()?;
                    rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
                }
                Ok(())
            });
        }
        let line = command_line(&self.command);
        let mut child = self
            .command
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run {line}: {error}"));
        let pid = Pid::from_child(&child);
        let stdout = Stream::collect(child.stdout.take());
        let stderr = Stream::collect(child.stderr.take());
        Running {
            line,
            child,
            pid,
            exit: pidfd_open(pid, PidfdFlags::empty()).unwrap(),
            deadline: Instant::now() + self.patience,
            stdout,
            stderr,
            reaped: false,
        }
    }

    /// Runs it to its end.
    pub fn run(self) -> Finished {
        self.start().finish()
    }
}

fn command_line(command: &Command) -> String {
    let mut words = vec![command.get_program()];
    words.extend(command.get_args());
    words
        .join(OsStr::new(" "))
        .into_string()
        .unwrap_or_else(|line: OsString| line.to_string_lossy().into_owned())
}

/// What a program has written so far.
#[derive(Debug, Default)]
struct Stream {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Stream {
    fn collect(source: Option<impl Read + Send + 'static>) -> Self {
        let Some(mut source) = source else {
            return Self::default();
        };
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&bytes);
        let reader = thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = source.read(&mut buffer) {
                sink.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .extend_from_slice(&buffer[..length]);
            }
        });
        Self {
            bytes,
            reader: Some(reader),
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    fn read_to_end(&mut self) -> String {
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        self.text()
    }
}

/// A program that runs. It is killed if it is dropped.
#[derive(Debug)]
pub struct Running {
    line: String,
    child: Child,
    pid: Pid,
    exit: OwnedFd,
    deadline: Instant,
    stdout: Stream,
    stderr: Stream,
    reaped: bool,
}

impl Running {
    /// Its process.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// What it has written to standard output so far.
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Sends it a signal. It is not yet waited for, so its id belongs to nobody else.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid, signal).unwrap();
    }

    /// Waits until `condition` holds. It is an error if the program ends before, or takes too long.
    pub fn wait_until(&self, what: &str, mut condition: impl FnMut(&Self) -> bool) {
        while !condition(self) {
            let ended = self.wait_for_exit(POLL_INTERVAL);
            assert!(
                !ended || condition(self),
                "{} ended before {what}\n{self}",
                self.line
            );
            assert!(
                Instant::now() < self.deadline,
                "{} takes too long: {what} is still to come\n{self}",
                self.line
            );
        }
    }

    /// Waits until it has written `text` to standard output.
    pub fn wait_for_output(&self, text: &str) {
        self.wait_until(&format!("writing '{text}'"), |running| {
            running.stdout().contains(text)
        });
    }

    /// Waits for its end, but not longer than `timeout`; false if it still runs.
    pub fn wait_for_exit(&self, timeout: Duration) -> bool {
        let timeout = Timespec::try_from(timeout).unwrap();
        let mut fds = [PollFd::new(&self.exit, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(ready) => ready > 0,
            Err(Errno::INTR) => false,
            Err(error) => panic!("waiting for {}: {error}", self.line),
        }
    }

    /// A figure in KiB from `/proc/PID/status`, `None` where there is none any more.
    pub fn status_kib(&self, key: &str) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim_start_matches(':')
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .ok()
    }

    /// Waits for its end. Nothing of it may be left then.
    pub fn finish(mut self) -> Finished {
        let remaining = self.deadline.saturating_duration_since(Instant::now());
        let ended = self.wait_for_exit(remaining);
        assert!(
            ended,
            "{} does not end\n{self}\n{}",
            self.line,
            wait_channels(self.pid)
        );
        let status = self.reap();
        let line = std::mem::take(&mut self.line);
        // What it has ended, and did not wait for, somebody else has to reap.
        let soon = Instant::now() + Duration::from_secs(5);
        while test_kill_process_group(self.pid) != Err(Errno::SRCH) {
            assert!(Instant::now() < soon, "{line} left processes behind");
            thread::sleep(Duration::from_millis(1));
        }
        Finished {
            line,
            status,
            stdout: self.stdout.read_to_end(),
            stderr: self.stderr.read_to_end(),
        }
    }

    fn reap(&mut self) -> ExitStatus {
        self.reaped = true;
        self.child.wait().unwrap()
    }
}

/// Where each thread of a process that does not end waits.
fn wait_channels(pid: Pid) -> String {
    let mut text = String::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let read = |name| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        text.extend([read("comm").trim(), ": ", read("wchan").trim(), "\n"]);
    }
    text
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.reaped {
            // Neither can fail for a child that is not waited for yet.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl fmt::Display for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "--- stdout\n{}--- stderr\n{}---",
            self.stdout.text(),
            self.stderr.text()
        )
    }
}

/// A program that has ended.
#[derive(Debug)]
pub struct Finished {
    line: String,
    status: ExitStatus,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl Finished {
    /// Its exit code; none if a signal ended it.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// The signal that ended it.
    pub fn signal(&self) -> Option<i32> {
        self.status.signal()
    }

    /// Checks its exit code.
    #[track_caller]
    pub fn assert_code(&self, expected: i32) {
        assert_eq!(
            self.code(),
            Some(expected),
            "the exit code is another one\n{self}"
        );
    }

    /// Checks that it wrote a line to standard output that starts so, and returns it.
    #[track_caller]
    pub fn line(&self, start: &str) -> &str {
        self.stdout
            .lines()
            .find(|line| line.starts_with(start))
            .unwrap_or_else(|| panic!("no line starts with '{start}'\n{self}"))
    }
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {}\n--- stdout\n{}--- stderr\n{}---",
            self.line, self.status, self.stdout, self.stderr
        )
    }
}
