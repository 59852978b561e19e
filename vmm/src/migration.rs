//! A VM moves from one instance of this program to another.
//!
//! The instance that it leaves calls the one that waits for it (`umem receive`), over the wire protocol that page servers speak:
//! one control channel, one for demand, and some for everything else, of one session.
//!
//! ```text
//!    source                                        destination
//!      | == control =============================== |
//!      | Machine ---------------------------------> |  makes a VM like it, of which nothing is populated, and a pager whose
//!      | <------------------------------- Prepared  |  page source is the source
//!      | == background ============================ |
//!      | Pages, Zero, round after round ----------> |  writes them to RAM               (precopy, hybrid)
//!      | Barrier ---------------------------------> |
//!      | <----------------------------- BarrierAck  |
//!      | == control =============================== |
//!      | Discard (changed since) -----------------> |  these pages are absent again             (hybrid)
//!      | <----------------------------------- Pong  |
//!      | the guest stands still                     |
//!      | Discard (the last few) ------------------> |
//!      | == background ============================ |
//!      | Pages (the last round; at hand), Barrier > |  writes them to RAM
//!      | <----------------------------- BarrierAck  |
//!      | == control =============================== |
//!      | State -----------------------------------> |  registers RAM, restores vCPUs
//!      | <--------------------------------- Loaded  |
//!      | Commit ----------------------------------> |  from here on the machine is the destination's
//!      | <-------------------------------- Running  |
//!      | == demand, background ==================== |
//!      | <------------------------------- Requests  |  as from any page server
//!      | == control =============================== |
//!      | <------------------------------- Complete  |  the source ends
//! ```
//!
//! `docs/migration.md` has the states of both sides, and what each loss leads to.

mod arrival;
mod conversation;
mod data_channel;
mod landing;
mod listener;
mod ongoing;
mod push;
mod ram;
mod record;
mod sender;
mod status;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use umem::call::CallError;
use umem::channel::ChannelError;
use umem::link::{Address, Credentials, CredentialsError};
use umem::source::remote::MAX_CONNECTIONS;
use umem::wire::Features;

use crate::address_map::{PAGE_SIZE, RamMap};
use crate::boot::{ReadOnlyPages, RomError};
use crate::control::{PauseError, VmState};
use crate::kvm::{CpuModel, VmError};
use crate::snapshot::{self, SavedPages, SnapshotError, StateError};

pub use self::arrival::{Arrival, ArrivalError, ArrivalOptions};
pub(crate) use self::ongoing::{Ongoing, TooLate};
pub(crate) use self::sender::send;
pub use self::status::{Phase, Status};

/// What both sides of a migration must be able to do.
const FEATURES: Features = Features(Features::PUSH.0 | Features::DISCARD.0 | Features::HANDOVER.0);

/// How long the other side may say nothing where it is to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often each side of the control channel says something.
const KEEP_ALIVE: Duration = Duration::from_secs(1);

/// The first and the longest pause between attempts to connect anew.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// The number of the barrier after which nothing more is pushed on a channel, and pages are asked for.
const LAST_BARRIER: u64 = u64::MAX;

/// How RAM gets there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// All of it before the switch, round after round, until what is left fits into the downtime.
    Precopy,
    /// After the switch, as the guest asks for it and beside that.
    Postcopy,
    /// Before the switch for as long as that pays, the rest after it.
    Hybrid,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Precopy, Self::Postcopy, Self::Hybrid];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Precopy => "precopy",
            Self::Postcopy => "postcopy",
            Self::Hybrid => "hybrid",
        }
    }
}

/// What becomes of a precopy that does not come to its end in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeoutStrategy {
    /// The VM stays where it is.
    Cancel,
    /// The VM stands still for as long as the rest takes.
    Switch,
}

/// How a VM is to be sent.
#[derive(Clone, Debug)]
pub struct MigrationOptions {
    /// Where it is waited for.
    pub destination: Address,
    /// How RAM gets there.
    pub mode: Mode,
    /// How long the guest may stand still for the last round of a precopy.
    pub downtime: Duration,
    /// How long a precopy may take.
    pub timeout: Duration,
    /// And what then.
    pub timeout_strategy: TimeoutStrategy,
    /// Connections for what nobody waits for.
    pub connections: usize,
    /// For TLS over TCP, with these certificates.
    pub tls_directory: Option<PathBuf>,
    /// A VM that is still arriving itself is sent on when it has all pages; otherwise that is refused.
    pub wait_for_arrival: bool,
    /// Where it is written down whose the VM is.
    pub record: Option<PathBuf>,
}

impl MigrationOptions {
    /// To `destination`, as is best for most.
    pub fn to(destination: Address) -> Self {
        Self {
            destination,
            mode: Mode::Hybrid,
            downtime: Duration::from_millis(300),
            timeout: Duration::from_mins(1),
            timeout_strategy: TimeoutStrategy::Switch,
            connections: 1,
            tls_directory: None,
            wait_for_arrival: false,
            record: None,
        }
    }

    fn credentials(&self) -> Result<Option<Credentials>, MigrationError> {
        let directory = self.tls_directory.as_deref();
        Ok(directory.map(Credentials::load).transpose()?)
    }
}

/// Where it is written down whose a VM is, if its API socket is at `socket`.
pub(crate) fn record_beside(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".migration");
    path.into()
}

