//! How an attempt ends: its record is completed, released or held, and its transaction committed or rolled back.

use std::{error::Error, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{sync::oneshot, task::JoinHandle, time::timeout};

use crate::{
    attempt::progress::Progress,
    error::StoreError,
    fingerprint::Fingerprint,
    layer::settings::Settings,
    node::{
        Node,
        ends::{End, Ended},
        leases::Lease,
        running::Entered,
        tasks::answer_of,
    },
    redact::TRACING_TARGET,
    rejection::Rejection,
    store::transaction::{StoreTransaction, TransactionErrorKind, TransactionUsage},
    stored::record::{Attempt, Record},
};

/// An attempt whose handler has ended.
pub(crate) struct Closing {
    pub(crate) node: Arc<Node>,
    pub(crate) settings: Arc<Settings>,
    pub(crate) attempt: Attempt,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) lease: Lease,
    pub(crate) progress: Arc<Progress>,
    pub(crate) _entered: Entered,
}

/// What is written down of an attempt.
pub(crate) struct Outcome {
    pub(crate) end: End,
    /// Whether what the handler wrote through its transaction is to stay.
    pub(crate) keeps_writes: bool,
}

impl From<End> for Outcome {
    fn from(end: End) -> Self {
        Self { end, keeps_writes: false }
    }
}

/// What the client gets, now that an attempt has ended.
pub(crate) enum Closed {
    /// What its handler came to.
    AsJudged,
    /// What another attempt of the same request has stored.
    Superseded(Box<Record>),
    /// This: it could not end as it should.
    Refused(Rejection),
}

type Task = JoinHandle<Result<Closed, StoreError>>;

impl Closing {
    /// Ends the attempt in a task that goes on when waiting for it takes too long.
    pub(crate) async fn close(
        self,
        outcome: Outcome,
        transaction: Option<Arc<dyn StoreTransaction>>,
    ) -> Closed {
        let Outcome { end, keeps_writes } = outcome;
        if matches!(end, End::Hold) {
            self.log_held();
        }
        let this = Arc::new(self);
        let tasks = &this.node.tasks;
        match this.used(transaction).await {
            None => {
                this.wait_for_end(tasks.spawn(Arc::clone(&this).end(end)), this.settings.settle_wait()).await
            }
            Some(transaction) => match end {
                End::Complete(response) if keeps_writes => {
                    this.wait_for_commit(tasks.spawn(Arc::clone(&this).commit(transaction, response))).await
                }
                end @ (End::Complete(_) | End::Release | End::Hold) => {
                    this.wait_for_roll_back(transaction, end).await
                }
            },
        }
    }

    /// The transaction, if the handler has asked for it. If not, nobody gets it from now on.
    async fn used(
        &self,
        transaction: Option<Arc<dyn StoreTransaction>>,
    ) -> Option<Arc<dyn StoreTransaction>> {
        let transaction = transaction?;
        if transaction.usage() != TransactionUsage::Unused {
            return Some(transaction);
        }
        if let Err(error) = transaction.roll_back().await {
            self.log_failure(&error, "a transaction that was begun too late could not be rolled back");
        }
        None
    }

    async fn wait_for_end(&self, task: Task, limit: Duration) -> Closed {
        answer_of(task, limit).await.unwrap_or_else(|error| {
            self.log_failure(&error, "the response is sent although it is not stored yet");
            Closed::AsJudged
        })
    }

    async fn wait_for_commit(&self, task: Task) -> Closed {
        let limit = self.settings.store_timeout;
        answer_of(task, limit).await.unwrap_or_else(|error| {
            self.log_failure(&error, "it is not known yet whether the transaction was committed");
            Closed::Refused(TransactionErrorKind::Unconfirmed.rejection())
        })
    }

    /// Behind a statement that still runs a rollback may take long: only a response that is to be stored waits for it.
    async fn wait_for_roll_back(
        self: &Arc<Self>,
        transaction: Arc<dyn StoreTransaction>,
        end: End,
    ) -> Closed {
        let patience = if matches!(end, End::Complete(_)) { self.settings.settle_wait() } else { PATIENCE };
        // On SQLite nothing can be written before a transaction that is kept is dropped.
        let kept = transaction.usage() == TransactionUsage::InUse;
        let limit = if kept { PATIENCE } else { self.settings.settle_wait() };
        let (sender, rolled_back) = oneshot::channel();
        let task = self.node.tasks.spawn(Arc::clone(self).roll_back(transaction, end, sender));
        match timeout(patience, rolled_back).await {
            Ok(_) => self.wait_for_end(task, limit).await,
            Err(_) => Closed::AsJudged,
        }
    }

