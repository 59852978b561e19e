//! What a server counts, and how it is told to a monitoring system.

use std::fmt::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::metrics::{Page, Unit};
use crate::stats::Histogram;
use crate::wire::{ChannelKind, RefuseCode};

/// Words that count things apart, each with its own counter.
macro_rules! reasons {
    ($(#[$meta:meta])* $name:ident { $($(#[$variant_meta:meta])* $variant:ident => $text:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum $name {
            $($(#[$variant_meta])* $variant,)*
        }

        impl $name {
            pub(super) const ALL: &'static [Self] = &[$(Self::$variant,)*];

            pub(super) const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)*
                }
            }
        }
    };
}

reasons! {
    /// Why a connection did not become a channel.
    Refusal {
        /// It said nothing, or not all of a hello, for as long as it may.
        Silent => "silent",
        /// It said nothing, or not all of a hello, and newer ones needed its place.
        Crowded => "crowded",
        /// Its certificate, or that it has none.
        Handshake => "handshake",
        /// What it said is no hello.
        Garbage => "garbage",
        /// Its hello is none that can be understood.
        BadHello => "bad-hello",
        Version => "version",
        Busy => "busy",
        Draining => "draining",
        UnknownImage => "unknown-image",
        WrongDigest => "wrong-digest",
        WrongSize => "wrong-size",
        BadImage => "bad-image",
        NotPermitted => "not-permitted",
    }
}

impl From<RefuseCode> for Refusal {
    fn from(code: RefuseCode) -> Self {
        match code {
            RefuseCode::WrongVersion => Self::Version,
            RefuseCode::UnknownImage => Self::UnknownImage,
            RefuseCode::WrongDigest => Self::WrongDigest,
            RefuseCode::Busy => Self::Busy,
            RefuseCode::Draining => Self::Draining,
            RefuseCode::WrongSize => Self::WrongSize,
            RefuseCode::BadImage => Self::BadImage,
            RefuseCode::NotPermitted => Self::NotPermitted,
            _ => Self::BadHello,
        }
    }
}

reasons! {
    /// Why a channel ended.
    End {
        /// The client said goodbye.
        Done => "done",
        /// The client closed the connection.
        Closed => "closed",
        /// The connection was lost.
        Lost => "lost",
        /// The client said nothing for too long.
        Quiet => "quiet",
        /// The client did not read what it asked for.
        Unread => "unread",
        /// The client broke the protocol.
        Protocol => "protocol",
        /// The server ended.
        Stopped => "stopped",
    }
}

impl End {
    /// Whether the client is to blame.
    const fn is_refusal(self) -> bool {
        matches!(self, Self::Quiet | Self::Unread | Self::Protocol)
    }
}

reasons! {
    /// How pages were answered.
    Sent {
        Raw => "raw",
        Lz4 => "lz4",
        Zero => "zero",
        /// Not at all.
        Failed => "failed",
    }
}

const KINDS: [ChannelKind; 3] = [ChannelKind::Demand, ChannelKind::Background, ChannelKind::Control];

/// Everything that a server counts.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    opened: [AtomicU64; KINDS.len()],
    closed: [AtomicU64; KINDS.len()],
    requests: [AtomicU64; KINDS.len()],
    answer: [Histogram; KINDS.len()],
    refused: [AtomicU64; Refusal::ALL.len()],
    left: AtomicU64,
    ended: [AtomicU64; End::ALL.len()],
    pages: [AtomicU64; Sent::ALL.len()],
    content: AtomicU64,
    wire: AtomicU64,
}

impl Metrics {
    pub(super) fn open(&self, kind: ChannelKind) {
        self.opened[kind as usize].fetch_add(1, Relaxed);
    }

    pub(super) fn end(&self, kind: ChannelKind, end: End) {
        self.ended[end as usize].fetch_add(1, Relaxed);
        self.closed[kind as usize].fetch_add(1, Relaxed);
    }

    pub(super) fn refuse(&self, refusal: Refusal) {
        self.refused[refusal as usize].fetch_add(1, Relaxed);
    }

    /// A connection ended by itself before it was a channel.
    pub(super) fn leave(&self) {
        self.left.fetch_add(1, Relaxed);
    }

