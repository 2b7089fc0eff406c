//! Every call that operators and the shutdown of a server need.

mod resolution;

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;

use self::resolution::resolve_intent;
pub use self::resolution::{IntentResolution, ResolveIntentOutcome};
use crate::{
    consumer::Consumer,
    error::StoreError,
    jobs::IntentLog,
    key::IdempotencyKey,
    layer::IdempotencyLayer,
    node::{Node, tasks::end_of},
    recovery::{Completer, CompleterPass, Reconciler, ReconcilerPass},
    redact::TRACING_TARGET,
    store::{Store, recovery::RecoveryStore},
    stored::{
        intent::{Intent, IntentCounts, IntentFilter, UpstreamKey},
        record::{Fenced, Record, RecordFilter, RecordId, Resolution, ResolveOutcome},
        request::{KeptRequest, RequestUpdate},
    },
};

/// The calls of operators and of the shutdown, over the state that an [`IdempotencyLayer`], its
/// clones and its services share.
///
/// Handles are cheap to clone. A call to the store runs to its end, even if its future is dropped.
///
/// ```
/// # use std::time::Duration;
/// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
/// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let layer = IdempotencyLayer::new(MemoryStore::new());
/// let handle = layer.handle();
/// // serve ... and after the server has stopped accepting:
/// handle.drain(Duration::from_secs(30)).await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct IdempotencyHandle {
    node: Arc<Node>,
}

/// Tasks were still running when the time to drain was over.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{running} tasks still ran after {limit:?}; their records are taken over when the leases run out")]
#[non_exhaustive]
pub struct DrainTimedOut {
    /// The number of tasks.
    pub running: usize,
    /// The time that was waited.
    pub limit: Duration,
}

impl IdempotencyLayer {
    /// Returns the handle for operators and for draining at shutdown.
    #[must_use]
    pub fn handle(&self) -> IdempotencyHandle {
        IdempotencyHandle { node: Arc::clone(self.node()) }
    }
}

impl IntentLog {
    /// Returns the handle for operators, for reconciling and for draining at shutdown.
    #[must_use]
    pub fn handle(&self) -> IdempotencyHandle {
        IdempotencyHandle { node: Arc::clone(self.node()) }
    }
}

