//! The end of an attempt: its record is completed, released or held, its transaction committed or
//! rolled back.
//!
//! ```text
//! HandlerEnd ──Judge::judge──▶ Outcome ──close──▶ Closed ──Judge::answer──▶ response
//!                          └─▶ Verdict ───────────────────────┘
//! ```
//!
//! `Ownership::write` returns what the store says, as [`Written`]. `Ownership::end` also holds the
//! record if an intent or a phase asks for that, and returns [`Ended`].

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{sync::oneshot, time::timeout};

use crate::{
    attempt::{Ended, Facts, Ownership},
    error::{BoxError, StoreError},
    layer::single,
    node::{
        ends::{End, Written},
        work::Work,
    },
    rejection::Rejection,
    store::transaction::{StoreTransaction, TransactionError, TransactionErrorKind, TransactionUsage},
    stored::record::Record,
};

/// The end that is written down, and its transaction's.
pub(crate) struct Outcome {
    pub(crate) end: End,
    /// The handler's writes through its transaction are committed.
    pub(crate) keeps_writes: bool,
}

impl From<End> for Outcome {
    fn from(end: End) -> Self {
        Self { end, keeps_writes: false }
    }
}

/// The answer to the client, by how the attempt has ended.
pub(crate) enum Closed {
    /// The verdict on its handler.
    AsJudged,
    /// The answer of the record, which another attempt of the same request has.
    Superseded(Box<Record>),
    /// A refusal: the attempt could not end as it should.
    Refused(Rejection),
}

pub(super) type Closing = Work<Result<Closed, StoreError>>;

/// Ends the attempt. The work goes on in a task when waiting for it takes too long.
pub(crate) async fn close(ownership: Ownership, Outcome { end, keeps_writes }: Outcome) -> Closed {
    let facts = Arc::clone(ownership.facts());
    if let Some(transaction) = facts.single.clone() {
        return single::close(ownership, transaction, Outcome { end, keeps_writes }).await;
    }
    let tasks = &facts.node.tasks;
    let Some(transaction) = used_transaction(&facts).await else {
        let closing = tasks.begin(end_as(ownership, end));
        return wait_for_end(&facts, closing, facts.settings.settle_wait()).await;
    };
    if keeps_writes && let End::Complete(response) = end {
        let closing = tasks.begin(commit(ownership, transaction, response));
        return wait_for_commit(&facts, closing).await;
    }
    close_rolled_back(ownership, transaction, end).await
}

/// The transaction, if the handler has asked for it. If not, it is ended, so that a part of the
/// handler that still runs cannot begin it.
async fn used_transaction(facts: &Facts) -> Option<Arc<dyn StoreTransaction>> {
    let transaction = facts.transaction.clone()?;
    if transaction.usage() != TransactionUsage::Unused {
        return Some(transaction);
    }
    // Not in a task: nothing was begun, so that the store is not called.
    if let Err(error) = transaction.roll_back().await {
        facts.log_failure(&error, "an unused transaction could not be closed");
    }
    None
}

async fn wait_for_end<E: Into<BoxError>>(
    facts: &Facts,
    closing: impl Future<Output = Result<Result<Closed, StoreError>, E>>,
    limit: Duration,
) -> Closed {
    facts.node.tasks.wait_for(closing, limit).await.unwrap_or_else(|error| {
        facts.log_failure(&error, SENT_EARLY);
        Closed::AsJudged
    })
}

pub(super) async fn wait_for_commit(facts: &Facts, closing: Closing) -> Closed {
    facts.node.tasks.wait_for(closing, facts.settings.store_timeout).await.unwrap_or_else(|error| {
        facts.log_failure(&error, "it is not known yet whether the transaction was committed");
        Closed::Refused(TransactionErrorKind::Unconfirmed.rejection())
    })
}

