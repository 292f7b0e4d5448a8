//! Resources read from YAML files, as `kubectl apply -f` would read them.
//!
//! A file may hold several documents. Fields of `metadata` are those of Kubernetes; `status` is ignored. Everything else
//! that the API server would not take as written is an error that names file, line and field. All errors are reported at
//! once, in the order of files and lines.

mod node;

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::Value;
use serde_saphyr::{MessageFormatter as _, UserMessageFormatter};

pub use crate::rules::Resource;
use crate::{
    GROUP, VERSION, VoiceAgent, VoiceRegion,
    field::{FieldError, FieldPath, Step},
    rules,
    schema::{self, Checked},
};
use node::Node;

/// One thing that is wrong with a manifest. Shown as `FILE:LINE: Kind name: field: value problem: hint`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestError {
    /// The file, as it was named by the caller.
    pub file: String,
    /// Line, from 1; 0 if the file as a whole is meant.
    pub line: u64,
    /// Kind and name of the resource, as far as they are known.
    pub subject: String,
    /// The field and what is wrong with it.
    pub error: FieldError,
}

/// All that is wrong with a set of manifests; never empty. Shown one per line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.lines())]
pub struct ManifestErrors(pub Vec<ManifestError>);

/// One document of a YAML text: where it stands, what it is and what is wrong with it.
#[derive(Clone, Debug)]
struct Document {
    file: String,
    node: Node,
    subject: String,
    /// As far as it can be read: where there are errors, only for finding what else is wrong.
    resource: Option<Resource>,
    errors: Vec<FieldError>,
}

/// Reads files and directories (their `*.yaml`, `*.yml` and `*.json`, not deeper) and checks the fleet that they describe
/// together. Never returns an empty list.
pub fn read(paths: &[PathBuf]) -> Result<Vec<Resource>, ManifestErrors> {
    let mut sources = Vec::new();
    let mut errors = Vec::new();
    for path in paths {
        match load(path) {
            Ok(texts) if texts.is_empty() => errors.push(empty_directory(path)),
            Ok(texts) => sources.extend(texts),
            Err(error) => errors.push(unreadable(path, &error)),
        }
    }
    if !errors.is_empty() {
        return Err(ManifestErrors(errors));
    }
    let sources: Vec<(&str, &str)> = sources.iter().map(|(file, text)| (file.as_str(), text.as_str())).collect();
    parse(&sources)
}

/// Reads texts, each with the name of its file, and checks the fleet that they describe together. Never returns an empty
/// list.
pub fn parse(sources: &[(&str, &str)]) -> Result<Vec<Resource>, ManifestErrors> {
    let mut documents = Vec::new();
    let mut errors = Vec::new();
    for (file, text) in sources {
        match Node::documents(text) {
            Ok(nodes) => documents.extend(nodes.into_iter().map(|node| document(file, node))),
            Err(error) => errors.push(not_yaml(file, &error)),
        }
    }
    check_together(&mut documents, errors.is_empty());
    if errors.is_empty() && documents.is_empty() {
        errors.push(nothing_there(sources));
    }
    errors.extend(documents.iter().flat_map(Document::located_errors));
    if !errors.is_empty() {
        let place = |error: &ManifestError| {
            (sources.iter().position(|(file, _)| *file == error.file), error.line, error.error.path.to_string())
        };
        errors.sort_by_cached_key(place);
        return Err(ManifestErrors(errors));
    }
    Ok(documents.into_iter().filter_map(|document| document.resource).collect())
}

