//! What is left of a run: tables in Markdown, plots, everything in JSON, and the document brought up to date.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use vmm::plot::{Axis, Plot, Scale, Series, Style};

use crate::table::{Metric, Row, Table};

/// A picture of a table: one metric by one label, a line for each value of another.
struct Picture {
    name: &'static str,
    title: &'static str,
    table: &'static str,
    /// The label along the horizontal axis, which is a size or a number, and what the axis is called.
    x: usize,
    x_label: &'static str,
    /// The label that tells the lines apart.
    line: Option<usize>,
    metric: usize,
    /// Rows that have this label.
    only: Option<&'static str>,
}

const PICTURES: &[Picture] = &[
    Picture {
        name: "migration-gap",
        title: "Longest time that a dirtying guest stood still",
        table: "migration",
        x: 0,
        x_label: "RAM, MiB",
        line: Some(2),
        metric: 0,
        only: Some("dirtying half"),
    },
    Picture {
        name: "migration-total",
        title: "A dirtying guest's migration from the command to the end",
        table: "migration",
        x: 0,
        x_label: "RAM, MiB",
        line: Some(2),
        metric: 2,
        only: Some("dirtying half"),
    },
    Picture {
        name: "restore",
        title: "From the start of the process to the restored guest's first line",
        table: "restore",
        x: 0,
        x_label: "RAM, MiB",
        line: Some(1),
        metric: 0,
        only: None,
    },
    Picture {
        name: "growth-ram",
        title: "From the start of the program to the first instruction",
        table: "growth-ram",
        x: 0,
        x_label: "RAM, MiB",
        line: None,
        metric: 0,
        only: None,
    },
    Picture {
        name: "growth-dirty",
        title: "Longest time that the guest stood still",
        table: "growth-dirty",
        x: 1,
        x_label: "memory that it writes to, MiB",
        line: Some(2),
        metric: 0,
        only: None,
    },
    Picture {
        name: "growth-vms",
        title: "VMs on one page server: all pages of all VMs",
        table: "growth-vms",
        x: 0,
        x_label: "VMs",
        line: None,
        metric: 1,
        only: None,
    },
    Picture {
        name: "growth-ranges",
        title: "munmap of a page beside watched ranges",
        table: "growth-ranges",
        x: 0,
        x_label: "watched ranges",
        line: None,
        metric: 0,
        only: None,
    },
];

/// A number, or a size in MiB.
fn along(label: &str) -> Option<f64> {
    let digits = label.trim_end_matches(['K', 'M', 'G']);
    let number: f64 = digits.parse().ok()?;
    Some(match &label[digits.len()..] {
        "K" => number / 1024.0,
        "G" => number * 1024.0,
        _ => number,
    })
}

impl Picture {
    fn draw(&self, table: &Table) -> Plot {
        let mut series: Vec<Series> = Vec::new();
        for (labels, median) in table.medians(self.metric) {
            let skipped = self
                .only
                .is_some_and(|only| !labels.iter().any(|label| label == only));
            let Some(x) = along(&labels[self.x]).filter(|_| !skipped) else {
                continue;
            };
            let name = self
                .line
                .map_or(table.metrics[self.metric].name, |line| labels[line].as_str());
            match series.iter_mut().find(|series| series.name == name) {
                Some(series) => series.points.push((x, median)),
                None => series.push(Series {
                    name: name.to_owned(),
                    points: vec![(x, median)],
                }),
            }
        }
        Plot {
            title: self.title.into(),
            x: Axis {
                label: self.x_label.into(),
                scale: Scale::Log,
            },
            y: Axis {
                label: table.metrics[self.metric].name.into(),
                scale: Scale::Log,
            },
            style: Style::Lines,
            series,
        }
    }
}

/// Writes tables and plots into `out`, each table with what there is to say `about` it.
pub(crate) fn write(out: &Path, about: &str, tables: &[Table]) -> Result<()> {
    for table in tables {
        let text = format!("{}\n{about}", table.markdown());
        println!("\n{}\n\n{text}", table.name);
        put(&out.join(format!("{}.md", table.name)), &text)?;
        for picture in PICTURES.iter().filter(|picture| picture.table == table.name) {
            put(
                &out.join(format!("{}.svg", picture.name)),
                &picture.draw(table).svg(),
            )?;
        }
    }
    Ok(())
}

/// Writes every sample into `out`.
pub(crate) fn write_samples(out: &Path, about: &Value, tables: &[Table]) -> Result<()> {
    put(
        &out.join("results.json"),
        &format!("{:#}\n", json!({ "about": about, "tables": tables })),
    )
}

