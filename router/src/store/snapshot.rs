//! What a router keeps on disk, so that it can start without its store, workers and peers (invariant I8).
//!
//! One file: [`MAGIC`], the format (2 bytes, network byte order), the SHA-256 of format and body, and the body, a
//! protobuf message. It is read whole or not at all. The checksum finds damage, not forgery: who can write to the
//! directory is trusted.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use antiphon_core::id::Incarnation;
use antiphon_proto::v1;
use antiphon_runtime::pki::Identity;
use bytes::Bytes;
use prost::Message as _;
use sha2::{Digest as _, Sha256};

use super::claims::{Claims, Holder, Kind};
use crate::records::Records;

pub(super) mod disk;

pub use disk::SnapshotDir;

/// Whose snapshot it is. Another fleet's or region's records and numbers are of no use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// SHA-256 of the fleet's trust anchor (DER).
    pub fleet: [u8; 32],
    /// The router's region.
    pub region: String,
}

impl Owner {
    /// The region of the router that shows this identity.
    #[must_use]
    pub fn of(identity: &Identity) -> Self {
        Self { fleet: Sha256::digest(identity.ca()).into(), region: identity.peer().region.clone() }
    }
}

/// All that a router knows of its region, as of one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// When the store last answered, to the millisecond.
    pub contact: SystemTime,
    /// Regions, agents, API keys and the generation of keys.
    pub records: Arc<Records>,
    /// Who holds which number.
    pub claims: Claims,
    /// How far the etcd had come that the records and numbers are from, if they are from one.
    pub etcd: Option<Reached>,
    /// What the router knows of its fleet besides: routes, relays, peers' digests. The store neither reads nor checks
    /// it; the router writes it with [`Store::remember`](super::Store::remember) whenever it changes and reads it with
    /// [`Store::remembered`](super::Store::remembered) when it starts. It should bear a version of its own form, and a
    /// form that is not known is to be ignored. No secrets: those derive from the fleet root.
    pub known: Bytes,
}

/// How far an etcd had come. Another store or cluster later on, or a smaller revision, means that it lost something.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reached {
    /// The cluster's id.
    pub cluster: u64,
    /// Its revision.
    pub revision: i64,
    /// Id that the store was given when it was made.
    pub store: String,
}

impl Default for Snapshot {
    fn default() -> Self {
        Self {
            contact: UNIX_EPOCH,
            records: Arc::default(),
            claims: Claims::default(),
            etcd: None,
            known: Bytes::new(),
        }
    }
}

/// Why a file is not used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Something else, or cut off within the first bytes.
    #[error("it is no router's snapshot")]
    NotSnapshot,
    /// A later version's.
    #[error("it has format {found}, this router knows {FORMAT} and older")]
    Newer {
        /// What it says.
        found: u16,
    },
    /// Cut off or altered.
    #[error("it is damaged: the checksum does not match")]
    Damaged,
    /// Another region's.
    #[error("it is of region {0}")]
    OtherRegion(String),
    /// This region's in another fleet.
    #[error("it is of a fleet with another trust anchor")]
    OtherFleet,
    /// Intact, but no message.
    #[error("it makes no sense: {0}")]
    Senseless(String),
}

#[derive(Clone, PartialEq, prost::Message)]
struct Body {
    #[prost(bytes = "vec", tag = "1")]
    fleet: Vec<u8>,
    #[prost(string, tag = "2")]
    region: String,
    #[prost(uint64, tag = "3")]
    contact_unix_ms: u64,
    #[prost(uint64, tag = "4")]
    revision: u64,
    /// All records.
    #[prost(message, optional, tag = "5")]
    records: Option<v1::ApplyRequest>,
    #[prost(message, repeated, tag = "6")]
    workers: Vec<Numbered>,
    #[prost(message, repeated, tag = "7")]
    relays: Vec<Numbered>,
    #[prost(uint64, tag = "8")]
    etcd_cluster: u64,
    /// 0: the store is none of etcd.
    #[prost(int64, tag = "9")]
    etcd_revision: i64,
    #[prost(bytes = "bytes", tag = "10")]
    known: Bytes,
    #[prost(string, tag = "11")]
    etcd_store: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Numbered {
    #[prost(uint32, tag = "1")]
    number: u32,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(fixed32, tag = "3")]
    incarnation: u32,
    #[prost(bool, tag = "4")]
    unconfirmed: bool,
    #[prost(string, tag = "5")]
    agent: String,
}

/// The file's bytes.
#[must_use]
pub(super) fn encode(owner: &Owner, snapshot: &Snapshot) -> Vec<u8> {
    let contact = snapshot.contact.duration_since(UNIX_EPOCH).unwrap_or_default();
    let numbered = |(number, holder): (u16, &Holder)| Numbered {
        number: number.into(),
        name: holder.name.clone(),
        agent: holder.agent.clone(),
        incarnation: holder.incarnation.value(),
        unconfirmed: holder.unconfirmed,
    };
    let reached = snapshot.etcd.clone().unwrap_or_default();
    let body = Body {
        fleet: owner.fleet.to_vec(),
        region: owner.region.clone(),
        contact_unix_ms: u64::try_from(contact.as_millis()).unwrap_or(u64::MAX),
        revision: snapshot.records.revision,
        records: Some(snapshot.records.all()),
        workers: snapshot.claims.workers().map(numbered).collect(),
        relays: snapshot.claims.relays().map(numbered).collect(),
        etcd_cluster: reached.cluster,
        etcd_revision: reached.revision,
        etcd_store: reached.store,
        known: snapshot.known.clone(),
    };
    let mut bytes = Vec::with_capacity(HEADER + body.encoded_len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&FORMAT.to_be_bytes());
    bytes.extend_from_slice(&[0; DIGEST]);
    bytes.extend_from_slice(&body.encode_to_vec());
    let digest = digest(FORMAT, &bytes[HEADER..]);
    bytes[HEADER - DIGEST..HEADER].copy_from_slice(&digest);
    bytes
}

