//! `umem serve`.

use std::collections::HashMap;
use std::net::ToSocketAddrs;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use clap::{ArgGroup, Args};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use umem::handoff::PagerHost;
use umem::image::Image;
use umem::link::{Address, Credentials, ListenError, Listener};
use umem::server::Server;

use super::error::CommandError;
use crate::{http, signals};

/// A request for metrics takes no time.
const METRICS_LIMITS: http::Limits = http::Limits {
    connections: 16,
    longest: Some(Duration::from_mins(1)),
};

/// What `umem serve` takes.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("addresses").required(true).multiple(true))]
pub(super) struct ServeOptions {
    /// Where to listen: unix:PATH or tcp:HOST:PORT
    #[arg(long, value_name = "URL", group = "addresses")]
    listen: Option<Address>,
    /// Serve VMs on this host from inside their memory, which they hand over here (source=attach:PATH): unix:PATH
    #[arg(long, value_name = "URL", group = "addresses")]
    attach: Option<Address>,
    /// An image and the name that it is asked for by; may be given several times
    #[arg(long = "image", value_name = "NAME=FILE", required = true)]
    images: Vec<NamedImage>,
    /// TLS 1.3 over TCP, with ca.pem, cert.pem and key.pem in DIR: only who has a certificate of that CA is served
    #[arg(long, value_name = "DIR", conflicts_with = "allow_plaintext")]
    tls_dir: Option<PathBuf>,
    /// Answer HTTP requests for /metrics here, for Prometheus: unix:PATH or tcp:HOST:PORT
    #[arg(long, value_name = "URL", requires = "listen")]
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
        if images
            .insert(name.clone(), Arc::new(Image::open(path)?))
            .is_some()
        {
            return Err(CommandError::Usage(format!("two images are named '{name}'")));
        }
    }
    let credentials = check_exposure(options)?;
    raise_descriptor_limit();
    // Before any thread is started, so that all of them leave the signals to the one that waits for them.
    signals::block(&[libc::SIGINT, libc::SIGTERM]).map_err(|error| CommandError::Serve(error.into()))?;
    let listener = options
        .listen
        .as_ref()
        .map(|address| Listener::bind_with(address, credentials))
        .transpose()?;
    let attach = options.attach.as_ref().map(Listener::bind).transpose()?;
    let metrics = options.metrics.as_ref().map(Listener::bind).transpose()?;
    let host = PagerHost::new(images.clone()).map_err(CommandError::Serve)?;
    let server = Server::new(images).map_err(CommandError::Serve)?;
    let (stop_host, stop_server) = (host.stopper(), server.stopper());
    thread::spawn(move || {
        signals::wait_for(&[libc::SIGINT, libc::SIGTERM]);
        stop_host.stop();
        stop_server.stop();
    });
    for (listener, what) in [
        (&listener, "serving"),
        (&attach, "attaching"),
        (&metrics, "metrics"),
    ] {
        if let Some(listener) = listener {
            say!("{what} at {}", listener.address().map_err(CommandError::Serve)?);
        }
    }
    let metrics = metrics.map(|listener| {
        let server = server.clone();
        let metrics =
            move || async move { ([(CONTENT_TYPE, umem::metrics::CONTENT_TYPE)], server.metrics()) };
        let router = Router::new().route("/metrics", get(metrics));
        http::Server::start(listener, router, METRICS_LIMITS)
    });
    // Until the end.
    let _metrics = metrics.transpose().map_err(CommandError::Serve)?;
    thread::scope(|scope| {
        let attached = attach.map(|listener| {
            let host = &host;
            scope.spawn(move || host.serve(&listener))
        });
        let served = listener.map_or(Ok(()), |listener| server.serve(listener));
        if served.is_err() {
            host.stopper().stop();
        }
        // It does not panic.
        let attached = attached.and_then(|thread| thread.join().ok()).unwrap_or(Ok(()));
        served.and(attached)
    })
    .map_err(CommandError::Serve)?;
    if options.listen.is_some() {
        let stats = server.stats();
        say!(
            "served channels={} refused={} requests={} pages={} bytes={}",
            stats.channels,
            stats.refused,
            stats.requests,
            stats.pages,
            stats.bytes
        );
    }
    Ok(())
}

/// Refuses what would let strangers read the images, or what is there for nothing.
fn check_exposure(options: &ServeOptions) -> Result<Option<Credentials>, CommandError> {
    if let Some(address @ Address::Tcp(_)) = &options.attach {
        return Err(CommandError::Usage(format!(
            "--attach is for Unix sockets, over which memory can be handed, and {address} is none"
        )));
    }
    let tcp = matches!(options.listen, Some(Address::Tcp(_)));
    if options.tls_dir.is_some() && !tcp {
        return Err(CommandError::Usage(
            "--tls-dir is for TCP, and nothing listens there: a Unix socket is guarded by its file's permissions and needs no TLS"
                .into(),
        ));
    }
    let plaintext = [
        options.listen.as_ref().filter(|_| options.tls_dir.is_none()),
        options.metrics.as_ref(),
    ];
    for address in plaintext.into_iter().flatten() {
        refuse_exposure(address, false, options.allow_plaintext)?;
    }
    Ok(options.tls_dir.as_deref().map(Credentials::load).transpose()?)
}

/// Refuses an address that strangers can reach, unless they are kept out by TLS or are wanted.
pub(super) fn refuse_exposure(address: &Address, tls: bool, wanted: bool) -> Result<(), CommandError> {
    if tls && !matches!(address, Address::Tcp(_)) {
        return Err(CommandError::Usage(
            "--tls-dir is for TCP, and nothing listens there: a Unix socket is guarded by its file's permissions and needs no TLS"
                .into(),
        ));
    }
    if tls || wanted || is_loopback(address)? {
        return Ok(());
    }
    Err(CommandError::Usage(format!(
        "{address} can be reached from other hosts, by anybody and unencrypted: listen on 127.0.0.1 or [::1], use --tls-dir, or say \
         --allow-plaintext",
    )))
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