/// Why a VM was not moved. It runs, or stands still, where it was, as before.
#[derive(Debug, Error)]
pub enum MigrationError {
    /// It does not run.
    #[error("the VM cannot be sent: it is {0}")]
    WrongState(VmState),
    /// Another request has not ended yet.
    #[error("another request is being served")]
    Busy,
    /// It has not all its pages itself.
    #[error(
        "the VM is still arriving here, {0} pages are missing: wait (wait=on), or try again when it has all"
    )]
    Arriving(u64),
    /// Its absent pages cannot be had by this process.
    #[error(
        "{0} pages are not loaded yet, and their source is another process's: load them first (--memory fill=sequential)"
    )]
    SourceElsewhere(u64),
    /// No certificates.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// Nobody waits for it.
    #[error("cannot connect to {destination}")]
    Connect {
        /// Where.
        destination: String,
        /// Why.
        source: io::Error,
    },
    /// Who is there does not take it.
    #[error("{destination} does not take the VM")]
    Call {
        /// Where.
        destination: String,
        /// Why.
        source: CallError,
    },
    /// It is of another version.
    #[error("{0} is too old to take a VM: it speaks an earlier version of the protocol")]
    TooOld(String),
    /// It says no, or no more.
    #[error("{destination} does not take the VM: {reason}")]
    Refused {
        /// Where.
        destination: String,
        /// In its words.
        reason: String,
    },
    /// The connection was lost before the VM was handed over.
    #[error("the connection to {destination} was lost before the VM was handed over")]
    Lost {
        /// Where.
        destination: String,
        /// Why.
        source: ChannelError,
    },
    /// The destination said nothing.
    #[error("{0} did not answer in time")]
    Silent(String),
    /// Somebody wanted it so.
    #[error("the migration was cancelled")]
    Cancelled,
    /// There was no end to it.
    #[error("the guest writes faster than its memory can be sent: {left} pages were left after {} s", after.as_secs())]
    TimedOut {
        /// Pages that were still to be sent.
        left: u64,
        /// After how long.
        after: Duration,
    },
    /// A vCPU does not stop.
    #[error("the VM could not be paused for its migration")]
    Pause(#[from] PauseError),
    /// Its state cannot be read.
    #[error(transparent)]
    State(#[from] SnapshotError),
    /// Its state cannot be sent.
    #[error("cannot send the VM's state")]
    Encode(#[from] StateError),
    /// KVM does not say which pages have changed.
    #[error("cannot tell which pages have changed")]
    Changes(#[from] VmError),
    /// Its memory cannot be read.
    #[error("cannot read guest memory: {0}")]
    Memory(String),
    /// It cannot be written down whose the VM is.
    #[error("cannot write '{}'", path.display())]
    Record {
        /// Where to.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody took the VM back.
    #[error("the VM was taken back")]
    TakenBack,
    /// The VM has ended.
    #[error("the VM has ended")]
    Ended,
    /// No thread.
    #[error("cannot begin a migration")]
    Os(#[source] io::Error),
}

/// What was done.
#[derive(Clone, Debug)]
pub struct MigrationSummary {
    /// How.
    pub mode: Mode,
    /// From the beginning to the moment at which the source was no longer needed.
    pub total: Duration,
    /// From the moment at which the guest was to stand still here to that at which it was known to run there.
    pub downtime: Duration,
    /// Bytes sent before the switch.
    pub precopy_bytes: u64,
    /// Bytes sent after it.
    pub postcopy_bytes: u64,
    /// Rounds before the switch.
    pub rounds: u32,
}

/// What the other side has to make, as a `Machine` frame says it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// Of the state that will come ([`snapshot::VERSION`]).
    pub(crate) version: u32,
    pub(crate) mode: Mode,
    pub(crate) ram_size: u64,
    pub(crate) page_size: u64,
    pub(crate) cpus: u32,
    /// Channels for what nobody waits for.
    pub(crate) connections: u32,
    pub(crate) async_pf: bool,
    pub(crate) tsc_khz: Option<u32>,
    pub(crate) cpu: CpuModel,
    pub(crate) read_only: Vec<SavedPages>,
}

/// What is looked at before the rest, which another version may have changed.
#[derive(Deserialize)]
struct ProbedDescription {
    version: u32,
}

impl Description {
    /// What the guest reads outside RAM.
    pub(crate) fn read_only_pages(&self) -> Result<Vec<ReadOnlyPages>, RomError> {
        self.read_only.iter().map(SavedPages::restore).collect()
    }

    fn encode(&self) -> Result<Vec<u8>, StateError> {
        Ok(serde_json::to_vec(self)?)
    }

    fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let ProbedDescription { version } = serde_json::from_slice(bytes)?;
        snapshot::check_version(version)?;
        let description: Self = serde_json::from_slice(bytes)?;
        description.check().map_err(StateError::Contradiction)?;
        Ok(description)
    }

    /// What cannot be, if anything cannot.
    fn check(&self) -> Result<(), String> {
        RamMap::new(self.ram_size).map_err(|error| error.to_string())?;
        if self.page_size != PAGE_SIZE {
            return Err(format!("its pages are of {} bytes", self.page_size));
        }
        if self.cpus == 0 {
            return Err("it has no vCPU".into());
        }
        if !(1..=MAX_CONNECTIONS as u32).contains(&self.connections) {
            return Err(format!("it comes by {} connections", self.connections));
        }
        if self.async_pf != self.cpu.has_async_page_faults() {
            return Err("its CPUID says something else of asynchronous page faults".into());
        }
        snapshot::check_read_only(&self.read_only)
    }
}
