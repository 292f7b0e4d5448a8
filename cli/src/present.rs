//! What people see: errors, tables, progress.

use std::{
    borrow::Cow,
    ffi::OsString,
    io::{IsTerminal, Write as _},
    time::Duration,
};

use comfy_table::{CellAlignment, ColumnConstraint, ContentArrangement, Width, presets};
use indicatif::{ProgressBar, ProgressStyle};

/// An error with its causes, without a backtrace.
pub(crate) fn error(error: &anyhow::Error) {
    let red = is_capable(&std::io::stderr()) && from_environment("NO_COLOR").is_none();
    let label = if red { "\x1b[1;31merror\x1b[0m" } else { "error" };
    eprintln!("{label}: {}", text(error));
}

/// An error and its causes.
pub(crate) fn text(error: &anyhow::Error) -> String {
    // A cause that its context repeats says nothing new.
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// A terminal that can do more than show lines.
fn is_capable(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// A variable of the environment; an empty one counts as unset.
pub(crate) fn from_environment(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// A table whose columns line up, without lines. The last column is text that may be long.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    header: Vec<String>,
    /// Columns of numbers.
    right: Vec<usize>,
    rows: Vec<Vec<String>>,
}

/// A table; columns named in `right` are numbers.
pub(crate) fn table(header: &[&str], right: &[usize], rows: impl IntoIterator<Item = Vec<String>>) -> Table {
    Table {
        header: header.iter().map(ToString::to_string).collect(),
        right: right.to_vec(),
        rows: rows.into_iter().collect(),
    }
}

/// Prints a table, so that it can be read on this terminal.
pub(crate) fn print(table: &Table) {
    for text in table.lines(comfy_table::Table::new().width()) {
        line(&text);
    }
}

/// The same on standard error.
pub(crate) fn print_error(table: &Table) {
    for text in table.lines(error_width()) {
        eprintln!("{text}");
    }
}

/// Columns of the terminal that standard error goes to, if it is one.
pub(crate) fn error_width() -> Option<u16> {
    comfy_table::Table::new().use_stderr().width()
}

impl Table {
    /// Without trailing blanks. What is too wide loses the columns that say the same of everybody; then the last column
    /// is broken into lines, within its place or, where that is too narrow, below its row.
    fn lines(&self, width: Option<u16>) -> Vec<String> {
        let Some(width) = width.filter(|width| self.width() > usize::from(*width)) else {
            return drawn(self.drawing());
        };
        let (narrow, same) = self.without_the_same();
        let last = narrow.header.len() - 1;
        let left = usize::from(width).saturating_sub(narrow.width_before(last));
        let mut lines = if narrow.width() <= usize::from(width) {
            drawn(narrow.drawing())
        } else if left >= LEAST_TEXT {
            narrow.broken_within(left, width)
        } else {
            narrow.broken_below(width)
        };
        lines.extend(same);
        lines
    }

    fn width(&self) -> usize {
        self.width_before(self.header.len()).saturating_sub(GAP)
    }

    /// Of the columns before this one, each with the blanks behind it.
    fn width_before(&self, end: usize) -> usize {
        let cells = |column: usize| std::iter::once(&self.header).chain(&self.rows).map(move |row| &row[column]);
        let of_text = |text: &String| text.lines().map(|line| line.chars().count()).max().unwrap_or(0);
        (0..end).map(|column| cells(column).map(of_text).max().unwrap_or(0) + GAP).sum()
    }

    /// Only the columns that tell rows apart, and a line that says what the others have in common. The first two, which
    /// name things, and the last one stay.
    fn without_the_same(&self) -> (Self, Option<String>) {
        let count = self.header.len();
        let is_same = |column: &usize| {
            let mut cells = self.rows.iter().map(|row| &row[*column]);
            let first = cells.next();
            self.rows.len() > 1 && (2..count - 1).contains(column) && cells.all(|cell| Some(cell) == first)
        };
        let (same, kept): (Vec<usize>, Vec<usize>) = (0..count).partition(is_same);
        let pick = |row: &Vec<String>| kept.iter().map(|column| row[*column].clone()).collect();
        let narrow = Self {
            header: pick(&self.header),
            right: (0..kept.len()).filter(|column| self.right.contains(&kept[*column])).collect(),
            rows: self.rows.iter().map(pick).collect(),
        };
        let said: Vec<_> =
            same.iter().map(|column| format!("{} {}", self.header[*column], self.rows[0][*column])).collect();
        (narrow, (!said.is_empty()).then(|| format!("all: {}", said.join(", "))))
    }

    fn drawing(&self) -> comfy_table::Table {
        let mut table = comfy_table::Table::new();
        table.load_style(presets::NOTHING);
        table.set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(&self.header);
        for row in &self.rows {
            table.add_row(row);
        }
        for (index, column) in table.column_iter_mut().enumerate() {
            column.set_padding((0, GAP as u16));
            if self.right.contains(&index) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table
    }

    /// The last column gets `left` columns of the terminal.
    fn broken_within(&self, left: usize, width: u16) -> Vec<String> {
        let mut table = self.drawing();
        table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
        let last = self.header.len() - 1;
        for (index, column) in table.column_iter_mut().enumerate() {
            if index < last {
                column.set_constraint(ColumnConstraint::ContentWidth);
            } else {
                let left = Width::Fixed(u16::try_from(left).unwrap_or(width));
                column.set_padding((0, 0)).set_constraint(ColumnConstraint::Absolute(left));
            }
        }
        drawn(table)
    }

    /// The last column stands below its row, on lines of its own.
    fn broken_below(&self, width: u16) -> Vec<String> {
        let last = self.header.len() - 1;
        let cut = |row: &Vec<String>| row[..last].to_vec();
        let above = Self {
            header: cut(&self.header),
            right: self.right.iter().copied().filter(|column| *column < last).collect(),
            rows: self.rows.iter().map(cut).collect(),
        };
        let room = usize::from(width).saturating_sub(INDENT.len()).max(LEAST_TEXT);
        let mut lines = Vec::new();
        let texts = std::iter::once(&self.header).chain(&self.rows).map(|row| &row[last]);
        for (line, text) in drawn(above.drawing()).into_iter().zip(texts) {
            lines.push(line);
            lines.extend(wrapped(text, room).into_iter().map(|text| format!("{INDENT}{text}")));
        }
        lines
    }
}

fn drawn(table: comfy_table::Table) -> Vec<String> {
    table.to_string().lines().map(|line| line.trim_end().to_owned()).collect()
}

/// Lines of whole words, as long as they fit.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for paragraph in text.lines() {
        lines.push(String::new());
        for word in paragraph.split_whitespace() {
            let line = lines.last_mut().expect("one was just begun");
            if line.is_empty() {
                line.push_str(word);
            } else if line.chars().count() + 1 + word.chars().count() <= width {
                line.push(' ');
                line.push_str(word);
            } else {
                lines.push(word.to_owned());
            }
        }
    }
    lines
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

/// As many digits behind the point as mean something.
pub(crate) fn rounded(number: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (number * scale).round() / scale
}

/// The value at `quantile` (0..=1) of sorted values; zero of none.
pub(crate) fn quantile(sorted: &[Duration], quantile: f64) -> Duration {
    let last = sorted.len().saturating_sub(1) as f64;
    sorted.get((last * quantile).round() as usize).copied().unwrap_or_default()
}

/// Blanks between columns.
const GAP: usize = 2;
/// Columns that a text needs at least to be broken into lines that can be read.
const LEAST_TEXT: usize = 24;
/// What stands before a text below its row.
const INDENT: &str = "    ";

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(rows: &[&[&str]]) -> Vec<Vec<String>> {
        rows.iter().map(|row| row.iter().map(ToString::to_string).collect()).collect()
    }

    #[test]
    fn a_text_that_is_too_wide_is_broken_within_its_column_or_below_its_row() {
        let row = rows(&[&["north", "is farther than the nearest region, 12 ms away"]]);
        let table = table(&["REGION", "DETAIL"], &[], row);
        let whole = ["REGION  DETAIL", "north   is farther than the nearest region, 12 ms away"];
        assert_eq!(table.lines(None), whole);
        assert_eq!(table.lines(Some(54)), whole, "fits");
        let broken = ["REGION  DETAIL", "north   is farther than the", "        nearest region, 12 ms", "        away"];
        assert_eq!(table.lines(Some(32)), broken);
        let below =
            ["REGION", "    DETAIL", "north", "    is farther than the", "    nearest region, 12 ms", "    away"];
        assert_eq!(table.lines(Some(28)), below);
    }

    #[test]
    fn columns_that_say_the_same_of_everybody_leave_a_narrow_table() {
        let header = ["REGION", "WORKER", "PHASE", "CALLS", "CLOCK", "STATE"];
        let cells = rows(&[
            &["north", "desk-0", "active", "0 of 60", "0.0 s", "takes calls"],
            &["north", "desk-1", "active", "7 of 60", "0.0 s", "takes calls"],
        ]);
        let both = table(&header, &[3, 4], cells.clone());
        assert_eq!(both.lines(Some(80))[0], "REGION  WORKER  PHASE     CALLS  CLOCK  STATE");
        let narrow = [
            "REGION  WORKER    CALLS  STATE",
            "north   desk-0  0 of 60  takes calls",
            "north   desk-1  7 of 60  takes calls",
            "all: PHASE active, CLOCK 0.0 s",
        ];
        assert_eq!(both.lines(Some(45)), narrow);
        let single = table(&header, &[3, 4], cells[..1].to_vec());
        assert_eq!(single.lines(Some(45))[0], "REGION  WORKER  PHASE     CALLS  CLOCK", "one row is not everybody");
    }

    #[test]
    fn no_table_is_wider_than_its_terminal_if_the_text_can_help_it() {
        let header = ["RELAY", "CALLER AT", "DETAIL"];
        let text = "the caller came through relay 66 instead of 65, and nobody knows why";
        let table = table(&header, &[], rows(&[&["frankfurt/relay-0 (65)", "192.0.2.7:40000", text]]));
        for width in [50, 60, 80, 100] {
            assert!(table.lines(Some(width)).iter().all(|line| line.len() <= usize::from(width)), "{width}");
        }
    }

    #[test]
    fn one_of_a_thing_has_no_s() {
        assert_eq!([0, 1, 2].map(|n| count(n, "worker")), ["0 workers", "1 worker", "2 workers"]);
    }
}
