//! Workers own their capacity.

use std::sync::Arc;

use antiphon_client::{ClientKey, RouterError};
use antiphon_proto::v1::Codec;

use crate::support::{Shape, request, start};

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_requests_for_a_hundred_slots_get_exactly_a_hundred_tickets() {
    let fleet = start(Shape { relays: 1, workers: 2, slots: 50 }).await;
    let router = fleet.router();
    let key = Arc::new(ClientKey::generate().unwrap());
    let mut asking = tokio::task::JoinSet::new();
    for _ in 0..1_000 {
        let (router, key) = (router.clone(), key.clone());
        asking.spawn(async move { router.create(&request(&key, Codec::Opus)).await });
    }
    let (granted, refused): (Vec<_>, Vec<_>) = asking.join_all().await.into_iter().partition(Result::is_ok);
    assert_eq!((granted.len(), refused.len()), (100, 900));
    for refusal in refused {
        let Err(RouterError::Refused(refusal)) = refusal else { panic!("not a refusal: {refusal:?}") };
        assert_eq!(refusal.reason, "no_capacity");
        assert!(!refusal.candidates.is_empty() && refusal.retry_after_ms > 0, "{refusal:?}");
        assert!(refusal.candidates.iter().all(|c| !c.verdict.is_empty() && !c.detail.is_empty()), "{refusal:?}");
    }
    let mut sessions: Vec<_> = granted.into_iter().map(|session| session.unwrap().session).collect();
    let freed = sessions.pop().unwrap();
    router.delete(&freed).await.unwrap();
    router.delete(&freed).await.unwrap();
    crate::support::eventually("the freed slot is granted again", async || {
        router.create(&request(&key, Codec::Opus)).await.is_ok()
    })
    .await;
    fleet.fleet.stop().await;
}
