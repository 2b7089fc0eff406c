//! What each call does to one record, and how each fault changes it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use tower_idempotency::{
    Consumer, IdempotencyKey,
    store::{
        Attempt, Claim, ClaimOutcome, CompleteOutcome, Fingerprint, Record, RecordState, RenewOutcome,
        Renewal,
    },
};

use super::Fault;

pub type Identity = (String, String);

#[derive(Clone, Debug)]
pub struct Row {
    pub record: Record,
    pub lease_until: SystemTime,
    pub max_abandoned: u16,
    pub retention: Duration,
}

#[derive(Debug)]
pub struct BrokenStore {
    pub rows: Arc<Mutex<HashMap<Identity, Row>>>,
    pub fault: Fault,
    pub ahead: Duration,
}

impl BrokenStore {
    pub fn has(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    pub fn rows(&self) -> MutexGuard<'_, HashMap<Identity, Row>> {
        self.rows.lock().expect("no fault panics")
    }

    /// The time by which leases and expiries are judged.
    pub fn now(&self) -> SystemTime {
        SystemTime::now() + if self.has(Fault::ApplicationClockJudges) { self.ahead } else { Duration::ZERO }
    }

    /// The time from which leases and retentions are counted.
    pub fn start(&self) -> SystemTime {
        SystemTime::now() + if self.has(Fault::ApplicationClockSets) { self.ahead } else { Duration::ZERO }
    }

    pub fn identity(&self, consumer: &Consumer, key: &IdempotencyKey) -> Identity {
        let (consumer, key) = (consumer.as_str().to_owned(), key.as_str().to_owned());
        match self.fault {
            Fault::KeysFoldCase => (consumer, key.to_lowercase()),
            Fault::KeysAreTrimmed => (consumer, key.trim_end().to_owned()),
            Fault::ConsumersFoldCase => (consumer.to_lowercase(), key),
            Fault::IdentityIsConcatenated => (format!("{consumer}:{key}"), String::new()),
            Fault::NamesAreCut => (consumer.chars().take(64).collect(), key.chars().take(64).collect()),
            _ => (consumer, key),
        }
    }

    pub fn identity_of(&self, attempt: &Attempt) -> Identity {
        self.identity(&attempt.consumer, &attempt.key)
    }

    pub fn lapsed(&self, row: &Row) -> bool {
        matches!(row.record.state, RecordState::InProgress { .. }) && row.lease_until <= self.now()
    }

    pub fn to_be_held(&self, row: &Row) -> bool {
        let limit = row.max_abandoned + u16::from(self.has(Fault::HoldsOneTooLate));
        self.lapsed(row) && row.record.abandoned + 1 >= limit
    }

    pub fn absent(&self, row: &Row) -> bool {
        let stays = match &row.record.state {
            RecordState::InProgress { .. } => {
                (!self.lapsed(row) && !self.has(Fault::ExpiryEndsALease)) || self.to_be_held(row)
            }
            RecordState::Held => !self.has(Fault::HeldExpires),
            _ => self.has(Fault::ExpiryNeedsAPurge),
        };
        row.record.expires_at <= self.now() && !stays
    }

    pub fn shown(&self, row: &Row) -> Record {
        let state = match &row.record.state {
            RecordState::InProgress { .. } if self.to_be_held(row) => RecordState::Held,
            RecordState::InProgress { .. } => {
                RecordState::in_progress(row.lease_until.duration_since(self.now()).unwrap_or_default())
            }
            state => state.clone(),
        };
        let mut record = row.record.clone();
        record.state = state;
        record.abandoned += u16::from(self.to_be_held(row));
        if self.lapsed(row) && self.has(Fault::GetHidesTheLapsedAttempt) {
            record.attempt = None;
        }
        record
    }

