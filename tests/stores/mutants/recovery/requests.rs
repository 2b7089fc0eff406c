//! What is wrong with the kept requests.

use std::time::Duration;

use bytes::Bytes;
use sqlx::{AssertSqlSafe, Row, sqlite::SqliteRow};
use tower_idempotency::{
    Consumer, IdempotencyKey, StoreError,
    store::{Attempt, Fenced, KeptRequest, RecordId, RequestUpdate},
};
use uuid::Uuid;

use super::{Faulty, RecoveryFault};

impl Faulty {
    pub(super) async fn keep(
        &self,
        attempt: &Attempt,
        record: RecordId,
        request: &Bytes,
        after: Duration,
    ) -> Result<Fenced, StoreError> {
        let forget = format!("DELETE FROM idempotency_requests WHERE record_id = {}", literal(record));
        self.spoil(RecoveryFault::LastRequestCounts, &forget).await;
        let request = match self.fault {
            RecoveryFault::RequestIsText => String::from_utf8_lossy(request).into_owned().into(),
            _ => request.clone(),
        };
        let after = if self.has(RecoveryFault::TimeIsForgotten) { Duration::ZERO } else { after };
        match self.sound().keep_request(attempt, record, &request, after).await? {
            Fenced::Lost if self.has(RecoveryFault::KeepingUnfenced) => Ok(Fenced::Applied),
            fenced => Ok(fenced),
        }
    }

    pub(super) async fn make_stay(
        &self,
        consumer: &Consumer,
        key: &IdempotencyKey,
        record: RecordId,
    ) -> Result<Fenced, StoreError> {
        let anew =
            format!("UPDATE idempotency_records SET attempt_number = 0 WHERE id = {}", literal(record));
        self.spoil(RecoveryFault::KeptRecordCountsAnew, &anew).await;
        match self.sound().retain_record(consumer, key, record).await? {
            Fenced::Lost if self.has(RecoveryFault::KeepingARecordUnfenced) => Ok(Fenced::Applied),
            fenced => Ok(fenced),
        }
    }

    pub(super) async fn take(&self, limit: u32, pause: Duration) -> Vec<KeptRequest> {
        let owned = "UPDATE idempotency_records SET lease_until = 9000000000000000 WHERE attempt IS NOT NULL";
        self.spoil(RecoveryFault::LapsedAreNotTaken, owned).await;
        let limit = if self.has(RecoveryFault::LimitOfTakesIsForgotten) { u32::MAX } else { limit };
        let pause = if self.has(RecoveryFault::PauseIsForgotten) { Duration::ZERO } else { pause };
        let mut taken = Vec::new();
        for found in self.due(limit).await {
            taken.extend(self.put_off(found, pause).await);
        }
        taken
    }

    /// Finds requests by all conditions but the one that the store forgets.
    async fn due(&self, limit: u32) -> Vec<KeptRequest> {
        let conditions = CONDITIONS.iter().filter(|(fault, _)| !self.has(*fault));
        let conditions: String = conditions.map(|(_, condition)| format!(" AND {condition}")).collect();
        let sql = format!(
            "SELECT q.record_id, q.consumer, q.key, q.request, q.tries FROM idempotency_requests AS q
             JOIN idempotency_records AS r ON r.consumer = q.consumer AND r.key = q.key
             WHERE q.next_at <= {{now}} {conditions} ORDER BY q.next_at LIMIT {limit}"
        );
        let sql = AssertSqlSafe(sql.replace("{now}", NOW));
        let rows = sqlx::query(sql).fetch_all(self.tables().await).await.unwrap();
        rows.iter().map(request_of).collect()
    }

