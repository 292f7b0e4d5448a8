//! Relays: those of the own region and those that peers tell of.

use std::time::Duration;

use antiphon_core::{
    clock::Millis,
    geo::{self, Location},
    id::RelayNumber,
    placement::Phase,
};
use antiphon_proto::v1;

use super::{
    Fleet, State, clock,
    hello::RelayHello,
    keys::MemberKeys,
    standing::{RegisterError, Standing},
};
use crate::records;

/// A registered relay. It stays until it deregisters.
#[derive(Debug)]
pub(crate) struct Relay {
    pub(crate) hello: RelayHello,
    pub(crate) stream: Option<u64>,
    /// When its stream broke, if it did.
    pub(super) lost: Millis,
    pub(crate) phase: Phase,
    pub(crate) heard: Millis,
    pub(super) keys: MemberKeys,
    /// Its clock minus ours, at the last report.
    pub(super) clock_ahead_ms: i64,
    /// Routes in its table, as it last said.
    pub(super) routes: u32,
}

impl Relay {
    /// The phase that clients should go by: one that is silent gets nobody new.
    fn phase(&self, now: Millis) -> Phase {
        match self.stream {
            Some(_) if now.since(self.heard) <= RELAY_LEASE => self.phase,
            _ if self.phase == Phase::Draining => Phase::Draining,
            _ => Phase::Cordoned,
        }
    }

    pub(crate) fn info(&self, number: RelayNumber, now: Millis) -> v1::RelayInfo {
        v1::RelayInfo {
            number: number.value().into(),
            public_address: self.hello.public_address.clone(),
            more_public_addresses: self.hello.more_public_addresses.clone(),
            tunnel_address: self.hello.tunnel_address.clone(),
            phase: records::proto_phase(self.phase(now)).into(),
            missing: self.stream.is_none() && now.since(self.lost) > RELAY_PATIENCE,
        }
    }
}

impl Fleet {
    /// Registers a relay. The newest stream of a name speaks for it.
    pub(crate) async fn register_relay(&self, hello: RelayHello) -> Result<Standing<RelayNumber>, RegisterError> {
        let _turn = self.registering.lock().await;
        let region = {
            let state = self.state.lock();
            let number = self.own_number(&state);
            number.ok_or_else(|| RegisterError::NoRegion(self.region.clone()))?
        };
        let index = self.store.claim_relay(&hello.name, hello.held).await?;
        let number = RelayNumber::of_region(region, index).expect("the store numbers up to 63");
        let mut state = self.state.lock();
        let stream = state.next_stream();
        tracing::info!(relay = hello.name, %number, "relay registered");
        let now = self.clock.now();
        // A name has one number.
        state.relays.retain(|other, relay| *other == number || relay.hello.name != hello.name);
        state.gone_relays.remove(&number);
        let relay = Relay {
            hello,
            stream: Some(stream),
            lost: now,
            phase: Phase::Active,
            heard: now,
            keys: MemberKeys::unreported(Some(0)),
            clock_ahead_ms: 0,
            routes: 0,
        };
        state.relays.insert(number, relay);
        drop(state);
        self.topology.send_modify(|n| *n += 1);
        Ok(Standing { number, stream })
    }

    /// Takes a report. `false`: another stream speaks for the relay now.
    pub(crate) fn relay_reported(&self, standing: Standing<RelayNumber>, report: &v1::RelayReport) -> bool {
        let now = self.clock.now();
        let mut state = self.state.lock();
        let Some(relay) = state.relay_of(standing) else {
            return false;
        };
        let before = relay.phase(now);
        (relay.phase, relay.heard) = (records::phase(report.phase), now);
        relay.keys = MemberKeys::reported(&report.loaded_generations, 0, 0);
        relay.routes = report.routes;
        let clock_ahead_ms = clock::ahead_ms(report.unix_ms, clock::unix_ms());
        clock::tell("relay", &relay.hello.name, relay.clock_ahead_ms, clock_ahead_ms);
        relay.clock_ahead_ms = clock_ahead_ms;
        let changed = before != relay.phase;
        drop(state);
        if changed {
            self.topology.send_modify(|n| *n += 1);
        }
        true
    }

    /// The relay's stream is broken: clients are sent elsewhere, workers still accept its frames.
    pub(crate) fn relay_disconnected(&self, standing: Standing<RelayNumber>) {
        let now = self.clock.now();
        let mut state = self.state.lock();
        if let Some(relay) = state.relay_of(standing) {
            (relay.stream, relay.lost) = (None, now);
            tracing::warn!(relay = relay.hello.name, "relay disconnected");
            drop(state);
            self.topology.send_modify(|n| *n += 1);
        }
    }

