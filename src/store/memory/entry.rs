//! One record, what may be done with it, and what a claim makes of it: the contract, in a form that can be read.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::{
    fingerprint::Fingerprint,
    stored::record::{Attempt, AttemptId, Claim, ClaimOutcome, RecordId},
};

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
    /// As the record was claimed with.
    pub(super) retention: Duration,
    /// An intent hangs on it, or its request is about to be sent again: it stays when it is released.
    pub(super) kept: bool,
    /// How many of its intents are open.
    pub(super) unresolved: u32,
    /// Until when its open intents may all be called again. `None`: always.
    pub(super) repeatable_until: Option<Instant>,
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
        let retention = claim.retention.min(LONGEST);
        Self {
            record_id: claim.record_id,
            fingerprint: claim.fingerprint.clone(),
            state: State::in_progress(now, claim.lease),
            attempt: Some(claim.attempt.id),
            attempt_number: 1,
            abandoned: 0,
            max_abandoned: claim.max_abandoned,
            created_at: now,
            expires_at: now + retention,
            retention,
            kept: false,
            unresolved: 0,
            repeatable_until: None,
        }
    }

    /// A record past its expiry counts as absent, unless its lease is alive, it is held, or it is in progress with an open
    /// intent.
    pub(super) fn is_absent(&self, now: Instant) -> bool {
        let must_stay = match self.state {
            State::InProgress { .. } => !self.has_lapsed(now) || self.unresolved > 0 || self.is_held(now),
            State::Held => true,
            State::Completed { .. } => false,
        };
        self.expires_at <= now && !must_stay
    }

    /// What counts as absent is purged, unless an intent is open.
    pub(super) fn may_be_purged(&self, now: Instant) -> bool {
        self.is_absent(now) && self.unresolved == 0
    }

    fn has_lapsed(&self, now: Instant) -> bool {
        matches!(self.state, State::InProgress { lease_until } if lease_until <= now)
    }

    /// It shows as held: it was made so, or the next claim would find it so.
    pub(super) fn is_held(&self, now: Instant) -> bool {
        matches!(self.state, State::Held) || self.is_to_be_held(now) || self.is_blocked(now)
    }

    /// The last permitted attempt was abandoned, whether or not anybody has claimed the key since. A record that was
    /// released has no attempt that could be abandoned.
    pub(super) fn is_to_be_held(&self, now: Instant) -> bool {
        self.has_lapsed(now)
            && self.attempt.is_some()
            && self.abandoned.saturating_add(1) >= self.max_abandoned
    }

    /// Nobody owns it, and the next attempt would have to wait for an intent.
    fn is_blocked(&self, now: Instant) -> bool {
        self.has_lapsed(now) && self.is_unrepeatable(now)
    }

    /// It has an open intent that may not be called again.
    pub(super) fn is_unrepeatable(&self, now: Instant) -> bool {
        self.repeatable_until.is_some_and(|until| until <= now)
    }

    /// An operator may end it.
    pub(super) fn is_resolvable(&self, now: Instant) -> bool {
        matches!(self.state, State::Held) || self.has_lapsed(now)
    }

    /// The attempt owns this very record, with a live lease, and may be calling an upstream.
    pub(super) fn is_owned_by(&self, attempt: AttemptId, record: RecordId, now: Instant) -> bool {
        self.record_id == record
            && self.attempt == Some(attempt)
            && matches!(self.state, State::InProgress { lease_until } if lease_until > now)
    }

    /// It waits for the next attempt, which need not be the client's.
    pub(super) fn is_abandoned(&self, now: Instant) -> bool {
        self.has_lapsed(now) && !self.is_held(now) && self.expires_at > now && self.max_abandoned > 1
    }

    /// When it expires, if what keeps it ends now. What was kept past its expiry, by an open intent, a hold or a live lease,
    /// gets its whole retention anew: it must not be forgotten in the moment in which it is freed.
    pub(super) fn kept_on(&self, now: Instant) -> Instant {
        if self.expires_at <= now && !self.is_absent(now) { now + self.retention } else { self.expires_at }
    }

    /// With its lease from now on. If that outlives the expiry, what hangs on the record is not forgotten when it runs out.
    pub(super) fn with_lease(self, lease: Duration, now: Instant) -> Self {
        Self { state: State::in_progress(now, lease), ..self }.outlived(now)
    }

    /// A lease that outlives the expiry gives its whole retention anew to a record on which something hangs.
    pub(super) fn outlived(self, now: Instant) -> Self {
        let outlives = matches!(self.state, State::InProgress { lease_until }
            if lease_until > now && lease_until >= self.expires_at);
        if self.kept && outlives { Self { expires_at: now + self.retention, ..self } } else { self }
    }

    /// With its response, which is kept for its whole retention if it comes after the expiry.
    pub(super) fn completed(&self, response: Bytes, now: Instant) -> Self {
        let expires_at = if self.expires_at <= now { now + self.retention } else { self.expires_at };
        Self { state: State::Completed { response }, expires_at, ..self.clone() }
    }

    /// Given back, with all that hangs on it.
    pub(super) fn released(&self, now: Instant) -> Self {
        let state = State::InProgress { lease_until: now };
        Self { state, attempt: None, expires_at: self.kept_on(now), ..self.clone() }
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

    /// Its last attempt is over, and was abandoned unless it gave the record back.
    fn without_owner(&self) -> Self {
        Self { abandoned: self.abandoned.saturating_add(self.attempt.is_some().into()), ..self.clone() }
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
        return win(entry.clone().with_lease(claim.lease, now));
    }
    if entry.fingerprint != claim.fingerprint || !entry.has_lapsed(now) || entry.is_blocked(now) {
        return Decision::Show(entry);
    }
    if entry.is_to_be_held(now) {
        return Decision::Hold(Box::new(Entry { state: State::Held, ..entry.without_owner() }));
    }
    let next = Entry {
        attempt: Some(claim.attempt.id),
        attempt_number: entry.attempt_number.saturating_add(1),
        ..entry.without_owner()
    };
    win(next.with_lease(claim.lease, now))
}

fn win<'a>(entry: Entry) -> Decision<'a> {
    let outcome = ClaimOutcome::won(entry.record_id, entry.attempt_number);
    Decision::Change(Box::new(entry), outcome)
}

/// A thousand years, so that no sum of instants overflows.
pub(super) const LONGEST: Duration = Duration::from_secs(1000 * 365 * 24 * 60 * 60);
