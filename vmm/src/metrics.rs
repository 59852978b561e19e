//! A VM's metrics, for Prometheus and others. `docs/api.md` lists them.

use std::fmt;

use umem::metrics::{Page, Unit};
use umem::pager::FaultClass;

use crate::control::{Control, Counters, VmState};

/// All of them as they are now.
pub fn text(control: &Control) -> String {
    let (state, counters) = (control.state(), control.counters());
    umem::metrics::encode(move |page| {
        write_state(page, state)?;
        counters.as_ref().map_or(Ok(()), |counters| write(page, counters))
    })
}

fn write_state(page: &mut Page<'_>, state: VmState) -> fmt::Result {
    page.gauges(
        "umem_vm_state",
        "1 for what the VM does, 0 for the rest",
        VmState::ALL
            .into_iter()
            .map(|one| ([("state", one.name())], u64::from(one == state))),
    )
}

fn write(page: &mut Page<'_>, counters: &Counters) -> fmt::Result {
    let Counters { pager, exits, .. } = counters;
    page.gauge("umem_vm_vcpus", "vCPUs", u64::from(counters.vcpus))?;
    let states = [
        ("absent", pager.states.absent),
        ("in-flight", pager.states.in_flight),
        ("present", pager.states.present),
        ("removed", pager.states.removed),
    ];
    page.gauges(
        "umem_vm_pages",
        "Pages of RAM of 4 KiB, by state",
        states.map(|(state, pages)| ([("state", state)], pages)),
    )?;
    let arrivals = [
        ("demand", pager.demand),
        ("prefetched", pager.prefetched),
        ("pushed", pager.pushed),
        ("zero", pager.zero),
    ];
    page.counters(
        "umem_vm_pages_arrived",
        "Pages that arrived, by how",
        arrivals.map(|(way, pages)| ([("arrival", way)], pages)),
    )?;
    page.counter(
        "umem_vm_pages_duplicate",
        "Pages that arrived though they were there",
        None,
        pager.duplicate,
    )?;
    let classes = FaultClass::ALL.into_iter().zip(&pager.fault_distributions);
    page.histograms(
        "umem_vm_fault",
        "Time from a page fault to the end of the wait for the page",
        classes.map(|(class, times)| ([("class", class.name())], times.clone())),
    )?;
    page.counter(
        "umem_vm_source",
        "Content of pages that came from the page source",
        Some(&Unit::Bytes),
        pager.source.bytes,
    )?;
    page.counter(
        "umem_vm_source_requests",
        "Requests that the page source answered, each a round trip",
        None,
        pager.source.requests,
    )?;
    page.counter(
        "umem_vm_source_reconnects",
        "Connections to the page source that were lost and made anew",
        None,
        pager.source.reconnects,
    )?;
    page.counters(
        "umem_vm_vcpu_exits",
        "Times that a vCPU left the guest, by why",
        exits
            .iter()
            .map(|(reason, count)| ([("reason", reason.name())], *count)),
    )
}
