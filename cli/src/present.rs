//! What people see: errors, tables, progress.

use std::{
    borrow::Cow,
    ffi::OsString,
    io::{IsTerminal, Write as _},
    time::Duration,
};

use comfy_table::{CellAlignment, ColumnConstraint, ContentArrangement, Table, Width, presets};
use indicatif::{ProgressBar, ProgressStyle};

/// An error with its causes, without a backtrace.
pub(crate) fn error(error: &anyhow::Error) {
    let red = is_capable(&std::io::stderr()) && from_environment("NO_COLOR").is_none();
    let label = if red { "\x1b[1;31merror\x1b[0m" } else { "error" };
    // A cause that its context repeats says nothing new.
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    eprintln!("{label}: {text}");
}

/// A terminal that can do more than show lines.
fn is_capable(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// A variable of the environment; an empty one counts as unset.
pub(crate) fn from_environment(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// A table whose columns line up, without lines. Columns named in `right` are numbers.
pub(crate) fn table(header: &[&str], right: &[usize], rows: impl IntoIterator<Item = Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.iter().map(ToString::to_string).collect::<Vec<_>>());
    for row in rows {
        table.add_row(row);
    }
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, GAP));
        if right.contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// Prints a table without trailing blanks, its last column broken into lines where a terminal is too narrow for it.
pub(crate) fn print(table: &Table) {
    let width = table.width();
    for text in fitted(table.clone(), width).to_string().lines() {
        line(text.trim_end());
    }
}

/// The same on standard error.
pub(crate) fn print_error(mut table: Table) {
    let width = table.use_stderr().width();
    for text in fitted(table, width).to_string().lines() {
        eprintln!("{}", text.trim_end());
    }
}

fn fitted(mut table: Table, width: Option<u16>) -> Table {
    let widths = table.column_max_content_widths();
    let (Some(width), Some((last, others))) = (width, widths.split_last()) else { return table };
    let left = others.iter().fold(width, |left, other| left.saturating_sub(other.saturating_add(GAP)));
    if *last <= left || left < LEAST_TEXT {
        return table;
    }
    table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
    for (index, column) in table.column_iter_mut().enumerate() {
        if index < others.len() {
            column.set_constraint(ColumnConstraint::ContentWidth);
        } else {
            column.set_padding((0, 0)).set_constraint(ColumnConstraint::Absolute(Width::Fixed(left)));
        }
    }
    table
}

/// `println!` by way of [`line()`].
macro_rules! out {
    () => { $crate::present::line("") };
    ($($arg:tt)*) => { $crate::present::line(&format!($($arg)*)) };
}
pub(crate) use out;

/// Prints a line. A reader that has seen enough (`| head`) is no error: the command ends quietly.
pub(crate) fn line(text: &str) {
    if let Err(error) = try_line(text) {
        let enough = error.kind() == std::io::ErrorKind::BrokenPipe;
        if !enough {
            self::error(&anyhow::Error::new(error).context("standard output cannot be written"));
        }
        std::process::exit(if enough { 0 } else { 1 });
    }
}

/// As [`line()`], for what must not get lost.
pub(crate) fn try_line(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{text}")?;
    out.flush()
}

/// `1 worker`, `2 workers`.
pub(crate) fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// A spinner on a terminal; lines elsewhere.
#[derive(Debug, Clone)]
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    quiet: bool,
}

impl Progress {
    pub(crate) fn new(quiet: bool) -> Self {
        let bar = (!quiet && is_capable(&std::io::stderr())).then(|| {
            let style = ProgressStyle::with_template("{spinner} {wide_msg}");
            let bar = ProgressBar::new_spinner().with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self { bar, quiet }
    }

    /// Without a spinner: only what happened is said, wherever it goes.
    pub(crate) const fn only_notes() -> Self {
        Self { bar: None, quiet: false }
    }

    /// What is going on now. Not kept.
    pub(crate) fn say(&self, text: impl Into<Cow<'static, str>>) {
        if let Some(bar) = &self.bar {
            bar.set_message(text);
        }
    }

    /// Something that happened. Kept.
    pub(crate) fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None if !self.quiet => eprintln!("{text}"),
            None => {}
        }
    }

    pub(crate) fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// `12 ms`, `1.23 s`.
pub(crate) fn duration(d: Duration) -> String {
    match d.as_secs_f64() {
        s if s < 0.0095 => format!("{:.1} ms", s * 1000.0),
        s if s < 0.9995 => format!("{:.0} ms", s * 1000.0),
        s => format!("{s:.2} s"),
    }
}

/// The value at `quantile` (0..=1) of sorted values; zero of none.
pub(crate) fn quantile(sorted: &[Duration], quantile: f64) -> Duration {
    let last = sorted.len().saturating_sub(1) as f64;
    sorted.get((last * quantile).round() as usize).copied().unwrap_or_default()
}

/// Blanks between columns.
const GAP: u16 = 2;
/// Columns that a text needs at least to be broken into lines that can be read.
const LEAST_TEXT: u16 = 14;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_that_is_too_wide_is_broken_within_its_column() {
        let row = ["north", "is farther than the nearest region, 12 ms away"].map(str::to_owned);
        let table = table(&["REGION", "DETAIL"], &[], [row.to_vec()]);
        let lines = |width| {
            let text = fitted(table.clone(), width).to_string();
            text.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>()
        };
        let whole = ["REGION  DETAIL", "north   is farther than the nearest region, 12 ms away"];
        assert_eq!(lines(None), whole);
        assert_eq!(lines(Some(54)), whole, "fits");
        assert_eq!(lines(Some(20)), whole, "no room for text at all");
        let broken = ["REGION  DETAIL", "north   is farther than the", "        nearest region, 12 ms", "        away"];
        assert_eq!(lines(Some(32)), broken);
    }

    #[test]
    fn one_of_a_thing_has_no_s() {
        assert_eq!([0, 1, 2].map(|n| count(n, "worker")), ["0 workers", "1 worker", "2 workers"]);
    }
}
