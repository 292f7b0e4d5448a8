//! What is to be written: one [`Step`] per transaction, from the mirror alone.

use std::collections::BTreeMap;

use antiphon_core::id::Incarnation;
use antiphon_proto::v1;
use prost::Message as _;

use super::{
    keys::{Entry, HolderValue, Identity, json},
    mirror::{self, Mirror, Refresh, Step},
};
use crate::{
    records::Records,
    store::{
        StoreError,
        claims::{Claim, Claims, Holder, Kind},
    },
};

type Writes = BTreeMap<String, Option<Vec<u8>>>;

/// Gives a claimant its number.
pub(super) fn claim(mirror: &Mirror, claim: &Claim) -> Result<Step<u16>, StoreError> {
    let number = mirror.claims.choose(claim, !mirror.settling())?;
    let holder = claim.holder();
    let mut step = Step {
        rests_on: vec![
            Entry::Identity.path(),
            Entry::Number(claim.kind, number).path(),
            Entry::Name(claim.kind, &claim.name).path(),
        ],
        writes: Writes::new(),
        refresh: Refresh::Keys,
        outcome: number,
    };
    // Another router may have numbered it a moment ago: resting on that number as well makes it known here first.
    let named = mirror.named(claim.kind, &claim.name).filter(|named| *named != number);
    step.rests_on.extend(named.map(|named| Entry::Number(claim.kind, named).path()));
    let table = mirror.claims.of(claim.kind);
    if table.holder(number) == Some(&holder) {
        return Ok(step);
    }
    displace(&mut step, mirror, claim.kind, number, &claim.name);
    assign(&mut step.writes, claim.kind, number, &holder);
    Ok(step)
}

/// Takes a number from its holder, and from its next holder the one held before.
fn displace<T>(step: &mut Step<T>, mirror: &Mirror, kind: Kind, number: u16, name: &str) {
    let table = mirror.claims.of(kind);
    let former = table.holder(number).filter(|former| former.name != name);
    let former = former.map(|former| Entry::Name(kind, &former.name).path());
    let before = table.number_of(name).filter(|before| *before != number);
    let before = before.map(|before| Entry::Number(kind, before).path());
    for path in former.into_iter().chain(before) {
        step.rests_on.push(path.clone());
        step.writes.entry(path).or_insert(None);
    }
}

fn assign(writes: &mut Writes, kind: Kind, number: u16, holder: &Holder) {
    writes.insert(Entry::Number(kind, number).path(), Some(json(&HolderValue::from(holder))));
    writes.insert(Entry::Name(kind, &holder.name).path(), Some(number.to_string().into_bytes()));
}

/// Gives back the number of a name, if this incarnation holds it.
pub(super) fn release(mirror: &Mirror, kind: Kind, name: &str, incarnation: Incarnation) -> Step<()> {
    let mut step = Step { rests_on: vec![], writes: Writes::new(), refresh: Refresh::Keys, outcome: () };
    let table = mirror.claims.of(kind);
    let number = table.number_of(name);
    let theirs = |number: &u16| table.holder(*number).is_some_and(|holder| holder.incarnation == incarnation);
    if let Some(number) = number.filter(theirs) {
        for path in [Entry::Number(kind, number).path(), Entry::Name(kind, name).path()] {
            step.rests_on.push(path.clone());
            step.writes.insert(path, None);
        }
    }
    step
}

/// What became of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Made,
    /// In force, and to be spread over the records.
    Pending,
    /// Another one has to be spread first.
    Blocked,
}

/// Changes records; the revision is then above `floor`.
pub(super) fn change(mirror: &Mirror, change: &v1::ApplyRequest, floor: u64) -> Result<Step<Change>, StoreError> {
    let rests_on = vec![Entry::Revision.path(), Entry::Change.path()];
    let step = |writes, outcome| Step { rests_on, writes, refresh: Refresh::Records, outcome };
    if mirror.change.is_some() {
        return Ok(step(Writes::new(), Change::Blocked));
    }
    let bytes = change.encoded_len();
    if bytes > LARGEST_CHANGE {
        return Err(StoreError::TooLarge { bytes, max: LARGEST_CHANGE });
    }
    let before = mirror.records();
    let after = before.apply(change)?;
    let mut writes = mirror::difference(&before, &after);
    let mut outcome = Change::Made;
    if writes.len() > WRITES - 3 {
        let records = v1::ApplyRequest { key_generation: 0, minting_generation: 0, ..change.clone() };
        writes = Writes::from([(Entry::Change.path(), Some(records.encode_to_vec()))]);
        outcome = Change::Pending;
    }
    writes.extend(mirror::generations(&before, &after));
    writes.insert(Entry::Revision.path(), Some(revision(before.revision.max(floor) + 1)));
    Ok(step(writes, outcome))
}

