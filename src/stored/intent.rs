//! Intents: records of calls to upstream services.

mod overview;

use std::{
    error::Error,
    fmt,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use uuid::{Builder, Uuid};

pub use self::overview::{IntentCounts, IntentFilter, Overlooked};
use crate::{
    consumer::Consumer,
    key::IdempotencyKey,
    redact::Length,
    stored::record::{Attempt, AttemptId, RecordId, uuid_newtype},
};

/// Names an intent. Send it to the upstream service as the idempotency key of the call.
///
/// It is a UUID (version 8 of [RFC 9562]), derived from the id of the record and the identity of
/// the intent. So it is the same in every attempt of a request, and another one when the client's
/// key has expired and is used again.
///
/// [RFC 9562]: https://www.rfc-editor.org/rfc/rfc9562#name-uuid-version-8
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
        // If these fields changed, an open intent would get another key, and the upstream would not know it.
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

/// Names one call of an intent: random. It is the fence of every write about the outcome of that
/// call.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct CallId(Uuid);

uuid_newtype!(CallId);

impl CallId {
    pub(crate) fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

/// Tells the intents of one name apart.
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
    /// Its id at the upstream.
    pub id: String,
    /// Further data about it, for later attempts of the request.
    pub payload: Option<Bytes>,
}

impl Resource {
    /// Makes a resource with this id of the upstream.
    #[must_use]
    pub fn new(id: impl Into<String>) -> Self {
        Self { id: id.into(), payload: None }
    }

    /// Adds data that later attempts of the request get together with the id.
    ///
    /// It is stored as it is: keep it small and free of secrets.
    ///
    /// ```
    /// # use tower_idempotency::Resource;
    /// let charge = Resource::new("ch_123").with_payload(r#"{"fee":"0.30"}"#);
    /// ```
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

/// Shows the length of a payload, and none of its bytes.
impl fmt::Debug for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let payload = self.payload.as_ref().map(Length);
        f.debug_struct("Resource").field("id", &self.id).field("payload", &payload).finish()
    }
}