fn load(path: &Path) -> io::Result<Vec<(String, String)>> {
    let text = |path: &Path| Ok((path.display().to_string(), fs::read_to_string(path)?));
    if !path.is_dir() {
        return Ok(vec![text(path)?]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let file = entry?.path();
        let extension = file.extension().and_then(|extension| extension.to_str());
        if extension.is_some_and(|extension| EXTENSIONS.contains(&extension)) {
            files.push(file);
        }
    }
    files.sort();
    files.iter().map(|file| text(file)).collect()
}

/// Everything of one document that does not depend on others.
fn document(file: &str, node: Node) -> Document {
    let value = node.to_json();
    let text = |name: &str| value[name].as_str();
    let known = (text("apiVersion"), text("kind"));
    let (api_version, kind) = (format!("{GROUP}/{VERSION}"), known.1.unwrap_or_default());
    let name = value["metadata"]["name"].as_str().unwrap_or_default();
    let subject = match kind {
        "VoiceAgent" if !name.is_empty() => {
            let namespace = value["metadata"]["namespace"].as_str().unwrap_or("default");
            format!("{kind} {namespace}/{name}")
        }
        "" => String::new(),
        _ => format!("{kind} {name}").trim_end().to_owned(),
    };
    let (resource, errors) = match known {
        (Some(version), Some("VoiceAgent")) if version == api_version => {
            resource::<VoiceAgent>(&value, |agent| Resource::VoiceAgent(Box::new(agent)))
        }
        (Some(version), Some("VoiceRegion")) if version == api_version => {
            resource::<VoiceRegion>(&value, |region| Resource::VoiceRegion(Box::new(region)))
        }
        _ => (None, vec![unknown_kind(&value, &api_version)]),
    };
    Document { file: file.to_owned(), node, subject, resource, errors }
}

impl Document {
    /// Whether what other resources are checked against can be relied on.
    fn is_known_to_others(&self) -> bool {
        let is_shared = |error: &FieldError| {
            let path = error.path.to_string();
            SHARED.iter().any(|shared| path.starts_with(shared))
        };
        self.resource.is_some() && !self.errors.iter().any(is_shared)
    }

    fn is_agent(&self) -> bool {
        matches!(self.resource, Some(Resource::VoiceAgent(_))) || self.subject.starts_with("VoiceAgent")
    }

    fn located_errors(&self) -> impl Iterator<Item = ManifestError> {
        self.errors.iter().map(|error| ManifestError {
            file: self.file.clone(),
            line: self.node.line_of(&error.path),
            subject: self.subject.clone(),
            error: error.clone(),
        })
    }
}

/// A document of known kind as a resource, as far as it can be read, and everything that is wrong with it by itself.
fn resource<K>(value: &Value, of: impl FnOnce(K) -> Resource) -> (Option<Resource>, Vec<FieldError>)
where
    K: Checked + serde::de::DeserializeOwned,
{
    let empty = serde_json::Map::new();
    let fields = value.as_object().unwrap_or(&empty);
    let root = FieldPath::default();
    let known = TOP_FIELDS.map(str::to_owned);
    let mut errors: Vec<FieldError> = fields
        .keys()
        .filter(|name| !known.contains(name))
        .map(|name| schema::unknown_field(&root.field(name), name, known.iter()))
        .collect();
    errors.extend(check_metadata(fields.get("metadata")));
    match fields.get("spec") {
        Some(spec) => errors.extend(schema::check(K::spec_schema(), &FieldPath::of("spec"), spec)),
        None => errors.push(FieldError::without_value(
            FieldPath::of("spec"),
            "is missing",
            "write the fields of the resource under spec",
        )),
    }
    let mut value = value.clone();
    if let Some(fields) = value.as_object_mut() {
        fields.remove("status");
    }
    match serde_json::from_value(value.clone()) {
        Ok(kind) => {
            let resource = of(kind);
            errors.extend(resource.rules().into_iter().map(|error| error.spelt_as_in(&value)));
            (Some(resource), errors)
        }
        Err(error) if errors.is_empty() => {
            let hint = "compare it with `kubectl explain`";
            (None, vec![FieldError::without_value(root, format!("cannot be read: {error}"), hint)])
        }
        Err(_) => {
            let resource = without_mistakes(value.clone(), &errors).map(of);
            // What compares a field with one that was taken out compares it with a default.
            let rests_on = |rule: &FieldError, wrong: &FieldError| match wrong.path.steps().last() {
                Some(Step::Field(name)) => rule.path == wrong.path || rule.problem.contains(name.as_str()),
                _ => false,
            };
            let mut more = resource.as_ref().map(Resource::rules).unwrap_or_default();
            more.retain(|rule| !errors.iter().any(|wrong| rests_on(rule, wrong)));
            errors.extend(more.into_iter().map(|error| error.spelt_as_in(&value)));
            (resource, errors)
        }
    }
}

/// The rest of a resource, if that is one by itself: rules between its fields can be checked all the same.
fn without_mistakes<K: serde::de::DeserializeOwned>(mut value: Value, errors: &[FieldError]) -> Option<K> {
    let removed = errors.iter().all(|error| error.path.remove_from(&mut value));
    serde_json::from_value(value).ok().filter(|_| removed)
}

fn check_metadata(metadata: Option<&Value>) -> Vec<FieldError> {
    let path = FieldPath::of("metadata");
    let Some(Value::Object(fields)) = metadata else {
        let hint = "write a map of fields with at least a name";
        return vec![FieldError::without_value(path, "is missing", hint)];
    };
    let known = METADATA_FIELDS.map(str::to_owned);
    let mut errors: Vec<FieldError> = fields
        .keys()
        .filter(|name| !known.contains(name))
        .map(|name| schema::unknown_field(&path.field(name), name, known.iter()))
        .collect();
    match fields.get("name") {
        Some(Value::String(name)) => errors.extend(rules::check_name(name)),
        Some(other) => errors.push(FieldError::new(path.field("name"), other, "is no string", "put it in quotes")),
        None => errors.push(FieldError::without_value(path.field("name"), "is missing", "give the resource a name")),
    }
    if errors.is_empty()
        && let Err(error) = serde_json::from_value::<ObjectMeta>(Value::Object(fields.clone()))
    {
        let hint = "labels and annotations are strings: put them in quotes";
        errors.push(FieldError::without_value(path, format!("cannot be read: {error}"), hint));
    }
    errors
}

fn unknown_kind(value: &Value, api_version: &str) -> FieldError {
    let kinds = ["VoiceAgent", "VoiceRegion"];
    if !value.is_object() {
        let hint = format!("a resource begins with apiVersion: {api_version} and kind: VoiceAgent");
        return FieldError::new(FieldPath::default(), value, "is no resource", hint);
    }
    for field in ["apiVersion", "kind"] {
        if value[field].is_null() {
            let hint = format!("write apiVersion: {api_version} and kind: {}", kinds.join(" or kind: "));
            return FieldError::without_value(FieldPath::of(field), "is missing", hint);
        }
    }
    let kind = value["kind"].as_str().unwrap_or_default();
    if kinds.contains(&kind) {
        let hint = format!("write {api_version}");
        let path = FieldPath::of("apiVersion");
        return FieldError::new(path, &value["apiVersion"], "is not a known version", hint);
    }
    if let Some((_, hint)) = OF_CLUSTERS.iter().find(|(of_clusters, _)| *of_clusters == kind) {
        return FieldError::new(FieldPath::of("kind"), &value["kind"], "is for clusters only", *hint);
    }
    let hint = match schema::nearest(kind, kinds.into_iter()) {
        Some(near) => format!("did you mean {near}?"),
        None => format!("only {} are read; remove other resources", kinds.join(" and ")),
    };
    FieldError::new(FieldPath::of("kind"), &value["kind"], "is not a kind of Antiphon's", hint)
}

/// Adds what does not fit together, as far as that can be known: nothing is compared with what could not be read.
/// `all_read`: no file is missing.
fn check_together(documents: &mut [Document], all_read: bool) {
    let known: Vec<usize> = (0..documents.len()).filter(|index| documents[*index].is_known_to_others()).collect();
    let resources: Vec<Resource> = known.iter().filter_map(|index| documents[*index].resource.clone()).collect();
    let mut errors: Vec<(usize, FieldError)> = Vec::new();
    for rules::Clash { index, first, mut error } in rules::clashes(&resources) {
        let first = &documents[known[first]];
        error.problem = format!("{}, first at {}:{}", error.problem, first.file, first.node.line_of(&error.path));
        errors.push((index, error));
    }
    // A region that could not be read would make agents look dangling.
    let unread = documents.iter().any(|document| !document.is_known_to_others() && !document.is_agent());
    if all_read && !unread {
        let regions = resources.iter().filter_map(Resource::region).collect();
        for (index, resource) in resources.iter().enumerate() {
            if let Resource::VoiceAgent(agent) = resource {
                errors.extend(rules::check_regions(agent, &regions).into_iter().map(|error| (index, error)));
            }
        }
    }
    for (index, error) in errors {
        let errors = &mut documents[known[index]].errors;
        if !errors.iter().any(|known| known.path == error.path) {
            errors.push(error);
        }
    }
}

fn about_file(file: &str, line: u64, problem: String, hint: &str) -> ManifestError {
    let error = FieldError::without_value(FieldPath::default(), problem, hint);
    ManifestError { file: file.to_owned(), line, subject: String::new(), error }
}

fn unreadable(path: &Path, error: &io::Error) -> ManifestError {
    let hint = match error.kind() {
        io::ErrorKind::NotFound if path == Path::new("-") => "standard input is /dev/stdin",
        io::ErrorKind::NotFound => "check the path",
        io::ErrorKind::InvalidData => "manifests are UTF-8 text",
        _ => "check that it is a readable file",
    };
    about_file(&path.display().to_string(), 0, format!("cannot be read: {error}"), hint)
}

fn not_yaml(file: &str, error: &serde_saphyr::Error) -> ManifestError {
    let error = error.without_snippet();
    let line = error.location().map_or(0, |location| location.line());
    if let serde_saphyr::Error::DuplicateMappingKey { key, .. } = error {
        let key = key.as_deref().unwrap_or("a field");
        // Most often two resources without a line between them.
        let hint = if TOP_FIELDS.contains(&key) {
            "separate resources with a line of ---, or remove one of them"
        } else {
            "remove one of them"
        };
        return about_file(file, line, format!("{key} is there twice"), hint);
    }
    let text = UserMessageFormatter.format_message(error);
    let first = text.lines().next().unwrap_or_default();
    about_file(file, line, format!("is not valid YAML: {first}"), "")
}

fn empty_directory(path: &Path) -> ManifestError {
    let entries = fs::read_dir(path).into_iter().flatten().filter_map(Result::ok);
    let mut inner: Vec<String> =
        entries.filter(|entry| entry.path().is_dir()).map(|entry| entry.path().display().to_string()).collect();
    inner.sort();
    let hint = match &inner[..] {
        [only] => format!("directories in it are not searched: did you mean {only}?"),
        [_, ..] => format!("directories in it are not searched: name one of {}", inner.join(", ")),
        [] => "name files that hold a VoiceAgent and its VoiceRegions".to_owned(),
    };
    about_file(&path.display().to_string(), 0, "has no *.yaml, *.yml or *.json".to_owned(), &hint)
}

fn nothing_there(sources: &[(&str, &str)]) -> ManifestError {
    let files: Vec<&str> = sources.iter().map(|(file, _)| *file).collect();
    about_file(
        &files.join(", "),
        0,
        "no resources".to_owned(),
        "name files that hold a VoiceAgent and its VoiceRegions",
    )
}

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.file.is_empty() { "(no files)" } else { &self.file })?;
        if self.line > 0 {
            write!(f, ":{}", self.line)?;
        }
        if !self.subject.is_empty() {
            write!(f, ": {}", self.subject)?;
        }
        write!(f, ": {}", self.error)
    }
}

impl ManifestErrors {
    fn lines(&self) -> String {
        let lines: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        lines.join("\n")
    }
}

/// Kinds that a fleet on one machine has no use for, and what to do instead.
const OF_CLUSTERS: [(&str, &str); 2] = [
    ("WorkerPool", "remove it, and set minReplicas in spec.regions of the VoiceAgent instead"),
    ("Drain", "remove it; `kubectl apply` takes it"),
];

const EXTENSIONS: [&str; 3] = ["yaml", "yml", "json"];

/// What other resources of a fleet are checked against, by the beginnings of paths.
const SHARED: [&str; 6] = [
    "metadata.name",
    "spec.number",
    "spec.residency",
    "spec.gpuClasses",
    "spec.placement.residency",
    "spec.worker.gpuClass",
];

const TOP_FIELDS: [&str; 5] = ["apiVersion", "kind", "metadata", "spec", "status"];

/// Fields of Kubernetes' ObjectMeta.
const METADATA_FIELDS: [&str; 15] = [
    "annotations",
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "labels",
    "managedFields",
    "name",
    "namespace",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
];

#[cfg(test)]
mod tests;
