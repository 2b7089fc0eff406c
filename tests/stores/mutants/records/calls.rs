//! The calls of the store, and the faults that lie between looking and writing.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::Extensions;
use tower_idempotency::{
    Consumer, IdempotencyKey, StoreError,
    store::{
        Attempt, BeginOutcome, Claim, ClaimOutcome, CompleteOutcome, Fenced, Fingerprint, Record,
        RecordFilter, RecordState, RecoveryStore, RenewOutcome, Renewal, Resolution, ResolveOutcome, Store,
        StoreErrorKind, StoreTransaction, TransactionLimits,
    },
};

use super::{
    Fault,
    rules::{BrokenStore, Identity, Row},
};

impl BrokenStore {
    /// Gives other tasks time to change what was looked at.
    async fn pause(&self) {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }

    async fn complete_in_two_halves(&self, attempt: &Attempt, response: Bytes) -> CompleteOutcome {
        let identity = self.identity_of(attempt);
        for part in [response.slice(..response.len() / 2), response] {
            if let Some(row) = self.rows().get_mut(&identity) {
                row.record.state = RecordState::completed(part);
            }
            self.pause().await;
        }
        CompleteOutcome::Completed
    }
}

#[async_trait::async_trait]
impl Store for BrokenStore {
    async fn prepare(&self) -> Result<Vec<String>, StoreError> {
        if self.has(Fault::PrepareEmptiesTheStore) {
            self.rows().clear();
        }
        Ok(Vec::new())
    }

    async fn claim(&self, claim: &Claim) -> Result<ClaimOutcome, StoreError> {
        let identity = self.identity_of(&claim.attempt);
        let seen = self.rows().get(&identity).cloned();
        let apart = match self.fault {
            Fault::ClaimLooksThenWrites => seen.is_none(),
            Fault::TakeoverLooksThenWrites => seen.is_some(),
            _ => false,
        };
        if apart {
            self.pause().await;
        }
        let mut rows = self.rows();
        if self.has(Fault::FewKeysFit) && rows.len() > 20 && !rows.contains_key(&identity) {
            return Ok(ClaimOutcome::Contended);
        }
        let current = rows.get(&identity).cloned();
        let (row, outcome) = self.decide(if apart { seen } else { current }.as_ref(), claim);
        if let Some(row) = row {
            rows.insert(identity, row);
        }
        Ok(outcome)
    }

