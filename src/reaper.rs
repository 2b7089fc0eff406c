//! Purges records that count as absent, and what has hung on records that are gone.

use std::{
    sync::{Arc, Weak, atomic::Ordering},
    time::Duration,
};

use crate::{
    StoreError, TRACING_TARGET,
    backoff::jittered,
    metrics::{self, Purged},
    shared::Shared,
};

/// Whether and how often expired records are purged in the background.
///
/// The task starts with the first request that has a key, survives errors of the store, may run on many nodes at once
/// and ends when the layer is drained or dropped. Purging frees space only: whether a record has expired is decided by
/// each claim itself.
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
    /// Purges every `interval`, with a jitter of a quarter, in batches of at most `batch` records until none is left.
    /// Default: every 60 s, 1000 records.
    ///
    /// # Panics
    ///
    /// If one of them is zero.
    #[must_use]
    #[track_caller]
    pub fn every(interval: Duration, batch: u32) -> Self {
        assert!(
            !interval.is_zero() && batch > 0,
            "a reaper needs an interval and a batch above zero; or use Reaper::off()"
        );
        Self(Some(Schedule { interval, batch, intent_retention: INTENT_RETENTION }))
    }

    /// For how long settled intents and finished phases whose record is gone are kept, counted from when they were opened or
    /// finished: they tell what was done in the name of a request. Those whose record is there always stay, and so do those
    /// that are open or need attention. Default: 90 days.
    ///
    /// A reaper that is off stays so.
    #[must_use]
    pub fn with_intent_retention(mut self, retention: Duration) -> Self {
        if let Some(schedule) = &mut self.0 {
            schedule.intent_retention = retention;
        }
        self
    }

    /// Purges nothing by itself: a job calls [`IdempotencyHandle::purge`](crate::IdempotencyHandle::purge) and
    /// [`IdempotencyHandle::purge_settled`](crate::IdempotencyHandle::purge_settled).
    #[must_use]
    pub fn off() -> Self {
        Self(None)
    }

    /// Starts the task unless it runs.
    pub(crate) fn ensure_running(&self, shared: &Arc<Shared>) {
        let Some(schedule) = self.0 else { return };
        if !shared.reaper_runs.load(Ordering::Relaxed) && !shared.reaper_runs.swap(true, Ordering::Relaxed) {
            // Made here, because a runtime that goes down may drop the task before it has begun.
            let alive = Alive(Arc::downgrade(shared));
            shared.background.spawn(alive.run(schedule));
        }
    }
}

async fn purge_all(shared: &Shared, schedule: Schedule) {
    let Schedule { batch, intent_retention, .. } = schedule;
    let store = &shared.store;
    purge_by(shared, batch, Purged::Records, || {
        let store = Arc::clone(store);
        async move { store.purge(batch).await }
    })
    .await;
    // After the records, on which intents and phases hang.
    let Some(recovery) = store.recovery() else { return };
    purge_by(shared, batch, Purged::Settled, || {
        let recovery = Arc::clone(&recovery);
        async move { recovery.purge_settled(intent_retention, batch).await }
    })
    .await;
}

/// Purges in batches until there is nothing left.
async fn purge_by<F>(shared: &Shared, batch: u32, what: Purged, purge: impl Fn() -> F)
where
    F: Future<Output = Result<u64, StoreError>> + Send + 'static,
{
    let mut purged = 0;
    while !shared.stopped.is_cancelled() {
        match shared.run_to_end(purge()).await {
            Ok(count) => {
                purged += count;
                if count < u64::from(batch) {
                    break;
                }
            }
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(target: TRACING_TARGET, error, "what has expired could not be purged; trying again later");
                break;
            }
        }
        tokio::task::yield_now().await;
    }
    metrics::purged(what, purged);
    if purged > 0 {
        tracing::debug!(target: TRACING_TARGET, purged, ?what, "purged");
    }
}

/// The task. When it ends with its runtime, the next request starts another.
struct Alive(Weak<Shared>);

impl Alive {
    async fn run(self, schedule: Schedule) {
        while let Some(stopped) = self.0.upgrade().map(|shared| shared.stopped.clone()) {
            if tokio::time::timeout(jittered(schedule.interval), stopped.cancelled()).await.is_ok() {
                return;
            }
            if let Some(shared) = self.0.upgrade() {
                purge_all(&shared, schedule).await;
            }
        }
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        if let Some(shared) = self.0.upgrade() {
            shared.reaper_runs.store(false, Ordering::Relaxed);
        }
    }
}

const INTENT_RETENTION: Duration = Duration::from_secs(90 * 24 * 60 * 60);
