//! Objects that are to be reconciled. Each is in its queue once at most, however often it is asked for, so a queue is
//! never longer than there are objects, and nobody ever waits to put something in.

use std::{collections::HashSet, convert::Infallible, fmt, sync::Arc};

use futures::{Stream, stream};
use kube::runtime::{controller::ReconcileRequest, reflector::ObjectRef};
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::apply::Owned;

/// Names of objects of one kind. Clones are one queue.
#[derive(Clone)]
pub struct Queue<K: Owned> {
    inner: Arc<Inner<K>>,
}

struct Inner<K: Owned> {
    waiting: Mutex<HashSet<ObjectRef<K>>>,
    filled: Notify,
}

impl<K: Owned> fmt::Debug for Queue<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").field("waiting", &self.inner.waiting.lock().len()).finish()
    }
}

impl<K: Owned> Default for Queue<K> {
    fn default() -> Self {
        Self { inner: Arc::new(Inner { waiting: Mutex::default(), filled: Notify::new() }) }
    }
}

impl<K: Owned> Queue<K> {
    /// Asks for an object by its name.
    pub fn push(&self, namespace: &str, name: &str) {
        self.push_ref(ObjectRef::new(name).within(namespace));
    }

    /// Asks for this object.
    pub fn push_object(&self, object: &K) {
        self.push_ref(ObjectRef::from_obj(object));
    }

    fn push_ref(&self, reference: ObjectRef<K>) {
        if self.inner.waiting.lock().insert(reference) {
            self.inner.filled.notify_one();
        }
    }

    /// Takes what is waiting, in batches; for one reader.
    pub(crate) fn requests(&self) -> impl Stream<Item = Result<ReconcileRequest<K>, Infallible>> + Send + use<K> {
        stream::unfold((self.clone(), Vec::new()), async |(queue, mut batch): (Self, Vec<ObjectRef<K>>)| {
            loop {
                if let Some(reference) = batch.pop() {
                    return Some((Ok(ReconcileRequest::from(reference)), (queue, batch)));
                }
                batch.extend(queue.inner.waiting.lock().drain());
                if batch.is_empty() {
                    queue.inner.filled.notified().await;
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;
    use k8s_openapi::api::core::v1::ConfigMap;

    use super::*;

    #[tokio::test]
    async fn an_object_is_in_it_once() {
        let queue = Queue::<ConfigMap>::default();
        for name in ["a", "b", "a"] {
            queue.push("ns", name);
        }
        let requests = queue.requests();
        let mut requests = std::pin::pin!(requests);
        let mut names = Vec::new();
        for _ in 0..2 {
            names.push(requests.next().await.unwrap().unwrap().obj_ref.name);
        }
        names.sort();
        assert_eq!(names, ["a", "b"]);
        assert!(futures::poll!(requests.next()).is_pending());
        queue.push("ns", "a");
        assert_eq!(requests.next().await.unwrap().unwrap().obj_ref.name, "a");
    }
}
