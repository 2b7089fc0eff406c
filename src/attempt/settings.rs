//! Settings of an attempt, of a request or of a job.

use std::time::Duration;

use tokio::time::Instant;

use crate::{
    duration::{capped, limit},
    fingerprint::Fingerprint,
    key::IdempotencyKey,
    node::{ends::End, leases::usable},
    policy::AbandonedAttempts,
    redact::KeyLogging,
    store::transaction::{IsolationLevel, TransactionLimits},
    stored::record::{Attempt, Claim},
};

/// The settings that an attempt needs, from its claim to its end.
#[derive(Clone, Debug)]
pub(crate) struct AttemptSettings {
    pub(crate) timing: Timing,
    pub(crate) store_timeout: Duration,
    pub(crate) abandoned: AbandonedAttempts,
    pub(crate) transactions: TransactionOptions,
    pub(crate) key_logging: KeyLogging,
}

#[derive(Clone, Debug)]
pub(crate) struct Timing {
    pub(crate) lease: Duration,
    pub(crate) renewal: Option<Duration>,
    pub(crate) max_execution: Duration,
    pub(crate) retention: Duration,
}

impl Timing {
    pub(crate) fn renewal_interval(&self) -> Duration {
        self.renewal.unwrap_or(self.lease / 3)
    }

    /// Panics if the times contradict each other.
    #[track_caller]
    pub(crate) fn check(&self) {
        let Self { lease, max_execution, retention, .. } = self;
        let interval = self.renewal_interval();
        assert!(
            interval * 2 <= *lease,
            "a lease of {lease:?} cannot be kept by renewing every {interval:?}: renew at least twice in a \
             lease"
        );
        assert!(
            *retention >= capped(*max_execution + *lease),
            "a retention of {retention:?} is shorter than max_execution and lease together \
             ({max_execution:?} + {lease:?}), so that a record could expire while its request runs: raise \
             the retention, or lower max_execution or lease"
        );
    }
}

impl Default for AttemptSettings {
    fn default() -> Self {
        Self {
            timing: Timing {
                lease: Duration::from_secs(30),
                renewal: None,
                max_execution: Duration::from_secs(10 * 60),
                retention: Duration::from_secs(24 * 60 * 60),
            },
            store_timeout: Duration::from_secs(5),
            abandoned: AbandonedAttempts::RunAgain,
            transactions: TransactionOptions::default(),
            key_logging: KeyLogging::Plain,
        }
    }
}

impl AttemptSettings {
    /// The claim by which an attempt begins.
    pub(crate) fn new_claim(&self, attempt: Attempt, fingerprint: Fingerprint) -> Claim {
        Claim {
            lease: self.timing.lease,
            retention: self.timing.retention,
            max_abandoned: self.abandoned.limit(),
            ..Claim::new(attempt, fingerprint)
        }
    }

    /// The end of an attempt that has no result: after a panic, an error, or too long an execution.
    pub(crate) fn end_without_result(&self) -> End {
        match self.abandoned {
            AbandonedAttempts::RunAgain => End::Release,
            AbandonedAttempts::Hold => End::Hold,
        }
    }

    pub(crate) fn transaction_limits(&self) -> TransactionLimits {
        let TransactionOptions { isolation, idle_timeout, statement_timeout, time_limit, .. } =
            self.transactions;
        let lease = self.timing.lease;
        TransactionLimits {
            lease,
            isolation,
            idle_timeout: idle_timeout.unwrap_or(lease),
            statement_timeout: statement_timeout.unwrap_or(lease),
            time_limit: time_limit.unwrap_or(lease / 3),
            begin_timeout: self.store_timeout,
        }
    }

    /// The time that an attempt waits for the store before it does something.
    pub(crate) fn store_wait(&self) -> Duration {
        self.store_timeout.min(usable(self.timing.lease))
    }

    /// The time that an attempt waits for the store after it has done something.
    pub(crate) fn settle_wait(&self) -> Duration {
        MAX_WAIT.min(usable(self.timing.lease))
    }

    /// The moment after which the end of an attempt is not tried again.
    pub(crate) fn give_up(&self) -> Instant {
        Instant::now() + self.timing.max_execution.max(MIN_TRIES)
    }

    /// A key as it may appear in logs.
    pub(crate) fn shown<'a>(&self, key: &'a IdempotencyKey) -> &'a str {
        self.key_logging.shown(key)
    }
}

/// A lease. Panics if it is too short to be renewed in time.
#[track_caller]
pub(crate) fn checked_lease(lease: Duration) -> Duration {
    assert!(lease >= MIN_LEASE, "a lease of {lease:?} is too short: use at least {MIN_LEASE:?}");
    capped(lease)
}

