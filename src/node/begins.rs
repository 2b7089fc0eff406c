//! Transactions that are begun instead of a claim, in tasks that leave none open when the caller
//! has gone.

use std::{sync::Arc, time::Duration};

use tokio::sync::oneshot;

use super::{
    Node,
    errand::{receive, repeat_while},
    tasks::no_answer,
};
use crate::{
    error::StoreError,
    redact::TRACING_TARGET,
    store::{
        Store,
        transaction::{BeginOutcome, SingleTransaction, TransactionLimits},
    },
    stored::record::Claim,
};

type Caller = oneshot::Sender<Result<BeginOutcome, StoreError>>;

impl Node {
    /// Begins the transaction of an attempt, unless an attempt of this process runs for its key.
    /// Waits at most `limit`. A transaction that is begun later is rolled back.
    pub(crate) async fn begin(
        &self,
        claim: &Claim,
        transaction: TransactionLimits,
        limit: Duration,
    ) -> Result<BeginOutcome, StoreError> {
        if let Some(record) = self.running.find(&claim.attempt.consumer, &claim.attempt.key) {
            return Ok(BeginOutcome::Exists(Box::new(record)));
        }
        let (sender, receiver) = oneshot::channel();
        self.tasks.spawn(begin_for(Arc::clone(&self.store), claim.clone(), transaction, sender));
        self.replays.note(receive(receiver, limit).await.unwrap_or_else(|| Err(no_answer(limit))))
    }

    /// Rolls back, in the background, a transaction whose handler was not started.
    pub(crate) fn take_back(&self, transaction: Arc<dyn SingleTransaction>) {
        self.tasks.spawn(roll_back(transaction));
    }
}

async fn begin_for(store: Arc<dyn Store>, claim: Claim, limits: TransactionLimits, caller: Caller) {
    // After an error nothing is begun, so that a try may be repeated.
    let begin_once = || store.begin_single(&claim, &limits);
    let (outcome, _) = repeat_while(|| !caller.is_closed(), begin_once).await;
    if let Err(Ok(BeginOutcome::Begun { transaction, .. })) = caller.send(outcome) {
        roll_back(transaction).await;
    }
}

async fn roll_back(transaction: Arc<dyn SingleTransaction>) {
    if let Err(error) = transaction.roll_back().await {
        let error = &error as &dyn std::error::Error;
        tracing::warn!(target: TRACING_TARGET, error, "a transaction without a handler was lost");
    }
}
