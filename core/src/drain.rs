//! Taking workers out of service: who, whether there is room elsewhere for their calls, until when, and how far it is.
//!
//! A drain is a wish that stands until it is taken back. [`plan`] says what it comes to now; what it orders is carried
//! out by the planner of each pool ([`crate::pool`]). Taken back, its workers are ordered nothing any more, and those
//! that have not been deleted go back to work.
//!
//! Room is proven before anything begins: every agent's other workers, in whatever region, must be able to take as many
//! calls as its workers here hold. Calls stay where they are until they end, and as many new ones will come meanwhile.

use std::{collections::BTreeMap, time::Duration};

use crate::{clock::Millis, placement::Phase, pool::DrainOrder};

/// What is to be drained, and what else there is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DrainSnapshot {
    /// The workers of the target.
    pub workers: Vec<TargetWorker>,
    /// Everybody else's room, by agent; several entries of an agent add up.
    pub elsewhere: Vec<Room>,
    /// When draining began, if it has.
    pub started: Option<Millis>,
    /// Calls that the target held when it began.
    pub initial: u32,
}

/// A worker of the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetWorker {
    /// Its namespace and name.
    pub name: (String, String),
    /// "namespace/name" of its agent.
    pub agent: String,
    /// Class of GPU it has; calls go to no other class.
    pub gpu_class: String,
    /// What its region's routers say; `None`: nothing, or it never registered.
    pub calls: Option<(Phase, u32)>,
    /// How long calls of its agent may go on.
    pub deadline: Duration,
}

/// Calls that workers outside the target could take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// "namespace/name" of the agent.
    pub agent: String,
    /// Class of GPU.
    pub gpu_class: String,
    /// Free slots.
    pub free: u32,
}

/// What is wanted of a drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrainPolicy {
    /// Overrides every agent's deadline.
    pub deadline: Option<Duration>,
    /// Nothing begins before there is room elsewhere.
    pub prove: bool,
    /// Drained workers are deleted and replaced; otherwise they stay, out of service.
    pub replace: bool,
}

/// What it comes to now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DrainPlan {
    /// How far it is.
    pub phase: DrainPhase,
    /// The proof. While draining goes on it says what would be found now.
    pub proof: Proof,
    /// What each worker is ordered; empty while pending.
    pub orders: Vec<((String, String), DrainOrder)>,
    /// Workers of the target that hold no calls and take none.
    pub drained: u32,
    /// Calls that the target holds.
    pub sessions: u32,
    /// The last of the workers' deadlines.
    pub deadline: Option<Millis>,
    /// Workers with calls, the busiest first.
    pub busiest: Vec<((String, String), u32)>,
    /// Look again after this time, even if nothing happens.
    pub again: Option<Duration>,
}

/// How far a drain is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainPhase {
    /// There is no room elsewhere yet.
    Pending,
    /// Calls end, new ones go elsewhere.
    Draining,
    /// No calls are left and none come.
    Drained,
}

/// Whether there is room elsewhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proof {
    /// Calls that need room.
    pub needed: u32,
    /// Calls that could be taken elsewhere by the agents concerned.
    pub free: u32,
    /// Agents whose own calls do not fit.
    pub short: Vec<String>,
}

impl Proof {
    /// Every agent has room for its own calls.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.short.is_empty()
    }
}

