use super::*;
use antiphon_core::tunnel::ClientAddr;

const ID: [u64; 2] = [0x0040_0001_dead_beef, 7];
const CALLER: u32 = u32::MAX;

fn flow(id: [u64; 2], address: u32, initial: bool) -> Flow {
    let client = ClientAddr { ip: std::net::Ipv4Addr::from(address).to_ipv6_mapped(), port: 4000 };
    Flow { key: id, client, initial }
}

/// What passed of ten seconds in which a caller speaks, 100 packets a second, and others come with its connection ID.
#[derive(Debug, PartialEq, Eq)]
struct Passed {
    /// Of 1,000.
    caller: u32,
    others: u64,
    /// Most in one second of the clock.
    busiest: u64,
}

/// `each_ms` packets a millisecond from addresses that `address` gives the n-th of them.
fn flooded(each_ms: u64, address: impl Fn(u64) -> u32) -> Passed {
    let mut limiter = FlowLimiter::new(&Limits::default());
    let mut passed = Passed { caller: 0, others: 0, busiest: 0 };
    assert!(limiter.admit(Millis(9_999), &flow(ID, CALLER, false)), "the call is there already");
    for second in 0..10 {
        let before = passed.others;
        for ms in 0..1000 {
            let now = Millis(10_000 + second * 1000 + ms);
            let at = (second * 1000 + ms) * each_ms;
            for n in at..at + each_ms {
                passed.others += u64::from(limiter.admit(now, &flow(ID, address(n), false)));
            }
            if ms % 10 == 0 {
                passed.caller += u32::from(limiter.admit(now, &flow(ID, CALLER, false)));
            }
        }
        passed.busiest = passed.busiest.max(passed.others - before);
    }
    passed
}

#[test]
fn a_caller_loses_nothing_to_another_address_with_its_connection_id() {
    for each_ms in [5, 100] {
        let passed = flooded(each_ms, |_| 1);
        assert_eq!(passed.caller, 1000);
        assert!((19_000..22_000).contains(&passed.others), "{passed:?}");
    }
}

#[test]
fn a_caller_loses_nothing_to_64_addresses() {
    let passed = flooded(64, |n| (n % 64) as u32);
    assert_eq!(passed.caller, 1000);
    assert!(passed.busiest < 64 * 200 + 2000, "shares, and what everybody has: {passed:?}");
}

/// Each packet from an address of its own, as a sender makes them who never wants an answer.
#[test]
fn a_caller_loses_nothing_to_addresses_that_never_come_again() {
    for each_ms in [5, 100] {
        let passed = flooded(each_ms, |n| n as u32);
        assert_eq!(passed.caller, 1000);
        // Now and then one is taken for one that was there before.
        assert!((15_000..25_000).contains(&passed.others), "{passed:?}");
    }
}

#[test]
fn a_worker_gets_ten_times_the_rate_of_one_id_at_most() {
    let passed = flooded(200, |n| (n % 4000) as u32);
    assert!(passed.busiest <= 20_000, "{passed:?}");
    assert!(passed.busiest > 18_000, "{passed:?}");
}

/// A caller who comes from a new address while the flood goes on needs one packet that is let pass.
#[test]
fn a_caller_gets_in_beside_a_flood() {
    let mut limiter = FlowLimiter::new(&Limits::default());
    let (mut sent, mut inside) = (0, false);
    for n in 0..200_000 {
        // 20,000 a second; the caller's 100 fall anywhere between them.
        let now = Millis(10_000 + u64::from(n) / 20);
        let _ = limiter.admit(now, &flow(ID, n, false));
        if n > 40_000 && n % 199 == 0 && !inside {
            sent += 1;
            inside = limiter.admit(now, &flow(ID, CALLER, false));
        }
    }
    assert!(inside && sent < 100, "{sent} packets");
}

/// What somebody does to one call costs no other call anything, although he may fill cells as he likes.
#[test]
fn other_calls_do_not_notice_the_flood_of_one() {
    let mut limiter = FlowLimiter::new(&Limits::default());
    for ms in 10_000..12_000_u64 {
        for n in 0..200 {
            let _ = limiter.admit(Millis(ms), &flow(ID, (ms * 200 + n) as u32 % 20_000, false));
        }
        for call in (0..500).filter(|call| (call + ms) % 20 == 0) {
            let moved = CALLER - (ms / 500) as u32;
            assert!(limiter.admit(Millis(ms), &flow([9, call], moved, false)), "call {call} at {ms} ms");
        }
    }
}

#[test]
fn initials_are_bounded_apart_and_more_tightly() {
    let mut limiter = FlowLimiter::new(&Limits::default());
    let mut first = |address| limiter.admit(Millis(10_000), &flow(ID, address, true));
    assert!(first(CALLER));
    assert_eq!((0..1000).filter(|_| first(1)).count(), 19);
    assert_eq!((0..10).filter(|_| first(CALLER)).count(), 7, "those of the caller's share");
    assert!(limiter.admit(Millis(10_000), &flow(ID, 1, false)));
}

#[test]
fn memory_does_not_grow_with_addresses() {
    let mut limiter = FlowLimiter::new(&Limits::default());
    let memory = |limiter: &FlowLimiter| limiter.all.paths.memory() + limiter.all.ids.memory();
    let before = memory(&limiter);
    for n in 0..500_000 {
        let _ = limiter.admit(Millis(n / 100), &flow(ID, n as u32, false));
    }
    assert_eq!((before, memory(&limiter)), (256 * 1024, 256 * 1024));
}
