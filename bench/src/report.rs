//! The table.

use std::{
    fmt,
    io::{ErrorKind, Write as _},
};

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::Serialize;

/// One measured value.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Row {
    name: String,
    value: f64,
    unit: &'static str,
    goal: Option<Goal>,
    met: Option<bool>,
}

/// What a value should be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Goal {
    AtMost(f64),
    AtLeast(f64),
}

impl Row {
    pub(crate) fn new(name: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self { name: name.into(), value, unit, goal: None, met: None }
    }

    pub(crate) fn goal(self, goal: Goal) -> Self {
        Self { met: Some(goal.is_met(self.value)), goal: Some(goal), ..self }
    }
}

impl Goal {
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtMost(most) => value <= most,
            Self::AtLeast(least) => value >= least,
        }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(most) => write!(f, "≤ {most}"),
            Self::AtLeast(least) => write!(f, "≥ {least}"),
        }
    }
}

/// Prints the rows to standard output, lined up or as JSON.
pub(crate) fn print(rows: &[Row], json: bool) -> anyhow::Result<()> {
    let text = if json { serde_json::to_string_pretty(rows)? } else { table(rows) };
    match writeln!(std::io::stdout(), "{text}") {
        // A reader that has seen enough (`| head`) is no error.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

fn table(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(["NAME", "VALUE", "UNIT", "GOAL", "MET"]);
    for row in rows {
        let goal = row.goal.map_or_else(|| "-".to_owned(), |goal| goal.to_string());
        let met = row.met.map_or("-", |met| if met { "yes" } else { "no" });
        table.add_row([row.name.as_str(), &number(row.value), row.unit, &goal, met]);
    }
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if index == VALUE {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.to_string().lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// Three digits that mean something, whole numbers from 100 on.
fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

const VALUE: usize = 1;

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<Row> {
        vec![
            Row::new("relay-up-trains", 1.5, "µs/packet").goal(Goal::AtMost(1.5)),
            Row::new("placement", 199_999.0, "1/s").goal(Goal::AtLeast(200_000.0)),
            Row::new("cid-single-pass", 12.34, "ns"),
        ]
    }

    #[test]
    fn columns_line_up_and_goals_are_judged() {
        assert_eq!(
            table(&rows()),
            "NAME              VALUE  UNIT       GOAL      MET\n\
             relay-up-trains    1.50  µs/packet  ≤ 1.5     yes\n\
             placement        199999  1/s        ≥ 200000  no\n\
             cid-single-pass    12.3  ns         -         -"
        );
    }

    #[test]
    fn json_says_the_same() {
        let json = serde_json::to_value(rows()).unwrap();
        assert_eq!(
            json[0],
            serde_json::json!({
                "name": "relay-up-trains", "value": 1.5, "unit": "µs/packet", "goal": {"atMost": 1.5}, "met": true
            })
        );
        assert_eq!(
            (&json[1]["met"], &json[2]["goal"], &json[2]["met"]),
            (&false.into(), &None::<bool>.into(), &None::<bool>.into())
        );
    }
}
