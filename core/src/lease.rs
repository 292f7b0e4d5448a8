//! Leases: a session exists because its worker granted one (invariant I4).
//!
//! The table is a pure machine owned by the worker. It never holds more sessions than it has slots, whatever is asked
//! at once; it grants the same lease again to the same (session, epoch); an unused lease expires. A session takes one
//! slot however many of its epochs are known here.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::{
    clock::Millis,
    id::{Epoch, SessionId},
};

/// Names one grant; never reused by the process that gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub u64);

/// What a router asks for.
#[derive(Clone, Debug)]
pub struct LeaseRequest {
    /// Which session.
    pub session: SessionId,
    /// The epoch that its client will activate.
    pub epoch: Epoch,
    /// How long the lease may stay unused; bounded by [`LeaseTable::LONGEST_TTL`].
    pub ttl: Duration,
}

/// A granted lease with what the worker attached to it (connection IDs, the client's key, …).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease<T> {
    /// Its name.
    pub id: LeaseId,
    /// The epoch it is for.
    pub epoch: Epoch,
    /// When it ends unless activated before.
    pub expires: Millis,
    /// The worker's own attachment.
    pub attachment: T,
}

/// Why a lease was not granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReserveRefusal {
    /// All slots are taken.
    #[error("all {slots} slots are taken")]
    Full {
        /// How many there are.
        slots: u32,
    },
    /// The worker takes nothing new.
    #[error("draining")]
    Draining,
    /// A newer epoch of the session is known here.
    #[error("epoch {asked} is older than {newest}")]
    StaleEpoch {
        /// The epoch asked for.
        asked: Epoch,
        /// The newest one known.
        newest: Epoch,
    },
}

impl ReserveRefusal {
    /// Closed set of labels for the wire and for metrics.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Full { .. } => "full",
            Self::Draining => "draining",
            Self::StaleEpoch { .. } => "stale_epoch",
        }
    }
}

/// Why a lease cannot be activated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ActivateError {
    /// Expired, released, used up or never granted.
    #[error("no lease for this session and epoch: it expired, was released or was never granted")]
    Gone,
    /// A newer epoch is active.
    #[error("epoch {asked} is older than the active {active}")]
    Stale {
        /// The epoch asked for.
        asked: Epoch,
        /// The active one.
        active: Epoch,
    },
}

/// What an activation changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Activation<T> {
    /// The lease that is in use now.
    pub lease: Lease<T>,
    /// The owner of an older epoch on this worker, which has to stop.
    pub superseded: Option<Lease<T>>,
}

#[derive(Clone, Debug)]
struct Entry<T> {
    reserved: Option<Lease<T>>,
    active: Option<Lease<T>>,
}

/// The worker's leases.
#[derive(Clone, Debug)]
pub struct LeaseTable<T> {
    slots: u32,
    accepting: bool,
    next_id: u64,
    sessions: BTreeMap<SessionId, Entry<T>>,
    expiries: BTreeSet<(Millis, SessionId)>,
    active: u32,
    /// Ended by time or replaced, and not yet told to the owner; at most one per reservation between two polls.
    expired: Vec<(SessionId, Lease<T>)>,
}

impl<T: Clone> LeaseTable<T> {
    /// The longest time that a lease may stay unused.
    pub const LONGEST_TTL: Duration = Duration::from_secs(120);

    /// A table with this many slots.
    #[must_use]
    pub const fn new(slots: u32) -> Self {
        Self {
            slots,
            accepting: true,
            next_id: 1,
            sessions: BTreeMap::new(),
            expiries: BTreeSet::new(),
            active: 0,
            expired: Vec::new(),
        }
    }

