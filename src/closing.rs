//! How an attempt ends: its record is completed, released or held, and its transaction committed or rolled back.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::oneshot,
    task::JoinHandle,
    time::{Instant, timeout},
};

use crate::{
    Rejection, RejectionCode, StoreError, StoreTransaction, TRACING_TARGET, TransactionErrorKind,
    TransactionUsage,
    execution::{Execution, Outcome},
    renewal::Lease,
    running::Entered,
    shared::{End, Ended, flatten},
};

/// What became of an attempt when it ended.
pub(crate) enum Closed {
    /// Its end is written down.
    Ended(Ended),
    /// It could not end as it should: the client gets this.
    Refused(Rejection),
    /// Its end is still being written down.
    Unknown,
}

type Task = JoinHandle<Result<Closed, StoreError>>;

impl Execution {
    /// Ends the attempt in a task that goes on when waiting for it takes too long.
    pub(crate) async fn close(
        self: &Arc<Self>,
        outcome: Outcome,
        transaction: Option<Arc<dyn StoreTransaction>>,
        lease: Lease,
        entered: Entered,
    ) -> Closed {
        let Outcome { end, keeps_writes } = outcome;
        if matches!(end, End::Hold) {
            self.log_held();
        }
        let closing = Closing { execution: Arc::clone(self), lease, _entered: entered };
        let used = match transaction {
            Some(unused) if unused.usage() == TransactionUsage::Unused => {
                // Nothing to roll back, but from now on nobody gets it.
                if let Err(error) = unused.roll_back().await {
                    self.log_failure(&error, "the transaction was asked for after the handler had returned");
                }
                None
            }
            used => used,
        };
        match used {
            None => self.wait_for_end(self.shared.tasks.spawn(closing.end(end)), self.max_wait()).await,
            Some(transaction) => match end {
                End::Complete(response) if keeps_writes => {
                    self.wait_for_commit(self.shared.tasks.spawn(closing.commit(transaction, response))).await
                }
                end @ (End::Complete(_) | End::Release | End::Hold) => {
                    let patience = if matches!(end, End::Complete(_)) { Duration::MAX } else { PATIENCE };
                    // On SQLite nothing can be written before a transaction that is kept is dropped.
                    let kept = transaction.usage() == TransactionUsage::Lent;
                    let limit = if kept { PATIENCE } else { self.max_wait() };
                    let (sender, rolled_back) = oneshot::channel();
                    let task = self.shared.tasks.spawn(closing.roll_back(transaction, end, sender));
                    // Behind a statement that still runs a rollback may take long: the answer does not wait for it.
                    match timeout(patience.min(self.max_wait()), rolled_back).await {
                        Ok(_) => self.wait_for_end(task, limit).await,
                        Err(_) => Closed::Unknown,
                    }
                }
            },
        }
    }

    fn max_wait(&self) -> Duration {
        MAX_WAIT.min(self.settings.timing.lease * 3 / 4)
    }

    async fn wait_for_end(&self, task: Task, limit: Duration) -> Closed {
        flatten(timeout(limit, task).await, limit).unwrap_or_else(|error| {
            self.log_failure(&error, "the response is sent although it is not stored yet");
            Closed::Unknown
        })
    }

    async fn wait_for_commit(&self, task: Task) -> Closed {
        let limit = self.settings.store_timeout;
        flatten(timeout(limit, task).await, limit).unwrap_or_else(|error| {
            self.log_failure(&error, "it is not known yet whether the transaction was committed");
            let detail =
                "The database has not confirmed the outcome yet. Send the request again with the same key.";
            Closed::Refused(Rejection::new(RejectionCode::CommitUnconfirmed, detail))
        })
    }

    fn log_held(&self) {
        tracing::error!(
            target: TRACING_TARGET, consumer = %self.attempt.consumer,
            key = %self.settings.shown(&self.attempt.key), attempt = %self.attempt.id,
            "the key is held: the outcome is unknown and an operator must resolve it"
        );
    }
}

/// An attempt whose handler has ended.
struct Closing {
    execution: Arc<Execution>,
    lease: Lease,
    _entered: Entered,
}

