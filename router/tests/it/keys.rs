//! Key generations over real streams: nobody registers again, nobody is left without a key.

use std::sync::atomic::Ordering;

use antiphon_core::id::KeyGeneration;
use antiphon_proto::{ticket, v1};
use tonic::Code;

use crate::{
    peering::pair,
    world::{Region, Relay, World, create, eventually, with_key},
};

async fn rotate(world: &World, region: &Region, key_generation: u32) -> Result<(), tonic::Status> {
    world.apply(region, v1::ApplyRequest { key_generation, ..v1::ApplyRequest::default() }).await.map(drop)
}

/// The generation whose key signed a new session's ticket.
async fn signed_with(world: &World, region: &Region) -> u32 {
    let session = region.sessions().create_session(with_key(&world.key, create())).await.unwrap().into_inner();
    let key = |generation| ticket::public_key(&world.root.ticket_seed(KeyGeneration::new(generation).unwrap()));
    let expiry = u64::try_from(session.expires_at.unwrap().seconds).unwrap();
    let verified = |generation: &u32| ticket::verify(&session.ticket, &[key(*generation)], expiry - 1).is_ok();
    (1..9).find(verified).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_mints_with_a_generation_once_every_region_has_loaded_it() {
    let world = World::new();
    let (frankfurt, virginia) = pair(&world).await;
    let here = world.worker(&frankfurt, "w-1", 10).await;
    let there = world.worker(&virginia, "w-1", 10).await;
    let mut relay = Relay::register(&world, &virginia, "r-1").await;
    here.shared.oldest.store(1, Ordering::SeqCst);
    assert_eq!(signed_with(&world, &frankfurt).await, 1);

    let error = rotate(&world, &frankfurt, 3).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("more than one above"), "{error:?}");
    rotate(&world, &frankfurt, 2).await.unwrap();
    eventually("frankfurt loads it", async || here.shared.loaded() == [1, 2]).await;
    let held_up = async || world.status(&frankfurt).await.rotation_held_up_by;
    eventually("virginia holds it up", async || {
        held_up().await.iter().any(|line| line == "virginia: was told to move to generation 1 only")
    })
    .await;
    assert_eq!((here.shared.minting(), there.shared.loaded()), (1, vec![1]));

    rotate(&world, &virginia, 2).await.unwrap();
    // All but the relay, which takes what it is told only when it is made to.
    eventually("only the relay is missing", async || {
        let names = world.status(&virginia).await.rotation_held_up_by;
        there.shared.loaded() == [1, 2] && names == ["r-1: has not loaded generation 2"]
    })
    .await;
    assert_eq!((here.shared.minting(), there.shared.minting()), (1, 1));
    relay.follow("the second generation", |r| r.keys.secrets.len() == 2).await;
    assert_eq!(relay.keys.secrets.iter().filter(|s| s.sealing).map(|s| s.generation).sum::<u32>(), 1);
    eventually("all mint with it", async || (here.shared.minting(), there.shared.minting()) == (2, 2)).await;
    relay.follow("its new secret is in use", |r| r.keys.secrets.iter().any(|s| s.sealing && s.generation == 2)).await;
    assert_eq!(signed_with(&world, &frankfurt).await, 2);
    // A session of the first generation lives on: its keys stay everywhere.
    assert_eq!((here.shared.loaded(), there.shared.loaded()), (vec![1, 2], vec![1, 2]));
    let status = world.status(&frankfurt).await;
    let digest = |region: &str| {
        let digests = status.regions.iter().filter_map(|r| r.digest.clone());
        digests.into_iter().find(|d| d.region == region).unwrap()
    };
    let own = digest("frankfurt");
    assert_eq!((own.wanted_generation, own.oldest_generation), (2, 1));
    assert_eq!(digest("virginia").loaded_generations, [1, 2]);
    let local = status.regions.iter().find(|r| r.local).unwrap();
    assert_eq!((local.workers[0].loaded_generations.as_slice(), local.workers[0].oldest_generation), (&[1, 2][..], 1));
}
