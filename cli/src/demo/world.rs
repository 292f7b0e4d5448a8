//! Where the demo's callers are.

/// A caller's place.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Place {
    pub(super) city: &'static str,
    pub(super) latitude: f64,
    pub(super) longitude: f64,
}

/// The first `count` callers, spread over the world; cities repeat after the last.
pub(super) fn callers(count: u32) -> Vec<Place> {
    CITIES
        .iter()
        .cycle()
        .take(count as usize)
        .map(|&(city, latitude, longitude)| Place { city, latitude, longitude })
        .collect()
}

const CITIES: [(&str, f64, f64); 40] = [
    ("Berlin", 52.52, 13.40),
    ("New York", 40.71, -74.01),
    ("Tokyo", 35.68, 139.69),
    ("London", 51.51, -0.13),
    ("São Paulo", -23.55, -46.63),
    ("Paris", 48.86, 2.35),
    ("Mumbai", 19.08, 72.88),
    ("Chicago", 41.88, -87.63),
    ("Lagos", 6.52, 3.38),
    ("Sydney", -33.87, 151.21),
    ("Madrid", 40.42, -3.70),
    ("Mexico City", 19.43, -99.13),
    ("Singapore", 1.35, 103.82),
    ("Rome", 41.90, 12.50),
    ("Toronto", 43.65, -79.38),
    ("Cairo", 30.04, 31.24),
    ("Seoul", 37.57, 126.98),
    ("Warsaw", 52.23, 21.01),
    ("Los Angeles", 34.05, -118.24),
    ("Jakarta", -6.21, 106.85),
    ("Stockholm", 59.33, 18.07),
    ("Bogotá", 4.71, -74.07),
    ("Istanbul", 41.01, 28.98),
    ("Hong Kong", 22.32, 114.17),
    ("Nairobi", -1.29, 36.82),
    ("Buenos Aires", -34.60, -58.38),
    ("Amsterdam", 52.37, 4.90),
    ("Manila", 14.60, 120.98),
    ("Dubai", 25.20, 55.27),
    ("Vancouver", 49.28, -123.12),
    ("Vienna", 48.21, 16.37),
    ("Bangkok", 13.76, 100.50),
    ("Johannesburg", -26.20, 28.05),
    ("Miami", 25.76, -80.19),
    ("Lisbon", 38.72, -9.14),
    ("Delhi", 28.61, 77.21),
    ("Athens", 37.98, 23.73),
    ("Lima", -12.05, -77.04),
    ("Auckland", -36.85, 174.76),
    ("Dublin", 53.35, -6.26),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_is_on_earth_and_counts_are_kept() {
        let places = callers(100);
        assert_eq!(places.len(), 100);
        assert_eq!(places[0].city, places[40].city);
        for place in places {
            antiphon_core::geo::Location::new(place.latitude, place.longitude).unwrap();
        }
    }
}
