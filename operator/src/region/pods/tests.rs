use antiphon_crds::VoiceRegion;
use k8s_openapi::api::core::v1::Service;
use serde_json::{Value, json};

use super::*;
use crate::{
    config::{Certificates, Config, Images},
    labels::Component,
    region::ingress::{Advertised, advertised, api_addresses},
};

fn config(etcd: Option<Etcd>) -> Config {
    Config {
        cluster: "c".into(),
        namespace: "antiphon-system".into(),
        watch_namespaces: Vec::new(),
        watch_nodes: true,
        instance: "fleet".into(),
        identity: "op".into(),
        images: Images {
            router: "antiphon/router:1".into(),
            relay: "antiphon/relay:1".into(),
            worker: "antiphon/worker:1".into(),
            pull_policy: None,
            pull_secrets: vec!["registry".into()],
        },
        router_resources: serde_json::from_value(json!({"requests": {"cpu": "100m"}})).unwrap(),
        relay_resources: Default::default(),
        etcd,
        root_secret: "root".into(),
        certificates: Certificates::Own,
    }
}

fn region(change: impl FnOnce(&mut Value)) -> VoiceRegion {
    let mut region = json!({"apiVersion": "antiphon.dev/v1alpha1", "kind": "VoiceRegion",
        "metadata": {"name": "frankfurt", "namespace": "antiphon-system", "uid": "u"},
        "spec": {"cluster": "c", "cloud": "n", "location": {"latitude": 1, "longitude": 2}}});
    change(&mut region["spec"]);
    serde_json::from_value(region).unwrap()
}

fn deployment(region: &VoiceRegion, component: Component, etcd: Option<Etcd>) -> Value {
    let config = config(etcd);
    let part = Part { region, component, config: &config };
    let made = match component {
        Component::Router => part.routers(),
        _ => part.relays(&Reached::At(vec!["192.0.2.1:4433".parse().unwrap()]), false),
    };
    serde_json::to_value(made.unwrap()).unwrap()
}

fn args(deployment: &Value) -> Vec<String> {
    serde_json::from_value(deployment["spec"]["template"]["spec"]["containers"][0]["args"].clone()).unwrap()
}

#[test]
fn pods_pass_the_restricted_profile_and_hold_no_token() {
    for component in [Component::Router, Component::Relay] {
        let pod = deployment(&region(|_| {}), component, None)["spec"]["template"]["spec"].clone();
        assert_eq!(pod["automountServiceAccountToken"], false);
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        let container = &pod["containers"][0]["securityContext"];
        assert_eq!(container["allowPrivilegeEscalation"], false);
        assert_eq!(container["capabilities"]["drop"], json!(["ALL"]));
        assert!(pod["hostNetwork"].is_null() && !pod.to_string().contains("hostPort"));
        assert!(
            pod["volumes"]
                .as_array()
                .unwrap()
                .iter()
                .all(|volume| { volume["secret"].is_object() || volume["emptyDir"].is_object() })
        );
    }
}