impl IdempotencyHandle {
    /// Prepares the store: creates or migrates its tables unless it was told not to, and checks
    /// that it can be trusted. The first request does the same.
    ///
    /// Returns what an operator should know, one sentence each. Call it at start-up, so that a
    /// wrong set-up does not wait for the first request to show.
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyHandle, StoreError};
    /// # async fn start(handle: IdempotencyHandle) -> Result<(), StoreError> {
    /// for warning in handle.prepare().await? {
    ///     eprintln!("idempotency: {warning}");
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store cannot be reached or cannot keep its contract; the message says
    /// what to do.
    pub async fn prepare(&self) -> Result<Vec<String>, StoreError> {
        self.call(|store| async move { store.prepare().await }).await
    }

    /// Refuses new requests with a key (503 `shutting-down`), and waits at most `limit` until all
    /// work has ended: running attempts, the storing of their responses, background tasks. Then it
    /// closes the store's own connections, as [`close`](Self::close) does.
    ///
    /// Call it after the server has stopped accepting. A graceful shutdown of the server alone does
    /// not wait for handlers whose client has disconnected.
    ///
    /// # Errors
    ///
    /// [`DrainTimedOut`] if tasks were still running after `limit`. Their records are taken over
    /// when their leases run out.
    pub async fn drain(&self, limit: Duration) -> Result<(), DrainTimedOut> {
        let drained = self.node.tasks.drain(limit).await;
        // Also after the limit. Connections that are in use close when their calls have ended.
        let _ = timeout(CLOSE_LIMIT, self.node.store.close()).await;
        drained.map_err(|running| DrainTimedOut { running, limit })
    }

    /// Refuses new requests with a key (503 `shutting-down`), ends the background tasks, and closes
    /// the store's own connections. Does not wait for running attempts: use [`drain`](Self::drain)
    /// for a server that has served requests, and this call at the end of a test or of a job.
    ///
    /// The pool that the store was given stays open. A later call of this handle, or of another
    /// layer over the same store, opens connections again.
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// # #[tokio::main] async fn main() {
    /// let handle = IdempotencyLayer::new(MemoryStore::new()).handle();
    /// handle.close().await;
    /// # }
    /// ```
    pub async fn close(&self) {
        // Running attempts are left alone, so that it does not matter whether there are any.
        let _ = self.drain(Duration::ZERO).await;
    }

    /// Looks up one record, expired or not.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store could not be read.
    pub async fn get(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<Option<Record>, StoreError> {
        let (consumer, key) = (consumer.clone(), key.clone());
        self.call(|store| async move { store.get(&consumer, &key).await }).await
    }

    /// Lists records, the oldest first, at most `limit`.
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyHandle, StoreError, store::RecordFilter};
    /// # async fn show(handle: IdempotencyHandle) -> Result<(), StoreError> {
    /// for record in handle.list(RecordFilter::Held, 100).await? {
    ///     println!("{} of {} is held", record.key, record.consumer);
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store could not be read.
    pub async fn list(&self, filter: RecordFilter, limit: u32) -> Result<Vec<Record>, StoreError> {
        self.call(|store| async move { store.list(filter, limit).await }).await
    }

    /// Deletes a record in any state, together with its
    /// [kept request](crate::recovery::KeptRequests). Returns `true` if there was one.
    ///
    /// Use it with care: the next request with the key runs the handler, even if an attempt is
    /// running at the same time. Another process may replay a completed record for as long as its
    /// [`ReplayCache`](crate::ReplayCache) holds it.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; the record may be deleted. Calling again is harmless.
    pub async fn evict(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<bool, StoreError> {
        let (consumer, key) = (consumer.clone(), key.clone());
        let (node, keys) = (Arc::clone(&self.node), self.node.key_logging());
        self.call(|store| async move {
            let evicted = store.evict(&consumer, &key).await?;
            // Not before: while the record exists, a duplicate must not pass beside its attempt.
            node.forget(&consumer, &key);
            if evicted {
                let key = keys.shown(&key);
                tracing::info!(target: TRACING_TARGET, %consumer, %key, "an operator has evicted a record");
            }
            Ok(evicted)
        })
        .await
    }

    /// Ends a record that is held or whose lease ran out.
    ///
    /// Find out first whether the request was performed. A wrong [`Release`](Resolution::Release)
    /// performs it twice.
    ///
    /// ```
    /// # use tower_idempotency::{Consumer, IdempotencyHandle, IdempotencyKey, StoreError};
    /// # use tower_idempotency::store::Resolution;
    /// # async fn release(
    /// #     handle: IdempotencyHandle, consumer: Consumer, key: IdempotencyKey,
    /// # ) -> Result<(), StoreError> {
    /// let outcome = handle.resolve(&consumer, &key, Resolution::Release).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`StoreError`]; the record may be resolved, and [`get`](Self::get) tells.
    pub async fn resolve(
        &self,
        consumer: &Consumer,
        key: &IdempotencyKey,
        resolution: Resolution,
    ) -> Result<ResolveOutcome, StoreError> {
        let (consumer, key) = (consumer.clone(), key.clone());
        let (node, keys) = (Arc::clone(&self.node), self.node.key_logging());
        let shown = match resolution {
            Resolution::Release => "released",
            Resolution::Complete(_) => "completed",
        };
        self.call(|store| async move {
            let outcome = store.resolve(&consumer, &key, resolution).await?;
            // Not after other outcomes: the attempt of the record may still be running.
            if outcome == ResolveOutcome::Resolved {
                node.forget(&consumer, &key);
                let key = keys.shown(&key);
                tracing::info!(
                    target: TRACING_TARGET, %consumer, %key, resolution = shown,
                    "an operator has resolved a record"
                );
            }
            Ok(outcome)
        })
        .await
    }

    /// Deletes at most `limit` records that count as absent, and returns their number.
    ///
    /// The [`Reaper`](crate::Reaper) does this in the background unless it is off.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; some records may be deleted.
    pub async fn purge(&self, limit: u32) -> Result<u64, StoreError> {
        self.call(|store| async move { store.purge(limit).await }).await
    }

    /// Makes a log for jobs over the same store. It has its own settings and drains with the layer.
    #[must_use]
    pub fn intent_log(&self) -> IntentLog {
        IntentLog::over(Arc::clone(&self.node))
    }
}

