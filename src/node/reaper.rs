//! The background task that purges expired records, and intents and phases of records that are
//! gone.

use std::{
    sync::{Arc, Weak, atomic::Ordering},
    time::Duration,
};

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{Node, tasks::repeat};
use crate::{
    duration::{capped, limit},
    error::StoreError,
    metrics::{self, Purged},
    redact::TRACING_TARGET,
    retry::jittered,
};

/// The schedule by which expired records are purged in the background.
///
/// The task starts with the first request that has a key, survives errors of the store, and ends
/// when the layer is drained or dropped. It may run on many nodes simultaneously. Purging only
/// frees space: each claim decides for itself whether a record has expired.
#[derive(Clone, Debug)]
pub struct Reaper(Option<Schedule>);

#[derive(Clone, Copy, Debug)]
struct Schedule {
    interval: Duration,
    batch: u32,
    intent_retention: Duration,
}

impl Default for Reaper {
    fn default() -> Self {
        Self::every(Duration::from_secs(60), 1000)
    }
}

impl Reaper {
    /// Purges every `interval`, with a jitter of a quarter, in batches of at most `batch` records
    /// until none is left. Default: every 60 s, 1000 records.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_idempotency::Reaper;
    /// let reaper = Reaper::every(Duration::from_secs(10), 500);
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if the interval is shorter than 1 ms or the batch zero.
    #[must_use]
    #[track_caller]
    pub fn every(interval: Duration, batch: u32) -> Self {
        let interval = limit("an interval for purging", interval);
        assert!(batch > 0, "a reaper with an empty batch purges nothing: to turn it off, use Reaper::off()");
        Self(Some(Schedule { interval, batch, intent_retention: INTENT_RETENTION }))
    }

    /// Sets how long settled intents and finished phases are kept when their record is gone,
    /// counted from when they were opened or finished. They are the trace of what a request has
    /// done. Default: 90 days.
    ///
    /// Those whose record exists always stay, and so do those that are open or need attention. A
    /// reaper that is off stays off.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_idempotency::Reaper;
    /// let month = Duration::from_secs(30 * 24 * 60 * 60);
    /// let reaper = Reaper::default().with_intent_retention(month);
    /// ```
    #[must_use]
    pub fn with_intent_retention(mut self, retention: Duration) -> Self {
        if let Some(schedule) = &mut self.0 {
            schedule.intent_retention = capped(retention);
        }
        self
    }

    /// Purges nothing in the background. Have a job call
    /// [`IdempotencyHandle::purge`](crate::IdempotencyHandle::purge) and
    /// [`IdempotencyHandle::purge_settled`](crate::IdempotencyHandle::purge_settled).
    #[must_use]
    pub fn off() -> Self {
        Self(None)
    }

    /// Starts the task unless it runs.
    pub(crate) fn ensure_running(&self, node: &Arc<Node>) {
        let Some(schedule) = self.0 else { return };
        // Read before the swap: every request with a key passes here.
        if !node.reaper_runs.load(Ordering::Relaxed) && !node.reaper_runs.swap(true, Ordering::Relaxed) {
            // Made outside of the task: a runtime that shuts down may drop the task before its first poll.
            let task = PurgeTask(Arc::downgrade(node));
            node.tasks.spawn_background(task.run(schedule, node.tasks.stopped.clone()));
        }
    }
}

/// Purges records, then intents and phases, until there are none left to purge.
async fn purge_all(node: &Node, schedule: Schedule) {
    let Schedule { batch, intent_retention, .. } = schedule;
    let store = &node.store;
    purge_by(node, batch, Purged::Records, || {
        let store = Arc::clone(store);
        async move { store.purge(batch).await }
    })
    .await;
    // After the records: an intent or a phase may be purged only when its record is gone.
    let Some(recovery) = store.recovery() else { return };
    purge_by(node, batch, Purged::Settled, || {
        let recovery = Arc::clone(&recovery);
        async move { recovery.purge_settled(intent_retention, batch).await }
    })
    .await;
}

/// Purges in batches until one is not full.
async fn purge_by<F>(node: &Node, batch: u32, what: Purged, purge: impl Fn() -> F)
where
    F: Future<Output = Result<u64, StoreError>> + Send + 'static,
{
    let (mut purged, mut last) = (0, Ok(u64::from(batch)));
    while matches!(last, Ok(count) if count >= u64::from(batch)) && !node.tasks.stopped.is_cancelled() {
        last = node.tasks.run_to_end(purge()).await;
        purged += last.as_ref().copied().unwrap_or_default();
        // A store that answers without waiting would otherwise keep its thread for the whole purge.
        tokio::task::yield_now().await;
    }
    metrics::purged(what, purged);
    if purged > 0 {
        tracing::debug!(target: TRACING_TARGET, purged, ?what, "purged");
    }
    if let Err(error) = last {
        let error = &error as &dyn std::error::Error;
        tracing::warn!(
            target: TRACING_TARGET, error, ?what,
            "expired records could not be purged; trying again later"
        );
    }
}

/// The purging task. When it ends with its runtime, the next request starts another.
struct PurgeTask(Weak<Node>);

impl PurgeTask {
    async fn run(self, schedule: Schedule, stopped: CancellationToken) {
        // Nodes that start together must not purge together.
        if timeout(jittered(schedule.interval), stopped.cancelled()).await.is_ok() {
            return;
        }
        let pass = || {
            // Held during a pass only: the task must not keep a dropped layer alive.
            let node = self.0.upgrade();
            async move {
                purge_all(&*node?, schedule).await;
                Some(schedule.interval)
            }
        };
        repeat(stopped, pass).await;
    }
}

impl Drop for PurgeTask {
    fn drop(&mut self) {
        if let Some(node) = self.0.upgrade() {
            node.reaper_runs.store(false, Ordering::Relaxed);
        }
    }
}

const INTENT_RETENTION: Duration = Duration::from_secs(90 * 24 * 60 * 60);