    /// All of a request was answered.
    pub(super) fn answer(&self, kind: ChannelKind, time: Duration) {
        self.requests[kind as usize].fetch_add(1, Relaxed);
        self.answer[kind as usize].record(time);
    }

    /// Pages were answered, with so many bytes of content in so many bytes of data.
    pub(super) fn pages(&self, sent: Sent, pages: u64, content: usize, wire: usize) {
        self.pages[sent as usize].fetch_add(pages, Relaxed);
        self.content.fetch_add(content as u64, Relaxed);
        self.wire.fetch_add(wire as u64, Relaxed);
    }

    pub(super) fn channels(&self) -> u64 {
        sum(&self.opened)
    }

    pub(super) fn requests(&self) -> u64 {
        sum(&self.requests)
    }

    /// Those refused, and those ended for what they did.
    pub(super) fn refused(&self) -> u64 {
        let ended = End::ALL.iter().filter(|end| end.is_refusal());
        sum(&self.refused)
            + ended
                .map(|end| self.ended[*end as usize].load(Relaxed))
                .sum::<u64>()
    }

    pub(super) fn pages_sent(&self) -> u64 {
        sum(&self.pages) - self.pages[Sent::Failed as usize].load(Relaxed)
    }

    pub(super) fn content(&self) -> u64 {
        self.content.load(Relaxed)
    }
}

fn sum(counters: &[AtomicU64]) -> u64 {
    counters.iter().map(|counter| counter.load(Relaxed)).sum()
}

/// Writes everything that is counted.
pub(super) fn write(page: &mut Page<'_>, metrics: &Metrics) -> fmt::Result {
    let names = KINDS.map(|kind| kind.to_string());
    let by_kind = |counters: &[AtomicU64; KINDS.len()]| {
        let values = counters.each_ref().map(|counter| counter.load(Relaxed));
        names
            .iter()
            .zip(values)
            .map(|(name, value)| ([("kind", name.as_str())], value))
            .collect::<Vec<_>>()
    };
    // Closed ones first: one that is opened and closed between the two looks would be less than none.
    let closed = by_kind(&metrics.closed);
    let opened = by_kind(&metrics.opened);
    let open = opened
        .iter()
        .zip(&closed)
        .map(|((label, opened), (_, closed))| (*label, opened - closed));
    page.gauges("umem_serve_channels", "Open channels", open)?;
    page.counters("umem_serve_channels_opened", "Channels opened", opened)?;
    page.counters(
        "umem_serve_channels_ended",
        "Channels ended, by why",
        End::ALL.iter().map(|end| {
            (
                [("reason", end.name())],
                metrics.ended[*end as usize].load(Relaxed),
            )
        }),
    )?;
    page.counters(
        "umem_serve_connections_refused",
        "Connections that did not become a channel, by why",
        Refusal::ALL.iter().map(|why| {
            (
                [("reason", why.name())],
                metrics.refused[*why as usize].load(Relaxed),
            )
        }),
    )?;
    page.counter(
        "umem_serve_connections_left",
        "Connections that ended by themselves before they were a channel",
        None,
        metrics.left.load(Relaxed),
    )?;
    page.counters(
        "umem_serve_requests",
        "Requests for pages answered",
        by_kind(&metrics.requests),
    )?;
    page.counters(
        "umem_serve_pages",
        "Pages answered, by how",
        Sent::ALL.iter().map(|sent| {
            (
                [("sent", sent.name())],
                metrics.pages[*sent as usize].load(Relaxed),
            )
        }),
    )?;
    page.counter(
        "umem_serve_content",
        "Content of pages sent",
        Some(&Unit::Bytes),
        metrics.content(),
    )?;
    page.counter(
        "umem_serve_wire",
        "Content of pages as it was sent, which may be compressed",
        Some(&Unit::Bytes),
        metrics.wire.load(Relaxed),
    )?;
    page.histograms(
        "umem_serve_answer",
        "Time from a request for pages to the end of its answer",
        names
            .iter()
            .zip(&metrics.answer)
            .map(|(name, answer)| ([("kind", name.as_str())], answer.distribution())),
    )
}

/// A digest in hexadecimal.
pub(super) fn hex(digest: &[u8]) -> String {
    digest.iter().fold(String::new(), |mut text, byte| {
        // Nothing fails where text is kept in memory.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
