//! Ways with faults.

use std::time::{Duration, Instant};

use antiphon_e2e::{Faults, Path, run};
use tokio::process::Command;

use crate::world::shared;

#[tokio::test]
async fn packets_are_late_and_lost_as_they_are_told_to_be() {
    let shared = shared().await;
    let (one, other) = (shared.caller(10).await, shared.caller(11).await);
    let probe = shared.world.clusters.tools().probe().await.unwrap();
    let mut serve = other.command(&probe);
    let mut server = serve.args(["serve", "7000"]).kill_on_drop(true).spawn().unwrap();
    let address = format!("{}:7000", other.address());
    let mut ask = one.command(&probe);
    ask.args(["ask", "udp", &address, "hello"]);
    run(&mut ask).await.unwrap();

    let path = one.path().await.unwrap();
    let delay = Duration::from_millis(40);
    path.set(Faults { delay, ..Faults::default() }, Faults { delay, ..Faults::default() }, 1).await.unwrap();
    let begin = Instant::now();
    run(&mut ask).await.unwrap();
    assert!(begin.elapsed() >= 2 * delay, "{:?}", begin.elapsed());

    // Most of what is asked gets lost, so the probe asks again.
    path.set(Faults::default(), Faults { loss: 0.5, ..Faults::default() }, 2).await.unwrap();
    until_lost(&path, &mut ask).await;
    let error = path.set(Faults { loss: 2.0, ..Faults::default() }, Faults::default(), 1).await.unwrap_err();
    assert!(error.to_string().contains("0 to 1"), "{error}");

    path.remove().await.unwrap();
    run(&mut ask).await.unwrap();
    server.kill().await.unwrap();
    for caller in [one, other] {
        caller.remove().await.unwrap();
    }
}

/// Asks until the way has lost something that was sent from the caller.
async fn until_lost(path: &Path, ask: &mut Command) {
    let before = path.carried().await.unwrap().from;
    antiphon_e2e::until("a lost packet", Duration::from_secs(60), async || {
        run(ask).await?;
        let now = path.carried().await?.from;
        Ok((now.lost > before.lost && now.carried > before.carried).then_some(()))
    })
    .await
    .unwrap();
}
