//! Key generations: how a fleet moves to new keys during live calls without losing a frame.
//!
//! Connection-ID keys, tunnel secrets, ticket keys and reset keys come in generations 1, 2, … Each region is told
//! which one to move to, in any order. From then on
//!
//! 1. the region *loads* it: its relays and workers can decode and verify with it, nothing is made with it yet;
//! 2. once every relay and worker of every region has loaded it, the region *mints* with it;
//! 3. once every region mints with it and nobody uses an older one any more, the older ones are *unloaded*.
//!
//! Each step needs only what regions say of themselves, and everything that they say holds for good: what is minted
//! with and what is in use never goes down. So an old word is a safe one, and lost or late words only delay. A region
//! that is silent delays as well; [`Plan::held_up_by`] says who does.
//!
//! At most [`WINDOW`] generations are loaded at a time; [`wanted`] and [`too_early`] keep the fleet from needing more.

use std::fmt;

/// Generations that are loaded at a time at most. A connection ID can tell seven apart.
pub const WINDOW: u32 = 3;

/// Why a region cannot be told to move to a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WantedError {
    /// Backwards: what is minted with the present one would be lost.
    #[error("{asked} is below the present generation, {present}: generations only go up")]
    Backwards {
        /// The one that is wanted now.
        present: u32,
        /// The one asked for.
        asked: u32,
    },
    /// More than one step: nobody would have loaded the one in between.
    #[error("{asked} is more than one above the present generation, {present}")]
    Jump {
        /// The one that is wanted now.
        present: u32,
        /// The one asked for.
        asked: u32,
    },
}

/// The wanted generation after somebody asked for one; 0 asks for nothing. A present one of 0 means the first.
///
/// # Errors
/// [`WantedError`]: it can stay or go up by one.
pub const fn wanted(present: u32, asked: u32) -> Result<u32, WantedError> {
    let first = if present == 0 { 1 } else { present };
    if asked == 0 {
        Ok(present)
    } else if asked < first {
        Err(WantedError::Backwards { present: first, asked })
    } else if asked > first.saturating_add(1) {
        Err(WantedError::Jump { present: first, asked })
    } else {
        Ok(asked)
    }
}

/// What a region mints with as long as it does not know what it minted with before: as old as the rest of the fleet
/// may be, so that it is loaded there if the fleet is about to move.
#[must_use]
pub const fn presumed_minting(wanted: u32) -> u32 {
    if wanted <= 2 { 1 } else { wanted - 1 }
}

/// A relay or worker of the own region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member<'a> {
    /// For people.
    pub name: &'a str,
    /// What it can decode and verify with; empty: it has not said yet.
    pub loaded: &'a [u32],
    /// The oldest generation that something there uses; 0: nothing is in use; `None`: it may be any.
    pub oldest: Option<u32>,
    /// Whether it ever spoke to this router. One that only holds a number may be alive and connected elsewhere.
    pub registered: bool,
}

impl<'a> Member<'a> {
    /// One that holds a number of the region and never spoke to this router: nothing is known of its keys.
    #[must_use]
    pub const fn unregistered(name: &'a str) -> Self {
        Self { name, loaded: &[], oldest: None, registered: false }
    }
}

/// What a region says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegionKeys {
    /// The generation that it was told to move to.
    pub wanted: u32,
    /// The one that it uses for what is new; 0: unknown.
    pub minting: u32,
    /// What all its relays and workers have loaded; empty: it does not know (its router may have just started).
    pub loaded: Vec<u32>,
    /// The oldest one in use; 0: none is.
    pub oldest: u32,
}

impl RegionKeys {
    /// Takes a newer word of the same region. What it does not know now, its last word still holds for.
    pub fn heard(&mut self, newer: Self) {
        let oldest = match (newer.loaded.is_empty(), self.oldest) {
            (true, 0) => self.minting,
            (true, oldest) => oldest,
            (false, _) => newer.oldest,
        };
        *self = Self { minting: newer.minting.max(self.minting), oldest, ..newer };
    }

