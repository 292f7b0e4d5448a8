//! The forms that strings may have. Each is a pattern for the schema and words for people.

use std::sync::LazyLock;

use regex::Regex;

/// A pattern (RE2 syntax, anchored) and what it admits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Form {
    pub(crate) pattern: &'static str,
    pub(crate) meaning: &'static str,
}

/// The form with this pattern, and the pattern ready to use. Every pattern of a schema is one of a form.
pub(crate) fn of_pattern(pattern: &str) -> (Form, &'static Regex) {
    static READY: LazyLock<Vec<(Form, Regex)>> = LazyLock::new(|| {
        let ready = |form: Form| (form, Regex::new(form.pattern).expect("patterns are literals"));
        ALL.into_iter().map(ready).collect()
    });
    let known = READY.iter().find(|(form, _)| form.pattern == pattern);
    known.map(|(form, regex)| (*form, regex)).expect("a test holds schemas to the forms here")
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

/// A name of a Kubernetes object (RFC 1123, section 2.1, lower case, with dots).
pub(crate) const OBJECT_NAME: Form = Form {
    pattern: "^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$",
    meaning: "lower-case letters, digits, '-' and '.', beginning and ending with a letter or digit",
};

/// A key of a Secret's or ConfigMap's data.
pub(crate) const DATA_KEY: Form = Form { pattern: "^[-._a-zA-Z0-9]+$", meaning: "letters, digits, '-', '_' and '.'" };

/// A name of an environment variable, as shells read it.
pub(crate) const ENV_NAME: Form = Form {
    pattern: "^[-._a-zA-Z][-._a-zA-Z0-9]*$",
    meaning: "letters, digits, '_', '-' and '.', not beginning with a digit",
};

/// An amount of a resource (Kubernetes' Quantity, not negative).
pub(crate) const QUANTITY: Form = Form {
    pattern: "^[+]?([0-9]+|[0-9]+[.][0-9]*|[.][0-9]+)(([KMGTPE]i)|[numkMGTPE]|([eE][-+]?[0-9]+))?$",
    meaning: "an amount such as 500m, 2, 1Gi or 0.5",
};

/// A percentage.
pub(crate) const PERCENT: Form =
    Form { pattern: "^(100|[1-9]?[0-9])%$", meaning: "a whole number, or a percentage from 0% to 100%" };

/// A revision: the beginning of a hash.
pub(crate) const REVISION: Form = Form { pattern: "^[0-9a-f]+$", meaning: "a revision such as 4be6c2d0aa" };

/// A point in time (RFC 3339).
pub(crate) const TIME: Form = Form {
    pattern: "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}([.][0-9]{1,9})?(Z|[-+][0-9]{2}:[0-9]{2})$",
    meaning: "a time such as 2026-11-21T18:00:00Z",
};

/// An IP address and a port. The address itself is read by whoever uses it.
pub(crate) const SOCKET_ADDRESS: Form = Form {
    pattern: "^([0-9]{1,3}([.][0-9]{1,3}){3}|\\[[0-9a-fA-F:.]{2,45}\\]):[0-9]{1,5}$",
    meaning: "an address such as 192.0.2.7:4433 or [2001:db8::7]:4433",
};

/// A host name or IP address, and a port.
pub(crate) const HOST_PORT: Form = Form {
    pattern: "^([a-zA-Z0-9]([-.a-zA-Z0-9]*[a-zA-Z0-9])?|\\[[0-9a-fA-F:.]{2,45}\\]):[0-9]{1,5}$",
    meaning: "an address such as routers.example.net:7444 or 192.0.2.7:7444",
};

const ALL: [Form; 12] = [
    TIME_SPAN,
    NAME,
    LABEL,
    OBJECT_NAME,
    DATA_KEY,
    ENV_NAME,
    QUANTITY,
    PERCENT,
    REVISION,
    TIME,
    SOCKET_ADDRESS,
    HOST_PORT,
];
