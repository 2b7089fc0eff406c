//! Intents and phases outside HTTP: jobs and consumers of messages.

mod attempt;
mod error;

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use serde::Serialize;
use tokio::time::Instant;

pub use self::{attempt::LogAttempt, error::IntentLogError};
use crate::{
    attempt::{
        Ownership, Won,
        settings::{AttemptSettings, TransactionOptions, checked_lease},
    },
    consumer::Consumer,
    duration::{capped, limit},
    fingerprint::Fingerprint,
    key::IdempotencyKey,
    node::{Node, reaper::Reaper},
    policy::AbandonedAttempts,
    redact::Length,
    store::IntoStore,
    stored::{
        codec::Codec,
        record::{Attempt, Claim, ClaimOutcome, Record, RecordState},
        response::{StoredBody, StoredResponse, UnreadableResponse},
    },
};

/// Performs a job or a message once, as the layer performs a request. It keeps its records in the
/// store of an [`IdempotencyLayer`](crate::IdempotencyLayer) or in one of its own, with the same
/// rules. Keys share one name space with those of requests.
///
/// An attempt whose process died is taken over once its lease has run out. The new attempt has the
/// same [record id](crate::Idempotency::record_id), so that finalized
/// [intents](crate::Idempotency::intent) and finished phases are not repeated. A stored result is
/// never worked out again.
///
/// ```
/// # #[cfg(feature = "sqlite")] {
/// # use tower_idempotency::{CallFailure, UpstreamKey};
/// # async fn transfer(key: UpstreamKey) -> Result<String, CallFailure> { todo!() }
/// use tower_idempotency::{Consumer, IdempotencyKey, IntentLog, Resource, jobs::LogOutcome};
///
/// # async fn consume(pool: sqlx::SqlitePool) -> Result<(), Box<dyn std::error::Error>> {
/// let log = IntentLog::new(pool);
/// let (queue, message) = (Consumer::new("queue:payouts")?, IdempotencyKey::new("message-17")?);
/// match log.attempt(&queue, &message, &("DE02", 1000)).await? {
///     LogOutcome::Run(attempt) => {
///         let call = attempt.idempotency().intent("bank.transfer");
///         let sent = call.call(async |key| transfer(key).await.map(Resource::from)).await?;
///         attempt.complete(sent.id).await?;
///     }
///     LogOutcome::Completed(_) => {}
///     other => return Err(format!("not now: {other:?}").into()),
/// }
/// // acknowledge the message
/// # Ok(()) }
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct IntentLog {
    node: Arc<Node>,
    settings: Arc<AttemptSettings>,
    reaper: Reaper,
}

/// The answer to the question for an attempt: what there is to do.
#[expect(clippy::exhaustive_enums, reason = "a caller must handle every one")]
pub enum LogOutcome {
    /// Do the work, as this attempt.
    Run(LogAttempt),
    /// Nothing: the work is done, and this is its result.
    Completed(Bytes),
    /// Nothing yet: another attempt is running. Ask again later.
    InProgress,
    /// Nothing: the outcome of an earlier attempt is unknown. The work is not done again before an
    /// intent is reconciled or an operator resolves the record.
    Held,
    /// Nothing: the key was used with other arguments, or by a request.
    OtherArguments,
}

/// Shows the length of a result, and nothing of its content.
impl fmt::Debug for LogOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Run(attempt) => f.debug_tuple("Run").field(attempt).finish(),
            Self::Completed(result) => f.debug_tuple("Completed").field(&Length(result)).finish(),
            Self::InProgress => f.write_str("InProgress"),
            Self::Held => f.write_str("Held"),
            Self::OtherArguments => f.write_str("OtherArguments"),
        }
    }
}

impl IntentLog {
    /// A log over a store, or over a pool of connections of which a store is made.
    #[must_use]
    pub fn new(store: impl IntoStore) -> Self {
        Self::over(Node::new(store.into_store()))
    }

    pub(crate) fn over(node: Arc<Node>) -> Self {
        Self { node, settings: Arc::default(), reaper: Reaper::default() }
    }

