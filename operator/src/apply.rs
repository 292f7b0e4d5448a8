//! Writing objects: server-side apply with one field manager, and no request where nothing would change.

pub mod diff;

use std::{
    collections::HashMap,
    fmt::{self, Debug},
    sync::Arc,
};

use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions, PropagationPolicy, ValidationDirective},
    core::NamespaceResourceScope,
};
use parking_lot::Mutex;
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    Error,
    cache::Cached,
    labels::{APPLIED, FIELD_MANAGER, SEED_MANAGER},
    metrics::Metrics,
};

use diff::Digest;

/// A namespaced kind that the operator writes.
pub trait Owned: Cached + Resource<Scope = NamespaceResourceScope> + Serialize {}

impl<K> Owned for K where K: Cached + Resource<Scope = NamespaceResourceScope> + Serialize {}

/// What became of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// It is as it should be; no request was made.
    Unchanged,
    /// It was not there.
    Created,
    /// The operator wants something else than before.
    Changed,
    /// Somebody else had changed what the operator wants.
    Corrected,
}

/// Writes objects. Every request passes the client's fence.
pub struct Applier {
    client: Client,
    metrics: Arc<Metrics>,
    /// Objects that the API server stores otherwise than they were applied (`1000m` as `1`): what was applied and what
    /// became of it. Few; grows with such objects only.
    normalised: Mutex<HashMap<String, (Digest, Digest)>>,
}

impl Debug for Applier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Applier").finish_non_exhaustive()
    }
}

impl Applier {
    /// Writes through a fenced client.
    #[must_use]
    pub fn new(client: Client, metrics: Arc<Metrics>) -> Self {
        Self { client, metrics, normalised: Mutex::default() }
    }

    fn api<K: Owned>(&self, object: &K) -> Api<K> {
        Api::namespaced(self.client.clone(), &object.namespace().unwrap_or_default())
    }

    /// Makes an object what `desired` says and leaves fields that it does not name to others. `live` is what the cache
    /// holds of it.
    ///
    /// # Errors
    /// The API server refuses or cannot be reached.
    pub async fn apply<K: Owned>(&self, desired: &K, live: Option<&K>) -> Result<Applied, Error> {
        let (mut wanted, digest) = prepared(desired)?;
        let key = key(desired, "");
        let outcome = match live {
            None => Applied::Created,
            Some(live) if live.annotations().get(APPLIED).map(String::as_str) != Some(&digest.to_string()) => {
                Applied::Changed
            }
            Some(live) => {
                let live = value(live)?;
                if diff::contains(&live, &wanted) || self.is_normalised(&key, digest, &live, &wanted) {
                    return Ok(Applied::Unchanged);
                }
                Applied::Corrected
            }
        };
        wanted["metadata"]["annotations"][APPLIED] = digest.to_string().into();
        let api = self.api(desired);
        let stored = api.patch(&desired.name_any(), &server_side(false), &Patch::Apply(&wanted)).await?;
        self.remember(key, digest, &value(&stored)?, &wanted);
        if outcome == Applied::Corrected {
            self.metrics.corrected();
        }
        Ok(outcome)
    }

    /// Makes an object's status what is given; true if a request was needed. All of the status is the operator's.
    ///
    /// # Errors
    /// The API server refuses or cannot be reached.
    pub async fn apply_status<K: Owned>(&self, live: &K, status: &impl Serialize) -> Result<bool, Error> {
        let status = diff::pruned(value(status)?);
        let present = diff::pruned(value(live)?["status"].take());
        let (key, digest) = (key(live, "status"), Digest::of(&status));
        if present == status || self.is_normalised(&key, digest, &present, &status) {
            return Ok(false);
        }
        let patch = json!({
            "apiVersion": K::api_version(&()), "kind": K::kind(&()),
            "metadata": {"name": live.name_any(), "namespace": live.namespace()},
            "status": status,
        });
        let stored = self.api(live).patch_status(&live.name_any(), &server_side(false), &Patch::Apply(&patch)).await?;
        let stored = diff::pruned(value(&stored)?["status"].take());
        self.remember(key, digest, &stored, &status);
        Ok(true)
    }