/// Spreads some of a pending change over the records it is about. Whether nothing is left.
pub(super) fn spread(mirror: &Mirror) -> Step<bool> {
    let mut step =
        Step { rests_on: vec![Entry::Change.path()], writes: Writes::new(), refresh: Refresh::Records, outcome: true };
    if mirror.change.is_some() {
        step.writes = mirror::difference(&mirror.base, &mirror.records());
        step.outcome = step.writes.len() < WRITES;
        while step.writes.len() >= WRITES {
            step.writes.pop_last();
        }
        if step.outcome {
            step.writes.insert(Entry::Change.path(), None);
        }
    }
    step
}

/// Raises the revision above what watchers have seen, if it is not.
pub(super) fn raise(mirror: &Mirror, seen: &Records) -> Step<()> {
    let mut step =
        Step { rests_on: vec![Entry::Revision.path()], writes: Writes::new(), refresh: Refresh::Records, outcome: () };
    let ours = mirror.records();
    let behind = ours.revision < seen.revision || (ours.revision == seen.revision && ours != *seen);
    if behind {
        step.writes.insert(Entry::Revision.path(), Some(revision(seen.revision + 1)));
    }
    step
}

/// Writes that fill an empty store, in parts that each rest on its being empty; the last one makes it a store. Who holds
/// a number there already keeps it.
pub(super) fn fill(mirror: &Mirror, identity: &Identity, records: &Records, claims: &Claims) -> Vec<Step<()>> {
    let identity_path = Entry::Identity.path();
    let step = |writes| Step { rests_on: vec![identity_path.clone()], writes, refresh: Refresh::Keys, outcome: () };
    let nothing = Records::default();
    let mut writes: Vec<_> = mirror::difference(&nothing, records).into_iter().collect();
    writes.extend(mirror::generations(&nothing, records));
    let mut steps: Vec<_> = writes.chunks(WRITES).map(|part| step(part.iter().cloned().collect())).collect();
    steps.extend(missing(mirror, claims, false));
    steps.push(step(Writes::from([
        (Entry::Revision.path(), Some(revision(records.revision + 1))),
        (Entry::Identity.path(), Some(json(identity))),
    ])));
    steps
}

/// Writes claims that the store lacks. If it is known to have gone back in time, they win over what it has.
pub(super) fn missing(mirror: &Mirror, claims: &Claims, win: bool) -> Vec<Step<()>> {
    let lacking = claims.all().filter(|(kind, number, holder)| {
        let table = mirror.claims.of(*kind);
        let there = table.holder(*number);
        let same = there.is_some_and(|there| there.name == holder.name);
        let free = there.is_none() && table.number_of(&holder.name).is_none();
        !same && (win || free)
    });
    let lacking: Vec<_> = lacking.collect();
    let part = |part: &[(Kind, u16, &Holder)]| {
        let mut step = Step { rests_on: vec![], writes: Writes::new(), refresh: Refresh::Keys, outcome: () };
        for (kind, number, holder) in part {
            step.rests_on.extend([Entry::Number(*kind, *number).path(), Entry::Name(*kind, &holder.name).path()]);
            displace(&mut step, mirror, *kind, *number, &holder.name);
        }
        // After all that is displaced: who lost one number may have another.
        part.iter().for_each(|(kind, number, holder)| assign(&mut step.writes, *kind, *number, holder));
        step.rests_on.sort();
        step.rests_on.dedup();
        step
    };
    lacking.chunks(CLAIMS).map(part).collect()
}

/// Lets newcomers be numbered, or stops that.
pub(super) fn settle(mirror: &Mirror, settling: bool) -> Step<()> {
    let mut step = Step { rests_on: vec![], writes: Writes::new(), refresh: Refresh::Keys, outcome: () };
    if let Some(identity) = mirror.identity.as_ref().filter(|identity| identity.settling != settling) {
        step.writes.insert(Entry::Identity.path(), Some(json(&Identity { settling, ..identity.clone() })));
    }
    step
}

fn revision(revision: u64) -> Vec<u8> {
    revision.to_string().into_bytes()
}

