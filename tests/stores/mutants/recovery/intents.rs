//! What is wrong with the intents, and the calls of the store.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tower_idempotency::{
    Consumer, IdempotencyKey, Intent, StoreError, UpstreamKey,
    intent::{IntentCounts, IntentFilter},
    store::{
        Attempt, CallId, Fenced, IntentFence, IntentUpdate, KeptRequest, OpenOutcome, Opening, Overlooked,
        RecordId, RecoveryStore, RequestUpdate, Store,
    },
};
use uuid::Uuid;

use super::{Faulty, RecoveryFault};

impl Faulty {
    pub(super) fn sound(&self) -> Arc<dyn RecoveryStore> {
        self.inner.recovery().expect("it keeps intents")
    }

    /// The names of all intents.
    async fn names(&self) -> Vec<String> {
        let names = sqlx::query_scalar("SELECT name FROM idempotency_intents");
        names.fetch_all(self.tables().await).await.unwrap()
    }

    /// The opening as the faulty store takes it.
    fn misread(&self, opening: &Opening) -> Opening {
        let mut misread = opening.clone();
        match self.fault {
            RecoveryFault::SubjectIsForgotten => misread.subject = None,
            RecoveryFault::RepeatedOpeningIsANewCall => misread.call = CallId::from_uuid(Uuid::new_v4()),
            RecoveryFault::ArgumentsAreNotCompared => misread.arguments = Bytes::from_static(b"arguments"),
            RecoveryFault::EverythingIsRepeatable => misread.repeatable_for = Duration::from_secs(1000),
            RecoveryFault::NothingIsRepeatable => misread.repeatable_for = Duration::ZERO,
            _ => {}
        }
        misread
    }
}

