//! One attempt outside HTTP.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use http::Extensions;
use tokio::{
    runtime::Handle,
    task::JoinHandle,
    time::{Instant, sleep},
};
use tokio_util::{
    sync::CancellationToken,
    task::{AbortOnDropHandle, task_tracker::TaskTrackerToken},
};

use crate::jobs::{IntentLog, error::IntentLogError, response_of, result_of};
use crate::{
    attempt::{idempotency::Idempotency, progress::Progress},
    error::StoreError,
    fingerprint::Fingerprint,
    layer::settings::{Settings, Timing},
    node::{
        Node,
        ends::{End, Ended},
        leases::Lease,
        running::Entered,
        tasks::answer_of,
    },
    policy::Directive,
    redact::TRACING_TARGET,
    stored::record::{Attempt, Record, RecordState},
};

/// An attempt that owns its record. Its lease is renewed until it ends.
///
/// End it with [`complete`](Self::complete) or [`release`](Self::release). One that is dropped, because the work has failed,
/// panicked or was cancelled, is released in the background, so that the next attempt need not wait for the lease; or held,
/// if [abandoned attempts](crate::IntentLog::with_abandoned) are. Where no runtime is left for that, the lease runs out.
#[must_use = "an attempt that is dropped is given back without a result"]
pub struct LogAttempt {
    idempotency: Idempotency,
    ending: Option<Ending>,
    /// Whoever asked for it has it.
    handed_over: bool,
}

/// What ends an attempt. Draining waits for it.
struct Ending {
    node: Arc<Node>,
    settings: Arc<Settings>,
    attempt: Attempt,
    fingerprint: Fingerprint,
    lease: Arc<Lease>,
    progress: Arc<Progress>,
    _limit: AbortOnDropHandle<()>,
    _entered: Entered,
    _token: TaskTrackerToken,
}

impl LogAttempt {
    pub(super) fn begin(log: &IntentLog, attempt: Attempt, record: Record, claimed_at: Instant) -> Self {
        let (node, settings) = (&log.node, &log.settings);
        let (cancelled, progress) = (CancellationToken::new(), Arc::<Progress>::default());
        let idempotency = Idempotency::new(
            node,
            settings,
            attempt.clone(),
            record.id,
            record.attempt_number,
            cancelled.clone(),
            Arc::clone(&progress),
        );
        let limits = settings.transactions.limits(settings.timing.lease, settings.store_timeout);
        let mut offered = Extensions::new();
        let transaction = node.store.transaction(&attempt, &limits, &mut offered);
        idempotency.offer(transaction, offered);
        let interval = settings.timing.renewal_interval();
        let lease =
            Lease::new(&node.renewer, attempt.clone(), settings.timing.lease, interval, cancelled.clone());
        lease.keep(interval.saturating_sub(claimed_at.elapsed()));
        let lease = Arc::new(lease);
        let limit = tokio::spawn(limited(
            Arc::clone(node),
            attempt.clone(),
            settings.timing.clone(),
            Arc::clone(&lease),
            cancelled,
        ));
        let ending = Ending {
            node: Arc::clone(node),
            settings: Arc::clone(settings),
            fingerprint: record.fingerprint.clone(),
            lease,
            progress,
            _limit: AbortOnDropHandle::new(limit),
            _entered: node.running.enter(attempt.clone(), record),
            _token: node.tasks.token(),
            attempt,
        };
        Self { idempotency, ending: Some(ending), handed_over: false }
    }

    /// The work begins: nobody has stopped waiting for the attempt.
    pub(super) fn hand_over(mut self) -> Self {
        self.handed_over = true;
        self
    }

    /// What a handler of a request has: key, attempt number, [intents](Idempotency::intent), phases, and whether the attempt
    /// should [come to its end](Idempotency::cancelled).
    #[must_use]
    pub fn idempotency(&self) -> &Idempotency {
        &self.idempotency
    }

