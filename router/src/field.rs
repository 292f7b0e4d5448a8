//! What is wrong in which field of a request.

use std::fmt;

/// One field that cannot be accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct FieldError {
    /// Path in the JSON form, such as `constraints.maxRttMs` or `regions[2].number`; empty: the whole.
    pub path: String,
    /// What is wrong and what to do.
    pub problem: String,
}

impl FieldError {
    pub(crate) fn new(path: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { path: path.into(), problem: problem.into() }
    }

    /// The same below another path.
    pub(crate) fn below(self, parent: &str) -> Self {
        let path = if self.path.is_empty() { parent.to_owned() } else { format!("{parent}.{}", self.path) };
        Self { path, ..self }
    }

    /// As gRPC callers know the fields: `constraints.max_rtt_ms`.
    pub(crate) fn proto_path(&self) -> String {
        let mut path = String::with_capacity(self.path.len() + 4);
        for c in self.path.chars() {
            if c.is_ascii_uppercase() {
                path.push('_');
            }
            path.push(c.to_ascii_lowercase());
        }
        path
    }
}

impl From<FieldError> for tonic::Status {
    fn from(error: FieldError) -> Self {
        let path = error.proto_path();
        Self::invalid_argument(if path.is_empty() { error.problem } else { format!("{path}: {}", error.problem) })
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() {
            return f.write_str(&self.problem);
        }
        write!(f, "{}: {}", self.path, self.problem)
    }
}

/// Checks a DNS label (RFC 1123): 1 to 63 of `a-z`, `0-9` and `-`, not at the ends.
pub(crate) fn label(path: &str, text: &str) -> Result<String, FieldError> {
    let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let edge = text.starts_with('-') || text.ends_with('-');
    if text.is_empty() || text.len() > 63 || edge || !text.chars().all(legal) {
        let shown: String = text.chars().take(80).collect();
        return Err(FieldError::new(
            path,
            format!("{shown:?} is not a name: use 1 to 63 of a-z, 0-9 and '-', not at the ends"),
        ));
    }
    Ok(text.to_owned())
}

/// Checks `namespace/name`.
pub(crate) fn agent(path: &str, text: &str) -> Result<String, FieldError> {
    let Some((namespace, name)) = text.split_once('/') else {
        let shown: String = text.chars().take(80).collect();
        return Err(FieldError::new(path, format!("{shown:?} is not an agent: expected \"namespace/name\"")));
    };
    label(path, namespace)?;
    label(path, name)?;
    Ok(text.to_owned())
}

/// Checks `ip:port`.
pub(crate) fn socket_address(path: &str, text: &str) -> Result<String, FieldError> {
    match text.parse::<std::net::SocketAddr>() {
        Ok(address) if address.port() != 0 => Ok(text.to_owned()),
        _ => {
            let shown: String = text.chars().take(80).collect();
            Err(FieldError::new(path, format!("{shown:?} is not an address: expected IP:PORT")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_nest_and_translate() {
        let error = FieldError::new("maxRttMs", "too small").below("constraints");
        assert_eq!(error.to_string(), "constraints.maxRttMs: too small");
        assert_eq!(error.proto_path(), "constraints.max_rtt_ms");
    }

    #[test]
    fn names_and_addresses_are_checked() {
        assert!(agent("agent", "shop/front-desk").is_ok());
        for bad in ["", "shop", "shop/", "/x", "Shop/x", "shop/x/y", "shop/-x"] {
            assert!(agent("agent", bad).is_err(), "{bad}");
        }
        assert!(socket_address("a", "127.0.0.1:1").is_ok());
        assert!(socket_address("a", "[::1]:1").is_ok());
        for bad in ["", "127.0.0.1", "localhost:80", "127.0.0.1:0"] {
            assert!(socket_address("a", bad).is_err(), "{bad}");
        }
    }
}