    pub(crate) fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Sets the lease: how long an attempt owns its record without renewing. It is renewed every
    /// third of that. Default: 30 s.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use std::time::Duration;
    /// # use tower_idempotency::{IntentLog, MemoryStore};
    /// let log = IntentLog::new(MemoryStore::new()).with_lease(Duration::from_secs(10));
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// If it is shorter than 100 ms. When the log is used, if it is longer than the retention
    /// allows.
    #[must_use]
    #[track_caller]
    pub fn with_lease(self, lease: Duration) -> Self {
        let lease = checked_lease(lease);
        self.set(|settings| settings.timing.lease = lease)
    }

    /// Limits how long an attempt is renewed. After nine tenths of it the attempt is
    /// [told](crate::Idempotency::cancelled). After all of it, once the lease has run out, another
    /// attempt may take over. Default: 10 min.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use std::time::Duration;
    /// # use tower_idempotency::{IntentLog, MemoryStore};
    /// let log = IntentLog::new(MemoryStore::new()).with_max_execution(Duration::from_secs(3600));
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// If it is shorter than 1 ms. When the log is used, if it is longer than the retention allows.
    #[must_use]
    #[track_caller]
    pub fn with_max_execution(self, max_execution: Duration) -> Self {
        let max_execution = limit("max_execution", max_execution);
        self.set(|settings| settings.timing.max_execution = max_execution)
    }

    /// Sets the retention: how long a record is kept, counted from its first attempt. After that
    /// the key counts as new. Default: 24 h.
    ///
    /// A result that is stored after the retention is over is kept for another retention. So is
    /// what intents and phases have done in an attempt that may run past it.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use std::time::Duration;
    /// # use tower_idempotency::{IntentLog, MemoryStore};
    /// let week = Duration::from_secs(7 * 24 * 60 * 60);
    /// let log = IntentLog::new(MemoryStore::new()).with_retention(week);
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// When the log is used, if it is shorter than `max_execution` and lease together.
    #[must_use]
    pub fn with_retention(self, retention: Duration) -> Self {
        self.set(|settings| settings.timing.retention = capped(retention))
    }

    /// Sets what becomes of a record whose attempt ended without a result: its process died, or its
    /// [`LogAttempt`] was dropped. Default: [`AbandonedAttempts::RunAgain`].
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use tower_idempotency::{IntentLog, MemoryStore, layer::AbandonedAttempts};
    /// let log = IntentLog::new(MemoryStore::new()).with_abandoned(AbandonedAttempts::Hold);
    /// # }
    /// ```
    #[must_use]
    pub fn with_abandoned(self, abandoned: AbandonedAttempts) -> Self {
        self.set(|settings| settings.abandoned = abandoned)
    }

    /// Limits how long the store may take to answer, to at most three quarters of the lease.
    /// Default: 5 s.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use std::time::Duration;
    /// # use tower_idempotency::{IntentLog, MemoryStore};
    /// let log = IntentLog::new(MemoryStore::new()).with_store_timeout(Duration::from_secs(2));
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// If it is shorter than 1 ms.
    #[must_use]
    #[track_caller]
    pub fn with_store_timeout(self, timeout: Duration) -> Self {
        let timeout = limit("a store time-out", timeout);
        self.set(|settings| settings.store_timeout = timeout)
    }

    /// Sets how expired records are purged. Default: [`Reaper::default`], every minute. One task
    /// serves all logs and layers that share a store, with the settings of the one that is used
    /// first.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use tower_idempotency::{IntentLog, MemoryStore, Reaper};
    /// let log = IntentLog::new(MemoryStore::new()).with_reaper(Reaper::off());
    /// # }
    /// ```
    #[must_use]
    pub fn with_reaper(self, reaper: Reaper) -> Self {
        Self { reaper, ..self }
    }

