//! What happens to a VM, told as it happens to whoever wants to know: one JSON object an event, one line each.
//!
//! Whoever tells never waits. Listeners share a ring of the latest events; one that reads too slowly finds that it has missed
//! some, and is told how many.

mod file;
mod watch;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::migration::Status;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio_stream::wrappers::{BroadcastStream, errors::BroadcastStreamRecvError};
use tokio_stream::{Stream, StreamExt};

pub use file::{EventFile, EventFileError, EventWriter};
pub use watch::{Watch, WatchOptions};

/// Events that a listener may be behind.
const BACKLOG: usize = 1024;

/// The most ranges that one event names; the others are only counted.
const RANGES_NAMED: usize = 16;

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// The VM is in another state.
    State {
        /// The new state.
        state: &'static str,
        /// The one before.
        previous: &'static str,
    },
    /// More of RAM is there.
    FillProgress {
        /// Pages of 4 KiB that are there, or were given back.
        settled: u64,
        /// Pages of RAM.
        total: u64,
    },
    /// No page is missing any more.
    AllPagesPresent {
        /// Pages of RAM.
        total: u64,
    },
    /// The page source is out of reach.
    SourceLost {
        /// Where it is.
        url: String,
        /// Why.
        error: String,
    },
    /// The page source is in reach again.
    SourceBack {
        /// Where it is.
        url: String,
        /// For how long it was not.
        lost_for: Duration,
    },
    /// More of a snapshot is written.
    SnapshotProgress {
        /// Bytes done.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// The VM is being sent to another host.
    MigrationProgress(Box<Status>),
    /// What is behind guest-physical addresses is about to change.
    Invalidated {
        /// Why, in a word.
        cause: &'static str,
        /// Where: the first address, and the one after the last.
        ranges: Vec<(u64, u64)>,
    },
    /// The guest has ended, or was ended.
    Exit {
        /// How, in the report's word.
        outcome: &'static str,
        /// What the guest wrote to the exit port.
        code: Option<u32>,
        /// What went wrong.
        error: Option<String>,
    },
}

impl Event {
    /// Whom it happened to.
    fn source(&self) -> &'static str {
        match self {
            Self::State { .. } => "vm",
            Self::FillProgress { .. } | Self::AllPagesPresent { .. } => "memory",
            Self::SourceLost { .. } | Self::SourceBack { .. } => "page-source",
            Self::SnapshotProgress { .. } => "snapshot",
            Self::MigrationProgress(_) => "migration",
            Self::Invalidated { .. } => "invalidations",
            // Whom the guest did not survive.
            Self::Exit {
                outcome: "stopped" | "migrated" | "source-lost" | "error",
                ..
            } => "vmm",
            Self::Exit { .. } => "guest",
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::State { state, .. } => state,
            Self::FillProgress { .. } => "fill-progress",
            Self::AllPagesPresent { .. } => "all-pages-present",
            Self::SourceLost { .. } => "lost",
            Self::SourceBack { .. } => "back",
            Self::SnapshotProgress { .. } | Self::MigrationProgress(_) => "progress",
            Self::Invalidated { .. } => "changing",
            Self::Exit { .. } => "exit",
        }
    }

    fn properties(&self) -> Value {
        match self {
            Self::State { previous, .. } => json!({ "previous": previous }),
            Self::FillProgress { settled, total } => json!({ "pages": settled, "total": total }),
            Self::AllPagesPresent { total } => json!({ "total": total }),
            Self::SourceLost { url, error } => json!({ "url": url, "error": error }),
            Self::SourceBack { url, lost_for } => {
                json!({ "url": url, "lost_ms": crate::report::milliseconds(*lost_for) })
            }
            Self::SnapshotProgress { done, total } => json!({ "bytes": done, "total": total }),
            // Texts and numbers can be written.
            Self::MigrationProgress(status) => serde_json::to_value(status).unwrap_or_default(),
            Self::Invalidated { cause, ranges } => {
                let named: Vec<Value> = ranges
                    .iter()
                    .take(RANGES_NAMED)
                    .map(|(start, end)| json!({ "start": start, "end": end }))
                    .collect();
                let bytes = ranges
                    .iter()
                    .fold(0, |sum: u64, (start, end)| sum.saturating_add(end - start));
                json!({ "cause": cause, "count": ranges.len(), "bytes": bytes, "ranges": named })
            }
            Self::Exit { outcome, code, error } => {
                let mut properties = json!({ "outcome": outcome });
                if let Some(code) = code {
                    properties["code"] = json!(code);
                }
                if let Some(error) = error {
                    properties["error"] = json!(error);
                }
                properties
            }
        }
    }
}

