//! What a request brings.

use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use umem::link::Address;
use umem::source::remote::MAX_CONNECTIONS;

use super::error::ApiError;
use crate::migration::{MigrationOptions, Mode, TimeoutStrategy};
use crate::snapshot::{SnapshotOptions, Then};

/// The most that a body may be: far more than any request needs.
const MOST: usize = 64 << 10;

/// How long a body may take to come.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a request has to say that says nothing: no body, or an empty object.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

/// `vm.snapshot`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SnapshotRequest {
    /// Where it goes: `file:` and the absolute path of a directory.
    destination_url: String,
    /// The snapshot that it is laid over: `file:` and the absolute path of a directory or a file.
    base_url: Option<String>,
    #[serde(default)]
    then: ThenRequest,
}

/// `vm.resize`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ResizeRequest {
    /// How much of RAM the balloon is to hold, in bytes.
    pub(super) desired_balloon: u64,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ThenRequest {
    #[default]
    GoOn,
    Stop,
}

impl SnapshotRequest {
    /// What is to be made.
    pub(super) fn options(self) -> Result<SnapshotOptions, ApiError> {
        let Some(directory) = absolute(&self.destination_url) else {
            return Err(ApiError::BadDestination(self.destination_url));
        };
        let mut options = SnapshotOptions::new(directory);
        if let Some(url) = self.base_url {
            let Some(base) = absolute(&url) else {
                return Err(ApiError::BadBase(url));
            };
            options.base = Some(base.to_owned());
        }
        options.then = match self.then {
            ThenRequest::GoOn => Then::GoOn,
            ThenRequest::Stop => Then::Stop,
        };
        Ok(options)
    }
}

/// `vm.send-migration`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MigrationRequest {
    /// Where the VM is waited for: `tcp:HOST:PORT` or `unix:PATH`.
    destination_url: String,
    memory_mode: Option<Mode>,
    downtime_ms: Option<u64>,
    timeout_s: Option<u64>,
    timeout_strategy: Option<TimeoutStrategyRequest>,
    connections: Option<usize>,
    /// An absolute path.
    tls_dir: Option<PathBuf>,
    /// A VM that is still arriving is sent on when it has all pages.
    #[serde(default)]
    wait: bool,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum TimeoutStrategyRequest {
    Cancel,
    Switch,
}

impl MigrationRequest {
    /// How the VM is to be sent.
    pub(super) fn options(self, record: Option<PathBuf>) -> Result<MigrationOptions, ApiError> {
        let destination = match self.destination_url.parse() {
            Ok(Address::Unix(path)) if !path.is_absolute() => None,
            address => address.ok(),
        };
        let Some(destination) = destination else {
            return Err(ApiError::BadMigrationDestination(self.destination_url));
        };
        if let Some(directory) = self.tls_dir.as_ref().filter(|directory| !directory.is_absolute()) {
            return Err(ApiError::BadMigration(format!(
                "tls_dir '{}' is no absolute path",
                directory.display()
            )));
        }
        if self.tls_dir.is_some() && !matches!(destination, Address::Tcp(_)) {
            return Err(ApiError::BadMigration(format!(
                "tls_dir is for TCP, which {destination} is not"
            )));
        }
        let mut options = MigrationOptions::to(destination);
        if let Some(connections) = self.connections {
            if !(1..=MAX_CONNECTIONS).contains(&connections) {
                return Err(ApiError::BadMigration(format!(
                    "connections={connections} is not from 1 to {MAX_CONNECTIONS}"
                )));
            }
            options.connections = connections;
        }
        options.mode = self.memory_mode.unwrap_or(options.mode);
        options.downtime = self.downtime_ms.map_or(options.downtime, Duration::from_millis);
        options.timeout = self.timeout_s.map_or(options.timeout, Duration::from_secs);
        options.timeout_strategy = match self.timeout_strategy {
            None => options.timeout_strategy,
            Some(TimeoutStrategyRequest::Cancel) => TimeoutStrategy::Cancel,
            Some(TimeoutStrategyRequest::Switch) => TimeoutStrategy::Switch,
        };
        options.tls_directory = self.tls_dir;
        options.wait_for_arrival = self.wait;
        options.record = record;
        Ok(options)
    }
}

/// `vm.take-back`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TakeBackRequest {
    /// Of the migration that is in doubt.
    pub(super) token: String,
}

/// The path of a `file:` URL, if it is absolute: this program's current directory is not its client's.
fn absolute(url: &str) -> Option<&Path> {
    url.strip_prefix("file:")
        .map(Path::new)
        .filter(|path| path.is_absolute())
}

/// The body as a `T`; without a body, what `{}` is.
///
/// One that says itself that it is too long is not read at all.
pub(super) async fn read<T: DeserializeOwned>(body: Body) -> Result<T, ApiError> {
    if body.size_hint().lower() > MOST as u64 {
        return Err(ApiError::TooLarge(MOST));
    }
    let bytes = tokio::time::timeout(PATIENCE, Limited::new(body, MOST).collect())
        .await
        .map_err(|_| ApiError::TooSlow(PATIENCE.as_secs()))?
        .map_err(|error| {
            if error.is::<LengthLimitError>() {
                ApiError::TooLarge(MOST)
            } else {
                ApiError::BrokenBody(axum::Error::new(error))
            }
        })?
        .to_bytes();
    let text: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
    // An object and nothing else: what is derived would take its values in a list too.
    let object: Map<String, Value> = serde_json::from_slice(text).map_err(ApiError::BadBody)?;
    serde_json::from_value(object.into()).map_err(ApiError::BadBody)
}
