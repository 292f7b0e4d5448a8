//! Round trips that callers have really had, for placing their neighbours.
//!
//! Where a caller says he is, he is in a cell of a grid. Workers measure the round trips of their calls by cell, and
//! regions tell each other. Distance on the globe stays what is gone by where nobody has called yet, but with what the
//! access networks of the cell add to every measured way: otherwise the regions that nobody has tried would always look
//! better than those that are known.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use antiphon_core::{
    clock::Millis,
    geo::{CELL_DEGREES, Location, estimated_rtt},
    id::RegionNumber,
};
use antiphon_proto::v1;

use super::State;
use crate::records::{Records, Region};

/// All regions' measurements, gathered every [`GATHERED`].
#[derive(Debug, Default)]
pub(super) struct Measured {
    of: HashMap<u32, Vec<(RegionNumber, u32)>>,
    at: Option<Millis>,
}

/// The cell of a place as a number, never 0.
pub(crate) fn neighbourhood(location: Location) -> u32 {
    // 0..=90 and 0..=180.
    let index = |degrees: f64, range: f64| ((degrees + range) / CELL_DEGREES).floor().clamp(0.0, 180.0) as u32;
    1 + index(location.latitude(), 90.0) * 181 + index(location.longitude(), 180.0)
}

/// What a worker or a region says, as far as it makes sense.
pub(super) fn taken(said: &[v1::MeasuredRtt], most: usize) -> Vec<v1::MeasuredRtt> {
    let sound = |m: &&v1::MeasuredRtt| m.neighbourhood > 0 && (1..=LONGEST_MS).contains(&m.rtt_ms);
    said.iter().filter(sound).take(most).copied().collect()
}

impl State {
    /// What the region's workers have measured: the best of each neighbourhood, in steps that do not change all the
    /// time.
    pub(super) fn own_measured(&self) -> Vec<v1::MeasuredRtt> {
        let mut best: BTreeMap<u32, u32> = BTreeMap::new();
        let reports = self.workers.values().filter_map(|worker| worker.report.as_ref());
        for measured in reports.flat_map(|report| &report.measured) {
            let rtt = best.entry(measured.neighbourhood).or_insert(u32::MAX);
            *rtt = measured.rtt_ms.min(*rtt);
        }
        let step = |ms: u32| ms.div_ceil(STEP_MS) * STEP_MS;
        let told = best.into_iter().take(MOST_OF_REGION);
        told.map(|(neighbourhood, rtt_ms)| v1::MeasuredRtt { neighbourhood, rtt_ms: step(rtt_ms) }).collect()
    }

    /// Round trips from a place to every region; empty if nothing is known of its neighbourhood.
    pub(super) fn measured_from(&mut self, place: Location, own: &str, now: Millis) -> Vec<(RegionNumber, Duration)> {
        if self.measured.at.is_none_or(|at| now.since(at) >= GATHERED) {
            self.gather(own, now);
        }
        let known = self.measured.of.get(&neighbourhood(place));
        known.map(|known| extend(known, &self.records, place)).unwrap_or_default()
    }

    fn gather(&mut self, own: &str, now: Millis) {
        let mut of: HashMap<u32, Vec<(RegionNumber, u32)>> = HashMap::new();
        for region in self.records.regions.values() {
            let said = if region.name == own {
                self.own_measured()
            } else {
                let digest = self.peers.get(&region.name).and_then(|peer| peer.digest(now));
                digest.map(|digest| taken(&digest.measured, MOST_OF_REGION)).unwrap_or_default()
            };
            for measured in said {
                of.entry(measured.neighbourhood).or_default().push((region.number, measured.rtt_ms));
            }
        }
        self.measured = Measured { of, at: Some(now) };
    }
}