    /// Stores the result: later attempts get it. It is stored as it is: keep it small, and free of secrets. Returns the result
    /// that stays, which is another one if the attempt had lost its record and another attempt has completed it.
    ///
    /// # Errors
    ///
    /// [`Store`](IntentLogError::Store) if it is not known to be stored: do not acknowledge the work, ask again.
    /// [`Lost`](IntentLogError::Lost) or [`Held`](IntentLogError::Held) if it is not stored.
    pub async fn complete(mut self, result: impl Into<Bytes> + Send) -> Result<Bytes, IntentLogError> {
        let Some(ending) = self.ending.take() else { return Err(IntentLogError::Lost) };
        let (result, fingerprint) = (result.into(), ending.fingerprint.clone());
        match ending.end(End::Complete(response_of(result.clone()))).await? {
            Ended::Done => Ok(result),
            Ended::Lost(record) if record.fingerprint == fingerprint => match &record.state {
                RecordState::Completed { response } => result_of(response),
                RecordState::InProgress { .. } | RecordState::Held => Err(IntentLogError::Lost),
            },
            Ended::Lost(_) | Ended::Absent => Err(IntentLogError::Lost),
        }
    }

    /// Gives the key back: the next attempt runs. The record stays if an intent or a finished phase hangs on it.
    ///
    /// # Errors
    ///
    /// [`Store`](IntentLogError::Store) if it is not known to be given back; at the latest it is when the lease has run out.
    /// [`Held`](IntentLogError::Held) if it is held instead.
    pub async fn release(mut self) -> Result<(), IntentLogError> {
        let Some(ending) = self.ending.take() else { return Ok(()) };
        ending.end(End::Release).await.map(drop)
    }
}

impl Drop for LogAttempt {
    fn drop(&mut self) {
        let Some(ending) = self.ending.take() else { return };
        if Handle::try_current().is_err() {
            return;
        }
        let end = match ending.settings.policy.without_result() {
            Directive::Hold if self.handed_over => End::Hold,
            Directive::Hold | Directive::Release | Directive::Store => End::Release,
        };
        drop(ending.end_in_background(end));
    }
}

impl Ending {
    async fn end(self, end: End) -> Result<Ended, IntentLogError> {
        let limit = self.settings.settle_wait();
        let task = self.end_in_background(end);
        answer_of(task, limit).await?.ok_or(IntentLogError::Held)
    }

    fn end_in_background(self, end: End) -> JoinHandle<Result<Option<Ended>, StoreError>> {
        let tasks = self.node.tasks.clone();
        tasks.spawn(self.write_down(end))
    }

    /// A method, so that the whole attempt lives until its end is stored: also what keeps others of this process away.
    /// `None` if it is held instead.
    async fn write_down(self, end: End) -> Result<Option<Ended>, StoreError> {
        self.progress.phases_ended().await;
        let held = self.progress.held().is_some();
        let end = if held { End::Hold } else { end };
        let give_up = self.settings.give_up();
        let ended = self.node.end(&self.attempt, Some(&self.lease), &end, give_up).await;
        if let Err(error) = &ended {
            self.settings.log_failure(&self.attempt, error, "the end of an attempt is not stored");
        }
        ended.map(|ended| (!held).then_some(ended))
    }
}

impl fmt::Debug for LogAttempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogAttempt").field("idempotency", &self.idempotency).finish_non_exhaustive()
    }
}

/// Tells the attempt that its time is almost over, and does not renew its lease when it is.
async fn limited(
    node: Arc<Node>,
    attempt: Attempt,
    timing: Timing,
    lease: Arc<Lease>,
    cancelled: CancellationToken,
) {
    let limit = timing.max_execution;
    sleep(limit * 9 / 10).await;
    cancelled.cancel();
    sleep(limit / 10).await;
    tracing::warn!(target: TRACING_TARGET, ?limit, "an attempt runs longer than max_execution: its lease is not renewed any more");
    lease.leave();
    sleep(timing.lease).await;
    node.running.leave(&attempt);
}
