//! Floods: what they cost calls and handshakes.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use super::rig::{Rig, TestRelay, talk};

/// Sends frames in turn, `per_second` of them as far as the machine can, until told to stop.
fn flood(
    rig: &Rig,
    through: &TestRelay,
    per_second: usize,
    frames: Vec<Vec<u8>>,
) -> (CancellationToken, Arc<AtomicU64>) {
    let (stop, sent) = (CancellationToken::new(), Arc::new(AtomicU64::new(0)));
    let (relay, stopping, count) = (through.clone(), stop.clone(), sent.clone());
    rig.tasks.spawn("flood", async move {
        let mut ticks = tokio::time::interval(TICK);
        let mut frames = frames.iter().cycle();
        while stopping.run_until_cancelled(ticks.tick()).await.is_some() {
            let burst = per_second / (1_000 / TICK.as_millis() as usize);
            let taken = (0..burst).filter(|_| frames.next().is_some_and(|frame| relay.try_send(frame)));
            count.fetch_add(taken.count() as u64, Relaxed);
        }
        Ok(())
    });
    (stop, sent)
}

/// What an unoptimised build keeps up with on a machine that does other things: attacker, callers and worker share this
/// process. `cargo xtask bench flood` sends 100,000 to processes of an optimised one.
const INITIALS: usize = 8_000;
const TICK: Duration = Duration::from_millis(2);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_thousand_forged_packets_a_second_with_a_callers_address_cost_that_caller_no_frame() {
    let rig = Rig::start(2).await;
    let (own, other) = (TestRelay::start(&rig, 65).await, TestRelay::start(&rig, 66).await);
    rig.set_relays(&[&own, &other], &[1]);
    let (terms, call) = rig.call(&[&own], 1).await;
    let talking = talk(call, 2);
    let attacking = async {
        rig.until("the caller speaks", |_| terms.path.lock().describe().audio_received > 20).await;
        let caller: SocketAddr = terms.path.lock().describe().paths[0].client_address.parse().unwrap();
        // The attacker has seen the caller's connection ID go by and hits its very connection.
        let forge = |n: u8| [&[0x40 | n][..], &own.last_cid(), &[n; 182]].concat();
        let frames = (0..32).map(|n| other.frame(caller, &forge(n))).collect();
        flood(&rig, &other, 20_000, frames)
    };
    let ((report, outcome), (stop, sent)) = tokio::join!(talking, attacking);
    stop.cancel();
    assert!(sent.load(Relaxed) > 5_000, "a flood, not a trickle: {}", sent.load(Relaxed));
    assert_eq!((outcome.answers, outcome.unanswered), (2, 0));
    rig.assert_no_frame_lost(&terms, &report);
    let told = terms.path.lock().describe();
    assert_eq!(told.paths.len(), 1, "the path stayed where it was");
    assert!(rig.dropped("unproven") > sent.load(Relaxed) / 2, "they stop before QUIC");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_forged_initials_costs_no_handshake_and_a_live_call_no_frame() {
    let rig = Rig::start(16).await;
    let (own, other) = (TestRelay::start(&rig, 65).await, TestRelay::start(&rig, 66).await);
    rig.set_relays(&[&own, &other], &[1]);
    let (terms, call) = rig.call(&[&own], 1).await;
    // The worst there is: initial IDs that decode to this very worker; of leases that are there, by an attacker who
    // has one, from many addresses; and of none.
    let key = antiphon_client::ClientKey::generate().unwrap();
    let (lease, _) = rig.session(&key, &[&other], 1);
    let mut minter = rig.minter();
    let initial = |cid: &[u8]| [&[0xc0, 0, 0, 0, 1, 17][..], cid, &[0, 0, 0x44, 0x9e], &[7; 1_173]].concat();
    let frames = (0..64_u16).map(|n| {
        let client = SocketAddr::from(([192, 0, 2, 1], 1_000 + n));
        let (unknown, _) = minter.mint_initial(0);
        let cid = if n % 2 == 0 { lease.attempts[usize::from(n) / 2 % 4].0 } else { unknown };
        other.frame(client, &initial(cid.as_bytes()))
    });
    let (stop, sent) = flood(&rig, &other, INITIALS, frames.collect());
    let talking = talk(call, 1);
    let connecting = async {
        let mut connected = 0;
        for _ in 0..8 {
            let (_, call) = rig.call(&[&own], 1).await;
            call.handle().hang_up();
            let (report, _) = talk(call, 1).await;
            connected += u32::from(report.attempts == 1);
        }
        connected
    };
    let ((report, outcome), connected) = tokio::join!(talking, connecting);
    stop.cancel();
    assert!(sent.load(Relaxed) > 5_000, "a flood, not a trickle: {}", sent.load(Relaxed));
    assert_eq!(connected, 8, "every handshake at the first attempt");
    assert_eq!((outcome.answers, outcome.unanswered), (1, 0));
    rig.assert_no_frame_lost(&terms, &report);
    assert!(rig.dropped("unknown_initial") > 1_000 && rig.dropped("unproven") > 1_000);
    rig.stop().await;
}

/// The measurement of a wrong clock itself is tested where it is made.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_two_minutes_off_is_noticed_and_its_frames_are_not_taken() {
    let rig = Rig::start(1).await;
    let relay = TestRelay::start(&rig, 65).await;
    rig.set_relays(&[&relay], &[1]);
    let client = "192.0.2.1:5".parse().unwrap();
    let mut minter = rig.minter();
    let datagram = [&[0x40][..], minter.mint_connection().as_bytes(), &[0; 30]].concat();
    let behind = std::time::SystemTime::now() - Duration::from_secs(120);
    rig.until("a window of measurement is over", |rig| {
        relay.try_send(&relay.frame_at(client, &datagram, behind));
        rig.skew() < -100
    })
    .await;
    assert!(rig.dropped("stale") > 0);
    assert_eq!(rig.dropped("tag"), 0);
    rig.stop().await;
}