/// Adds estimates for the regions that nobody of the neighbourhood has called.
fn extend(known: &[(RegionNumber, u32)], records: &Records, place: Location) -> Vec<(RegionNumber, Duration)> {
    let here = place.unit_vector();
    let estimate = |region: &Region| Some(estimated_rtt(here.distance_km(region.location?.unit_vector())));
    let measured = |region: &Region| {
        let of_region = known.iter().find(|(number, _)| *number == region.number);
        of_region.map(|(_, ms)| Duration::from_millis((*ms).into()))
    };
    let regions = || records.regions.values();
    let excess = |region: &Region| Some(measured(region)?.saturating_sub(estimate(region)?));
    let access = regions().filter_map(excess).min().unwrap_or_default();
    let rtt = |region: &Region| Some((region.number, measured(region).or_else(|| Some(estimate(region)? + access))?));
    regions().filter_map(rtt).collect()
}

/// How old what is gathered may be.
const GATHERED: Duration = Duration::from_secs(2);
/// Neighbourhoods in one report.
pub(super) const MOST_OF_WORKER: usize = 64;
/// Neighbourhoods in one digest: 4 kB.
const MOST_OF_REGION: usize = 512;
const STEP_MS: u32 = 5;
const LONGEST_MS: u32 = 60_000;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn at(latitude: f64, longitude: f64) -> Location {
        Location::new(latitude, longitude).unwrap()
    }

    #[test]
    fn every_cell_has_a_number_of_its_own() {
        let mut seen = BTreeSet::new();
        for latitude in -45..45 {
            for longitude in -90..90 {
                let place = at(f64::from(latitude) * 2.0 + 1.0, f64::from(longitude) * 2.0 + 1.0);
                assert!(seen.insert(neighbourhood(place)), "{place}");
            }
        }
        assert!(!seen.contains(&0));
        assert_eq!(neighbourhood(at(50.11, 8.68)), neighbourhood(at(51.9, 8.1)));
        assert_ne!(neighbourhood(at(50.11, 8.68)), neighbourhood(at(50.11, 10.1)));
        for corner in [at(90.0, 180.0), at(-90.0, -180.0)] {
            assert!((1..=1 + 90 * 181 + 180).contains(&neighbourhood(corner)));
        }
    }

    #[test]
    fn nonsense_is_not_taken() {
        let said = |neighbourhood, rtt_ms| v1::MeasuredRtt { neighbourhood, rtt_ms };
        let all = [said(0, 5), said(1, 0), said(2, 60_001), said(3, 7), said(4, 8), said(5, 9)];
        assert_eq!(taken(&all, 2), [said(3, 7), said(4, 8)]);
    }

    #[test]
    fn what_the_access_network_adds_holds_for_regions_that_nobody_has_tried() {
        let record = |(name, number, latitude, longitude): (&str, u32, f64, f64)| v1::RegionRecord {
            name: name.into(),
            number,
            location: Some(v1::Location { latitude, longitude }),
            ..v1::RegionRecord::default()
        };
        let regions = [("frankfurt", 1, 50.11, 8.68), ("paris", 2, 48.86, 2.35), ("virginia", 3, 38.95, -77.45)];
        let change = v1::ApplyRequest { regions: regions.map(record).to_vec(), ..v1::ApplyRequest::default() };
        let records = Records::default().apply(&change).unwrap();
        let number = |n| RegionNumber::new(n).unwrap();
        // A mobile caller in Frankfurt: 60 ms where 10 were estimated.
        let of = |known: &[(RegionNumber, u32)]| -> Vec<u128> {
            extend(known, &records, at(50.1, 8.7)).iter().map(|(_, rtt)| rtt.as_millis()).collect()
        };
        let [frankfurt, paris, virginia] = of(&[(number(1), 60)])[..] else { panic!("three") };
        assert_eq!(frankfurt, 60);
        assert!((66..70).contains(&paris) && virginia > 140, "{paris} {virginia}");
        // A second measurement says that it is not the access network.
        let [frankfurt, paris, _] = of(&[(number(1), 60), (number(2), 20)])[..] else { panic!("three") };
        assert_eq!((frankfurt, paris), (60, 20));
        // Better than light would allow by the globe: nothing is added.
        assert_eq!(of(&[(number(3), 5)])[0], 10);
    }
}