    /// Sets how the transactions of phases are begun and ended. Default:
    /// [`TransactionOptions::default`].
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use tower_idempotency::{
    /// #     IntentLog, MemoryStore, TransactionOptions, store::IsolationLevel,
    /// # };
    /// let options = TransactionOptions::default().with_isolation(IsolationLevel::Serializable);
    /// let log = IntentLog::new(MemoryStore::new()).with_transactions(options);
    /// # }
    /// ```
    #[must_use]
    pub fn with_transactions(self, options: TransactionOptions) -> Self {
        self.set(|settings| settings.transactions = options)
    }

    fn set(mut self, change: impl FnOnce(&mut AttemptSettings)) -> Self {
        change(Arc::make_mut(&mut self.settings));
        self
    }

    /// Begins an attempt at what `consumer` calls `key`, or says immediately why there is nothing
    /// to do.
    ///
    /// `arguments` are what the work is done with. They are compared as JSON: a digest of them is
    /// stored, and the key cannot be used with others.
    ///
    /// # Errors
    ///
    /// [`IntentLogError`]. Nothing runs. If the key was claimed before the store failed, it is
    /// given back.
    ///
    /// # Panics
    ///
    /// If settings contradict each other. They are compared here, so that the order in which they
    /// are set does not matter.
    pub async fn attempt(
        &self,
        consumer: &Consumer,
        key: &IdempotencyKey,
        arguments: &(impl Serialize + ?Sized),
    ) -> Result<LogOutcome, IntentLogError> {
        self.settings.timing.check();
        if self.node.tasks.is_draining() {
            return Err(IntentLogError::ShuttingDown);
        }
        let fingerprint = Fingerprint::of_arguments(arguments).ok_or(IntentLogError::Arguments)?;
        self.reaper.ensure_running(&self.node);
        let claim = self.settings.new_claim(Attempt::new(consumer.clone(), key.clone()), fingerprint);
        // In a task: if the caller has gone when the key is won, the attempt is dropped and so
        // given back.
        let this = self.clone();
        match self.node.tasks.run_to_end(async move { Ok(this.begin(claim).await) }).await? {
            Ok(LogOutcome::Run(attempt)) => Ok(LogOutcome::Run(attempt.hand_over())),
            outcome => outcome,
        }
    }

    async fn begin(self, claim: Claim) -> Result<LogOutcome, IntentLogError> {
        let claimed_at = Instant::now();
        match self.node.claim(&claim, self.settings.store_timeout).await? {
            ClaimOutcome::Won { record_id, attempt_number, age } => {
                let won = Won { claim, record_id, attempt_number, age, claimed_at, begun: None };
                Ok(LogOutcome::Run(LogAttempt::new(Ownership::begin(&self.node, &self.settings, won))))
            }
            ClaimOutcome::Contended => Ok(LogOutcome::InProgress),
            ClaimOutcome::Exists(record) => found(&self.node.codec, &record, &claim.fingerprint),
        }
    }
}

fn found(codec: &Codec, record: &Record, fingerprint: &Fingerprint) -> Result<LogOutcome, IntentLogError> {
    if record.fingerprint != *fingerprint {
        return Ok(LogOutcome::OtherArguments);
    }
    if record.state == RecordState::Held {
        return Ok(LogOutcome::Held);
    }
    Ok(result_of(codec, record)?.map_or(LogOutcome::InProgress, LogOutcome::Completed))
}

/// A result is stored as a response, so that operators look at it and resolve records as they do
/// with requests.
fn response_of(codec: &Codec, result: Bytes) -> Bytes {
    codec.response(&StoredResponse::new(http::StatusCode::OK, http::HeaderMap::new(), result))
}

/// The result of a completed record.
fn result_of(codec: &Codec, record: &Record) -> Result<Option<Bytes>, UnreadableResponse> {
    let RecordState::Completed { response } = &record.state else { return Ok(None) };
    match codec.read_response(response)?.body {
        StoredBody::Kept { data, .. } => Ok(Some(data)),
        StoredBody::Representation(representation) => Ok(Some(representation.data().clone())),
        StoredBody::NotKept => Err(UnreadableResponse::Damaged),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_result_is_shown() {
        let outcome = LogOutcome::Completed(Bytes::from_static(b"secret"));
        assert_eq!(format!("{outcome:?}"), "Completed(6 bytes)");
    }
}