/// An event as it is written; the form is Cloud Hypervisor's.
#[derive(Serialize)]
struct Record<'a> {
    timestamp: Timestamp,
    source: &'a str,
    event: &'a str,
    properties: Value,
}

/// Since this program began.
#[derive(Serialize)]
struct Timestamp {
    secs: u64,
    nanos: u32,
}

/// Where events are told and heard. Clones are one place.
#[derive(Clone, Debug)]
pub struct Events {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    started: Instant,
    lines: broadcast::Sender<Line>,
}

#[derive(Clone, Debug)]
enum Line {
    Event(Arc<str>),
    /// There are no more.
    End,
}

impl Events {
    /// A place where nothing has happened. Times count from `started`.
    pub fn new(started: Instant) -> Self {
        let (lines, _) = broadcast::channel(BACKLOG);
        Self {
            shared: Arc::new(Shared { started, lines }),
        }
    }

    /// Tells all who listen.
    pub fn tell(&self, event: &Event) {
        // Nobody need be listening.
        if self.shared.lines.receiver_count() > 0 {
            let line = self.line(event.source(), event.name(), event.properties());
            let _ = self.shared.lines.send(Line::Event(line));
        }
    }

    /// Tells all who listen that there will be no more.
    pub fn end(&self) {
        let _ = self.shared.lines.send(Line::End);
    }

    /// Everything from now on.
    pub fn listen(&self) -> Listener {
        Listener {
            events: self.clone(),
            lines: self.shared.lines.subscribe(),
        }
    }

    fn line(&self, source: &str, event: &str, properties: Value) -> Arc<str> {
        let since = self.shared.started.elapsed();
        let record = Record {
            timestamp: Timestamp {
                secs: since.as_secs(),
                nanos: since.subsec_nanos(),
            },
            source,
            event,
            properties,
        };
        // What has no maps with odd keys and no odd numbers can be written.
        let mut line = serde_json::to_string(&record).unwrap_or_default();
        line.push('\n');
        line.into()
    }

    /// What a listener hears that has missed something.
    fn missed(&self, count: u64) -> Arc<str> {
        self.line("events", "missed", json!({ "count": count }))
    }
}

/// Hears events, each a line of JSON.
#[derive(Debug)]
pub struct Listener {
    events: Events,
    lines: broadcast::Receiver<Line>,
}

impl Listener {
    /// The next one. `None`: there are no more. Waits.
    fn next(&mut self) -> Option<Arc<str>> {
        match self.lines.blocking_recv() {
            Ok(Line::Event(line)) => Some(line),
            Err(RecvError::Lagged(count)) => Some(self.events.missed(count)),
            Ok(Line::End) | Err(RecvError::Closed) => None,
        }
    }

    /// All of them.
    pub fn stream(self) -> impl Stream<Item = Arc<str>> {
        let Self { events, lines } = self;
        BroadcastStream::new(lines)
            .map(move |line| match line {
                Ok(Line::Event(line)) => Some(line),
                Err(BroadcastStreamRecvError::Lagged(count)) => Some(events.missed(count)),
                Ok(Line::End) => None,
            })
            .take_while(Option::is_some)
            .filter_map(|line| line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(settled: u64) -> Event {
        Event::FillProgress { settled, total: 9 }
    }

    fn parse(line: &str) -> Value {
        assert_eq!(line.find('\n'), Some(line.len() - 1), "{line:?}");
        serde_json::from_str(line).unwrap()
    }

    #[test]
    fn everybody_hears_everything_in_order() {
        let events = Events::new(Instant::now());
        events.tell(&progress(0));
        let mut listeners = [events.listen(), events.listen()];
        events.tell(&progress(1));
        events.tell(&progress(2));
        events.end();
        for listener in &mut listeners {
            for settled in [1, 2] {
                let event = parse(&listener.next().unwrap());
                assert_eq!(event["source"], "memory");
                assert_eq!(event["event"], "fill-progress");
                assert_eq!(event["properties"], json!({ "pages": settled, "total": 9 }));
                assert!(event["timestamp"]["secs"].is_u64() && event["timestamp"]["nanos"].is_u64());
            }
            assert!(listener.next().is_none());
        }
    }

    #[test]
    fn who_reads_too_slowly_is_told_what_it_missed() {
        let events = Events::new(Instant::now());
        let mut listener = events.listen();
        let told = BACKLOG as u64 + 7;
        for settled in 0..told {
            events.tell(&progress(settled));
        }
        let missed = parse(&listener.next().unwrap());
        assert_eq!(missed["source"], "events");
        assert_eq!(missed["event"], "missed");
        assert_eq!(missed["properties"]["count"], 7);
        let next = parse(&listener.next().unwrap());
        assert_eq!(next["properties"]["pages"], 7, "the latest ones are kept");
    }
}