    /// The relay says that it is gone for good.
    pub(crate) async fn relay_deregistered(&self, standing: Standing<RelayNumber>) {
        let gone = {
            let mut state = self.state.lock();
            match state.relay_of(standing) {
                Some(_) => self.remove_relay(&mut state, standing.number),
                None => None,
            }
        };
        if let Some(relay) = gone {
            tracing::info!(relay = relay.hello.name, "relay deregistered");
            self.store.release_relay(&relay.hello.name).await;
        }
    }

    /// Somebody who must know says that a relay is gone. `false`: none of this name is known.
    pub(crate) async fn relay_gone(&self, name: &str) -> bool {
        let known = {
            let mut state = self.state.lock();
            let number = state.relays.iter().find(|(_, relay)| relay.hello.name == name).map(|(number, _)| *number);
            number.and_then(|number| self.remove_relay(&mut state, number)).is_some()
        };
        if known {
            self.store.release_relay(name).await;
        }
        known
    }

    /// Another router of this region knows that relays are gone. Said again and again: what was said before is no news,
    /// as somebody else may have the number by now.
    pub(super) fn sibling_lost_relays(&self, address: &str, gone: &[u32]) {
        let mut state = self.state.lock();
        let before = state.siblings_gone_relays.insert(address.to_owned(), gone.to_vec()).unwrap_or_default();
        let news = gone.iter().filter(|number| !before.contains(number));
        for number in news.filter_map(|number| relay_number(*number)) {
            if state.relays.get(&number).is_some_and(|relay| relay.stream.is_none()) {
                self.remove_relay(&mut state, number);
            }
        }
    }

    fn remove_relay(&self, state: &mut State, number: RelayNumber) -> Option<Relay> {
        let relay = state.relays.remove(&number)?;
        let now = self.clock.now();
        state.gone_relays.retain(|_, at| now.since(*at) <= GONE_MEMORY);
        state.gone_relays.insert(number, now);
        self.topology.send_modify(|n| *n += 1);
        Some(relay)
    }

    /// Number and tunnel address of every relay whose frames workers accept.
    pub(super) fn tunnel_ends(&self, state: &State) -> Vec<(RelayNumber, String)> {
        let now = self.clock.now();
        // Behind its relays, a worker is reached by these only.
        let behind = state.records.regions.get(&self.region).is_some_and(|r| r.via_relays);
        let own = state.relays.iter();
        let own = own.map(|(number, relay)| (*number, relay.hello.tunnel_address.clone()));
        let peers = state.peers.values().filter(|_| !behind);
        let of_peers = peers
            .flat_map(|p| p.relays(now))
            .filter_map(|relay| Some((relay_number(relay.number)?, relay.tunnel_address)));
        let mut ends: Vec<_> = own.chain(of_peers).collect();
        ends.sort();
        ends
    }

    /// Relays for a caller in the order to try them: active ones first, near ones first, the worker's region first
    /// among equals. At most [`RELAYS_OFFERED`]; after the first two from regions not named yet, as far as there are
    /// any, and the worker's own region is among them. Missing ones only if there is no other at all.
    pub(crate) fn relays_for(&self, caller: Option<Location>, worker_region: &str) -> Vec<v1::RelayAddress> {
        let now = self.clock.now();
        let state = self.state.lock();
        let own = state.relays.iter();
        let own = own.map(|(number, relay)| (self.region.as_str(), relay.info(*number, now)));
        let of_peers = state.peers.iter().flat_map(|(region, p)| p.relays(now).map(|r| (region.as_str(), r)));
        let mut known: Vec<Known> = own
            .chain(of_peers)
            .map(|(region, info)| {
                let place = state.records.regions.get(region).and_then(|r| r.location);
                let rtt = caller
                    .zip(place)
                    .map(|(caller, place)| geo::estimated_rtt(caller.unit_vector().distance_km(place.unit_vector())));
                Known {
                    missing: info.missing,
                    inactive: info.phase != i32::from(v1::Phase::Active),
                    rtt,
                    elsewhere: region != worker_region,
                    number: info.number,
                    addresses: std::iter::once(info.public_address).chain(info.more_public_addresses).collect(),
                    region: region.to_owned(),
                }
            })
            .collect();
        if known.iter().any(|k| !k.missing) {
            known.retain(|k| !k.missing);
        }
        known.sort();
        choose(known, worker_region)
    }
}

pub(super) fn relay_number(number: u32) -> Option<RelayNumber> {
    RelayNumber::new(u16::try_from(number).ok()?).ok()
}

