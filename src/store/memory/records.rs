//! The records of a process.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use http::Extensions;
use tokio::time::Instant;

use super::{
    MemoryStore,
    entry::{Decision, Entry, State, decide, identity_of},
    shard::size,
    shards::lock,
};
use crate::{
    consumer::Consumer,
    error::{StoreError, StoreErrorKind},
    key::IdempotencyKey,
    store::{
        Store,
        recovery::RecoveryStore,
        transaction::{BeginOutcome, StoreTransaction, TransactionLimits},
    },
    stored::record::{
        Attempt, Claim, ClaimOutcome, CompleteOutcome, Fenced, Record, RecordFilter, RecordState,
        RenewOutcome, Renewal, Resolution, ResolveOutcome,
    },
};

#[async_trait]
impl Store for MemoryStore {
    async fn prepare(&self) -> Result<Vec<String>, StoreError> {
        Ok(Vec::new())
    }

    async fn claim(&self, claim: &Claim) -> Result<ClaimOutcome, StoreError> {
        // Before a shard is locked, because making room locks one shard after the other.
        self.make_room();
        let identity = identity_of(&claim.attempt);
        let mut shard = self.shards.shard(&identity);
        let (now, stored) = (Instant::now(), &self.shards.stored);
        match decide(shard.entries.get(&identity), claim, now) {
            Decision::Create => {
                // The expired record goes first, so that its key can be claimed again when the
                // store is full.
                shard.remove(&identity, stored);
                if let Some(error) = self.full() {
                    return Err(error);
                }
                shard.put(identity, Entry::new(claim, now), stored);
                Ok(ClaimOutcome::won(claim.record_id, 1))
            }
            Decision::Change(entry, outcome) => {
                shard.put(identity, *entry, stored);
                Ok(outcome)
            }
            Decision::Hold(entry) => {
                let record = self.shards.show(&identity, &entry, now);
                shard.put(identity, *entry, stored);
                Ok(ClaimOutcome::Exists(Box::new(record)))
            }
            Decision::Show(entry) => {
                Ok(ClaimOutcome::Exists(Box::new(self.shards.show(&identity, entry, now))))
            }
        }
    }

    async fn renew(&self, renewals: &[Renewal]) -> Result<Vec<RenewOutcome>, StoreError> {
        Ok(renewals.iter().map(|renewal| self.renew_one(renewal)).collect())
    }

    async fn complete(&self, attempt: &Attempt, response: Bytes) -> Result<CompleteOutcome, StoreError> {
        let identity = identity_of(attempt);
        let mut shard = self.shards.shard(&identity);
        let Some(entry) = shard.entries.get(&identity) else {
            return Ok(CompleteOutcome::Absent);
        };
        let now = Instant::now();
        if entry.attempt != Some(attempt.id) {
            let record = self.shards.show(&identity, entry, now);
            return Ok(CompleteOutcome::Lost(Box::new(record)));
        }
        // A repeated completion succeeds, and the stored response stays.
        if !entry.is_completed() {
            let completed = entry.completed(response, now);
            shard.put(identity, completed, &self.shards.stored);
        }
        Ok(CompleteOutcome::Completed)
    }

    async fn release(&self, attempt: &Attempt) -> Result<Fenced, StoreError> {
        let identity = identity_of(attempt);
        let mut shard = self.shards.shard(&identity);
        match shard.entries.get(&identity) {
            Some(entry) if entry.is_mine(attempt) => {
                let released = entry.released(Instant::now());
                shard.give_back(identity, released, &self.shards.stored);
                Ok(Fenced::Applied)
            }
            _ => Ok(Fenced::Lost),
        }
    }

    async fn hold(&self, attempt: &Attempt) -> Result<Fenced, StoreError> {
        let identity = identity_of(attempt);
        let mut shard = self.shards.shard(&identity);
        match shard.entries.get_mut(&identity) {
            Some(entry) if entry.is_mine(attempt) => {
                entry.state = State::Held;
                Ok(Fenced::Applied)
            }
            _ => Ok(Fenced::Lost),
        }
    }

