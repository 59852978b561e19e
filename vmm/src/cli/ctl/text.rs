//! What a VM's API answers, for people.

use indicatif::HumanBytes;
use serde_json::Value;

/// Who answers.
pub(super) fn ping(ping: &Value) -> String {
    format!(
        "umem {}, process {}\n",
        word(&ping["version"]),
        word(&ping["pid"])
    )
}

/// What the VM does, its pages, its faults.
pub(super) fn info(info: &Value) -> String {
    let mut lines = Vec::new();
    let mut line = |name: &str, what: String| lines.push(format!("{name:15}{what}\n"));
    line("state", word(&info["state"]));
    line(
        "process",
        format!("{} (umem {})", word(&info["pid"]), word(&info["version"])),
    );
    if let Some(status) = info.get("migration") {
        line("migration", migration(status));
    }
    let Some(pages) = info.get("pages") else {
        return lines.concat();
    };
    line("vCPUs", word(&info["vcpus"]));
    line("RAM", bytes(&info["memory_bytes"]));
    let count = |names: [&str; 4]| {
        names
            .map(|name| format!("{} {}", word(&pages[name]), name.replace('_', " ")))
            .join(", ")
    };
    line("pages", count(["present", "in_flight", "absent", "removed"]));
    line("arrived", count(["demand", "prefetched", "pushed", "zero"]));
    if let Some(balloon) = info.get("balloon") {
        line(
            "balloon",
            format!(
                "{} of {}; {} put in, {} taken out, {} reported as free",
                bytes(&balloon["actual"]),
                bytes(&balloon["target"]),
                bytes(&balloon["inflated"]),
                bytes(&balloon["deflated"]),
                bytes(&balloon["reported"])
            ),
        );
    }
    let source = &info["source"];
    line("source", word(&source["url"]));
    line(
        "",
        format!(
            "{} in {} requests, {} reconnects",
            bytes(&source["bytes"]),
            word(&source["requests"]),
            word(&source["reconnects"])
        ),
    );
    line("faults", latency(&info["demand_fault_us"]));
    for (class, times) in info["fault_classes_us"].as_object().into_iter().flatten() {
        line(&format!("  {class}"), latency(times));
    }
    for (name, key) in [
        ("first instr.", "time_to_first_instruction_ms"),
        ("all pages", "time_to_all_pages_ms"),
    ] {
        if let Some(time) = info.get(key) {
            line(name, format!("after {time} ms"));
        }
    }
    lines.concat()
}

fn latency(times: &Value) -> String {
    let figures =
        ["p50", "p90", "p99", "p999", "max"].map(|name| format!("{name} {} us", word(&times[name])));
    format!("{}: {}", word(&times["count"]), figures.join(", "))
}

/// A snapshot that was made.
pub(super) fn snapshot(made: &Value) -> String {
    format!(
        "{}: {} of {} pages hold something, {} were not loaded yet; the guest stood still for {} ms\n",
        word(&made["path"]),
        word(&made["data_pages"]),
        word(&made["pages"]),
        word(&made["absent_pages"]),
        word(&made["paused_ms"])
    )
}

/// A VM that has moved.
pub(super) fn migrated(moved: &Value) -> String {
    format!(
        "moved by {} in {} ms; the guest stood still for {} ms; {} sent before that in {} rounds, {} after\n",
        word(&moved["mode"]),
        word(&moved["total_ms"]),
        word(&moved["downtime_ms"]),
        bytes(&moved["precopy_bytes"]),
        word(&moved["rounds"]),
        bytes(&moved["postcopy_bytes"])
    )
}

/// Where a migration is.
fn migration(status: &Value) -> String {
    let mut text = format!(
        "{} {} {}, {} with {}; {} of {} left, {} sent in {} rounds",
        word(&status["mode"]),
        word(&status["direction"]),
        word(&status["phase"]),
        word(&status["token"]),
        word(&status["peer"]),
        bytes(&status["bytes_left"]),
        bytes(&status["bytes_total"]),
        bytes(&status["bytes_sent"]),
        word(&status["round"]),
    );
    for (name, key) in [
        ("expected downtime", "expected_downtime_ms"),
        ("downtime", "downtime_ms"),
    ] {
        if let Some(time) = status.get(key) {
            text = format!("{text}, {name} {time} ms");
        }
    }
    text
}

/// Counters, one a line.
pub(super) fn counters(counters: &Value) -> String {
    let groups = counters.as_object().into_iter().flatten();
    let lines = groups.flat_map(|(of, values)| {
        let values = values.as_object().into_iter().flatten();
        values.map(move |(name, value)| format!("{:30}{value}\n", format!("{of}.{name}")))
    });
    lines.collect::<Vec<_>>().concat()
}

/// Who watches guest-physical addresses from outside.
pub(super) fn invalidations(watchers: &Value) -> String {
    let mut lines = vec![format!(
        "{}: {} changes, {} of them where somebody watches; {} acknowledged, {} watchers too late, {} refused\n",
        word(&watchers["socket"]),
        word(&watchers["changes"]),
        word(&watchers["hits"]),
        word(&watchers["acknowledged"]),
        word(&watchers["late"]),
        word(&watchers["refused"])
    )];
    for client in watchers["clients"].as_array().into_iter().flatten() {
        let waits = client.get("acknowledge_within_ms");
        let waits = waits.map_or_else(String::new, |within| {
            format!(
                ", waited for up to {within} ms, has acknowledged {} of {}",
                word(&client["last_acknowledged"]),
                word(&client["last_begun"])
            )
        });
        lines.push(format!(
            "process {}: {} ranges, counter {}{waits}\n",
            word(&client["pid"]),
            word(&client["range_count"]),
            word(&client["counter"])
        ));
        for range in client["ranges"].as_array().into_iter().flatten() {
            let number = |name: &str| range[name].as_u64().unwrap_or(0);
            let (start, end) = (number("start"), number("end"));
            lines.push(format!("  {start:#x}-{end:#x} cookie {:#x}\n", number("cookie")));
        }
    }
    lines.concat()
}

/// An event from its line.
pub(super) fn event(line: &str) -> String {
    let Ok(event) = serde_json::from_str::<Value>(line) else {
        return line.to_owned();
    };
    let timestamp = &event["timestamp"];
    let part = |name| timestamp[name].as_u64().unwrap_or(0);
    let properties = event["properties"].as_object().into_iter().flatten();
    let properties: Vec<String> = properties
        .map(|(name, value)| format!(" {name}={}", word(value)))
        .collect();
    format!(
        "{:6}.{:03} {} {}{}\n",
        part("secs"),
        part("nanos") / 1_000_000,
        word(&event["source"]),
        word(&event["event"]),
        properties.concat()
    )
}

/// A value as people write it; `?` if it is not there.
fn word(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "?".into(),
        value => value.to_string(),
    }
}

fn bytes(value: &Value) -> String {
    value
        .as_u64()
        .map_or_else(|| word(value), |bytes| HumanBytes(bytes).to_string())
}