/// Compared field by field, in this order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Known {
    missing: bool,
    inactive: bool,
    /// `None` sorts first: without the caller's location all are alike.
    rtt: Option<Duration>,
    elsewhere: bool,
    number: u32,
    addresses: Vec<String>,
    region: String,
}

fn choose(mut known: Vec<Known>, worker_region: &str) -> Vec<v1::RelayAddress> {
    let mut chosen: Vec<Known> = Vec::with_capacity(RELAYS_OFFERED);
    let mut take = |chosen: &mut Vec<Known>, want: &dyn Fn(&Known, &[Known]) -> bool| {
        if let Some(at) = known.iter().position(|k| want(k, chosen)) {
            chosen.push(known.remove(at));
        }
    };
    let unseen = |k: &Known, chosen: &[Known]| chosen.iter().all(|c| c.region != k.region);
    take(&mut chosen, &|_, _| true);
    take(&mut chosen, &|_, _| true);
    take(&mut chosen, &|k, chosen| k.region == worker_region && !k.inactive && unseen(k, chosen));
    while chosen.len() < RELAYS_OFFERED {
        let before = chosen.len();
        take(&mut chosen, &|k, chosen| !k.inactive && unseen(k, chosen));
        if chosen.len() == before {
            take(&mut chosen, &|_, _| true);
        }
        if chosen.len() == before {
            break;
        }
    }
    let addresses = |k: Known| {
        let estimated_rtt_ms = k.rtt.map_or(0, |rtt| u32::try_from(rtt.as_millis()).unwrap_or(u32::MAX));
        let Known { number, region, .. } = k;
        let at = move |address| v1::RelayAddress { number, address, region: region.clone(), estimated_rtt_ms };
        k.addresses.into_iter().map(at)
    };
    chosen.into_iter().flat_map(addresses).collect()
}

impl State {
    /// The relay, if this stream still speaks for it.
    fn relay_of(&mut self, standing: Standing<RelayNumber>) -> Option<&mut Relay> {
        let relay = self.relays.get_mut(&standing.number)?;
        (relay.stream == Some(standing.stream)).then_some(relay)
    }

    pub(super) fn gone_relays(&self, now: Millis) -> Vec<u32> {
        let lately = self.gone_relays.iter().filter(|(_, at)| now.since(**at) <= GONE_MEMORY);
        lately.map(|(number, _)| number.value().into()).collect()
    }
}

/// Relays in one answer.
pub(crate) const RELAYS_OFFERED: usize = 4;
/// How long a relay's report holds for new callers.
const RELAY_LEASE: Duration = Duration::from_secs(3);
/// A relay that is out of touch for longer is offered to nobody; it may still carry those who are on it.
pub(super) const RELAY_PATIENCE: Duration = Duration::from_secs(60);
/// How long others are told that a relay is gone.
pub(super) const GONE_MEMORY: Duration = Duration::from_secs(600);

#[cfg(test)]
mod tests {
    use super::*;

    fn known(number: u32, region: &str, rtt_ms: u64, inactive: bool) -> Known {
        Known {
            missing: false,
            inactive,
            rtt: Some(Duration::from_millis(rtt_ms)),
            elsewhere: region != "osaka",
            number,
            addresses: vec![format!("127.0.0.1:{number}")],
            region: region.into(),
        }
    }

    fn order(mut all: Vec<Known>) -> Vec<u32> {
        all.sort();
        choose(all, "osaka").iter().map(|r| r.number).collect()
    }

    #[test]
    fn a_relay_with_addresses_of_both_families_is_offered_with_both() {
        let mut both = known(1, "osaka", 5, false);
        both.addresses.insert(0, "[::1]:1".into());
        let offered = choose(vec![both, known(2, "osaka", 6, false)], "osaka");
        let offered: Vec<_> = offered.iter().map(|relay| (relay.number, relay.address.as_str())).collect();
        assert_eq!(offered, [(1, "[::1]:1"), (1, "127.0.0.1:1"), (2, "127.0.0.1:2")]);
    }

    #[test]
    fn near_relays_first_then_other_regions() {
        let fleet = vec![
            known(1, "paris", 10, false),
            known(2, "paris", 10, false),
            known(3, "paris", 10, false),
            known(4, "milan", 20, false),
            known(5, "osaka", 200, false),
            known(6, "lima", 90, true),
        ];
        assert_eq!(order(fleet), [1, 2, 5, 4]);
    }

    #[test]
    fn inactive_relays_come_last_and_only_if_nothing_else_is_there() {
        let fleet = vec![known(1, "paris", 10, true), known(2, "osaka", 200, false), known(3, "osaka", 200, false)];
        assert_eq!(order(fleet), [2, 3, 1]);
        assert!(order(vec![]).is_empty());
    }
}