/// Calls to upstream services.
impl IdempotencyHandle {
    /// Looks up one intent.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store could not be read or keeps no intents.
    pub async fn get_intent(&self, intent: UpstreamKey) -> Result<Option<Intent>, StoreError> {
        self.recover(move |recovery| async move { recovery.get_intent(intent).await }).await
    }

    /// Lists intents, at most `limit`.
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyHandle, StoreError, intent::IntentFilter};
    /// # async fn show(handle: IdempotencyHandle) -> Result<(), StoreError> {
    /// for intent in handle.list_intents(IntentFilter::NeedsAttention, 100).await? {
    ///     println!("{} {}: {:?}", intent.name, intent.upstream_key, intent.attention);
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store could not be read or keeps no intents.
    pub async fn list_intents(&self, filter: IntentFilter, limit: u32) -> Result<Vec<Intent>, StoreError> {
        self.recover(move |recovery| async move { recovery.list_intents(filter, limit).await }).await
    }

    /// Counts the intents that are not settled or that need attention.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store could not be read or keeps no intents.
    pub async fn count_intents(&self) -> Result<IntentCounts, StoreError> {
        self.recover(move |recovery| async move { recovery.count_intents().await }).await
    }

    /// Settles an intent by hand.
    ///
    /// Find out first whether its call arrived. A wrong [`Absent`](IntentResolution::Absent) calls
    /// twice. If the record was held only for this intent, it is claimable from then on, and the
    /// client's retry runs the handler.
    ///
    /// Nothing is changed while the attempt that called last owns the record with a live lease,
    /// because it may be calling. A finalized intent stays finalized.
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyHandle, Resource, StoreError, UpstreamKey};
    /// # use tower_idempotency::intent::IntentResolution;
    /// # async fn settle(handle: IdempotencyHandle, key: UpstreamKey) -> Result<(), StoreError> {
    /// let found = IntentResolution::Finalize(Resource::new("ch_123"));
    /// let outcome = handle.resolve_intent(key, found).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`StoreError`]. After [`Ambiguous`](crate::store::StoreErrorKind::Ambiguous) it may be
    /// recorded; [`get_intent`](Self::get_intent) tells.
    pub async fn resolve_intent(
        &self,
        intent: UpstreamKey,
        resolution: IntentResolution,
    ) -> Result<ResolveIntentOutcome, StoreError> {
        let keys = self.node.key_logging();
        self.recover(
            move |recovery| async move { resolve_intent(&*recovery, intent, resolution, keys).await },
        )
        .await
    }

    /// Deletes at most `limit` each of settled intents and finished phases that are older than
    /// `retention` and whose record is gone, and of kept requests whose record is completed or
    /// gone. Returns their number.
    ///
    /// The [`Reaper`](crate::Reaper) does this in the background unless it is off.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; some rows may be deleted.
    pub async fn purge_settled(&self, retention: Duration, limit: u32) -> Result<u64, StoreError> {
        self.recover(move |recovery| async move { recovery.purge_settled(retention, limit).await }).await
    }

    /// Starts a background task that looks up dangling intents, immediately and then in the
    /// reconciler's interval.
    ///
    /// It continues after errors of the store and of the look-ups. It ends when the layer is
    /// drained, after the look-ups that are running, or when the layer is dropped.
    ///
    /// # Errors
    ///
    /// [`Misconfigured`](crate::store::StoreErrorKind::Misconfigured) if the store keeps no
    /// intents, or if the reconciler has [no look-up](Reconciler::on).
    ///
    /// # Panics
    ///
    /// Panics outside of a Tokio runtime.
    pub fn start_reconciler(&self, reconciler: Reconciler) -> Result<(), StoreError> {
        self.node.recovery()?;
        self.node.lookups.register(reconciler.names()?);
        // A weak reference, so that the task does not keep a dropped layer alive.
        self.node.tasks.spawn_background(reconciler.run(Arc::downgrade(&self.node)));
        Ok(())
    }

    /// Runs one pass of a reconciler, for jobs and tests: takes intents that are due until there
    /// are none, and looks each of them up.
    ///
    /// After [`drain`](Self::drain) it begins no look-up.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if intents could not be taken, or if the reconciler has [no
    /// look-up](Reconciler::on). Earlier look-ups of the pass are recorded.
    pub async fn reconcile(&self, reconciler: &Reconciler) -> Result<ReconcilerPass, StoreError> {
        let (node, reconciler) = (Arc::clone(&self.node), reconciler.clone());
        end_of(self.node.tasks.spawn_background(async move { reconciler.pass(&node).await })).await
    }
}

