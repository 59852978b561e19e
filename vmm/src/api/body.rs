//! What a request brings.

use std::path::Path;
use std::time::Duration;

use axum::body::{Body, HttpBody};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ApiError;
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