    async fn renew(&self, renewals: &[Renewal]) -> Result<Vec<RenewOutcome>, StoreError> {
        if renewals.is_empty() && self.has(Fault::NoRenewalsIsAnError) {
            return Err(StoreError::new(StoreErrorKind::Internal, "VALUES needs a row"));
        }
        if self.has(Fault::RenewalLosesWhatIsContended) {
            let Ok(_guard) = self.rows.try_lock() else {
                return Ok(vec![RenewOutcome::Lost; renewals.len()]);
            };
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut outcomes: Vec<RenewOutcome> =
            renewals.iter().map(|renewal| self.renew_row(renewal)).collect();
        match self.fault {
            Fault::RenewalsAreSorted => outcomes.sort_by_key(|outcome| format!("{outcome:?}")),
            Fault::RenewalsAreCutAtAHundred => outcomes.truncate(100),
            _ => {}
        }
        Ok(outcomes)
    }

    async fn complete(&self, attempt: &Attempt, response: Bytes) -> Result<CompleteOutcome, StoreError> {
        if self.has(Fault::CompletionTearsTheResponse) {
            return Ok(self.complete_in_two_halves(attempt, response).await);
        }
        let identity = self.identity_of(attempt);
        let mut seen = self.rows().get(&identity).cloned();
        if self.has(Fault::CompletionLooksThenWrites) {
            self.pause().await;
        }
        let mut rows = self.rows();
        if !self.has(Fault::CompletionLooksThenWrites) {
            seen = rows.get(&identity).cloned();
        }
        let Some(mut row) = seen else {
            if self.has(Fault::CompletionMakesARecord) {
                let claim = Claim::new(attempt.clone(), Fingerprint::from_bytes(Vec::new()));
                rows.insert(identity, self.fresh(&claim));
            }
            return Ok(CompleteOutcome::Absent);
        };
        let outcome = self.complete_row(&mut row, attempt, &response);
        rows.insert(identity, row);
        Ok(outcome)
    }

    async fn release(&self, attempt: &Attempt) -> Result<Fenced, StoreError> {
        let identity = self.identity_of(attempt);
        let seen = self.rows().get(&identity).is_some_and(|row| row.record.attempt == Some(attempt.id));
        if self.has(Fault::ReleaseLooksThenWrites) {
            self.pause().await;
        }
        let mut rows = self.rows();
        let Some(row) = rows.get_mut(&identity) else { return Ok(Fenced::Lost) };
        let mine = match self.fault {
            Fault::ReleaseUnfenced => true,
            Fault::ReleaseLooksThenWrites => seen,
            _ => row.record.attempt == Some(attempt.id),
        };
        let lapsed = self.lapsed(row) && self.has(Fault::LapsedOwnerLosesAtOnce);
        let open = match row.record.state {
            RecordState::InProgress { .. } => !lapsed,
            RecordState::Held => !self.has(Fault::HeldIsNotReleased),
            _ => self.has(Fault::CompletedIsReleasedByItsAttempt),
        };
        if !mine || !open {
            return Ok(Fenced::Lost);
        }
        if self.has(Fault::ReleaseKeepsTheRecord) {
            row.lease_until = self.start();
        } else {
            rows.remove(&identity);
        }
        Ok(Fenced::Applied)
    }

    async fn hold(&self, attempt: &Attempt) -> Result<Fenced, StoreError> {
        let mut rows = self.rows();
        let Some(row) = rows.get_mut(&self.identity_of(attempt)) else { return Ok(Fenced::Lost) };
        let mine = row.record.attempt == Some(attempt.id) || self.has(Fault::HoldUnfenced);
        let lapsed = self.lapsed(row) && self.has(Fault::LapsedOwnerLosesAtOnce);
        if !mine || lapsed || matches!(row.record.state, RecordState::Completed { .. }) {
            return Ok(Fenced::Lost);
        }
        row.record.state = RecordState::Held;
        if self.has(Fault::HeldForgetsItsAttempt) {
            row.record.attempt = None;
        }
        Ok(Fenced::Applied)
    }

    async fn get(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<Option<Record>, StoreError> {
        let rows = self.rows();
        let row = match self.fault {
            Fault::GetFindsAnything => rows.values().next(),
            _ => rows.get(&self.identity(consumer, key)),
        };
        let row =
            row.filter(|row| !self.has(Fault::GetHidesTheExpired) || row.record.expires_at > self.now());
        Ok(row.map(|row| self.shown(row)))
    }

    async fn list(&self, filter: RecordFilter, limit: u32) -> Result<Vec<Record>, StoreError> {
        let mut records: Vec<Record> = self.rows().values().map(|row| self.shown(row)).collect();
        records.retain(|record| match (filter, &record.state) {
            _ if self.has(Fault::ListIgnoresItsFilter) => true,
            (RecordFilter::InProgress, state) => matches!(state, RecordState::InProgress { .. }),
            (RecordFilter::Held, state) => *state == RecordState::Held,
            (RecordFilter::Completed, state) => matches!(state, RecordState::Completed { .. }),
            (RecordFilter::All, _) => true,
        });
        records.sort_by_key(|record| record.created_at);
        match self.fault {
            Fault::ListIsReversed => records.reverse(),
            Fault::ListForgetsTheAttempt => records.iter_mut().for_each(|record| record.attempt = None),
            _ => {}
        }
        records.truncate(limit as usize);
        Ok(records)
    }

    async fn evict(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<bool, StoreError> {
        let identity = self.identity(consumer, key);
        match self.fault {
            Fault::EvictDoesNothing => Ok(self.rows().contains_key(&identity)),
            _ => Ok(self.rows().remove(&identity).is_some()),
        }
    }

    async fn resolve(
        &self,
        consumer: &Consumer,
        key: &IdempotencyKey,
        resolution: Resolution,
    ) -> Result<ResolveOutcome, StoreError> {
        let identity = self.identity(consumer, key);
        let seen = self.rows().get(&identity).cloned();
        if self.has(Fault::ResolutionLooksThenWrites) {
            self.pause().await;
        }
        let mut rows = self.rows();
        let current =
            if self.has(Fault::ResolutionLooksThenWrites) { seen } else { rows.get(&identity).cloned() };
        let Some(mut row) = current else { return Ok(ResolveOutcome::Absent) };
        match row.record.state {
            RecordState::Completed { .. } => return Ok(ResolveOutcome::AlreadyCompleted),
            RecordState::InProgress { .. }
                if !self.lapsed(&row) && !self.has(Fault::ResolutionOfLiveLeases) =>
            {
                return Ok(ResolveOutcome::InProgress);
            }
            _ => {}
        }
        rows.remove(&identity);
        if let Resolution::Complete(response) = resolution {
            row.record.state = RecordState::completed(response);
            if !self.has(Fault::ResolutionKeepsTheAttempt) {
                row.record.attempt = None;
            }
            if !self.has(Fault::ResolutionKeepsTheExpiry) {
                row.record.expires_at = self.start() + row.retention;
            }
            rows.insert(identity, row);
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
        Err(StoreError::new(StoreErrorKind::Misconfigured, "there are no transactions"))
    }

    fn recovery(&self) -> Option<Arc<dyn RecoveryStore>> {
        None
    }

    async fn purge(&self, limit: u32) -> Result<u64, StoreError> {
        let deletable = |row: &Row| match self.fault {
            Fault::PurgeDeletesHeld => {
                self.absent(row)
                    || (row.record.expires_at <= self.now() && self.shown(row).state == RecordState::Held)
            }
            Fault::PurgeDeletesLeased => {
                row.record.expires_at <= self.now() && self.shown(row).state != RecordState::Held
            }
            Fault::PurgeCountsHeldAgainstItsLimit => row.record.expires_at <= self.now(),
            _ => self.absent(row),
        };
        let limit = if self.has(Fault::PurgeIgnoresItsLimit) { usize::MAX } else { limit as usize };
        let mut expired: Vec<(SystemTime, Identity)> = {
            let rows = self.rows();
            let found = rows.iter().filter(|(_, row)| deletable(row));
            found.map(|(identity, row)| (row.record.expires_at, identity.clone())).collect()
        };
        expired.sort();
        expired.truncate(limit);
        if self.has(Fault::PurgeLooksThenDeletes) || self.has(Fault::PurgeMiscounts) {
            self.pause().await;
        }
        let mut rows = self.rows();
        let mut deleted = 0;
        for (_, identity) in expired {
            let again = rows.get(&identity).is_some_and(|row| match self.fault {
                Fault::PurgeLooksThenDeletes => true,
                Fault::PurgeCountsHeldAgainstItsLimit => self.absent(row),
                _ => deletable(row),
            });
            if again {
                rows.remove(&identity);
            }
            deleted += u64::from(again || self.has(Fault::PurgeMiscounts));
        }
        Ok(deleted)
    }

    async fn close(&self) {}
}
