//! What is said file by file.

use std::path::Path;

use super::{Source, Violation};

/// Every convention of a single file that is not kept.
pub(super) fn check(source: &Source) -> Vec<Violation> {
    let Source { file, text } = source;
    let mut violations = Vec::new();
    let production = if is_test_file(file) { 0 } else { production_lines(text) };
    if production > LONGEST_FILE {
        let text = format!("{production} lines before the tests, more than {LONGEST_FILE}: split it by what it knows");
        violations.push(Violation::new(file, 0, text));
    }
    let virtual_time = text.contains("start_paused = true") || text.contains("time::pause()");
    for (index, line) in text.lines().enumerate() {
        let code = code(line);
        let mut report = |text: &str| violations.push(Violation::new(file, index + 1, text));
        if code.trim_start().starts_with("#[ignore") {
            report("an ignored test protects nothing: repair it, or assert what is so today");
        }
        if index >= production && !virtual_time && calls_sleep(&code) {
            report("tests do not sleep: wait for a condition with a deadline, or use virtual time");
        }
    }
    violations.extend(check_metrics(source));
    violations
}

/// What holds for the root file of a crate.
pub(super) fn check_root(source: &Source) -> Option<Violation> {
    let forbids = source.text.lines().any(|line| line == "#![forbid(unsafe_code)]");
    (!forbids).then(|| Violation::new(&source.file, 0, "a crate's root says #![forbid(unsafe_code)]"))
}

/// A line without its strings and its comment. Strings over several lines are not recognised.
pub(super) fn code(line: &str) -> String {
    let mut code = String::new();
    let mut chars = line.chars().peekable();
    let mut in_string = false;
    while let Some(c) = chars.next() {
        match (in_string, c) {
            (true, '\\') => drop(chars.next()),
            (_, '"') => {
                in_string = !in_string;
                code.push('"');
            }
            (true, _) => {}
            // A quote as a character is no string.
            (false, '\'') if chars.peek() == Some(&'"') => drop(chars.next()),
            (false, '/') if chars.peek() == Some(&'/') => break,
            (false, c) => code.push(c),
        }
    }
    code
}

/// Lines before the tests of the file. Tests in a file of their own end it only where they are the last thing.
fn production_lines(text: &str) -> usize {
    let lines: Vec<&str> = text.lines().collect();
    let tests = lines.windows(2).enumerate().position(|(at, pair)| {
        let module = pair[1].trim_start_matches("pub(crate) ");
        let here = module.ends_with('{') || at + 2 == lines.len();
        pair[0].starts_with("#[cfg(test)]") && module.starts_with("mod ") && here
    });
    tests.unwrap_or(lines.len())
}

/// The part of the file before its tests.
pub(super) fn production(text: &str) -> &str {
    let lines = text.split_inclusive('\n').take(production_lines(text));
    &text[..lines.map(str::len).sum()]
}

pub(super) fn is_test_file(file: &Path) -> bool {
    file.ends_with("tests.rs") || file.components().any(|component| component.as_os_str() == "tests")
}

fn calls_sleep(code: &str) -> bool {
    ["sleep(", "sleep_until(", "sleep_ms("].iter().any(|call| {
        code.match_indices(call).any(|(at, _)| {
            // `fn oversleep(` is another word.
            !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_') && !code[..at].ends_with("fn ")
        })
    })
}

/// Metrics are `antiphon_<component>_<noun>[_<unit>]`; the registry adds `_total` to counters.
fn check_metrics(source: &Source) -> Vec<Violation> {
    let component = source.file.iter().next().unwrap_or_default().to_string_lossy();
    let expected = format!("antiphon_{component}");
    let mut violations = Vec::new();
    for (line, name) in arguments(&source.text, ".sub_registry_with_prefix(") {
        if name != expected {
            let text = format!("metrics of this crate begin with {expected}, not {name}");
            violations.push(Violation::new(&source.file, line, text));
        }
    }
    for (line, name) in arguments(&source.text, ".register(") {
        if !is_metric_name(name) {
            let text = format!(
                "metric {name}: write lower-case words joined by '_', without antiphon_ and _total, which are added"
            );
            violations.push(Violation::new(&source.file, line, text));
        }
    }
    violations
}

/// Calls whose first argument is a string: their lines and the strings.
pub(super) fn arguments<'a>(text: &'a str, call: &str) -> Vec<(usize, &'a str)> {
    let calls = text.match_indices(call).filter_map(|(at, _)| {
        let line = text[..at].matches('\n').count();
        let is_code = text.lines().nth(line).is_some_and(|line| code(line).contains(call));
        Some((line + 1, literal(&text[at + call.len()..])?)).filter(|_| is_code)
    });
    calls.collect()
}

