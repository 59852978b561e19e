//! A VM that comes from another host: its state is waited for, and the moment at which it is this host's.

use std::sync::Arc;
use std::thread;

use umem::causes::chain;
use umem::pager::PagerError;

use super::{MachineConfig, MachineError, Parts, Start};
use crate::devices::{EventLoop, Stopper};
use crate::ending::Ending;
use crate::migration::{Arrival, ArrivalError};
use crate::snapshot::SnapshotState;

/// The state that a VM begins in, if it has run before; one that arrives is waited for. `None`: it is the end.
#[expect(clippy::option_option, reason = "an end, and a beginning with nothing")]
pub(super) fn begin_state(
    config: &MachineConfig,
    event_loop: &mut EventLoop,
) -> Result<Option<Option<Arc<SnapshotState>>>, MachineError> {
    let arrival = match &config.start {
        Start::Boot { .. } => return Ok(Some(None)),
        Start::Restore(saved) => return Ok(Some(Some(Arc::clone(saved)))),
        Start::Arrive(arrival, _) => arrival,
    };
    // From when the state is here until vCPUs run, the guest stands still.
    umem::step_forward();
    arrival.prepared();
    let wake = arrival.wake().map_err(MachineError::Os)?;
    if event_loop.run_until(wake, || arrival.has_state())?.is_some() {
        arrival.give_up("it was stopped where the VM was to go");
        return Ok(None);
    }
    arrival.lap("woken");
    let saved = arrival.take_state()?;
    arrival.lap("decoded");
    Ok(Some(Some(Arc::new(saved))))
}

/// Lets a VM that arrived run when it is this host's, and ends it here if that comes to nothing.
pub(super) fn take_over(parts: &Arc<Parts>, stopper: Stopper) {
    let Some(arrival) = parts.arrival.clone() else {
        return;
    };
    let parts = Arc::clone(parts);
    let on_failure = stopper.clone();
    let work = move || {
        umem::step_forward();
        if parts.vcpus.await_standing().is_ok() && arrival.load() {
            let stood = parts.vcpus.state_age();
            parts.vcpus.unpark();
            arrival.lap("unparked");
            arrival.runs(stood);
            // Not before: it would take time from what the guest waits for.
            parts.fill();
        } else {
            stopper.end(Ending::Stopped);
        }
    };
    let thread = thread::Builder::new().name("migration-arrival".into());
    if let Err(error) = thread.spawn(work) {
        tracing::error!(%error, "no thread for a VM that arrives");
        on_failure.end(Ending::Stopped);
    }
}

/// The VM has ended: its source is not needed any more, or hears that it is not wanted. Why it did not arrive, if it did not.
pub(super) fn end_arrival(
    arrival: Option<&Arrival>,
    restore_error: Option<&MachineError>,
    failure: Option<&Arc<PagerError>>,
) -> Option<ArrivalError> {
    let arrival = arrival?;
    let error = arrival.error();
    match (restore_error, failure) {
        (Some(error), _) => arrival.give_up(&chain(error)),
        (None, Some(error)) => arrival.give_up(&chain(error)),
        (None, None) => arrival.give_up("it was stopped where the VM was to go"),
    }
    if arrival.is_mine() {
        arrival.finish();
    }
    // Before it was this side's, a page that cannot be had is a migration that failed.
    error.or_else(|| failure.and_then(|_| arrival.error()))
}
