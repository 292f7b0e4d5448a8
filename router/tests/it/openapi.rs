//! The OpenAPI document against what is served: every operation, every status, every field.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use http_body_util::Full;
use serde_json::{Value, json};

use crate::{
    http::body,
    world::{Answer, World},
};

/// Checks answers against the document and remembers what was seen.
struct Checker {
    document: Value,
    seen: BTreeSet<(String, String, String)>,
    /// Properties that occurred, by schema.
    fields: BTreeMap<String, BTreeSet<String>>,
}

impl Checker {
    fn take(&mut self, method: &str, path: &str, answer: &Answer) {
        let status = answer.status.to_string();
        let response = &self.document["paths"][path][method]["responses"][&status];
        assert!(response.is_object(), "{method} {path} {status} is not documented: {answer:?}");
        let response = response.clone();
        self.seen.insert((path.to_owned(), method.to_owned(), status));
        let headers = response["headers"].as_object();
        for name in headers.iter().flat_map(|h| h.keys()) {
            assert!(answer.headers.contains_key(name.to_lowercase()), "{name} is missing: {answer:?}");
        }
        match response["content"].as_object() {
            None => assert_eq!(answer.body, Value::Null),
            Some(content) => {
                let (kind, media) = content.iter().next().unwrap();
                assert_eq!(answer.headers["content-type"], kind.as_str());
                self.check(&media["schema"], &answer.body, path);
            }
        }
    }

    /// The part of JSON Schema that the document uses; anything else in a schema is an error.
    fn check(&mut self, schema: &Value, value: &Value, at: &str) {
        let mut schema = schema.clone();
        let mut name = String::new();
        while let Some(reference) = schema["$ref"].as_str() {
            name = reference.rsplit('/').next().unwrap().to_owned();
            schema = self.document["components"]["schemas"][&name].clone();
            assert!(schema.is_object(), "{at}: no schema {name}");
        }
        for (keyword, rule) in schema.as_object().unwrap() {
            match keyword.as_str() {
                "type" => {
                    let fits = match rule.as_str().unwrap() {
                        "object" => value.is_object(),
                        "array" => value.is_array(),
                        "string" => value.is_string(),
                        "number" => value.is_number(),
                        "boolean" => value.is_boolean(),
                        "integer" => value.is_u64() || value.is_i64(),
                        other => panic!("{at}: unknown type {other}"),
                    };
                    assert!(fits, "{at}: {value} is no {rule}");
                }
                "enum" => assert!(rule.as_array().unwrap().contains(value), "{at}: {value}"),
                "minimum" => assert!(value.as_f64() >= rule.as_f64(), "{at}: {value}"),
                "maximum" => assert!(value.as_f64() <= rule.as_f64(), "{at}: {value}"),
                "minItems" => {
                    assert!(value.as_array().unwrap().len() as u64 >= rule.as_u64().unwrap())
                }
                "maxItems" => {
                    assert!(value.as_array().unwrap().len() as u64 <= rule.as_u64().unwrap())
                }
                "pattern" => {
                    // The two patterns in use describe texts whose types say the same.
                    let text = value.as_str().unwrap();
                    let session = text.parse::<antiphon_core::id::SessionId>().is_ok();
                    let label = antiphon_runtime::pki::PeerName::new(text, antiphon_runtime::pki::Role::Worker, "x");
                    assert!(session || label.is_ok(), "{at}: {value}");
                }
                "format" => {
                    assert_eq!(rule, "date-time");
                    let text = value.as_str().unwrap();
                    assert!(text.parse::<prost_types::Timestamp>().is_ok(), "{at}: {text}");
                }
                "items" => {
                    for (index, item) in value.as_array().unwrap().iter().enumerate() {
                        self.check(rule, item, &format!("{at}[{index}]"));
                    }
                }
                "properties" => {
                    for (key, item) in value.as_object().unwrap() {
                        let property = &rule[key];
                        assert!(property.is_object(), "{at}: {key} is not documented");
                        self.fields.entry(name.clone()).or_default().insert(key.clone());
                        self.check(property, item, &format!("{at}.{key}"));
                    }
                }
                "required" => {
                    for key in rule.as_array().unwrap() {
                        assert!(!value[key.as_str().unwrap()].is_null(), "{at}: {key} is missing");
                    }
                }
                "description" | "additionalProperties" => {}
                other => panic!("{at}: the checker does not know {other}"),
            }
        }
    }

