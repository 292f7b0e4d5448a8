//! Who holds which number, and who gets which: the rules, without a store.

use std::collections::BTreeMap;

use antiphon_core::id::{Incarnation, RelayNumber, WorkerNumber};
use siphasher::sip::SipHasher24;

use super::{StoreError, WorkerClaim};

/// What is numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Workers, 0..=65535.
    Worker,
    /// Relays, 0..=63.
    Relay,
}

impl Kind {
    /// How many numbers there are.
    pub(super) fn numbers(self) -> u32 {
        match self {
            Self::Worker => 0x1_0000,
            Self::Relay => RelayNumber::PER_REGION.into(),
        }
    }
}

/// Who holds a number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Name of the worker or relay.
    pub name: String,
    /// The worker's agent; empty for a relay, and if an earlier release numbered it.
    pub agent: String,
    /// The worker's life; zero for a relay.
    pub incarnation: Incarnation,
    /// Copied from a snapshot into an empty store, and not claimed since: who really holds the number may take it.
    pub unconfirmed: bool,
}

/// Somebody asks for a number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    pub(super) kind: Kind,
    pub(super) name: String,
    pub(super) agent: String,
    pub(super) incarnation: Incarnation,
    pub(super) held: Option<u16>,
}

impl Claim {
    pub(super) fn of_relay(name: &str, held: Option<u8>) -> Self {
        let incarnation = Incarnation::new(0).expect("every u32 is an incarnation");
        Self { kind: Kind::Relay, name: name.to_owned(), agent: String::new(), incarnation, held: held.map(u16::from) }
    }

    /// The claimant as a holder.
    pub(super) fn holder(&self) -> Holder {
        let (name, agent) = (self.name.clone(), self.agent.clone());
        Holder { name, agent, incarnation: self.incarnation, unconfirmed: false }
    }
}

impl From<&WorkerClaim> for Claim {
    fn from(claim: &WorkerClaim) -> Self {
        Self {
            kind: Kind::Worker,
            name: claim.name.clone(),
            agent: claim.agent.clone(),
            incarnation: claim.incarnation,
            held: claim.held.map(WorkerNumber::value),
        }
    }
}

/// Holders by number, and each name once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Table {
    holders: BTreeMap<u16, Holder>,
    names: BTreeMap<String, u16>,
}

/// All numbers of a region that are held.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claims {
    workers: Table,
    relays: Table,
}

impl Claims {
    /// Workers by number.
    pub fn workers(&self) -> impl ExactSizeIterator<Item = (u16, &Holder)> {
        self.workers.iter()
    }

    /// Relays by index in the region.
    pub fn relays(&self) -> impl ExactSizeIterator<Item = (u16, &Holder)> {
        self.relays.iter()
    }

    pub(super) fn of(&self, kind: Kind) -> &Table {
        match kind {
            Kind::Worker => &self.workers,
            Kind::Relay => &self.relays,
        }
    }

    pub(super) fn of_mut(&mut self, kind: Kind) -> &mut Table {
        match kind {
            Kind::Worker => &mut self.workers,
            Kind::Relay => &mut self.relays,
        }
    }

    pub(super) fn all(&self) -> impl Iterator<Item = (Kind, u16, &Holder)> {
        let workers = self.workers.iter().map(|(number, holder)| (Kind::Worker, number, holder));
        workers.chain(self.relays.iter().map(|(number, holder)| (Kind::Relay, number, holder)))
    }

    /// The same, none of it confirmed.
    pub(super) fn doubted(mut self) -> Self {
        for table in [&mut self.workers, &mut self.relays] {
            table.holders.values_mut().for_each(|holder| holder.unconfirmed = true);
        }
        self
    }

    /// The number that the claimant is to have. With `newcomers` unset only those get one who hold one.
    pub(super) fn choose(&self, claim: &Claim, newcomers: bool) -> Result<u16, StoreError> {
        let (table, count) = (self.of(claim.kind), claim.kind.numbers());
        let obtainable = |number: &u16| {
            let holder = table.holders.get(number);
            // Of whom only a snapshot knows it may be somebody else's, but not before that one had time to come back.
            u32::from(*number) < count && holder.is_none_or(|h| h.name == claim.name || h.unconfirmed && newcomers)
        };
        let held = claim.held.filter(obtainable);
        let owned = table.names.get(&claim.name).copied();
        // What only a snapshot says yields to what the claimant says of itself.
        let sure = owned.filter(|number| table.holders.get(number).is_some_and(|h| !h.unconfirmed));
        if let Some(number) = sure.or(held).or(owned) {
            return Ok(number);
        }
        if !newcomers {
            return Err(StoreError::Settling);
        }
        // Scattered by name: a newcomer seldom takes what someone held a while ago.
        let start = hash(&claim.name);
        let candidates = (0..u64::from(count)).map(|step| (start + step) % u64::from(count));
        let mut candidates = candidates.filter_map(|number| u16::try_from(number).ok());
        candidates.find(|number| !table.holders.contains_key(number)).ok_or(StoreError::Exhausted(count))
    }
}

