//! `umem serve`.

use std::ffi::OsString;
use std::fmt;
use std::ops::Deref;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;

use crate::program::{Finished, Program, Running};

/// All arguments of `umem` for a server of these images.
pub fn serve_args(listen: &str, images: &[(&str, &Path)]) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec!["serve".into(), "--listen".into(), listen.into()];
    for (name, path) in images {
        let mut image = OsString::from(format!("{name}="));
        image.push(path);
        args.extend(["--image".into(), image]);
    }
    args
}

/// A page server that runs. It is killed if it is dropped.
#[derive(Debug)]
pub struct Server {
    running: Running,
    url: String,
}

impl Deref for Server {
    type Target = Running;

    fn deref(&self) -> &Running {
        &self.running
    }
}

impl Server {
    /// Starts one, and waits until it listens.
    pub fn start(listen: &str, images: &[(&str, &Path)]) -> Self {
        Self::start_with(listen, images, |program| program)
    }

    /// The same, with the program changed by `change`.
    pub fn start_with(
        listen: &str,
        images: &[(&str, &Path)],
        change: impl FnOnce(Program) -> Program,
    ) -> Self {
        let running = change(Program::umem(serve_args(listen, images))).start();
        let announced = |running: &Running| {
            let stdout = running.stdout();
            let (line, _) = stdout.split_once('\n')?;
            line.strip_prefix("serving at ").map(str::to_owned)
        };
        running.wait_until("it listens", |running| announced(running).is_some());
        let url = announced(&running).unwrap();
        Self { running, url }
    }

    /// Where it is; for TCP with its port.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Ends it at once, and waits until it is gone.
    pub fn kill(self) {
        self.running.signal(Signal::KILL);
        let finished = self.running.finish();
        assert_eq!(finished.signal(), Some(Signal::KILL.as_raw()), "{finished}");
    }

    /// Tells it to end, and checks that it does, within the time that it may take, and well.
    #[track_caller]
    pub fn stop(self) -> Served {
        self.running.signal(Signal::TERM);
        let ended = self.running.wait_for_exit(DRAIN);
        assert!(ended, "the server does not end\n{}", self.running);
        let finished = self.running.finish();
        finished.assert_code(0);
        Served(finished)
    }
}

/// How long a server may take to end: what it promises, and something for a machine with other work to do.
const DRAIN: Duration = Duration::from_secs(5 + 3);

/// A server that has ended well.
#[derive(Debug)]
pub struct Served(Finished);

impl Deref for Served {
    type Target = Finished;

    fn deref(&self) -> &Finished {
        &self.0
    }
}

impl fmt::Display for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Served {
    /// A number of its last line.
    #[track_caller]
    pub fn count(&self, key: &str) -> u64 {
        let line = self.line("served ");
        line.split(' ')
            .filter_map(|word| word.split_once('='))
            .find(|(name, _)| *name == key)
            .and_then(|(_, value)| value.parse().ok())
            .unwrap_or_else(|| panic!("no {key} in '{line}'"))
    }
}
