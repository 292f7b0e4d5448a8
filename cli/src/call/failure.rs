//! What is said of a call that did not come about.

use antiphon_client::RouterError;
use antiphon_crds::nearest;
use antiphon_proto::v1::Refusal;
use serde_json::{Value, json};

use crate::{
    Interrupted,
    caller::{CallFailure, Wanted},
    explain::{self, Weighed},
    fleet::Context,
    present::{self, out},
    status,
};

/// Shows the error and, of a refusal, what was found about each region and worker.
pub(super) async fn show(error: anyhow::Error, wanted: &Wanted, context: &Context, json: bool) -> anyhow::Result<()> {
    let failure = error.downcast_ref::<CallFailure>();
    let refusal = match failure {
        Some(CallFailure::Router(RouterError::Refused(refusal))) => Some(&**refusal),
        _ => None,
    };
    let hint = match failure {
        Some(CallFailure::Router(failure)) => hint(failure, wanted, context).await,
        _ => None,
    };
    let text = match &hint {
        Some(hint) => format!("{error}: {hint}"),
        None => error.to_string(),
    };
    if json {
        let of_session = (!error.is::<Interrupted>()).then(|| wanted.session.to_string());
        out!("{}", serde_json::to_string_pretty(&as_json(&text, of_session, refusal))?);
    }
    present::error(&anyhow::anyhow!(text));
    if let Some(refusal) = refusal.filter(|refusal| !json && !refusal.candidates.is_empty()) {
        eprintln!();
        present::print_error(&explain::candidates(&refusal.candidates));
    }
    Ok(())
}

/// What to do, where it can be told.
async fn hint(error: &RouterError, wanted: &Wanted, context: &Context) -> Option<String> {
    match error {
        RouterError::Unavailable { .. } => Some("is the fleet running?".into()),
        RouterError::Invalid(text) if text.starts_with("codec:") => Some("choose another with --codec".into()),
        RouterError::Refused(refusal) if refusal.reason == "no_such_agent" => {
            one_of(&wanted.agent, &status::agents(context).await)
        }
        RouterError::Refused(_) => {
            let regions: Vec<_> = context.routers.iter().map(|router| router.region.clone()).collect();
            let unknown = wanted.regions.iter().find(|region| !regions.contains(region))?;
            Some(format!("there is no region {unknown}: {}", one_of(unknown, &regions)?))
        }
        _ => None,
    }
}

/// `did you mean shop/desk?`, or all that there are.
fn one_of(wanted: &str, known: &[String]) -> Option<String> {
    let near = nearest(wanted, known.iter().map(String::as_str)).map(|near| format!("did you mean {near}?"));
    near.or_else(|| (!known.is_empty()).then(|| format!("there are {}", known.join(", "))))
}

/// The refusal in the form of the HTTP API.
fn as_json(error: &str, session: Option<String>, refusal: Option<&Refusal>) -> Value {
    let mut json = json!({ "session": session, "error": error });
    if let Some(refusal) = refusal {
        json["reason"] = refusal.reason.as_str().into();
        json["detail"] = refusal.detail.as_str().into();
        json["retryAfterMs"] = (refusal.retry_after_ms > 0).then_some(refusal.retry_after_ms).into();
        json["candidates"] = refusal.candidates.iter().map(|candidate| json!(Weighed::of(candidate))).collect();
    }
    json
}

#[cfg(test)]
mod tests {
    use super::*;
    use antiphon_proto::v1::Candidate;

    #[test]
    fn a_slip_is_named_and_otherwise_what_there_is() {
        let known = ["shop/desk".to_owned(), "hotel/concierge".to_owned()];
        assert_eq!(one_of("shop/dsek", &known).unwrap(), "did you mean shop/desk?");
        assert_eq!(one_of("default/x", &known).unwrap(), "there are shop/desk, hotel/concierge");
        assert_eq!(one_of("default/x", &[]), None);
    }

    #[test]
    fn a_refusal_for_machines_has_every_candidate() {
        let candidate = Candidate { region: "north".into(), verdict: "full".into(), ..Candidate::default() };
        let refusal = Refusal { reason: "no_capacity".into(), candidates: vec![candidate], ..Refusal::default() };
        let json = as_json("refused", None, Some(&refusal));
        assert_eq!((&json["reason"], &json["candidates"][0]["verdict"]), (&"no_capacity".into(), &"full".into()));
        assert_eq!(as_json("x", None, None), json!({"session": null, "error": "x"}));
    }
}