    async fn get(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<Option<Record>, StoreError> {
        let identity = (consumer.clone(), key.clone());
        let shard = self.shards.shard(&identity);
        Ok(shard.entries.get(&identity).map(|entry| self.shards.show(&identity, entry, Instant::now())))
    }

    async fn list(&self, filter: RecordFilter, limit: u32) -> Result<Vec<Record>, StoreError> {
        let now = Instant::now();
        let mut records: Vec<Record> = Vec::new();
        // One shard after the other: a list need not show one moment, and must not stop all claims.
        for shard in &self.shards.parts {
            let shard = lock(shard);
            let shown = shard.entries.iter().map(|(identity, entry)| self.shards.show(identity, entry, now));
            records.extend(shown.filter(|record| matches(filter, &record.state)));
        }
        records.sort_by_key(|record| record.created_at);
        records.truncate(size(limit));
        Ok(records)
    }

    async fn evict(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<bool, StoreError> {
        let identity = (consumer.clone(), key.clone());
        Ok(self.shards.shard(&identity).remove(&identity, &self.shards.stored))
    }

    async fn resolve(
        &self,
        consumer: &Consumer,
        key: &IdempotencyKey,
        resolution: Resolution,
    ) -> Result<ResolveOutcome, StoreError> {
        let identity = (consumer.clone(), key.clone());
        let mut shard = self.shards.shard(&identity);
        let now = Instant::now();
        let Some(entry) = shard.entries.get(&identity) else {
            return Ok(ResolveOutcome::Absent);
        };
        if entry.is_completed() {
            return Ok(ResolveOutcome::AlreadyCompleted);
        }
        if !entry.is_resolvable(now) {
            return Ok(ResolveOutcome::InProgress);
        }
        let stored = &self.shards.stored;
        match resolution {
            Resolution::Release if entry.is_unrepeatable(now) => {
                return Ok(ResolveOutcome::UnresolvedIntents);
            }
            Resolution::Release => {
                // An operator who releases a record allows all its attempts again.
                let released = Entry { abandoned: 0, ..entry.released(now) };
                shard.give_back(identity, released, stored);
            }
            Resolution::Complete(response) => {
                let (state, expires_at) = (State::Completed { response }, entry.whole_retention(now));
                let completed = Entry { state, attempt: None, expires_at, ..entry.clone() };
                shard.put(identity, completed, stored);
            }
        }
        Ok(ResolveOutcome::Resolved)
    }

    fn transaction(
        &self,
        _: &Attempt,
        _: &TransactionLimits,
        _: &mut Extensions,
    ) -> Option<Arc<dyn StoreTransaction>> {
        None
    }

    async fn begin_single(&self, _: &Claim, _: &TransactionLimits) -> Result<BeginOutcome, StoreError> {
        let message = "MemoryStore has no transactions: use Strategy::Claimed, or the store of a database";
        Err(StoreError::new(StoreErrorKind::Misconfigured, message))
    }

    fn recovery(&self) -> Option<Arc<dyn RecoveryStore>> {
        Some(Arc::new(self.clone()))
    }

    async fn purge(&self, limit: u32) -> Result<u64, StoreError> {
        Ok(self.shards.purge(limit, |shard, left| shard.purge(left, &self.shards.stored)))
    }

    async fn close(&self) {}
}

impl MemoryStore {
    fn renew_one(&self, renewal: &Renewal) -> RenewOutcome {
        let identity = identity_of(&renewal.attempt);
        let mut shard = self.shards.shard(&identity);
        let Some(entry) = shard.entries.get(&identity) else { return RenewOutcome::Lost };
        if entry.attempt != Some(renewal.attempt.id) {
            return RenewOutcome::Lost;
        }
        match entry.state {
            State::InProgress { .. } => {
                let renewed = entry.clone().with_lease(renewal.lease, Instant::now());
                shard.put(identity, renewed, &self.shards.stored);
                RenewOutcome::Renewed
            }
            State::Held => RenewOutcome::Skipped,
            State::Completed { .. } => RenewOutcome::Lost,
        }
    }
}

fn matches(filter: RecordFilter, state: &RecordState) -> bool {
    match filter {
        RecordFilter::All => true,
        RecordFilter::InProgress => matches!(state, RecordState::InProgress { .. }),
        RecordFilter::Held => matches!(state, RecordState::Held),
        RecordFilter::Completed => matches!(state, RecordState::Completed { .. }),
    }
}