    pub fn fresh(&self, claim: &Claim) -> Row {
        let fingerprint = match self.fault {
            Fault::FingerprintIsText => Fingerprint::from_bytes(
                String::from_utf8_lossy(claim.fingerprint.as_bytes()).trim_end().to_lowercase().into_bytes(),
            ),
            _ => claim.fingerprint.clone(),
        };
        let state = RecordState::in_progress(Duration::ZERO);
        let Attempt { consumer, key, id, .. } = claim.attempt.clone();
        let mut record = Record::new(claim.record_id, consumer, key, fingerprint, state);
        record.attempt = Some(id);
        record.created_at = self.start();
        record.expires_at = record.created_at + claim.retention;
        if self.has(Fault::RetentionIsCutAtAYear) {
            record.expires_at =
                record.created_at + claim.retention.min(Duration::from_secs(365 * 24 * 60 * 60));
        }
        if self.has(Fault::RetentionStartsWithTheLease) {
            record.expires_at += claim.lease;
        }
        let (max_abandoned, retention) = (claim.max_abandoned, claim.retention);
        Row { record, lease_until: self.start() + claim.lease, max_abandoned, retention }
    }

    pub fn same_request(&self, row: &Row, claim: &Claim) -> bool {
        if self.has(Fault::FingerprintUncheckedAtTakeover) {
            return true;
        }
        row.record.fingerprint == self.fresh(claim).record.fingerprint
    }

    /// What a claim does: the row to write, if any, and the answer.
    pub fn decide(&self, seen: Option<&Row>, claim: &Claim) -> (Option<Row>, ClaimOutcome) {
        let Some(row) = seen else {
            return (Some(self.fresh(claim)), ClaimOutcome::won(claim.record_id, 1));
        };
        if self.absent(row) {
            return self.use_anew(row, claim);
        }
        let mine = row.record.attempt == Some(claim.attempt.id);
        if mine
            && !self.has(Fault::RepeatedClaimIsRefused)
            && let Some(answer) = self.repeat(row, claim)
        {
            return answer;
        }
        let held = row.record.state == RecordState::Held && self.has(Fault::HeldIsClaimable);
        if !self.same_request(row, claim) || !(self.lapsed(row) || held) {
            return self.refuse(row, claim);
        }
        self.take_over(row, claim)
    }

    pub fn use_anew(&self, row: &Row, claim: &Claim) -> (Option<Row>, ClaimOutcome) {
        if self.has(Fault::FingerprintCheckedAfterExpiry) && !self.same_request(row, claim) {
            return (None, ClaimOutcome::Exists(Box::new(self.shown(row))));
        }
        let mut fresh = self.fresh(claim);
        if self.has(Fault::ExpiryKeepsTheRecordId) {
            fresh.record.id = row.record.id;
        }
        let outcome = ClaimOutcome::won(fresh.record.id, 1);
        (Some(fresh), outcome)
    }

    pub fn repeat(&self, row: &Row, claim: &Claim) -> Option<(Option<Row>, ClaimOutcome)> {
        let in_progress = matches!(row.record.state, RecordState::InProgress { .. });
        if self.lapsed(row) && self.has(Fault::LapsedOwnerLosesAtOnce) {
            return None;
        }
        if !in_progress && !self.has(Fault::EndedAttemptWinsAgain) {
            return None;
        }
        let mut row = row.clone();
        if self.has(Fault::RepeatedClaimIsANewAttempt) {
            row.record.attempt_number += 1;
        }
        row.lease_until = self.start() + claim.lease;
        let outcome = ClaimOutcome::won(row.record.id, row.record.attempt_number);
        Some((Some(row), outcome))
    }

    pub fn refuse(&self, row: &Row, claim: &Claim) -> (Option<Row>, ClaimOutcome) {
        let mut changed = row.clone();
        match self.fault {
            Fault::ReplayWrites if matches!(row.record.state, RecordState::Completed { .. }) => {
                changed.record.expires_at += Duration::from_millis(1);
            }
            Fault::RefusalExtendsTheLease => changed.lease_until = self.start() + claim.lease,
            Fault::RefusalOfAnotherRequestRecordsIt => changed.record.fingerprint = claim.fingerprint.clone(),
            Fault::HeldIsCountedAgain if row.record.state == RecordState::Held => {
                changed.record.abandoned += 1
            }
            _ => {}
        }
        (Some(changed), ClaimOutcome::Exists(Box::new(self.shown(row))))
    }

