//! How other commands find a running fleet.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use antiphon_client::Router;
use antiphon_core::geo::Location;
use antiphon_proto::{api_key::ApiKey, v1::admin_client::AdminClient};
use antiphon_runtime::pki::write_secret;
use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use tonic::transport::Channel;

use crate::present::from_environment;

/// One region's router.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RouterContext {
    /// Region name.
    pub region: String,
    /// Public API, `IP:PORT`.
    pub public: String,
    /// Internal API, `IP:PORT`.
    pub internal: String,
    /// Name in its certificate.
    pub server_name: String,
    /// Of the region, degrees.
    pub latitude: f64,
    /// Of the region, degrees.
    pub longitude: f64,
}

/// `fleet.json`: where a fleet's routers are and how to authenticate.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Context {
    /// Routers, one per region.
    pub routers: Vec<RouterContext>,
    /// Trust anchor.
    pub ca_pem: String,
    /// Directory with an operator's identity.
    pub operator_identity: PathBuf,
    /// File with an API key.
    pub api_key_file: PathBuf,
}

impl Context {
    /// Reads a fleet's context: of the fleet in `dir`, unless the environment names the routers of another one.
    ///
    /// # Errors
    /// No fleet has run in `dir`, the file is not what it should be, or what the environment says is unusable.
    pub fn load(dir: &Path) -> anyhow::Result<Self> {
        if let Some(routers) = from_environment(ROUTERS) {
            let ca = from_environment(CA).with_context(|| format!("{ROUTERS} is set and {CA} is not"))?;
            return Self::elsewhere(&routers.to_string_lossy(), Path::new(&ca), dir);
        }
        let path = dir.join(FILE);
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => anyhow::bail!("{}", no_fleet(dir)),
            read => read.with_context(|| path.display().to_string())?,
        };
        serde_json::from_str(&text).with_context(|| format!("{} is not a fleet's context", path.display()))
    }

    /// A fleet that runs elsewhere, of which only the public API is known. `routers` is `REGION=HOST:PORT`, with commas.
    fn elsewhere(routers: &str, ca: &Path, dir: &Path) -> anyhow::Result<Self> {
        let router = |entry: &str| {
            let (region, public) = entry
                .trim()
                .split_once('=')
                .filter(|(region, public)| !region.is_empty() && public.contains(':'))
                .with_context(|| format!("{ROUTERS}: {entry}: expected REGION=HOST:PORT"))?;
            Ok(RouterContext {
                region: region.to_owned(),
                public: public.to_owned(),
                internal: String::new(),
                server_name: format!("router.{region}.antiphon.internal"),
                latitude: f64::NAN,
                longitude: f64::NAN,
            })
        };
        Ok(Self {
            routers: routers.split(',').map(router).collect::<anyhow::Result<_>>()?,
            ca_pem: fs::read_to_string(ca).with_context(|| format!("{CA}: {}", ca.display()))?,
            operator_identity: dir.join("operator"),
            api_key_file: key_path(dir),
        })
    }

    pub(super) fn save(&self, dir: &Path) -> anyhow::Result<()> {
        let ca = ca_path(dir);
        fs::write(&ca, &self.ca_pem).with_context(|| ca.display().to_string())?;
        let path = dir.join(FILE);
        fs::write(&path, serde_json::to_string_pretty(self)?).with_context(|| path.display().to_string())
    }

    /// The router to ask: the one nearest to the caller, the first without a location.
    #[must_use]
    pub fn nearest(&self, location: Option<(f64, f64)>) -> Option<&RouterContext> {
        let Some(here) = location.and_then(|(lat, lon)| Location::new(lat, lon).ok()) else {
            return self.routers.first();
        };
        let distance = |router: &RouterContext| {
            let there = Location::new(router.latitude, router.longitude).ok();
            there.map_or(f64::INFINITY, |there| here.unit_vector().distance_km(there.unit_vector()))
        };
        self.routers.iter().min_by(|a, b| distance(a).total_cmp(&distance(b)))
    }

    /// The API key that `up` made.
    ///
    /// # Errors
    /// The file is missing or holds no key.
    pub fn api_key(&self) -> anyhow::Result<ApiKey> {
        let path = &self.api_key_file;
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        ApiKey::parse(text.trim()).with_context(|| path.display().to_string())
    }

    /// A client of one router's public API, with the fleet's own key or another.
    ///
    /// # Errors
    /// The key is missing or the context is damaged.
    pub fn client(&self, router: &RouterContext, key: Option<&str>) -> anyhow::Result<Router> {
        let own = key.map_or_else(|| self.api_key().map(|key| key.text().to_owned()), |key| Ok(key.to_owned()))?;
        Ok(Router::new(&router.public, &self.ca_pem, &router.server_name, &own)?)
    }

    /// An operator's channel to one router.
    ///
    /// # Errors
    /// The identity is missing or damaged.
    pub fn admin(&self, router: &RouterContext) -> anyhow::Result<AdminClient<Channel>> {
        super::admin_channel(&router.internal, &self.operator_identity, &router.region)
    }
}