/// The snapshot in a file's bytes, if it is `owner`'s.
///
/// # Errors
/// [`DecodeError`]: then nothing of it is to be used.
pub(super) fn decode(owner: &Owner, bytes: &[u8]) -> Result<Snapshot, DecodeError> {
    let rest = bytes.strip_prefix(&MAGIC).ok_or(DecodeError::NotSnapshot)?;
    let (format, rest) = rest.split_first_chunk().ok_or(DecodeError::NotSnapshot)?;
    let format = u16::from_be_bytes(*format);
    if format > FORMAT {
        return Err(DecodeError::Newer { found: format });
    }
    let (sum, body) = rest.split_first_chunk::<DIGEST>().ok_or(DecodeError::Damaged)?;
    if *sum != digest(format, body) {
        return Err(DecodeError::Damaged);
    }
    let body = Body::decode(body).map_err(|error| DecodeError::Senseless(error.to_string()))?;
    if body.region != owner.region {
        return Err(DecodeError::OtherRegion(body.region));
    }
    if body.fleet != owner.fleet {
        return Err(DecodeError::OtherFleet);
    }
    let reached = Reached { cluster: body.etcd_cluster, revision: body.etcd_revision, store: body.etcd_store };
    let mut claims = Claims::default();
    for (kind, numbered) in [(Kind::Worker, body.workers), (Kind::Relay, body.relays)] {
        for Numbered { number, name, agent, incarnation, unconfirmed } in numbered {
            let legal = u16::try_from(number).ok().filter(|_| number < kind.numbers());
            let (Some(number), Ok(incarnation)) = (legal, Incarnation::new(incarnation)) else {
                return Err(DecodeError::Senseless(format!("{name} has number {number}")));
            };
            claims.of_mut(kind).put(number, Holder { name, agent, incarnation, unconfirmed });
        }
    }
    let (records, skipped) = Records::from_all(body.revision, &body.records.unwrap_or_default());
    for error in skipped {
        tracing::warn!("a record of the snapshot is left out: {error}");
    }
    Ok(Snapshot {
        contact: UNIX_EPOCH + Duration::from_millis(body.contact_unix_ms),
        records: Arc::new(records),
        claims,
        etcd: (reached.revision > 0).then_some(reached),
        known: body.known,
    })
}

fn digest(format: u16, body: &[u8]) -> [u8; DIGEST] {
    Sha256::new().chain_update(format.to_be_bytes()).chain_update(body).finalize().into()
}

/// First bytes of a snapshot.
const MAGIC: [u8; 15] = *b"antiphon-router";
/// Format that is written. A reader takes this one and older ones.
const FORMAT: u16 = 1;
const DIGEST: usize = 32;
const HEADER: usize = MAGIC.len() + 2 + DIGEST;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn owner() -> Owner {
        Owner { fleet: [9; 32], region: "north".into() }
    }

    pub(crate) fn snapshot(revision: u64) -> Snapshot {
        let region = v1::RegionRecord { name: "north".into(), number: 7, ..v1::RegionRecord::default() };
        let (records, _) = Records::from_all(
            revision,
            &v1::ApplyRequest { regions: vec![region], key_generation: 3, ..v1::ApplyRequest::default() },
        );
        let mut claims = Claims::default();
        let holder = |name: &str, incarnation, unconfirmed| Holder {
            name: name.into(),
            agent: if incarnation == 0 { String::new() } else { "shop/desk".into() },
            incarnation: Incarnation::new(incarnation).unwrap(),
            unconfirmed,
        };
        claims.of_mut(Kind::Worker).put(4711, holder("w-1", 77, false));
        claims.of_mut(Kind::Worker).put(0, holder("w-2", 78, true));
        claims.of_mut(Kind::Relay).put(63, holder("r-1", 0, false));
        Snapshot {
            contact: UNIX_EPOCH + Duration::from_millis(1_800_000_000_123),
            records: Arc::new(records),
            claims,
            etcd: Some(Reached { cluster: u64::MAX, revision: 12, store: "f00d".into() }),
            known: Bytes::from_static(b"whatever"),
        }
    }

    #[test]
    fn what_was_written_is_what_is_read() {
        assert_eq!(decode(&owner(), &encode(&owner(), &snapshot(17))).unwrap(), snapshot(17));
        let empty = Snapshot::default();
        assert_eq!(decode(&owner(), &encode(&owner(), &empty)).unwrap(), empty);
    }

    #[test]
    fn no_cut_and_no_flipped_bit_goes_unnoticed() {
        let bytes = encode(&owner(), &snapshot(1));
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
        let bytes = encode(&owner(), &snapshot(1));
        let refused = |owner: &Owner, bytes: &[u8]| decode(owner, bytes).unwrap_err().to_string();
        assert_eq!(refused(&Owner { region: "south".into(), ..owner() }, &bytes), "it is of region north");
        let other_fleet = Owner { fleet: [8; 32], ..owner() };
        assert_eq!(refused(&other_fleet, &bytes), "it is of a fleet with another trust anchor");
        let mut newer = bytes.clone();
        newer[MAGIC.len() + 1] = 2;
        assert_eq!(refused(&owner(), &newer), "it has format 2, this router knows 1 and older");
        assert_eq!(refused(&owner(), b"something else"), "it is no router's snapshot");
    }
}
