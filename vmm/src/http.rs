//! HTTP for whoever watches or controls this program: a few connections at a time, on a thread of its own.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Builder;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use umem::link::{Listener, Stream};

/// How long a client may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long the last answers may take, at the end.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// How long nobody is taken after somebody could not be.
const PAUSE: Duration = Duration::from_millis(100);

/// What clients may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Connections at a time; further ones wait.
    pub(crate) connections: usize,
    /// How long a connection may be there at all.
    pub(crate) longest: Option<Duration>,
}

/// Answers HTTP until it is dropped, which lets requests that are being answered be answered to their end, but not for long.
#[derive(Debug)]
pub(crate) struct Server {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Answers who connects to `listener`.
    pub(crate) fn start(listener: Listener, router: Router, limits: Limits) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&listener, true)?;
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let thread = thread::Builder::new().name("http".into()).spawn(move || {
            if let Err(error) = runtime.block_on(take_all(listener, router, limits, stopped)) {
                tracing::error!(%error, "no more HTTP is answered");
            }
            // What a request has begun on another thread is not waited for.
            runtime.shutdown_background();
        })?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that answers HTTP panicked");
        }
    }
}

/// A listener by its descriptor's number, as the runtime wants it.
#[derive(Debug)]
struct Descriptor(Listener);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

async fn take_all(
    listener: Listener,
    router: Router,
    limits: Limits,
    mut stopped: oneshot::Receiver<()>,
) -> io::Result<()> {
    // SAFETY: the listener owns its descriptor, which stays open and the same until the `AsyncFd` drops it.
    let listener = unsafe { AsyncFd::register(Descriptor(listener)) }.map_err(io::Error::other)?;
    let places = Arc::new(Semaphore::new(limits.connections));
    let ending = GracefulShutdown::new();
    loop {
        let taken = tokio::select! {
            taken = take(&listener, &places) => taken?,
            _ = &mut stopped => break,
        };
        let Some((accepted, place)) = taken else {
            continue;
        };
        let (router, watcher) = (router.clone(), ending.watcher());
        match accepted.and_then(connection) {
            Ok(stream) => drop(tokio::spawn(async move {
                answer(stream, router, limits, watcher).await;
                drop(place);
            })),
            Err(error) => {
                tracing::warn!(%error, "cannot take an HTTP connection");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    // Who comes now is to find nobody.
    drop(listener);
    let _ = tokio::time::timeout(LAST_WORDS, ending.shutdown()).await;
    Ok(())
}

/// Waits for a place and for somebody to take it. `None`: he is gone again.
async fn take(
    listener: &AsyncFd<Descriptor>,
    places: &Arc<Semaphore>,
) -> io::Result<Option<(io::Result<Stream>, OwnedSemaphorePermit)>> {
    let place = Arc::clone(places)
        .acquire_owned()
        .await
        .map_err(io::Error::other)?;
    let mut ready = listener.readable().await?;
    let accepted = ready.try_io(|listener| listener.get_ref().0.accept());
    Ok(accepted.ok().map(|accepted| (accepted, place)))
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

async fn answer(stream: Pin<Box<dyn Connection>>, router: Router, limits: Limits, watcher: Watcher) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let connection = watcher.watch(connection);
    let ended = match limits.longest {
        Some(longest) => tokio::time::timeout(longest, connection).await.unwrap_or(Ok(())),
        None => connection.await,
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "HTTP connection ended");
    }
}
