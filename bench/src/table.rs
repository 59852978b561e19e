//! What was measured, as a table: rows of samples, of which median and spread are shown.

use std::fmt::Write as _;

use serde::Serialize;

/// A column of figures.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Metric {
    /// Its heading, with the unit.
    pub(crate) name: &'static str,
    /// Digits behind the point.
    pub(crate) decimals: usize,
}

/// A table.
#[derive(Debug, Serialize)]
pub(crate) struct Table {
    /// What it is called in files and in the document.
    pub(crate) name: &'static str,
    /// Headings of the columns that say what a row is.
    pub(crate) labels: &'static [&'static str],
    /// Headings of the figures.
    pub(crate) metrics: &'static [Metric],
    /// In the order in which they were first measured.
    pub(crate) rows: Vec<Row>,
}

/// What was measured of one thing.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) labels: Vec<String>,
    /// For each metric its samples; none where it makes no sense.
    pub(crate) samples: Vec<Vec<f64>>,
    /// What went wrong, each time that something did.
    pub(crate) failures: Vec<String>,
}

impl Table {
    pub(crate) fn new(
        name: &'static str,
        labels: &'static [&'static str],
        metrics: &'static [Metric],
    ) -> Self {
        Self {
            name,
            labels,
            metrics,
            rows: Vec::new(),
        }
    }

    /// The row with these labels, made if need be.
    fn row(&mut self, labels: &[String]) -> &mut Row {
        let at = self.rows.iter().position(|row| row.labels == labels);
        let at = at.unwrap_or_else(|| {
            self.rows.push(Row {
                labels: labels.to_vec(),
                samples: vec![Vec::new(); self.metrics.len()],
                failures: Vec::new(),
            });
            self.rows.len() - 1
        });
        &mut self.rows[at]
    }

    /// Adds one measurement of each metric, or why there is none, and says so on standard output.
    pub(crate) fn add(&mut self, labels: &[String], measured: anyhow::Result<Vec<Option<f64>>>) {
        let mut line = format!("{}:", self.name);
        for (name, label) in self.labels.iter().zip(labels) {
            let _ = write!(line, " {}={}", name.replace(' ', "_"), label.replace(' ', "_"));
        }
        match measured {
            Ok(figures) => {
                for (metric, figure) in self.metrics.iter().zip(&figures) {
                    if let Some(figure) = figure {
                        let name = metric.name.replace([' ', ','], "_");
                        let _ = write!(line, " {name}={figure:.*}", metric.decimals);
                    }
                }
                let row = self.row(labels);
                for (samples, figure) in row.samples.iter_mut().zip(figures) {
                    samples.extend(figure);
                }
            }
            Err(error) => {
                let _ = write!(line, " failed: {error:#}");
                self.row(labels).failures.push(format!("{error:#}"));
            }
        }
        println!("{line}");
    }

    /// The medians of metric `metric` of the rows that have one, with their labels.
    pub(crate) fn medians(&self, metric: usize) -> impl Iterator<Item = (&[String], f64)> {
        self.rows
            .iter()
            .filter_map(move |row| Some((row.labels.as_slice(), median(&row.samples[metric])?)))
    }

    /// In Markdown: medians, and behind them the least and the greatest.
    pub(crate) fn markdown(&self) -> String {
        let headings = self
            .labels
            .iter()
            .copied()
            .chain(self.metrics.iter().map(|metric| metric.name));
        let headings: Vec<&str> = headings.collect();
        let mut text = format!(
            "| {} |\n|{}\n",
            headings.join(" | "),
            " --- |".repeat(headings.len())
        );
        for row in &self.rows {
            let mut cells = row.labels.clone();
            for (metric, samples) in self.metrics.iter().zip(&row.samples) {
                cells.push(cell(samples, metric.decimals));
            }
            if !row.failures.is_empty() {
                let tries = row.failures.len() + row.samples.iter().map(Vec::len).max().unwrap_or(0);
                let last = cells.len() - 1;
                let _ = write!(cells[last], " ({} of {tries} failed)", row.failures.len());
            }
            let _ = writeln!(text, "| {} |", cells.join(" | "));
        }
        text
    }
}

fn cell(samples: &[f64], decimals: usize) -> String {
    let Some(median) = median(samples) else {
        return "-".into();
    };
    let least = samples.iter().copied().fold(f64::INFINITY, f64::min);
    let greatest = samples.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if samples.len() == 1 {
        format!("{median:.decimals$}")
    } else {
        format!("{median:.decimals$} ({least:.decimals$}-{greatest:.decimals$})")
    }
}

/// The median, the mean of the two in the middle for an even number of samples.
pub(crate) fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = sorted[(sorted.len() - 1) / 2];
    Some(f64::midpoint(lower, upper))
}

#[cfg(test)]
mod tests {
    use super::*;

    const METRICS: &[Metric] = &[
        Metric {
            name: "total, s",
            decimals: 2,
        },
        Metric {
            name: "bytes",
            decimals: 0,
        },
    ];

    #[test]
    fn medians_and_spread_are_shown() {
        let mut table = Table::new("t", &["who"], METRICS);
        for time in [3.0, 1.0, 2.0] {
            table.add(&["a".into()], Ok(vec![Some(time), None]));
        }
        table.add(&["b".into()], Ok(vec![Some(4.0), Some(7.0)]));
        table.add(&["b".into()], Err(anyhow::anyhow!("no")));
        assert_eq!(
            table.markdown(),
            "| who | total, s | bytes |\n| --- | --- | --- |\n\
             | a | 2.00 (1.00-3.00) | - |\n| b | 4.00 | 7 (1 of 2 failed) |\n"
        );
        assert_eq!(
            table.medians(1).collect::<Vec<_>>(),
            [(["b".to_owned()].as_slice(), 7.0)]
        );
        assert_eq!(median(&[1.0, 2.0]), Some(1.5));
    }
}
