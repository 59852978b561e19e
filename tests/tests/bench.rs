//! `umem bench`: not how fast anything is, but that figures are there, possible, and the same in all forms.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use serde_json::Value;
use tests::need;
use tests::program::Program;
use tests::scratch::Scratch;

#[test]
fn floors_and_figures_come_as_json_and_as_pictures() {
    need!(tests::host::kvm());
    let scratch = Scratch::new();
    let pictures = scratch.path("pictures");
    let bench = Program::umem(["bench", "--quick", "--json", "--svg"])
        .arg(&pictures)
        .run();
    bench.assert_code(0);
    let results: Value = serde_json::from_str(&bench.stdout).unwrap();
    let rows = |key: &str| results[key].as_array().unwrap().clone();
    let faults = rows("faults");
    assert!(faults.len() >= 5, "{bench}");
    for fault in &faults {
        let (floor, umem) = (&fault["floor"], &fault["umem"]);
        for wait in [floor, umem].into_iter().filter(|wait| wait.is_object()) {
            let (p50, p99) = (wait["p50_ns"].as_u64().unwrap(), wait["p99_ns"].as_u64().unwrap());
            assert!(0 < p50 && p50 <= p99, "{fault}");
        }
        if umem.is_object() {
            let ratio = umem["p50_ns"].as_f64().unwrap() / floor["p50_ns"].as_f64().unwrap();
            assert!(
                (fault["p50_ratio"].as_f64().unwrap() - ratio).abs() < 1e-9,
                "{fault}"
            );
        }
    }
    assert!(
        rows("rates")
            .iter()
            .any(|rate| rate["ratio"].as_f64() > Some(0.0)),
        "{bench}"
    );
    let starts = rows("start");
    assert_eq!(starts.len(), 2, "{bench}");
    assert!(
        starts
            .iter()
            .all(|start| start["own_memory_kib"].as_f64() > Some(0.0)),
        "{bench}"
    );
    for name in ["local-faults.svg", "remote-faults.svg"] {
        let picture = std::fs::read_to_string(pictures.join(name)).unwrap();
        assert!(
            picture.starts_with("<svg ") && picture.ends_with("</svg>\n"),
            "{name}"
        );
        // The lines, not only the axes.
        assert!(picture.contains("stroke-width=\"1.8\""), "{name}");
        assert!(picture.len() < 100_000, "{name}: {}", picture.len());
    }
}
