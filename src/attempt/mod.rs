//! One attempt: of a request by the layer, or of a job by a log.

pub(crate) mod error;
pub(crate) mod idempotency;
pub(crate) mod intent;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod phase;
pub(crate) mod progress;
pub(crate) mod run;
pub(crate) mod settings;
pub(crate) mod settle;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
pub(crate) mod tx;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
pub(crate) mod tx_error;
pub(crate) mod unguarded;

use std::{error::Error, fmt, ops::Deref, sync::Arc, time::Duration};

use http::Extensions;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use self::{idempotency::Idempotency, progress::Progress, run::Runs, settings::AttemptSettings};
use crate::{
    error::StoreError,
    fingerprint::Fingerprint,
    node::{
        Node,
        ends::{End, Written},
        leases::Lease,
        running::Entered,
    },
    redact::TRACING_TARGET,
    rejection::Rejection,
    store::transaction::{SingleTransaction, StoreTransaction},
    stored::record::{Attempt, Claim, Record, RecordId},
};

/// A claim that was won.
#[derive(Debug)]
pub(crate) struct Won {
    pub(crate) claim: Claim,
    pub(crate) record_id: RecordId,
    pub(crate) attempt_number: u32,
    /// The time since the record was first claimed.
    pub(crate) age: Duration,
    /// When the claim was sent: the lease begins then or later.
    pub(crate) claimed_at: Instant,
    /// The transaction that was begun instead of a claim.
    pub(crate) begun: Option<Begun>,
}

/// The transaction by which alone an attempt has its key.
#[derive(Debug)]
pub(crate) struct Begun {
    pub(crate) transaction: Arc<dyn SingleTransaction>,
    pub(crate) extensions: Extensions,
}

/// The facts of an attempt. Its owner and every [`Idempotency`] share them.
///
/// They hold neither the lease nor the place among the running attempts: a handle may live for
/// ever.
pub(crate) struct Facts {
    pub(crate) node: Arc<Node>,
    pub(crate) settings: Arc<AttemptSettings>,
    pub(crate) attempt: Attempt,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) record_id: RecordId,
    pub(crate) attempt_number: u32,
    pub(crate) progress: Arc<Progress>,
    pub(crate) runs: Runs,
    /// The transaction by which alone the attempt has its key. `None` if it has claimed the key.
    pub(crate) single: Option<Arc<dyn SingleTransaction>>,
    /// The transaction that the store offers the handler.
    pub(crate) transaction: Option<Arc<dyn StoreTransaction>>,
    /// The extensions that the store gives to the request.
    pub(crate) offered: Extensions,
    /// Tells the handler that its lease was lost or that its time is almost over.
    pub(crate) cancelled: CancellationToken,
}

/// An attempt that owns its record, from the claim to its end. It is unique, and its holder ends
/// the attempt. Dropped, it stops renewing the lease and leaves the running attempts.
#[derive(Debug)]
pub(crate) struct Ownership {
    facts: Arc<Facts>,
    /// `None` if the attempt has no claim.
    lease: Option<Lease>,
    _entered: Entered,
}

/// The outcome of ending an attempt.
#[derive(Debug)]
pub(crate) enum Ended {
    /// Written, or nothing stored contradicts the attempt.
    Done,
    /// Another attempt of the same request has the record, and may have completed it.
    Superseded(Box<Record>),
    /// The record is gone, or another request's. Nothing contradicts what the attempt says.
    Gone,
    /// The record is held instead, for this reason.
    Held(Rejection),
}

impl Ownership {
    /// Begins the attempt whose claim was won: renews its lease and offers it a transaction. An
    /// attempt without a claim has its transaction, and no lease.
    pub(crate) fn begin(node: &Arc<Node>, settings: &Arc<AttemptSettings>, won: Won) -> Self {
        let Won { claim, record_id, attempt_number, age, claimed_at, begun } = won;
        let Claim { attempt, fingerprint, lease, .. } = claim;
        let record = Record::won(&attempt, &fingerprint, lease, record_id, attempt_number);
        let entered = node.running.enter(attempt.clone(), record);
        let (cancelled, interval) = (CancellationToken::new(), settings.timing.renewal_interval());
        let lease = begun.is_none().then(|| {
            let lease = Lease::new(&node.renewer, attempt.clone(), lease, interval, cancelled.clone());
            lease.renew_after(interval.saturating_sub(claimed_at.elapsed()));
            lease
        });
        let (single, transaction, offered) = match begun {
            Some(Begun { transaction, extensions }) => {
                (Some(Arc::clone(&transaction)), Some(transaction as Arc<dyn StoreTransaction>), extensions)
            }
            None => {
                let mut offered = Extensions::new();
                let limits = settings.transaction_limits();
                (None, node.store.transaction(&attempt, &limits, &mut offered), offered)
            }
        };
        let facts = Facts {
            node: Arc::clone(node),
            settings: Arc::clone(settings),
            attempt,
            fingerprint,
            record_id,
            attempt_number,
            progress: Arc::default(),
            runs: Runs::default(),
            single,
            transaction,
            offered,
            cancelled,
        };
        facts.log_takeover(age);
        Self { facts: Arc::new(facts), lease, _entered: entered }
    }

