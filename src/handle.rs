//! What operators and the shutdown of a server need.

use std::{sync::Arc, time::Duration};

use crate::{
    Consumer, IdempotencyKey, Record, RecordFilter, Resolution, ResolveOutcome, Store, StoreError,
    shared::Shared,
};

/// A handle to what an [`IdempotencyLayer`](crate::IdempotencyLayer), its clones and its services share.
///
/// ```
/// # use std::time::Duration;
/// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
/// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let layer = IdempotencyLayer::new(MemoryStore::new());
/// let handle = layer.handle();
/// // serve ... and when the server has stopped accepting:
/// handle.drain(Duration::from_secs(30)).await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct IdempotencyHandle {
    pub(crate) shared: Arc<Shared>,
}

/// Tasks were still running when the time to drain was over.
#[derive(Clone, Debug, thiserror::Error)]
#[error(
    "{running} tasks were still running after {limit:?}; what they own is taken over when their leases run out"
)]
#[non_exhaustive]
pub struct DrainTimedOut {
    /// How many.
    pub running: usize,
    /// How long was waited.
    pub limit: Duration,
}

impl IdempotencyHandle {
    pub(crate) fn new(shared: &Arc<Shared>) -> Self {
        Self { shared: Arc::clone(shared) }
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Creates or migrates the tables, unless the store was told not to, and checks that it can be trusted. Optional:
    /// the first request does the same. Returns what an operator should know.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be reached or cannot keep its contract; the message says what to do.
    pub async fn prepare(&self) -> Result<Vec<String>, StoreError> {
        self.call(|store| async move { store.prepare().await }).await
    }

    /// Refuses new requests with a key (503 `shutting-down`) and waits until the running attempts have ended and their
    /// responses are stored and the background tasks have ended too, but at most `limit`. Call it after the server has stopped
    /// accepting: a graceful shutdown alone does not wait for handlers whose client has left.
    ///
    /// # Errors
    ///
    /// [`DrainTimedOut`] if tasks were still running after `limit`.
    pub async fn drain(&self, limit: Duration) -> Result<(), DrainTimedOut> {
        let Shared { tasks, background, draining, stopped, .. } = &*self.shared;
        draining.cancel();
        tasks.close();
        background.close();
        let drained = tokio::time::timeout(limit, async {
            tasks.wait().await;
            stopped.cancel();
            background.wait().await;
        });
        let drained = drained.await;
        stopped.cancel();
        drained.map_err(|_| DrainTimedOut { running: tasks.len() + background.len(), limit })
    }

    /// Looks one record up.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn get(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<Option<Record>, StoreError> {
        let (consumer, key) = (consumer.clone(), key.clone());
        self.call(|store| async move { store.get(&consumer, &key).await }).await
    }

    /// Lists records, the oldest first, at most `limit`.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn list(&self, filter: RecordFilter, limit: u32) -> Result<Vec<Record>, StoreError> {
        self.call(|store| async move { store.list(filter, limit).await }).await
    }

    /// Deletes a record in whatever state: the next request with the key runs, even while an attempt is running.
    /// Returns whether there was one. A request that was [kept](crate::KeptRequests) for it is discarded with it.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn evict(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<bool, StoreError> {
        let (consumer, key) = (consumer.clone(), key.clone());
        let running = Arc::clone(&self.shared.running);
        self.call(|store| async move {
            let evicted = store.evict(&consumer, &key).await?;
            running.forget(&consumer, &key);
            Ok(evicted)
        })
        .await
    }

    /// Ends a record that is held or whose lease ran out, once you know what became of the request.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn resolve(
        &self,
        consumer: &Consumer,
        key: &IdempotencyKey,
        resolution: Resolution,
    ) -> Result<ResolveOutcome, StoreError> {
        let (consumer, key) = (consumer.clone(), key.clone());
        let running = Arc::clone(&self.shared.running);
        self.call(|store| async move {
            let outcome = store.resolve(&consumer, &key, resolution).await?;
            if outcome == ResolveOutcome::Resolved {
                running.forget(&consumer, &key);
            }
            Ok(outcome)
        })
        .await
    }

    /// Purges at most `limit` records that count as absent, and returns how many. The [`Reaper`](crate::Reaper) does
    /// it by itself unless it is off.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn purge(&self, limit: u32) -> Result<u64, StoreError> {
        self.call(|store| async move { store.purge(limit).await }).await
    }

    async fn call<T, F>(&self, work: impl FnOnce(Arc<dyn Store>) -> F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        self.shared.run_to_end(work(Arc::clone(&self.shared.store))).await
    }
}
