//! Rows of a database as values for the store's callers.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use uuid::Uuid;

use crate::{
    consumer::Consumer,
    error::BoxError,
    fingerprint::Fingerprint,
    key::IdempotencyKey,
    stored::{
        intent::{CallId, Intent, IntentCounts, IntentState, Overlooked, Resource, UpstreamKey},
        record::{AttemptId, Record, RecordId, RecordState},
        request::KeptRequest,
    },
};

/// A row of any database.
pub(in crate::store) trait Fields: Send + Sync {
    fn text(&self, name: &str) -> Result<Option<String>, sqlx::Error>;
    fn bytes(&self, name: &str) -> Result<Option<Vec<u8>>, sqlx::Error>;
    fn uuid(&self, name: &str) -> Result<Option<Uuid>, sqlx::Error>;
    fn int(&self, name: &str) -> Result<Option<i64>, sqlx::Error>;
    fn flag(&self, name: &str) -> Result<bool, sqlx::Error>;
}

macro_rules! fields_of {
    ($row:ty) => {
        impl $crate::store::sql::rows::Fields for $row {
            fn text(&self, name: &str) -> Result<Option<String>, sqlx::Error> {
                self.try_get(name)
            }

            fn bytes(&self, name: &str) -> Result<Option<Vec<u8>>, sqlx::Error> {
                self.try_get(name)
            }

            fn uuid(&self, name: &str) -> Result<Option<uuid::Uuid>, sqlx::Error> {
                self.try_get(name)
            }

            fn int(&self, name: &str) -> Result<Option<i64>, sqlx::Error> {
                self.try_get(name)
            }

            fn flag(&self, name: &str) -> Result<bool, sqlx::Error> {
                self.try_get(name)
            }
        }
    };
}
pub(in crate::store) use fields_of;

/// Reads a row of `{record}`.
pub(in crate::store) fn record(row: &impl Fields) -> Result<Record, sqlx::Error> {
    let state = match required(row.text("state")?)?.as_str() {
        "in_progress" => RecordState::in_progress(span(required(row.int("lease_left")?)?)),
        "held" => RecordState::Held,
        "completed" => RecordState::completed(row.bytes("response")?.map(Bytes::from).unwrap_or_default()),
        unknown => return Err(unknown_state(unknown)),
    };
    let fingerprint = Fingerprint::from_bytes(required(row.bytes("fingerprint")?)?);
    let id = RecordId::from_uuid(required(row.uuid("id")?)?);
    let mut record = Record::new(id, consumer(row)?, key(row)?, fingerprint, state);
    record.attempt = row.uuid("attempt")?.map(AttemptId::from_uuid);
    record.attempt_number = number(row, "attempt_number")?;
    record.abandoned = number(row, "abandoned")?;
    record.unresolved = number(row, "unresolved")?;
    record.created_at = instant(required(row.int("created_at")?)?);
    record.expires_at = instant(required(row.int("expires_at")?)?);
    Ok(record)
}

/// Reads a row of `{intent}`.
pub(super) fn intent(row: &impl Fields) -> Result<Intent, sqlx::Error> {
    let ordinal = number(row, "ordinal")?;
    let discriminator = required(row.text("discriminator")?)?;
    Ok(Intent {
        upstream_key: UpstreamKey::from_uuid(required(row.uuid("id")?)?),
        record_id: RecordId::from_uuid(required(row.uuid("record_id")?)?),
        consumer: consumer(row)?,
        key: key(row)?,
        name: required(row.text("name")?)?,
        // An intent has a discriminator, or an ordinal from 1.
        discriminator: (ordinal == 0).then_some(discriminator),
        ordinal,
        arguments: required(row.bytes("arguments")?)?.into(),
        subject: row.text("subject")?,
        state: intent_state(row)?,
        attempt: AttemptId::from_uuid(required(row.uuid("attempt")?)?),
        call: CallId::from_uuid(required(row.uuid("call")?)?),
        calls: number(row, "calls")?,
        created_at: instant(required(row.int("created_at")?)?),
        opened_at: instant(required(row.int("opened_at")?)?),
        settled_at: row.int("settled_at")?.map(instant),
        age: span(required(row.int("age")?)?),
        dangling: row.flag("dangling")?,
        looks: number(row, "looks")?,
        takes: number(row, "takes")?,
        absences: number(row, "absences")?,
        attention: row.text("attention")?,
    })
}

fn intent_state(row: &impl Fields) -> Result<IntentState, sqlx::Error> {
    Ok(match required(row.text("state")?)?.as_str() {
        "open" => IntentState::Open { sent: row.flag("sent")? },
        "finalized" => {
            let mut resource = Resource::new(row.text("resource_id")?.unwrap_or_default());
            resource.payload = row.bytes("payload")?.map(Bytes::from);
            IntentState::Finalized(resource)
        }
        "dead" => {
            IntentState::Dead { reason: row.text("reason")?.unwrap_or_default(), absent: row.flag("absent")? }
        }
        unknown => return Err(unknown_state(unknown)),
    })
}

pub(super) fn intent_counts(row: &impl Fields) -> Result<IntentCounts, sqlx::Error> {
    Ok(IntentCounts {
        open: number(row, "open")?,
        dangling: number(row, "dangling")?,
        need_attention: number(row, "need_attention")?,
        oldest: row.int("oldest")?.map(span),
    })
}

pub(super) fn overlooked(row: &impl Fields) -> Result<Overlooked, sqlx::Error> {
    Ok(Overlooked::new(required(row.text("name")?)?, number(row, "intents")?))
}

/// Reads a row of `{request}`.
pub(super) fn kept_request(row: &impl Fields) -> Result<KeptRequest, sqlx::Error> {
    Ok(KeptRequest {
        record_id: RecordId::from_uuid(required(row.uuid("record_id")?)?),
        consumer: consumer(row)?,
        key: key(row)?,
        request: required(row.bytes("request")?)?.into(),
        tries: number(row, "tries")?,
        attention: row.text("attention")?,
    })
}

fn consumer(row: &impl Fields) -> Result<Consumer, sqlx::Error> {
    Consumer::from_stored(required(row.text("consumer")?)?).map_err(decoding)
}

fn key(row: &impl Fields) -> Result<IdempotencyKey, sqlx::Error> {
    IdempotencyKey::new(required(row.text("key")?)?).map_err(decoding)
}

pub(super) fn required<T>(value: Option<T>) -> Result<T, sqlx::Error> {
    value.ok_or_else(|| decoding("an unexpected NULL"))
}

fn number<N: TryFrom<i64>>(row: &impl Fields, name: &str) -> Result<N, sqlx::Error>
where
    N::Error: Into<BoxError>,
{
    required(row.int(name)?)?.try_into().map_err(decoding)
}

fn unknown_state(state: &str) -> sqlx::Error {
    decoding(format!("unknown state {state:?}"))
}

fn decoding(cause: impl Into<BoxError>) -> sqlx::Error {
    sqlx::Error::Decode(cause.into())
}

fn span(micros: i64) -> Duration {
    // The rest of a lease that has run out is negative.
    Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}

fn instant(micros: i64) -> SystemTime {
    UNIX_EPOCH.checked_add(span(micros)).unwrap_or(UNIX_EPOCH)
}