impl Table {
    pub(super) fn holder(&self, number: u16) -> Option<&Holder> {
        self.holders.get(&number)
    }

    pub(super) fn number_of(&self, name: &str) -> Option<u16> {
        self.names.get(name).copied()
    }

    pub(super) fn iter(&self) -> impl ExactSizeIterator<Item = (u16, &Holder)> {
        self.holders.iter().map(|(number, holder)| (*number, holder))
    }

    /// Gives a number to somebody, who gives up the one held before; its former holder has none then.
    pub(super) fn put(&mut self, number: u16, holder: Holder) {
        if let Some(before) = self.names.insert(holder.name.clone(), number)
            && before != number
        {
            self.holders.remove(&before);
        }
        let name = holder.name.clone();
        if let Some(former) = self.holders.insert(number, holder)
            && former.name != name
        {
            self.names.remove(&former.name);
        }
    }

    pub(super) fn remove(&mut self, number: u16) {
        if let Some(holder) = self.holders.remove(&number) {
            self.names.remove(&holder.name);
        }
    }
}

fn hash(name: &str) -> u64 {
    // The key is public: this spreads, it protects nothing. 32 bits, so that adding a step never overflows.
    SipHasher24::new().hash(name.as_bytes()) >> 32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(name: &str, held: Option<u16>) -> Claim {
        let incarnation = Incarnation::new(1).unwrap();
        Claim { kind: Kind::Worker, name: name.into(), agent: "shop/desk".into(), incarnation, held }
    }

    fn taken(claims: &mut Claims, name: &str, number: u16, unconfirmed: bool) {
        let holder = Holder { unconfirmed, ..claim(name, None).holder() };
        claims.of_mut(Kind::Worker).put(number, holder);
    }

    #[test]
    fn a_snapshot_keeps_numbers_from_newcomers_and_yields_to_their_holders() {
        let mut claims = Claims::default();
        taken(&mut claims, "w-1", 5, true);
        // Its name has no other claim to the number than the snapshot.
        assert_eq!(claims.choose(&claim("w-1", None), false), Ok(5));
        assert_eq!(claims.choose(&claim("w-1", Some(8)), false), Ok(8));
        // Another name may have it when that one had time to come back: whoever is first must not take it from the living.
        assert_eq!(claims.choose(&claim("w-9", Some(5)), false), Err(StoreError::Settling));
        assert_eq!(claims.choose(&claim("w-9", Some(5)), true), Ok(5));
        for i in 0..2000 {
            assert_ne!(claims.choose(&claim(&format!("new-{i}"), None), true), Ok(5));
        }
        taken(&mut claims, "w-1", 5, false);
        assert_eq!(claims.choose(&claim("w-1", Some(8)), false), Ok(5));
        assert_eq!(claims.choose(&claim("w-9", Some(5)), false), Err(StoreError::Settling));
        assert_ne!(claims.choose(&claim("w-9", Some(5)), true), Ok(5));
    }

    #[test]
    fn a_name_has_one_number_and_a_number_one_name() {
        let mut claims = Claims::default();
        taken(&mut claims, "a", 1, false);
        taken(&mut claims, "b", 2, false);
        taken(&mut claims, "a", 2, false);
        let table = claims.of(Kind::Worker);
        assert_eq!((table.number_of("a"), table.number_of("b"), table.iter().len()), (Some(2), None, 1));
        claims.of_mut(Kind::Worker).remove(2);
        assert_eq!(claims, Claims::default());
    }

    #[test]
    fn numbers_out_of_range_are_nobodys() {
        let relay = Claim { kind: Kind::Relay, ..claim("r-1", Some(64)) };
        assert!(Claims::default().choose(&relay, true).unwrap() < 64);
        assert_eq!(Claims::default().choose(&relay, false), Err(StoreError::Settling));
    }
}
