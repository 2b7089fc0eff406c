//! One record and the rules about it: the contract as readable code. The SQL of the rules is in
//! `sql/rules.rs`, under the same names.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::time::Instant;

use crate::{
    consumer::Consumer,
    fingerprint::Fingerprint,
    key::IdempotencyKey,
    stored::record::{Attempt, AttemptId, Claim, ClaimOutcome, RecordId},
};

pub(super) type Identity = (Consumer, IdempotencyKey);

pub(super) fn identity_of(attempt: &Attempt) -> Identity {
    (attempt.consumer.clone(), attempt.key.clone())
}

/// A moment on two clocks: one decides, the other is shown to people.
#[derive(Clone, Copy)]
pub(super) struct Now {
    pub(super) instant: Instant,
    pub(super) shown: SystemTime,
}

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
    /// It has an intent, or its request is about to be sent again: a release does not delete it.
    pub(super) retained: bool,
    /// The number of its open intents.
    pub(super) unresolved: u32,
    /// The end of the time in which its open intents may all be called again. `None` if that time
    /// has no end.
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
            retained: false,
            unresolved: 0,
            repeatable_until: None,
        }
    }

    /// A record past its expiry counts as absent. It does not if its lease is alive, if it is held,
    /// or if it is in progress with an open intent.
    pub(super) fn is_absent(&self, now: Instant) -> bool {
        let must_stay = match self.state {
            State::InProgress { .. } => !self.has_lapsed(now) || self.unresolved > 0 || self.is_held(now),
            State::Held => true,
            State::Completed { .. } => false,
        };
        self.expires_at <= now && !must_stay
    }

    /// A record that counts as absent is purged, unless it has an open intent.
    pub(super) fn is_purgeable(&self, now: Instant) -> bool {
        self.is_absent(now) && self.unresolved == 0
    }

    fn has_lapsed(&self, now: Instant) -> bool {
        matches!(self.state, State::InProgress { lease_until } if lease_until <= now)
    }

    /// It is shown as held: it was made held, or the next claim must not take it over.
    pub(super) fn is_held(&self, now: Instant) -> bool {
        matches!(self.state, State::Held) || self.is_exhausted(now) || self.is_blocked(now)
    }

    /// Its last permitted attempt was abandoned, even if no claim has come since. A record that was
    /// released has no attempt that could be abandoned.
    pub(super) fn is_exhausted(&self, now: Instant) -> bool {
        self.has_lapsed(now)
            && self.attempt.is_some()
            && self.abandoned.saturating_add(1) >= self.max_abandoned
    }

    /// It has lapsed, and the next attempt would have to wait for an intent.
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
        self.record_id == record && self.attempt == Some(attempt) && self.is_leased(now)
    }

    fn is_leased(&self, now: Instant) -> bool {
        matches!(self.state, State::InProgress { lease_until } if lease_until > now)
    }

    /// It waits for the next attempt, which may be one without the client.
    pub(super) fn is_abandoned(&self, now: Instant) -> bool {
        self.has_lapsed(now) && !self.is_held(now) && self.expires_at > now && self.max_abandoned > 1
    }

    /// The expiry if the reason that kept the record ends now. A record that outlived its expiry by
    /// an open intent, a hold or a live lease gets its whole retention: it must not be forgotten at
    /// the moment when it is freed.
    pub(super) fn expiry_if_freed(&self, now: Instant) -> Instant {
        if self.expires_at <= now && !self.is_absent(now) {
            self.whole_retention(now)
        } else {
            self.expires_at
        }
    }

    /// The expiry if its lease counts from now on. A retained record must not be forgotten when a
    /// lease that outlives the expiry runs out.
    pub(super) fn expiry_if_leased(&self, now: Instant) -> Instant {
        let outlives = matches!(self.state, State::InProgress { lease_until }
            if lease_until > now && lease_until >= self.expires_at);
        if self.retained && outlives { self.whole_retention(now) } else { self.expires_at }
    }

    /// The expiry if it is completed now. A response must not be forgotten at the moment when it is
    /// stored.
    fn expiry_if_completed(&self, now: Instant) -> Instant {
        if self.expires_at <= now { self.whole_retention(now) } else { self.expires_at }
    }

    pub(super) fn whole_retention(&self, now: Instant) -> Instant {
        now + self.retention
    }

    /// Gives it a lease that counts from now on.
    pub(super) fn with_lease(self, lease: Duration, now: Instant) -> Self {
        let leased = Self { state: State::in_progress(now, lease), ..self };
        Self { expires_at: leased.expiry_if_leased(now), ..leased }
    }

    pub(super) fn completed(&self, response: Bytes, now: Instant) -> Self {
        let expires_at = self.expiry_if_completed(now);
        Self { state: State::Completed { response }, expires_at, ..self.clone() }
    }

    /// The record after its release, if it is retained.
    pub(super) fn released(&self, now: Instant) -> Self {
        let state = State::InProgress { lease_until: now };
        Self { state, attempt: None, expires_at: self.expiry_if_freed(now), ..self.clone() }
    }

    /// The attempt may still end the record, however old its lease is.
    pub(super) fn is_mine(&self, attempt: &Attempt) -> bool {
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

    /// Its last attempt is over. That attempt counts as abandoned, unless it released the record.
    fn without_owner(&self) -> Self {
        Self { abandoned: self.abandoned.saturating_add(self.attempt.is_some().into()), ..self.clone() }
    }
}

/// The effect of a claim on the record of its key.
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
    // First: a repeated claim is won even if the lease has run out or was the last one permitted.
    if entry.is_in_progress_by(&claim.attempt) {
        return win(entry.clone().with_lease(claim.lease, now), now);
    }
    if entry.fingerprint != claim.fingerprint || !entry.has_lapsed(now) || entry.is_blocked(now) {
        return Decision::Show(entry);
    }
    // After the fingerprint was compared: only the same request counts the attempt as abandoned.
    if entry.is_exhausted(now) {
        return Decision::Hold(Box::new(Entry { state: State::Held, ..entry.without_owner() }));
    }
    let next = Entry {
        attempt: Some(claim.attempt.id),
        attempt_number: entry.attempt_number.saturating_add(1),
        ..entry.without_owner()
    };
    win(next.with_lease(claim.lease, now), now)
}

fn win<'a>(entry: Entry, now: Instant) -> Decision<'a> {
    let age = now.saturating_duration_since(entry.created_at);
    let outcome = ClaimOutcome::taken_over(entry.record_id, entry.attempt_number, age);
    Decision::Change(Box::new(entry), outcome)
}

/// A thousand years: short enough that no sum of instants overflows.
pub(super) const LONGEST: Duration = Duration::from_secs(1000 * 365 * 24 * 60 * 60);
