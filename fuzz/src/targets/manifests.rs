//! Files that describe a fleet.

use antiphon_crds::{compile, manifest as manifests};

pub(super) fn manifest(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    match manifests::parse(&[("input.yaml", text)]) {
        Ok(resources) => {
            assert!(!resources.is_empty());
            let _ = compile::compile(&resources).map_err(|error| error.to_string());
            true
        }
        Err(errors) => {
            assert!(!errors.to_string().is_empty(), "an error says what is wrong");
            false
        }
    }
}

pub(super) fn manifest_seeds() -> Vec<Vec<u8>> {
    vec![
        [
            include_str!("../../../examples/three-clouds/regions.yaml"),
            "---\n",
            include_str!("../../../examples/three-clouds/frontdesk.yaml"),
        ]
        .concat()
        .into_bytes(),
        include_bytes!("../../../examples/three-clouds/regions.yaml").to_vec(),
    ]
}
