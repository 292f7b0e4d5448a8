//! Events: what happened to an object, for people who look at it.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client, Resource,
    runtime::events::{Event, Recorder, Reporter},
};

pub use kube::runtime::events::EventType;

use crate::labels::CONTROLLER;

/// Publishes events. Losing one never fails a reconcile.
#[derive(Clone)]
pub struct Events {
    recorder: Recorder,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

impl Events {
    /// Publishes through this client as this process.
    #[must_use]
    pub fn new(client: Client, instance: String) -> Self {
        let reporter = Reporter { controller: CONTROLLER.to_owned(), instance: Some(instance) };
        Self { recorder: Recorder::new(client, reporter) }
    }

    /// Something was done, as it should be.
    pub async fn normal<K>(&self, object: &K, reason: &str, action: &str, note: impl Into<String>)
    where
        K: Resource<DynamicType = ()>,
    {
        self.publish(object, None, EventType::Normal, reason, action, note.into()).await;
    }

    /// Something was done to `related`, which belongs to `object`.
    pub async fn about<K, R>(&self, object: &K, related: &R, reason: &str, action: &str, note: impl Into<String>)
    where
        K: Resource<DynamicType = ()>,
        R: Resource<DynamicType = ()>,
    {
        let related = Some(related.object_ref(&()));
        self.publish(object, related, EventType::Normal, reason, action, note.into()).await;
    }

    /// Something is wrong; the note says what to do.
    pub async fn warning<K>(&self, object: &K, reason: &str, action: &str, note: impl Into<String>)
    where
        K: Resource<DynamicType = ()>,
    {
        self.publish(object, None, EventType::Warning, reason, action, note.into()).await;
    }

    async fn publish<K>(
        &self,
        object: &K,
        secondary: Option<ObjectReference>,
        type_: EventType,
        reason: &str,
        action: &str,
        mut note: String,
    ) where
        K: Resource<DynamicType = ()>,
    {
        note.truncate(note.floor_char_boundary(LONGEST_NOTE));
        let event = Event { type_, reason: reason.to_owned(), note: Some(note), action: action.to_owned(), secondary };
        if let Err(error) = self.recorder.publish(&event, &object.object_ref(&())).await {
            tracing::warn!(reason, %error, "an event could not be published");
        }
    }
}

/// Bytes that the API takes.
const LONGEST_NOTE: usize = 1_000;
