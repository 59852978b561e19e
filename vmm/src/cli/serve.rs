//! `umem serve`.

use std::collections::HashMap;
use std::net::ToSocketAddrs;
use std::path::PathBuf;
use std::str::FromStr;
use std::thread;

use clap::Args;
use umem::image::Image;
use umem::link::{Address, Credentials, Listener};
use umem::server::Server;

use super::error::CommandError;
use crate::signals;

/// What `umem serve` takes.
#[derive(Debug, Args)]
pub(super) struct ServeOptions {
    /// Where to listen: unix:PATH or tcp:HOST:PORT
    #[arg(long, value_name = "URL")]
    listen: Address,
    /// An image and the name that it is asked for by; may be given several times
    #[arg(long = "image", value_name = "NAME=FILE", required = true)]
    images: Vec<NamedImage>,
    /// TLS 1.3 over TCP, with ca.pem, cert.pem and key.pem in DIR: only who has a certificate of that CA is served
    #[arg(long, value_name = "DIR", conflicts_with = "allow_plaintext")]
    tls_dir: Option<PathBuf>,
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
    let credentials = match (&options.listen, &options.tls_dir) {
        (Address::Unix(_), Some(_)) => {
            return Err(CommandError::Usage(format!(
                "--tls-dir is for TCP, and {} is a Unix socket, which is guarded by its file's permissions and needs no TLS",
                options.listen
            )));
        }
        (Address::Tcp(host_and_port), None) if !options.allow_plaintext && !is_loopback(host_and_port) => {
            return Err(CommandError::Usage(format!(
                "{} can be reached from other hosts, and whoever reaches it can read the images: listen on 127.0.0.1 or \
                 [::1], use --tls-dir, or say --allow-plaintext",
                options.listen
            )));
        }
        (_, directory) => directory.as_deref().map(Credentials::load).transpose()?,
    };
    // Before any thread is started, so that all of them leave the signals to the one that waits for them.
    signals::block(&[libc::SIGINT, libc::SIGTERM]).map_err(|error| CommandError::Serve(error.into()))?;
    let listener = Listener::bind_with(&options.listen, credentials)?;
    let server = Server::new(images).map_err(CommandError::Serve)?;
    let stopper = server.stopper();
    thread::spawn(move || {
        signals::wait_for(&[libc::SIGINT, libc::SIGTERM]);
        stopper.stop();
    });
    let address = listener.address().map_err(CommandError::Serve)?;
    say!("serving at {address}");
    server.serve(&listener).map_err(CommandError::Serve)?;
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

fn is_loopback(host_and_port: &str) -> bool {
    host_and_port
        .to_socket_addrs()
        .is_ok_and(|mut addresses| addresses.all(|address| address.ip().is_loopback()))
}
