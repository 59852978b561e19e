//! The control API of a running VM: HTTP/1.1 and JSON at a Unix socket that is its owner's alone. `docs/openapi.json` describes
//! it, and `docs/api.md` says how it is used.
//!
//! It is answered by a thread of its own. What takes long is done by further ones, and nothing of a client's is waited for
//! without a limit, so that a client holds up neither the VM nor another client.

mod body;
mod error;
mod view;

use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{ALLOW, CONTENT_TYPE};
use axum::http::{HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, on};
use serde::Serialize;
use tokio::sync::Semaphore;
use tokio_stream::StreamExt;
use umem::link::{Address, Listener};

use self::body::{MigrationRequest, Nothing, ResizeRequest, SnapshotRequest, TakeBackRequest, read};
use self::error::ApiError;
use crate::address_map::PAGE_SIZE;
use crate::control::Control;
use crate::events::{Event, Events};
use crate::migration::record_beside;
use crate::snapshot::SnapshotProgress;
use crate::{http, metrics};

/// Connections at a time; further ones wait until one of them ends, which takes a client that says nothing ten seconds.
const CONNECTIONS: usize = 64;

/// Clients that listen to events at a time.
const LISTENERS: usize = 16;

/// How often progress is told.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// What a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Ping,
    Info,
    Counters,
    Pause,
    Resume,
    Snapshot,
    SendMigration,
    CancelMigration,
    TakeBack,
    Resize,
    Invalidations,
    Shutdown,
    Events,
    Metrics,
}

/// Everything that can be asked for, and how.
const ROUTES: [(Method, &str, Verb); 14] = [
    (Method::GET, "/api/v1/vmm.ping", Verb::Ping),
    (Method::GET, "/api/v1/vm.info", Verb::Info),
    (Method::GET, "/api/v1/vm.counters", Verb::Counters),
    (Method::PUT, "/api/v1/vm.pause", Verb::Pause),
    (Method::PUT, "/api/v1/vm.resume", Verb::Resume),
    (Method::PUT, "/api/v1/vm.snapshot", Verb::Snapshot),
    (Method::PUT, "/api/v1/vm.send-migration", Verb::SendMigration),
    (Method::PUT, "/api/v1/vm.cancel-migration", Verb::CancelMigration),
    (Method::PUT, "/api/v1/vm.take-back", Verb::TakeBack),
    (Method::PUT, "/api/v1/vm.resize", Verb::Resize),
    (Method::GET, "/api/v1/vm.invalidations", Verb::Invalidations),
    (Method::PUT, "/api/v1/vm.shutdown", Verb::Shutdown),
    (Method::GET, "/api/v1/events", Verb::Events),
    (Method::GET, "/metrics", Verb::Metrics),
];

/// The API of one VM.
struct Api {
    control: Control,
    events: Events,
    started: Instant,
    /// Where it is written down whose a VM is that moves.
    record: Option<PathBuf>,
    /// Room for those who listen to events.
    listeners: Arc<Semaphore>,
}

/// An API that is answered, until it is dropped.
#[derive(Debug)]
pub struct ApiServer {
    _server: http::Server,
}

impl ApiServer {
    /// Answers at `listener` for the VM under `control`, of which `events` tell. `started` is when the program began.
    pub fn start(listener: Listener, control: Control, events: Events, started: Instant) -> io::Result<Self> {
        let record = match listener.address()? {
            Address::Unix(path) => Some(record_beside(&path)),
            Address::Tcp(_) => None,
        };
        let api = Arc::new(Api {
            control,
            events,
            started,
            record,
            listeners: Arc::new(Semaphore::new(LISTENERS)),
        });
        let limits = http::Limits {
            connections: CONNECTIONS,
            // Whoever listens to events may do so for as long as the VM runs.
            longest: None,
        };
        let server = http::Server::start(listener, router(&api), limits)?;
        Ok(Self { _server: server })
    }
}

fn router(api: &Arc<Api>) -> Router {
    let mut router = Router::new();
    for (method, path, verb) in ROUTES {
        let api = Arc::clone(api);
        // Those methods that there are in `ROUTES` all are.
        let filter = MethodFilter::try_from(method).unwrap_or(MethodFilter::GET);
        let answer = async move |request| api.answer(verb, request).await;
        router = router.route(path, on(filter, answer));
    }
    router
        .method_not_allowed_fallback(wrong_method)
        .fallback(async |request: Request| ApiError::NoSuchPath(request.uri().path().to_owned()))
}

async fn wrong_method(request: Request) -> Response {
    let path = request.uri().path();
    let allowed = ROUTES.iter().find(|route| route.1 == path);
    let allowed = allowed.map_or_else(String::new, |(method, ..)| method.to_string());
    let error = ApiError::WrongMethod {
        method: request.method().to_string(),
        path: path.to_owned(),
        allowed: allowed.clone(),
    };
    let mut response = error.into_response();
    if let Ok(allowed) = HeaderValue::from_str(&allowed) {
        response.headers_mut().insert(ALLOW, allowed);
    }
    response
}

