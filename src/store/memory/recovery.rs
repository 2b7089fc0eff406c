//! Intents and kept requests: the contract of [`RecoveryStore`] as readable code.
//!
//! `intents.rs` says when an intent may be called and changed, `entry.rs` when a record may be.

use std::{cmp::Reverse, collections::BTreeMap, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::time::Instant;

use super::{
    MemoryStore,
    entry::{Entry, LONGEST, identity_of},
    intents::StoredIntent,
    requests::Request,
    shard::size,
};
use crate::{
    consumer::Consumer,
    error::StoreError,
    key::IdempotencyKey,
    store::recovery::RecoveryStore,
    stored::{
        intent::{
            Intent, IntentCounts, IntentFence, IntentFilter, IntentState, IntentUpdate, OpenOutcome, Opening,
            Overlooked, UpstreamKey,
        },
        record::{Attempt, Fenced, RecordId},
        request::{KeptRequest, RequestUpdate},
    },
};

#[async_trait]
impl RecoveryStore for MemoryStore {
    async fn open_intent(&self, opening: &Opening) -> Result<OpenOutcome, StoreError> {
        let identity = identity_of(&opening.attempt);
        let mut shard = self.shards.shard(&identity);
        let now = self.shards.now();
        let owned = |entry: &Entry| entry.is_owned_by(opening.attempt.id, opening.record_id, now.instant);
        if !shard.entries.get(&identity).is_some_and(owned) {
            return Ok(OpenOutcome::Lost);
        }
        let called = match shard.intents.get(opening.upstream_key) {
            None => StoredIntent::opened(opening, now),
            // A repeated opening: the reply to the first may have been lost.
            Some(kept) if kept.is_open_by(opening.call) => return Ok(OpenOutcome::Opened),
            Some(kept) if kept.is_callable(opening, now) => kept.called_again(opening, now),
            Some(kept) => return Ok(OpenOutcome::Recorded(Box::new(kept.show(now)))),
        };
        shard.put_intent(called, now.instant, &self.shards.stored);
        Ok(OpenOutcome::Opened)
    }

    async fn update_intent(
        &self,
        intent: UpstreamKey,
        fence: IntentFence,
        update: &IntentUpdate,
        attention: Option<&str>,
    ) -> Result<Fenced, StoreError> {
        // The shard stays locked from here on, so that the intent cannot change before it is
        // updated.
        let Some(mut shard) = self.shards.shard_where(|shard| shard.intents.get(intent).is_some()) else {
            return Ok(Fenced::Lost);
        };
        let now = self.shards.now();
        match shard.intents.get(intent) {
            Some(kept) if kept.permits(fence, update, shard.is_in_flight(kept, now.instant)) => {
                let mut kept = kept.clone();
                kept.update(fence, update, attention, now);
                shard.put_intent(kept, now.instant, &self.shards.stored);
                Ok(Fenced::Applied)
            }
            _ => Ok(Fenced::Lost),
        }
    }

    async fn take_dangling(
        &self,
        names: &[String],
        limit: u32,
        pause: Duration,
    ) -> Result<Vec<Intent>, StoreError> {
        let mut shards = self.shards.all();
        let now = self.shards.now();
        // Of all shards, so that the limit leaves the most overdue.
        let mut due: Vec<_> = shards.iter_mut().flat_map(|shard| shard.due_intents(now)).collect();
        due.retain(|(_, kept)| names.contains(&kept.intent.name));
        due.sort_by_key(|(since, _)| *since);
        Ok(due.into_iter().take(size(limit)).map(|(_, kept)| kept.take(pause, now)).collect())
    }

    async fn count_overlooked(
        &self,
        names: &[String],
        overdue: Duration,
        limit: u32,
    ) -> Result<Vec<Overlooked>, StoreError> {
        let mut shards = self.shards.all();
        let now = self.shards.now();
        let due = shards.iter_mut().flat_map(|shard| shard.due_intents(now));
        let overlooked = due.filter(|(since, kept)| {
            *since + overdue.min(LONGEST) <= now.instant
                && kept.is_open()
                && !names.contains(&kept.intent.name)
        });
        let mut counts = BTreeMap::<String, u64>::new();
        for (_, kept) in overlooked.take(size(limit)) {
            *counts.entry(kept.intent.name.clone()).or_default() += 1;
        }
        Ok(counts.into_iter().map(|(name, intents)| Overlooked::new(name, intents)).collect())
    }

    async fn get_intent(&self, intent: UpstreamKey) -> Result<Option<Intent>, StoreError> {
        let shard = self.shards.shard_where(|shard| shard.intents.get(intent).is_some());
        Ok(shard.and_then(|shard| shard.intents.get(intent).map(|kept| kept.show(self.shards.now()))))
    }

    async fn list_intents(&self, filter: IntentFilter, limit: u32) -> Result<Vec<Intent>, StoreError> {
        let mut intents = match filter {
            IntentFilter::Open => self.waiting(is_open),
            IntentFilter::Dangling => self.waiting(|intent| intent.dangling),
            IntentFilter::NeedsAttention => self.waiting(|intent| intent.attention.is_some()),
            IntentFilter::Dead => self.dead(),
            IntentFilter::OfRecord(record) => self.of_record(record),
        };
        intents.truncate(size(limit));
        Ok(intents)
    }

    async fn count_intents(&self) -> Result<IntentCounts, StoreError> {
        let waiting = self.waiting(|_| true);
        let count = |counts: fn(&&Intent) -> bool| waiting.iter().filter(counts).count() as u64;
        Ok(IntentCounts {
            open: count(|intent| is_open(intent)),
            dangling: count(|intent| intent.dangling),
            need_attention: count(|intent| intent.attention.is_some()),
            oldest: waiting.iter().find(|intent| is_open(intent)).map(|intent| intent.age),
        })
    }

    /// Finds none: this store has no transactions, and so no phases.
    async fn find_phase(&self, _: &Attempt, _: RecordId, _: &str) -> Result<Option<Bytes>, StoreError> {
        Ok(None)
    }

    async fn keep_request(
        &self,
        attempt: &Attempt,
        record: RecordId,
        request: &Bytes,
        after: Duration,
    ) -> Result<Fenced, StoreError> {
        let identity = identity_of(attempt);
        let mut shard = self.shards.shard(&identity);
        let now = Instant::now();
        let owned = |entry: &Entry| entry.is_owned_by(attempt.id, record, now);
        if !shard.entries.get(&identity).is_some_and(owned) {
            return Ok(Fenced::Lost);
        }
        let (consumer, key) = identity;
        let kept = KeptRequest::new(record, consumer, key, request.clone());
        shard.put_request(kept, now + after.min(LONGEST), &self.shards.stored);
        Ok(Fenced::Applied)
    }

    async fn retain_record(
        &self,
        consumer: &Consumer,
        key: &IdempotencyKey,
        record: RecordId,
    ) -> Result<Fenced, StoreError> {
        let identity = (consumer.clone(), key.clone());
        match self.shards.shard(&identity).entries.get_mut(&identity) {
            Some(entry) if entry.record_id == record && !entry.is_completed() => {
                entry.retained = true;
                Ok(Fenced::Applied)
            }
            _ => Ok(Fenced::Lost),
        }
    }

    async fn take_abandoned(&self, limit: u32, pause: Duration) -> Result<Vec<KeptRequest>, StoreError> {
        let mut shards = self.shards.all();
        let now = Instant::now();
        let mut due: Vec<_> = shards.iter_mut().flat_map(|shard| shard.due_requests(now)).collect();
        due.sort_by_key(|(since, _)| *since);
        let take = |request: &mut Request| {
            request.next_at = Some(now + pause.min(LONGEST));
            request.kept.tries = request.kept.tries.saturating_add(1);
            request.kept.clone()
        };
        Ok(due.into_iter().take(size(limit)).map(|(_, request)| take(request)).collect())
    }

    async fn update_request(
        &self,
        record: RecordId,
        tries: Option<u32>,
        update: &RequestUpdate,
    ) -> Result<Fenced, StoreError> {
        let Some(mut shard) = self.shards.shard_where(|shard| shard.requests.contains_key(&record)) else {
            return Ok(Fenced::Lost);
        };
        // In any state, because a record that is completed or gone stays so.
        if matches!(update, RequestUpdate::Done) {
            shard.remove_request(record, &self.shards.stored);
            return Ok(Fenced::Applied);
        }
        match shard.requests.get_mut(&record) {
            Some(request) if request.permits(tries) => {
                request.update(tries, update, Instant::now());
                Ok(Fenced::Applied)
            }
            _ => Ok(Fenced::Lost),
        }
    }

    async fn list_requests(&self, limit: u32) -> Result<Vec<KeptRequest>, StoreError> {
        let shards = self.shards.all();
        let requests = shards.iter().flat_map(|shard| shard.requests.values());
        let waiting = requests.filter(|request| request.next_at.is_none());
        Ok(waiting.take(size(limit)).map(|request| request.kept.clone()).collect())
    }

    async fn purge_settled(&self, retention: Duration, limit: u32) -> Result<u64, StoreError> {
        let (now, stored) = (self.shards.now(), &self.shards.stored);
        let intents =
            self.shards.purge(limit, |shard, left| shard.purge_intents(left, retention, now, stored));
        let requests = self.shards.purge(limit, |shard, left| shard.purge_requests(left, stored));
        Ok(intents + requests)
    }
}

impl MemoryStore {
    /// Returns the intents that a person or a reconciler must look at, the oldest first.
    fn waiting(&self, filter: impl Fn(&Intent) -> bool) -> Vec<Intent> {
        let (shards, now) = (self.shards.all(), self.shards.now());
        let waiting = shards.iter().flat_map(|shard| shard.intents.waiting.values());
        let mut shown: Vec<Intent> = waiting.map(|kept| kept.show(now)).filter(filter).collect();
        shown.sort_by_key(|intent| intent.created_at);
        shown
    }

    fn of_record(&self, record: RecordId) -> Vec<Intent> {
        let (shards, now) = (self.shards.all(), self.shards.now());
        let all = shards.iter().flat_map(|shard| shard.intents.all());
        let found = all.filter(|kept| kept.intent.record_id == record);
        let mut shown: Vec<Intent> = found.map(|kept| kept.show(now)).collect();
        shown.sort_by_key(|intent| intent.created_at);
        shown
    }

    /// Returns the dead intents, the newest first.
    fn dead(&self) -> Vec<Intent> {
        let (shards, now) = (self.shards.all(), self.shards.now());
        let all = shards.iter().flat_map(|shard| shard.intents.all());
        let dead = all.filter(|kept| matches!(kept.intent.state, IntentState::Dead { .. }));
        let mut shown: Vec<Intent> = dead.map(|kept| kept.show(now)).collect();
        shown.sort_by_key(|intent| Reverse(intent.created_at));
        shown
    }
}

fn is_open(intent: &Intent) -> bool {
    matches!(intent.state, IntentState::Open { .. })
}
