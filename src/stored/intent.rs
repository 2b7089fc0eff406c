//! Intents: records of calls to upstream services.

use std::{
    error::Error,
    fmt,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use uuid::{Builder, Uuid};

use crate::{
    consumer::Consumer,
    key::IdempotencyKey,
    redact::Length,
    stored::record::{Attempt, AttemptId, RecordId, uuid_newtype},
};

/// Names an intent, and is the idempotency key that its call is sent with to the upstream service.
///
/// A UUID (version 8 of [RFC 9562]), derived from the id of the record and the identity of the intent: the same on every
/// attempt of a request, and another one when the client's key has expired and is used anew.
///
/// [RFC 9562]: https://www.rfc-editor.org/rfc/rfc9562
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct UpstreamKey(Uuid);

uuid_newtype!(UpstreamKey);

impl UpstreamKey {
    fn derive(record: RecordId, name: &str, place: &Place) -> Self {
        let mut digest = Sha256::new();
        let mut field = |bytes: &[u8]| {
            digest.update(u64::try_from(bytes.len()).unwrap_or(u64::MAX).to_be_bytes());
            digest.update(bytes);
        };
        field(b"tower-idempotency intent 1");
        field(record.as_uuid().as_bytes());
        field(name.as_bytes());
        field(place.discriminator().as_bytes());
        field(&place.ordinal().to_be_bytes());
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&digest.finalize()[..16]);
        Self(Builder::from_custom_bytes(bytes).into_uuid())
    }
}

/// Name of one call of an intent: random, the fence of what is recorded of its outcome.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct CallId(Uuid);

uuid_newtype!(CallId);

impl CallId {
    pub(crate) fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

/// What tells the intents of one name apart.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Place {
    Discriminator(String),
    /// The order of calls, from 1.
    Ordinal(u32),
}

impl Place {
    pub(crate) fn discriminator(&self) -> &str {
        match self {
            Self::Discriminator(discriminator) => discriminator,
            Self::Ordinal(_) => "",
        }
    }

    pub(crate) fn ordinal(&self) -> u32 {
        match self {
            Self::Discriminator(_) => 0,
            Self::Ordinal(ordinal) => *ordinal,
        }
    }
}

/// A resource that an upstream service has made.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Resource {
    /// What the upstream calls it.
    pub id: String,
    /// What else is to be recorded of it, for later attempts of the request.
    pub payload: Option<Bytes>,
}

impl Resource {
    /// A resource with this id of the upstream.
    #[must_use]
    pub fn new(id: impl Into<String>) -> Self {
        Self { id: id.into(), payload: None }
    }

    /// Records more of it. It is stored as it is: keep it small, and free of secrets.
    #[must_use]
    pub fn with_payload(mut self, payload: impl Into<Bytes>) -> Self {
        self.payload = Some(payload.into());
        self
    }
}

impl From<String> for Resource {
    fn from(id: String) -> Self {
        Self::new(id)
    }
}

impl From<&str> for Resource {
    fn from(id: &str) -> Self {
        Self::new(id)
    }
}

/// Shows how long a payload is, and nothing of it.
impl fmt::Debug for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let payload = self.payload.as_ref().map(Length);
        f.debug_struct("Resource").field("id", &self.id).field("payload", &payload).finish()
    }
}