/// Abandoned requests.
impl IdempotencyHandle {
    /// Starts a background task that sends abandoned requests again, immediately and then in the
    /// completer's interval.
    ///
    /// It continues after errors of the store, and after errors and panics of the application and
    /// of [`Restore`](crate::recovery::Restore). Many nodes may run one simultaneously.
    ///
    /// It ends when the layer is [drained](Self::drain), after the requests that are under way. It
    /// does not end when the layer is dropped, because the completer has the application, and the
    /// application has the layer.
    ///
    /// # Errors
    ///
    /// [`Misconfigured`](crate::store::StoreErrorKind::Misconfigured) if the store keeps no
    /// requests.
    ///
    /// # Panics
    ///
    /// Panics outside of a Tokio runtime.
    pub fn start_completer(&self, completer: Completer) -> Result<(), StoreError> {
        self.node.recovery()?;
        self.node.tasks.spawn_background(completer.run(Arc::clone(&self.node)));
        Ok(())
    }

    /// Runs one pass of a completer, for jobs: takes abandoned requests, at most a
    /// [batch](Completer::with_batch), and sends them.
    ///
    /// It is not needed beside [`start_completer`](Self::start_completer). After
    /// [`drain`](Self::drain) it sends none.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if requests could not be taken. Those that were taken before are sent.
    pub async fn complete_abandoned(&self, completer: &Completer) -> Result<CompleterPass, StoreError> {
        let (node, completer) = (Arc::clone(&self.node), completer.clone());
        end_of(self.node.tasks.spawn_background(async move { completer.pass(&node).await })).await
    }

    /// Lists the kept requests that wait for an operator, at most `limit`. Each gives the
    /// [reason](KeptRequest::attention).
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store could not be read or keeps no requests.
    pub async fn list_requests(&self, limit: u32) -> Result<Vec<KeptRequest>, StoreError> {
        self.recover(move |recovery| async move { recovery.list_requests(limit).await }).await
    }

    /// Lets a kept request that waits for an operator be sent again by the completer. Returns
    /// `true` if there is such a request.
    ///
    /// Call it after the cause is removed. Its tries are counted from zero. To discard the request
    /// instead, [`evict`](Self::evict) its record.
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyHandle, StoreError};
    /// # async fn again(handle: IdempotencyHandle) -> Result<(), StoreError> {
    /// for request in handle.list_requests(100).await? {
    ///     println!("{:?}", request.attention);
    ///     handle.send_again(request.record_id).await?;
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`StoreError`]; the change may be recorded.
    pub async fn send_again(&self, record: RecordId) -> Result<bool, StoreError> {
        let update = RequestUpdate::SendAgain { after: Duration::ZERO, tried: false };
        let sent =
            self.recover(move |recovery| async move { recovery.update_request(record, None, &update).await });
        let applied = sent.await? == Fenced::Applied;
        if applied {
            tracing::info!(
                target: TRACING_TARGET, %record,
                "an operator has an abandoned request sent again"
            );
        }
        Ok(applied)
    }
}

impl IdempotencyHandle {
    async fn call<T, F>(&self, work: impl FnOnce(Arc<dyn Store>) -> F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        self.node.tasks.run_to_end(work(Arc::clone(&self.node.store))).await
    }

    async fn recover<T, F>(&self, work: impl FnOnce(Arc<dyn RecoveryStore>) -> F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        let recovery = self.node.recovery()?;
        self.node.tasks.run_to_end(work(recovery)).await
    }
}

/// The time in which the store closes its connections while it is waited for.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);
