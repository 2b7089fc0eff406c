//! Every call that operators and the shutdown of a server need.

use std::{sync::Arc, time::Duration};

use crate::{
    consumer::Consumer,
    error::StoreError,
    jobs::IntentLog,
    key::IdempotencyKey,
    layer::IdempotencyLayer,
    node::Node,
    recovery::{Completer, CompleterPass, Reconciler, ReconcilerPass},
    redact::TRACING_TARGET,
    store::{Store, recovery::RecoveryStore},
    stored::{
        intent::{
            Intent, IntentCounts, IntentFence, IntentFilter, IntentState, IntentUpdate, Resource, UpstreamKey,
        },
        record::{Fenced, Record, RecordFilter, RecordId, Resolution, ResolveOutcome},
        request::{KeptRequest, RequestUpdate},
    },
};

/// A handle to what an [`IdempotencyLayer`], its clones and its services share.
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
    node: Arc<Node>,
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

/// What an operator has found out about an intent.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum IntentResolution {
    /// The upstream has made this resource: the next attempt gets it, without a call.
    Finalize(Resource),
    /// The upstream has refused for good, with this reason: the next attempt gets the refusal, without a call.
    Refuse(String),
    /// The upstream has not made the resource and will not: the next attempt calls again, with the same upstream key.
    Absent,
    /// Nothing yet: look it up again, at once and as often as one that was never looked up.
    LookAgain,
    /// What needed attention was attended to. For an intent that is finalized or dead.
    Acknowledge,
}

/// What became of an [`IntentResolution`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResolveIntentOutcome {
    /// It is recorded.
    Resolved,
    /// The attempt that called last owns the record with a live lease, and may be calling. Nothing was changed.
    InProgress,
    /// The intent is finalized; or it was to be looked up again and is refused; or it was to be acknowledged and needs no
    /// attention. Nothing was changed.
    AlreadySettled,
    /// The intent was to be acknowledged and is open: settle it. Nothing was changed.
    StillOpen,
    /// There is no such intent.
    Absent,
}

impl IdempotencyLayer {
    /// A handle for draining at shutdown and for operators.
    #[must_use]
    pub fn handle(&self) -> IdempotencyHandle {
        IdempotencyHandle { node: Arc::clone(self.node()) }
    }
}

impl IntentLog {
    /// A handle for draining at shutdown, for reconciling and for operators.
    #[must_use]
    pub fn handle(&self) -> IdempotencyHandle {
        IdempotencyHandle { node: Arc::clone(self.node()) }
    }
}

impl IdempotencyHandle {
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
        self.node.tasks.drain(limit).await.map_err(|running| DrainTimedOut { running, limit })
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
        let running = Arc::clone(&self.node.running);
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
        let running = Arc::clone(&self.node.running);
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

    /// A log for jobs and messages that shares the store with the layer, and is drained with it. Its settings are its own.
    #[must_use]
    pub fn intent_log(&self) -> IntentLog {
        IntentLog::over(Arc::clone(&self.node))
    }
}

/// Calls to upstream services.
impl IdempotencyHandle {
    /// Looks one intent up.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn get_intent(&self, intent: UpstreamKey) -> Result<Option<Intent>, StoreError> {
        self.recover(move |recovery| async move { recovery.get_intent(intent).await }).await
    }

    /// Lists intents, at most `limit`.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn list_intents(&self, filter: IntentFilter, limit: u32) -> Result<Vec<Intent>, StoreError> {
        self.recover(move |recovery| async move { recovery.list_intents(filter, limit).await }).await
    }

    /// Counts the intents that somebody has to look at.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn count_intents(&self) -> Result<IntentCounts, StoreError> {
        self.recover(move |recovery| async move { recovery.count_intents().await }).await
    }

    /// Settles an intent by hand, once you know what became of its call. Its record, if it was held for that alone, is
    /// claimable from then on: the client's retry runs the handler.
    ///
    /// Not while the attempt that called last owns the record with a live lease: it may be calling. What is finalized stays
    /// so.
    ///
    /// # Errors
    ///
    /// [`StoreError`]. After [`Ambiguous`](crate::store::StoreErrorKind::Ambiguous) it may be recorded;
    /// [`get_intent`](Self::get_intent) tells.
    pub async fn resolve_intent(
        &self,
        intent: UpstreamKey,
        resolution: IntentResolution,
    ) -> Result<ResolveIntentOutcome, StoreError> {
        self.recover(move |recovery| async move { resolve_intent(&*recovery, intent, resolution).await })
            .await
    }

    /// Deletes settled intents and finished phases that are older than `retention` and whose record is gone, and kept
    /// requests that are not needed any more; of each at most `limit`. Returns how many. The [`Reaper`](crate::Reaper) does it
    /// by itself unless it is off.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn purge_settled(&self, retention: Duration, limit: u32) -> Result<u64, StoreError> {
        self.recover(move |recovery| async move { recovery.purge_settled(retention, limit).await }).await
    }

    /// Starts a task that looks up what became of dangling intents: at once, and then in the reconciler's interval. It
    /// survives errors of the store and of the look-ups. It ends when the layer is drained, after the look-ups that are under
    /// way, or dropped.
    ///
    /// # Errors
    ///
    /// [`Misconfigured`](crate::store::StoreErrorKind::Misconfigured) if the store keeps no intents.
    ///
    /// # Panics
    ///
    /// Outside of a Tokio runtime.
    pub fn start_reconciler(&self, reconciler: Reconciler) -> Result<(), StoreError> {
        self.node.recovery()?;
        self.node.tasks.spawn_background(reconciler.run(Arc::downgrade(&self.node)));
        Ok(())
    }

    /// One pass of a reconciler, for jobs and tests: takes intents that are due until there are none, and looks each of
    /// them up. After [`drain`](Self::drain) it begins no look-up any more.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if intents could not be taken; what was looked up before that is recorded.
    pub async fn reconcile(&self, reconciler: &Reconciler) -> Result<ReconcilerPass, StoreError> {
        let (node, reconciler) = (Arc::clone(&self.node), reconciler.clone());
        self.node.tasks.in_background(async move { reconciler.pass(&node).await }).await
    }
}

