//! Claims, in tasks that learn their outcome even when the caller has gone.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};

use super::{
    FIRST_LATE_PAUSE, Node, UNDO_LIMIT,
    ends::End,
    errand::{receive, repeat_for},
    leases::usable,
    tasks::no_answer,
};
use crate::{
    error::StoreError,
    redact::TRACING_TARGET,
    stored::record::{Attempt, Claim, ClaimOutcome, Record},
};

impl Node {
    /// Claims a key, unless an attempt of this process runs for it.
    pub(crate) async fn claim(
        self: &Arc<Self>,
        claim: &Claim,
        limit: Duration,
    ) -> Result<ClaimOutcome, StoreError> {
        match self.running.find(&claim.attempt.consumer, &claim.attempt.key) {
            Some(record) => Ok(ClaimOutcome::Exists(Box::new(record))),
            None => self.claim_in_store(claim.clone(), limit).await,
        }
    }

    /// Looks up the record of a key, without claiming it.
    pub(crate) async fn look_up(
        &self,
        attempt: &Attempt,
        limit: Duration,
    ) -> Result<Option<Record>, StoreError> {
        let Attempt { consumer, key, .. } = attempt.clone();
        if let Some(record) = self.running.find(&consumer, &key) {
            return Ok(Some(record));
        }
        let store = Arc::clone(&self.store);
        self.tasks.call(limit, async move { store.get(&consumer, &key).await }).await
    }

    /// Claims a key, waiting at most `limit`. A claim that is won later is released again.
    async fn claim_in_store(
        self: &Arc<Self>,
        claim: Claim,
        limit: Duration,
    ) -> Result<ClaimOutcome, StoreError> {
        let usable = usable(claim.lease);
        let limit = limit.min(usable);
        // Before the claim is sent: the store starts the lease at some moment after this.
        let sent_at = Instant::now();
        let attempt = claim.attempt.clone();
        let (sender, receiver) = oneshot::channel();
        self.tasks.spawn(Arc::clone(self).claim_for(claim, sender));
        let answer = receive(receiver, limit).await;
        if matches!(answer, Some(Ok(ClaimOutcome::Won { .. }))) && sent_at.elapsed() > usable {
            self.give_back(attempt);
            return Err(no_answer(limit));
        }
        answer.unwrap_or_else(|| Err(no_answer(limit)))
    }

    /// Learns the outcome of a claim. A claim that is won and cannot be delivered is released.
    async fn claim_for(
        self: Arc<Self>,
        claim: Claim,
        caller: oneshot::Sender<Result<ClaimOutcome, StoreError>>,
    ) {
        // The same attempt asks again: if the lost reply had said that the key was won, it is won again.
        let (outcome, may_arrive_late) = repeat_for(&caller, || self.store.claim(&claim)).await;
        let won = matches!(outcome, Ok(ClaimOutcome::Won { .. }));
        // Fails if the caller has stopped waiting: then no handler will start for this claim.
        let delivered = caller.send(outcome).is_ok();
        if won && delivered {
            return;
        }
        if may_arrive_late {
            // Also after another's record was delivered: the release touches only this attempt.
            self.release_late(&claim).await;
        } else if won {
            self.release_unstarted(&claim.attempt).await;
        }
    }

    /// Releases a claim whose reply was lost, and again while it may still arrive: a server that
    /// was frozen, or waits for its standby, carries it out after the first release.
    async fn release_late(&self, claim: &Claim) {
        // A claim that arrives even later keeps the key for one lease.
        let end = Instant::now() + claim.lease;
        let mut pause = FIRST_LATE_PAUSE;
        loop {
            self.release_unstarted(&claim.attempt).await;
            // The end of the process must not wait for a claim that probably never arrives.
            if Instant::now() >= end || self.tasks.is_draining() {
                return;
            }
            let _ = timeout_at(end.min(Instant::now() + pause), self.tasks.draining.cancelled()).await;
            pause *= 4;
        }
    }

    /// Releases a claim in the background; its handler was not started.
    pub(crate) fn give_back(self: &Arc<Self>, attempt: Attempt) {
        let node = Arc::clone(self);
        self.tasks.spawn(async move { node.release_unstarted(&attempt).await });
    }

    /// Releases a claim whose handler was not started. Such a claim is never held, under any
    /// policy.
    async fn release_unstarted(&self, attempt: &Attempt) {
        let give_up = Instant::now() + UNDO_LIMIT;
        if let Err(error) = self.end(attempt, None, &End::Release, give_up).await {
            tracing::error!(
                target: TRACING_TARGET, consumer = %attempt.consumer, attempt = %attempt.id,
                error = &error as &dyn std::error::Error,
                "a claim without an attempt could not be released; the end of its lease gives the key back"
            );
        }
    }
}
