use proptest::prelude::*;

use super::*;

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

#[test]
fn silence_moves_to_the_next_relay_and_each_gets_its_chance() {
    let mut path = PathSelector::new(3, 0, ms(0));
    path.on_heard(0, ms(100));
    assert_eq!(path.poll(ms(249), ms(10)), None);
    let first = Switch { from: 0, to: 1, reason: SwitchReason::Silent };
    assert_eq!(path.poll(ms(250), ms(10)), Some(first));
    assert_eq!(path.poll(ms(399), ms(10)), None, "the new relay has its span");
    assert_eq!(path.poll(ms(400), ms(10)).map(|s| s.to), Some(2));
    path.on_heard(2, ms(410));
    assert_eq!(path.poll(ms(500), ms(10)), None);
}

#[test]
fn a_long_probe_timeout_means_patience() {
    let mut path = PathSelector::new(2, 0, ms(0));
    assert_eq!(path.poll(ms(899), ms(300)), None);
    assert!(path.poll(ms(900), ms(300)).is_some());
}

#[test]
fn a_draining_relay_is_left_at_once_and_comes_back_only_as_the_last_choice() {
    let mut path = PathSelector::new(3, 1, ms(0));
    assert_eq!(path.on_draining(2, ms(1)), None);
    assert_eq!(path.on_draining(1, ms(2)), Some(Switch { from: 1, to: 0, reason: SwitchReason::Draining }));
    assert_eq!(path.on_draining(9, ms(2)), None);
    assert!(path.poll(ms(152), ms(1)).is_some_and(|s| s.to == 1 || s.to == 2));
}

#[test]
fn a_closed_port_is_left_at_once_but_dead_relays_are_not_hammered() {
    let mut path = PathSelector::new(2, 0, ms(0));
    assert_eq!(path.on_refused(1, ms(1)), None, "not in use");
    assert_eq!(path.on_refused(0, ms(2)), None, "the other one has just failed");
    let switch = Switch { from: 0, to: 1, reason: SwitchReason::Refused };
    assert_eq!(path.on_refused(0, ms(151)), Some(switch));
    assert_eq!(path.on_refused(1, ms(152)), None);
}

#[test]
fn late_packets_of_the_old_relay_do_not_vouch_for_the_new_one() {
    let mut path = PathSelector::new(2, 0, ms(0));
    assert!(path.poll(ms(150), ms(1)).is_some());
    path.on_heard(0, ms(290));
    assert!(path.poll(ms(300), ms(1)).is_some());
}

#[test]
fn one_relay_is_all_there_is() {
    let mut path = PathSelector::new(1, 0, ms(0));
    assert_eq!(path.poll(ms(1000), ms(1)), None);
    assert_eq!(path.active(), 0);
}

#[test]
fn a_dead_network_is_probed_ever_more_slowly() {
    let mut path = PathSelector::new(2, 0, ms(0));
    let switches = (1..=10_000).filter(|t| path.poll(ms(*t), ms(1)).is_some()).count();
    assert!((6..=12).contains(&switches), "{switches}");
}

#[test]
fn a_worker_that_is_heard_but_hears_nothing_is_tried_through_another_relay() {
    let mut path = PathSelector::new(2, 0, ms(0));
    for now in (20..=1_000).step_by(20) {
        path.on_heard(0, ms(now));
        // What was sent until 200 arrived, nothing since.
        path.on_confirmed(ms(now.min(200)));
        let switch = path.poll(ms(now), ms(10));
        assert_eq!(switch.is_some(), now == 960, "200 + 150 + 600, at the next step: {now}");
        if let Some(switch) = switch {
            assert_eq!(switch, Switch { from: 0, to: 1, reason: SwitchReason::Unheard });
            break;
        }
    }
    path.on_confirmed(ms(950));
    assert_eq!(path.unconfirmed(ms(1_000)), ms(40), "confirmed through the relay before: says nothing of this one");
    path.on_confirmed(ms(970));
    assert_eq!(path.unconfirmed(ms(1_000)), ms(30));
}

#[test]
fn a_relay_that_carries_one_direction_is_no_better_for_being_heard() {
    let mut path = PathSelector::new(3, 0, ms(0));
    assert_eq!(path.poll(ms(150), ms(1)).map(|s| s.to), Some(1));
    path.on_heard(1, ms(160));
    path.on_heard(0, ms(170));
    // Relay 0 has failed and only been heard since; relay 2 has never failed.
    assert_eq!(path.poll(ms(310), ms(1)).map(|s| s.to), Some(2));
}

#[test]
fn a_new_network_without_a_way_to_the_relay_is_a_change_of_relay() {
    let mut path = PathSelector::new(2, 0, ms(0));
    let moved = Switch { from: 0, to: 1, reason: SwitchReason::Unreachable };
    assert_eq!(path.on_moved(1, ms(100)), Some(moved));
    assert_eq!((path.active(), path.on_moved(1, ms(200)), path.on_moved(7, ms(200))), (1, None, None));
    assert_eq!(path.poll(ms(349), ms(1)), None, "it has its span");
}

