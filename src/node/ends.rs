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
    /// The record says what the attempt says.
    Done,
    /// The record says something else.
    Lost(Box<Record>),
    /// There is no record.
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
            // Before the write is sent: a renewal that overtook it would extend a lease that has
            // ended.
            if let Some(lease) = lease {
                lease.leave();
            }
            keep_if_late(lease, self.end_once(attempt, end))
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
                lease.keep(Duration::ZERO);
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
            End::Release => self.after(attempt, self.store.release(attempt).await?).await,
            End::Hold => {
                let held = self.store.hold(attempt).await?;
                if held == Fenced::Lost {
                    tracing::error!(
                        target: TRACING_TARGET, consumer = %attempt.consumer, attempt = %attempt.id,
                        "the key could not be held: the record was completed or taken over by another attempt"
                    );
                }
                self.after(attempt, held).await
            }
        }
    }

    /// An attempt that has lost its record must not contradict what another one has stored.
    async fn after(&self, attempt: &Attempt, fenced: Fenced) -> Result<Written, StoreError> {
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
async fn keep_if_late<T>(lease: Option<&Lease>, call: impl Future<Output = T>) -> T {
    let Some(lease) = lease else { return call.await };
    // An answer within the interval, the usual case, costs no renewal.
    let mut call = pin!(call);
    if let Ok(answer) = timeout(lease.interval(), &mut call).await {
        return answer;
    }
    lease.keep(Duration::ZERO);
    let answer = call.await;
    // Whatever was written, the record's lease must not be extended after it.
    lease.leave();
    answer
}