/// Writes in one transaction; etcd takes 128 unless it is told otherwise (`--max-txn-ops`).
const WRITES: usize = 100;
/// Claims in one transaction: at most four keys each.
const CLAIMS: usize = 30;
/// etcd takes requests of 1.5 MiB unless it is told otherwise (`--max-request-bytes`).
pub(super) const LARGEST_CHANGE: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    /// What etcd holds: paths, values and revisions.
    fn mirror(keys: &[(&str, &str, i64)]) -> Mirror {
        let mut mirror = Mirror::default();
        for (path, value, modified) in keys {
            mirror.put(path, value.as_bytes(), *modified);
        }
        mirror
    }

    const STORE: (&str, &str, i64) =
        ("store", r#"{"format":1,"fleet":"00","region":"north","id":"1","settling":false}"#, 1);

    fn asks(name: &str, held: Option<u16>) -> Claim {
        Claim { held, ..Claim::of_relay(name, None) }
    }

    #[test]
    fn a_name_numbered_elsewhere_a_moment_ago_gets_no_second_number() {
        // The name's key was read again after a conflict; that of its number was not.
        let behind = mirror(&[STORE, ("names/relays/r", "24", 7)]);
        let step = claim(&behind, &asks("r", Some(25))).unwrap();
        assert!(step.rests_on.contains(&"numbers/relays/00024".to_owned()), "{step:?}");
        let mut known = behind;
        known.put("numbers/relays/00024", br#"{"name":"r","incarnation":0}"#, 7);
        let step = claim(&known, &asks("r", Some(25))).unwrap();
        assert_eq!((step.outcome, step.writes.len()), (24, 0));
    }

    #[test]
    fn who_really_holds_a_number_takes_it_from_an_unconfirmed_claim() {
        let stale = mirror(&[
            STORE,
            ("names/relays/old", "5", 2),
            ("numbers/relays/00005", r#"{"name":"old","incarnation":0,"unconfirmed":true}"#, 2),
        ]);
        let step = claim(&stale, &asks("new", Some(5))).unwrap();
        assert_eq!(step.outcome, 5);
        assert_eq!(step.writes["names/relays/old"], None);
        assert_eq!(step.writes["names/relays/new"].as_deref(), Some(b"5".as_slice()));
        assert!(step.rests_on.contains(&"names/relays/old".to_owned()));
    }

    #[test]
    fn a_store_that_went_back_yields_and_one_made_anew_does_not() {
        let there = mirror(&[
            STORE,
            ("names/relays/a", "1", 2),
            ("numbers/relays/00001", r#"{"name":"a","incarnation":0}"#, 2),
        ]);
        let mut ours = Claims::default();
        ours.of_mut(Kind::Relay).put(1, asks("b", None).holder());
        ours.of_mut(Kind::Relay).put(2, asks("a", None).holder());
        ours.of_mut(Kind::Relay).put(3, asks("c", None).holder());
        let writes = |win| {
            let steps = missing(&there, &ours, win);
            steps.into_iter().flat_map(|step| step.writes).collect::<Writes>()
        };
        let went_back = writes(true);
        assert_eq!(went_back["names/relays/a"].as_deref(), Some(b"2".as_slice()));
        assert_eq!(went_back["names/relays/b"].as_deref(), Some(b"1".as_slice()));
        assert_eq!(went_back.len(), 6);
        let anew: Vec<_> = writes(false).into_keys().collect();
        assert_eq!(anew, ["names/relays/c", "numbers/relays/00003"]);
    }

    #[test]
    fn a_large_change_is_in_force_at_once_and_spread_in_parts() {
        let agent = |i: usize| v1::AgentRecord {
            behaviour: Some(v1::AgentBehaviour {
                agent: format!("shop/a-{i}"),
                engine: "echo".into(),
                ..v1::AgentBehaviour::default()
            }),
            ..v1::AgentRecord::default()
        };
        let large = v1::ApplyRequest { agents: (0..250).map(agent).collect(), ..v1::ApplyRequest::default() };
        let mut mirror = mirror(&[STORE]);
        let step = change(&mirror, &large, 9).unwrap();
        assert_eq!((step.outcome, step.writes.len()), (Change::Pending, 2));
        let mut at = 10;
        let mut done = |mirror: &mut Mirror, writes: &Writes| {
            at += 1;
            for (path, value) in writes {
                match value {
                    Some(value) => mirror.put(path, value, at),
                    None => mirror.delete(path, at),
                }
            }
        };
        done(&mut mirror, &step.writes);
        assert_eq!((mirror.records().agents.len(), mirror.records().revision, mirror.base.agents.len()), (250, 10, 0));
        assert_eq!(change(&mirror, &large, 9).unwrap().outcome, Change::Blocked);
        let mut parts = 0;
        loop {
            let step = spread(&mirror);
            done(&mut mirror, &step.writes);
            assert_eq!(mirror.records().agents.len(), 250);
            parts += 1;
            if step.outcome {
                break;
            }
        }
        assert_eq!((parts, mirror.base.agents.len(), mirror.change.is_none()), (3, 250, true));
    }
}
