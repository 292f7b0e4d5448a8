//! docs/metrics.md: every metric that is registered is described, and nothing else is.

use std::{collections::BTreeMap, path::Path};

use super::{
    Source, Violation,
    sources::{arguments, is_metric_name, is_test_file, production},
};

/// Compares the tables of the text with the crates that have metrics.
///
/// A metric in the code is the first string of a call that registers it, or a string that a help text in capitals
/// follows: `family("received_packets", "Datagrams received")`. In the text it is the first cell of a row.
pub(super) fn check(file: &Path, text: &str, sources: &[Source]) -> Vec<Violation> {
    let mut registered = BTreeMap::new();
    for source in sources.iter().filter(|source| !is_test_file(&source.file)) {
        let code = production(&source.text);
        if !code.contains("prometheus_client") {
            continue;
        }
        let component = source.file.iter().next().unwrap_or_default().to_string_lossy();
        for (line, name) in names(code) {
            let full = if name.starts_with(PREFIX) { name.to_owned() } else { format!("{PREFIX}{component}_{name}") };
            registered.insert(full, (source.file.as_path(), line));
        }
    }
    let described: BTreeMap<&str, usize> =
        text.lines().enumerate().filter_map(|(index, line)| Some((described(line)?, index + 1))).collect();
    let has = |name: &String| ENDINGS.iter().any(|ending| described.contains_key(format!("{name}{ending}").as_str()));
    let undescribed = registered.iter().filter(|(name, _)| !has(name)).map(|(name, (source, line))| {
        Violation::new(source, *line, format!("metric {name} is not in {}", file.display()))
    });
    let is_registered =
        |name: &str| ENDINGS.iter().any(|e| name.strip_suffix(e).is_some_and(|base| registered.contains_key(base)));
    let unknown = described.iter().filter(|(name, _)| !is_registered(name));
    let unknown = unknown.map(|(name, line)| Violation::new(file, *line, format!("no program registers {name}")));
    undescribed.chain(unknown).collect()
}

/// Metrics that a file registers, with their lines.
fn names(code: &str) -> Vec<(usize, &str)> {
    let calls = [".register(", ".register_with_unit(", ".encode_descriptor("];
    let mut names: Vec<_> = calls.iter().flat_map(|call| arguments(code, call)).collect();
    names.extend(arguments(code, "(").into_iter().filter(|(line, name)| {
        let rest = code.lines().skip(line - 1).take(3).collect::<Vec<_>>().join(" ");
        let after = rest.split_once(&format!("\"{name}\",")).map_or("", |(_, after)| after.trim_start());
        let is_help = after.strip_prefix('"').is_some_and(|help| help.starts_with(|c: char| c.is_ascii_uppercase()));
        is_help && is_metric_name(name.trim_start_matches(PREFIX))
    }));
    names
}

/// The metric that a table's row describes.
fn described(line: &str) -> Option<&str> {
    line.strip_prefix("| `")
        .and_then(|rest| rest.split_once('`'))
        .map(|(name, _)| name)
        .filter(|n| n.starts_with(PREFIX))
}

const PREFIX: &str = "antiphon_";
/// What the registry adds to a name: for counters, and for units.
const ENDINGS: [&str; 4] = ["", "_total", "_seconds", "_seconds_total"];

#[cfg(test)]
mod tests {
    use super::*;

    const CODE: &str = "use prometheus_client::x;\n\
        r.register(\n    \"sends\", help, m);\n\
        let drops = family(\"dropped_packets\", \"Datagrams dropped\");\n\
        r.register_with_unit(\"skew\", help, Unit::Seconds, m);\n\
        for (name, help) in [(\"antiphon_runtime_renewals\", \"Renewed\")] {}\n\
        let label = (\"direction\", \"up\");\n";

    const TEXT: &str = "| metric | type |\n| `antiphon_relay_sends_total` | counter |\n\
        | `antiphon_relay_dropped_packets_total` | counter |\n| `antiphon_relay_skew_seconds` | gauge |\n\
        | `antiphon_runtime_renewals_total` | counter |\n";

    fn found(text: &str, code: &str) -> Vec<String> {
        let sources = [Source { file: "relay/src/metrics.rs".into(), text: code.to_owned() }];
        check(Path::new("M.md"), text, &sources).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn metrics_that_are_described_pass() {
        assert_eq!(found(TEXT, CODE), [""; 0]);
    }

    #[test]
    fn a_metric_without_a_description_is_found() {
        let code = format!("{CODE}r.register(\"routes\", help, m);\n");
        assert_eq!(found(TEXT, &code), ["relay/src/metrics.rs:8: metric antiphon_relay_routes is not in M.md"]);
    }

    #[test]
    fn a_description_without_a_metric_is_found() {
        let text = format!("{TEXT}| `antiphon_relay_routes` | gauge |\n");
        assert_eq!(found(&text, CODE), ["M.md:6: no program registers antiphon_relay_routes"]);
    }

    #[test]
    fn tests_register_nothing() {
        let code = format!("{CODE}#[cfg(test)]\nmod tests {{\n    r.register(\"routes\", help, m);\n}}\n");
        assert_eq!(found(TEXT, &code), [""; 0]);
    }
}
