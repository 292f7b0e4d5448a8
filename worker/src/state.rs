//! What the worker keeps on disk: its number, so that a restart does not take another one; its agent's behaviour; and
//! the lives it has led, so that none is led twice.
//!
//! Keys are not kept. Those of tunnels and resets belong to one life of the worker, and relays get routes to a new one
//! from routers only: without a router no key of an earlier life would open anything.
//!
//! One file: [`MAGIC`], the format (2 bytes, network byte order), the SHA-256 of format and body, and the body, a
//! protobuf message. It is read whole or not at all. The checksum finds damage, not forgery: who can write to the
//! directory is trusted.

use std::{io, path::Path};

use antiphon_core::id::{Incarnation, RegionNumber, WorkerNumber};
use antiphon_proto::v1::AgentBehaviour;
use antiphon_runtime::{
    pki::Identity,
    private_dir::{OpenError, PrivateDir},
};
use prost::Message as _;
use ring::digest::{SHA256, digest};

/// Whose state it is. Another worker's number is of no use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    /// SHA-256 of the fleet's trust anchor (DER).
    pub(crate) fleet: Vec<u8>,
    pub(crate) region: String,
    pub(crate) name: String,
    /// `namespace/name` that it serves.
    pub(crate) agent: String,
}

impl Owner {
    /// The worker that shows this identity.
    pub(crate) fn of(identity: &Identity, agent: &str) -> Self {
        let (peer, fleet) = (identity.peer(), digest(&SHA256, &identity.ca()).as_ref().to_vec());
        Self { fleet, region: peer.region.clone(), name: peer.name.clone(), agent: agent.to_owned() }
    }
}

/// What a worker knew.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct State {
    pub(crate) numbers: Option<(RegionNumber, WorkerNumber)>,
    pub(crate) behaviour: Option<AgentBehaviour>,
    /// Newest last, [`LIVES`] at most.
    pub(crate) lives: Vec<Incarnation>,
}

impl State {
    /// Begins another life: one that none of the remembered ones was.
    pub(crate) fn begin_life(&mut self, mut draw: impl FnMut() -> u32) -> Incarnation {
        let life = loop {
            if let Some(life) = Incarnation::new(draw()).ok().filter(|life| !self.lives.contains(life)) {
                break life;
            }
        };
        let surplus = (self.lives.len() + 1).saturating_sub(LIVES);
        self.lives.drain(..surplus);
        self.lives.push(life);
        life
    }
}

/// Why a file is not used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DecodeError {
    #[error("it is no worker's state")]
    NotState,
    #[error("it has format {0}, this worker knows {FORMAT} and older")]
    Newer(u16),
    #[error("it is damaged: the checksum does not match")]
    Damaged,
    #[error("it is of worker {name} of {region}, for {agent}")]
    OtherWorker { name: String, region: String, agent: String },
    #[error("it is of a fleet with another trust anchor")]
    OtherFleet,
    #[error("it makes no sense: {0}")]
    Senseless(String),
}

#[derive(Clone, PartialEq, prost::Message)]
struct Body {
    #[prost(bytes = "vec", tag = "1")]
    fleet: Vec<u8>,
    #[prost(string, tag = "2")]
    region: String,
    #[prost(string, tag = "3")]
    name: String,
    #[prost(string, tag = "4")]
    agent: String,
    #[prost(uint32, optional, tag = "5")]
    region_number: Option<u32>,
    #[prost(uint32, optional, tag = "6")]
    worker_number: Option<u32>,
    #[prost(message, optional, tag = "7")]
    behaviour: Option<AgentBehaviour>,
    #[prost(fixed32, repeated, tag = "8")]
    lives: Vec<u32>,
}

fn encode(owner: &Owner, state: &State) -> Vec<u8> {
    let body = Body {
        fleet: owner.fleet.clone(),
        region: owner.region.clone(),
        name: owner.name.clone(),
        agent: owner.agent.clone(),
        region_number: state.numbers.map(|(region, _)| region.value().into()),
        worker_number: state.numbers.map(|(_, worker)| worker.value().into()),
        behaviour: state.behaviour.clone(),
        lives: state.lives.iter().map(|life| life.value()).collect(),
    };
    let checked = [&FORMAT.to_be_bytes()[..], &body.encode_to_vec()].concat();
    [&MAGIC[..], &FORMAT.to_be_bytes(), digest(&SHA256, &checked).as_ref(), &checked[2..]].concat()
}

fn decode(owner: &Owner, bytes: &[u8]) -> Result<State, DecodeError> {
    let rest = bytes.strip_prefix(&MAGIC).ok_or(DecodeError::NotState)?;
    let (format, rest) = rest.split_first_chunk::<2>().ok_or(DecodeError::NotState)?;
    let found = u16::from_be_bytes(*format);
    if found > FORMAT {
        return Err(DecodeError::Newer(found));
    }
    let (sum, body) = rest.split_first_chunk::<32>().ok_or(DecodeError::Damaged)?;
    if sum[..] != *digest(&SHA256, &[format, body].concat()).as_ref() {
        return Err(DecodeError::Damaged);
    }
    let senseless = |what: &dyn std::fmt::Display| DecodeError::Senseless(what.to_string());
    let body = Body::decode(body).map_err(|error| senseless(&error))?;
    if (&body.region, &body.name, &body.agent) != (&owner.region, &owner.name, &owner.agent) {
        return Err(DecodeError::OtherWorker { name: body.name, region: body.region, agent: body.agent });
    }
    if body.fleet != owner.fleet {
        return Err(DecodeError::OtherFleet);
    }
    let numbers = match (body.region_number, body.worker_number) {
        (Some(region), Some(worker)) => {
            let numbers = numbers(region, worker);
            Some(numbers.ok_or_else(|| senseless(&format_args!("worker {worker} of region {region}")))?)
        }
        _ => None,
    };
    let lives: Result<_, _> = body.lives.into_iter().map(Incarnation::new).collect();
    Ok(State { numbers, behaviour: body.behaviour, lives: lives.map_err(|error| senseless(&error))? })
}

