//! What is wrong with the intents.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tower_idempotency::{
    Attempt, CallId, Consumer, Fenced, IdempotencyKey, Intent, IntentCounts, IntentFence, IntentFilter,
    IntentUpdate, KeptRequest, OpenOutcome, Opening, RecordId, RecoveryStore, RequestUpdate, Store,
    StoreError, UpstreamKey,
};
use uuid::Uuid;

use super::{Faulty, IntentFault};

impl Faulty {
    fn sound(&self) -> Arc<dyn RecoveryStore> {
        self.inner.recovery().expect("it keeps intents")
    }

    /// The opening as the faulty store takes it.
    fn misread(&self, opening: &Opening) -> Opening {
        let mut misread = opening.clone();
        match self.fault {
            IntentFault::SubjectIsForgotten => misread.subject = None,
            IntentFault::RepeatedOpeningIsANewCall => misread.call = CallId::from_uuid(Uuid::new_v4()),
            IntentFault::ArgumentsAreNotCompared => misread.arguments = Bytes::from_static(b"arguments"),
            IntentFault::EverythingIsRepeatable => misread.repeatable_for = Duration::from_secs(1000),
            IntentFault::NothingIsRepeatable => misread.repeatable_for = Duration::ZERO,
            _ => {}
        }
        misread
    }
}

#[async_trait::async_trait]
impl RecoveryStore for Faulty {
    async fn open_intent(&self, opening: &Opening) -> Result<OpenOutcome, StoreError> {
        let settled = "UPDATE idempotency_intents SET state = 'open', sent = FALSE WHERE state = 'finalized'";
        self.spoil(IntentFault::SettledIsOpenedAgain, settled).await;
        if self.has(IntentFault::TakeoverPassesOpenings) {
            // Looks at the record first, and writes the intent later.
            let owned = self.inner.get(&opening.attempt.consumer, &opening.attempt.key).await?;
            tokio::time::sleep(Duration::from_millis(10)).await;
            let mine = owned.is_some_and(|record| record.attempt == Some(opening.attempt.id));
            self.sound().open_intent(opening).await?;
            return Ok(if mine { OpenOutcome::Opened } else { OpenOutcome::Lost });
        }
        let outcome = self.sound().open_intent(&self.misread(opening)).await?;
        Ok(match outcome {
            OpenOutcome::Lost if self.has(IntentFault::OpeningUnfenced) => OpenOutcome::Opened,
            outcome => outcome,
        })
    }

    async fn update_intent(
        &self,
        intent: UpstreamKey,
        fence: IntentFence,
        update: &IntentUpdate,
        attention: Option<&str>,
    ) -> Result<Fenced, StoreError> {
        let found = self.sound().get_intent(intent).await?;
        let fence = match (self.fault, fence, found) {
            (IntentFault::CallIsNoFence, IntentFence::Call(_), Some(found)) => IntentFence::Call(found.call),
            (IntentFault::CallIsNoFence, IntentFence::AbsentCall(_), Some(found)) => {
                IntentFence::AbsentCall(found.call)
            }
            (IntentFault::LookupIsFencedByItsCallAlone, IntentFence::Lookup { call, .. }, _) => {
                IntentFence::Call(call)
            }
            (IntentFault::OperatorIsNotFenced, IntentFence::Operator, Some(found)) => {
                IntentFence::Call(found.call)
            }
            (_, fence, _) => fence,
        };
        let update = match update {
            IntentUpdate::NotSent if self.has(IntentFault::NotSentIsForgotten) => return Ok(Fenced::Applied),
            IntentUpdate::Absent(_) if self.has(IntentFault::AbsentIsRefused) => {
                IntentUpdate::Refuse("absent".to_owned())
            }
            update => update.clone(),
        };
        let attention = attention.filter(|_| !self.has(IntentFault::AttentionIsNotListed));
        let fenced = self.sound().update_intent(intent, fence, &update, attention).await?;
        let held = "UPDATE idempotency_records SET state = 'held'";
        self.spoil(IntentFault::OpenIntentsHoldForGood, held).await;
        Ok(fenced)
    }

    async fn take_dangling(&self, limit: u32, pause: Duration) -> Result<Vec<Intent>, StoreError> {
        let ended = "UPDATE idempotency_records SET lease_until = 0";
        self.spoil(IntentFault::CallsUnderWayAreTaken, ended).await;
        let pause = if self.has(IntentFault::TakenIsNotPutOff) { Duration::ZERO } else { pause };
        self.sound().take_dangling(limit, pause).await
    }

    async fn get_intent(&self, intent: UpstreamKey) -> Result<Option<Intent>, StoreError> {
        self.sound().get_intent(intent).await
    }

    async fn list_intents(&self, filter: IntentFilter, limit: u32) -> Result<Vec<Intent>, StoreError> {
        self.sound().list_intents(filter, limit).await
    }

    async fn count_intents(&self) -> Result<IntentCounts, StoreError> {
        self.sound().count_intents().await
    }

    async fn find_phase(
        &self,
        attempt: &Attempt,
        record: RecordId,
        name: &str,
    ) -> Result<Option<Bytes>, StoreError> {
        self.sound().find_phase(attempt, record, name).await
    }

    async fn keep_record(
        &self,
        consumer: &Consumer,
        key: &IdempotencyKey,
        record: RecordId,
    ) -> Result<Fenced, StoreError> {
        self.sound().keep_record(consumer, key, record).await
    }

    async fn keep_request(
        &self,
        attempt: &Attempt,
        record: RecordId,
        request: &Bytes,
        after: Duration,
    ) -> Result<Fenced, StoreError> {
        self.sound().keep_request(attempt, record, request, after).await
    }

    async fn take_abandoned(&self, limit: u32, pause: Duration) -> Result<Vec<KeptRequest>, StoreError> {
        self.sound().take_abandoned(limit, pause).await
    }

    async fn update_request(
        &self,
        record: RecordId,
        tries: Option<u32>,
        update: &RequestUpdate,
    ) -> Result<Fenced, StoreError> {
        self.sound().update_request(record, tries, update).await
    }

    async fn list_requests(&self, limit: u32) -> Result<Vec<KeptRequest>, StoreError> {
        self.sound().list_requests(limit).await
    }

    async fn purge_settled(&self, retention: Duration, limit: u32) -> Result<u64, StoreError> {
        let retention = if self.has(IntentFault::SettledAreNeverPurged) { Duration::MAX } else { retention };
        self.sound().purge_settled(retention, limit).await
    }
}
