//! HTTP for whoever watches or controls this program: a few connections at a time, on a thread of its own.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Builder;
use tokio::sync::Semaphore;
use umem::link::{Listener, Stream};

/// Connections at a time; further ones wait.
const MAX_CONNECTIONS: usize = 16;

/// How long a client may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a connection may be there at all: nothing here takes long.
const LONGEST: Duration = Duration::from_mins(1);

/// How long nobody is taken after somebody could not be.
const PAUSE: Duration = Duration::from_millis(100);

/// Answers who connects to `listener`, for as long as this program runs.
pub(crate) fn serve(listener: Listener, router: Router) -> io::Result<()> {
    rustix::io::ioctl_fionbio(&listener, true)?;
    let runtime = Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new().name("http".into()).spawn(move || {
        if let Err(error) = runtime.block_on(take_all(listener, router)) {
            tracing::error!(%error, "no more HTTP is answered");
        }
    })?;
    Ok(())
}

/// A listener by its descriptor's number, as the runtime wants it.
#[derive(Debug)]
struct Descriptor(Listener);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

async fn take_all(listener: Listener, router: Router) -> io::Result<()> {
    // SAFETY: the listener owns its descriptor, which stays open and the same until the `AsyncFd` drops it.
    let listener = unsafe { AsyncFd::register(Descriptor(listener)) }.map_err(io::Error::other)?;
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let place = Arc::clone(&places)
            .acquire_owned()
            .await
            .map_err(io::Error::other)?;
        let mut ready = listener.readable().await?;
        let Ok(accepted) = ready.try_io(|listener| listener.get_ref().0.accept()) else {
            continue;
        };
        let router = router.clone();
        match accepted.and_then(connection) {
            Ok(stream) => drop(tokio::spawn(async move {
                answer(stream, router).await;
                drop(place);
            })),
            Err(error) => {
                tracing::warn!(%error, "cannot take an HTTP connection");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

trait Connection: AsyncRead + AsyncWrite + Send {}

impl<T: AsyncRead + AsyncWrite + Send> Connection for T {}

fn connection(stream: Stream) -> io::Result<Pin<Box<dyn Connection>>> {
    rustix::io::ioctl_fionbio(&stream, true)?;
    Ok(match stream {
        Stream::Unix(stream) => Box::pin(UnixStream::from_std(stream)?),
        Stream::Tcp(stream) => Box::pin(TcpStream::from_std(stream)?),
        // No listener that is given to `serve` makes one.
        Stream::Tls(_) => return Err(io::ErrorKind::Unsupported.into()),
    })
}

async fn answer(stream: Pin<Box<dyn Connection>>, router: Router) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    if let Ok(Err(error)) = tokio::time::timeout(LONGEST, connection).await {
        tracing::debug!(%error, "HTTP connection ended");
    }
}