/// What is said where no fleet has run.
pub(crate) fn no_fleet(dir: &Path) -> String {
    format!("no fleet in {}: start one with `antiphon up FILE…`, or name its directory with --dir", dir.display())
}

/// The trust anchor as a file of its own, for other programs.
pub(crate) fn ca_path(dir: &Path) -> PathBuf {
    dir.join("ca.pem")
}

pub(crate) fn key_path(dir: &Path) -> PathBuf {
    dir.join("api-key")
}

/// The key that the command line uses; made once per directory.
pub(super) fn load_or_make_key(dir: &Path) -> anyhow::Result<ApiKey> {
    let path = key_path(dir);
    match fs::read_to_string(&path) {
        Ok(text) => ApiKey::parse(text.trim()).with_context(|| path.display().to_string()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = new_key();
            write_secret(&path, key.text().as_bytes())?;
            Ok(key)
        }
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

/// A fresh key from the system's random source.
pub(crate) fn new_key() -> ApiKey {
    let mut random = [0; ApiKey::RANDOM];
    rand::fill(&mut random);
    ApiKey::from_random(&random)
}

const FILE: &str = "fleet.json";
/// Routers of a fleet that runs elsewhere: `REGION=HOST:PORT`, with commas.
const ROUTERS: &str = "ANTIPHON_ROUTERS";
/// File with that fleet's trust anchor.
const CA: &str = "ANTIPHON_CA";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fleet_elsewhere_is_known_by_its_routers_and_trust_anchor() {
        let dir = tempfile::tempdir().expect("a directory");
        let ca = dir.path().join("ca.pem");
        fs::write(&ca, "PEM").expect("writable");
        let context =
            Context::elsewhere("here=10.0.0.7:7443, there=router.example:7443", &ca, dir.path()).expect("well-formed");
        assert_eq!(context.ca_pem, "PEM");
        let [here, there] = &context.routers[..] else { panic!("two") };
        assert_eq!((here.region.as_str(), here.public.as_str()), ("here", "10.0.0.7:7443"));
        assert_eq!(there.server_name, "router.there.antiphon.internal");
        let nearest = context.nearest(Some((50.0, 8.0))).expect("a router");
        assert_eq!(nearest.region, "here", "the first, as nobody knows where they are");
    }

    #[test]
    fn what_is_wrong_with_the_environment_is_said() {
        let dir = tempfile::tempdir().expect("a directory");
        let ca = dir.path().join("ca.pem");
        let error = Context::elsewhere("here=10.0.0.7:7443", &ca, dir.path()).expect_err("no file");
        assert!(format!("{error:#}").contains("ANTIPHON_CA: "), "{error:#}");
        for wrong in ["here", "here=", "=10.0.0.7:7443", "here=10.0.0.7", ""] {
            let error = Context::elsewhere(wrong, &ca, dir.path()).expect_err(wrong);
            assert!(error.to_string().contains("expected REGION=HOST:PORT"), "{error:#}");
        }
    }
}
