//! What a worker's pod is made from, and its revision.

use serde::Serialize;
use serde_json::{Value, json};

use super::revision;
use crate::{VoiceAgentSpec, Worker, pod::SecretKeyRef};

/// Everything of an agent that shapes its workers' pods in one region. Two that are equal make the same pods.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkerTemplate {
    /// The agent's worker template, with what the agent's region adds; the image is never absent.
    pub worker: Worker,
    /// Calls one worker holds.
    pub slots: u32,
    /// The engine's key, mounted into the pod.
    pub api_key: Option<SecretKeyRef>,
    /// `rollout.restartedAt`.
    pub restarted_at: Option<String>,
}

impl WorkerTemplate {
    /// The template of an agent in one of its regions. `default_image` is for agents that name none.
    pub fn of(spec: &VoiceAgentSpec, region: &str, default_image: &str) -> Self {
        let mut worker = spec.worker.clone();
        worker.image.get_or_insert_with(|| default_image.to_owned());
        for pool in spec.regions.iter().filter(|pool| pool.name == region) {
            worker.node_selector.extend(pool.node_selector.clone());
            worker.tolerations.extend(pool.tolerations.iter().cloned());
        }
        Self {
            worker,
            slots: spec.sessions.slots_per_worker,
            api_key: spec.engine.api_key_secret_ref.clone(),
            restarted_at: spec.rollout.restarted_at.clone(),
        }
    }

    /// Its hash: ten hex digits. A field that has its default counts as absent, so that a version with more fields
    /// finds the same revision and replaces no worker.
    pub fn revision(&self) -> String {
        let plain = |value: &Worker| serde_json::to_value(value).expect("templates are plain data");
        let (mut worker, defaults) = (plain(&self.worker), plain(&Worker::default()));
        if let (Some(fields), Some(defaults)) = (worker.as_object_mut(), defaults.as_object()) {
            fields.retain(|name, value| defaults.get(name) != Some(value));
        }
        let mut parts = json!({"worker": worker, "slots": self.slots});
        for (name, part) in [("apiKey", json!(self.api_key)), ("restartedAt", json!(self.restarted_at))] {
            if part != Value::Null {
                parts[name] = part;
            }
        }
        // Whatever order somebody wrote the fields in.
        parts.sort_all_objects();
        revision(&parts)
    }
}

/// The worker revision of an agent in one of its regions: see [`WorkerTemplate`].
pub fn worker_revision(spec: &VoiceAgentSpec, region: &str, default_image: &str) -> String {
    WorkerTemplate::of(spec, region, default_image).revision()
}
