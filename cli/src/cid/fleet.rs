//! Connection IDs of a fleet: which generation of its keys one is made with, and whom it names.

use std::{collections::BTreeMap, path::Path, time::Duration};

use antiphon_core::{
    cid::{ConfigId, Kind},
    id::{KeyGeneration, ServerId},
    keys::FleetRoot,
};
use antiphon_proto::v1::{FleetStatusRequest, FleetStatusResponse, RegionStatus};
use anyhow::{Context as _, bail, ensure};
use serde::Serialize;

use super::{EXPIRY_MODULUS, EXPIRY_SHIFT, Expiry, Taken, decode, octets};
use crate::{
    args::CidDecodeArgs,
    fleet::{Context, no_fleet, read_root},
    keys::ask_all,
};

/// What a fleet says of itself; nothing if no router answers.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Loaded somewhere, newest first.
    generations: Vec<u32>,
    /// What is new is made with it.
    minting: Option<u32>,
    /// By number.
    regions: BTreeMap<u16, Region>,
}

#[derive(Debug)]
struct Region {
    name: String,
    /// By number; absent if its router does not answer.
    workers: Option<BTreeMap<u16, Worker>>,
}

#[derive(Debug)]
struct Worker {
    name: String,
    incarnation: u32,
}

/// Whom a connection ID names.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Named {
    #[serde(rename = "regionName", skip_serializing_if = "Option::is_none")]
    pub(super) region: Option<String>,
    #[serde(rename = "workerName", skip_serializing_if = "Option::is_none")]
    pub(super) worker: Option<String>,
    /// Why it may be none of the fleet's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) problem: Option<String>,
}

/// The root of the fleet in `dir`.
pub(super) fn root(dir: &Path) -> anyhow::Result<FleetRoot> {
    let missing = |error: &anyhow::Error| {
        let error = error.downcast_ref::<std::io::Error>();
        error.is_some_and(|error| error.kind() == std::io::ErrorKind::NotFound)
    };
    match read_root(dir) {
        Err(error) if missing(&error) => bail!("{}", no_fleet(dir)),
        root => root.context("--fleet"),
    }
}

impl Known {
    /// Asks the routers of the fleet in `dir`.
    pub(super) async fn ask(dir: &Path) -> Self {
        let Ok(context) = Context::load(dir) else { return Self::default() };
        let (answers, _) = ask_all(&context, async |mut admin| admin.fleet_status(FleetStatusRequest {}).await).await;
        Self::of(answers.iter().map(|(_, answer)| answer))
    }

    fn of<'a>(answers: impl Iterator<Item = &'a FleetStatusResponse>) -> Self {
        let mut known = Self::default();
        for region in answers.flat_map(|answer| &answer.regions) {
            known.add(region);
        }
        known.generations.sort_unstable_by(|a, b| b.cmp(a));
        known.generations.dedup();
        known
    }

    fn add(&mut self, status: &RegionStatus) {
        let Some(digest) = &status.digest else { return };
        self.generations.extend(&digest.loaded_generations);
        self.minting = self.minting.max(Some(digest.minting_generation).filter(|minting| *minting > 0));
        let Ok(number) = u16::try_from(digest.number) else { return };
        let fresh = || Region { name: digest.region.clone(), workers: None };
        let region = self.regions.entry(number).or_insert_with(fresh);
        if status.local {
            let worker = |worker: &antiphon_proto::v1::WorkerStatus| {
                let number = u16::try_from(worker.number).ok()?;
                Some((number, Worker { name: worker.name.clone(), incarnation: worker.incarnation }))
            };
            region.workers = Some(status.workers.iter().filter_map(worker).collect());
        }
    }

    /// The generation that new connection IDs are made with.
    pub(super) fn minting(&self) -> anyhow::Result<u32> {
        self.minting.context("no router says which generation of keys it uses: name it with --generation")
    }

    /// Generations that a configuration may stand for: those of the fleet first, newest before oldest.
    fn candidates(&self, config: ConfigId) -> Vec<u32> {
        let fits = |generation: &u32| is_of(*generation, config);
        let mut candidates: Vec<_> = self.generations.iter().copied().filter(fits).collect();
        let last = self.generations.first().map_or(SEARCHED, |newest| newest.saturating_add(CONFIGS));
        let first = last.saturating_sub(SEARCHED).max(1);
        let others: Vec<_> = (first..=last).filter(|g| fits(g) && !candidates.contains(g)).collect();
        candidates.extend(others);
        candidates
    }

    /// Whom a server ID names.
    pub(super) fn name(&self, server: ServerId) -> Named {
        if self.regions.is_empty() {
            return Named::default();
        }
        let Some(region) = self.regions.get(&server.region.value()) else {
            let problem = format!(
                "no region {} in this fleet: forged, mistyped, or of another generation",
                server.region.value()
            );
            return Named { problem: Some(problem), ..Named::default() };
        };
        let named = Named { region: Some(region.name.clone()), ..Named::default() };
        let Some(workers) = &region.workers else { return named };
        match workers.get(&server.worker.value()) {
            Some(worker) if worker.incarnation == server.incarnation.value() => {
                Named { worker: Some(worker.name.clone()), ..named }
            }
            Some(worker) => {
                let problem = format!("{} has started again since: an earlier process of it is meant", worker.name);
                Named { worker: Some(worker.name.clone()), problem: Some(problem), ..named }
            }
            None => {
                let number = server.worker.value();
                let problem = format!("no worker {number} in {}: it is gone, or this is forged", region.name);
                Named { problem: Some(problem), ..named }
            }
        }
    }

    /// How much speaks for it that this key is the right one; 0 for nothing.
    fn likelihood(&self, taken: &Taken, now: Duration) -> u32 {
        let Some((server, nonce)) = taken.layout() else { return 0 };
        let spare = nonce.value() >> EXPIRY_SHIFT & (EXPIRY_MODULUS - 1);
        let kind = match nonce.kind() {
            Some(Kind::Connection) if spare == 0 => 3,
            Some(Kind::Initial) if Expiry::of(nonce, now.as_secs()).in_s.unsigned_abs() < DAY_S => 2,
            Some(Kind::Initial) => 1,
            _ => return 0,
        };
        let named = self.name(server);
        kind + 4 * u32::from(named.region.is_some()) + 8 * u32::from(named.worker.is_some())
    }
}

