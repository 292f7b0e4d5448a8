//! What the API server holds, kept up to date by watches: one copy per kind, for all controllers.
//!
//! A cache is fed by one watch, or by one per namespace where the operator may not see all of them. Managed fields are
//! dropped, and whatever else nobody asks for: with a thousand agents this is most of the operator's memory.

use std::{
    collections::HashSet,
    fmt::{self, Debug},
    sync::Arc,
};

use futures::{StreamExt as _, stream};
use kube::{
    Api, Resource, ResourceExt,
    runtime::{
        WatchStreamExt as _,
        reflector::{ObjectRef, Store, store::Writer},
        watcher::{self, Event},
    },
};
use parking_lot::{Mutex, RwLock};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// A kind that can be cached.
pub trait Cached: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static {}

impl<K> Cached for K where K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static {}

/// All objects of a kind that were selected. Clones are one cache.
#[derive(Clone)]
pub struct Cache<K: Cached> {
    inner: Arc<Inner<K>>,
}

struct Inner<K: Cached> {
    feed: Mutex<Feed<K>>,
    store: Store<K>,
    listeners: RwLock<Vec<Listener<K>>>,
    ready: watch::Sender<bool>,
}

type Listener<K> = Box<dyn Fn(&K) + Send + Sync>;

impl<K: Cached> Debug for Cache<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache").field("kind", &K::kind(&())).field("objects", &self.inner.store.len()).finish()
    }
}

impl<K: Cached> Default for Cache<K> {
    fn default() -> Self {
        let mut writer = Writer::default();
        // Empty and at work from the beginning; whether it is complete is what `ready` says.
        writer.apply_watcher_event(&Event::Init);
        writer.apply_watcher_event(&Event::InitDone);
        let store = writer.as_reader();
        let feed = Mutex::new(Feed { writer, sources: Vec::new() });
        Self { inner: Arc::new(Inner { feed, store, listeners: RwLock::default(), ready: watch::Sender::new(false) }) }
    }
}

impl<K: Cached> Cache<K> {
    /// One object.
    #[must_use]
    pub fn find(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        self.inner.store.get(&ObjectRef::new(name).within(namespace))
    }

    /// All objects for which `wanted` holds. It is asked under a lock: it should be quick.
    #[must_use]
    pub fn select(&self, wanted: impl Fn(&K) -> bool) -> Vec<Arc<K>> {
        self.inner.store.state_filter(wanted)
    }

    /// All objects, in no order.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<K>> {
        self.inner.store.state()
    }

    /// The same for `kube`'s runtime.
    #[must_use]
    pub fn store(&self) -> Store<K> {
        self.inner.store.clone()
    }

    /// Has `listener` called with each object that was added, changed or deleted, after the cache has it. It is called
    /// from the watch: it should only note what is to be done.
    pub fn on_change(&self, listener: impl Fn(&K) + Send + Sync + 'static) {
        self.inner.listeners.write().push(Box::new(listener));
    }

    /// Waits until everything that was there at the beginning is in the cache.
    pub async fn ready(&self) {
        // The sender lives as long as this cache.
        let _ = self.inner.ready.subscribe().wait_for(|ready| *ready).await;
    }

    /// Feeds the cache until the stop, from each of `sources`: a namespace (`None`: all, or the kind has none) and how to
    /// ask for it. `trim` takes from each object what nobody needs. Without a source the cache is empty and complete.
    ///
    /// # Errors
    /// Never; trouble with the API server is logged and waited out.
    pub async fn follow(
        self,
        sources: Vec<(Option<String>, Api<K>)>,
        config: watcher::Config,
        trim: fn(&mut K),
        stopping: CancellationToken,
    ) -> anyhow::Result<()> {
        let (scopes, apis): (Vec<_>, Vec<_>) = sources.into_iter().unzip();
        if scopes.is_empty() {
            self.inner.ready.send_replace(true);
            stopping.cancelled().await;
            return Ok(());
        }
        self.inner.feed.lock().sources = scopes.into_iter().map(Source::new).collect();
        let watches = apis.into_iter().enumerate().map(|(index, api)| {
            let config = config.clone().page_size(PAGE);
            watcher::watcher(api, config).default_backoff().map(move |event| (index, event)).boxed()
        });
        let mut events = stream::select_all(watches).take_until(stopping.cancelled_owned()).boxed();
        while let Some((index, event)) = events.next().await {
            match event {
                Ok(event) => self.handle(index, event.modify(|object| trimmed(object, trim))),
                Err(error) => tracing::warn!(kind = %K::kind(&()), %error, "watching"),
            }
        }
        Ok(())
    }

    fn handle(&self, source: usize, event: Event<K>) {
        let (changed, complete) = {
            let mut feed = self.inner.feed.lock();
            let changed = feed.handle(source, event, &self.inner.store);
            (changed, feed.sources.iter().all(|source| source.complete))
        };
        let listeners = self.inner.listeners.read();
        for object in &changed {
            listeners.iter().for_each(|listener| listener(object));
        }
        if complete && !*self.inner.ready.borrow() {
            self.inner.ready.send_replace(true);
        }
    }
}

