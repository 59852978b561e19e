//! A client of a VM's API.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use indicatif::ProgressBar;
use serde_json::{Value, json};
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};
use umem::link::{Address, Stream};

use crate::cli::error::CommandError;
use crate::cli::progress;

/// How long a VM may take to be connected to.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);

/// How long it may take to answer: longer than anything that it does while it is asked.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why a VM did not do what it was asked.
#[derive(Debug, Error)]
pub(in crate::cli) enum CtlError {
    /// Nobody to ask.
    #[error("no VM answers at '{}'", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It does not speak HTTP, or stopped to.
    #[error("cannot talk with the VM at '{}'", path.display())]
    Http {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: hyper::Error,
    },
    /// It takes too long.
    #[error("the VM at '{}' did not answer within {} s", path.display(), PATIENCE.as_secs())]
    Silent {
        /// The socket.
        path: PathBuf,
    },
    /// It is something else.
    #[error("what answers at '{}' is no VM of this program", path.display())]
    Strange {
        /// The socket.
        path: PathBuf,
    },
    /// It says no.
    #[error("{0}")]
    Refused(String),
    /// This process lacks something.
    #[error("cannot begin to talk with a VM")]
    Os(#[source] io::Error),
}

/// A VM's API, from outside.
pub(super) struct Client {
    path: PathBuf,
    runtime: Runtime,
}

impl Client {
    /// That at this socket, which is not connected to yet.
    pub(super) fn new(path: &Path) -> Result<Self, CtlError> {
        Ok(Self {
            path: path.to_path_buf(),
            runtime: Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(CtlError::Os)?,
        })
    }

    /// What is asked for with GET.
    pub(super) fn get(&self, path: &str) -> Result<Value, CtlError> {
        self.ask(Method::GET, path, String::new())
    }

    /// What PUT answers.
    pub(super) fn put(&self, path: &str) -> Result<Value, CtlError> {
        self.ask(Method::PUT, path, String::new())
    }

    /// What PUT with this answers.
    pub(super) fn put_with(&self, path: &str, body: &Value) -> Result<Value, CtlError> {
        self.ask(Method::PUT, path, body.to_string())
    }

    /// Asks, and waits for all of the answer. Nothing at all is an empty object.
    fn ask(&self, method: Method, path: &str, body: String) -> Result<Value, CtlError> {
        self.runtime.block_on(async {
            let asked = async { self.whole(self.send(method, path, body).await?).await };
            let silent = |_| CtlError::Silent {
                path: self.path.clone(),
            };
            tokio::time::timeout(PATIENCE, asked).await.map_err(silent)?
        })
    }

    /// Hands on events, line by line, until there are no more.
    pub(super) fn events(
        &self,
        mut take: impl FnMut(&str) -> Result<(), CommandError>,
    ) -> Result<(), CommandError> {
        self.runtime.block_on(async {
            let mut events = self.listen().await?;
            while let Some(line) = events.next().await.map_err(|source| self.broken(source))? {
                take(&line)?;
            }
            Ok(())
        })
    }

