use antiphon_crds::VoiceAgentSpec;

use super::*;
use crate::config::{Certificates, Images};

const NAMES: PoolNames<'_> =
    PoolNames { namespace: "shop", pool: "frontdesk-frankfurt", agent: "frontdesk", region: "frankfurt" };

pub(crate) fn config() -> Config {
    Config {
        cluster: "nimbus-eu".into(),
        namespace: "antiphon-system".into(),
        watch_namespaces: vec![],
        watch_nodes: true,
        instance: "antiphon".into(),
        identity: "operator-0".into(),
        images: Images {
            router: "antiphon/router:1".into(),
            relay: "antiphon/relay:1".into(),
            worker: "antiphon/worker:1".into(),
            pull_policy: None,
            pull_secrets: vec![],
        },
        router_resources: Default::default(),
        relay_resources: Default::default(),
        etcd: None,
        root_secret: "antiphon-fleet-root".into(),
        certificates: Certificates::Own,
    }
}

fn made_from(spec: Value) -> Result<Value, Error> {
    let spec: VoiceAgentSpec = serde_json::from_value(spec).unwrap();
    let template = WorkerTemplate::of(&spec, "frankfurt", "antiphon/worker:1");
    let set = replica_set(&NAMES, &template, OwnerReference::default(), 2, &config())?;
    Ok(crate::apply::diff::pruned(serde_json::to_value(set).unwrap()))
}

#[test]
fn identities_are_short_and_different_for_every_pool() {
    let identity = NAMES.identity();
    assert!(identity.starts_with("frontdesk-frankfurt-") && identity.len() == 28, "{identity}");
    let elsewhere = PoolNames { namespace: "bank", ..NAMES };
    assert_ne!(elsewhere.identity(), identity);
    let long = "a".repeat(35) + "-" + &"b".repeat(45);
    let long = PoolNames { pool: &long, ..NAMES };
    assert!(long.identity().len() <= 45 && !long.identity().contains("--"), "{}", long.identity());
    assert!(long.replica_set("0123456789").len() <= 63 - 6, "the pod's own six characters fit");
}

#[test]
fn a_minimal_agent_gets_a_pod_that_the_restricted_profile_admits() {
    let set = made_from(json!({"engine": {"type": "Echo"}, "regions": [{"name": "frankfurt"}]})).unwrap();
    assert_eq!(set["spec"]["replicas"], 2);
    let template = &set["spec"]["template"];
    for (key, value) in set["spec"]["selector"]["matchLabels"].as_object().unwrap() {
        assert_eq!(&template["metadata"]["labels"][key], value);
    }
    assert_eq!(template["metadata"]["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict"], "false");
    let pod = &template["spec"];
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    assert_eq!(pod["automountServiceAccountToken"], false);
    assert_eq!(pod["terminationGracePeriodSeconds"], 3600);
    let worker = &pod["containers"][0];
    assert_eq!(worker["image"], "antiphon/worker:1");
    assert_eq!(worker["securityContext"]["capabilities"]["drop"], json!(["ALL"]));
    let arguments: Vec<&str> = worker["args"].as_array().unwrap().iter().map(|arg| arg.as_str().unwrap()).collect();
    for argument in [
        "--agent=shop/frontdesk",
        "--slots=16",
        "--router=frankfurt-router-fleet.antiphon-system.svc:7444",
        "--drain-deadline=3595s",
    ] {
        assert!(arguments.contains(&argument), "{argument}: {arguments:?}");
    }
    assert_eq!(worker["startupProbe"]["failureThreshold"], 300, "ten minutes");
    let unreachable =
        pod["tolerations"].as_array().unwrap().iter().find(|t| t["key"] == "node.kubernetes.io/unreachable");
    assert_eq!(unreachable.unwrap()["tolerationSeconds"], 3600);
}

#[test]
fn everything_that_a_team_says_is_in_the_pod() {
    let set = made_from(json!({
        "engine": {"type": "Echo", "apiKeySecretRef": {"name": "vendor", "key": "token"}},
        "regions": [{"name": "frankfurt", "nodeSelector": {"gpu": "l4"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]}],
        "sessions": {"slotsPerWorker": 4},
        "worker": {
            "gpuClass": "l4",
            "image": "registry/worker:2",
            "imagePullSecrets": [{"name": "registry"}],
            "env": [{"name": "MODEL", "value": "tiny"}],
            "resources": {"limits": {"nvidia.com/gpu": 1}, "claims": [{"name": "gpu"}]},
            "resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": "one-gpu"}],
            "engineContainer": {"image": "engine:1", "startupProbe": {"exec": {"command": ["ready"]}}},
            "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}],
            "volumes": [{"name": "models", "hostPath": {"path": "/models"}}],
            "volumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": true}],
            "labels": {"team": "shop", "antiphon.dev/pool": "not-this-one"},
            "shards": 2
        }
    }))
    .unwrap();
    let template = &set["spec"]["template"];
    assert_eq!(template["metadata"]["labels"]["team"], "shop");
    assert_eq!(template["metadata"]["labels"][POOL], "frontdesk-frankfurt", "Antiphon's own labels stand");
    let pod = &template["spec"];
    assert_eq!(pod["nodeSelector"], json!({"gpu": "l4"}));
    assert_eq!(pod["tolerations"][0]["key"], "gpu");
    assert_eq!(pod["resourceClaims"][0]["resourceClaimTemplateName"], "one-gpu");
    assert_eq!(pod["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"][POOL], "frontdesk-frankfurt");
    assert_eq!(pod["initContainers"][0]["restartPolicy"], "Always", "a native sidecar");
    let worker = &pod["containers"][0];
    assert_eq!(worker["resources"]["limits"]["nvidia.com/gpu"], "1");
    assert_eq!(worker["ports"].as_array().unwrap().len(), 4);
    let volumes = pod["volumes"].as_array().unwrap();
    assert_eq!(volumes.iter().find(|v| v["name"] == "models").unwrap()["hostPath"]["path"], "/models");
    let key = volumes.iter().find(|v| v["name"] == ENGINE_KEY_VOLUME).unwrap();
    assert_eq!((&key["secret"]["secretName"], &key["secret"]["items"][0]["key"]), (&json!("vendor"), &json!("token")));
}

#[test]
fn a_fragment_that_is_none_is_an_error_that_names_its_field() {
    let error = made_from(json!({
        "engine": {"type": "Echo"}, "regions": [{"name": "frankfurt"}],
        "worker": {"affinity": {"nodeAffinity": "near"}}
    }))
    .unwrap_err();
    assert!(error.to_string().starts_with("spec.worker.affinity is not what Kubernetes takes there"), "{error}");
}
