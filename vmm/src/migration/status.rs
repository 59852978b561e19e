//! What is known of a migration while it goes on.

use serde::Serialize;

use super::Mode;

/// Where a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// A VM that is still arriving itself waits for its pages.
    Waiting,
    /// The destination makes a VM like this one.
    Preparing,
    /// RAM is sent while the guest runs at the source.
    Precopy,
    /// The guest stands still.
    Switching,
    /// The VM was handed over, and it is not known yet whether it runs there. It stands still here.
    InDoubt,
    /// The guest runs at the destination, and pages are missing there.
    Postcopy,
    /// The destination has everything.
    Complete,
    /// The VM stays where it was.
    Failed,
}

impl Phase {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Preparing => "preparing",
            Self::Precopy => "precopy",
            Self::Switching => "switching",
            Self::InDoubt => "in-doubt",
            Self::Postcopy => "postcopy",
            Self::Complete => "complete",
            Self::Failed => "failed",
        }
    }
}

/// A migration as people see it.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// `out` or `in`.
    pub direction: &'static str,
    /// How.
    pub mode: Mode,
    /// Where it is.
    pub phase: Phase,
    /// Who is at the other end.
    pub peer: String,
    /// The session, by which both sides know each other; empty before there is one.
    pub token: String,
    /// Rounds of precopy begun.
    pub round: u32,
    /// Bytes of RAM.
    pub bytes_total: u64,
    /// Bytes sent, of whatever.
    pub bytes_sent: u64,
    /// Bytes of RAM left in this round; after the switch, that are missing at the destination, as far as it is known.
    pub bytes_left: u64,
    /// Bytes a second that the guest changed in the last round.
    pub dirty_rate: u64,
    /// Bytes of RAM a second that were dealt with in the last round.
    pub bandwidth: u64,
    /// How long what is left would take.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_downtime_ms: Option<f64>,
    /// How long the guest stood still.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<f64>,
    /// Since it began.
    pub elapsed_ms: f64,
}
