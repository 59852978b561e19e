//! `umem serve`.

use std::collections::HashMap;
use std::net::ToSocketAddrs;
use std::path::PathBuf;
use std::str::FromStr;
use std::thread;

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use clap::Args;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use umem::image::Image;
use umem::link::{Address, ListenError, Listener};
use umem::server::Server;

use super::error::CommandError;
use crate::{http, signals};

/// What Prometheus and others take it for.
const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What `umem serve` takes.
#[derive(Debug, Args)]
pub(super) struct ServeOptions {
    /// Where to listen: unix:PATH or tcp:HOST:PORT
    #[arg(long, value_name = "URL")]
    listen: Address,
    /// An image and the name that it is asked for by; may be given several times
    #[arg(long = "image", value_name = "NAME=FILE", required = true)]
    images: Vec<NamedImage>,
    /// Answer HTTP requests for /metrics here, for Prometheus: unix:PATH or tcp:HOST:PORT
    #[arg(long, value_name = "URL")]
    metrics: Option<Address>,
    /// Let TCP be reached from other hosts, unencrypted and by anybody
    #[arg(long)]
    allow_plaintext: bool,
}

/// `NAME=FILE`.
#[derive(Clone, Debug)]
struct NamedImage {
    name: String,
    path: PathBuf,
}

impl FromStr for NamedImage {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, path))
                if !name.is_empty() && name.len() <= umem::wire::MAX_NAME && !path.is_empty() =>
            {
                Ok(Self {
                    name: name.to_owned(),
                    path: path.into(),
                })
            }
            _ => Err("expected NAME=FILE".into()),
        }
    }
}

pub(super) fn run(options: &ServeOptions) -> Result<(), CommandError> {
    let mut images = HashMap::new();
    for NamedImage { name, path } in &options.images {
        if images.insert(name.clone(), Image::open(path)?).is_some() {
            return Err(CommandError::Usage(format!("two images are named '{name}'")));
        }
    }
    for address in [Some(&options.listen), options.metrics.as_ref()]
        .into_iter()
        .flatten()
    {
        if !options.allow_plaintext && !is_loopback(address)? {
            return Err(CommandError::Usage(format!(
                "{address} can be reached from other hosts, and whoever reaches it can read what is there: listen on 127.0.0.1 \
                 or [::1], or say --allow-plaintext",
            )));
        }
    }
    raise_descriptor_limit();
    // Before any thread is started, so that all of them leave the signals to the one that waits for them.
    signals::block(&[libc::SIGINT, libc::SIGTERM]).map_err(|error| CommandError::Serve(error.into()))?;
    let listener = Listener::bind(&options.listen)?;
    let server = Server::new(images).map_err(CommandError::Serve)?;
    let metrics = options.metrics.as_ref().map(Listener::bind).transpose()?;
    let stopper = server.stopper();
    thread::spawn(move || {
        signals::wait_for(&[libc::SIGINT, libc::SIGTERM]);
        stopper.stop();
    });
    let address = listener.address().map_err(CommandError::Serve)?;
    say!("serving at {address}");
    if let Some(listener) = metrics {
        let address = listener.address().map_err(CommandError::Serve)?;
        let server = server.clone();
        let metrics = move || async move { ([(CONTENT_TYPE, METRICS_TYPE)], server.metrics()) };
        http::serve(listener, Router::new().route("/metrics", get(metrics))).map_err(CommandError::Serve)?;
        say!("metrics at {address}");
    }
    server.serve(listener).map_err(CommandError::Serve)?;
    let stats = server.stats();
    say!(
        "served channels={} refused={} requests={} pages={} bytes={}",
        stats.channels,
        stats.refused,
        stats.requests,
        stats.pages,
        stats.bytes
    );
    Ok(())
}

/// Whether nobody on another host can connect to `address`.
fn is_loopback(address: &Address) -> Result<bool, CommandError> {
    let Address::Tcp(host_and_port) = address else {
        return Ok(true);
    };
    let mut addresses = host_and_port
        .to_socket_addrs()
        .map_err(|source| ListenError::Io {
            address: address.to_string(),
            source,
        })?;
    Ok(addresses.all(|address| address.ip().is_loopback()))
}

/// A connection is a descriptor: as many as may be. Where it is refused, there are fewer connections.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}
