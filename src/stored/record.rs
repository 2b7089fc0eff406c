//! The record of a key: its states, and the messages that change them.

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

/// Names a record.
///
/// The id stays the same when one attempt takes over from another. A release ends the record and
/// its id, unless the record has an intent or a finished phase. A key that is used again after its
/// expiry gets a new record and a new id.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct RecordId(Uuid);

/// Names one attempt: random, 128 bits. It is the fencing token of every write that the attempt
/// makes to its record.
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

        /// Reads the id as logs show it.
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
    /// Makes a random id.
    #[must_use]
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

impl AttemptId {
    /// Makes a random id.
    #[must_use]
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

/// One execution of the handler for a record.
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
    /// Makes an attempt with a random id for the key of a consumer.
    #[must_use]
    pub fn new(consumer: Consumer, key: IdempotencyKey) -> Self {
        Self { consumer, key, id: AttemptId::random() }
    }
}

/// A claim of a key.
///
/// It carries durations and never instants: only the clock of the store judges leases and expiry.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Claim {
    /// The attempt that claims, with its consumer and key.
    pub attempt: Attempt,
    /// Digest of the request.
    pub fingerprint: Fingerprint,
    /// The id of the record, if this claim makes a new one.
    pub record_id: RecordId,
    /// The time for which the attempt owns the record without a renewal. At least one millisecond.
    pub lease: Duration,
    /// The time until the record expires, counted from the claim that makes it.
    pub retention: Duration,
    /// The number of abandoned attempts, whose leases ran out, after which the record is held. With
    /// 1, an abandoned request never runs again.
    pub max_abandoned: u16,
}

impl Claim {
    /// Makes a claim with the defaults of the layer: lease 30 s, retention 24 h, held after 5
    /// abandoned attempts.
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

/// The outcome of a [`Claim`].
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
        /// The time since the record was first claimed; zero for the first attempt.
        age: Duration,
    },
    /// The key is taken. This is its record, which the claim left unchanged, with one exception: a
    /// record whose last permitted attempt was abandoned has become held.
    Exists(Box<Record>),
    /// Another call was changing the record. The store asked again and gave up.
    Contended,
}

impl ClaimOutcome {
    /// Makes the outcome of a claim that won a new record.
    #[must_use]
    pub fn won(record_id: RecordId, attempt_number: u32) -> Self {
        Self::taken_over(record_id, attempt_number, Duration::ZERO)
    }

    /// Makes the outcome of a claim that won a record of this age.
    #[must_use]
    pub fn taken_over(record_id: RecordId, attempt_number: u32, age: Duration) -> Self {
        Self::Won { record_id, attempt_number, age }
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
    /// State of the record.
    pub state: RecordState,
    /// The attempt that owns the record or has completed it. `None` after an operator resolved the
    /// record or an attempt released it.
    pub attempt: Option<AttemptId>,
    /// Number of that attempt.
    pub attempt_number: u32,
    /// The number of attempts of this record that were abandoned: their leases ran out.
    pub abandoned: u16,
    /// The number of its open intents. A record with an open intent that may not be called again
    /// shows as held.
    pub unresolved: u32,
    /// The time at which the record was made, by the clock of the store.
    pub created_at: SystemTime,
    /// The time at which the record expires, by the clock of the store.
    pub expires_at: SystemTime,
}

impl Record {
    /// Makes a record without an attempt: number 1, nothing abandoned or unresolved, both times at
    /// the Unix epoch. A store then sets these fields from its row.
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

    /// The record as a claim has just made it.
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

    /// Its lease ran out or was released: a claim with its fingerprint might take it over.
    pub(crate) fn is_lapsed(&self) -> bool {
        matches!(self.state, RecordState::InProgress { lease_remaining } if lease_remaining.is_zero())
    }

