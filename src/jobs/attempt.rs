//! One attempt outside HTTP.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use tokio::{runtime::Handle, task::JoinHandle, time::sleep};
use tokio_util::task::{AbortOnDropHandle, task_tracker::TaskTrackerToken};

use crate::{
    attempt::{Ended, Facts, Ownership, idempotency::Idempotency},
    error::StoreError,
    jobs::{error::IntentLogError, response_of, result_of},
    node::ends::End,
    redact::{TRACING_TARGET, traced},
};

/// An attempt that owns its record. Its lease is renewed until it ends.
///
/// End it with [`complete`](Self::complete) or [`release`](Self::release). An attempt that is
/// dropped, because the work has failed, panicked or was cancelled, is released in the background,
/// so that the next attempt need not wait for the lease. It is held instead if [abandoned
/// attempts](crate::IntentLog::with_abandoned) are. Without a runtime, only the end of the lease
/// gives it back.
#[must_use = "an attempt that is dropped is given back without a result"]
pub struct LogAttempt {
    idempotency: Idempotency,
    /// None once the attempt is being ended.
    ownership: Option<Ownership>,
    /// The caller of [`IntentLog::attempt`](crate::IntentLog::attempt) has it.
    handed_over: bool,
    _limit: AbortOnDropHandle<()>,
    /// Draining waits for it.
    _token: TaskTrackerToken,
}

impl LogAttempt {
    pub(super) fn new(ownership: Ownership) -> Self {
        Self {
            idempotency: ownership.idempotency(),
            handed_over: false,
            _limit: AbortOnDropHandle::new(tokio::spawn(traced(limited(Arc::clone(ownership.facts()))))),
            _token: ownership.node.tasks.token(),
            ownership: Some(ownership),
        }
    }

    /// The caller has it: from now on the work may have begun.
    pub(super) fn hand_over(mut self) -> Self {
        self.handed_over = true;
        self
    }

    /// The same as a handler of a request has: key, attempt number, [intents](Idempotency::intent)
    /// and phases, and the signal that the attempt should [end](Idempotency::cancelled).
    #[must_use]
    pub fn idempotency(&self) -> &Idempotency {
        &self.idempotency
    }

    /// Stores the result, which later attempts get. It is stored as it is: keep it small, and free
    /// of secrets.
    ///
    /// Returns the result that is stored. It is another one if the attempt had lost its record and
    /// another attempt has completed it.
    ///
    /// # Errors
    ///
    /// [`Store`](IntentLogError::Store) if the result is not known to be stored: do not acknowledge
    /// the work, ask again. [`Lost`](IntentLogError::Lost) or [`Held`](IntentLogError::Held) if it
    /// is not stored.
    pub async fn complete(mut self, result: impl Into<Bytes> + Send) -> Result<Bytes, IntentLogError> {
        let Some(ownership) = self.ownership.take() else { return Err(IntentLogError::Lost) };
        let (codec, result) = (&self.idempotency.facts.node.codec, result.into());
        ownership.warn_of_open_intents();
        match end(ownership, End::Complete(response_of(codec, result.clone()))).await? {
            Ended::Done => Ok(result),
            Ended::Superseded(record) => result_of(codec, &record)?.ok_or(IntentLogError::Lost),
            Ended::Gone => Err(IntentLogError::Lost),
            Ended::Held(_) => Err(IntentLogError::Held),
        }
    }

    /// Gives the key back, so that the next attempt runs. The record stays if it has an intent or a
    /// finished phase.
    ///
    /// # Errors
    ///
    /// [`Store`](IntentLogError::Store) if the key is not known to be given back: the end of the
    /// lease gives it back at the latest. [`Held`](IntentLogError::Held) if it is held instead.
    pub async fn release(mut self) -> Result<(), IntentLogError> {
        let Some(ownership) = self.ownership.take() else { return Ok(()) };
        match end(ownership, End::Release).await? {
            Ended::Held(_) => Err(IntentLogError::Held),
            Ended::Done | Ended::Superseded(_) | Ended::Gone => Ok(()),
        }
    }
}

impl Drop for LogAttempt {
    fn drop(&mut self) {
        let Some(ownership) = self.ownership.take() else { return };
        if Handle::try_current().is_err() {
            return;
        }
        // Work that never began is released, never held.
        let end = if self.handed_over { ownership.settings.end_without_result() } else { End::Release };
        drop(end_in_background(ownership, end));
    }
}

async fn end(ownership: Ownership, end: End) -> Result<Ended, StoreError> {
    let facts = Arc::clone(ownership.facts());
    facts.node.tasks.wait_for(end_in_background(ownership, end), facts.settings.settle_wait()).await
}

fn end_in_background(ownership: Ownership, end: End) -> JoinHandle<Result<Ended, StoreError>> {
    let facts = Arc::clone(ownership.facts());
    facts.node.tasks.spawn(ownership.end(end))
}

impl fmt::Debug for LogAttempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogAttempt").field("idempotency", &self.idempotency).finish_non_exhaustive()
    }
}

/// Tells the attempt that its time is almost over, and stops renewing its lease when it is.
async fn limited(facts: Arc<Facts>) {
    facts.max_execution_over().await;
    let limit = facts.settings.timing.max_execution;
    tracing::warn!(
        target: TRACING_TARGET, ?limit,
        "an attempt runs longer than max_execution: its lease is not renewed any more"
    );
    facts.node.renewer.leave(facts.attempt.id);
    // Until then no other process can take the record over, and no duplicate of this process may
    // run.
    sleep(facts.settings.timing.lease).await;
    facts.node.running.leave(&facts.attempt);
}