    /// Has a snapshot made, however long it takes, and shows on a terminal how far it is.
    pub(super) fn snapshot(&self, wanted: &Value) -> Result<Value, CtlError> {
        let bar = progress::bar("snapshot", 0);
        self.runtime.block_on(async {
            // Before it begins, so that nothing is missed. Without events there is a snapshot all the same.
            let mut events = if bar.is_hidden() {
                None
            } else {
                self.listen().await.ok()
            };
            let asked = async {
                let response = self
                    .send(Method::PUT, "/api/v1/vm.snapshot", wanted.to_string())
                    .await?;
                self.whole(response).await
            };
            tokio::pin!(asked);
            let answer = loop {
                let line = async {
                    match &mut events {
                        Some(events) => events.next().await.ok().flatten(),
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    answer = &mut asked => break answer,
                    line = line => match line {
                        Some(line) => show(&bar, &line),
                        None => events = None,
                    },
                }
            };
            bar.finish_and_clear();
            answer
        })
    }

    async fn listen(&self) -> Result<Lines, CtlError> {
        let response = self.send(Method::GET, "/api/v1/events", String::new()).await?;
        if !response.status().is_success() {
            self.whole(response).await?;
            return Err(self.strange());
        }
        Ok(Lines {
            response,
            text: Vec::new(),
        })
    }

    async fn send(&self, method: Method, path: &str, body: String) -> Result<Response<Incoming>, CtlError> {
        let connected = Stream::connect(&Address::Unix(self.path.clone()), CONNECT_PATIENCE, None);
        let stream = connected
            .and_then(|stream| match stream {
                Stream::Unix(stream) => {
                    stream.set_nonblocking(true)?;
                    UnixStream::from_std(stream)
                }
                // It was asked for a Unix socket.
                Stream::Tcp(_) | Stream::Tls(_) => Err(io::ErrorKind::Unsupported.into()),
            })
            .map_err(|source| CtlError::Connect {
                path: self.path.clone(),
                source,
            })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|source| self.broken(source))?;
        // What becomes of it the request hears too.
        drop(tokio::spawn(connection));
        let mut request = Request::new(Full::<Bytes>::from(body));
        *request.method_mut() = method;
        *request.uri_mut() = path.parse().map_err(|_| self.strange())?;
        request
            .headers_mut()
            .insert(HOST, HeaderValue::from_static("localhost"));
        sender
            .send_request(request)
            .await
            .map_err(|source| self.broken(source))
    }

    async fn whole(&self, response: Response<Incoming>) -> Result<Value, CtlError> {
        let status = response.status();
        let is_json = response
            .headers()
            .get(CONTENT_TYPE)
            .is_none_or(|kind| kind == "application/json");
        let bytes = response
            .into_body()
            .collect()
            .await
            .map_err(|source| self.broken(source))?
            .to_bytes();
        if bytes.is_empty() && status.is_success() {
            return Ok(json!({}));
        }
        let value: Value = serde_json::from_slice(&bytes)
            .ok()
            .filter(|_| is_json)
            .ok_or_else(|| self.strange())?;
        if status.is_success() {
            return Ok(value);
        }
        let causes = value["causes"].as_array().into_iter().flatten();
        let said: Vec<&str> = value["error"]
            .as_str()
            .into_iter()
            .chain(causes.filter_map(Value::as_str))
            .collect();
        if said.is_empty() {
            return Err(self.strange());
        }
        Err(CtlError::Refused(said.join(": ")))
    }

    fn broken(&self, source: hyper::Error) -> CtlError {
        CtlError::Http {
            path: self.path.clone(),
            source,
        }
    }

    fn strange(&self) -> CtlError {
        CtlError::Strange {
            path: self.path.clone(),
        }
    }
}

/// Lines that come as they are written.
struct Lines {
    response: Response<Incoming>,
    /// What has come of those that were not handed on.
    text: Vec<u8>,
}

impl Lines {
    /// The next one. `None`: there are no more.
    async fn next(&mut self) -> Result<Option<String>, hyper::Error> {
        loop {
            if let Some(end) = self.text.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.text.drain(..=end).collect();
                return Ok(Some(String::from_utf8_lossy(&line).into_owned()));
            }
            let Some(frame) = self.response.body_mut().frame().await else {
                return Ok(None);
            };
            self.text.extend(frame?.data_ref().into_iter().flatten());
        }
    }
}

/// Shows what an event says of a snapshot.
fn show(bar: &ProgressBar, line: &str) {
    let event: Value = serde_json::from_str(line).unwrap_or_default();
    let properties = &event["properties"];
    if event["source"] == "snapshot"
        && let (Some(bytes), Some(total)) = (properties["bytes"].as_u64(), properties["total"].as_u64())
    {
        bar.set_length(total);
        bar.set_position(bytes);
    }
}