fn put(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Puts the tables of `out` into the document between `<!-- NAME -->` and `<!-- end -->`, and the pictures into the directory
/// beside it that has its name. What was not measured stays.
pub(crate) fn update(document: &Path, out: &Path) -> Result<()> {
    let text =
        std::fs::read_to_string(document).with_context(|| format!("cannot read {}", document.display()))?;
    let text = replaced(&text, |name| {
        std::fs::read_to_string(out.join(format!("{name}.md"))).ok()
    });
    put(document, &text)?;
    let pictures = document.with_extension("");
    std::fs::create_dir_all(&pictures).with_context(|| format!("cannot make {}", pictures.display()))?;
    for entry in std::fs::read_dir(out).context("the results")? {
        let path = entry.context("the results")?.path();
        if path.extension().is_some_and(|extension| extension == "svg")
            && let Some(name) = path.file_name()
        {
            std::fs::copy(&path, pictures.join(name)).context("a picture")?;
        }
    }
    Ok(())
}

fn replaced(text: &str, table: impl Fn(&str) -> Option<String>) -> String {
    const END: &str = "<!-- end -->";
    let mut result = String::new();
    let mut skipping = false;
    for line in text.lines() {
        skipping &= line != END;
        if !skipping {
            result.push_str(line);
            result.push('\n');
        }
        let name = line
            .strip_prefix("<!-- ")
            .and_then(|rest| rest.strip_suffix(" -->"));
        if let Some(table) = name.filter(|_| line != END).and_then(&table) {
            result.push_str(&table);
            skipping = true;
        }
    }
    result
}

/// The tables of what `umem bench --json` prints.
#[expect(clippy::too_many_lines, reason = "a list")]
pub(crate) fn limits(measured: &Value) -> Vec<Table> {
    const FAULTS: &[Metric] = &[
        Metric {
            name: "floor p50, us",
            decimals: 1,
        },
        Metric {
            name: "umem p50, us",
            decimals: 1,
        },
        Metric {
            name: "ratio",
            decimals: 2,
        },
        Metric {
            name: "floor p99, us",
            decimals: 1,
        },
        Metric {
            name: "umem p99, us",
            decimals: 1,
        },
        Metric {
            name: "ratio of p99",
            decimals: 2,
        },
    ];
    const RATES: &[Metric] = &[
        Metric {
            name: "floor, GiB/s",
            decimals: 2,
        },
        Metric {
            name: "umem, GiB/s",
            decimals: 2,
        },
        Metric {
            name: "ratio",
            decimals: 2,
        },
    ];
    const START: &[Metric] = &[
        Metric {
            name: "KVM alone, ms",
            decimals: 1,
        },
        Metric {
            name: "umem, ms",
            decimals: 1,
        },
        Metric {
            name: "own memory, MiB",
            decimals: 1,
        },
    ];
    let table = |name, labels, metrics, rows: &Value, figures: &dyn Fn(&Value) -> Vec<Option<f64>>| {
        let mut table = Table::new(name, labels, metrics);
        for row in rows.as_array().into_iter().flatten() {
            // A VM's start is bound to nothing, and does not say so.
            let label = |key: &str| row[key].as_str().unwrap_or("free").to_owned();
            let samples = figures(row)
                .into_iter()
                .map(|figure| figure.into_iter().collect());
            table.rows.push(Row {
                labels: vec![label("what"), label("cpus")],
                samples: samples.collect(),
                failures: Vec::new(),
            });
        }
        table
    };
    let at = |row: &Value, pointer: &str| row.pointer(pointer).and_then(Value::as_f64);
    let us = |row: &Value, pointer: &str| at(row, pointer).map(|nanos| nanos / 1e3);
    vec![
        table(
            "limits-faults",
            &["a page from", "CPUs"],
            FAULTS,
            &measured["faults"],
            &|row| {
                vec![
                    us(row, "/floor/p50_ns"),
                    us(row, "/umem/p50_ns"),
                    at(row, "/p50_ratio"),
                    us(row, "/floor/p99_ns"),
                    us(row, "/umem/p99_ns"),
                    at(row, "/p99_ratio"),
                ]
            },
        ),
        table(
            "limits-rates",
            &["many pages", "CPUs"],
            RATES,
            &measured["rates"],
            &|row| {
                vec![
                    at(row, "/floor_gib_per_s"),
                    at(row, "/umem_gib_per_s"),
                    at(row, "/ratio"),
                ]
            },
        ),
        table(
            "limits-start",
            &["a VM's first instruction", "CPUs"],
            START,
            &measured["start"],
            &|row| {
                vec![
                    at(row, "/floor_ms"),
                    at(row, "/umem_ms"),
                    at(row, "/own_memory_kib").map(|kib| kib / 1024.0),
                ]
            },
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_measured_is_replaced() {
        let text = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\nkept\n<!-- end -->\n";
        let new = replaced(text, |name| (name == "one").then(|| "new\n".to_owned()));
        assert_eq!(
            new,
            "a\n<!-- one -->\nnew\n<!-- end -->\nb\n<!-- two -->\nkept\n<!-- end -->\n"
        );
    }

    #[test]
    fn sizes_lie_along_an_axis() {
        assert_eq!(
            ["512K", "256M", "4G", "16", "x"].map(along),
            [Some(0.5), Some(256.0), Some(4096.0), Some(16.0), None]
        );
    }
}
