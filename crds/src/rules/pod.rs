//! Rules of the parts of pods.

use serde_json::json;

use super::exactly_one;
use crate::{
    Worker,
    field::{FieldError, FieldPath},
    pod::{EnvFrom, EnvVar, OWN_PREFIXES, PodSettings, Toleration, TolerationOperator, VolumeMount},
};

/// Everything about a worker template that the schema does not say.
pub(super) fn check_worker(path: &FieldPath, worker: &Worker) -> Vec<FieldError> {
    let mut errors = check_container(path, &worker.env, &worker.env_from, &worker.volume_mounts);
    if let Some(engine) = &worker.engine_container {
        let path = path.field("engineContainer");
        errors.extend(check_container(&path, &engine.env, &engine.env_from, &engine.volume_mounts));
    }
    for (index, claim) in worker.resource_claims.iter().enumerate() {
        let sources = [
            ("resourceClaimName", claim.resource_claim_name.is_some()),
            ("resourceClaimTemplateName", claim.resource_claim_template_name.is_some()),
        ];
        errors.extend(exactly_one(&path.field("resourceClaims").item(index), &sources));
    }
    for (index, volume) in worker.volumes.iter().enumerate() {
        if volume.name.starts_with(OWN_VOLUMES) {
            let path = path.field("volumes").item(index).field("name");
            errors.push(own_name(path, &volume.name));
        }
    }
    errors.extend(check_tolerations(path, &worker.tolerations));
    errors.extend(check_keys(&path.field("labels"), worker.labels.keys()));
    errors.extend(check_keys(&path.field("annotations"), worker.annotations.keys()));
    errors
}

/// Everything about the pods of relays or routers that the schema does not say.
pub(super) fn check_settings(path: &FieldPath, settings: &PodSettings) -> Vec<FieldError> {
    let mut errors = check_tolerations(path, &settings.tolerations);
    errors.extend(check_keys(&path.field("labels"), settings.labels.keys()));
    errors.extend(check_keys(&path.field("annotations"), settings.annotations.keys()));
    errors
}

/// The field `tolerations` of `path`.
pub(super) fn check_tolerations(path: &FieldPath, tolerations: &[Toleration]) -> Vec<FieldError> {
    let of_nothing =
        |toleration: &Toleration| toleration.key.is_none() && toleration.operator != Some(TolerationOperator::Exists);
    let wrong = tolerations.iter().enumerate().filter(|(_, toleration)| of_nothing(toleration));
    wrong
        .map(|(index, _)| {
            let hint = "write the taint's key, or operator: Exists to tolerate everything";
            FieldError::without_value(path.field("tolerations").item(index), "has no key", hint)
        })
        .collect()
}

fn check_container(path: &FieldPath, env: &[EnvVar], env_from: &[EnvFrom], mounts: &[VolumeMount]) -> Vec<FieldError> {
    let mut errors = Vec::new();
    for (index, variable) in env.iter().enumerate() {
        let path = path.field("env").item(index);
        if variable.name.starts_with(OWN_VARIABLES) {
            errors.push(own_name(path.field("name"), &variable.name));
        }
        if variable.value.is_some() && variable.value_from.is_some() {
            let hint = "set value or valueFrom, not both";
            errors.push(FieldError::without_value(path.clone(), "has value and valueFrom", hint));
        }
        if let Some(source) = &variable.value_from {
            let sources = [
                ("secretKeyRef", source.secret_key_ref.is_some()),
                ("configMapKeyRef", source.config_map_key_ref.is_some()),
                ("fieldRef", source.field_ref.is_some()),
                ("resourceFieldRef", source.resource_field_ref.is_some()),
            ];
            errors.extend(exactly_one(&path.field("valueFrom"), &sources));
        }
    }
    for (index, from) in env_from.iter().enumerate() {
        let sources = [("secretRef", from.secret_ref.is_some()), ("configMapRef", from.config_map_ref.is_some())];
        errors.extend(exactly_one(&path.field("envFrom").item(index), &sources));
    }
    for (index, mount) in mounts.iter().enumerate() {
        if !mount.mount_path.starts_with('/') || mount.mount_path.contains(':') {
            let path = path.field("volumeMounts").item(index).field("mountPath");
            let hint = "write a path that begins with '/'";
            errors.push(FieldError::new(path, &json!(mount.mount_path), "is not an absolute path without ':'", hint));
        }
    }
    errors
}

fn check_keys<'a>(path: &FieldPath, keys: impl Iterator<Item = &'a String>) -> Vec<FieldError> {
    let own = keys.filter(|key| OWN_PREFIXES.iter().any(|prefix| key.starts_with(prefix)));
    own.map(|key| own_name(path.clone(), key)).collect()
}

fn own_name(path: FieldPath, name: &str) -> FieldError {
    FieldError::new(path, &json!(name), "is a name of Antiphon's own", "choose another one")
}

/// How environment variables begin that Antiphon sets.
const OWN_VARIABLES: &str = "ANTIPHON_";
/// How volumes begin that Antiphon adds.
const OWN_VOLUMES: &str = "antiphon";
