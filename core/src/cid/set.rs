//! Configurations side by side.

use super::{CidError, Config, ConfigId, Decoded};

/// Up to seven configurations, told apart by the codepoint in the first octet.
///
/// During a rotation the new configuration is added everywhere before any server mints under it, and the old one stays
/// until its last connection has ended or moved over (draft, section 3.1).
#[derive(Clone, Debug, Default)]
pub struct ConfigSet {
    configs: [Option<Config>; ConfigId::COUNT],
}

impl ConfigSet {
    /// A set that decodes nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a configuration and gives back the one that it replaces.
    pub fn insert(&mut self, config: Config) -> Option<Config> {
        self.configs[usize::from(config.id().value())].replace(config)
    }

    /// Takes a configuration out.
    pub fn remove(&mut self, id: ConfigId) -> Option<Config> {
        self.configs[usize::from(id.value())].take()
    }

    /// The configuration of a codepoint.
    #[must_use]
    pub fn config(&self, id: ConfigId) -> Option<&Config> {
        self.configs[usize::from(id.value())].as_ref()
    }

    /// All configurations, by codepoint.
    pub fn iter(&self) -> impl Iterator<Item = &Config> {
        self.configs.iter().flatten()
    }

    /// Takes a connection ID apart under the configuration that its first octet names. Does not allocate.
    ///
    /// # Errors
    /// [`CidError::UnknownConfig`], and those of [`Config::decode`].
    pub fn decode(&self, cid: &[u8]) -> Result<Decoded, CidError> {
        let first = *cid.first().ok_or(CidError::TooShort { needed: 1, actual: 0 })?;
        let id = ConfigId::of_first_octet(first)?;
        self.config(id).ok_or(CidError::UnknownConfig(id))?.decode(cid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rotation_decodes_old_and_new_side_by_side() {
        let id = |v| ConfigId::new(v).unwrap();
        let mut set = ConfigSet::new();
        let mut cids = Vec::new();
        for v in 0..7 {
            let (server, nonce) = (vec![v; usize::from(v) + 1], [9; 8]);
            let config = Config::new(id(v), server.len(), 8, Some([v; 16]), true).unwrap();
            cids.push((config.encode(&server, &nonce, 0).unwrap(), server));
            assert!(set.insert(config).is_none());
        }
        for (cid, server) in &cids {
            assert_eq!(set.decode(cid).unwrap().server_id(), server);
        }
        assert!(set.remove(id(3)).is_some());
        assert_eq!(set.decode(&cids[3].0), Err(CidError::UnknownConfig(id(3))));
        assert_eq!(set.iter().count(), 6);
        assert_eq!(set.decode(&[0xff; 20]), Err(CidError::Unroutable));
        assert!(set.decode(&[]).is_err());
    }
}