/// Settings of the transactions of handlers.
///
/// ```
/// # use tower_idempotency::{IdempotencyLayer, MemoryStore, TransactionOptions};
/// # use std::time::Duration;
/// let options = TransactionOptions::default().with_statement_timeout(Duration::from_secs(5));
/// let layer = IdempotencyLayer::new(MemoryStore::new()).with_transactions(options);
/// ```
///
/// An [`IntentLog`](crate::IntentLog::with_transactions) takes them too.
#[derive(Clone, Debug, Default)]
pub struct TransactionOptions {
    isolation: Option<IsolationLevel>,
    idle_timeout: Option<Duration>,
    statement_timeout: Option<Duration>,
    time_limit: Option<Duration>,
    pub(crate) keep_writes_of_client_errors: bool,
    pub(crate) reruns: u32,
}

impl TransactionOptions {
    /// Sets the isolation level. Default: that of the database. No effect on SQLite, which has one
    /// level, the strictest.
    ///
    /// A handler cannot choose it with `SET TRANSACTION`, because the record is already locked when
    /// the handler gets the transaction.
    ///
    /// ```
    /// # use tower_idempotency::{TransactionOptions, store::IsolationLevel};
    /// let options = TransactionOptions::default().with_isolation(IsolationLevel::Serializable);
    /// ```
    #[must_use]
    pub fn with_isolation(mut self, level: IsolationLevel) -> Self {
        self.isolation = Some(level);
        self
    }

    /// Sets the time for which the server lets a transaction be open without a running statement,
    /// like PostgreSQL's `idle_in_transaction_session_timeout`. Default: the lease.
    ///
    /// It ends the locks of a frozen process. It also ends a handler that waits longer for
    /// something else between two statements. A shorter setting of the server takes precedence. No
    /// effect on SQLite.
    ///
    /// ```
    /// # use tower_idempotency::TransactionOptions;
    /// let options = TransactionOptions::default()
    ///     .with_idle_timeout(std::time::Duration::from_secs(10));
    /// ```
    ///
    /// # Panics
    ///
    /// If it is shorter than 1 ms.
    #[must_use]
    #[track_caller]
    pub fn with_idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle_timeout = Some(limit("an idle time-out", timeout));
        self
    }

    /// Sets the time that one statement of the handler may take, like PostgreSQL's
    /// `statement_timeout`. Default: the lease.
    ///
    /// A shorter setting of the server takes precedence. No effect on SQLite.
    ///
    /// ```
    /// # use tower_idempotency::TransactionOptions;
    /// let options = TransactionOptions::default()
    ///     .with_statement_timeout(std::time::Duration::from_secs(5));
    /// ```
    ///
    /// # Panics
    ///
    /// If it is shorter than 1 ms.
    #[must_use]
    #[track_caller]
    pub fn with_statement_timeout(mut self, timeout: Duration) -> Self {
        self.statement_timeout = Some(limit("a statement time-out", timeout));
        self
    }

    /// Sets the time for which a transaction may be open on a store with one writer (SQLite).
    /// Default: a third of the lease.
    ///
    /// No other transaction can write in that time. After it, the handler is cancelled and its
    /// transaction is rolled back. With a limit longer than the lease, duplicates at other
    /// processes may get 503 `store-unavailable` instead of 409. No effect on PostgreSQL, where the
    /// other two limits and `with_max_execution` hold.
    ///
    /// ```
    /// # use tower_idempotency::TransactionOptions;
    /// let options = TransactionOptions::default()
    ///     .with_time_limit(std::time::Duration::from_secs(5));
    /// ```
    ///
    /// # Panics
    ///
    /// If it is shorter than 1 ms.
    #[must_use]
    #[track_caller]
    pub fn with_time_limit(mut self, time_limit: Duration) -> Self {
        self.time_limit = Some(limit("a time limit for transactions", time_limit));
        self
    }

    /// Commits what a handler has written even if its response is a stored 4xx. Default: the writes
    /// are rolled back.
    ///
    /// ```
    /// # use tower_idempotency::TransactionOptions;
    /// let options = TransactionOptions::default().keep_writes_of_client_errors();
    /// ```
    #[must_use]
    pub fn keep_writes_of_client_errors(mut self) -> Self {
        self.keep_writes_of_client_errors = true;
        self
    }

    /// Performs a request again, immediately and at most this many times, if its transaction
    /// collided with another one. Default: 0, and the client is asked to send the request again.
    ///
    /// Use it only for handlers whose effects are all in the transaction: every other effect would
    /// happen again. A collision is found at COMMIT, or by a `TxError` that the handler returns. If
    /// the handler answers a collision with a response of its own, it is not performed again. On
    /// SQLite, transactions do not collide.
    ///
    /// ```
    /// # use tower_idempotency::TransactionOptions;
    /// let options = TransactionOptions::default().with_reruns(3);
    /// ```
    #[must_use]
    pub fn with_reruns(mut self, reruns: u32) -> Self {
        self.reruns = reruns;
        self
    }
}

/// The longest time that a client waits for a result to be stored.
const MAX_WAIT: Duration = Duration::from_secs(10);
/// The shortest time for which the end of an attempt is tried.
const MIN_TRIES: Duration = Duration::from_secs(10);
const MIN_LEASE: Duration = Duration::from_millis(100);
