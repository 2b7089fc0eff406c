//! The ends of attempts, written to the store and tried again while it is away.

use std::{future::Future, pin::pin, time::Duration};

use bytes::Bytes;
use tokio::time::{Instant, timeout};

use super::{Node, RETRY, leases::Lease};
use crate::{
    error::StoreError,
    redact::TRACING_TARGET,
    retry::retry_until,
    stored::record::{Attempt, CompleteOutcome, Fenced, Record, RecordState},
};

/// The end of an attempt.
#[derive(Clone, Debug)]
pub(crate) enum End {
    Complete(Bytes),
    Release,
    Hold,
}

/// The outcome of writing an [`End`].
#[derive(Debug)]
pub(crate) enum Written {
    /// Written, or nothing stored contradicts the attempt.
    Done,
    /// The attempt lost the record; after a release or hold it is a completed one.
    Lost(Box<Record>),
    /// There is no record to complete.
    Absent,
}

impl Node {
    /// Writes the end of an attempt, trying again until `give_up`. Between two tries, and while one
    /// hangs, the lease is renewed, so that no other attempt takes the record over.
    pub(crate) async fn end(
        &self,
        attempt: &Attempt,
        lease: Option<&Lease>,
        end: &End,
        give_up: Instant,
    ) -> Result<Written, StoreError> {
        let end_once = || {
            // Before the write is sent: a renewal after it would find the lease ended, and report it
            // lost. One that is under way is fenced by the store, and its outcome is ignored.
            if let Some(lease) = lease {
                lease.leave();
            }
            renew_if_late(lease, async { self.replays.note(self.end_once(attempt, end).await) })
        };
        // After every error, also one that looks final: a server may be read-only while another
        // becomes the primary.
        retry_until(give_up, RETRY, end_once, |error| {
            tracing::warn!(
                target: TRACING_TARGET, consumer = %attempt.consumer, attempt = %attempt.id,
                error = error as &dyn std::error::Error,
                "the end of an attempt is not stored yet; trying again"
            );
            // During the pause the lease could run out: renewed immediately, until the next try leaves it.
            if let Some(lease) = lease {
                lease.renew_after(Duration::ZERO);
            }
        })
        .await
    }

    async fn end_once(&self, attempt: &Attempt, end: &End) -> Result<Written, StoreError> {
        match end {
            End::Complete(response) => Ok(match self.store.complete(attempt, response.clone()).await? {
                CompleteOutcome::Completed => Written::Done,
                CompleteOutcome::Lost(record) => Written::Lost(record),
                CompleteOutcome::Absent => Written::Absent,
            }),
            End::Release => self.unless_contradicted(attempt, self.store.release(attempt).await?).await,
            End::Hold => {
                let held = self.store.hold(attempt).await?;
                if held == Fenced::Lost {
                    tracing::error!(
                        target: TRACING_TARGET, consumer = %attempt.consumer, attempt = %attempt.id,
                        "the key could not be held: the record was completed or taken over by another attempt"
                    );
                }
                self.unless_contradicted(attempt, held).await
            }
        }
    }

    /// An attempt that has lost its record must not contradict what another one has stored.
    async fn unless_contradicted(&self, attempt: &Attempt, fenced: Fenced) -> Result<Written, StoreError> {
        if fenced == Fenced::Applied {
            return Ok(Written::Done);
        }
        // Only a stored response can contradict the answer; a record in progress has none yet.
        let record = self.store.get(&attempt.consumer, &attempt.key).await?;
        let completed = record.filter(|record| matches!(record.state, RecordState::Completed { .. }));
        Ok(completed.map_or(Written::Done, |record| Written::Lost(Box::new(record))))
    }
}

/// Renews the lease again if the store takes long: on a broken connection the call may hang for
/// longer than the lease.
async fn renew_if_late<T>(lease: Option<&Lease>, call: impl Future<Output = T>) -> T {
    let Some(lease) = lease else { return call.await };
    // An answer within the interval, the usual case, costs no renewal.
    let mut call = pin!(call);
    if let Ok(answer) = timeout(lease.interval(), &mut call).await {
        return answer;
    }
    lease.renew_after(Duration::ZERO);
    let answer = call.await;
    // If the end is written, nothing is left to renew; if not, the pause before the next try renews.
    lease.leave();
    answer
}
