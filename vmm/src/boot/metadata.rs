//! What a RAM image says of itself beside the RAM: how the guest in it is started.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Entry, Layout};

/// The metadata of an image made by this program, stored as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageMetadata {
    /// How the kernel is entered.
    pub entry: Entry,
    /// What the kernel reads as its command line.
    pub command_line: String,
    /// What was loaded: a file name, or `built-in`.
    pub kernel: String,
    /// Where the initramfs lies in guest-physical memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<Range<u64>>,
    /// Whether the kernel is known to be Linux, which is told more than its command line.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub linux: bool,
    /// How the pages that the layout does not use were filled, as `--fill` says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fill: Option<String>,
}

/// Why an image cannot be started.
#[derive(Debug, Error)]
pub enum MetadataError {
    /// It was made by something else, or by a later version.
    #[error("the image does not say how its guest is started")]
    Json(#[from] serde_json::Error),
}

impl ImageMetadata {
    /// The metadata of an image of `layout`.
    pub fn new(layout: &Layout, kernel: String, fill: Option<String>) -> Self {
        Self {
            entry: layout.boot_info().into(),
            command_line: layout.command_line().to_owned(),
            kernel,
            initramfs: layout.initramfs(),
            linux: layout.is_linux(),
            fill,
        }
    }

    /// As it is stored.
    pub fn encode(&self) -> Result<Vec<u8>, MetadataError> {
        Ok(serde_json::to_vec(self)?)
    }

    /// Reads what [`Self::encode`] made.
    pub fn decode(bytes: &[u8]) -> Result<Self, MetadataError> {
        Ok(serde_json::from_slice(bytes)?)
    }
}