/// Takes a connection ID of the fleet apart with the generation that it was made with: the one given, else the one
/// that makes most sense of it.
pub(super) fn take_apart(
    args: &CidDecodeArgs,
    root: &FleetRoot,
    known: &Known,
    now: Duration,
) -> anyhow::Result<Taken> {
    let cid = octets("CID", &args.cid)?;
    let config = ConfigId::of_first_octet(cid[0]);
    let config = config.context("CID: it names no server, so there is nothing to take apart")?;
    let candidates = match args.key.generation {
        Some(generation) => {
            check_generation(generation, config)?;
            vec![generation]
        }
        None => known.candidates(config),
    };
    let mut best: Option<(u32, u32, Taken)> = None;
    for generation in candidates {
        let key = root.cid_key(KeyGeneration::new(generation)?);
        let taken = decode(args, Some(key), now)?;
        let likelihood = known.likelihood(&taken, now);
        if best.as_ref().is_none_or(|(most, ..)| likelihood > *most) {
            best = Some((likelihood, generation, taken));
        }
    }
    let (_, generation, mut taken) = best.context("no generation fits")?;
    let named = taken.layout().map(|(server, _)| known.name(server)).unwrap_or_default();
    taken.of_fleet(generation, named);
    Ok(taken)
}

/// Whether connection IDs of a generation carry this configuration.
pub(super) fn check_generation(generation: u32, config: ConfigId) -> anyhow::Result<()> {
    ensure!(
        is_of(generation, config),
        "--generation {generation} has configuration {}, the remainder of its division by {CONFIGS}; \
         this connection ID has {config}",
        generation % CONFIGS
    );
    Ok(())
}

/// The configuration that connection IDs of a generation carry.
pub(super) fn config_of(generation: u32) -> u8 {
    u8::try_from(generation % CONFIGS).unwrap_or(u8::MAX)
}

fn is_of(generation: u32, config: ConfigId) -> bool {
    config_of(generation) == config.value()
}

/// Configurations that a first octet tells apart: [`ConfigId::COUNT`].
const CONFIGS: u32 = 7;
/// Generations that are tried at most if the fleet does not name the right one.
const SEARCHED: u32 = 70;
const DAY_S: u64 = 86_400;

#[cfg(test)]
mod tests {
    use antiphon_core::{
        cid::{Config, SessionNonce},
        id::{Incarnation, RegionNumber, ShardNumber, WorkerNumber},
    };
    use antiphon_proto::v1::{RegionDigest, WorkerStatus};

    use super::*;
    use crate::args::CidKeyArgs;

    const NOW: Duration = Duration::from_secs(1_800_000_000);