/// How a call to an upstream service failed.
///
/// | what happened | variant |
/// |---|---|
/// | no connection: DNS, TCP or TLS failed; 425, 429 | [`NotSent`](Self::NotSent) |
/// | 4xx, but 408, 409, 425 and 429 | [`Refused`](Self::Refused) |
/// | anything else: time-out, reset, 5xx, 408, 409 | [`Unknown`](Self::Unknown) |
#[derive(Debug, thiserror::Error)]
#[expect(clippy::exhaustive_enums, reason = "nothing else can happen to a call")]
pub enum CallFailure {
    /// Refused for good, with the reason to be recorded: the same call will never be accepted.
    #[error("refused: {0}")]
    Refused(String),
    /// Certainly not processed: it did not leave, or was turned away at the door.
    #[error("not sent")]
    NotSent(#[source] Box<dyn Error + Send + Sync>),
    /// Nobody knows whether it was processed.
    #[error("the outcome is unknown")]
    Unknown(#[source] Box<dyn Error + Send + Sync>),
}

impl CallFailure {
    /// Refused for good.
    pub fn refused(reason: impl Into<String>) -> Self {
        Self::Refused(reason.into())
    }

    /// Certainly not processed.
    pub fn not_sent(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::NotSent(cause.into())
    }

    /// Nobody knows whether it was processed.
    pub fn unknown(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Unknown(cause.into())
    }

    /// By the status of an answer that is no success: 425 and 429 were turned away, other 4xx but 408 and 409 are refusals
    /// with this reason, of everything else nobody knows.
    pub fn from_status(status: http::StatusCode, reason: impl Into<String>) -> Self {
        let reason = reason.into();
        match status.as_u16() {
            425 | 429 => Self::NotSent(format!("{status}: {reason}").into()),
            408 | 409 => Self::Unknown(format!("{status}: {reason}").into()),
            400..=499 => Self::Refused(reason),
            _ => Self::Unknown(format!("{status}: {reason}").into()),
        }
    }
}

/// An intent as a store shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Intent {
    /// Its name, and the key of the call.
    pub upstream_key: UpstreamKey,
    /// The record whose request makes the call.
    pub record_id: RecordId,
    /// The consumer of that record.
    pub consumer: Consumer,
    /// The key of that record.
    pub key: IdempotencyKey,
    /// What is called, as given to [`intent`](crate::Idempotency::intent).
    pub name: String,
    /// What tells it from others of its name; `None` where their order does.
    pub discriminator: Option<String>,
    /// Its place among those of its name, from 1; 0 with a discriminator.
    pub ordinal: u32,
    /// Digest of what the call is made with.
    pub arguments: Bytes,
    /// The application's own row that it belongs to.
    pub subject: Option<String>,
    /// Where it stands.
    pub state: IntentState,
    /// The attempt that called last.
    pub attempt: AttemptId,
    /// The last call.
    pub call: CallId,
    /// How often it was called.
    pub calls: u32,
    /// When it was opened first, by the clock of the store.
    pub created_at: SystemTime,
    /// When it was opened last.
    pub opened_at: SystemTime,
    /// When its outcome was recorded.
    pub settled_at: Option<SystemTime>,
    /// How long ago it was opened first.
    pub age: Duration,
    /// Whether it is open past its grace period.
    pub dangling: bool,
    /// How often it was looked up since it was opened last, or since an operator wanted it to be looked up again.
    pub looks: u32,
    /// How often it was taken for a look-up since it was opened last, whatever operators wanted: the fence of look-ups.
    pub takes: u32,
    /// How often in a row the upstream did not know it.
    pub absences: u32,
    /// What an operator must know.
    pub attention: Option<String>,
}

/// Where an intent stands.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "a store must handle every one")]
pub enum IntentState {
    /// The call was to be made, and its outcome is not known.
    Open {
        /// Whether a call may have arrived.
        sent: bool,
    },
    /// The upstream has made the resource.
    Finalized(Resource),
    /// There is no resource.
    Dead {
        /// Why.
        reason: String,
        /// Whether that was found out afterwards, so that it may be called again with the same key. Otherwise the upstream
        /// has refused.
        absent: bool,
    },
}

/// Which intents an operator wants to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "a store must handle every one")]
pub enum IntentFilter {
    /// Open ones, the oldest first.
    Open,
    /// Open ones past their grace period, the oldest first.
    Dangling,
    /// Those that wait for an operator, the oldest first.
    NeedsAttention,
    /// Dead ones, the newest first.
    Dead,
}

/// How many intents somebody has to look at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct IntentCounts {
    /// Open ones, those included whose call is being made.
    pub open: u64,
    /// Open ones past their grace period.
    pub dangling: u64,
    /// Those that wait for an operator.
    pub need_attention: u64,
    /// How long ago the oldest open one was opened first.
    pub oldest: Option<Duration>,
}

/// An intent that is to be opened before its call is made.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Opening {
    /// The attempt that calls. It must own the record.
    pub attempt: Attempt,
    /// Its record.
    pub record_id: RecordId,
    /// Name of the intent.
    pub upstream_key: UpstreamKey,
    /// What is called.
    pub name: String,
    /// What tells it from others of its name, or empty.
    pub discriminator: String,
    /// Its place among those of its name, or 0.
    pub ordinal: u32,
    /// Digest of what the call is made with.
    pub arguments: Bytes,
    /// The application's own row that it belongs to.
    pub subject: Option<String>,
    /// This call.
    pub call: CallId,
    /// For how long the call may be made again with the same key: zero if the upstream does not deduplicate.
    pub repeatable_for: Duration,
    /// After what time it dangles unless it is settled.
    pub dangling_after: Duration,
}

impl Opening {
    /// An opening by the order of calls, the first of its name: without arguments and subject, not repeatable, and dangling
    /// at once.
    #[must_use]
    pub fn first(attempt: Attempt, record_id: RecordId, name: impl Into<String>) -> Self {
        Self::new(attempt, record_id, name.into(), &Place::Ordinal(1))
    }

    pub(crate) fn new(attempt: Attempt, record_id: RecordId, name: String, place: &Place) -> Self {
        Self {
            upstream_key: UpstreamKey::derive(record_id, &name, place),
            attempt,
            record_id,
            name,
            discriminator: place.discriminator().to_owned(),
            ordinal: place.ordinal(),
            arguments: Bytes::new(),
            subject: None,
            call: CallId::random(),
            repeatable_for: Duration::ZERO,
            dangling_after: Duration::ZERO,
        }
    }
}