#[test]
fn the_root_is_mounted_into_routers_only() {
    let routers = deployment(&region(|_| {}), Component::Router, None);
    let relays = deployment(&region(|_| {}), Component::Relay, None);
    assert!(routers.to_string().contains(r#""secretName":"root""#));
    assert!(!relays.to_string().contains(r#""secretName":"root""#));
    assert!(args(&routers).contains(&"--root=/etc/antiphon/root/root".into()));
}

#[test]
fn what_is_left_of_the_grace_outlasts_the_drain() {
    let relays = deployment(&region(|_| {}), Component::Relay, None);
    let drain =
        args(&relays).iter().find_map(|arg| arg.strip_prefix("--drain-deadline=")?.strip_suffix('s')?.parse().ok());
    let grace = relays["spec"]["template"]["spec"]["terminationGracePeriodSeconds"].as_i64().unwrap();
    assert!(grace > drain.unwrap(), "{grace} {drain:?}");
}

#[test]
fn without_etcd_there_is_one_router() {
    let etcd = Etcd {
        endpoints: vec!["https://etcd-0:2379".into(), "https://etcd-1:2379".into()],
        secret: Some("etcd-tls".into()),
        client_certificate: true,
        user_secret: Some("etcd-user".into()),
        prefix: "/antiphon".into(),
    };
    let three = region(|spec| spec["router"] = json!({"replicas": 3}));
    let alone = deployment(&three, Component::Router, None);
    assert_eq!(alone["spec"]["replicas"], 1);
    assert!(!args(&alone).iter().any(|arg| arg.starts_with("--etcd")));
    let shared = deployment(&three, Component::Router, Some(etcd.clone()));
    assert_eq!(shared["spec"]["replicas"], 3);
    for expected in [
        "--etcd=https://etcd-0:2379",
        "--etcd=https://etcd-1:2379",
        "--etcd-prefix=/antiphon/frankfurt",
        "--etcd-ca=/etc/antiphon/etcd/ca.crt",
        "--etcd-cert=/etc/antiphon/etcd/tls.crt",
        "--etcd-password-file=/etc/antiphon/etcd-user/password",
    ] {
        assert!(args(&shared).contains(&expected.to_owned()), "{expected}");
    }
    let anonymous = Etcd { client_certificate: false, user_secret: None, ..etcd };
    let shared = deployment(&three, Component::Router, Some(anonymous));
    assert!(!args(&shared).iter().any(|arg| arg.starts_with("--etcd-cert") || arg.starts_with("--etcd-password")));
}

#[test]
fn relays_on_nodes_are_apart_and_never_surge() {
    for (type_, network) in [("HostPort", Value::Null), ("HostNetwork", json!(true))] {
        let region = region(|spec| spec["relay"] = json!({"ingress": {"type": type_, "port": 4444}}));
        let config = config(None);
        let part = Part { region: &region, component: Component::Relay, config: &config };
        assert_eq!(advertised(&region, None), Advertised::Node(4444));
        let made = serde_json::to_value(part.relays(&Reached::AtNode(4444), false).unwrap()).unwrap();
        let pod = &made["spec"]["template"]["spec"];
        assert_eq!(pod["containers"][0]["ports"][0]["hostPort"], 4444, "{type_}");
        assert_eq!(pod["hostNetwork"], network);
        assert_eq!(made["spec"]["strategy"]["rollingUpdate"], json!({"maxSurge": 0, "maxUnavailable": 1}));
        let apart = &pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
        assert_eq!(apart[0]["topologyKey"], "kubernetes.io/hostname");
        assert!(args(&made).contains(&"--public-address=$(HOST_IP):4444".into()));
        assert!(part.relay_service().is_none());
    }
}

#[test]
fn pods_are_where_the_region_says() {
    let region = region(|spec| {
        spec["relay"] = json!({"pod": {
            "resources": {"limits": {"memory": "1Gi"}}, "nodeSelector": {"edge": "yes"}, "labels": {"team": "voice"},
            "tolerations": [{"key": "edge", "operator": "Exists"}], "priorityClassName": "high",
            "affinity": {"nodeAffinity": {}}
        }});
    });
    let relays = deployment(&region, Component::Relay, None);
    let template = &relays["spec"]["template"];
    assert_eq!(template["spec"]["nodeSelector"], json!({"edge": "yes"}));
    assert_eq!(template["spec"]["tolerations"][0]["operator"], "Exists");
    assert_eq!(template["spec"]["affinity"], json!({"nodeAffinity": {}}));
    assert_eq!(template["spec"]["containers"][0]["resources"]["limits"]["memory"], "1Gi");
    assert_eq!(template["metadata"]["labels"]["team"], "voice");
    let routers = deployment(&region, Component::Router, None);
    assert_eq!(routers["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"], "100m");
    assert_eq!(routers["spec"]["template"]["spec"]["imagePullSecrets"], json!([{"name": "registry"}]));
}

fn service(status: Value, node_port: Option<u16>) -> Service {
    serde_json::from_value(
        json!({"spec": {"ports": [{"port": 4433, "nodePort": node_port}]}, "status": {"loadBalancer": status}}),
    )
    .unwrap()
}

#[test]
fn relays_say_what_the_service_says_unless_they_are_told() {
    let plain = region(|_| {});
    let addresses = |texts: &[&str]| Advertised::Addresses(texts.iter().map(|text| text.parse().unwrap()).collect());
    assert_eq!(advertised(&plain, None), Advertised::Soon);
    assert!(matches!(advertised(&plain, Some(&service(json!({}), None))), Advertised::Unknown(_)));
    let ips = json!({"ingress": [{"ip": "192.0.2.7"}, {"ip": "2001:db8::7"}]});
    assert_eq!(advertised(&plain, Some(&service(ips, None))), addresses(&["192.0.2.7:4433", "[2001:db8::7]:4433"]));
    let names = json!({"ingress": [{"hostname": "lb.example"}]});
    assert_eq!(advertised(&plain, Some(&service(names, None))), Advertised::Names(vec!["lb.example".into()], 4433));
    let node_port = region(|spec| spec["relay"] = json!({"ingress": {"service": {"type": "NodePort"}}}));
    assert_eq!(advertised(&node_port, Some(&service(json!({}), Some(30_433)))), Advertised::Node(30_433));
    let told = region(|spec| spec["relay"] = json!({"ingress": {"addresses": ["198.51.100.1:443"]}}));
    assert_eq!(advertised(&told, None), addresses(&["198.51.100.1:443"]));
}

#[test]
fn services_keep_callers_addresses_and_show_routers_before_they_are_ready() {
    let region = region(|spec| spec["router"] = json!({"service": {"type": "NodePort", "apiNodePort": 30_443}}));
    let config = config(None);
    let part = |component| Part { region: &region, component, config: &config };
    let relay = serde_json::to_value(part(Component::Relay).relay_service().unwrap()).unwrap();
    assert_eq!(relay["spec"]["externalTrafficPolicy"], "Local");
    assert_eq!(relay["spec"]["type"], "LoadBalancer");
    let fleet = serde_json::to_value(part(Component::Router).fleet_service()).unwrap();
    assert_eq!(
        (&fleet["spec"]["clusterIP"], &fleet["spec"]["publishNotReadyAddresses"]),
        (&json!("None"), &json!(true))
    );
    let api = serde_json::to_value(part(Component::Router).router_service()).unwrap();
    assert_eq!(api["spec"]["ports"][0]["nodePort"], 30_443);
    let balanced = service(json!({"ingress": [{"ip": "2001:db8::1"}]}), None);
    assert_eq!(
        api_addresses(&region, Some(&balanced)),
        ["frankfurt-router.antiphon-system.svc:7443", "[2001:db8::1]:7443"]
    );
}
