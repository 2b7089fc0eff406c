//! One record, and what a claim makes of it: the contract, in a form that can be read.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::{Attempt, AttemptId, Claim, ClaimOutcome, Fingerprint, RecordId};

#[derive(Clone)]
pub(super) struct Entry {
    pub(super) record_id: RecordId,
    pub(super) fingerprint: Fingerprint,
    pub(super) state: State,
    pub(super) attempt: Option<AttemptId>,
    pub(super) attempt_number: u32,
    pub(super) abandoned: u16,
    pub(super) max_abandoned: u16,
    pub(super) created_at: Instant,
    pub(super) expires_at: Instant,
}

#[derive(Clone)]
pub(super) enum State {
    InProgress { lease_until: Instant },
    Held,
    Completed { response: Bytes },
}

impl State {
    pub(super) fn in_progress(now: Instant, lease: Duration) -> Self {
        Self::InProgress { lease_until: now + lease.min(LONGEST) }
    }
}

impl Entry {
    pub(super) fn new(claim: &Claim, now: Instant) -> Self {
        Self {
            record_id: claim.record_id,
            fingerprint: claim.fingerprint.clone(),
            state: State::in_progress(now, claim.lease),
            attempt: Some(claim.attempt.id),
            attempt_number: 1,
            abandoned: 0,
            max_abandoned: claim.max_abandoned,
            created_at: now,
            expires_at: now + claim.retention.min(LONGEST),
        }
    }

    /// As the record was claimed with: nothing but its completion moves the expiry, and that comes once.
    pub(super) fn retention(&self) -> Duration {
        self.expires_at - self.created_at
    }

    /// A record past its expiry counts as absent, unless its lease is alive or it is held.
    pub(super) fn is_absent(&self, now: Instant) -> bool {
        let must_stay = match self.state {
            State::InProgress { .. } => !self.has_lapsed(now) || self.is_to_be_held(now),
            State::Held => true,
            State::Completed { .. } => false,
        };
        self.expires_at <= now && !must_stay
    }

    fn has_lapsed(&self, now: Instant) -> bool {
        matches!(self.state, State::InProgress { lease_until } if lease_until <= now)
    }

    /// The last permitted attempt was abandoned, whether or not anybody has claimed the key since.
    pub(super) fn is_to_be_held(&self, now: Instant) -> bool {
        self.has_lapsed(now) && self.abandoned.saturating_add(1) >= self.max_abandoned
    }

    /// Whether the attempt may still end the record.
    pub(super) fn is_open_to(&self, attempt: &Attempt) -> bool {
        self.attempt == Some(attempt.id) && !self.is_completed()
    }

    fn is_in_progress_by(&self, attempt: &Attempt) -> bool {
        matches!(self.state, State::InProgress { .. }) && self.attempt == Some(attempt.id)
    }

    pub(super) fn is_completed(&self) -> bool {
        matches!(self.state, State::Completed { .. })
    }

    pub(super) fn size(&self) -> usize {
        match &self.state {
            State::Completed { response } => response.len(),
            State::InProgress { .. } | State::Held => 0,
        }
    }

    fn abandon(&self) -> Self {
        Self { abandoned: self.abandoned.saturating_add(1), ..self.clone() }
    }
}

/// What a claim does to the record of its key.
pub(super) enum Decision<'a> {
    Create,
    Change(Box<Entry>, ClaimOutcome),
    Hold(Box<Entry>),
    Show(&'a Entry),
}

pub(super) fn decide<'a>(entry: Option<&'a Entry>, claim: &Claim, now: Instant) -> Decision<'a> {
    let Some(entry) = entry.filter(|entry| !entry.is_absent(now)) else {
        return Decision::Create;
    };
    if entry.is_in_progress_by(&claim.attempt) {
        let state = State::in_progress(now, claim.lease);
        return win(Entry { state, ..entry.clone() });
    }
    if entry.fingerprint != claim.fingerprint || !entry.has_lapsed(now) {
        return Decision::Show(entry);
    }
    if entry.is_to_be_held(now) {
        return Decision::Hold(Box::new(Entry { state: State::Held, ..entry.abandon() }));
    }
    win(Entry {
        state: State::in_progress(now, claim.lease),
        attempt: Some(claim.attempt.id),
        attempt_number: entry.attempt_number.saturating_add(1),
        ..entry.abandon()
    })
}

fn win<'a>(entry: Entry) -> Decision<'a> {
    let outcome = ClaimOutcome::won(entry.record_id, entry.attempt_number);
    Decision::Change(Box::new(entry), outcome)
}

/// A thousand years, so that no sum of instants overflows.
const LONGEST: Duration = Duration::from_secs(1000 * 365 * 24 * 60 * 60);