/// What became of an [`Opening`].
#[derive(Clone, Debug)]
#[expect(clippy::exhaustive_enums, reason = "the layer must handle every one")]
pub enum OpenOutcome {
    /// The intent is committed: make the call.
    Opened,
    /// The call must not be made; this is what is known of it.
    Recorded(Box<Intent>),
    /// The attempt does not own the record with a live lease: make no call.
    Lost,
}

/// What is recorded of an intent.
#[derive(Clone, Debug)]
#[expect(clippy::exhaustive_enums, reason = "a store must handle every one")]
pub enum IntentUpdate {
    /// It is finalized.
    Finalize(Resource),
    /// It is dead for good, with the reason.
    Refuse(String),
    /// The last call has certainly not arrived; it stays open.
    NotSent,
    /// It is dead because the upstream does not know it, and may be called again; look once more after this time.
    Absent(Option<Duration>),
    /// It stays as it is and is looked up again.
    LookAgain {
        /// After this time.
        after: Duration,
        /// How often in a row the upstream did not know it.
        absences: u32,
    },
    /// It stays as it is, which is not open, and is not looked up any more.
    Close,
}

/// Whose update of an intent it is: it applies only while this holds.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::exhaustive_enums, reason = "a store must handle every one")]
pub enum IntentFence {
    /// The intent is open and this is its last call.
    Call(CallId),
    /// The intent is dead as [absent](IntentUpdate::Absent) and this is its last call: it turned up after all.
    AbsentCall(CallId),
    /// Nothing has changed since it was taken for a look-up: the call, how often it was taken, and the state.
    Lookup {
        /// Its last call.
        call: CallId,
        /// How often it was [taken](Intent::takes).
        takes: u32,
        /// Whether it was open, and not dead.
        open: bool,
    },
    /// The attempt that called last does not own the record with a live lease, and the intent is not finalized. What is to
    /// be [looked up again](IntentUpdate::LookAgain), as if for the first time, is open or dead as
    /// [absent](IntentUpdate::Absent).
    Operator,
    /// The intent is finalized or dead, and needs attention.
    Attention,
}

impl Intent {
    /// What an opening makes at this time: open and called once, never looked up. A store sets the other fields from what it
    /// keeps.
    #[must_use]
    pub fn opened(opening: &Opening, at: SystemTime) -> Self {
        Self {
            upstream_key: opening.upstream_key,
            record_id: opening.record_id,
            consumer: opening.attempt.consumer.clone(),
            key: opening.attempt.key.clone(),
            name: opening.name.clone(),
            discriminator: (opening.ordinal == 0).then(|| opening.discriminator.clone()),
            ordinal: opening.ordinal,
            arguments: opening.arguments.clone(),
            subject: opening.subject.clone(),
            state: IntentState::Open { sent: true },
            attempt: opening.attempt.id,
            call: opening.call,
            calls: 1,
            created_at: at,
            opened_at: at,
            settled_at: None,
            age: Duration::ZERO,
            dangling: false,
            looks: 0,
            takes: 0,
            absences: 0,
            attention: None,
        }
    }

    /// The fence of a look-up of this intent.
    #[must_use]
    pub fn lookup_fence(&self) -> IntentFence {
        let open = matches!(self.state, IntentState::Open { .. });
        IntentFence::Lookup { call: self.call, takes: self.takes, open }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_upstream_key_is_that_of_record_name_and_place() {
        let record = RecordId::random();
        let key = |record, name, place: Place| UpstreamKey::derive(record, name, &place);
        let first = key(record, "transfer", Place::Ordinal(1));
        assert_eq!(first, key(record, "transfer", Place::Ordinal(1)));
        assert_eq!(first.as_uuid().get_version_num(), 8);
        let others = [
            key(RecordId::random(), "transfer", Place::Ordinal(1)),
            key(record, "refund", Place::Ordinal(1)),
            key(record, "transfer", Place::Ordinal(2)),
            key(record, "transfer", Place::Discriminator("1".to_owned())),
            key(record, "transfer", Place::Discriminator(String::new())),
        ];
        assert!(!others.contains(&first));
    }

    #[test]
    fn failures_are_told_apart_by_status() {
        let refused = |status| matches!(CallFailure::from_status(status, ""), CallFailure::Refused(_));
        let unsent = |status| matches!(CallFailure::from_status(status, ""), CallFailure::NotSent(_));
        let statuses = (300..600).map(|status| http::StatusCode::from_u16(status).unwrap());
        for status in statuses {
            let code = status.as_u16();
            assert_eq!(unsent(status), code == 425 || code == 429, "{status}");
            let turned_down = (400..500).contains(&code) && ![408, 409, 425, 429].contains(&code);
            assert_eq!(refused(status), turned_down, "{status}");
        }
    }
}
