//! Every task has an owner, and a task that ends unexpectedly ends the process.
//!
//! [`Tasks`] is the only place that spawns. A *service* is expected to live until the stop; a plain task may end, but
//! not with an error or a panic.

use std::{future::Future, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use anyhow::{Context as _, anyhow};
use futures::FutureExt as _;
use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Owner of tasks. Clones share the same tasks.
#[derive(Clone, Debug)]
pub struct Tasks {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    tracker: TaskTracker,
    stop: CancellationToken,
    failed: mpsc::Sender<anyhow::Error>,
    // Locked by the one caller of `wait`.
    failures: tokio::sync::Mutex<mpsc::Receiver<anyhow::Error>>,
}

impl Default for Tasks {
    fn default() -> Self {
        Self::new()
    }
}

impl Tasks {
    /// How long tasks may take to end after the stop before the process goes without them.
    pub const GRACE: Duration = Duration::from_secs(10);

    /// An owner without tasks.
    #[must_use]
    pub fn new() -> Self {
        // One place is enough: the first failure decides.
        let (failed, failures) = mpsc::channel(1);
        let inner =
            Inner { tracker: TaskTracker::new(), stop: CancellationToken::new(), failed, failures: failures.into() };
        Self { inner: Arc::new(inner) }
    }

    /// Fires when the process is asked to stop; long-running tasks select on it.
    #[must_use]
    pub fn stopping(&self) -> CancellationToken {
        self.inner.stop.clone()
    }

    /// Starts a task that may end by itself, but only with success.
    pub fn spawn<F>(&self, name: &'static str, task: F)
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        self.start(name, task, false);
    }

    /// Starts a task that has to live until the stop; even an early success is a failure.
    pub fn service<F>(&self, name: &'static str, task: F)
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        self.start(name, task, true);
    }

    #[allow(clippy::disallowed_methods, reason = "the one place that spawns; the tracker owns the task")]
    fn start<F>(&self, name: &'static str, task: F, lasts: bool)
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let (stop, failed) = (self.inner.stop.clone(), self.inner.failed.clone());
        self.inner.tracker.spawn(async move {
            let outcome = match AssertUnwindSafe(task).catch_unwind().await {
                Ok(Ok(())) if lasts && !stop.is_cancelled() => Err(anyhow!("ended early")),
                Ok(result) => result,
                Err(_panic) => Err(anyhow!("panicked")),
            };
            if let Err(error) = outcome.with_context(|| format!("task {name}")) {
                tracing::error!(task = name, "{error:#}");
                // A full channel already holds an earlier failure.
                let _ = failed.try_send(error);
            }
        });
    }

    /// Runs until `stop` completes or a task fails, then stops all tasks and waits for them, [`Self::GRACE`] at most.
    ///
    /// # Errors
    /// The first failure of a task.
    pub async fn wait(&self, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
        let mut failures = self.inner.failures.lock().await;
        let mut outcome = tokio::select! {
            () = stop => Ok(()),
            failure = failures.recv() => Err(failure.unwrap_or_else(|| anyhow!("task owner is gone"))),
        };
        self.inner.stop.cancel();
        self.inner.tracker.close();
        if tokio::time::timeout(Self::GRACE, self.inner.tracker.wait()).await.is_err() {
            tracing::warn!(left = self.inner.tracker.len(), "tasks did not end in time");
        }
        if outcome.is_ok()
            && let Ok(late) = failures.try_recv()
        {
            outcome = Err(late);
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failing_task_ends_the_wait_and_stops_the_others() {
        let tasks = Tasks::new();
        let stopping = tasks.stopping();
        tasks.service("other", async move {
            stopping.cancelled().await;
            Ok(())
        });
        tasks.spawn("broken", async { Err(anyhow!("no disk")) });
        let error = tasks.wait(std::future::pending()).await.unwrap_err();
        assert_eq!(format!("{error:#}"), "task broken: no disk");
    }

    #[tokio::test]
    async fn a_panic_and_an_early_end_of_a_service_are_failures() {
        for (lasts, expected) in [(false, "task t: panicked"), (true, "task t: ended early")] {
            let tasks = Tasks::new();
            let task = async move {
                assert!(lasts, "boom");
                Ok(())
            };
            if lasts {
                tasks.service("t", task)
            } else {
                tasks.spawn("t", task)
            }
            let error = tasks.wait(std::future::pending()).await.unwrap_err();
            assert_eq!(format!("{error:#}"), expected);
        }
    }

    #[tokio::test]
    async fn stop_is_clean_when_every_task_ends() {
        let tasks = Tasks::new();
        let stopping = tasks.stopping();
        tasks.service("s", async move {
            stopping.cancelled().await;
            Ok(())
        });
        tasks.wait(std::future::ready(())).await.unwrap();
    }
}
