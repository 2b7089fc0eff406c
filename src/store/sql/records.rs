//! The contract of [`Store`], for every SQL database.

use std::{collections::HashMap, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use http::Extensions;

use super::{
    Engine, Rank, all,
    call::Call,
    grouped::{Completion, Release, fenced},
    micros,
    rows::{self, Fields, required},
};
use crate::{
    consumer::Consumer,
    error::StoreError,
    key::IdempotencyKey,
    store::{
        RecoveryStore, Store,
        transaction::{BeginOutcome, StoreTransaction, TransactionLimits},
    },
    stored::record::{
        Attempt, Claim, ClaimOutcome, CompleteOutcome, Fenced, Record, RecordFilter, RecordState,
        RenewOutcome, Renewal, Resolution, ResolveOutcome,
    },
};

#[async_trait]
impl<E: Engine> Store for E {
    async fn prepare(&self) -> Result<Vec<String>, StoreError> {
        Ok(self.ready().await?.warnings.clone())
    }

    async fn claim(&self, claim: &Claim) -> Result<ClaimOutcome, StoreError> {
        let _call = self.groups().begin();
        self.groups().claims.run(self.grouping(), claim.clone(), self).await
    }

    async fn renew(&self, renewals: &[Renewal]) -> Result<Vec<RenewOutcome>, StoreError> {
        let mut outcomes = Vec::with_capacity(renewals.len());
        for batch in renewals.chunks(RENEW_BATCH) {
            let rows = self.renew_batch(batch).await?;
            let renewed = renewed(batch, &rows);
            outcomes.extend(renewed.map_err(|source| Self::error("renew", source))?);
        }
        Ok(outcomes)
    }

    async fn complete(&self, attempt: &Attempt, response: Bytes) -> Result<CompleteOutcome, StoreError> {
        let completion = Completion { attempt: attempt.clone(), response };
        let _call = self.groups().begin();
        self.groups().completions.run(self.grouping(), completion, self).await
    }

    async fn release(&self, attempt: &Attempt) -> Result<Fenced, StoreError> {
        let _call = self.groups().begin();
        self.groups().releases.run(self.grouping(), Release(attempt.clone()), self).await
    }

    async fn hold(&self, attempt: &Attempt) -> Result<Fenced, StoreError> {
        fenced(self, "hold", &self.statements().await?.records.hold, attempt).await
    }

    async fn get(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<Option<Record>, StoreError> {
        let call = Call::new(&self.statements().await?.records.get).of_key(consumer, key);
        let rows = self.read("get", call).await?;
        Ok(all::<Self, _>("get", &rows, rows::record)?.pop())
    }

    async fn list(&self, filter: RecordFilter, limit: u32) -> Result<Vec<Record>, StoreError> {
        let call = Call::new(&self.statements().await?.records.list)
            .with("filter", shown_state(filter))
            .with("limit", limit);
        all::<Self, _>("list", &self.read("list", call).await?, rows::record)
    }

    async fn evict(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<bool, StoreError> {
        let call = Call::new(&self.statements().await?.records.evict).of_key(consumer, key);
        Ok(self.change(Rank::Newcomer, "evict", call).await? > 0)
    }

    async fn resolve(
        &self,
        consumer: &Consumer,
        key: &IdempotencyKey,
        resolution: Resolution,
    ) -> Result<ResolveOutcome, StoreError> {
        let records = &self.statements().await?.records;
        let calls = match &resolution {
            Resolution::Release => {
                vec![Call::new(&records.resolve_release), Call::new(&records.resolve_release_retained)]
            }
            Resolution::Complete(response) => {
                vec![Call::new(&records.resolve_complete).with("response", &**response)]
            }
        };
        // Deletes first, for the same reason as `release`.
        for call in calls {
            if self.change(Rank::Newcomer, "resolve", call.of_key(consumer, key)).await? > 0 {
                return Ok(ResolveOutcome::Resolved);
            }
        }
        Ok(not_resolved(self.get(consumer, key).await?))
    }

    fn transaction(
        &self,
        attempt: &Attempt,
        limits: &TransactionLimits,
        extensions: &mut Extensions,
    ) -> Option<Arc<dyn StoreTransaction>> {
        Some(self.offer(attempt, limits, extensions))
    }

    async fn begin_single(
        &self,
        claim: &Claim,
        limits: &TransactionLimits,
    ) -> Result<BeginOutcome, StoreError> {
        self.begin(claim, limits).await
    }

    fn recovery(&self) -> Option<Arc<dyn RecoveryStore>> {
        Some(Arc::new(self.clone()))
    }

    async fn purge(&self, limit: u32) -> Result<u64, StoreError> {
        let call = Call::new(&self.statements().await?.purges.records).with("limit", limit);
        self.change(Rank::Newcomer, "purge", call).await
    }

    async fn close(&self) {
        self.groups().idle().await;
        self.close_connections().await;
    }
}

/// Returns the outcome of a claim that wrote nothing and found this row.
pub(in crate::store) fn shown(row: &impl Fields) -> Result<Option<ClaimOutcome>, sqlx::Error> {
    Ok(Some(ClaimOutcome::Exists(Box::new(rows::record(row)?))))
}

/// Returns the outcome of a claim that wrote the first of `rows`. There is none if another claim
/// was faster.
pub(in crate::store) fn taken(rows: &[impl Fields]) -> Result<Option<ClaimOutcome>, sqlx::Error> {
    let record = rows.first().map(rows::record).transpose()?;
    Ok(record.map(|record| match record.state {
        RecordState::InProgress { .. } => {
            let age = record.created_at.elapsed().unwrap_or_default();
            ClaimOutcome::taken_over(record.id, record.attempt_number, age)
        }
        RecordState::Held | RecordState::Completed { .. } => ClaimOutcome::Exists(Box::new(record)),
    }))
}

/// Returns renewals as JSON, which every database can turn into rows: consumer, key, attempt in
/// hexadecimal, lease in microseconds.
pub(in crate::store) fn renewals_as_json(renewals: &[Renewal]) -> String {
    let row = |renewal: &Renewal| {
        let attempt = &renewal.attempt;
        let id = attempt.id.as_uuid().simple().to_string().to_uppercase();
        serde_json::json!([attempt.consumer.as_str(), attempt.key.as_str(), id, micros(renewal.lease)])
    };
    renewals.iter().map(row).collect::<serde_json::Value>().to_string()
}

/// Returns the outcomes of renewals. Each row names an attempt and tells if its lease was renewed.
/// An attempt without a row does not own its record.
fn renewed(renewals: &[Renewal], rows: &[impl Fields]) -> Result<Vec<RenewOutcome>, sqlx::Error> {
    let mut renewed = HashMap::with_capacity(rows.len());
    for row in rows {
        // An attempt may have two rows: one because the record is its own, one because it was
        // renewed.
        *renewed.entry(required(row.uuid("attempt")?)?).or_insert(false) |= row.flag("renewed")?;
    }
    let outcome = |renewal: &Renewal| match renewed.get(&renewal.attempt.id.as_uuid()) {
        Some(true) => RenewOutcome::Renewed,
        Some(false) => RenewOutcome::Skipped,
        None => RenewOutcome::Lost,
    };
    Ok(renewals.iter().map(outcome).collect())
}

/// Returns the outcome of a resolution that changed nothing, by the record that was found.
fn not_resolved(found: Option<Record>) -> ResolveOutcome {
    let Some(record) = found else { return ResolveOutcome::Absent };
    match record.state {
        RecordState::Completed { .. } => ResolveOutcome::AlreadyCompleted,
        RecordState::Held if record.unresolved > 0 => ResolveOutcome::UnresolvedIntents,
        RecordState::InProgress { .. } | RecordState::Held => ResolveOutcome::InProgress,
    }
}

/// Returns the state that a list shows, or `all`.
fn shown_state(filter: RecordFilter) -> &'static str {
    match filter {
        RecordFilter::All => "all",
        RecordFilter::InProgress => "in_progress",
        RecordFilter::Held => "held",
        RecordFilter::Completed => "completed",
    }
}

/// The number of leases that one statement extends at most.
const RENEW_BATCH: usize = 500;
