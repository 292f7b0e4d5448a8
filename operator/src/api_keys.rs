//! API keys: Secrets labelled `antiphon.dev/api-key: "true"` in Antiphon's namespace.
//!
//! A Secret holds either the whole key under `key`, or its SHA-256 (64 hex digits) under `sha256` and its public part
//! under `id`, so that the key itself need not be in the cluster. Annotations say whose it is and what it may be used
//! for.

use std::collections::BTreeMap;

use antiphon_proto::{
    api_key::{self, ApiKey},
    v1::KeyRecord,
};
use antiphon_records as convert;
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt as _;

/// The record of a key.
///
/// # Errors
/// What is wrong with the Secret and what to do.
pub fn record(secret: &Secret) -> Result<KeyRecord, String> {
    let entry = |name: &str| -> Result<Option<String>, String> {
        let Some(value) = secret.data.as_ref().and_then(|data| data.get(name)) else {
            return Ok(None);
        };
        let text = String::from_utf8(value.0.clone()).map_err(|_| format!("data.{name} is no text"))?;
        Ok(Some(text.trim().to_owned()))
    };
    let annotation = |name: &str| secret.annotations().get(name).map(|value| value.trim().to_owned());
    let tenant = annotation(TENANT).filter(|tenant| !tenant.is_empty());
    let tenant = tenant.ok_or_else(|| format!("the annotation {TENANT} is missing: say whose key it is"))?;
    let agents = annotation(AGENTS).unwrap_or_default();
    let agents: Vec<_> =
        agents.split(',').map(str::trim).filter(|agent| !agent.is_empty()).map(str::to_owned).collect();
    if let Some(wrong) = agents.iter().find(|agent| agent.split('/').filter(|part| !part.is_empty()).count() != 2) {
        return Err(format!("the annotation {AGENTS} names {wrong:?}: expected NAMESPACE/NAME or NAMESPACE/*"));
    }
    let rate = annotation(RATE).unwrap_or_default();
    let tickets_per_minute = match rate.as_str() {
        "" => 0,
        rate => rate.parse().map_err(|_| format!("the annotation {RATE} is {rate:?}: expected a whole number"))?,
    };
    let record = match (entry("key")?, entry("sha256")?) {
        (Some(text), _) => {
            let key = ApiKey::parse(&text).map_err(|error| format!("data.key is {error}"))?;
            convert::key(&key, &tenant, agents)
        }
        (None, Some(hash)) => {
            let id = entry("id")?.ok_or("data.id is missing: with data.sha256 it names the key, as in ak_ID_SECRET")?;
            let sha256 = hex::decode(&hash).ok().filter(|hash| hash.len() == 32);
            let sha256 = sha256.ok_or("data.sha256 is no SHA-256: expected 64 hex digits of the whole key text")?;
            if !api_key::is_id(&id) {
                return Err("data.id is not the 12 characters between ak_ and the second _ of the key".to_owned());
            }
            KeyRecord { id, sha256: sha256.into(), tenant, agents, ..KeyRecord::default() }
        }
        (None, None) => return Err("neither data.key nor data.sha256 is there".to_owned()),
    };
    Ok(KeyRecord { tickets_per_minute, ..record })
}

/// All keys by id, and what is wrong with Secrets that are none.
#[must_use]
pub fn records<'a>(
    secrets: impl IntoIterator<Item = &'a Secret>,
) -> (BTreeMap<String, KeyRecord>, Vec<(&'a Secret, String)>) {
    let (mut keys, mut wrong) = (BTreeMap::new(), Vec::new());
    for secret in secrets.into_iter().filter(|secret| secret.metadata.deletion_timestamp.is_none()) {
        match record(secret) {
            Ok(key) => drop(keys.insert(key.id.clone(), key)),
            Err(problem) => wrong.push((secret, problem)),
        }
    }
    (keys, wrong)
}

/// Annotation: the tenant.
pub const TENANT: &str = "antiphon.dev/tenant";
/// Annotation: agents that the key is for, separated by commas; all unless given.
pub const AGENTS: &str = "antiphon.dev/agents";
/// Annotation: tickets that may be asked for with the key.
pub const RATE: &str = "antiphon.dev/tickets-per-minute";

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn secret(data: Value, annotations: Value) -> Secret {
        serde_json::from_value(json!({"metadata": {"name": "k", "annotations": annotations}, "stringData": null,
            "data": data.as_object().unwrap().iter().map(|(name, text)| {
                use base64::{Engine as _, engine::general_purpose::STANDARD};
                (name.clone(), STANDARD.encode(text.as_str().unwrap()).into())
            }).collect::<serde_json::Map<_, _>>()}))
        .unwrap()
    }

    const KEY: &str = "ak_0123456789ab_0123456789abcdefghjkmnpqrstvwxyz";

    #[test]
    fn a_key_and_its_hash_are_the_same_record() {
        let annotations = json!({TENANT: "acme", AGENTS: "shop/frontdesk, shop/*", RATE: "60"});
        let whole = record(&secret(json!({"key": format!("{KEY}\n")}), annotations.clone())).unwrap();
        assert_eq!((whole.tenant.as_str(), whole.tickets_per_minute, whole.agents.len()), ("acme", 60, 2));
        let hashed = json!({"sha256": hex::encode(&whole.sha256), "id": whole.id});
        assert_eq!(record(&secret(hashed, annotations)).unwrap(), whole);
    }

    #[test]
    fn what_is_wrong_is_said() {
        let tenant = json!({TENANT: "acme"});
        for (data, annotations, expected) in [
            (json!({"key": KEY}), json!({}), "antiphon.dev/tenant is missing"),
            (json!({}), tenant.clone(), "neither data.key nor data.sha256"),
            (json!({"key": "secret"}), tenant.clone(), "data.key is not an API key"),
            (json!({"sha256": "ab"}), tenant.clone(), "data.id is missing"),
            (json!({"sha256": "ab", "id": "0123456789ab"}), tenant.clone(), "expected 64 hex digits"),
            (json!({"key": KEY}), json!({TENANT: "a", RATE: "many"}), "expected a whole number"),
            (json!({"key": KEY}), json!({TENANT: "a", AGENTS: "frontdesk"}), "expected NAMESPACE/NAME"),
        ] {
            let problem = record(&secret(data, annotations)).unwrap_err();
            assert!(problem.contains(expected), "{problem}");
        }
    }
}
