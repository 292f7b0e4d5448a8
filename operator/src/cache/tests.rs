use k8s_openapi::api::core::v1::ConfigMap;
use serde_json::json;

use super::*;

fn map(namespace: &str, name: &str, version: u32) -> ConfigMap {
    let version = version.to_string();
    serde_json::from_value(json!({"metadata": {"namespace": namespace, "name": name, "resourceVersion": version}}))
        .unwrap()
}

/// A cache of these namespaces and the names of what it says has changed.
fn cache(namespaces: &[Option<&str>]) -> (Cache<ConfigMap>, Arc<Mutex<Vec<String>>>) {
    let cache = Cache::default();
    cache.inner.feed.lock().sources =
        namespaces.iter().map(|namespace| Source::new(namespace.map(str::to_owned))).collect();
    let changed: Arc<Mutex<Vec<String>>> = Arc::default();
    let seen = changed.clone();
    cache.on_change(move |object: &ConfigMap| seen.lock().push(object.name_any()));
    (cache, changed)
}

fn list(cache: &Cache<ConfigMap>, source: usize, objects: &[ConfigMap]) {
    cache.handle(source, Event::Init);
    objects.iter().for_each(|object| cache.handle(source, Event::InitApply(object.clone())));
    cache.handle(source, Event::InitDone);
}

fn names(cache: &Cache<ConfigMap>) -> Vec<String> {
    let mut names: Vec<_> = cache.all().iter().map(|object| object.name_any()).collect();
    names.sort();
    names
}

#[test]
fn a_list_of_one_namespace_leaves_the_others_alone() {
    let (cache, _) = cache(&[Some("a"), Some("b")]);
    list(&cache, 0, &[map("a", "x", 1), map("a", "y", 1)]);
    assert!(!*cache.inner.ready.borrow(), "b is not listed yet");
    list(&cache, 1, &[map("b", "z", 1)]);
    assert!(*cache.inner.ready.borrow());
    list(&cache, 0, &[map("a", "y", 1)]);
    assert_eq!(names(&cache), ["y", "z"]);
}

#[test]
fn listeners_hear_of_what_changed_and_of_nothing_else() {
    let (cache, changed) = cache(&[None]);
    list(&cache, 0, &[map("a", "x", 1), map("b", "y", 1)]);
    assert_eq!(std::mem::take(&mut *changed.lock()), ["x", "y"]);
    list(&cache, 0, &[map("a", "x", 2)]);
    assert_eq!(std::mem::take(&mut *changed.lock()), ["x", "y"], "x is another version, y is gone");
    cache.handle(0, Event::Apply(map("a", "new", 3)));
    cache.handle(0, Event::Delete(map("a", "x", 4)));
    assert_eq!(std::mem::take(&mut *changed.lock()), ["new", "x"]);
    assert_eq!(names(&cache), ["new"]);
}

#[test]
fn objects_that_an_interrupted_list_did_not_reach_stay() {
    let (cache, _) = cache(&[None]);
    list(&cache, 0, &[map("a", "x", 1), map("a", "y", 1)]);
    cache.handle(0, Event::Init);
    cache.handle(0, Event::InitApply(map("a", "x", 1)));
    assert_eq!(names(&cache), ["x", "y"]);
}

#[test]
fn what_nobody_needs_is_dropped() {
    let mut object = map("a", "x", 1);
    object.metadata.managed_fields = Some(vec![Default::default()]);
    object.metadata.annotations =
        Some([(LAST_APPLIED.to_owned(), "{}".to_owned()), ("kept".to_owned(), String::new())].into());
    trimmed(&mut object, |object| object.data = None);
    assert!(object.metadata.managed_fields.is_none());
    assert_eq!(object.annotations().keys().collect::<Vec<_>>(), ["kept"]);
}