/// What a drain comes to. `now` is in milliseconds since 1970 (UTC).
#[must_use]
pub fn plan(snapshot: &DrainSnapshot, policy: &DrainPolicy, now: Millis) -> DrainPlan {
    let proof = prove(snapshot);
    let begins = snapshot.started.is_some() || !policy.prove || proof.holds();
    let started = snapshot.started.unwrap_or(now);
    let sessions = snapshot.workers.iter().map(TargetWorker::held).sum();
    let drained = snapshot.workers.iter().filter(|worker| worker.is_drained()).count();
    let deadline_of = |worker: &TargetWorker| started.after(policy.deadline.unwrap_or(worker.deadline));
    let deadline = snapshot.workers.iter().map(deadline_of).max();
    let mut busiest: Vec<_> =
        snapshot.workers.iter().filter(|w| w.held() > 0).map(|w| (w.name.clone(), w.held())).collect();
    busiest.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    let order = |worker: &TargetWorker| {
        let deadline = deadline_of(worker);
        let order = if policy.replace { DrainOrder::Replace { deadline } } else { DrainOrder::Empty { deadline } };
        (worker.name.clone(), order)
    };
    let phase = if !begins {
        DrainPhase::Pending
    } else if drained == snapshot.workers.len() {
        DrainPhase::Drained
    } else {
        DrainPhase::Draining
    };
    DrainPlan {
        phase,
        proof,
        orders: if begins { snapshot.workers.iter().map(order).collect() } else { Vec::new() },
        drained: u32::try_from(drained).unwrap_or(u32::MAX),
        sessions,
        deadline: if begins { deadline } else { None },
        busiest,
        again: (phase == DrainPhase::Draining)
            .then(|| deadline.filter(|at| *at > now).map(|at| at.since(now)))
            .flatten(),
    }
}

/// Compares, for each agent and class of GPU, the calls here with the room elsewhere.
fn prove(snapshot: &DrainSnapshot) -> Proof {
    let mut sides: BTreeMap<(&str, &str), (u32, u32)> = BTreeMap::new();
    for worker in &snapshot.workers {
        let needed = &mut sides.entry((&worker.agent, &worker.gpu_class)).or_default().0;
        *needed = needed.saturating_add(worker.held());
    }
    for room in &snapshot.elsewhere {
        if let Some((_, free)) = sides.get_mut(&(room.agent.as_str(), room.gpu_class.as_str())) {
            *free = free.saturating_add(room.free);
        }
    }
    let mut proof = Proof::default();
    for ((agent, _), (needed, free)) in sides {
        proof.needed = proof.needed.saturating_add(needed);
        proof.free = proof.free.saturating_add(free);
        if free < needed && proof.short.last().is_none_or(|last| last != agent) {
            proof.short.push(agent.to_owned());
        }
    }
    proof
}

impl TargetWorker {
    fn held(&self) -> u32 {
        self.calls.map_or(0, |(_, count)| count)
    }

