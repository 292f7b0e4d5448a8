//! The plan as the records that routers keep: the one place where resources and the fleet's protocol meet.
//!
//! The operator and `antiphon up` write the same records; they differ only in where routers are.
#![forbid(unsafe_code)]

use std::time::Duration;

use antiphon_crds::{
    Codec as PlanCodec, EngineType, Serving,
    compile::{AgentPlan, RegionPlan},
};
use antiphon_proto::{
    api_key::ApiKey,
    v1::{AgentBehaviour, AgentRecord, AgentRegion, Codec, KeyRecord, Location, Phase, RegionRecord, TurnTaking},
};

/// A region, whose routers other routers reach at `routers` ("host:port").
#[must_use]
pub fn region(plan: &RegionPlan, routers: Vec<String>) -> RegionRecord {
    let phase = match plan.serving {
        Serving::Active => Phase::Active,
        Serving::Cordoned => Phase::Cordoned,
    };
    RegionRecord {
        name: plan.name.clone(),
        number: plan.number.into(),
        cloud: plan.cloud.clone(),
        location: Some(Location { latitude: plan.latitude, longitude: plan.longitude }),
        phase: phase.into(),
        residency: plan.residency.clone(),
        router_address: routers.first().cloned().unwrap_or_default(),
        router_addresses: routers,
        via_relays: plan.via_relays,
    }
}

/// An agent. One that is suspended is placed nowhere.
#[must_use]
pub fn agent(plan: &AgentPlan) -> AgentRecord {
    let ms = |duration: Duration| u32::try_from(duration.as_millis()).unwrap_or(u32::MAX);
    let behaviour = &plan.behaviour;
    let engine = match behaviour.engine {
        EngineType::Echo => "echo",
    };
    let codec = |codec: &PlanCodec| match codec {
        PlanCodec::Opus => Codec::Opus.into(),
        PlanCodec::L16At16k => Codec::L1616k.into(),
        PlanCodec::L16At24k => Codec::L1624k.into(),
    };
    let regions = plan.regions.iter().map(|r| AgentRegion { region: r.region.clone(), weight: r.weight });
    AgentRecord {
        behaviour: Some(AgentBehaviour {
            agent: plan.agent.clone(),
            revision: behaviour.revision.clone(),
            engine: engine.into(),
            turn_taking: Some(TurnTaking {
                end_silence_ms: ms(behaviour.end_silence),
                min_speech_ms: ms(behaviour.min_speech),
                interruptible: behaviour.interruptible,
            }),
            longest_session_s: u32::try_from(behaviour.longest_session.as_secs()).unwrap_or(u32::MAX),
            latency_budget_ms: ms(behaviour.latency_budget),
        }),
        regions: if plan.suspended { Vec::new() } else { regions.collect() },
        gpu_class: plan.gpu_class.clone().unwrap_or_default(),
        rtt_ceiling_ms: ms(plan.rtt_ceiling),
        rtt_ceiling_max_ms: ms(plan.rtt_ceiling_max),
        codecs: plan.codecs.iter().map(codec).collect(),
        sessions_per_tenant: plan.sessions_per_tenant.unwrap_or(0),
        ..AgentRecord::default()
    }
}

/// What a router stores of an API key.
#[must_use]
pub fn key(key: &ApiKey, tenant: &str, agents: Vec<String>) -> KeyRecord {
    let sha256 = key.sha256().to_vec().into();
    KeyRecord { id: key.id().to_owned(), sha256, tenant: tenant.to_owned(), agents, ..KeyRecord::default() }
}

#[cfg(test)]
mod tests {
    use antiphon_crds::{compile, manifest};

    use super::*;

    const MANIFEST: &str = "
apiVersion: antiphon.dev/v1alpha1
kind: VoiceRegion
metadata: {name: frankfurt}
spec: {number: 7, cluster: c, cloud: nimbus, location: {latitude: 50.1, longitude: 8.7}, serving: Cordoned}
---
apiVersion: antiphon.dev/v1alpha1
kind: VoiceAgent
metadata: {name: frontdesk, namespace: shop}
spec: {engine: {type: Echo}, regions: [{name: frankfurt, weight: 3}], sessions: {perTenant: 9}}
";

    #[test]
    fn records_say_what_the_manifests_say() {
        let resources = manifest::parse(&[("m", MANIFEST)]).unwrap();
        let plan = compile::compile(&resources).unwrap();
        let region = region(&plan.regions[0], vec!["r:7444".into(), "s:7444".into()]);
        assert_eq!((region.number, region.phase(), region.router_address.as_str()), (7, Phase::Cordoned, "r:7444"));
        assert_eq!(region.router_addresses, ["r:7444", "s:7444"]);
        let agent = agent(&plan.agents[0]);
        assert_eq!(agent.regions, [AgentRegion { region: "frankfurt".into(), weight: 3 }]);
        assert_eq!((agent.sessions_per_tenant, agent.behaviour.unwrap().agent.as_str()), (9, "shop/frontdesk"));
    }

    #[test]
    fn a_suspended_agent_is_placed_nowhere() {
        let text = MANIFEST.replace("engine:", "suspend: true, engine:");
        let plan = compile::compile(&manifest::parse(&[("m", &text)]).unwrap()).unwrap();
        assert!(agent(&plan.agents[0]).regions.is_empty());
    }
}