    /// Grants a lease; `attach` makes the attachment and is called for a new grant only.
    ///
    /// # Errors
    /// [`ReserveRefusal`]; nothing changes then.
    pub fn reserve(
        &mut self,
        now: Millis,
        request: &LeaseRequest,
        attach: impl FnOnce(LeaseId, Millis) -> T,
    ) -> Result<Lease<T>, ReserveRefusal> {
        self.expire(now);
        if let Some(entry) = self.sessions.get(&request.session) {
            let known = entry.reserved.iter().chain(&entry.active);
            if let Some(same) = known.clone().find(|lease| lease.epoch == request.epoch) {
                return Ok(same.clone());
            }
            if let Some(newest) = known.map(|lease| lease.epoch).max().filter(|e| *e > request.epoch) {
                return Err(ReserveRefusal::StaleEpoch { asked: request.epoch, newest });
            }
        }
        if !self.accepting {
            return Err(ReserveRefusal::Draining);
        }
        if !self.sessions.contains_key(&request.session) && self.taken() >= self.slots {
            return Err(ReserveRefusal::Full { slots: self.slots });
        }
        let id = LeaseId(self.next_id);
        self.next_id += 1;
        let expires = now.after(request.ttl.min(Self::LONGEST_TTL));
        let lease = Lease { id, epoch: request.epoch, expires, attachment: attach(id, expires) };
        let entry = self.sessions.entry(request.session).or_insert(Entry { reserved: None, active: None });
        if let Some(older) = entry.reserved.replace(lease.clone()) {
            self.expiries.remove(&(older.expires, request.session));
            // Its owner has to forget what it attached.
            self.expired.push((request.session, older));
        }
        self.expiries.insert((expires, request.session));
        Ok(lease)
    }

    /// The session's client has proved itself: its epoch owns the session from now on.
    ///
    /// Activating the active epoch again (the client's connection was lost and it came back) succeeds.
    ///
    /// # Errors
    /// [`ActivateError`]; nothing changes then.
    pub fn activate(&mut self, now: Millis, session: SessionId, epoch: Epoch) -> Result<Activation<T>, ActivateError> {
        self.expire(now);
        let entry = self.sessions.get_mut(&session).ok_or(ActivateError::Gone)?;
        if let Some(active) = &entry.active {
            if active.epoch == epoch {
                return Ok(Activation { lease: active.clone(), superseded: None });
            }
            if active.epoch > epoch {
                return Err(ActivateError::Stale { asked: epoch, active: active.epoch });
            }
        }
        let lease = entry.reserved.take_if(|lease| lease.epoch == epoch).ok_or(ActivateError::Gone)?;
        self.expiries.remove(&(lease.expires, session));
        let superseded = entry.active.replace(lease.clone());
        if superseded.is_none() {
            self.active += 1;
        }
        Ok(Activation { lease, superseded })
    }

    /// Ends a session (`epoch` none) or what one epoch of it holds. Returns the leases that ended, active ones last.
    pub fn release(&mut self, session: SessionId, epoch: Option<Epoch>) -> Vec<Lease<T>> {
        let Some(entry) = self.sessions.get_mut(&session) else {
            return Vec::new();
        };
        let matches = |lease: &mut Lease<T>| epoch.is_none_or(|e| e == lease.epoch);
        let mut ended = Vec::new();
        if let Some(lease) = entry.reserved.take_if(matches) {
            self.expiries.remove(&(lease.expires, session));
            ended.push(lease);
        }
        if let Some(lease) = entry.active.take_if(matches) {
            self.active -= 1;
            ended.push(lease);
        }
        if entry.reserved.is_none() && entry.active.is_none() {
            self.sessions.remove(&session);
        }
        ended
    }

    /// Ends exactly this lease, whatever else the session holds. Says whether it was there.
    pub fn end(&mut self, session: SessionId, id: LeaseId) -> bool {
        let Some(entry) = self.sessions.get_mut(&session) else { return false };
        let reserved = entry.reserved.take_if(|lease| lease.id == id);
        if let Some(lease) = &reserved {
            self.expiries.remove(&(lease.expires, session));
        }
        let active = entry.active.take_if(|lease| lease.id == id);
        self.active -= u32::from(active.is_some());
        if entry.reserved.is_none() && entry.active.is_none() {
            self.sessions.remove(&session);
        }
        reserved.is_some() || active.is_some()
    }