impl Api {
    async fn answer(&self, verb: Verb, request: Request) -> Result<Response, ApiError> {
        let body = request.into_body();
        match verb {
            Verb::Ping => read::<Nothing>(body).await.and_then(|_| json(&view::Ping::new())),
            Verb::Info => {
                read::<Nothing>(body).await?;
                let (control, started) = (self.control.clone(), self.started);
                json(&blocking(move || view::Info::new(&control, started)).await?)
            }
            Verb::Counters => {
                read::<Nothing>(body).await?;
                let control = self.control.clone();
                json(&blocking(move || view::counters(&control)).await?)
            }
            Verb::Pause => {
                read::<Nothing>(body).await?;
                let control = self.control.clone();
                blocking(move || control.pause()).await??;
                Ok(done())
            }
            Verb::Resume => {
                read::<Nothing>(body).await?;
                let control = self.control.clone();
                blocking(move || control.resume()).await??;
                Ok(done())
            }
            Verb::Snapshot => {
                let wanted: SnapshotRequest = read(body).await?;
                let options = wanted.options()?;
                let (control, events) = (self.control.clone(), self.events.clone());
                let made = blocking(move || control.snapshot(&options, &mut told_to(&events))).await??;
                json(&view::Snapshot::new(&made))
            }
            Verb::SendMigration => {
                let wanted: MigrationRequest = read(body).await?;
                let options = wanted.options(self.record.clone())?;
                let (control, events) = (self.control.clone(), self.events.clone());
                let sent = blocking(move || {
                    let _telling = Telling::start(&control, &events);
                    control.send_migration(&options)
                });
                json(&view::Migrated::new(&sent.await??))
            }
            Verb::CancelMigration => {
                read::<Nothing>(body).await?;
                self.control.cancel_migration()?;
                Ok(done())
            }
            Verb::TakeBack => {
                let wanted: TakeBackRequest = read(body).await?;
                self.control.take_back(&wanted.token)?;
                Ok(done())
            }
            Verb::Resize => {
                let wanted: ResizeRequest = read(body).await?;
                let control = self.control.clone();
                blocking(move || control.resize_balloon(wanted.desired_balloon)).await??;
                Ok(done())
            }
            Verb::Invalidations => {
                read::<Nothing>(body).await?;
                let invalidations = self.control.invalidations().ok_or(ApiError::NoInvalidations)?;
                json(&blocking(move || view::Watchers::new(&invalidations)).await?)
            }
            Verb::Shutdown => {
                read::<Nothing>(body).await?;
                self.control.shutdown()?;
                Ok(done())
            }
            Verb::Events => {
                read::<Nothing>(body).await?;
                self.events()
            }
            Verb::Metrics => {
                read::<Nothing>(body).await?;
                let control = self.control.clone();
                let text = blocking(move || metrics::text(&control)).await?;
                Ok(([(CONTENT_TYPE, umem::metrics::CONTENT_TYPE)], text).into_response())
            }
        }
    }

    /// Events for as long as there are any.
    fn events(&self) -> Result<Response, ApiError> {
        let place = Arc::clone(&self.listeners)
            .try_acquire_owned()
            .map_err(|_| ApiError::TooManyListeners(LISTENERS))?;
        let lines = self.events.listen().stream().map(move |line| {
            // Held for as long as somebody listens.
            let _place = &place;
            Ok::<_, Infallible>(line.as_bytes().to_vec())
        });
        let body = Body::from_stream(lines);
        Ok(([(CONTENT_TYPE, "application/x-ndjson")], body).into_response())
    }
}

/// Tells how far a snapshot is, in steps of a hundredth.
fn told_to(events: &Events) -> impl FnMut(SnapshotProgress) {
    let mut reached = 0;
    move |SnapshotProgress { done, total }| {
        let step = done * 100 / total.max(1);
        if step > reached {
            reached = step;
            events.tell(&Event::SnapshotProgress {
                done: done * PAGE_SIZE,
                total: total * PAGE_SIZE,
            });
        }
    }
}

/// Tells how far a migration is, until it is dropped.
struct Telling {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Telling {
    fn start(control: &Control, events: &Events) -> Self {
        let (control, events) = (control.clone(), events.clone());
        let (stop, stopped) = mpsc::channel();
        let tell = move || {
            while stopped.recv_timeout(PROGRESS_INTERVAL) == Err(mpsc::RecvTimeoutError::Timeout) {
                if let Some(status) = control.migration() {
                    events.tell(&Event::MigrationProgress(Box::new(status)));
                }
            }
        };
        // Without it there is no progress to be seen, and a migration all the same.
        let thread = thread::Builder::new()
            .name("migration-tell".into())
            .spawn(tell)
            .ok();
        Self {
            stop: Some(stop),
            thread,
        }
    }
}

impl Drop for Telling {
    fn drop(&mut self) {
        drop(self.stop.take());
        // It does not panic.
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

/// Does what may take a while, without holding up other requests.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(ApiError::Broken)
}

fn json(value: &impl Serialize) -> Result<Response, ApiError> {
    let text = serde_json::to_vec(value).map_err(ApiError::Unwritable)?;
    Ok(([(CONTENT_TYPE, "application/json")], text).into_response())
}

/// Done, and there is nothing to say about it.
fn done() -> Response {
    StatusCode::NO_CONTENT.into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use std::collections::BTreeSet;

    /// The document in the tree names exactly what is answered.
    #[test]
    fn the_document_has_every_route_and_no_other() {
        let document: Value = serde_json::from_str(include_str!("../../../docs/openapi.json")).unwrap();
        let described: BTreeSet<(String, String)> = document["paths"]
            .as_object()
            .unwrap()
            .iter()
            .flat_map(|(path, operations)| {
                let methods = operations.as_object().unwrap().keys();
                methods.map(move |method| (path.clone(), method.to_uppercase()))
            })
            .collect();
        let answered: BTreeSet<(String, String)> = ROUTES
            .iter()
            .map(|(method, path, _)| ((*path).to_owned(), method.to_string()))
            .collect();
        assert_eq!(described, answered);
    }
}
