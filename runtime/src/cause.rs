//! What went wrong, in one line for people.

use std::{error::Error, fmt::Write as _};

use tonic::Status;

/// An error and its causes, outermost first, each said once. Of a gRPC status what the other end said, not its form for
/// programmers; of a connection that failed the reason, not that it is one of transport.
#[must_use]
pub fn text(error: &(dyn Error + 'static)) -> String {
    let mut said: Vec<String> = Vec::new();
    let mut cause = Some(error);
    while let Some(error) = cause {
        let text = own_text(error);
        // Many errors repeat their cause in their own text.
        if !text.is_empty() && !said.iter().any(|before| before.contains(&text)) {
            said.push(text);
        }
        cause = error.source();
    }
    let mut line = said.join(": ");
    if line.is_empty() {
        let _ = write!(line, "{error}");
    }
    line
}

fn own_text(error: &(dyn Error + 'static)) -> String {
    if let Some(status) = error.downcast_ref::<Status>() {
        return match (status.message(), status.source()) {
            ("", None) => status.code().description().to_owned(),
            (message, _) => message.to_owned(),
        };
    }
    // Says that it is one; why is in its source.
    let says_nothing = error.is::<tonic::transport::Error>() && error.source().is_some();
    if says_nothing { String::new() } else { error.to_string() }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;

    #[tokio::test]
    async fn a_refused_connection_is_told_once_and_without_its_types() {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{free}")).unwrap();
        let error = endpoint.connect().await.unwrap_err();
        let expected = "tcp connect error: Connection refused (os error 111)";
        assert_eq!(text(&error), expected);
        let mut status = Status::unavailable("tcp connect error");
        status.set_source(std::sync::Arc::new(error));
        assert_eq!(text(&status), expected);
        let in_context = anyhow::Error::new(status).context("not registered");
        assert_eq!(text(in_context.as_ref()), format!("not registered: {expected}"));
    }

    #[test]
    fn a_status_is_what_the_other_end_said() {
        assert_eq!(text(&Status::not_found("no such agent")), "no such agent");
        assert_eq!(text(&Status::new(tonic::Code::Unavailable, "")), tonic::Code::Unavailable.description());
    }
}
