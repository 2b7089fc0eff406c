//! The end of an attempt that has its key by its transaction alone.
//!
//! A transaction that is rolled back leaves nothing: the next retry runs immediately.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::timeout;

use crate::{
    attempt::{Facts, Ownership},
    error::StoreError,
    layer::closing::{Closed, Closing, ENDED_BY_HANDLER, Outcome, SHORT_WAIT, wait_for_commit},
    node::{RETRY, ends::End, tasks::task_ended},
    redact::TRACING_TARGET,
    retry::retry_until,
    store::transaction::{SingleTransaction, TransactionErrorKind},
    stored::record::{Fenced, Record, RecordState},
};

/// Ends the attempt. The work goes on in a task when waiting for it takes too long.
pub(super) async fn close(
    ownership: Ownership,
    transaction: Arc<dyn SingleTransaction>,
    Outcome { end, keeps_writes }: Outcome,
) -> Closed {
    let facts = Arc::clone(ownership.facts());
    let tasks = &facts.node.tasks;
    match end {
        End::Complete(response) => {
            let closing = tasks.begin(complete(ownership, transaction, response, keeps_writes));
            wait_for_commit(&facts, closing).await
        }
        // A rollback waits behind a statement that still runs. The client of a request that was not
        // performed does not.
        End::Release => wait(&facts, tasks.begin(roll_back(ownership, transaction)), SHORT_WAIT).await,
        End::Hold => {
            let closing = tasks.begin(hold_as_judged(ownership, transaction));
            wait(&facts, closing, facts.settings.settle_wait()).await
        }
    }
}

/// Waits at most `limit`. After that, the end of the attempt goes on in a task.
async fn wait(facts: &Facts, closing: Closing, limit: Duration) -> Closed {
    let Ok(closed) = timeout(limit, closing).await else { return Closed::AsJudged };
    closed.unwrap_or_else(|error| Err(task_ended(error))).unwrap_or_else(|error| {
        facts.log_failure(&error, "the end of an attempt is not stored");
        Closed::AsJudged
    })
}

/// Commits the completed record, with or without the writes of the handler.
async fn complete(
    ownership: Ownership,
    transaction: Arc<dyn SingleTransaction>,
    response: Bytes,
    keeps_writes: bool,
) -> Result<Closed, StoreError> {
    let committed = match keeps_writes {
        true => transaction.commit(response).await,
        false => transaction.complete(response).await,
    };
    let Err(error) = committed else { return Ok(Closed::AsJudged) };
    ownership.node.replays.note_lost(error.kind());
    if error.kind() == TransactionErrorKind::Ended {
        ownership.log_failure(&error, ENDED_BY_HANDLER);
        return hold(&ownership, &transaction).await;
    }
    ownership.log_failure(&error, "the transaction was not committed");
    if !may_have_record(error.kind()) {
        return Ok(Closed::Refused(error.kind().rejection()));
    }
    Ok(match outcome(&ownership, &transaction).await? {
        Some(record) if is_completed_by(&record, &ownership) => Closed::AsJudged,
        Some(record) if record.fingerprint == ownership.fingerprint => Closed::Superseded(Box::new(record)),
        // The commit's outcome was unknown; that there is no record shows that it was not committed.
        _ if error.kind() == TransactionErrorKind::Unconfirmed => {
            Closed::Refused(TransactionErrorKind::Lost.rejection())
        }
        _ => Closed::Refused(error.kind().rejection()),
    })
}

/// Another attempt may have completed or claimed the key, or this one after all.
fn may_have_record(kind: TransactionErrorKind) -> bool {
    use TransactionErrorKind::{Conflict, Lost, Unconfirmed};

    matches!(kind, Unconfirmed | Lost | Conflict)
}

fn is_completed_by(record: &Record, facts: &Facts) -> bool {
    record.attempt == Some(facts.attempt.id) && matches!(record.state, RecordState::Completed { .. })
}

/// Asks what became of the transaction, for as long as the attempt might have run.
async fn outcome(
    facts: &Facts,
    transaction: &Arc<dyn SingleTransaction>,
) -> Result<Option<Record>, StoreError> {
    retry_until(
        facts.settings.give_up(),
        RETRY,
        || transaction.outcome(),
        |error| {
            tracing::warn!(
                target: TRACING_TARGET, consumer = %facts.attempt.consumer, attempt = %facts.attempt.id,
                error = error as &dyn std::error::Error,
                "it is not known yet whether a transaction was committed; asking again"
            );
        },
    )
    .await
    .inspect_err(|error| facts.log_failure(error, "it is not known whether a transaction was committed"))
}

/// Rolls the transaction back.
async fn roll_back(
    ownership: Ownership,
    transaction: Arc<dyn SingleTransaction>,
) -> Result<Closed, StoreError> {
    match transaction.roll_back().await {
        Err(error) if error.kind() == TransactionErrorKind::Ended => {
            ownership.log_failure(&error, ENDED_BY_HANDLER);
            return hold(&ownership, &transaction).await;
        }
        Err(error) => {
            ownership.node.replays.note_lost(error.kind());
            ownership.log_failure(&error, "the transaction was lost");
        }
        Ok(()) => {}
    }
    Ok(Closed::AsJudged)
}

/// Holds the key after the handler has ended its transaction itself: it may have committed effects
/// that no response belongs to.
async fn hold(facts: &Facts, transaction: &Arc<dyn SingleTransaction>) -> Result<Closed, StoreError> {
    add_held(facts, transaction).await?;
    Ok(Closed::Refused(TransactionErrorKind::Ended.rejection()))
}

/// Holds the key, as the handler asks for.
async fn hold_as_judged(
    ownership: Ownership,
    transaction: Arc<dyn SingleTransaction>,
) -> Result<Closed, StoreError> {
    add_held(&ownership, &transaction).await?;
    Ok(Closed::AsJudged)
}

/// Undoes what the handler has written, and adds a held record, so that no retry runs.
async fn add_held(facts: &Facts, transaction: &Arc<dyn SingleTransaction>) -> Result<(), StoreError> {
    facts.log_held();
    let held = retry_until(
        facts.settings.give_up(),
        RETRY,
        || transaction.hold(),
        |error| {
            facts.log_failure(error, "the key is not held yet; trying again");
        },
    );
    if held.await.inspect_err(|error| facts.log_failure(error, "the key is not held"))? == Fenced::Lost {
        tracing::error!(
            target: TRACING_TARGET, consumer = %facts.attempt.consumer, attempt = %facts.attempt.id,
            "the key could not be held: another attempt has claimed or completed it meanwhile"
        );
    }
    Ok(())
}