    fn fleet(generations: &[u32]) -> Known {
        let digest = RegionDigest {
            region: "frankfurt".into(),
            number: 3,
            loaded_generations: generations.to_vec(),
            minting_generation: generations.iter().copied().max().unwrap_or(0),
            ..RegionDigest::default()
        };
        let worker =
            WorkerStatus { name: "default-frontdesk-1".into(), number: 7, incarnation: 9, ..WorkerStatus::default() };
        let region =
            RegionStatus { digest: Some(digest), local: true, workers: vec![worker], ..RegionStatus::default() };
        Known::of([FleetStatusResponse { regions: vec![region], ..FleetStatusResponse::default() }].iter())
    }

    fn root() -> FleetRoot {
        FleetRoot::from_hex(&"5a".repeat(32)).unwrap()
    }

    fn server(region: u16, worker: u16, incarnation: u32) -> ServerId {
        ServerId {
            region: RegionNumber::new(region).unwrap(),
            worker: WorkerNumber::new(worker).unwrap(),
            shard: ShardNumber::new(0).unwrap(),
            incarnation: Incarnation::new(incarnation).unwrap(),
        }
    }

    fn minted(generation: u32, server: ServerId, nonce: SessionNonce) -> String {
        let key = root().cid_key(KeyGeneration::new(generation).unwrap());
        let config = Config::new(ConfigId::new(config_of(generation)).unwrap(), 8, 8, Some(key), true).unwrap();
        config.encode(&server.to_bytes(), &nonce.value().to_be_bytes(), 0).unwrap().to_string()
    }

    fn args(cid: &str, generation: Option<u32>) -> CidDecodeArgs {
        let key = CidKeyArgs { key: None, fleet: true, generation };
        CidDecodeArgs { cid: cid.into(), key, server_id_len: 8, nonce_len: None, random_bits: false }
    }

    #[test]
    fn every_generation_is_found_and_its_worker_named() {
        let known = fleet(&[8, 9, 10]);
        let nonces = [SessionNonce::connection(4), SessionNonce::initial(NOW.as_secs() + 20, 4)];
        for (generation, nonce) in [1, 2, 7, 8, 9, 10, 11, 17].into_iter().flat_map(|g| nonces.map(|n| (g, n))) {
            let cid = minted(generation, server(3, 7, 9), nonce);
            let taken = take_apart(&args(&cid, None), &root(), &known, NOW).unwrap();
            let text = taken.to_string();
            assert!(text.contains(&format!("\ngeneration     {generation}\n")), "{text}");
            assert!(text.contains("\nworker         frankfurt/default-frontdesk-1\n"), "{text}");
            assert_eq!(taken.problem(), None);
        }
    }

    #[test]
    fn without_an_answer_a_live_connections_own_form_tells_the_generation() {
        for generation in [1, 8, 22] {
            let cid = minted(generation, server(900, 7, 9), SessionNonce::connection(4));
            let taken = take_apart(&args(&cid, None), &root(), &Known::default(), NOW).unwrap();
            assert!(taken.to_string().contains(&format!("\ngeneration     {generation}\n")), "{taken}");
            assert_eq!(taken.problem(), None, "nobody knows the regions");
        }
    }

    #[test]
    fn who_is_not_of_the_fleet_is_said() {
        let known = fleet(&[1]);
        for (named, expected) in [
            (server(676, 7, 9), "no region 676 in this fleet: forged, mistyped, or of another generation"),
            (server(3, 8, 9), "no worker 8 in frankfurt: it is gone, or this is forged"),
            (server(3, 7, 1), "default-frontdesk-1 has started again since: an earlier process of it is meant"),
        ] {
            let cid = minted(1, named, SessionNonce::connection(4));
            let taken = take_apart(&args(&cid, None), &root(), &known, NOW).unwrap();
            assert_eq!(taken.problem(), Some(expected));
        }
    }

    #[test]
    fn a_generation_has_to_fit_the_configuration() {
        let cid = minted(8, server(3, 7, 9), SessionNonce::connection(4));
        let of = |generation| take_apart(&args(&cid, Some(generation)), &root(), &fleet(&[8]), NOW);
        assert!(of(8).unwrap().to_string().contains("frankfurt"));
        assert!(of(1).unwrap().problem().is_some(), "it fits, and makes no sense");
        let error = of(9).unwrap_err().to_string();
        assert!(error.starts_with("--generation 9 has configuration 2, the remainder"), "{error}");
        assert!(error.ends_with("this connection ID has 1"), "{error}");
        assert_eq!(fleet(&[8, 9]).minting().unwrap(), 9);
        assert!(Known::default().minting().is_err());
    }
}
