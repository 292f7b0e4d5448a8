//! ARCHITECTURE.md: each invariant names the tests that enforce it, and they exist.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use super::Violation;

/// Checks the text against the tests there are.
///
/// An invariant is a heading, a list item or a table row that begins with its number, `I1` to `I12`, in bold or not; its
/// text goes on to the next invariant or heading. A test is a path in backticks with `tests` or a test binary in it:
/// `relay::table::tests::stale_updates_are_refused`. What does not exist so far says "Not built yet".
pub(super) fn check(file: &Path, text: &str, tests: &BTreeSet<String>) -> Vec<Violation> {
    let mut violations = Vec::new();
    let mut invariants: BTreeMap<u32, (usize, Vec<String>, bool)> = BTreeMap::new();
    let mut current = None;
    for (index, line) in text.lines().enumerate() {
        let number = invariant(line);
        if number.is_some() || line.starts_with('#') {
            current = number;
        }
        for reference in references(line) {
            if !tests.contains(&reference) {
                let text = format!("there is no test {reference}");
                violations.push(Violation::new(file, index + 1, text));
            }
            if let Some(number) = current {
                invariants.entry(number).or_insert((index + 1, Vec::new(), false)).1.push(reference);
            }
        }
        if let Some(number) = current {
            let entry = invariants.entry(number).or_insert((index + 1, Vec::new(), false));
            entry.2 |= line.to_lowercase().contains("not built yet");
        }
    }
    for number in 1..=INVARIANTS {
        let problem = match invariants.get(&number) {
            None => Some((0, format!("invariant I{number} is not described"))),
            Some((line, found, false)) if found.is_empty() => {
                Some((*line, format!("invariant I{number} names no test that enforces it")))
            }
            Some(_) => None,
        };
        violations.extend(problem.map(|(line, text)| Violation::new(file, line, text)));
    }
    violations
}

/// The number of the invariant that a line begins.
fn invariant(line: &str) -> Option<u32> {
    let rest = line.trim_start_matches(['#', '*', '|', '-', ' ']).strip_prefix('I')?;
    let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, after) = rest.split_at(digits);
    // "I1 One packet rule", not "I18n".
    let ends = !after.starts_with(|c: char| c.is_alphanumeric() || c == '-');
    number.parse().ok().filter(|_| ends)
}

/// Tests that a line names.
fn references(line: &str) -> Vec<String> {
    let quoted = line.split('`').skip(1).step_by(2);
    let named = quoted.filter(|path| {
        let segments: Vec<&str> = path.split("::").collect();
        let word = |segment: &&str| {
            !segment.is_empty() && segment.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        };
        segments.len() > 2 && segments.iter().all(word) && segments.iter().any(|s| ["tests", "it"].contains(s))
    });
    named.map(str::to_owned).collect()
}

const INVARIANTS: u32 = 12;

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<String> {
        let tests = ["relay::table::tests::exact", "relay::it::drain::whole"].map(str::to_owned);
        check(Path::new("A.md"), text, &tests.into()).iter().map(ToString::to_string).collect()
    }

    fn others(from: u32) -> String {
        (from..=INVARIANTS).map(|number| format!("- **I{number}** Not built yet.\n")).collect()
    }

    #[test]
    fn invariants_with_existing_tests_pass() {
        let text = "## I1 One packet rule\nText.\nTests: `relay::table::tests::exact`, see `relay::table`.\n";
        assert_eq!(found(&format!("{text}| I2 | x | `relay::it::drain::whole` |\n{}", others(3))), [""; 0]);
    }

    #[test]
    fn invariants_without_a_test_are_found() {
        let text = format!("**I1 One packet rule.** Always.\n# Other\n`relay::table::tests::exact`\n{}", others(3));
        assert_eq!(
            found(&text),
            ["A.md:1: invariant I1 names no test that enforces it", "A.md: invariant I2 is not described",]
        );
    }

    #[test]
    fn tests_that_do_not_exist_are_found() {
        let text = format!("- I1: `relay::table::tests::gone`\n{}", others(2));
        assert_eq!(found(&text), ["A.md:1: there is no test relay::table::tests::gone"]);
    }
}