    /// Takes a request, unless somebody else was faster.
    async fn put_off(&self, mut request: KeptRequest, pause: Duration) -> Option<KeptRequest> {
        let found = request.tries;
        request.tries += u32::from(!self.has(RecoveryFault::TriesAreNotCounted));
        let mut sql = format!(
            "UPDATE idempotency_requests SET next_at = {NOW} + {}, tries = {} WHERE record_id = {}",
            pause.as_millis(),
            request.tries,
            literal(request.record_id)
        );
        if !self.has(RecoveryFault::TakeLooksThenWrites) {
            sql += &format!(" AND tries = {found} AND next_at <= {NOW}");
        }
        let written = sqlx::query(AssertSqlSafe(sql)).execute(self.tables().await).await.unwrap();
        (written.rows_affected() > 0).then_some(request)
    }

    pub(super) async fn update(
        &self,
        record: RecordId,
        tries: Option<u32>,
        update: &RequestUpdate,
    ) -> Result<Fenced, StoreError> {
        let update = match update {
            RequestUpdate::SendAgain { tried, .. } if self.has(RecoveryFault::AfterIsForgotten) => {
                RequestUpdate::SendAgain { after: Duration::ZERO, tried: *tried }
            }
            RequestUpdate::SendAgain { after, .. } if self.has(RecoveryFault::EveryTryCounts) => {
                RequestUpdate::SendAgain { after: *after, tried: true }
            }
            RequestUpdate::Done if self.has(RecoveryFault::DoneIsKept) => return Ok(Fenced::Applied),
            update => update.clone(),
        };
        let found = self.tries_of(record).await;
        let tries = match (tries, found) {
            (Some(_), Some(found)) if self.has(RecoveryFault::TriesAreNoFence) => Some(found),
            (tries, _) => tries,
        };
        let fenced = self.sound().update_request(record, tries, &update).await?;
        if let (None, Some(found)) = (tries, found) {
            let keep = format!(
                "UPDATE idempotency_requests SET tries = {found} WHERE record_id = {}",
                literal(record)
            );
            self.spoil(RecoveryFault::OperatorKeepsTheTries, &keep).await;
        }
        let due = "UPDATE idempotency_requests SET next_at = 0 WHERE attention IS NOT NULL";
        self.spoil(RecoveryFault::AttentionIsSentAgain, due).await;
        Ok(fenced)
    }

    async fn tries_of(&self, record: RecordId) -> Option<u32> {
        let sql = format!("SELECT tries FROM idempotency_requests WHERE record_id = {}", literal(record));
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_optional(self.tables().await).await.unwrap()
    }
}

fn literal(record: RecordId) -> String {
    format!("X'{}'", record.as_uuid().simple())
}

fn request_of(row: &SqliteRow) -> KeptRequest {
    let record = Uuid::from_slice(row.get("record_id")).unwrap();
    let consumer = Consumer::new(row.get::<String, _>("consumer")).unwrap();
    let key = IdempotencyKey::new(row.get::<String, _>("key")).unwrap();
    let request: Vec<u8> = row.get("request");
    let mut request = KeptRequest::new(RecordId::from_uuid(record), consumer, key, request.into());
    request.tries = row.get("tries");
    request
}

/// What is asked of a request that is taken, and the fault that forgets it.
const CONDITIONS: &[(RecoveryFault, &str)] = &[
    (RecoveryFault::LeaseIsForgotten, "r.lease_until <= {now}"),
    (RecoveryFault::ExpiredAreTaken, "r.expires_at > {now}"),
    (RecoveryFault::NextRecordIsReached, "r.id = q.record_id"),
    (RecoveryFault::CompletedAreTaken, "r.state <> 'completed'"),
    (RecoveryFault::HeldAreTaken, "r.state <> 'held'"),
    (RecoveryFault::DueAreTaken, "(r.attempt IS NULL OR r.abandoned + 1 < r.max_abandoned)"),
    (RecoveryFault::UnresolvedAreTaken, "COALESCE(r.repeatable_until > {now}, TRUE)"),
    (RecoveryFault::PolicyIsForgotten, "r.max_abandoned > 1"),
];

const NOW: &str = "CAST((julianday('now') - 2440587.5) * 86400000.0 AS INTEGER)";