    /// Nothing older than this is or will be used there; 0: unknown.
    const fn floor(&self) -> u32 {
        if self.oldest == 0 || self.oldest > self.minting { self.minting } else { self.oldest }
    }
}

/// Another region, or another router of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Other<'a> {
    /// For people.
    pub name: &'a str,
    /// Its last word.
    pub keys: RegionKeys,
    /// Whether it speaks.
    pub heard: bool,
}

/// All that a region's plan depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot<'a> {
    /// The generation that the region was told to move to, at least 1.
    pub wanted: u32,
    /// The one that it uses for what is new, at least 1.
    pub minting: u32,
    /// Oldest one that may be under way: in tickets that have not expired, or at workers that have not heard yet what
    /// to mint with. At least `minting` if there is none.
    pub under_way: u32,
    /// Whether all relays and workers had time to register; until then there may be more than the members known.
    pub settled: bool,
    /// Its relays and workers.
    pub members: Vec<Member<'a>>,
    /// Everybody else in the fleet.
    pub others: Vec<Other<'a>>,
}

/// Who keeps a rotation from going on, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldUp {
    /// A member, a region, or empty for the region itself.
    pub who: String,
    /// Why.
    pub why: Why,
}

/// What somebody has yet to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Relays and workers may not have registered yet.
    Settling,
    /// It holds a number, and this router has never heard it.
    Unregistered,
    /// It is not heard.
    Silent,
    /// It was told to move to this one only.
    Wants(u32),
    /// It has not loaded this one.
    NotLoaded(u32),
    /// It mints with this one.
    Mints(u32),
    /// Something there uses this one.
    Uses(u32),
}

impl fmt::Display for HeldUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.who.is_empty() {
            write!(f, "{}: ", self.who)?;
        }
        match self.why {
            Why::Settling => f.write_str("relays and workers may not have registered yet"),
            Why::Unregistered => f.write_str("holds a number and has not registered with this router"),
            Why::Silent => f.write_str("is not heard"),
            Why::Wants(generation) => write!(f, "was told to move to generation {generation} only"),
            Why::NotLoaded(generation) => write!(f, "has not loaded generation {generation}"),
            Why::Mints(generation) => write!(f, "still mints with generation {generation}"),
            Why::Uses(generation) => write!(f, "still uses generation {generation}"),
        }
    }
}

/// What a region does with its keys now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Relays and workers are given this generation …
    pub oldest: u32,
    /// … to this one, at most [`WINDOW`] of them.
    pub newest: u32,
    /// What is new is minted, sealed and signed with this one.
    pub minting: u32,
    /// What the region says of itself.
    pub keys: RegionKeys,
    /// Why the rotation does not go on; empty: it is complete.
    pub held_up_by: Vec<HeldUp>,
}

/// Decides what a region's relays and workers load and what the region mints with. Pure: the same snapshot, the same
/// plan.
#[must_use]
pub fn plan(snapshot: &Snapshot<'_>) -> Plan {
    let floor = floor(snapshot);
    let others = snapshot.others.iter();
    let newest_in_use = others.map(|o| o.keys.minting).fold(snapshot.minting, u32::max);
    // A region that forgot everything and mints with what the fleet has given up does not take the window along.
    let oldest = floor.max(newest_in_use.saturating_sub(WINDOW - 1)).max(1);
    let newest = snapshot.wanted.min(oldest + (WINDOW - 1)).max(snapshot.minting);
    let loaded = loaded(snapshot, oldest, newest);
    let everywhere = |generation: &u32| {
        let there = |o: &Other<'_>| o.heard && o.keys.loaded.contains(generation);
        loaded.contains(generation) && snapshot.others.iter().all(there)
    };
    let minting = (snapshot.minting + 1..=newest).rev().find(everywhere).unwrap_or(snapshot.minting);
    let oldest_used = snapshot.members.iter().filter_map(|m| m.oldest).filter(|g| *g > 0);
    let keys = RegionKeys {
        wanted: snapshot.wanted,
        // What was begun a moment ago is not under way everywhere yet: said with the next plan.
        minting: snapshot.minting,
        oldest: oldest_used.fold(snapshot.under_way.min(snapshot.minting), u32::min),
        loaded,
    };
    let held_up_by = held_up_by(snapshot, minting, floor);
    Plan { oldest, newest, minting, keys, held_up_by }
}