    /// Every lease that a session holds, reserved before active.
    pub fn of(&self, session: SessionId) -> impl Iterator<Item = &Lease<T>> {
        self.sessions.get(&session).into_iter().flat_map(|entry| entry.reserved.iter().chain(&entry.active))
    }

    /// Ends unused leases whose time is over; returns all that ended by time, or were replaced by a newer epoch's, since
    /// the last call.
    pub fn poll_expired(&mut self, now: Millis) -> Vec<(SessionId, Lease<T>)> {
        self.expire(now);
        std::mem::take(&mut self.expired)
    }

    fn expire(&mut self, now: Millis) {
        while let Some(&(at, session)) = self.expiries.first().filter(|(at, _)| *at <= now) {
            self.expiries.remove(&(at, session));
            let Some(entry) = self.sessions.get_mut(&session) else {
                continue;
            };
            if let Some(lease) = entry.reserved.take() {
                self.expired.push((session, lease));
            }
            if entry.active.is_none() {
                self.sessions.remove(&session);
            }
        }
    }

    /// When [`Self::poll_expired`] has something to do next.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Millis> {
        self.expiries.first().map(|(at, _)| *at)
    }

    /// Takes new sessions, or only keeps what is here.
    pub const fn accept(&mut self, accepting: bool) {
        self.accepting = accepting;
    }

    /// The active lease of a session.
    #[must_use]
    pub fn active_lease(&self, session: SessionId) -> Option<&Lease<T>> {
        self.sessions.get(&session)?.active.as_ref()
    }

    /// Every lease, reserved before active, sessions in order.
    pub fn iter(&self) -> impl Iterator<Item = (SessionId, &Lease<T>, bool)> {
        self.sessions.iter().flat_map(|(session, entry)| {
            let reserved = entry.reserved.iter().map(|lease| (*session, lease, false));
            reserved.chain(entry.active.iter().map(|lease| (*session, lease, true)))
        })
    }

    /// Sessions that hold a slot.
    #[must_use]
    pub fn taken(&self) -> u32 {
        u32::try_from(self.sessions.len()).unwrap_or(u32::MAX)
    }

    /// Sessions with an active owner.
    #[must_use]
    pub const fn active(&self) -> u32 {
        self.active
    }

    /// Sessions that could still be granted.
    #[must_use]
    pub fn free(&self) -> u32 {
        if self.accepting { self.slots.saturating_sub(self.taken()) } else { 0 }
    }

    /// All slots.
    #[must_use]
    pub const fn slots(&self) -> u32 {
        self.slots
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn session(n: u8) -> SessionId {
        SessionId::from_bytes([n; 16])
    }

    fn request(n: u8, epoch: u32) -> LeaseRequest {
        LeaseRequest { session: session(n), epoch: Epoch::new(epoch).unwrap(), ttl: Duration::from_millis(10) }
    }

    fn epoch(n: u32) -> Epoch {
        Epoch::new(n).unwrap()
    }

    #[test]
    fn the_same_request_gets_the_same_lease() {
        let mut table = LeaseTable::new(1);
        let first = table.reserve(Millis(0), &request(1, 1), |_, _| 7).unwrap();
        let again = table.reserve(Millis(5), &request(1, 1), |_, _| 8).unwrap();
        assert_eq!(first, again);
        assert_eq!(table.reserve(Millis(5), &request(2, 1), |_, _| 9), Err(ReserveRefusal::Full { slots: 1 }));
        table.activate(Millis(6), session(1), epoch(1)).unwrap();
        assert_eq!(table.reserve(Millis(99), &request(1, 1), |_, _| 8).unwrap(), first);
    }

    #[test]
    fn an_unused_lease_expires_and_an_active_one_does_not() {
        let mut table = LeaseTable::new(2);
        table.reserve(Millis(0), &request(1, 1), |_, _| ()).unwrap();
        table.reserve(Millis(0), &request(2, 1), |_, _| ()).unwrap();
        table.activate(Millis(3), session(2), epoch(1)).unwrap();
        assert_eq!(table.next_timeout(), Some(Millis(10)));
        assert_eq!(table.poll_expired(Millis(10)).len(), 1);
        assert_eq!(table.activate(Millis(11), session(1), epoch(1)), Err(ActivateError::Gone));
        assert_eq!((table.taken(), table.active(), table.free()), (1, 1, 1));
    }

    #[test]
    fn a_newer_epoch_takes_over_within_the_same_slot() {
        let mut table = LeaseTable::new(1);
        table.reserve(Millis(0), &request(1, 1), |_, _| 'a').unwrap();
        table.activate(Millis(0), session(1), epoch(1)).unwrap();
        table.reserve(Millis(1), &request(1, 2), |_, _| 'b').unwrap();
        let refused = table.reserve(Millis(1), &request(1, 0), |_, _| 'c');
        assert_eq!(refused, Err(ReserveRefusal::StaleEpoch { asked: epoch(0), newest: epoch(2) }));
        let activation = table.activate(Millis(2), session(1), epoch(2)).unwrap();
        assert_eq!(activation.superseded.map(|l| l.attachment), Some('a'));
        let stale = table.activate(Millis(2), session(1), epoch(1));
        assert_eq!(stale, Err(ActivateError::Stale { asked: epoch(1), active: epoch(2) }));
        assert_eq!((table.taken(), table.active()), (1, 1));
    }

    #[test]
    fn a_replaced_reservation_is_told_and_a_successor_is_not_ended_by_its_name() {
        let mut table = LeaseTable::new(1);
        let first = table.reserve(Millis(0), &request(1, 1), |_, _| 'a').unwrap();
        let second = table.reserve(Millis(0), &request(1, 2), |_, _| 'b').unwrap();
        assert_eq!(table.poll_expired(Millis(0)), [(session(1), first.clone())]);
        assert!(!table.end(session(1), first.id));
        assert_eq!(table.of(session(1)).count(), 1);
        assert!(table.end(session(1), second.id));
        assert_eq!(table.taken(), 0);
    }

    #[test]
    fn draining_keeps_what_is_there() {
        let mut table = LeaseTable::new(4);
        table.reserve(Millis(0), &request(1, 1), |_, _| ()).unwrap();
        table.accept(false);
        assert_eq!(table.reserve(Millis(0), &request(2, 1), |_, _| ()), Err(ReserveRefusal::Draining));
        assert!(table.activate(Millis(1), session(1), epoch(1)).is_ok());
        assert_eq!(table.free(), 0);
    }

    proptest! {
        /// Whatever is asked in whatever order, slots are never oversold and the counters match the contents.
        #[test]
        fn never_more_sessions_than_slots(
            slots in 0_u32..6,
            ops in proptest::collection::vec((0_u8..4, 0_u8..8, 0_u32..4, 0_u64..8), 0..200),
        ) {
            let mut table = LeaseTable::new(slots);
            let mut now = 0;
            for (op, n, e, dt) in ops {
                now += dt;
                match op {
                    0 => { let _ = table.reserve(Millis(now), &request(n, e), |id, _| id); }
                    1 => { let _ = table.activate(Millis(now), session(n), epoch(e)); }
                    2 => { table.release(session(n), (e > 0).then(|| epoch(e))); }
                    _ => { table.poll_expired(Millis(now)); }
                }
                prop_assert!(table.taken() <= slots);
                prop_assert_eq!(table.iter().filter(|(_, _, active)| *active).count() as u32, table.active());
                let mut ids: Vec<_> = table.iter().map(|(_, lease, _)| lease.id).collect();
                ids.sort();
                ids.dedup();
                prop_assert_eq!(ids.len(), table.iter().count());
            }
        }
    }
}
