//! What a request is refused with.

use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use thiserror::Error;
use umem::causes::causes;

use crate::control::{CancelError, PauseError, ResizeError, ResumeError, ShutdownError, TakeBackError};
use crate::migration::MigrationError;
use crate::snapshot::SnapshotError;

/// Why a request is not served.
#[derive(Debug, Error)]
pub(super) enum ApiError {
    /// There is nothing of that name.
    #[error("there is no '{0}' here (docs/openapi.json lists what there is)")]
    NoSuchPath(String),
    /// It is not asked for in this way.
    #[error("{method} is not for '{path}', {allowed} is")]
    WrongMethod {
        /// How it was asked for.
        method: String,
        /// What.
        path: String,
        /// How it may be asked for.
        allowed: String,
    },
    /// The body is too long to be meant seriously.
    #[error("the request's body is longer than {0} bytes")]
    TooLarge(usize),
    /// The body did not come to its end in time.
    #[error("the request's body did not come within {0} s")]
    TooSlow(u64),
    /// The body broke off.
    #[error("the request's body cannot be read")]
    BrokenBody(#[source] axum::Error),
    /// The body is not what is taken here.
    #[error("the request's body is not understood")]
    BadBody(#[source] serde_json::Error),
    /// There no snapshot can go.
    #[error("a snapshot cannot go to '{0}': expected file: and the absolute path of a directory")]
    BadDestination(String),
    /// There no base can be.
    #[error(
        "a snapshot cannot be laid over '{0}': expected file: and the absolute path of a snapshot or an image"
    )]
    BadBase(String),
    /// There no VM is waited for.
    #[error("a VM cannot go to '{0}': expected tcp:HOST:PORT, or unix: and an absolute path")]
    BadMigrationDestination(String),
    /// It cannot be sent so.
    #[error("{0}")]
    BadMigration(String),
    /// More than there is room for.
    #[error("{0} clients listen to events, and no more may")]
    TooManyListeners(usize),
    /// It was not paused.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// It was not resumed.
    #[error(transparent)]
    Resume(#[from] ResumeError),
    /// There is no snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// It was not moved.
    #[error(transparent)]
    Migration(#[from] MigrationError),
    /// It is being moved all the same.
    #[error(transparent)]
    Cancel(#[from] CancelError),
    /// It was not taken back.
    #[error(transparent)]
    TakeBack(#[from] TakeBackError),
    /// The balloon was not resized.
    #[error(transparent)]
    Resize(#[from] ResizeError),
    /// Nobody can watch from outside.
    #[error("nobody is told of invalidations: run the VM with --invalidations")]
    NoInvalidations,
    /// It was not told to end.
    #[error(transparent)]
    Shutdown(#[from] ShutdownError),
    /// This program is broken.
    #[error("the request was not served to its end")]
    Broken(#[source] tokio::task::JoinError),
    /// This program is broken.
    #[error("the answer cannot be written")]
    Unwritable(#[source] serde_json::Error),
}

/// An error as clients see it.
#[derive(Serialize)]
struct ErrorView {
    /// What was not done.
    error: String,
    /// Why, and why that.
    causes: Vec<String>,
}

impl ApiError {
    fn status(&self) -> StatusCode {
        match self {
            Self::NoSuchPath(_) => StatusCode::NOT_FOUND,
            Self::WrongMethod { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::TooSlow(_) => StatusCode::REQUEST_TIMEOUT,
            Self::BrokenBody(_)
            | Self::BadBody(_)
            | Self::BadDestination(_)
            | Self::BadBase(_)
            | Self::BadMigrationDestination(_)
            | Self::BadMigration(_)
            | Self::Resize(ResizeError::TooLarge { .. } | ResizeError::Unaligned(_)) => {
                StatusCode::BAD_REQUEST
            }
            // It may be served later.
            Self::TooManyListeners(_)
            | Self::Pause(PauseError::Busy | PauseError::VcpuWaits { .. } | PauseError::DeviceBusy { .. })
            | Self::Snapshot(
                SnapshotError::Busy
                | SnapshotError::Pause(
                    PauseError::Busy | PauseError::VcpuWaits { .. } | PauseError::DeviceBusy { .. },
                ),
            )
            | Self::Migration(MigrationError::Busy | MigrationError::Arriving(_))
            | Self::Resume(ResumeError::Busy) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Pause(PauseError::AlreadyPaused | PauseError::WrongState(_))
            | Self::Resume(ResumeError::WrongState(_))
            | Self::Snapshot(SnapshotError::WrongState(_) | SnapshotError::Pause(_))
            | Self::Migration(MigrationError::WrongState(_))
            | Self::Cancel(_)
            | Self::TakeBack(_)
            | Self::Resize(ResizeError::NoBalloon | ResizeError::WrongState(_))
            | Self::NoInvalidations
            | Self::Shutdown(ShutdownError::Stopped) => StatusCode::CONFLICT,
            Self::Migration(_) => StatusCode::BAD_GATEWAY,
            Self::Snapshot(_) | Self::Broken(_) | Self::Unwritable(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut said = causes(&self);
        let error = said.remove(0);
        // Two texts can be written.
        let text = serde_json::to_vec(&ErrorView { error, causes: said }).unwrap_or_default();
        (self.status(), [(CONTENT_TYPE, "application/json")], text).into_response()
    }
}
