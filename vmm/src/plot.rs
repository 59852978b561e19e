//! Plots of measurements, as SVG that is small enough to be kept beside what it illustrates.

use std::fmt::Write as _;

/// How an axis divides its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Equal differences are equally long; it begins at 0.
    Linear,
    /// Equal ratios are equally long.
    Log,
}

/// An axis.
#[derive(Clone, Debug)]
pub struct Axis {
    /// What it says, with the unit.
    pub label: String,
    /// How it is divided.
    pub scale: Scale,
}

/// Points that belong together, in the order of x.
#[derive(Clone, Debug)]
pub struct Series {
    /// What the legend calls it.
    pub name: String,
    /// x and y. What a logarithmic axis cannot show is left out.
    pub points: Vec<(f64, f64)>,
}

/// How points are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// As marks with lines between them.
    Lines,
    /// As a histogram: y holds from x to the next x.
    Steps,
}

/// A plot.
#[derive(Clone, Debug)]
pub struct Plot {
    /// Its title.
    pub title: String,
    /// The horizontal axis.
    pub x: Axis,
    /// The vertical axis.
    pub y: Axis,
    /// How points are drawn.
    pub style: Style,
    /// What is drawn.
    pub series: Vec<Series>,
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 380.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 230.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;

/// Colours that people with most kinds of colour blindness can tell apart (Okabe and Ito).
const COLOURS: [&str; 8] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933",
];

/// A part of an axis: what is shown, from where to where on the picture.
struct Span {
    scale: Scale,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Span {
    /// `None` if there is nothing to be shown.
    fn of(scale: Scale, values: impl Iterator<Item = f64>, from: f64, to: f64) -> Option<Self> {
        let mut values = values.filter(|value| value.is_finite() && (scale == Scale::Linear || *value > 0.0));
        let first = values.next()?;
        let (mut low, mut high) = values.fold((first, first), |(low, high), value| {
            (low.min(value), high.max(value))
        });
        if scale == Scale::Linear {
            low = low.min(0.0);
        }
        if high <= low {
            high = low + low.abs().max(1.0);
        }
        Some(Self {
            scale,
            low,
            high,
            from,
            to,
        })
    }

    fn place(&self, value: f64) -> f64 {
        let along = match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value / self.low).ln() / (self.high / self.low).ln(),
        };
        self.from + along * (self.to - self.from)
    }

    /// Round numbers within.
    fn ticks(&self) -> Vec<f64> {
        let candidates: Vec<f64> = match self.scale {
            Scale::Linear => {
                let rough = (self.high - self.low) / 5.0;
                let unit = 10_f64.powf(rough.log10().floor());
                let step = [1.0, 2.0, 5.0, 10.0]
                    .map(|times| times * unit)
                    .into_iter()
                    .find(|step| *step >= rough)
                    .unwrap_or(unit);
                let (first, last) = ((self.low / step).ceil() as i64, (self.high / step).floor() as i64);
                (first..=last).map(|n| n as f64 * step).collect()
            }
            Scale::Log => {
                let (low, high) = (self.low.log10().floor() as i32, self.high.log10().ceil() as i32);
                let steps: &[f64] = if high - low > 3 { &[1.0] } else { &[1.0, 2.0, 5.0] };
                (low..=high)
                    .flat_map(|power| steps.iter().map(move |step| step * 10_f64.powi(power)))
                    .collect()
            }
        };
        let within = candidates
            .into_iter()
            .filter(|tick| *tick >= self.low * 0.999_999 && *tick <= self.high * 1.000_001);
        within.collect()
    }
}

