//! How far long work is, for people at a terminal.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar over bytes on standard error, if that is a terminal; nothing elsewhere.
pub(super) fn bar(what: &'static str, bytes: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{msg:10} {wide_bar} {bytes:>10}/{total_bytes} {binary_bytes_per_sec:>12} {eta:>4}",
    );
    let bar = ProgressBar::new(bytes).with_message(what);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