#[async_trait::async_trait]
impl RecoveryStore for Faulty {
    async fn open_intent(&self, opening: &Opening) -> Result<OpenOutcome, StoreError> {
        let settled = "UPDATE idempotency_intents SET state = 'open', sent = FALSE WHERE state = 'finalized'";
        self.spoil(RecoveryFault::SettledIsOpenedAgain, settled).await;
        let never_sent = "UPDATE idempotency_intents SET absent = state = 'dead', sent = FALSE WHERE absent";
        self.spoil(RecoveryFault::DeclaredAbsentIsNeverSent, never_sent).await;
        let sent = "UPDATE idempotency_intents SET absent = TRUE WHERE NOT sent";
        self.spoil(RecoveryFault::ArgumentsNeverChange, sent).await;
        if self.has(RecoveryFault::TakeoverPassesOpenings) {
            // Looks at the record first, and writes the intent later.
            let owned = self.inner.get(&opening.attempt.consumer, &opening.attempt.key).await?;
            tokio::time::sleep(Duration::from_millis(10)).await;
            let mine = owned.is_some_and(|record| record.attempt == Some(opening.attempt.id));
            self.sound().open_intent(opening).await?;
            return Ok(if mine { OpenOutcome::Opened } else { OpenOutcome::Lost });
        }
        let outcome = self.sound().open_intent(&self.misread(opening)).await?;
        Ok(match outcome {
            OpenOutcome::Lost if self.has(RecoveryFault::OpeningUnfenced) => OpenOutcome::Opened,
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
            (RecoveryFault::CallIsNoFence, IntentFence::Call(_), Some(found)) => {
                IntentFence::Call(found.call)
            }
            (RecoveryFault::CallIsNoFence, IntentFence::AbsentCall(_), Some(found)) => {
                IntentFence::AbsentCall(found.call)
            }
            (RecoveryFault::LookupIsFencedByItsCallAlone, IntentFence::Lookup { call, .. }, _) => {
                IntentFence::Call(call)
            }
            (RecoveryFault::OperatorIsNotFenced, IntentFence::Operator, Some(found)) => {
                IntentFence::Call(found.call)
            }
            (_, fence, _) => fence,
        };
        let update = match update {
            IntentUpdate::NotSent if self.has(RecoveryFault::NotSentIsForgotten) => {
                return Ok(Fenced::Applied);
            }
            IntentUpdate::Absent(_) if self.has(RecoveryFault::AbsentIsRefused) => {
                IntentUpdate::Refuse("absent".to_owned())
            }
            update => update.clone(),
        };
        let attention = attention.filter(|_| !self.has(RecoveryFault::AttentionIsNotListed));
        let fenced = self.sound().update_intent(intent, fence, &update, attention).await?;
        let held = "UPDATE idempotency_records SET state = 'held'";
        self.spoil(RecoveryFault::OpenIntentsHoldForGood, held).await;
        let reset = "UPDATE idempotency_intents SET takes = looks";
        self.spoil(RecoveryFault::OperatorResetsTheFence, reset).await;
        Ok(fenced)
    }

    async fn count_overlooked(
        &self,
        names: &[String],
        overdue: Duration,
        limit: u32,
    ) -> Result<Vec<Overlooked>, StoreError> {
        let overdue = if self.has(RecoveryFault::OverdueIsForgotten) { Duration::ZERO } else { overdue };
        let counts = self.sound().count_overlooked(names, overdue, limit).await?;
        Ok(if self.has(RecoveryFault::NothingIsOverlooked) { Vec::new() } else { counts })
    }

    async fn take_dangling(
        &self,
        names: &[String],
        limit: u32,
        pause: Duration,
    ) -> Result<Vec<Intent>, StoreError> {
        let ended = "UPDATE idempotency_records SET lease_until = 0";
        self.spoil(RecoveryFault::CallsUnderWayAreTaken, ended).await;
        let pause = match self.fault {
            RecoveryFault::TakenIsNotPutOff | RecoveryFault::LookUpsLookThenWrite => Duration::ZERO,
            _ => pause,
        };
        let mut names = names.to_vec();
        match self.fault {
            RecoveryFault::EveryNameIsTaken => names.extend(self.names().await),
            RecoveryFault::NamesFoldCase => {
                names.extend(names.clone().iter().map(|name| name.to_uppercase()))
            }
            _ => {}
        }
        let mut taken = self.sound().take_dangling(&names, limit, pause).await?;
        if self.has(RecoveryFault::LookUpsLookThenWrite) {
            tokio::time::sleep(Duration::from_millis(10)).await;
            for intent in &mut taken {
                intent.looks = 1;
                let id = intent.upstream_key.as_uuid().simple();
                let write = format!(
                    "UPDATE idempotency_intents SET looks = 1, look_at = 9000000000000000 WHERE id = X'{id}'"
                );
                self.spoil(RecoveryFault::LookUpsLookThenWrite, &write).await;
            }
        }
        Ok(taken)
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
        let found = self.sound().find_phase(attempt, record, name).await?;
        Ok(found.or(self.has(RecoveryFault::UnfinishedPhaseIsEmpty).then(Bytes::new)))
    }

    async fn retain_record(
        &self,
        consumer: &Consumer,
        key: &IdempotencyKey,
        record: RecordId,
    ) -> Result<Fenced, StoreError> {
        self.make_stay(consumer, key, record).await
    }

    async fn keep_request(
        &self,
        attempt: &Attempt,
        record: RecordId,
        request: &Bytes,
        after: Duration,
    ) -> Result<Fenced, StoreError> {
        self.keep(attempt, record, request, after).await
    }

    async fn take_abandoned(&self, limit: u32, pause: Duration) -> Result<Vec<KeptRequest>, StoreError> {
        Ok(self.take(limit, pause).await)
    }

    async fn update_request(
        &self,
        record: RecordId,
        tries: Option<u32>,
        update: &RequestUpdate,
    ) -> Result<Fenced, StoreError> {
        self.update(record, tries, update).await
    }

    async fn list_requests(&self, limit: u32) -> Result<Vec<KeptRequest>, StoreError> {
        let limit = if self.has(RecoveryFault::ListOfRequestsIgnoresItsLimit) { u32::MAX } else { limit };
        self.sound().list_requests(limit).await
    }

    async fn purge_settled(&self, retention: Duration, limit: u32) -> Result<u64, StoreError> {
        let retention =
            if self.has(RecoveryFault::SettledAreNeverPurged) { Duration::MAX } else { retention };
        let waiting = "DELETE FROM idempotency_requests WHERE next_at IS NULL";
        self.spoil(RecoveryFault::WaitingRequestsArePurged, waiting).await;
        let limit = if self.has(RecoveryFault::PurgeOfRequestsIgnoresItsLimit) { u32::MAX } else { limit };
        self.sound().purge_settled(retention, limit).await
    }
}