/// Abandoned requests.
impl IdempotencyHandle {
    /// Starts a task that sends abandoned requests again: at once, and then in the completer's interval. It survives errors
    /// of the store, and errors and panics of the application and of [`Restore`](crate::Restore). Any number of nodes may
    /// do so at once.
    ///
    /// It ends when the layer is [drained](Self::drain), after the requests that are under way, and not when the layer is
    /// dropped: the completer has the application, and the application has the layer.
    ///
    /// # Errors
    ///
    /// [`Misconfigured`](crate::store::StoreErrorKind::Misconfigured) if the store keeps no requests.
    ///
    /// # Panics
    ///
    /// Outside of a Tokio runtime.
    pub fn start_completer(&self, completer: Completer) -> Result<(), StoreError> {
        self.node.recovery()?;
        self.node.tasks.spawn_background(completer.run(Arc::clone(&self.node)));
        Ok(())
    }

    /// Looks once for abandoned requests, at most a [batch](Completer::with_batch), and sends them. For jobs; where
    /// [`start_completer`](Self::start_completer) was called it is not needed. After [`drain`](Self::drain) it sends none.
    /// It goes on to its end when its future is dropped.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the store could not be asked for them, or not for all of them.
    pub async fn complete_abandoned(&self, completer: &Completer) -> Result<CompleterPass, StoreError> {
        let (node, completer) = (Arc::clone(&self.node), completer.clone());
        self.node.tasks.in_background(async move { completer.pass(&node).await }).await
    }

    /// Lists the kept requests that wait for an operator, at most `limit`: each says
    /// [why](KeptRequest::attention).
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn list_requests(&self, limit: u32) -> Result<Vec<KeptRequest>, StoreError> {
        let recovery = self.node.recovery()?;
        self.node.tasks.run_to_end(async move { recovery.list_requests(limit).await }).await
    }

    /// Has a kept request that waits for an operator sent again, once what stood in its way is put right. Its tries begin
    /// anew. Returns whether there is such a request.
    ///
    /// [`evict`](Self::evict) discards a request together with its record.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn send_again(&self, record: RecordId) -> Result<bool, StoreError> {
        let recovery = self.node.recovery()?;
        let update = RequestUpdate::SendAgain { after: Duration::ZERO, tried: false };
        let work = async move { recovery.update_request(record, None, &update).await };
        Ok(self.node.tasks.run_to_end(work).await? == Fenced::Applied)
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

async fn resolve_intent(
    recovery: &dyn RecoveryStore,
    intent: UpstreamKey,
    resolution: IntentResolution,
) -> Result<ResolveIntentOutcome, StoreError> {
    let acknowledged = resolution == IntentResolution::Acknowledge;
    let (fence, update) = match resolution {
        IntentResolution::Finalize(resource) => (IntentFence::Operator, IntentUpdate::Finalize(resource)),
        IntentResolution::Refuse(reason) => (IntentFence::Operator, IntentUpdate::Refuse(reason)),
        IntentResolution::Absent => (IntentFence::Operator, IntentUpdate::Absent(None)),
        IntentResolution::LookAgain => {
            (IntentFence::Operator, IntentUpdate::LookAgain { after: Duration::ZERO, absences: 0 })
        }
        IntentResolution::Acknowledge => (IntentFence::Attention, IntentUpdate::Close),
    };
    if recovery.update_intent(intent, fence, &update, None).await? == Fenced::Applied {
        tracing::info!(target: TRACING_TARGET, upstream_key = %intent, ?update, "an operator has resolved an intent");
        return Ok(ResolveIntentOutcome::Resolved);
    }
    let found = recovery.get_intent(intent).await?;
    Ok(match found.map(|found| found.state) {
        None => ResolveIntentOutcome::Absent,
        Some(IntentState::Finalized(_) | IntentState::Dead { absent: false, .. }) => {
            ResolveIntentOutcome::AlreadySettled
        }
        Some(IntentState::Open { .. }) if acknowledged => ResolveIntentOutcome::StillOpen,
        Some(IntentState::Dead { .. }) if acknowledged => ResolveIntentOutcome::AlreadySettled,
        Some(IntentState::Open { .. } | IntentState::Dead { .. }) => ResolveIntentOutcome::InProgress,
    })
}
