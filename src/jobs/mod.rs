//! Intents and phases outside HTTP: jobs and consumers of messages.

mod attempt;
mod error;

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use serde::Serialize;
use tokio::time::Instant;

pub use self::{attempt::LogAttempt, error::IntentLogError};
use crate::{
    consumer::Consumer,
    fingerprint::Fingerprint,
    key::IdempotencyKey,
    layer::settings::Settings,
    node::{Node, reaper::Reaper},
    policy::{AbandonedAttempts, ResultPolicy},
    redact::Length,
    store::{IntoStore, transaction::TransactionOptions},
    stored::{
        record::{Attempt, Claim, ClaimOutcome, Record, RecordState},
        response::{StoredBody, StoredResponse, UnreadableResponse},
    },
};

/// Performs what is no HTTP request once: a job, a message. It keeps its records in the store of an
/// [`IdempotencyLayer`](crate::IdempotencyLayer) or in one of its own, with the same rules; keys share one name space with
/// those of requests.
///
/// Whatever dies at whatever moment: an attempt whose process is gone is taken over once its lease has run out, with the
/// same [record id](crate::Idempotency::record_id), so that finalized [intents](crate::Idempotency::intent) and finished
/// phases are not repeated; a result that was stored is never worked out again.
///
/// ```
/// # #[cfg(feature = "sqlite")] {
/// # async fn transfer(key: tower_idempotency::UpstreamKey) -> Result<String, tower_idempotency::CallFailure> { todo!() }
/// use tower_idempotency::{Consumer, IdempotencyKey, IntentLog, LogOutcome, Resource};
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
    settings: Arc<Settings>,
}

/// What there is to do.
#[expect(clippy::exhaustive_enums, reason = "a caller must handle every one")]
pub enum LogOutcome {
    /// The work, by this attempt.
    Run(LogAttempt),
    /// Nothing: it is done, and this is its result.
    Completed(Bytes),
    /// Nothing yet: another attempt is running. Ask again later.
    InProgress,
    /// Nothing: the outcome of an earlier attempt is unknown, and it is not run again before an intent is reconciled or an
    /// operator resolves the record.
    Held,
    /// Nothing: the key was used with other arguments, or by a request.
    OtherArguments,
}