/// A rollback waits behind a statement that still runs. Only a response that is to be stored waits
/// for it.
async fn close_rolled_back(ownership: Ownership, transaction: Arc<dyn StoreTransaction>, end: End) -> Closed {
    let facts = Arc::clone(ownership.facts());
    let settle_wait = facts.settings.settle_wait();
    let completes = matches!(end, End::Complete(_));
    let rollback_wait = if completes { settle_wait } else { SHORT_WAIT };
    // On SQLite nothing can be written before a transaction that is in use is dropped.
    let in_use = transaction.usage() == TransactionUsage::InUse;
    let end_wait = if in_use { SHORT_WAIT } else { settle_wait };
    let (sender, rolled_back) = oneshot::channel();
    let closing = facts.node.tasks.spawn(async move {
        let rollback = transaction.roll_back().await;
        // Before the end is written, which may take long in its turn.
        let _ = sender.send(());
        end_after(rollback, ownership, end).await
    });
    match timeout(rollback_wait, rolled_back).await {
        Ok(_) => wait_for_end(&facts, closing, end_wait).await,
        // The rollback goes on in its task, and the end is written after it.
        Err(elapsed) => {
            if completes {
                facts.log_failure(&elapsed, SENT_EARLY);
            }
            Closed::AsJudged
        }
    }
}

async fn end_as(ownership: Ownership, end: End) -> Result<Closed, StoreError> {
    Ok(match ownership.end(end).await? {
        Ended::Done | Ended::Gone => Closed::AsJudged,
        Ended::Superseded(record) => Closed::Superseded(record),
        Ended::Held(rejection) => Closed::Refused(rejection),
    })
}

/// Ends the attempt after its transaction was rolled back, or could not be.
async fn end_after(
    rollback: Result<(), TransactionError>,
    ownership: Ownership,
    end: End,
) -> Result<Closed, StoreError> {
    match rollback {
        Err(error) if error.kind() == TransactionErrorKind::Ended => {
            ownership.log_failure(&error, ENDED_BY_HANDLER);
            return hold(ownership).await;
        }
        Err(error) => {
            ownership.node.replays.note_lost(error.kind());
            ownership.log_failure(&error, "the transaction was lost");
        }
        Ok(()) => {}
    }
    end_as(ownership, end).await
}

/// The handler has ended its transaction itself: it may have committed effects that no response
/// belongs to.
async fn hold(ownership: Ownership) -> Result<Closed, StoreError> {
    ownership.write(&End::Hold).await?;
    Ok(Closed::Refused(TransactionErrorKind::Ended.rejection()))
}

async fn commit(
    ownership: Ownership,
    transaction: Arc<dyn StoreTransaction>,
    response: Bytes,
) -> Result<Closed, StoreError> {
    // A phase that is still ending may find out that the record must be held, and that nothing may
    // be committed.
    ownership.progress.phases_ended().await;
    if ownership.progress.held().is_some() {
        return end_after(transaction.roll_back().await, ownership, End::Hold).await;
    }
    // The transaction has the record locked, which stands in for the lease.
    ownership.leave_lease();
    let Err(error) = transaction.commit(response).await else { return Ok(Closed::AsJudged) };
    ownership.node.replays.note_lost(error.kind());
    if error.kind() == TransactionErrorKind::Ended {
        ownership.log_failure(&error, ENDED_BY_HANDLER);
        return hold(ownership).await;
    }
    ownership.log_failure(&error, "the transaction was not committed");
    // A release waits until the transaction has come to its end, and tells which: a record that was
    // completed after all cannot be released.
    Ok(match ownership.write(&End::Release).await? {
        Written::Lost(record) if record.attempt == Some(ownership.attempt.id) => Closed::AsJudged,
        Written::Lost(record) if record.fingerprint == ownership.fingerprint => Closed::Superseded(record),
        // The commit's outcome was unknown; the release shows that it was not committed.
        _ if error.kind() == TransactionErrorKind::Unconfirmed => {
            Closed::Refused(TransactionErrorKind::Lost.rejection())
        }
        Written::Lost(_) | Written::Done | Written::Absent => Closed::Refused(error.kind().rejection()),
    })
}

pub(super) const ENDED_BY_HANDLER: &str =
    "the handler has ended its transaction itself: what it wrote may be committed";

const SENT_EARLY: &str = "the response is sent although it is not stored yet";

/// The time that a client waits for a rollback, if its request was not performed, and for an end
/// that waits for the handler.
pub(super) const SHORT_WAIT: Duration = Duration::from_millis(100);