/// Relays between a client and a worker, in virtual time. Each direction of each relay works or does not. The worker
/// answers through the relay that last brought something, whatever address the client has there: a NAT that gives the
/// client another one changes nothing but `port`.
struct Net {
    path: PathSelector,
    up: Vec<bool>,
    down: Vec<bool>,
    delay: u64,
    loss: f64,
    now: u64,
    random: u64,
    /// Packets under way to the worker: arrival, relay, port, when sent.
    to_worker: Vec<(u64, usize, u16, u64)>,
    /// Packets under way to the client: arrival, relay, port, what they confirm.
    to_client: Vec<(u64, usize, u16, u64)>,
    /// How the worker reaches the client, and the newest that came.
    known: Option<(usize, u16, u64)>,
    /// The client's port as the relays see it.
    port: u16,
    switches: Vec<(u64, Switch)>,
}

impl Net {
    fn new(relays: usize, delay: u64) -> Self {
        let (up, down) = (vec![true; relays], vec![true; relays]);
        Self {
            path: PathSelector::new(relays, 0, ms(0)),
            up,
            down,
            delay,
            loss: 0.0,
            now: 0,
            random: 1,
            to_worker: Vec::new(),
            to_client: Vec::new(),
            known: None,
            port: 40_000,
            switches: Vec::new(),
        }
    }

    fn is_lost(&mut self) -> bool {
        // SplitMix64.
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64 <= self.loss && self.loss > 0.0
    }

    fn send(&mut self) {
        let relay = self.path.active();
        if self.up[relay] && !self.is_lost() {
            self.to_worker.push((self.now + self.delay, relay, self.port, self.now));
        }
    }

    /// Both ends send every 80 ms, as quiet ones do.
    fn run(&mut self, span: u64) {
        for _ in 0..span {
            self.now += 1;
            let now = self.now;
            for (_, relay, port, sent) in self.to_worker.extract_if(.., |p| p.0 <= now) {
                self.known = Some((relay, port, sent));
            }
            for (_, relay, port, confirmed) in self.to_client.extract_if(.., |p| p.0 <= now) {
                // A NAT lets in only what comes to the address that it has given last.
                if port == self.port {
                    self.path.on_heard(relay, ms(now));
                    self.path.on_confirmed(ms(confirmed));
                }
            }
            if now.is_multiple_of(80) {
                self.send();
            }
            if (now + 40).is_multiple_of(80)
                && let Some((relay, port, newest)) = self.known
                && self.down[relay]
                && !self.is_lost()
            {
                self.to_client.push((now + self.delay, relay, port, newest));
            }
            let rtt = ms(2 * self.delay);
            if now.is_multiple_of(20)
                && let Some(switch) = self.path.poll(ms(now), rtt + rtt / 2 + ms(25))
            {
                self.switches.push((now, switch));
                // The first packet on the new path goes at once.
                self.send();
            }
        }
    }

    fn works(&self) -> bool {
        let active = self.path.active();
        self.up[active] && self.down[active]
    }
}

#[test]
fn a_dead_direction_is_recognised_whichever_it_is() {
    for (up, down, reason, within) in
        [(false, true, SwitchReason::Unheard, 1_200), (true, false, SwitchReason::Silent, 400)]
    {
        let mut net = Net::new(2, 20);
        net.run(2_000);
        (net.up[0], net.down[0]) = (up, down);
        net.run(3_000);
        let [(at, switch)] = net.switches[..] else { panic!("{:?}", net.switches) };
        assert_eq!(switch, Switch { from: 0, to: 1, reason });
        assert!(at - 2_000 <= within, "after {} ms", at - 2_000);
        // And back, when the other one fails in its turn and the first has come back.
        (net.up[0], net.down[0], net.up[1], net.down[1]) = (true, true, up, down);
        net.run(3_000);
        assert!(net.works() && net.switches.len() == 2, "{:?}", net.switches);
    }
}

#[test]
fn an_address_that_changes_under_the_client_needs_no_other_relay() {
    let mut net = Net::new(2, 30);
    for port in 40_001..40_020 {
        net.run(1_000);
        net.port = port;
    }
    assert_eq!(net.switches, []);
    // Together with a dead relay: the next one, at the new address.
    (net.port, net.up[0], net.down[0]) = (50_000, false, false);
    net.run(2_000);
    assert!(net.works() && net.switches.len() == 1, "{:?}", net.switches);
}

#[test]
fn loss_is_not_taken_for_a_dead_way() {
    for seed in 0..20 {
        let mut net = Net::new(3, 40);
        (net.loss, net.random) = (0.05, seed);
        net.run(60_000);
        let unheard = net.switches.iter().filter(|(_, switch)| switch.reason == SwitchReason::Unheard).count();
        assert_eq!(unheard, 0, "{:?}", net.switches);
    }
}

proptest! {
    #[test]
    fn a_relay_that_works_both_ways_is_found_and_kept(
        ways in prop::collection::vec((any::<bool>(), any::<bool>()), 1..4),
        good in any::<prop::sample::Index>(),
        delay in 1_u64..60,
    ) {
        let mut ways = ways;
        ways.insert(good.index(ways.len() + 1), (true, true));
        let mut net = Net::new(ways.len(), delay);
        net.run(1_000);
        for (relay, (up, down)) in ways.iter().enumerate() {
            (net.up[relay], net.down[relay]) = (*up, *down);
        }
        net.run(8_000);
        prop_assert!(net.works(), "{:?} after {:?}", net.path, net.switches);
        let before = net.switches.len();
        net.run(5_000);
        prop_assert_eq!(net.switches.len(), before, "{:?}", net.switches);
    }
}