    /// Creates an object unless it is there; true if it was created. Its fields belong to whoever sets them next: what
    /// is applied later must not name those that people may change.
    ///
    /// # Errors
    /// The API server refuses or cannot be reached.
    pub async fn seed<K: Owned>(&self, object: &K) -> Result<bool, Error> {
        let params = PostParams { field_manager: Some(SEED_MANAGER.to_owned()), ..PostParams::default() };
        match self.api(object).create(&params, object).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Asks the API server whether it would take this object, without keeping it.
    ///
    /// # Errors
    /// It would not (its words are in the error), or it cannot be reached.
    pub async fn dry_run<K: Owned>(&self, object: &K) -> Result<(), Error> {
        let (wanted, _) = prepared(object)?;
        self.api(object).patch(&object.name_any(), &server_side(true), &Patch::Apply(&wanted)).await?;
        Ok(())
    }

    /// Changes some fields of an object that is otherwise another's (JSON merge patch, RFC 7396). Refused as a conflict
    /// if the object is no longer the one in `live`.
    ///
    /// # Errors
    /// The API server refuses or cannot be reached.
    pub async fn merge<K: Owned>(&self, live: &K, mut patch: Value) -> Result<K, Error> {
        patch["metadata"]["uid"] = live.uid().into();
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        Ok(self.api(live).patch(&live.name_any(), &params, &Patch::Merge(&patch)).await?)
    }

    /// Deletes an object if it is still the one in `live`, its dependents after it; false if it is gone already.
    ///
    /// # Errors
    /// Another object has its name by now, or the API server refuses or cannot be reached.
    pub async fn delete<K: Owned>(&self, live: &K) -> Result<bool, Error> {
        self.delete_if(live, None).await
    }

    /// As [`Self::delete`], and only if nothing of the object has changed since it was read.
    ///
    /// # Errors
    /// It has changed (a conflict), or the API server refuses or cannot be reached.
    pub async fn delete_unchanged<K: Owned>(&self, live: &K) -> Result<bool, Error> {
        self.delete_if(live, live.resource_version()).await
    }

    async fn delete_if<K: Owned>(&self, live: &K, resource_version: Option<String>) -> Result<bool, Error> {
        let params = DeleteParams {
            preconditions: Some(Preconditions { uid: live.uid(), resource_version }),
            propagation_policy: Some(PropagationPolicy::Background),
            ..DeleteParams::default()
        };
        self.normalised.lock().remove(&key(live, ""));
        match self.api(live).delete(&live.name_any(), &params).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Puts a finalizer on an object; true if it was not there.
    ///
    /// # Errors
    /// The object has changed meanwhile, or the API server refuses or cannot be reached.
    pub async fn add_finalizer<K: Owned>(&self, live: &K, finalizer: &str) -> Result<bool, Error> {
        if live.finalizers().iter().any(|present| present == finalizer) || live.meta().deletion_timestamp.is_some() {
            return Ok(false);
        }
        let finalizers: Vec<_> = live.finalizers().iter().map(String::as_str).chain([finalizer]).collect();
        self.set_finalizers(live, &finalizers).await?;
        Ok(true)
    }

    /// Takes a finalizer off an object; true if it was there.
    ///
    /// # Errors
    /// The object has changed meanwhile, or the API server refuses or cannot be reached.
    pub async fn remove_finalizer<K: Owned>(&self, live: &K, finalizer: &str) -> Result<bool, Error> {
        let finalizers: Vec<_> =
            live.finalizers().iter().map(String::as_str).filter(|present| *present != finalizer).collect();
        if finalizers.len() == live.finalizers().len() {
            return Ok(false);
        }
        match self.set_finalizers(live, &finalizers).await {
            Err(error) if error.is_not_found() => Ok(false),
            outcome => outcome.map(|()| true),
        }
    }

    /// A list is replaced whole, so it must be the one that was read.
    async fn set_finalizers<K: Owned>(&self, live: &K, finalizers: &[&str]) -> Result<(), Error> {
        let version = live.resource_version();
        self.merge(live, json!({"metadata": {"finalizers": finalizers, "resourceVersion": version}})).await.map(drop)
    }

    fn is_normalised(&self, key: &str, digest: Digest, live: &Value, wanted: &Value) -> bool {
        let known = self.normalised.lock().get(key).copied();
        known == Some((digest, Digest::of(&diff::projected(live, wanted))))
    }

    fn remember(&self, key: String, digest: Digest, stored: &Value, wanted: &Value) {
        if diff::contains(stored, wanted) {
            self.normalised.lock().remove(&key);
        } else {
            let became = Digest::of(&diff::projected(stored, &without_mark(wanted)));
            self.normalised.lock().insert(key, (digest, became));
        }
    }
}

/// What is compared later does not hold the mark of what was applied.
fn without_mark(wanted: &Value) -> Value {
    let mut wanted = wanted.clone();
    if let Some(annotations) = wanted.pointer_mut("/metadata/annotations").and_then(Value::as_object_mut) {
        annotations.remove(APPLIED);
    }
    wanted
}

/// The object as it is applied, and its digest.
fn prepared<K: Owned>(desired: &K) -> Result<(Value, Digest), Error> {
    let mut wanted = diff::pruned(value(desired)?);
    wanted["apiVersion"] = K::api_version(&()).into();
    wanted["kind"] = K::kind(&()).into();
    if wanted["metadata"]["annotations"].is_null() {
        wanted["metadata"]["annotations"] = json!({});
    }
    let digest = Digest::of(&wanted);
    Ok((wanted, digest))
}

fn value(object: &impl Serialize) -> Result<Value, Error> {
    serde_json::to_value(object).map_err(|error| Error::Object(format!("an object cannot be written as JSON: {error}")))
}

fn key<K: Owned>(object: &K, part: &str) -> String {
    format!("{}/{}/{}/{part}", K::kind(&()), object.namespace().unwrap_or_default(), object.name_any())
}

fn server_side(dry_run: bool) -> PatchParams {
    PatchParams { dry_run, ..PatchParams::apply(FIELD_MANAGER).force().validation(ValidationDirective::Strict) }
}

#[cfg(test)]
mod tests;