    pub fn take_over(&self, row: &Row, claim: &Claim) -> (Option<Row>, ClaimOutcome) {
        let mut row = row.clone();
        if self.has(Fault::LimitIsTheLatestClaims) {
            row.max_abandoned = claim.max_abandoned;
        }
        let to_be_held = self.to_be_held(&row);
        if !self.has(Fault::AbandonedAttemptsAreNotCounted) {
            row.record.abandoned += 1;
        }
        if to_be_held {
            row.record.state = RecordState::Held;
            if self.has(Fault::HeldForgetsItsAttempt) {
                row.record.attempt = None;
            }
            return (Some(row.clone()), ClaimOutcome::Exists(Box::new(row.record)));
        }
        row.record.state = RecordState::in_progress(Duration::ZERO);
        row.record.attempt = Some(claim.attempt.id);
        row.record.attempt_number += u32::from(!self.has(Fault::AttemptNumberStays));
        row.lease_until = self.start() + claim.lease;
        match self.fault {
            Fault::TakeoverIsANewRecord => row.record.id = claim.record_id,
            Fault::TakeoverRestartsTheRetention => row.record.expires_at = self.start() + claim.retention,
            _ => {}
        }
        let outcome = ClaimOutcome::won(row.record.id, row.record.attempt_number);
        (Some(row), outcome)
    }

    pub fn complete_row(&self, row: &mut Row, attempt: &Attempt, response: &Bytes) -> CompleteOutcome {
        let mine = row.record.attempt == Some(attempt.id);
        let lapsed = self.lapsed(row) && self.has(Fault::LapsedOwnerLosesAtOnce);
        let completed = matches!(row.record.state, RecordState::Completed { .. });
        let refused = completed && self.has(Fault::RepeatedCompletionIsLost);
        if (!mine && !self.has(Fault::CompletionUnfenced)) || lapsed || refused {
            let mut record = self.shown(row);
            if self.has(Fault::LostCompletionShowsTheOwnAttempt) {
                record.attempt = Some(attempt.id);
            }
            return CompleteOutcome::Lost(Box::new(record));
        }
        let replaced = self.has(Fault::CompletionUnfenced) || self.has(Fault::RepeatedCompletionReplaces);
        if !completed || replaced {
            let stored = match self.fault {
                Fault::ResponseIsText => String::from_utf8_lossy(response).into_owned().into(),
                _ => response.clone(),
            };
            row.record.state = RecordState::completed(stored);
            let late = row.record.expires_at <= self.now() && !self.has(Fault::CompletionKeepsTheExpiry);
            if late || self.has(Fault::CompletionRestartsTheRetention) {
                row.record.expires_at = self.start() + row.retention;
            }
        }
        CompleteOutcome::Completed
    }

    pub fn renew_row(&self, renewal: &Renewal) -> RenewOutcome {
        let mut rows = self.rows();
        let Some(row) = rows.get_mut(&self.identity_of(&renewal.attempt)) else { return RenewOutcome::Lost };
        let mine = row.record.attempt == Some(renewal.attempt.id) || self.has(Fault::RenewalUnfenced);
        let lapsed = self.lapsed(row) && self.has(Fault::LapsedOwnerLosesAtOnce);
        match row.record.state {
            _ if !mine || lapsed => RenewOutcome::Lost,
            RecordState::Held if !self.has(Fault::HeldIsRenewed) => RenewOutcome::Skipped,
            RecordState::Completed { .. } => RenewOutcome::Lost,
            _ => {
                let from =
                    if self.has(Fault::RenewalAddsToTheLease) { row.lease_until } else { self.start() };
                row.lease_until = from + renewal.lease;
                row.record.state = RecordState::in_progress(Duration::ZERO);
                RenewOutcome::Renewed
            }
        }
    }
}