    /// The stored response of a completed record; `None` in any other state.
    ///
    /// # Errors
    ///
    /// [`UnreadableResponse`] if the stored bytes are damaged or were written by an unknown
    /// version.
    pub fn response(&self) -> Result<Option<StoredResponse>, UnreadableResponse> {
        match &self.state {
            RecordState::Completed { response } => StoredResponse::decode(response).map(Some),
            RecordState::InProgress { .. } | RecordState::Held => Ok(None),
        }
    }
}

/// State of a record.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum RecordState {
    /// An attempt owns the record. Or the record was released, and stays because it has an intent
    /// or a finished phase.
    #[non_exhaustive]
    InProgress {
        /// The rest of the lease; zero after it ran out or was released.
        lease_remaining: Duration,
    },
    /// The outcome is unknown, and running again is not allowed.
    ///
    /// The state ends when the same attempt completes or releases the record late, or when an
    /// operator resolves it. If the record only waits for an open intent, it also ends when that
    /// intent is settled. It never ends by time.
    Held,
    /// The response is stored.
    #[non_exhaustive]
    Completed {
        /// The encoded [`StoredResponse`].
        response: Bytes,
    },
}

impl RecordState {
    /// Makes the state of a record in progress, with the rest of its lease.
    #[must_use]
    pub fn in_progress(lease_remaining: Duration) -> Self {
        Self::InProgress { lease_remaining }
    }

    /// Makes the state of a completed record, with its encoded response.
    #[must_use]
    pub fn completed(response: Bytes) -> Self {
        Self::Completed { response }
    }
}

/// Shows the length of a stored response, and none of its bytes.
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
    /// The new lease, counted from the moment at which the store carries out the renewal.
    pub lease: Duration,
}

impl Renewal {
    /// Makes a renewal of the lease of this attempt.
    #[must_use]
    pub fn new(attempt: Attempt, lease: Duration) -> Self {
        Self { attempt, lease }
    }
}

/// The outcome of a [`Renewal`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RenewOutcome {
    /// The lease was extended.
    Renewed,
    /// Nothing was written, but the attempt may still complete: the row was locked, or the record
    /// is held.
    Skipped,
    /// The attempt does not own the record any more.
    Lost,
}

/// The outcome of a completion.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum CompleteOutcome {
    /// The response is stored, by this call or by an earlier call of the same attempt whose reply
    /// was lost.
    Completed,
    /// The record belongs to another attempt, or an operator resolved it. Nothing was written.
    Lost(Box<Record>),
    /// There is no record. Nothing was written.
    Absent,
}

/// The outcome of a fenced write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fenced {
    /// The fence held, and the write was applied.
    Applied,
    /// The fence did not hold: for example, the record belongs to another attempt. Nothing was
    /// changed.
    Lost,
}

/// The decision of an operator about a record whose outcome was unknown.
#[derive(Clone)]
#[expect(clippy::exhaustive_enums, reason = "a store must handle every one")]
pub enum Resolution {
    /// Releases the key: the next request runs.
    Release,
    /// Stores this encoded response (see [`StoredResponse::encode`]): the next request gets it.
    Complete(Bytes),
}

impl Resolution {
    /// Makes the resolution that stores this response: the next request gets it.
    #[must_use]
    pub fn complete(response: &StoredResponse) -> Self {
        Self::Complete(response.encode())
    }
}

/// Shows the length of a response, and none of its bytes.
impl fmt::Debug for Resolution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Release => f.write_str("Release"),
            Self::Complete(response) => f.debug_tuple("Complete").field(&Length(response)).finish(),
        }
    }
}

/// The outcome of a [`Resolution`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResolveOutcome {
    /// The record was held, or its lease had run out. It is resolved.
    Resolved,
    /// An attempt with a live lease owns the record. Nothing was changed.
    InProgress,
    /// An intent of the record is open and may not be called again. Resolve the intent first, with
    /// [`resolve_intent`](crate::IdempotencyHandle::resolve_intent). Nothing was changed.
    UnresolvedIntents,
    /// The record is completed, and completed records do not change.
    AlreadyCompleted,
    /// There is no record for the key.
    Absent,
}

/// Selects the records to list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "a store must handle every one")]
pub enum RecordFilter {
    /// Every record.
    All,
    /// Records in progress, also those whose lease ran out and that the next request takes over.
    InProgress,
    /// Held records, also those that the next request would find held.
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