impl Closing {
    async fn end(self, end: End) -> Result<Closed, StoreError> {
        let ended = self.write_down(&end).await?;
        if matches!(ended, Ended::Absent | Ended::Lost(_)) {
            let execution = &self.execution;
            tracing::warn!(
                target: TRACING_TARGET, consumer = %execution.attempt.consumer,
                key = %execution.settings.shown(&execution.attempt.key), attempt = %execution.attempt.id,
                "the record was gone or another attempt's when its attempt ended"
            );
        }
        Ok(Closed::Ended(ended))
    }

    async fn write_down(&self, end: &End) -> Result<Ended, StoreError> {
        let Execution { shared, settings, attempt, .. } = &*self.execution;
        let give_up = Instant::now() + settings.timing.max_execution.max(MAX_WAIT);
        shared.end(attempt, Some(&self.lease), end, give_up).await
    }

    async fn roll_back(
        self,
        transaction: Arc<dyn StoreTransaction>,
        end: End,
        rolled_back: oneshot::Sender<()>,
    ) -> Result<Closed, StoreError> {
        let error = transaction.roll_back().await.err();
        let _ = rolled_back.send(());
        match error {
            Some(error) if error.kind() == TransactionErrorKind::Ended => {
                self.execution.log_failure(&error, ENDED_BY_HANDLER);
                self.hold().await
            }
            Some(error) => {
                self.execution.log_failure(&error, "the transaction was lost");
                self.end(end).await
            }
            None => self.end(end).await,
        }
    }

    /// The handler has ended its transaction itself, so that nobody knows what was committed.
    async fn hold(self) -> Result<Closed, StoreError> {
        self.execution.log_held();
        self.write_down(&End::Hold).await?;
        let detail = "The handler ended its transaction itself. The request is not performed again.";
        Ok(Closed::Refused(Rejection::new(RejectionCode::TransactionEnded, detail)))
    }

    async fn commit(
        self,
        transaction: Arc<dyn StoreTransaction>,
        response: Bytes,
    ) -> Result<Closed, StoreError> {
        let Err(error) = transaction.commit(response).await else { return Ok(Closed::Ended(Ended::Done)) };
        let (code, detail) = match error.kind() {
            TransactionErrorKind::Ended => {
                self.execution.log_failure(&error, ENDED_BY_HANDLER);
                return self.hold().await;
            }
            TransactionErrorKind::Lent => {
                (RejectionCode::TransactionKept, "The handler kept its transaction, which was rolled back.")
            }
            TransactionErrorKind::Conflict => (
                RejectionCode::TransactionConflict,
                "The request collided with another one and nothing was done.",
            ),
            TransactionErrorKind::Failed => (
                RejectionCode::TransactionFailed,
                "The database did not accept the changes; nothing was done.",
            ),
            TransactionErrorKind::Lost
            | TransactionErrorKind::Gone
            | TransactionErrorKind::Unavailable
            | TransactionErrorKind::Unconfirmed => {
                (RejectionCode::TransactionLost, "The transaction was lost and nothing was done.")
            }
        };
        self.execution.log_failure(&error, "the transaction was not committed");
        // Releasing waits until the transaction has come to its end, and then tells which: a record that was completed
        // after all cannot be released.
        let ended = self.write_down(&End::Release).await?;
        Ok(match ended {
            Ended::Lost(record) if record.attempt.as_ref() == Some(&self.execution.attempt.id) => {
                Closed::Ended(Ended::Done)
            }
            Ended::Lost(record) if record.fingerprint == self.execution.fingerprint => {
                Closed::Ended(Ended::Lost(record))
            }
            Ended::Lost(_) | Ended::Done | Ended::Absent => Closed::Refused(Rejection::new(code, detail)),
        })
    }
}

const ENDED_BY_HANDLER: &str = "the handler has ended its transaction itself: what it wrote may be committed";

/// For how long a client waits for its response to be stored while the store does not answer.
const MAX_WAIT: Duration = Duration::from_secs(10);
/// For how long a client whose request was not performed waits for the rollback.
const PATIENCE: Duration = Duration::from_millis(100);
