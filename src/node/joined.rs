//! Claims of one key that are under way simultaneously: one asks the store, the others share its
//! outcome.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

use crate::{
    consumer::Consumer,
    error::StoreError,
    key::IdempotencyKey,
    stored::record::{Attempt, AttemptId, Claim, ClaimOutcome, Record},
};

/// The claims that ask the store, each with those that wait for its outcome.
#[derive(Debug, Default)]
pub(crate) struct Joined(Mutex<HashMap<(Consumer, IdempotencyKey), UnderWay>>);

#[derive(Debug)]
struct UnderWay {
    first: AttemptId,
    behind: Vec<oneshot::Sender<ClaimOutcome>>,
}

/// The place of a claim among those of its key.
pub(crate) enum Place<'a> {
    /// It asks the store.
    First(First<'a>),
    /// It gets the outcome of the first. An outcome that is no answer for it does not come: then it
    /// asks itself.
    Behind(oneshot::Receiver<ClaimOutcome>),
}

/// The claim that asks the store. Dropped, it lets those behind it ask themselves.
pub(crate) struct First<'a> {
    joined: &'a Joined,
    claim: &'a Claim,
}

impl Joined {
    fn under_way(&self) -> MutexGuard<'_, HashMap<(Consumer, IdempotencyKey), UnderWay>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn enter<'a>(&'a self, claim: &'a Claim) -> Place<'a> {
        let Attempt { consumer, key, id: first } = claim.attempt.clone();
        let identity = (consumer, key);
        let mut under_way = self.under_way();
        if let Some(joined) = under_way.get_mut(&identity) {
            let (sender, receiver) = oneshot::channel();
            joined.behind.push(sender);
            return Place::Behind(receiver);
        }
        under_way.insert(identity, UnderWay { first, behind: Vec::new() });
        Place::First(First { joined: self, claim })
    }

    /// Lets the claims of a key that an operator has ended ask the store again: the answer that is
    /// under way may be from before.
    pub(crate) fn forget(&self, consumer: &Consumer, key: &IdempotencyKey) {
        self.under_way().remove(&(consumer.clone(), key.clone()));
    }
}

impl First<'_> {
    /// Gives the outcome to those behind.
    pub(crate) fn share(self, outcome: &Result<ClaimOutcome, StoreError>) {
        for sender in self.leave() {
            if let Some(shared) = shared(self.claim, outcome) {
                let _ = sender.send(shared);
            }
        }
    }

    fn leave(&self) -> Vec<oneshot::Sender<ClaimOutcome>> {
        let Attempt { consumer, key, id } = self.claim.attempt.clone();
        let identity = (consumer, key);
        let mut under_way = self.joined.under_way();
        // After an operator's call, or after `share`, another claim may be the first.
        match under_way.get(&identity).is_some_and(|joined| joined.first == id) {
            true => under_way.remove(&identity).map(|joined| joined.behind).unwrap_or_default(),
            false => Vec::new(),
        }
    }
}

impl Drop for First<'_> {
    fn drop(&mut self) {
        self.leave();
    }
}

/// The outcome of the first claim for one behind it; `None` if that must ask itself.
fn shared(first: &Claim, outcome: &Result<ClaimOutcome, StoreError>) -> Option<ClaimOutcome> {
    let record = match outcome {
        Ok(ClaimOutcome::Won { record_id, attempt_number, .. }) => {
            let Claim { attempt, fingerprint, lease, .. } = first;
            Box::new(Record::won(attempt, fingerprint, *lease, *record_id, *attempt_number))
        }
        // Its own claim might take the record over.
        Ok(ClaimOutcome::Exists(record)) if record.is_lapsed() => return None,
        Ok(ClaimOutcome::Exists(record)) => record.clone(),
        Ok(ClaimOutcome::Contended) => return Some(ClaimOutcome::Contended),
        Err(_) => return None,
    };
    Some(ClaimOutcome::Exists(record))
}
