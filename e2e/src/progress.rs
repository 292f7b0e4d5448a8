//! What people see of things that take long.

use std::{future::Future, time::Duration};

use anyhow::Result;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

/// Says on the standard error what is being done once it takes longer than a second, how long it has been at it now and
/// then, and when it is done.
///
/// # Errors
/// Those of what is done.
pub(crate) async fn step<T>(what: &str, doing: impl Future<Output = Result<T>>) -> Result<T> {
    let begin = Instant::now();
    let mut tick = interval_at(begin + FIRST, EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tokio::pin!(doing);
    let mut said = false;
    loop {
        tokio::select! {
            result = &mut doing => {
                if said {
                    let verdict = if result.is_ok() { "done" } else { "failed" };
                    eprintln!("{what}: {verdict} after {:.1} s", begin.elapsed().as_secs_f64());
                }
                return result;
            }
            _ = tick.tick() => {
                match said {
                    false => eprintln!("{what} …"),
                    true => eprintln!("{what}: {:.0} s so far", begin.elapsed().as_secs_f64()),
                }
                said = true;
            }
        }
    }
}

const FIRST: Duration = Duration::from_secs(1);
const EVERY: Duration = Duration::from_secs(15);
