//! Where in a resource something is wrong, and what.

use std::fmt;

/// One step from a resource to one of its fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Into the field of this name.
    Field(String),
    /// Into the list's item of this index, from zero.
    Item(usize),
}

/// A field, counted from the resource's root; written like `spec.regions[1].maxReplicas`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldPath(Vec<Step>);

/// One thing that is wrong with a resource. Shown as `path: value problem: hint`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.text())]
pub struct FieldError {
    /// The field; empty for the resource as a whole.
    pub path: FieldPath,
    /// Its value as JSON, shortened; empty where there is none.
    pub value: String,
    /// What is wrong, in words that go on from the value: "is less than minReplicas 2".
    pub problem: String,
    /// What to do about it.
    pub hint: String,
}

impl FieldPath {
    /// The field at the end of `steps`, written with dots and without indices: `spec.cluster`.
    pub fn of(steps: &str) -> Self {
        Self(steps.split('.').map(|step| Step::Field(step.to_owned())).collect())
    }

    /// The field `name` of this one.
    pub fn field(&self, name: &str) -> Self {
        self.then(Step::Field(name.to_owned()))
    }

    /// Item `index` of this list.
    pub fn item(&self, index: usize) -> Self {
        self.then(Step::Item(index))
    }

    /// The steps from the root on.
    pub fn steps(&self) -> &[Step] {
        &self.0
    }

    /// Takes the field out of a resource; of an item of a list the whole list, for the others would move up. `false` for
    /// the resource itself.
    pub(crate) fn remove_from(&self, resource: &mut serde_json::Value) -> bool {
        let field = self.0.iter().rposition(|step| matches!(step, Step::Field(_)));
        let Some((Step::Field(last), way)) = field.and_then(|field| self.0[..=field].split_last()) else {
            return false;
        };
        let parent = way.iter().try_fold(resource, |value, step| match step {
            Step::Field(name) => value.get_mut(name),
            Step::Item(index) => value.get_mut(index),
        });
        if let Some(fields) = parent.and_then(serde_json::Value::as_object_mut) {
            fields.remove(last);
        }
        true
    }

    fn find_in<'a>(&self, resource: &'a serde_json::Value) -> Option<&'a serde_json::Value> {
        self.0.iter().try_fold(resource, |value, step| match step {
            Step::Field(name) => value.get(name),
            Step::Item(index) => value.get(index),
        })
    }

    fn then(&self, step: Step) -> Self {
        let mut steps = self.0.clone();
        steps.push(step);
        Self(steps)
    }
}

impl fmt::Display for FieldPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, step) in self.0.iter().enumerate() {
            match step {
                Step::Field(name) if index == 0 => f.write_str(name)?,
                Step::Field(name) => write!(f, ".{name}")?,
                Step::Item(item) => write!(f, "[{item}]")?,
            }
        }
        Ok(())
    }
}

impl FieldError {
    /// Something wrong with the value of a field.
    pub(crate) fn new(
        path: FieldPath,
        value: &serde_json::Value,
        problem: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self { path, value: shortened(value), problem: problem.into(), hint: hint.into() }
    }

    /// The same with the field's value as it stands in a resource, if it is there: a parsed one may be spelt anew.
    pub(crate) fn spelt_as_in(self, resource: &serde_json::Value) -> Self {
        match self.path.find_in(resource) {
            Some(value) if !self.value.is_empty() => Self { value: shortened(value), ..self },
            _ => self,
        }
    }

    /// Something wrong that no single value shows.
    pub(crate) fn without_value(path: FieldPath, problem: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { path, value: String::new(), problem: problem.into(), hint: hint.into() }
    }

    fn text(&self) -> String {
        let path = self.path.to_string();
        let what = [self.value.as_str(), self.problem.as_str()];
        let what: Vec<&str> = what.into_iter().filter(|part| !part.is_empty()).collect();
        let parts = [path, what.join(" "), self.hint.clone()];
        let parts: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        parts.join(": ")
    }
}

fn shortened(value: &serde_json::Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(LONGEST_VALUE) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Characters of a value that an error shows.
const LONGEST_VALUE: usize = 80;
