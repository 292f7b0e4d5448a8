//! The forms that strings may have. Each is a pattern for the schema and words for people.

/// A pattern (RE2 syntax, anchored) and what it admits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Form {
    pub(crate) pattern: &'static str,
    pub(crate) meaning: &'static str,
}

/// The form with this pattern.
pub(crate) fn of_pattern(pattern: &str) -> Option<Form> {
    [TIME_SPAN, NAME, LABEL].into_iter().find(|form| form.pattern == pattern)
}

/// See [`crate::TimeSpan`].
pub(crate) const TIME_SPAN: Form = Form {
    pattern: "^([0-9]{1,4}h)?([0-9]{1,6}m)?([0-9]{1,8}s)?([0-9]{1,10}ms)?$",
    meaning: "a duration such as 600ms, 90s, 15m or 1h30m",
};

/// A name that becomes part of DNS names (RFC 1035, section 2.3.1, lower case).
pub(crate) const NAME: Form = Form {
    pattern: "^[a-z]([-a-z0-9]*[a-z0-9])?$",
    meaning: "lower-case letters, digits and '-', beginning with a letter and not ending with '-'",
};

/// A value that becomes a label of Kubernetes objects.
pub(crate) const LABEL: Form = Form {
    pattern: "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
    meaning: "lower-case letters, digits and '-', neither beginning nor ending with '-'",
};
