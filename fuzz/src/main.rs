//! libFuzzer around one target, which `ANTIPHON_FUZZ_TARGET` names.
#![no_main]
#![forbid(unsafe_code)]

use std::sync::LazyLock;

use antiphon_fuzz::{TARGETS, Target};

static TARGET: LazyLock<&'static Target> = LazyLock::new(|| {
    let name = std::env::var("ANTIPHON_FUZZ_TARGET").unwrap_or_default();
    let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
    Target::named(&name).unwrap_or_else(|| panic!("ANTIPHON_FUZZ_TARGET is {name:?}, not one of {}", names.join(", ")))
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    (TARGET.run)(data);
});