    async fn end(self: Arc<Self>, end: End) -> Result<Closed, StoreError> {
        self.progress.phases_ended().await;
        if let Some(rejection) = self.progress.held() {
            self.log_held();
            self.write_down(&End::Hold).await?;
            return Ok(Closed::Refused(rejection));
        }
        let ended = self.write_down(&end).await?;
        if matches!(ended, Ended::Absent | Ended::Lost(_)) {
            tracing::warn!(
                target: TRACING_TARGET, consumer = %self.attempt.consumer,
                key = %self.settings.shown(&self.attempt.key), attempt = %self.attempt.id,
                "the record was gone or another attempt's when its attempt ended"
            );
        }
        Ok(match ended {
            // Another request's response must not be given for this one, and does not contradict it either.
            Ended::Lost(record) if record.fingerprint == self.fingerprint => Closed::Superseded(record),
            Ended::Lost(_) | Ended::Absent | Ended::Done => Closed::AsJudged,
        })
    }

    async fn write_down(&self, end: &End) -> Result<Ended, StoreError> {
        let give_up = self.settings.give_up();
        self.node.end(&self.attempt, Some(&self.lease), end, give_up).await
    }

    async fn roll_back(
        self: Arc<Self>,
        transaction: Arc<dyn StoreTransaction>,
        end: End,
        rolled_back: oneshot::Sender<()>,
    ) -> Result<Closed, StoreError> {
        let error = transaction.roll_back().await.err();
        let _ = rolled_back.send(());
        match error {
            Some(error) if error.kind() == TransactionErrorKind::Ended => {
                self.log_failure(&error, ENDED_BY_HANDLER);
                self.hold().await
            }
            Some(error) => {
                self.log_failure(&error, "the transaction was lost");
                self.end(end).await
            }
            None => self.end(end).await,
        }
    }

    /// The handler has ended its transaction itself, so that nobody knows what was committed.
    async fn hold(&self) -> Result<Closed, StoreError> {
        self.log_held();
        self.write_down(&End::Hold).await?;
        Ok(Closed::Refused(TransactionErrorKind::Ended.rejection()))
    }

    async fn commit(
        self: Arc<Self>,
        transaction: Arc<dyn StoreTransaction>,
        response: Bytes,
    ) -> Result<Closed, StoreError> {
        self.progress.phases_ended().await;
        if self.progress.held().is_some() {
            return self.roll_back(transaction, End::Hold, oneshot::channel().0).await;
        }
        self.lease.leave();
        let Err(error) = transaction.commit(response).await else { return Ok(Closed::AsJudged) };
        if error.kind() == TransactionErrorKind::Ended {
            self.log_failure(&error, ENDED_BY_HANDLER);
            return self.hold().await;
        }
        self.log_failure(&error, "the transaction was not committed");
        // Releasing waits until the transaction has come to its end, and then tells which: a record that was completed
        // after all cannot be released.
        Ok(match self.write_down(&End::Release).await? {
            Ended::Lost(record) if record.attempt.as_ref() == Some(&self.attempt.id) => Closed::AsJudged,
            Ended::Lost(record) if record.fingerprint == self.fingerprint => Closed::Superseded(record),
            // Whatever was not known before: it was not committed.
            _ if error.kind() == TransactionErrorKind::Unconfirmed => {
                Closed::Refused(TransactionErrorKind::Lost.rejection())
            }
            Ended::Lost(_) | Ended::Done | Ended::Absent => Closed::Refused(error.kind().rejection()),
        })
    }

    fn log_held(&self) {
        tracing::error!(
            target: TRACING_TARGET, consumer = %self.attempt.consumer,
            key = %self.settings.shown(&self.attempt.key), attempt = %self.attempt.id,
            "the key is held: the outcome is unknown and an operator must resolve it"
        );
    }

    fn log_failure(&self, error: &(dyn Error + 'static), what: &str) {
        self.settings.log_failure(&self.attempt, error, what);
    }
}

const ENDED_BY_HANDLER: &str = "the handler has ended its transaction itself: what it wrote may be committed";

/// For how long a client whose request was not performed waits for the rollback.
const PATIENCE: Duration = Duration::from_millis(100);