impl Plot {
    /// The picture; without axes if there is nothing in it.
    pub fn svg(&self) -> String {
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
             font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n\
             <text x=\"{LEFT}\" y=\"24\" font-size=\"15\">{}</text>\n",
            escaped(&self.title)
        );
        let all = || self.series.iter().flat_map(|series| series.points.iter());
        let x = Span::of(self.x.scale, all().map(|point| point.0), LEFT, WIDTH - RIGHT);
        let y = Span::of(self.y.scale, all().map(|point| point.1), HEIGHT - BOTTOM, TOP);
        if let (Some(x), Some(y)) = (x, y) {
            self.draw_axes(&mut svg, &x, &y);
            for (number, series) in self.series.iter().enumerate() {
                self.draw_series(&mut svg, number, series, &x, &y);
            }
        }
        svg.push_str("</svg>\n");
        svg
    }

    fn draw_axes(&self, svg: &mut String, x: &Span, y: &Span) {
        let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        // Writing to a string does not fail.
        for tick in x.ticks() {
            let at = x.place(tick);
            let _ = writeln!(
                svg,
                "<path d=\"M{at:.1} {TOP}V{bottom}\" stroke=\"#ddd\"/><text x=\"{at:.1}\" y=\"{:.1}\" \
                 text-anchor=\"middle\">{}</text>",
                bottom + 16.0,
                number(tick)
            );
        }
        for tick in y.ticks() {
            let at = y.place(tick);
            let _ = writeln!(
                svg,
                "<path d=\"M{LEFT} {at:.1}H{right}\" stroke=\"#ddd\"/><text x=\"{:.1}\" y=\"{:.1}\" \
                 text-anchor=\"end\">{}</text>",
                LEFT - 6.0,
                at + 4.0,
                number(tick)
            );
        }
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {TOP}V{bottom}H{right}\" fill=\"none\" stroke=\"#445\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\n\
             <text transform=\"translate(16 {:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            f64::midpoint(LEFT, right),
            HEIGHT - 14.0,
            escaped(&self.x.label),
            f64::midpoint(TOP, bottom),
            escaped(&self.y.label)
        );
    }

    fn draw_series(&self, svg: &mut String, number: usize, series: &Series, x: &Span, y: &Span) {
        let colour = COLOURS[number % COLOURS.len()];
        let shown = |scale: Scale, value: f64| value.is_finite() && (scale == Scale::Linear || value > 0.0);
        let points: Vec<(f64, f64)> = series
            .points
            .iter()
            .filter(|point| shown(x.scale, point.0) && shown(y.scale, point.1))
            .map(|point| (x.place(point.0), y.place(point.1)))
            .collect();
        let mut path = String::new();
        for (at, (px, py)) in points.iter().enumerate() {
            let _ = match (at, self.style) {
                (0, _) => write!(path, "M{px:.1} {py:.1}"),
                (_, Style::Lines) => write!(path, "L{px:.1} {py:.1}"),
                (_, Style::Steps) => write!(path, "H{px:.1}V{py:.1}"),
            };
        }
        let _ = writeln!(
            svg,
            "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.8\"/>"
        );
        if self.style == Style::Lines {
            for (px, py) in &points {
                let _ = writeln!(
                    svg,
                    "<circle cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"3\" fill=\"{colour}\"/>"
                );
            }
        }
        let (left, top) = (WIDTH - RIGHT + 14.0, TOP + 8.0 + 18.0 * number as f64);
        let _ = writeln!(
            svg,
            "<path d=\"M{left:.1} {top:.1}h18\" stroke=\"{colour}\" stroke-width=\"3\"/><text x=\"{:.1}\" \
             y=\"{:.1}\">{}</text>",
            left + 24.0,
            top + 4.0,
            escaped(&series.name)
        );
    }
}

/// A number as short as it can be said: `0.5`, `20`, `5k`.
fn number(value: f64) -> String {
    let (value, unit) = match value.abs() {
        size if size >= 1e9 => (value / 1e9, "G"),
        size if size >= 1e6 => (value / 1e6, "M"),
        size if size >= 1e4 => (value / 1e3, "k"),
        _ => (value, ""),
    };
    let text = format!("{value:.3}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    format!("{text}{unit}")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(scale: Scale, style: Style, points: &[(f64, f64)]) -> Plot {
        let axis = |label: &str| Axis {
            label: label.into(),
            scale,
        };
        Plot {
            title: "a < b".into(),
            x: axis("x"),
            y: axis("y"),
            style,
            series: vec![Series {
                name: "one".into(),
                points: points.to_vec(),
            }],
        }
    }

    #[test]
    fn points_are_where_their_values_are() {
        let svg = plot(
            Scale::Log,
            Style::Lines,
            &[(1.0, 1.0), (10.0, 100.0), (100.0, 10_000.0)],
        )
        .svg();
        // The middle of both axes.
        let (x, y) = (
            f64::midpoint(LEFT, WIDTH - RIGHT),
            f64::midpoint(TOP, HEIGHT - BOTTOM),
        );
        assert!(svg.contains(&format!("L{x:.1} {y:.1}")), "{svg}");
        assert!(svg.contains("a &lt; b") && svg.contains(">10k</text>"), "{svg}");
        let svg = plot(Scale::Linear, Style::Steps, &[(0.0, 5.0), (1.0, 10.0)]).svg();
        assert!(svg.contains(&format!("H{:.1}V{TOP:.1}", WIDTH - RIGHT)), "{svg}");
    }

    #[test]
    fn what_cannot_be_shown_is_left_out() {
        let svg = plot(
            Scale::Log,
            Style::Lines,
            &[(0.0, 1.0), (1.0, f64::NAN), (2.0, 3.0), (4.0, 9.0)],
        )
        .svg();
        assert_eq!(svg.matches("<circle").count(), 2, "{svg}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        assert!(!plot(Scale::Log, Style::Lines, &[]).svg().contains("<circle"));
        // A single value has an axis too.
        assert_eq!(
            plot(Scale::Linear, Style::Lines, &[(3.0, 0.0)])
                .svg()
                .matches("<circle")
                .count(),
            1
        );
    }

    #[test]
    fn ticks_are_round_and_few() {
        for (scale, low, high) in [
            (Scale::Linear, 0.0, 7.3),
            (Scale::Log, 3.0, 4e5),
            (Scale::Log, 900.0, 4000.0),
        ] {
            let span = Span {
                scale,
                low,
                high,
                from: 0.0,
                to: 1.0,
            };
            let ticks = span.ticks();
            assert!((2..=12).contains(&ticks.len()), "{ticks:?}");
        }
        assert_eq!(
            [0.5, 20.0, 5000.0, 50_000.0, 2e6].map(number),
            ["0.5", "20", "5000", "50k", "2M"]
        );
    }
}