/// What is written into a store by several watches, each of which lists its namespace anew now and then.
struct Feed<K: Cached> {
    writer: Writer<K>,
    sources: Vec<Source<K>>,
}

struct Source<K: Cached> {
    namespace: Option<String>,
    /// What the list that is under way has shown so far.
    listed: HashSet<ObjectRef<K>>,
    /// It was listed once.
    complete: bool,
}

impl<K: Cached> Source<K> {
    fn new(namespace: Option<String>) -> Self {
        Self { namespace, listed: HashSet::new(), complete: false }
    }

    fn covers(&self, object: &K) -> bool {
        self.namespace.is_none() || self.namespace == object.namespace()
    }
}

impl<K: Cached> Feed<K> {
    /// Takes an event up and returns the objects that changed by it.
    fn handle(&mut self, source: usize, event: Event<K>, store: &Store<K>) -> Vec<K> {
        match event {
            Event::Init => self.sources[source].listed = HashSet::new(),
            Event::InitApply(object) => {
                let reference = ObjectRef::from_obj(&object);
                let known = store.get(&reference).and_then(|known| known.resource_version());
                self.sources[source].listed.insert(reference);
                if known.is_none() || known != object.resource_version() {
                    return self.put(object);
                }
            }
            Event::InitDone => {
                let source = &mut self.sources[source];
                let listed = std::mem::take(&mut source.listed);
                source.complete = true;
                let gone = store
                    .state_filter(|object| source.covers(object) && !listed.contains(&ObjectRef::from_obj(object)));
                return gone.into_iter().flat_map(|object| self.remove(Arc::unwrap_or_clone(object))).collect();
            }
            Event::Apply(object) => return self.put(object),
            Event::Delete(object) => return self.remove(object),
        }
        Vec::new()
    }

    fn put(&mut self, object: K) -> Vec<K> {
        let event = Event::Apply(object);
        self.writer.apply_watcher_event(&event);
        changed(event)
    }

    fn remove(&mut self, object: K) -> Vec<K> {
        let event = Event::Delete(object);
        self.writer.apply_watcher_event(&event);
        changed(event)
    }
}

fn changed<K>(event: Event<K>) -> Vec<K> {
    match event {
        Event::Apply(object) | Event::Delete(object) => vec![object],
        _ => Vec::new(),
    }
}

fn trimmed<K: Cached>(object: &mut K, trim: fn(&mut K)) {
    object.meta_mut().managed_fields = None;
    if let Some(annotations) = &mut object.meta_mut().annotations {
        annotations.remove(LAST_APPLIED);
    }
    trim(object);
}

/// A copy of the object, made by `kubectl apply`.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// Objects that are read at a time.
const PAGE: u32 = 200;

#[cfg(test)]
mod tests;
