//! Claims, in tasks that learn their outcome even when the caller has gone.

use std::{sync::Arc, time::Duration};

use tokio::{
    runtime::Handle,
    time::{Instant, timeout, timeout_at},
};

use tokio_util::task::task_tracker::TaskTrackerToken;

use super::{
    FIRST_LATE_PAUSE, Node, UNDO_LIMIT, cache::Look, ends::End, errand::repeat_while, joined::Place,
    leases::usable, tasks::no_answer,
};
use crate::{
    consumer::Consumer,
    error::StoreError,
    key::IdempotencyKey,
    redact::TRACING_TARGET,
    stored::record::{Attempt, Claim, ClaimOutcome, Record},
};

impl Node {
    /// Claims a key, unless this process knows its record, waiting at most `limit`.
    pub(crate) async fn claim(
        self: &Arc<Self>,
        claim: &Claim,
        limit: Duration,
    ) -> Result<ClaimOutcome, StoreError> {
        let give_up = Instant::now() + limit;
        loop {
            let look = match self.known(&claim.attempt.consumer, &claim.attempt.key) {
                Ok(record) => return Ok(ClaimOutcome::Exists(Box::new(record))),
                Err(look) => look,
            };
            let left = give_up.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(no_answer(limit));
            }
            match self.joined.enter(claim) {
                Place::First(first) => {
                    let outcome = self.claim_in_store(claim.clone(), left).await;
                    if let Ok(ClaimOutcome::Exists(record)) = &outcome {
                        self.replays.keep(record, look);
                    }
                    first.share(&outcome);
                    return outcome;
                }
                Place::Behind(shared) => match timeout(left, shared).await {
                    Ok(Ok(outcome)) => return Ok(outcome),
                    // Those behind ask one after the other: one of them is the first now.
                    Ok(Err(_)) => {}
                    Err(_) => return Err(no_answer(limit)),
                },
            }
        }
    }

    /// Looks up the record of a key in the store, without claiming it.
    pub(crate) async fn look_up(
        &self,
        attempt: &Attempt,
        limit: Duration,
    ) -> Result<Option<Record>, StoreError> {
        let (store, Attempt { consumer, key, .. }) = (Arc::clone(&self.store), attempt.clone());
        self.tasks.call(limit, async move { store.get(&consumer, &key).await }).await
    }

    /// The record of a key that an attempt of this process runs for, or that is cached. Otherwise,
    /// the moment before the store is asked.
    pub(crate) fn known(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<Record, Look> {
        self.running.find(consumer, key).map_or_else(|| self.replays.find(consumer, key), Ok)
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
        let claiming = self.tasks.begin(Arc::clone(self).claim_until(sent_at + limit, claim));
        let outcome = self.tasks.wait_for(claiming, limit).await.and_then(Delivery::accept);
        if matches!(outcome, Ok(ClaimOutcome::Won { .. })) && sent_at.elapsed() > usable {
            self.give_back(attempt);
            return Err(no_answer(limit));
        }
        outcome
    }

    /// Learns the outcome of a claim, for a caller that waits until `give_up` at most.
    async fn claim_until(self: Arc<Self>, give_up: Instant, claim: Claim) -> Result<Delivery, StoreError> {
        // The same attempt asks again: if the lost reply had said that the key was won, it is won again.
        let claim_once = async || self.replays.note(self.store.claim(&claim).await);
        let (outcome, may_arrive_late) = repeat_while(|| Instant::now() < give_up, claim_once).await;
        let token = self.tasks.token();
        Ok(Delivery { node: self, claim, may_arrive_late, outcome: Some(outcome), _token: token })
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

/// The outcome of a claim, on its way to the caller. If the caller has stopped waiting, no handler
/// will start for it: a key that was won is released.
struct Delivery {
    node: Arc<Node>,
    claim: Claim,
    /// A try had no answer, and may be carried out after those that had one.
    may_arrive_late: bool,
    /// `None` once the caller has it.
    outcome: Option<Result<ClaimOutcome, StoreError>>,
    /// Lets draining wait until the release has begun.
    _token: TaskTrackerToken,
}

impl Delivery {
    fn accept(mut self) -> Result<ClaimOutcome, StoreError> {
        let outcome = self.outcome.take();
        // A try that arrives late finds the key won by its own attempt.
        self.may_arrive_late &= !matches!(outcome, Some(Ok(ClaimOutcome::Won { .. })));
        outcome.unwrap_or_else(|| Err(no_answer(Duration::ZERO)))
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        let won = matches!(self.outcome, Some(Ok(ClaimOutcome::Won { .. })));
        // Without a runtime, the end of its lease gives the key back.
        if (won || self.may_arrive_late)
            && let Ok(runtime) = Handle::try_current()
        {
            let (node, claim, may_arrive_late) =
                (Arc::clone(&self.node), self.claim.clone(), self.may_arrive_late);
            let release = async move {
                match may_arrive_late {
                    // Also after another's record was delivered: the release touches only this attempt.
                    true => node.release_late(&claim).await,
                    false => node.release_unstarted(&claim.attempt).await,
                }
            };
            self.node.tasks.spawn_on(release, &runtime);
        }
    }
}