/// The numbers that a router says, if there are such.
pub(crate) fn numbers(region: u32, worker: u32) -> Option<(RegionNumber, WorkerNumber)> {
    let region = u16::try_from(region).ok().and_then(|n| RegionNumber::new(n).ok());
    region.zip(u16::try_from(worker).ok().and_then(|n| WorkerNumber::new(n).ok()))
}

/// A worker's private directory, and whose state it holds: of two workers with one number, clients would reach either.
#[derive(Debug)]
pub(crate) struct StateDir {
    dir: PrivateDir,
    owner: Owner,
}

impl StateDir {
    /// Makes the directory if it is absent and takes its lock.
    ///
    /// # Errors
    /// It cannot be made or opened, is not this user's alone, or another process has it.
    pub(crate) fn open(path: &Path, owner: Owner) -> Result<Self, OpenError> {
        Ok(Self { dir: PrivateDir::open(path)?, owner })
    }

    /// The state that was kept last; nothing if there is none. What cannot be used is logged and replaced later.
    pub(crate) fn load(&self) -> State {
        let refusal = match self.dir.read(STATE_FILE) {
            Ok(None) => return State::default(),
            Ok(Some(bytes)) => match decode(&self.owner, &bytes) {
                Ok(state) => return state,
                Err(error) => error.to_string(),
            },
            Err(error) => error.to_string(),
        };
        let path = self.dir.path().join(STATE_FILE);
        tracing::warn!(path = %path.display(), "the state on disk is not used, a router has to answer first: {refusal}");
        State::default()
    }

    /// Replaces the state in one step.
    ///
    /// # Errors
    /// The system's; the earlier state is still there.
    pub(crate) fn store(&self, state: &State) -> io::Result<()> {
        self.dir.replace(STATE_FILE, &encode(&self.owner, state))
    }
}

/// First bytes of a state file.
const MAGIC: [u8; 15] = *b"antiphon-worker";
/// Format that is written. A reader takes this one and older ones.
const FORMAT: u16 = 1;
/// Lives remembered; each is one of 2^32.
const LIVES: usize = 64;
const STATE_FILE: &str = "worker.state";

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, DirBuilder},
        os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    };

    use super::*;

    fn owner() -> Owner {
        Owner { fleet: vec![9; 32], region: "north".into(), name: "worker-0".into(), agent: "default/echo".into() }
    }

    fn state() -> State {
        let behaviour = AgentBehaviour { engine: "echo".into(), ..AgentBehaviour::default() };
        let lives = [1, 2, 3].map(|n| Incarnation::new(n).unwrap()).into();
        State { numbers: numbers(1, 9), behaviour: Some(behaviour), lives }
    }

    #[test]
    fn what_was_kept_is_what_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let kept = StateDir::open(&path, owner()).unwrap();
        assert_eq!(kept.load(), State::default(), "nothing yet");
        kept.store(&state()).unwrap();
        assert_eq!(kept.load(), state());
        assert_eq!(fs::metadata(path.join(STATE_FILE)).unwrap().mode() & 0o777, 0o600);
        assert!(matches!(StateDir::open(&path, owner()), Err(OpenError::InUse { .. })));
        drop(kept);
        let other = StateDir::open(&path, Owner { agent: "default/other".into(), ..owner() }).unwrap();
        assert_eq!(other.load(), State::default(), "another agent's worker is another worker");
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("open");
        DirBuilder::new().mode(0o755).create(&path).unwrap();
        let refused = StateDir::open(&path, owner()).unwrap_err().to_string();
        assert!(refused.contains("has mode 755") && refused.contains("mode 700"), "{refused}");
    }

    #[test]
    fn no_cut_and_no_flipped_bit_goes_unnoticed() {
        let bytes = encode(&owner(), &state());
        for length in 0..bytes.len() {
            assert!(decode(&owner(), &bytes[..length]).is_err(), "cut to {length}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut altered = bytes.clone();
            altered[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&owner(), &altered).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn what_is_not_ours_is_refused_with_a_reason() {
        let bytes = encode(&owner(), &state());
        let refused = |owner: Owner| decode(&owner, &bytes).unwrap_err().to_string();
        let other = "it is of worker worker-0 of north, for default/echo";
        assert_eq!(refused(Owner { name: "worker-1".into(), ..owner() }), other);
        assert_eq!(refused(Owner { region: "south".into(), ..owner() }), other);
        assert_eq!(refused(Owner { fleet: vec![8; 32], ..owner() }), "it is of a fleet with another trust anchor");
        assert_eq!(decode(&owner(), b"something else"), Err(DecodeError::NotState));
    }

    #[test]
    fn no_life_is_led_twice() {
        let mut state = state();
        let mut drawn = [3, 2, 7].into_iter();
        assert_eq!(state.begin_life(|| drawn.next().unwrap()).value(), 7);
        (100..300).for_each(|n| {
            state.begin_life(|| n);
        });
        assert_eq!(state.lives.len(), LIVES);
        assert_eq!(state.lives.last().map(|life| life.value()), Some(299));
    }
}