    pub(crate) fn facts(&self) -> &Arc<Facts> {
        &self.facts
    }

    pub(crate) fn idempotency(&self) -> Idempotency {
        Idempotency::of(&self.facts)
    }

    /// Ends the attempt, or holds its record if an intent or a phase asks for that. To be run in a
    /// task that is not cancelled: the lease and the place among the running attempts last until
    /// the end is stored.
    pub(crate) async fn end(self, end: End) -> Result<Ended, StoreError> {
        // A phase that is still ending may find out that the record must be held.
        self.progress.phases_ended().await;
        if let Some(rejection) = self.progress.held() {
            self.write(&End::Hold).await?;
            return Ok(Ended::Held(rejection));
        }
        let written = self.write(&end).await?;
        if !matches!(written, Written::Done) {
            self.log_lost();
        }
        Ok(match written {
            Written::Done => Ended::Done,
            Written::Lost(record) if record.fingerprint == self.fingerprint => Ended::Superseded(record),
            // Another request's response must not be given for this one.
            Written::Lost(_) | Written::Absent => Ended::Gone,
        })
    }

    /// Writes an end down, trying again for as long as the attempt might have run.
    pub(crate) async fn write(&self, end: &End) -> Result<Written, StoreError> {
        if matches!(end, End::Hold) {
            self.log_held();
        }
        let written = self.node.end(&self.attempt, self.lease.as_ref(), end, self.settings.give_up()).await;
        written.inspect_err(|error| self.log_failure(error, "the end of an attempt is not stored"))
    }

    /// Stops renewing the lease. A commit is next: a renewal would wait for its lock.
    pub(crate) fn leave_lease(&self) {
        if let Some(lease) = &self.lease {
            lease.leave();
        }
    }
}

impl Deref for Ownership {
    type Target = Facts;

    fn deref(&self) -> &Facts {
        &self.facts
    }
}

impl Facts {
    /// Completes when the attempt has run for `max_execution`. Shortly before, it tells the
    /// handler. Meanwhile, the log says that the attempt still runs, after pauses that double.
    pub(crate) async fn max_execution_over(&self) {
        let (begun, limit) = (Instant::now(), self.settings.timing.max_execution);
        let mut report_after = FIRST_REPORT;
        for until in [limit / 10 * 9, limit] {
            while report_after < until {
                sleep(report_after.saturating_sub(begun.elapsed())).await;
                self.log_still_running(report_after);
                report_after = report_after.saturating_mul(2);
            }
            sleep(until.saturating_sub(begun.elapsed())).await;
            self.cancelled.cancel();
        }
    }

    /// Warns of intents that are open when a success is stored: no retry will settle them.
    pub(crate) fn warn_of_open_intents(&self) {
        for (intent, upstream_key) in self.progress.open_intents() {
            tracing::warn!(
                target: TRACING_TARGET, consumer = %self.attempt.consumer,
                key = %self.settings.shown(&self.attempt.key), attempt = %self.attempt.id, intent,
                %upstream_key,
                "a success is stored although an intent is open: the handler has passed over the error of \
                 its call, which no retry repeats; it is reconciled"
            );
        }
    }

    /// Logs what went wrong with the attempt.
    pub(crate) fn log_failure(&self, error: &(dyn Error + 'static), what: &str) {
        tracing::error!(
            target: TRACING_TARGET, consumer = %self.attempt.consumer,
            key = %self.settings.shown(&self.attempt.key), attempt = %self.attempt.id, error, "{what}"
        );
    }

    fn log_takeover(&self, age: Duration) {
        let Self { attempt, attempt_number, .. } = self;
        if *attempt_number > 1 {
            tracing::info!(
                target: TRACING_TARGET, consumer = %attempt.consumer,
                key = %self.settings.shown(&attempt.key), attempt = %attempt.id, attempt_number,
                taken_over = attempt_number - 1, ?age,
                "takeover: an earlier attempt of this request has ended or died without a stored result"
            );
        }
    }

    fn log_still_running(&self, after: Duration) {
        let Self { attempt, attempt_number, .. } = self;
        tracing::warn!(
            target: TRACING_TARGET, consumer = %attempt.consumer, key = %self.settings.shown(&attempt.key),
            attempt = %attempt.id, attempt_number, "still running after {after:?}"
        );
    }

    pub(crate) fn log_held(&self) {
        tracing::error!(
            target: TRACING_TARGET, consumer = %self.attempt.consumer,
            key = %self.settings.shown(&self.attempt.key), attempt = %self.attempt.id,
            "the key is held: the outcome is unknown and an operator must resolve it"
        );
    }

    fn log_lost(&self) {
        tracing::warn!(
            target: TRACING_TARGET, consumer = %self.attempt.consumer,
            key = %self.settings.shown(&self.attempt.key), attempt = %self.attempt.id,
            "the record was gone or another attempt's when its attempt ended"
        );
    }
}

impl fmt::Debug for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Facts")
            .field("attempt", &self.attempt)
            .field("attempt_number", &self.attempt_number)
            .finish_non_exhaustive()
    }
}

/// The time after which the log says that an attempt still runs.
const FIRST_REPORT: Duration = Duration::from_secs(30);