/// Shows how long a result is, and nothing of it.
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
    /// A log over a store, or over a pool of connections that a store is made of.
    #[must_use]
    pub fn new(store: impl IntoStore) -> Self {
        Self::over(Node::new(store.into_store()))
    }

    pub(crate) fn over(node: Arc<Node>) -> Self {
        Self { node, settings: Arc::default() }
    }

    pub(crate) fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Sets for how long an attempt owns its record without renewing. It is renewed every third of that. Default: 30 s.
    ///
    /// # Panics
    ///
    /// If it is shorter than 100 ms, or longer than the retention allows: set a longer retention first.
    #[must_use]
    #[track_caller]
    pub fn with_lease(self, lease: Duration) -> Self {
        self.set(|settings| settings.timing.lease = lease)
    }

    /// Sets for how long an attempt is renewed. After nine tenths of it the attempt is
    /// [told](crate::Idempotency::cancelled); after all of it another attempt may take over, once the lease has run out.
    /// Default: 10 min.
    ///
    /// # Panics
    ///
    /// If it is zero or longer than the retention allows: set a longer retention first.
    #[must_use]
    #[track_caller]
    pub fn with_max_execution(self, limit: Duration) -> Self {
        self.set(|settings| settings.timing.max_execution = limit)
    }

    /// Sets for how long a record is kept, counted from its first attempt. After that the key counts as new. A result
    /// that is stored later than that, and what intents and phases of an attempt have done that may run past it, is kept for
    /// as long again. Default: 24 h.
    ///
    /// # Panics
    ///
    /// If it is shorter than `max_execution` and lease together.
    #[must_use]
    #[track_caller]
    pub fn with_retention(self, retention: Duration) -> Self {
        self.set(|settings| settings.timing.retention = retention)
    }

    /// Sets what becomes of a record whose attempt ended without a result: its process died, or its [`LogAttempt`] was
    /// dropped. Default: [`AbandonedAttempts::RunAgain`].
    #[must_use]
    pub fn with_abandoned(self, abandoned: AbandonedAttempts) -> Self {
        self.set(|settings| settings.policy = ResultPolicy::default().with_abandoned(abandoned))
    }

    /// Sets for how long the store may take to answer, at most three quarters of the lease. Default: 5 s.
    ///
    /// # Panics
    ///
    /// If it is zero.
    #[must_use]
    #[track_caller]
    pub fn with_store_timeout(self, limit: Duration) -> Self {
        assert!(!limit.is_zero(), "a store time-out of zero: no key could be claimed");
        self.set(|settings| settings.store_timeout = limit)
    }

    /// Sets how expired records are purged. Default: [`Reaper::default`], every minute. One task serves all that share a
    /// store.
    #[must_use]
    pub fn with_reaper(self, reaper: Reaper) -> Self {
        self.set(|settings| settings.reaper = reaper)
    }

    /// Sets how the transactions of phases are begun and ended. Default: [`TransactionOptions::default`].
    #[must_use]
    pub fn with_transactions(self, options: TransactionOptions) -> Self {
        self.set(|settings| settings.transactions = options)
    }

    #[track_caller]
    fn set(mut self, change: impl FnOnce(&mut Settings)) -> Self {
        change(Arc::make_mut(&mut self.settings));
        self.settings.timing.check();
        self
    }

    /// Begins an attempt at what `consumer` calls `key`, and answers at once, whatever there is to do. `arguments` are what
    /// the work is done with, compared as JSON: a digest of them is stored, and the key cannot be used with others.
    ///
    /// # Errors
    ///
    /// [`IntentLogError`]. Nothing runs, and after an error of the store the key is given back if it was claimed.
    pub async fn attempt(
        &self,
        consumer: &Consumer,
        key: &IdempotencyKey,
        arguments: &(impl Serialize + ?Sized),
    ) -> Result<LogOutcome, IntentLogError> {
        if self.node.tasks.is_draining() {
            return Err(IntentLogError::ShuttingDown);
        }
        let fingerprint = Fingerprint::of_arguments(arguments).ok_or(IntentLogError::Arguments)?;
        self.settings.reaper.ensure_running(&self.node);
        let claim = Claim {
            lease: self.settings.timing.lease,
            retention: self.settings.timing.retention,
            max_abandoned: self.settings.policy.max_abandoned(),
            ..Claim::new(Attempt::new(consumer.clone(), key.clone()), fingerprint)
        };
        // In a task: if nobody waits any more when the key is won, the attempt is given back.
        let this = self.clone();
        match self.node.tasks.run_to_end(async move { Ok(this.begin(claim).await) }).await? {
            Ok(LogOutcome::Run(attempt)) => Ok(LogOutcome::Run(attempt.hand_over())),
            outcome => outcome,
        }
    }

    async fn begin(self, claim: Claim) -> Result<LogOutcome, IntentLogError> {
        let claimed_at = Instant::now();
        match self.node.ask(&claim, self.settings.store_timeout).await? {
            ClaimOutcome::Won { record_id, attempt_number } => {
                let record =
                    Record::won(&claim.attempt, &claim.fingerprint, claim.lease, record_id, attempt_number);
                Ok(LogOutcome::Run(LogAttempt::begin(&self, claim.attempt, record, claimed_at)))
            }
            ClaimOutcome::Contended => Ok(LogOutcome::InProgress),
            ClaimOutcome::Exists(record) => found(&record, &claim.fingerprint),
        }
    }
}

fn found(record: &Record, fingerprint: &Fingerprint) -> Result<LogOutcome, IntentLogError> {
    if record.fingerprint != *fingerprint {
        return Ok(LogOutcome::OtherArguments);
    }
    Ok(match &record.state {
        RecordState::InProgress { .. } => LogOutcome::InProgress,
        RecordState::Held => LogOutcome::Held,
        RecordState::Completed { response } => LogOutcome::Completed(result_of(response)?),
    })
}

/// A result is stored as a response, so that operators look at it and resolve records as they do with requests.
fn response_of(result: Bytes) -> Bytes {
    StoredResponse::new(http::StatusCode::OK, http::HeaderMap::new(), result).encode()
}

fn result_of(stored: &Bytes) -> Result<Bytes, IntentLogError> {
    match StoredResponse::decode(stored)?.body {
        StoredBody::Kept { data, .. } => Ok(data),
        StoredBody::Representation(representation) => Ok(representation.data().clone()),
        StoredBody::NotKept => Err(UnreadableResponse::Damaged.into()),
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
