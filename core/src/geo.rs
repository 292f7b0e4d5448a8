//! Where callers and regions are, and what a round trip between them should take.

use std::{f64::consts::PI, fmt, time::Duration};

/// Why a pair of numbers is no place on the earth.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum GeoError {
    /// Outside -90..=90, or not a number.
    #[error("latitude {0} is out of range -90..=90 degrees")]
    Latitude(f64),
    /// Outside -180..=180, or not a number.
    #[error("longitude {0} is out of range -180..=180 degrees")]
    Longitude(f64),
}

/// A point on the earth in degrees (WGS 84), always in range.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Location {
    latitude: f64,
    longitude: f64,
}

impl Location {
    /// Checks the ranges: latitude -90..=90 (north positive), longitude -180..=180 (east positive).
    ///
    /// # Errors
    /// [`GeoError`] names the number that is out of range.
    pub fn new(latitude: f64, longitude: f64) -> Result<Self, GeoError> {
        if !(-90.0..=90.0).contains(&latitude) {
            return Err(GeoError::Latitude(latitude));
        }
        if !(-180.0..=180.0).contains(&longitude) {
            return Err(GeoError::Longitude(longitude));
        }
        Ok(Self { latitude, longitude })
    }

    /// Degrees, north positive.
    #[must_use]
    pub const fn latitude(self) -> f64 {
        self.latitude
    }

    /// Degrees, east positive.
    #[must_use]
    pub const fn longitude(self) -> f64 {
        self.longitude
    }

    /// The point on the unit sphere; computed once per place, then distances are cheap.
    #[must_use]
    pub fn unit_vector(self) -> UnitVector {
        let (sin_lat, cos_lat) = self.latitude.to_radians().sin_cos();
        let (sin_lon, cos_lon) = self.longitude.to_radians().sin_cos();
        UnitVector([cos_lat * cos_lon, cos_lat * sin_lon, sin_lat])
    }

    /// The cell of a grid of [`CELL_DEGREES`] that holds the point: callers of one cell count as neighbours.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "both quotients are within -90..=90")]
    pub fn cell(self) -> Cell {
        let index = |degrees: f64| (degrees / CELL_DEGREES).floor() as i16;
        Cell(index(self.latitude), index(self.longitude))
    }
}

/// `50.11,8.68`: latitude, longitude.
impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2},{:.2}", self.latitude, self.longitude)
    }
}

/// A cell of the grid of [`Location::cell`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cell(i16, i16);

/// A point on the unit sphere.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UnitVector([f64; 3]);

impl UnitVector {
    /// Great-circle distance in kilometres, on a sphere of the earth's mean radius.
    ///
    /// The length of the chord gives the same value as the haversine formula and keeps its accuracy for near points,
    /// where the arc cosine of the scalar product would lose it.
    #[must_use]
    pub fn distance_km(self, other: Self) -> f64 {
        let square = |i: usize| (self.0[i] - other.0[i]) * (self.0[i] - other.0[i]);
        let half_chord = (square(0) + square(1) + square(2)).sqrt() / 2.0;
        2.0 * EARTH_RADIUS_KM * half_chord.min(1.0).asin()
    }
}

/// What a round trip over `distance_km` should take: light in fibre there and back, a route that is longer than the
/// great circle, and the access networks at both ends. A measured value is always better.
#[must_use]
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped; no number becomes 0")]
pub fn estimated_rtt(distance_km: f64) -> Duration {
    let fibre_ms = 2.0 * distance_km * ROUTE_FACTOR / FIBRE_KM_PER_MS;
    // Through an integer: a placement estimates one per region, and a `Duration` from a float costs as much as the
    // distance.
    ACCESS_RTT + Duration::from_nanos((fibre_ms.clamp(0.0, LONGEST_MS) * 1e6) as u64)
}

/// Mean radius of the earth (IUGG), kilometres.
pub const EARTH_RADIUS_KM: f64 = 6371.0088;
/// Light in fibre, one way: the vacuum's speed divided by a refractive index of about 1.5.
pub const FIBRE_KM_PER_MS: f64 = 200.0;
/// How much longer a long-distance route is than the great circle. With it Frankfurt to New York estimates to 97 ms and
/// Frankfurt to Singapore to 154 ms, within a tenth of what carriers publish.
pub const ROUTE_FACTOR: f64 = 1.4;
/// Last mile at the caller and the data centre's own network, together.
pub const ACCESS_RTT: Duration = Duration::from_millis(10);
/// Edge of a [`Cell`], degrees: about 220 km of latitude.
pub const CELL_DEGREES: f64 = 2.0;
/// Half the earth's circumference, there and back, is far below.
const LONGEST_MS: f64 = 2.0 * PI * EARTH_RADIUS_KM * ROUTE_FACTOR / FIBRE_KM_PER_MS;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn haversine_km(a: Location, b: Location) -> f64 {
        let (lat_a, lat_b) = (a.latitude.to_radians(), b.latitude.to_radians());
        let (d_lat, d_lon) = (lat_b - lat_a, (b.longitude - a.longitude).to_radians());
        let h = (d_lat / 2.0).sin().powi(2) + lat_a.cos() * lat_b.cos() * (d_lon / 2.0).sin().powi(2);
        2.0 * EARTH_RADIUS_KM * h.sqrt().min(1.0).asin()
    }

    fn at(latitude: f64, longitude: f64) -> Location {
        Location::new(latitude, longitude).unwrap()
    }

    #[test]
    fn known_distances_and_round_trips() {
        let frankfurt = at(50.11, 8.68);
        let table = [
            ("itself", frankfurt, 0.0, 10),
            ("Mainz", at(50.0, 8.27), 31.7, 10),
            ("New York", at(40.71, -74.01), 6205.0, 96),
            ("Singapore", at(1.35, 103.82), 10_266.0, 153),
            ("its antipode", at(-50.11, -171.32), 20_015.1, 290),
        ];
        for (name, place, km, rtt_ms) in table {
            let got = frankfurt.unit_vector().distance_km(place.unit_vector());
            assert!((got - km).abs() < 8.0, "{name}: {got} km");
            assert_eq!(estimated_rtt(got).as_millis(), rtt_ms, "{name}");
        }
    }

    #[test]
    fn impossible_places_are_refused() {
        assert_eq!(Location::new(90.5, 0.0).unwrap_err().to_string(), "latitude 90.5 is out of range -90..=90 degrees");
        assert!(Location::new(0.0, -180.1).is_err());
        assert!(Location::new(f64::NAN, 0.0).is_err());
        assert!(Location::new(0.0, f64::INFINITY).is_err());
    }

    #[test]
    fn an_impossible_distance_still_gives_a_duration() {
        assert_eq!(estimated_rtt(f64::NEG_INFINITY), ACCESS_RTT);
        assert_eq!(estimated_rtt(f64::NAN), ACCESS_RTT);
        assert!(estimated_rtt(f64::INFINITY) < Duration::from_secs(1));
    }

    proptest! {
        #[test]
        fn distance_is_the_haversine_and_symmetric(
            a in (-90.0..=90.0, -180.0..=180.0),
            b in (-90.0..=90.0, -180.0..=180.0),
        ) {
            let (a, b) = (at(a.0, a.1), at(b.0, b.1));
            let (u, v) = (a.unit_vector(), b.unit_vector());
            let (d, expected) = (u.distance_km(v), haversine_km(a, b));
            // Both lose accuracy at the antipode, where a metre does not matter.
            prop_assert!((d - expected).abs() < 0.001, "{d} km, haversine {expected} km");
            prop_assert!((d - v.distance_km(u)).abs() < 1e-9);
        }
    }
}
