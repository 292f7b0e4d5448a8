//! Closed sets of the protocol in words.

use antiphon_client::{CallError, DialError, SwitchReason};
use antiphon_proto::v1::EndCode;

/// Why a call broke.
pub(crate) fn broken(error: &CallError) -> String {
    match error {
        CallError::Ended { place, code } => format!("worker {place} ended the session: {}", end(*code)),
        CallError::Refused { place, detail, .. } => format!("refused by worker {place}: {detail}"),
        other => other.to_string(),
    }
}

const fn end(code: EndCode) -> &'static str {
    match code {
        EndCode::Unspecified => "it does not say why",
        EndCode::Released => "it was deleted",
        EndCode::LongestSession => "it has lasted as long as the agent's sessions.longest allows",
        EndCode::WorkerStopping => "the worker is stopping",
        EndCode::Superseded => "a newer attempt at the same session has taken its place",
        EndCode::ClientSilent => "nothing was heard from the caller any more",
        EndCode::Internal => "something failed in the worker; see its log",
    }
}

/// Why there was no call.
pub(crate) fn refused(error: &DialError) -> String {
    match error {
        DialError::Refused { detail, .. } => format!("refused by the worker: {detail}"),
        other => other.to_string(),
    }
}

/// Why a call went on through another relay: "the one before …".
pub(crate) const fn switched(reason: SwitchReason) -> &'static str {
    match reason {
        SwitchReason::Silent => "fell silent",
        SwitchReason::Draining => "is draining",
        SwitchReason::Refused => "is gone: its port is closed",
        SwitchReason::Unheard => "no longer reaches the worker",
        SwitchReason::Unreachable => "cannot be reached from this network",
    }
}

/// The same for machines.
pub(crate) const fn switch_label(reason: SwitchReason) -> &'static str {
    match reason {
        SwitchReason::Silent => "silent",
        SwitchReason::Draining => "draining",
        SwitchReason::Refused => "refused",
        SwitchReason::Unheard => "unheard",
        SwitchReason::Unreachable => "unreachable",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ended_session_says_why_in_words() {
        let ended = CallError::Ended { place: "north/desk-0".into(), code: EndCode::WorkerStopping };
        assert_eq!(broken(&ended), "worker north/desk-0 ended the session: the worker is stopping");
    }
}