/// The string that an argument list begins with.
fn literal(arguments: &str) -> Option<&str> {
    let rest = arguments.trim_start().strip_prefix('"')?;
    rest.split_once('"').map(|(literal, _)| literal)
}

pub(super) fn is_metric_name(name: &str) -> bool {
    let word = |word: &str| {
        word.starts_with(|c: char| c.is_ascii_lowercase())
            && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
    };
    name.split('_').all(word) && !name.ends_with("_total") && !name.starts_with("antiphon_")
}

/// Lines of a file before its tests.
const LONGEST_FILE: usize = 450;

#[cfg(test)]
mod tests {
    use super::*;

    fn found(file: &str, text: &str) -> Vec<String> {
        let source = Source { file: file.into(), text: text.to_owned() };
        check(&source).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn length_counts_what_comes_before_the_tests() {
        let production = "fn f() {}\n".repeat(450);
        let tests = "#[cfg(test)]\nmod tests {\n".to_owned() + &"fn t() {}\n".repeat(450);
        assert_eq!(found("core/src/a.rs", &format!("{production}{tests}")), [""; 0]);
        let long = format!("{production}fn g() {{}}\n{tests}");
        let expected = "core/src/a.rs: 451 lines before the tests, more than 450: split it by what it knows";
        assert_eq!(found("core/src/a.rs", &long), [expected]);
        assert_eq!(found("core/src/a/tests.rs", &long), [""; 0]);
        assert_eq!(found("core/src/a.rs", &format!("{production}#[cfg(test)]\nmod tests;\n")), [""; 0]);
    }

    #[test]
    fn ignored_tests_are_found() {
        assert_eq!(found("core/src/a.rs", "#[test]\n    #[ignore = \"slow\"]\nfn f() {}\n").len(), 1);
        assert_eq!(found("core/src/a.rs", "// #[ignore]\nlet s = \"#[ignore]\";\n"), [""; 0]);
    }

    #[test]
    fn sleep_is_found_in_tests_alone() {
        let test = "#[cfg(test)]\nmod tests {\n    tokio::time::sleep(D).await;\n}\n";
        assert_eq!(
            found("core/src/a.rs", test),
            ["core/src/a.rs:3: tests do not sleep: wait for a condition with a deadline, or use virtual time"]
        );
        assert_eq!(found("core/src/a.rs", "fn pause() {\n    sleep(D).await;\n}\n"), [""; 0]);
        assert_eq!(found("core/tests/it/a.rs", "fn pause() {\n    sleep(D).await;\n}\n").len(), 1);
        assert_eq!(found("core/tests/it/a.rs", "oversleep(D); // sleep(1)\nlet s = \"sleep(1)\";\n"), [""; 0]);
        let declared = "#[cfg(test)]\nmod tests;\n\nfn pause() {\n    sleep(D).await;\n}\n";
        assert_eq!(found("core/src/a.rs", declared), [""; 0], "the tests are in another file");
        let paused = format!("{test}// start_paused = true\n");
        assert_eq!(found("core/src/a.rs", &paused), [""; 0]);
    }

    #[test]
    fn roots_forbid_unsafe_code() {
        let root = |text: &str| check_root(&Source { file: "a/src/lib.rs".into(), text: text.to_owned() });
        assert!(root("//! A crate.\n#![forbid(unsafe_code)]\n").is_none());
        assert!(root("//! A crate.\n// #![forbid(unsafe_code)]\n").is_some());
    }

    #[test]
    fn metric_names_follow_the_pattern() {
        for name in ["slots", "dropped_frames", "answer_delay_seconds"] {
            assert_eq!(found("relay/src/m.rs", &format!("r.register(\n  \"{name}\", \"Help\", m);\n")), [""; 0]);
        }
        for name in ["Slots", "dropped-frames", "drops_total", "antiphon_relay_drops", "a__b", "", "1st"] {
            assert_eq!(found("relay/src/m.rs", &format!("r.register(\"{name}\", m);\n")).len(), 1, "{name}");
        }
        let prefix = |name: &str| format!("r.sub_registry_with_prefix(\"{name}\");\n");
        assert_eq!(found("relay/src/m.rs", &prefix("antiphon_relay")), [""; 0]);
        assert_eq!(found("relay/src/m.rs", &prefix("antiphon_worker")).len(), 1);
    }

    #[test]
    fn code_is_without_strings_and_comments() {
        assert_eq!(code("a(\"b // \\\" c\"); // d"), "a(\"\"); ");
        assert_eq!(code("let q = '\"'; f(x)"), "let q = '; f(x)");
    }
}
