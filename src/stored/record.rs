//! What is stored for a key: the record, its states and the messages that change them.

use std::{fmt, time::Duration, time::SystemTime};

use bytes::Bytes;
use uuid::Uuid;

use crate::{
    consumer::Consumer,
    fingerprint::Fingerprint,
    key::IdempotencyKey,
    redact::Length,
    stored::response::{StoredResponse, UnreadableResponse},
};

/// Name of a record.
///
/// It stays the same over attempts that take over from each other. A release ends the record, unless an intent or a
/// finished phase hangs on it; a key that is used anew after its expiry gets a new record and so a new id.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct RecordId(Uuid);

/// Name of one attempt: random, 128 bits, the fencing token of every write that the attempt makes to its record.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct AttemptId(Uuid);

macro_rules! uuid_newtype {
    ($name:ident) => {
        impl $name {
            /// Wraps an id that was read from a store.
            #[must_use]
            pub fn from_uuid(id: Uuid) -> Self {
                Self(id)
            }

            /// The id as a UUID.
            #[must_use]
            pub fn as_uuid(&self) -> Uuid {
                self.0
            }
        }

        /// From its text, as it stands in logs.
        impl std::str::FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, uuid::Error> {
                text.parse().map(Self)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}
pub(crate) use uuid_newtype;
uuid_newtype!(RecordId);
uuid_newtype!(AttemptId);

impl RecordId {
    /// Makes a fresh random id.
    #[must_use]
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

impl AttemptId {
    /// Makes a fresh random id.
    #[must_use]
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

/// One execution of the handler for a record: whose key, and which attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Attempt {
    /// The consumer that the key belongs to.
    pub consumer: Consumer,
    /// The key.
    pub key: IdempotencyKey,
    /// The fencing token.
    pub id: AttemptId,
}

impl Attempt {
    /// A new attempt, with a random id, for the key of a consumer.
    #[must_use]
    pub fn new(consumer: Consumer, key: IdempotencyKey) -> Self {
        Self { consumer, key, id: AttemptId::random() }
    }
}

/// A claim of a key.
///
/// It carries durations and never instants: leases and expiry are judged by the clock of the store alone.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Claim {
    /// Who claims what.
    pub attempt: Attempt,
    /// Digest of the request.
    pub fingerprint: Fingerprint,
    /// The id that the record gets if this claim makes a new one.
    pub record_id: RecordId,
    /// For how long the attempt owns the record without renewing. At least one millisecond.
    pub lease: Duration,
    /// For how long the record is kept, counted from the claim that makes it.
    pub retention: Duration,
    /// How many abandoned attempts (leases that ran out) hold the record. 1 never runs an abandoned request again.
    pub max_abandoned: u16,
}

impl Claim {
    /// A claim with the defaults of the layer: lease 30 s, retention 24 h, held after 5 abandoned attempts.
    #[must_use]
    pub fn new(attempt: Attempt, fingerprint: Fingerprint) -> Self {
        Self {
            attempt,
            fingerprint,
            record_id: RecordId::random(),
            lease: Duration::from_secs(30),
            retention: Duration::from_secs(24 * 60 * 60),
            max_abandoned: 5,
        }
    }
}

/// What became of a [`Claim`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ClaimOutcome {
    /// The attempt owns the record and must run.
    #[non_exhaustive]
    Won {
        /// The record, new or taken over.
        record_id: RecordId,
        /// 1 for the first attempt of a record, then counting up.
        attempt_number: u32,
    },
    /// The key is taken; this is its record, which the claim left as it was. One change is allowed: a record whose
    /// last permitted attempt was abandoned has become held.
    Exists(Box<Record>),
    /// Somebody else was changing the record at this very moment. The store has asked again and gave up.
    Contended,
}

impl ClaimOutcome {
    /// The key was won.
    #[must_use]
    pub fn won(record_id: RecordId, attempt_number: u32) -> Self {
        Self::Won { record_id, attempt_number }
    }
}

/// A record as a store shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Record {
    /// Name of the record.
    pub id: RecordId,
    /// The consumer that the key belongs to.
    pub consumer: Consumer,
    /// The key.
    pub key: IdempotencyKey,
    /// Digest of the request that made the record.
    pub fingerprint: Fingerprint,
    /// Where the record stands.
    pub state: RecordState,
    /// The attempt that owns the record or has completed it; none after an operator resolved it or an attempt gave it back.
    pub attempt: Option<AttemptId>,
    /// Number of that attempt.
    pub attempt_number: u32,
    /// How many attempts of this record were abandoned, that is, let their lease run out.
    pub abandoned: u16,
    /// How many of its intents are open. A record with one that may not be called again shows as held.
    pub unresolved: u32,
    /// When the record was made, by the clock of the store.
    pub created_at: SystemTime,
    /// When the record expires, by the clock of the store.
    pub expires_at: SystemTime,
}

impl Record {
    /// A record with no attempt, number 1, nothing abandoned or unresolved and both times 1970: a store sets these fields from what
    /// it keeps.
    #[must_use]
    pub fn new(
        id: RecordId,
        consumer: Consumer,
        key: IdempotencyKey,
        fingerprint: Fingerprint,
        state: RecordState,
    ) -> Self {
        Self {
            id,
            consumer,
            key,
            fingerprint,
            state,
            attempt: None,
            attempt_number: 1,
            abandoned: 0,
            unresolved: 0,
            created_at: SystemTime::UNIX_EPOCH,
            expires_at: SystemTime::UNIX_EPOCH,
        }
    }

