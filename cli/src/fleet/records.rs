//! The plan as the records that routers keep.

use antiphon_crds::compile::{AgentPlan, FleetPlan, RegionPlan};
use antiphon_crds::{Codec as PlanCodec, EngineType, Serving};
use antiphon_proto::{
    api_key::ApiKey,
    v1::{
        AgentBehaviour, AgentRecord, AgentRegion, ApplyRequest, Codec, KeyRecord, Location, Phase, RegionRecord,
        TurnTaking,
    },
};

use super::Context;

pub(super) fn of(plan: &FleetPlan, context: &Context, keys: Vec<KeyRecord>) -> ApplyRequest {
    ApplyRequest {
        regions: plan.regions.iter().map(|r| region(r, context)).collect(),
        agents: plan.agents.iter().map(agent).collect(),
        keys,
        // The generation of keys is no part of the manifests: `antiphon keys rotate` moves it.
        ..ApplyRequest::default()
    }
}

/// What a router stores of a key.
pub(crate) fn key_record(key: &ApiKey, tenant: &str, agents: Vec<String>) -> KeyRecord {
    let sha256 = key.sha256().to_vec().into();
    KeyRecord { id: key.id().to_owned(), sha256, tenant: tenant.to_owned(), agents, ..KeyRecord::default() }
}

fn region(plan: &RegionPlan, context: &Context) -> RegionRecord {
    let router = context.routers.iter().find(|router| router.region == plan.name);
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
        router_address: router.map(|router| router.internal.clone()).unwrap_or_default(),
        router_addresses: router.iter().map(|router| router.internal.clone()).collect(),
        via_relays: plan.via_relays,
    }
}

fn agent(plan: &AgentPlan) -> AgentRecord {
    let ms = |duration: std::time::Duration| u32::try_from(duration.as_millis()).unwrap_or(u32::MAX);
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
        // A suspended agent is placed nowhere.
        regions: if plan.suspended { Vec::new() } else { regions.collect() },
        gpu_class: plan.gpu_class.clone().unwrap_or_default(),
        rtt_ceiling_ms: ms(plan.rtt_ceiling),
        rtt_ceiling_max_ms: ms(plan.rtt_ceiling_max),
        codecs: plan.codecs.iter().map(codec).collect(),
        sessions_per_tenant: plan.sessions_per_tenant.unwrap_or(0),
        ..AgentRecord::default()
    }
}