    /// Everything documented was seen.
    fn finish(self) {
        for (path, operations) in self.document["paths"].as_object().unwrap() {
            for (method, operation) in operations.as_object().unwrap() {
                for status in operation["responses"].as_object().unwrap().keys() {
                    let key = (path.clone(), method.clone(), status.clone());
                    assert!(self.seen.contains(&key), "{key:?} is documented and was not served");
                }
            }
        }
        let answers = [
            "Session",
            "Relay",
            "Candidate",
            "Explanation",
            "SessionSummary",
            "SessionList",
            "SessionPath",
            "PathUse",
            "PathEvent",
            "Problem",
        ];
        for name in answers {
            let documented = self.document["components"]["schemas"][name]["properties"].as_object();
            let documented: BTreeSet<String> = documented.unwrap().keys().cloned().collect();
            assert_eq!(self.fields.get(name), Some(&documented), "{name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_document_matches_what_is_served() {
    let world = World::new();
    let region = world.region("frankfurt").await;
    let worker = world.worker(&region, "w-1", 2).await;
    let _relay = crate::world::Relay::register(&world, &region, "r-1").await;
    let bare = |method: &str, path: &str| {
        let request = http::Request::builder().method(method).uri(path);
        let request = request.header("host", "router");
        request.body(Full::<Bytes>::default()).unwrap()
    };
    let document = region.http(bare("GET", "/openapi.json")).await;
    let mut checker = Checker { document: document.body.clone(), seen: BTreeSet::new(), fields: BTreeMap::new() };
    checker.take("get", "/openapi.json", &document);
    let key = &world.key;
    let (sessions, one, explain) = ("/v1/sessions", "/v1/sessions/{session}", "/v1/sessions/{session}/explain");
    let post = async |change: fn(&mut Value)| {
        let mut value = body();
        change(&mut value);
        region.ask(key, "POST", sessions, Some(value)).await
    };

    let placed = post(|b| {
        b["session"] = json!("0000000000000000000000000a");
        b["location"] = json!({"latitude": 50.0, "longitude": 9.0});
    })
    .await;
    checker.take("post", sessions, &placed);
    let id = placed.body["session"].as_str().unwrap().to_owned();
    checker.take("get", explain, &region.ask(key, "GET", &format!("/v1/sessions/{id}/explain"), None).await);
    checker.take("get", sessions, &region.ask(key, "GET", "/v1/sessions?limit=5", None).await);
    let path = "/v1/sessions/{session}/path";
    let way = region.ask(key, "GET", &format!("/v1/sessions/{id}/path"), None).await;
    assert_eq!((&way.body["worker"], &way.body["paths"][0]["relay"]), (&json!("w-1"), &json!(64)));
    checker.take("get", path, &way);

    checker.take("post", sessions, &post(|b| b["codec"] = json!("mp3")).await);
    let conflict = post(|b| {
        b["session"] = json!("0000000000000000000000000a");
        b["codec"] = json!("l16-16k");
    });
    checker.take("post", sessions, &conflict.await);
    checker.take("post", sessions, &post(|b| b["agent"] = json!("x".repeat(70_000))).await);
    checker.take("post", sessions, &post(|b| b["agent"] = json!("shop/nobody")).await);
    let mut unlabelled = bare("POST", sessions);
    let bearer = format!("Bearer {}", key.text());
    unlabelled.headers_mut().insert("authorization", bearer.parse().unwrap());
    checker.take("post", sessions, &region.http(unlabelled).await);
    assert_eq!(post(|_| ()).await.status, 201);
    let full = post(|_| ()).await;
    assert_eq!(full.status, 503, "{full:?}");
    checker.take("post", sessions, &full);

    let limited = antiphon_proto::api_key::ApiKey::from_random(&[31; 28]);
    let mut change = world.agent(&["frankfurt"]);
    change.keys.push(crate::world::key_record(&limited, &["other/*"]));
    change.agents[0].sessions_per_tenant = 1;
    world.apply(&region, change).await.unwrap();
    checker.take("post", sessions, &region.ask(&limited, "POST", sessions, Some(body())).await);
    checker.take("post", sessions, &post(|_| ()).await);

    for (method, path, concrete) in [
        ("post", sessions, sessions),
        ("get", sessions, sessions),
        ("delete", one, &format!("/v1/sessions/{id}")),
        ("get", explain, &format!("/v1/sessions/{id}/explain")),
        ("get", path, &format!("/v1/sessions/{id}/path")),
    ] {
        let answer = region.http(bare(&method.to_uppercase(), concrete)).await;
        assert_eq!(answer.status, 401);
        checker.take(method, path, &answer);
    }
    checker.take("get", sessions, &region.ask(key, "GET", "/v1/sessions?limit=x", None).await);
    checker.take("get", sessions, &region.ask(key, "GET", "/v1/sessions?limit=10001", None).await);
    checker.take("get", explain, &region.ask(key, "GET", "/v1/sessions/bad/explain", None).await);
    let unknown = "/v1/sessions/7zzzzzzzzzzzzzzzzzzzzzzzzz";
    checker.take("get", explain, &region.ask(key, "GET", &format!("{unknown}/explain"), None).await);
    checker.take("get", path, &region.ask(key, "GET", "/v1/sessions/bad/path", None).await);
    checker.take("get", path, &region.ask(key, "GET", &format!("{unknown}/path"), None).await);
    checker.take("delete", one, &region.ask(key, "DELETE", "/v1/sessions/bad", None).await);
    checker.take("delete", one, &region.ask(key, "DELETE", unknown, None).await);
    // With its only worker gone nobody can say whether a session is still there.
    drop(worker);
    crate::world::eventually("the worker's API is gone", async || {
        let answer = region.ask(key, "DELETE", &format!("/v1/sessions/{id}"), None).await;
        let gone = answer.status == 503;
        if gone {
            checker.take("delete", one, &answer);
            checker.take("get", path, &region.ask(key, "GET", &format!("/v1/sessions/{id}/path"), None).await);
        }
        gone
    })
    .await;

    for (method, path, status) in [("GET", "/nowhere", 404), ("PUT", sessions, 405)] {
        let answer = region.http(bare(method, path)).await;
        assert_eq!(answer.status, status);
        assert_eq!(answer.headers["content-type"], "application/problem+json");
        checker.check(&json!({"$ref": "#/components/schemas/Problem"}), &answer.body, path);
    }
    checker.finish();
}