/// The way in which a call to an upstream service failed.
///
/// It decides whether the call may be made again. If you are not sure, answer
/// [`Unknown`](Self::Unknown): a wrong [`NotSent`](Self::NotSent) can make a second payment.
///
/// | what happened | variant |
/// |---|---|
/// | no connection: DNS, TCP or TLS failed; 425, 429 | [`NotSent`](Self::NotSent) |
/// | 4xx except 408, 409, 425 and 429 | [`Refused`](Self::Refused) |
/// | anything else: time-out, reset, 5xx, 408, 409 | [`Unknown`](Self::Unknown) |
#[derive(Debug, thiserror::Error)]
#[expect(clippy::exhaustive_enums, reason = "nothing else can happen to a call")]
pub enum CallFailure {
    /// The upstream refused for good, with this reason. It will never accept the same call.
    #[error("the call was refused: {0}")]
    Refused(String),
    /// The upstream has certainly not processed the call: it was not sent, or it was turned away.
    #[error("the call was not sent")]
    NotSent(#[source] Box<dyn Error + Send + Sync>),
    /// The upstream may have processed the call.
    #[error("the outcome of the call is unknown")]
    Unknown(#[source] Box<dyn Error + Send + Sync>),
}

impl CallFailure {
    /// Makes a failure that is final, with the reason to record.
    pub fn refused(reason: impl Into<String>) -> Self {
        Self::Refused(reason.into())
    }

    /// Makes a failure before the upstream processed anything.
    pub fn not_sent(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::NotSent(cause.into())
    }

    /// Makes a failure after which the upstream may have processed the call.
    pub fn unknown(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Unknown(cause.into())
    }

    /// Makes the failure from the status of an answer that is not a success, as the table above
    /// says.
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
    /// Name of the intent, and the key of its call.
    pub upstream_key: UpstreamKey,
    /// The record whose request makes the call.
    pub record_id: RecordId,
    /// The consumer of that record.
    pub consumer: Consumer,
    /// The key of that record.
    pub key: IdempotencyKey,
    /// Name of the call, as given to [`intent`](crate::Idempotency::intent).
    pub name: String,
    /// Tells the intent from others of the same name; `None` if their order does.
    pub discriminator: Option<String>,
    /// Its place among the intents of the same name, from 1; 0 with a discriminator.
    pub ordinal: u32,
    /// Digest of the arguments of the call.
    pub arguments: Bytes,
    /// The application's own row that the intent belongs to.
    pub subject: Option<String>,
    /// State of the intent.
    pub state: IntentState,
    /// The attempt that called last.
    pub attempt: AttemptId,
    /// The last call.
    pub call: CallId,
    /// The number of calls.
    pub calls: u32,
    /// The time at which it was first opened, by the clock of the store.
    pub created_at: SystemTime,
    /// The time at which it was last opened.
    pub opened_at: SystemTime,
    /// The time at which its outcome was recorded.
    pub settled_at: Option<SystemTime>,
    /// The time since it was first opened.
    pub age: Duration,
    /// `true` if it is open past its grace period.
    pub dangling: bool,
    /// The number of look-ups since it was last opened, or since an operator asked for new
    /// look-ups.
    pub looks: u32,
    /// The number of times it was taken for a look-up since it was last opened. Operators do not
    /// reset it: it is the fence of look-ups.
    pub takes: u32,
    /// The number of look-ups in a row in which the upstream did not know it.
    pub absences: u32,
    /// A message for the operator, if the intent needs attention.
    pub attention: Option<String>,
}

/// State of an intent.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "a store must handle every one")]
pub enum IntentState {
    /// The call was about to be made, and its outcome is not known.
    Open {
        /// `true` if a call may have arrived.
        sent: bool,
    },
    /// The upstream has made the resource.
    Finalized(Resource),
    /// There is no resource.
    Dead {
        /// The reason.
        reason: String,
        /// `true` if a look-up or an operator found no resource: then the call may be made again
        /// with the same key. `false` if the upstream refused.
        absent: bool,
    },
}

/// The opening of an intent, before its call is made.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Opening {
    /// The attempt that calls. It must own the record.
    pub attempt: Attempt,
    /// Its record.
    pub record_id: RecordId,
    /// Name of the intent.
    pub upstream_key: UpstreamKey,
    /// Name of the call.
    pub name: String,
    /// Tells the intent from others of the same name; empty if their order does.
    pub discriminator: String,
    /// Its place among the intents of the same name; 0 with a discriminator.
    pub ordinal: u32,
    /// Digest of the arguments of the call.
    pub arguments: Bytes,
    /// The application's own row that the intent belongs to.
    pub subject: Option<String>,
    /// Id of this call.
    pub call: CallId,
    /// The time for which the call may be made again with the same key; zero if the upstream does
    /// not deduplicate.
    pub repeatable_for: Duration,
    /// The time after which the intent dangles unless it is settled.
    pub dangling_after: Duration,
}

impl Opening {
    /// Makes the opening of the first intent of this name: no arguments, no subject, not
    /// repeatable, dangling immediately.
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

/// The outcome of an [`Opening`].
#[derive(Clone, Debug)]
#[expect(clippy::exhaustive_enums, reason = "the layer must handle every one")]
pub enum OpenOutcome {
    /// The intent is committed: make the call.
    Opened,
    /// The call must not be made. This is the intent as it is recorded.
    Recorded(Box<Intent>),
    /// The attempt does not own the record with a live lease: make no call.
    Lost,
}

/// A change of an intent.
#[derive(Clone, Debug)]
#[expect(clippy::exhaustive_enums, reason = "a store must handle every one")]
pub enum IntentUpdate {
    /// Finalizes the intent with this resource.
    Finalize(Resource),
    /// Makes the intent dead for good, with this reason.
    Refuse(String),
    /// Records that the last call has certainly not arrived. The intent stays open.
    NotSent,
    /// Makes the intent dead because the upstream does not know it. The call may be made again. The
    /// intent is looked up once more after this time, if there is one.
    Absent(Option<Duration>),
    /// Leaves the intent as it is, to be looked up again.
    LookAgain {
        /// The time until the next look-up.
        after: Duration,
        /// The number of look-ups in a row in which the upstream did not know it.
        absences: u32,
    },
    /// Leaves an intent that is not open as it is, and ends its look-ups.
    Close,
}

/// The condition of a change of an intent. The change applies only while the condition holds.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::exhaustive_enums, reason = "a store must handle every one")]
pub enum IntentFence {
    /// The intent is open and this is its last call.
    Call(CallId),
    /// The intent is dead as [absent](IntentUpdate::Absent) and this is its last call: its resource
    /// was found after all.
    AbsentCall(CallId),
    /// The call, the number of takes and the state have not changed since the intent was taken for
    /// a look-up.
    Lookup {
        /// Its last call.
        call: CallId,
        /// The number of times it was [taken](Intent::takes).
        takes: u32,
        /// `true` if it was open, `false` if it was dead.
        open: bool,
    },
    /// The attempt that called last does not own the record with a live lease, and the intent is
    /// not finalized.
    ///
    /// For [`LookAgain`](IntentUpdate::LookAgain), which begins the look-ups again, the intent must
    /// also be open, or dead as [absent](IntentUpdate::Absent).
    Operator,
    /// The intent is finalized or dead, and needs attention.
    Attention,
}

impl Intent {
    /// Makes the intent of an opening at this time: open, called once, never looked up. A store
    /// then sets the other fields from its row.
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
