//! Keys change under live calls.

use std::collections::HashSet;

use super::rig::{Rig, TestRelay, generation, talk};

/// All steps of a rotation as a fleet takes them, while a call talks and listens.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_during_a_call_costs_no_frame() {
    let rig = Rig::start(2).await;
    let relay = TestRelay::start(&rig, 65).await;
    rig.set_relays(&[&relay], &[1]);
    let (terms, call) = rig.call(&[&relay], 1).await;
    let talking = talk(call, 2);
    let rotating = async {
        rig.until("the call's first answer", |_| terms.path.lock().describe().audio_received > 20).await;
        // Every party loads the new generation.
        rig.set_keys(&[1, 2], 1);
        rig.set_relays(&[&relay], &[1, 2]);
        relay.load(&[1, 2], 1);
        assert_eq!(rig.capacity.oldest_generation(), Some(generation(1)));
        // Then it comes into use, at the worker first.
        rig.set_keys(&[1, 2], 2);
        relay.load(&[1, 2], 2);
        // A new lease, under the new generation, is there at once; the call keeps the old one for a while.
        let (newer, second) = rig.call(&[&relay], 2).await;
        assert_eq!(newer.attempts[0].0.as_bytes()[0] >> 5, 2, "the configuration is the generation mod 7");
        assert_eq!(rig.capacity.oldest_generation(), Some(generation(1)));
        rig.until("the live call has new IDs", |rig| {
            let rotated = |event: &antiphon_proto::v1::PathEvent| event.kind == "connection_id_rotated";
            // Its lease's attempts expire with the lease; what the connection itself uses is what has to move on.
            terms.path.lock().describe().events.iter().any(rotated)
                && terms.connection_generation() == Some(generation(2))
                && rig.shards.lock().oldest_tunnel_generation() == Some(generation(2))
        })
        .await;
        // Nobody needs the old one any more.
        rig.set_keys(&[2], 2);
        rig.set_relays(&[&relay], &[2]);
        relay.load(&[2], 2);
        (newer, talk(second, 1).await)
    };
    let ((report, outcome), (newer, (second, answered))) = tokio::join!(talking, rotating);
    assert_eq!((outcome.answers, outcome.unanswered), (2, 0));
    assert_eq!((answered.answers, answered.unanswered), (1, 0));
    rig.assert_no_frame_lost(&terms, &report);
    rig.assert_no_frame_lost(&newer, &second);
    let told = terms.path.lock().describe();
    assert!(told.audio_received > 150, "{}", told.audio_received);
    assert_eq!(relay.seen(), HashSet::from([1, 2]));
    let qlog = std::fs::read_to_string(rig.qlog.path().join("qlog").join(format!("{}.sqlog", terms.session))).unwrap();
    assert!(qlog.starts_with('\u{1e}') && qlog.lines().count() > 10, "its qlog is there: {:.200}", qlog);
    for reason in ["tag", "unknown_relay", "foreign_server", "unproven"] {
        assert_eq!(rig.dropped(reason), 0, "{reason}");
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ticket_of_an_unloaded_generation_opens_nothing() {
    let rig = Rig::start(2).await;
    let relay = TestRelay::start(&rig, 65).await;
    rig.set_relays(&[&relay], &[1]);
    let key = antiphon_client::ClientKey::generate().unwrap();
    let (_, session) = rig.session(&key, &[&relay], 2);
    let refused = antiphon_client::Dial::new(&session).unwrap().connect(&key).await.map(|_| ()).unwrap_err();
    assert!(refused.to_string().contains("not signed by this fleet"), "{refused}");
    rig.set_keys(&[1, 2], 1);
    let (_, call) = rig.call(&[&relay], 2).await;
    drop(call);
    rig.stop().await;
}