    /// One that nobody knows of takes no calls either.
    fn is_drained(&self) -> bool {
        self.calls.is_none_or(|(phase, count)| count == 0 && phase == Phase::Draining)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: Millis = Millis(1_000_000);
    const POLICY: DrainPolicy = DrainPolicy { deadline: None, prove: true, replace: false };

    fn worker(name: &str, agent: &str, calls: Option<(Phase, u32)>) -> TargetWorker {
        TargetWorker {
            name: ("shop".into(), name.into()),
            agent: agent.into(),
            gpu_class: "l4".into(),
            calls,
            deadline: Duration::from_secs(60),
        }
    }

    fn room(agent: &str, gpu_class: &str, free: u32) -> Room {
        Room { agent: agent.into(), gpu_class: gpu_class.into(), free }
    }

    #[test]
    fn nothing_begins_before_every_agent_has_room_on_its_own_gpus() {
        let active = |calls| Some((Phase::Active, calls));
        let mut snapshot = DrainSnapshot {
            workers: vec![worker("a-1", "shop/a", active(2)), worker("b-1", "shop/b", active(1))],
            elsewhere: vec![room("shop/a", "l4", 9), room("shop/b", "h100", 9)],
            ..DrainSnapshot::default()
        };
        let held = plan(&snapshot, &POLICY, NOW);
        assert_eq!((held.phase, held.orders.len(), held.deadline), (DrainPhase::Pending, 0, None));
        assert_eq!(held.proof, Proof { needed: 3, free: 9, short: vec!["shop/b".into()] });
        let forced = plan(&snapshot, &DrainPolicy { prove: false, ..POLICY }, NOW);
        assert_eq!((forced.phase, forced.orders.len()), (DrainPhase::Draining, 2));
        snapshot.elsewhere.push(room("shop/b", "l4", 1));
        let begun = plan(&snapshot, &POLICY, NOW);
        assert_eq!(begun.phase, DrainPhase::Draining);
        let order = DrainOrder::Empty { deadline: Millis(1_060_000) };
        assert_eq!(begun.orders[0], (("shop".into(), "a-1".into()), order));
    }

    #[test]
    fn what_has_begun_goes_on_without_room_and_keeps_its_deadline() {
        let snapshot = DrainSnapshot {
            workers: vec![worker("a-1", "shop/a", Some((Phase::Draining, 2)))],
            started: Some(Millis(990_000)),
            ..DrainSnapshot::default()
        };
        let going = plan(&snapshot, &POLICY, NOW);
        assert_eq!((going.phase, going.deadline), (DrainPhase::Draining, Some(Millis(1_050_000))));
        assert_eq!(going.again, Some(Duration::from_secs(50)));
        assert!(!going.proof.holds());
        let sooner = plan(&snapshot, &DrainPolicy { deadline: Some(Duration::ZERO), replace: true, ..POLICY }, NOW);
        assert_eq!(sooner.orders[0].1, DrainOrder::Replace { deadline: Millis(990_000) });
        assert_eq!((going.sessions, going.drained, going.busiest.len()), (2, 0, 1));
    }

    #[test]
    fn drained_is_who_holds_no_calls_and_takes_none() {
        for (calls, drained) in
            [(None, 1), (Some((Phase::Draining, 0)), 1), (Some((Phase::Draining, 1)), 0), (Some((Phase::Active, 0)), 0)]
        {
            let snapshot = DrainSnapshot { workers: vec![worker("a-1", "a", calls)], ..DrainSnapshot::default() };
            let planned = plan(&snapshot, &DrainPolicy { prove: false, ..POLICY }, NOW);
            assert_eq!(planned.drained, drained, "{calls:?}");
            assert_eq!(planned.phase == DrainPhase::Drained, drained == 1);
        }
        assert_eq!(plan(&DrainSnapshot::default(), &POLICY, NOW).phase, DrainPhase::Drained, "nobody is there");
    }

    proptest! {
        /// The proof is by agent and class: shuffled together, sums may hide who is short, the proof never does.
        #[test]
        fn the_proof_holds_exactly_if_each_agents_calls_fit(
            here in proptest::collection::vec((0_u8..3, 0_u8..2, 0_u32..5), 0..12),
            there in proptest::collection::vec((0_u8..3, 0_u8..2, 0_u32..9), 0..12),
        ) {
            let workers = here.iter().map(|(agent, class, calls)| TargetWorker {
                gpu_class: class.to_string(),
                ..worker("w", &agent.to_string(), Some((Phase::Active, *calls)))
            });
            let elsewhere = there.iter().map(|(agent, class, free)| room(&agent.to_string(), &class.to_string(), *free));
            let snapshot = DrainSnapshot {
                workers: workers.collect(),
                elsewhere: elsewhere.collect(),
                ..DrainSnapshot::default()
            };
            let fits = (0..3).all(|agent| (0..2).all(|class| {
                let sum = |side: &[(u8, u8, u32)]| -> u32 {
                    side.iter().filter(|(a, c, _)| (*a, *c) == (agent, class)).map(|(_, _, n)| n).sum()
                };
                sum(&here) <= sum(&there)
            }));
            let planned = plan(&snapshot, &POLICY, NOW);
            prop_assert_eq!(planned.proof.holds(), fits);
            prop_assert_eq!(planned.orders.len(), if fits { here.len() } else { 0 });
        }
    }
}