/// Who may still use what would have to be unloaded for `asked`; empty: the region can be told to move there.
#[must_use]
pub fn too_early(snapshot: &Snapshot<'_>, asked: u32) -> Vec<HeldUp> {
    let needed = asked.saturating_sub(WINDOW - 1);
    if floor(snapshot) >= needed {
        return Vec::new();
    }
    users_below(snapshot, needed)
}

/// Nobody uses or will use anything older than this.
fn floor(snapshot: &Snapshot<'_>) -> u32 {
    let unknown = snapshot.wanted.saturating_sub(WINDOW - 1).max(1);
    let members = snapshot.members.iter().map(|m| match m.oldest {
        Some(0) => u32::MAX,
        Some(oldest) => oldest,
        None => unknown,
    });
    let others = snapshot.others.iter().map(|o| match o.keys.floor() {
        0 => unknown,
        floor => floor,
    });
    let own = snapshot.minting.min(snapshot.under_way).min(if snapshot.settled { u32::MAX } else { unknown });
    members.chain(others).fold(own, u32::min)
}

/// What all members have loaded; nothing while it is not known who they are.
fn loaded(snapshot: &Snapshot<'_>, oldest: u32, newest: u32) -> Vec<u32> {
    let everybody = |generation: &u32| snapshot.members.iter().all(|m| m.loaded.contains(generation));
    (oldest..=newest).filter(|g| snapshot.settled && everybody(g)).collect()
}

fn held_up_by(snapshot: &Snapshot<'_>, minting: u32, floor: u32) -> Vec<HeldUp> {
    let wanted = snapshot.wanted;
    if minting >= wanted {
        return if floor >= wanted { Vec::new() } else { users_below(snapshot, wanted) };
    }
    let held = |who: &str, why| HeldUp { who: who.to_owned(), why };
    let mut by = Vec::new();
    if !snapshot.settled {
        by.push(held("", Why::Settling));
    }
    let behind = snapshot.members.iter().filter(|m| !m.loaded.contains(&wanted));
    by.extend(behind.map(|m| {
        let why = if m.registered { Why::NotLoaded(wanted) } else { Why::Unregistered };
        held(m.name, why)
    }));
    by.extend(snapshot.others.iter().filter_map(|other| {
        let why = if !other.heard {
            Why::Silent
        } else if other.keys.wanted < wanted {
            Why::Wants(other.keys.wanted)
        } else if !other.keys.loaded.contains(&wanted) {
            Why::NotLoaded(wanted)
        } else {
            return None;
        };
        Some(held(other.name, why))
    }));
    by
}

fn users_below(snapshot: &Snapshot<'_>, generation: u32) -> Vec<HeldUp> {
    let held = |who: &str, why| HeldUp { who: who.to_owned(), why };
    let mut by = Vec::new();
    if !snapshot.settled {
        by.push(held("", Why::Settling));
    }
    if snapshot.minting < generation {
        by.push(held("", Why::Mints(snapshot.minting)));
    } else if snapshot.under_way < generation {
        by.push(held("", Why::Uses(snapshot.under_way)));
    }
    by.extend(snapshot.members.iter().filter_map(|m| match m.oldest {
        None if !m.registered => Some(held(m.name, Why::Unregistered)),
        None => Some(held(m.name, Why::Silent)),
        Some(oldest) => (1..generation).contains(&oldest).then(|| held(m.name, Why::Uses(oldest))),
    }));
    by.extend(snapshot.others.iter().filter_map(|o| {
        let why = match (o.keys.minting, o.keys.floor()) {
            (0, _) => Why::Silent,
            (minting, _) if minting < generation => Why::Mints(minting),
            (_, floor) if floor < generation => Why::Uses(floor),
            _ => return None,
        };
        Some(held(o.name, why))
    }));
    by
}

#[cfg(test)]
mod tests;