    /// The record as a claim that was won has made it.
    pub(crate) fn won(
        attempt: &Attempt,
        fingerprint: &Fingerprint,
        lease: Duration,
        id: RecordId,
        attempt_number: u32,
    ) -> Self {
        let Attempt { consumer, key, id: attempt } = attempt.clone();
        let record = Self::new(id, consumer, key, fingerprint.clone(), RecordState::in_progress(lease));
        Self { attempt: Some(attempt), attempt_number, ..record }
    }

    /// The stored response of a completed record; `None` in any other state.
    ///
    /// # Errors
    ///
    /// [`UnreadableResponse`] if the stored bytes are damaged or were written by an unknown version.
    pub fn response(&self) -> Result<Option<StoredResponse>, UnreadableResponse> {
        match &self.state {
            RecordState::Completed { response } => StoredResponse::decode(response).map(Some),
            RecordState::InProgress { .. } | RecordState::Held => Ok(None),
        }
    }
}

/// Where a record stands.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum RecordState {
    /// An attempt owns the record; or it was released, and stays because an intent or a finished phase hangs on it.
    #[non_exhaustive]
    InProgress {
        /// What is left of the lease; zero once it ran out or was given back.
        lease_remaining: Duration,
    },
    /// The outcome is unknown and running again is not allowed. Ends by a late completion or release of the same
    /// attempt or by an operator; one that only waits for an open intent also when that is settled. Never by time.
    Held,
    /// The response is stored.
    #[non_exhaustive]
    Completed {
        /// The encoded [`StoredResponse`].
        response: Bytes,
    },
}

impl RecordState {
    /// In progress, with what is left of the lease.
    #[must_use]
    pub fn in_progress(lease_remaining: Duration) -> Self {
        Self::InProgress { lease_remaining }
    }

    /// Completed, with the encoded response.
    #[must_use]
    pub fn completed(response: Bytes) -> Self {
        Self::Completed { response }
    }
}

/// Shows how long a stored response is, and nothing of it.
impl fmt::Debug for RecordState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InProgress { lease_remaining } => {
                f.debug_struct("InProgress").field("lease_remaining", lease_remaining).finish()
            }
            Self::Held => f.write_str("Held"),
            Self::Completed { response } => {
                f.debug_struct("Completed").field("response", &Length(response)).finish()
            }
        }
    }
}

/// A renewal of the lease of a record.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Renewal {
    /// The attempt that asks.
    pub attempt: Attempt,
    /// The new lease, counted from the moment at which the store carries the renewal out.
    pub lease: Duration,
}

impl Renewal {
    /// Renew the lease of `attempt` to `lease` from then on.
    #[must_use]
    pub fn new(attempt: Attempt, lease: Duration) -> Self {
        Self { attempt, lease }
    }
}

/// What became of a [`Renewal`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RenewOutcome {
    /// The lease was extended.
    Renewed,
    /// Nothing was written, but the attempt may still complete: the row was locked, or the record is held.
    Skipped,
    /// The attempt does not own the record any more.
    Lost,
}

/// What became of a completion.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum CompleteOutcome {
    /// The response is stored, now or by an earlier call of the same attempt whose reply was lost.
    Completed,
    /// The record belongs to another attempt or to an operator's resolution; nothing was written.
    Lost(Box<Record>),
    /// There is no record; nothing was written.
    Absent,
}

/// Whether a fenced write was applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fenced {
    /// Its fence held, and it was changed.
    Applied,
    /// It did not, or no longer: the record is not the attempt's, for example. Nothing was changed.
    Lost,
}

/// How an operator ends a record whose outcome was unknown.
#[derive(Clone)]
#[expect(clippy::exhaustive_enums, reason = "a store must handle every one")]
pub enum Resolution {
    /// Give the key back: the next request runs.
    Release,
    /// Store this encoded response (see [`StoredResponse::encode`]): the next request gets it.
    Complete(Bytes),
}

impl Resolution {
    /// Store this response: the next request gets it.
    #[must_use]
    pub fn complete(response: &StoredResponse) -> Self {
        Self::Complete(response.encode())
    }
}

/// Shows how long a response is, and nothing of it.
impl fmt::Debug for Resolution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Release => f.write_str("Release"),
            Self::Complete(response) => f.debug_tuple("Complete").field(&Length(response)).finish(),
        }
    }
}

/// What became of a [`Resolution`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResolveOutcome {
    /// The record was held, or its lease had run out; it is resolved.
    Resolved,
    /// An attempt with a live lease owns the record; nothing was changed.
    InProgress,
    /// An intent of the record is open and may not be called again: resolve that one first, see
    /// [`resolve_intent`](crate::IdempotencyHandle::resolve_intent). Nothing was changed.
    UnresolvedIntents,
    /// The record is completed already, and completed records do not change.
    AlreadyCompleted,
    /// There is no record for the key.
    Absent,
}

/// Which records an operator wants to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "a store must handle every one")]
pub enum RecordFilter {
    /// Every record.
    All,
    /// Records in progress, among them those whose lease ran out and which the next request takes over.
    InProgress,
    /// Held records, among them those that the next request would find held.
    Held,
    /// Completed records.
    Completed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_responses_are_not_shown() {
        let response = Bytes::from_static(b"secret");
        let state = RecordState::completed(response.clone());
        assert_eq!(format!("{state:?}"), "Completed { response: 6 bytes }");
        assert_eq!(format!("{:?}", Resolution::Complete(response)), "Complete(6 bytes)");
    }
}
