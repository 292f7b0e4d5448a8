use super::*;
use proptest::prelude::*;
use rand::SeedableRng as _;

mod quic;

const CID: [u8; SessionCid::LEN] = [0x31; SessionCid::LEN];

fn resets(per_second: u32) -> Resets {
    Resets::new(per_second, StdRng::seed_from_u64(1))
}

#[test]
fn the_rate_holds_and_comes_back() {
    let (mut resets, key, mut out) = (resets(10), ResetKey::new(&[1; 32]), [0; MAX_RESET]);
    let mut sent = |ms| {
        let some = |_: &i32| resets.answer(Millis(ms), &key, &CID, 100, &mut out).is_some();
        (0..100).filter(some).count()
    };
    assert_eq!([sent(0), sent(50), sent(100), sent(100), sent(350), sent(90_000)], [10, 0, 1, 0, 2, 10]);
}

#[test]
fn resets_differ_in_all_but_the_token() {
    let (mut resets, key) = (resets(1000), ResetKey::new(&[1; 32]));
    let mut seen = std::collections::BTreeSet::new();
    let mut lengths = std::collections::BTreeSet::new();
    for _ in 0..200 {
        let mut out = [0; MAX_RESET];
        let len = resets.answer(Millis(0), &key, &CID, 1200, &mut out).unwrap();
        assert_eq!(out[len - TOKEN..len], key.token(&CID));
        assert!(seen.insert(out[..len - TOKEN].to_vec()));
        lengths.insert(len);
    }
    assert!(lengths.len() > 10);
    assert!(!format!("{key:?}").contains('1'));
}

proptest! {
    #[test]
    fn a_reset_is_smaller_than_its_trigger_and_long_enough(trigger in 0usize..2048, seed: u64) {
        let mut resets = Resets::new(1, StdRng::seed_from_u64(seed));
        let mut out = [0; MAX_RESET];
        let len = resets.answer(Millis(0), &ResetKey::new(&[1; 32]), &CID, trigger, &mut out);
        prop_assert_eq!(len.is_some(), trigger > MIN_RESET);
        if let Some(len) = len {
            prop_assert!(len < trigger && (MIN_RESET..=MAX_RESET).contains(&len));
            prop_assert_eq!(out[0] & 0xc0, FIXED_BIT);
        }
    }
}
