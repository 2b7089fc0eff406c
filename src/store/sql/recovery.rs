//! Intents, finished phases and kept requests in SQL, for every engine.

mod statements;

use std::{fmt::Debug, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use uuid::Uuid;

pub(in crate::store) use self::statements::Statements;
use super::{
    call::{Call, Value},
    decoding, instant, number, span,
};
use crate::{
    consumer::Consumer,
    error::StoreError,
    key::IdempotencyKey,
    store::recovery::{ABSENT, RecoveryStore},
    stored::{
        intent::{
            CallId, Intent, IntentCounts, IntentFence, IntentFilter, IntentState, IntentUpdate, OpenOutcome,
            Opening, Resource, UpstreamKey,
        },
        record::{Attempt, AttemptId, Fenced, RecordId},
        request::{KeptRequest, RequestUpdate},
    },
};

/// What a database does for recovery.
#[async_trait]
pub(in crate::store) trait Engine: Debug + Send + Sync + 'static {
    type Row: Fields;

    async fn statements(&self) -> Result<&Statements, StoreError>;

    /// Runs one statement that only reads.
    async fn read(&self, operation: &str, call: Call<'_>) -> Result<Vec<Self::Row>, StoreError>;

    /// Runs statements in one transaction, each of which sees what was committed before it began.
    async fn write(&self, operation: &str, calls: Vec<Call<'_>>) -> Result<Vec<Vec<Self::Row>>, StoreError>;

    fn error(operation: &str, source: sqlx::Error) -> StoreError;
}

/// A row, whatever the database.
pub(in crate::store) trait Fields: Send {
    fn text(&self, name: &str) -> Result<Option<String>, sqlx::Error>;
    fn bytes(&self, name: &str) -> Result<Option<Vec<u8>>, sqlx::Error>;
    fn uuid(&self, name: &str) -> Result<Uuid, sqlx::Error>;
    fn int(&self, name: &str) -> Result<Option<i64>, sqlx::Error>;
    fn flag(&self, name: &str) -> Result<bool, sqlx::Error>;
}

macro_rules! fields_of {
    ($row:ty) => {
        impl $crate::store::sql::recovery::Fields for $row {
            fn text(&self, name: &str) -> Result<Option<String>, sqlx::Error> {
                self.try_get(name)
            }

            fn bytes(&self, name: &str) -> Result<Option<Vec<u8>>, sqlx::Error> {
                self.try_get(name)
            }

            fn uuid(&self, name: &str) -> Result<uuid::Uuid, sqlx::Error> {
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

/// Recovery by an engine.
#[derive(Debug)]
pub(in crate::store) struct SqlRecovery<E>(pub(in crate::store) E);

impl<E: Engine> SqlRecovery<E> {
    fn intents(operation: &str, rows: &[E::Row]) -> Result<Vec<Intent>, StoreError> {
        let intents = rows.iter().map(intent).collect::<Result<_, _>>();
        intents.map_err(|source| E::error(operation, source))
    }

    async fn show(&self, operation: &str, intent: UpstreamKey) -> Result<Option<Intent>, StoreError> {
        let call = Call::new(Arc::clone(&self.0.statements().await?.get)).with(Value::Uuid(intent.as_uuid()));
        let rows = self.0.read(operation, call).await?;
        Ok(Self::intents(operation, &rows)?.pop())
    }
}

#[async_trait]
impl<E: Engine> RecoveryStore for SqlRecovery<E> {
    async fn open_intent(&self, opening: &Opening) -> Result<OpenOutcome, StoreError> {
        let statements = self.0.statements().await?;
        let Opening { attempt, record_id, upstream_key, .. } = opening;
        let subject = opening.subject.as_deref().map(storable);
        let open = of_record(&statements.open, &attempt.consumer, &attempt.key, *record_id)
            .with(Value::Uuid(attempt.id.as_uuid()))
            .with(Value::Uuid(upstream_key.as_uuid()))
            .with(Value::Text(&opening.name))
            .with(Value::Text(&opening.discriminator))
            .with(Value::Int(opening.ordinal.into()))
            .with(Value::Bytes(&opening.arguments))
            .with(Value::text(subject.as_deref()))
            .with(Value::Uuid(opening.call.as_uuid()))
            .with(Value::Span(opening.repeatable_for))
            .with(Value::Span(opening.dangling_after))
            .with(Value::Flag(opening.repeatable_for.is_zero()));
        let opened = of_record(&statements.opened, &attempt.consumer, &attempt.key, *record_id)
            .with(Value::Uuid(attempt.id.as_uuid()))
            .with(Value::Uuid(upstream_key.as_uuid()));
        let calls = vec![
            of_key(&statements.lock, &attempt.consumer, &attempt.key),
            open,
            of_record(&statements.recount, &attempt.consumer, &attempt.key, *record_id),
            opened,
        ];
        let mut replies = self.0.write("open an intent", calls).await?;
        if replies.get(1).is_some_and(|rows| !rows.is_empty()) {
            return Ok(OpenOutcome::Opened);
        }
        let rows = replies.pop().unwrap_or_default();
        let Some(found) = Self::intents("open an intent", &rows)?.pop() else {
            return Ok(OpenOutcome::Lost);
        };
        Ok(match found.state {
            IntentState::Open { .. } if found.call == opening.call => OpenOutcome::Opened,
            IntentState::Open { .. } | IntentState::Finalized(_) | IntentState::Dead { .. } => {
                OpenOutcome::Recorded(Box::new(found))
            }
        })
    }

    async fn update_intent(
        &self,
        intent: UpstreamKey,
        fence: IntentFence,
        update: &IntentUpdate,
        attention: Option<&str>,
    ) -> Result<Fenced, StoreError> {
        const OPERATION: &str = "update an intent";
        let statements = self.0.statements().await?;
        let Some(found) = self.show(OPERATION, intent).await? else { return Ok(Fenced::Lost) };
        let (update, attention) = (storable_update(update), attention.map(storable));
        let call = Call::new(Arc::clone(&statements.update));
        let change = changed(call, intent, fence, &update, attention.as_deref());
        let calls = vec![
            of_key(&statements.lock, &found.consumer, &found.key),
            change,
            of_record(&statements.recount, &found.consumer, &found.key, found.record_id),
        ];
        let replies = self.0.write(OPERATION, calls).await?;
        let changed = replies.get(1).is_some_and(|rows| !rows.is_empty());
        Ok(if changed { Fenced::Applied } else { Fenced::Lost })
    }

    async fn take_dangling(&self, limit: u32, pause: Duration) -> Result<Vec<Intent>, StoreError> {
        const OPERATION: &str = "take dangling intents";
        let call = Call::new(Arc::clone(&self.0.statements().await?.take_dangling))
            .with(Value::Int(limit.into()))
            .with(Value::Span(pause));
        let rows = self.0.write(OPERATION, vec![call]).await?.pop().unwrap_or_default();
        Self::intents(OPERATION, &rows)
    }

    async fn get_intent(&self, intent: UpstreamKey) -> Result<Option<Intent>, StoreError> {
        self.show("get an intent", intent).await
    }

    async fn list_intents(&self, filter: IntentFilter, limit: u32) -> Result<Vec<Intent>, StoreError> {
        const OPERATION: &str = "list intents";
        let statements = self.0.statements().await?;
        let sql = match filter {
            IntentFilter::Open => &statements.list_open,
            IntentFilter::Dangling => &statements.list_dangling,
            IntentFilter::NeedsAttention => &statements.list_attention,
            IntentFilter::Dead => &statements.list_dead,
        };
        let rows = self.0.read(OPERATION, Call::new(Arc::clone(sql)).with(Value::Int(limit.into()))).await?;
        Self::intents(OPERATION, &rows)
    }

    async fn count_intents(&self) -> Result<IntentCounts, StoreError> {
        const OPERATION: &str = "count intents";
        let call = Call::new(Arc::clone(&self.0.statements().await?.count));
        let rows = self.0.read(OPERATION, call).await?;
        let counts = rows.first().map(counts).transpose();
        Ok(counts.map_err(|source| E::error(OPERATION, source))?.unwrap_or_default())
    }

    async fn find_phase(
        &self,
        attempt: &Attempt,
        record: RecordId,
        name: &str,
    ) -> Result<Option<Bytes>, StoreError> {
        const OPERATION: &str = "find a phase";
        let statements = self.0.statements().await?;
        let find = Call::new(Arc::clone(&statements.find_phase))
            .with(Value::Uuid(record.as_uuid()))
            .with(Value::Text(name));
        let calls = vec![of_key(&statements.lock, &attempt.consumer, &attempt.key), find];
        let rows = self.0.write(OPERATION, calls).await?.pop().unwrap_or_default();
        let result = rows.first().map(|row| row.bytes("result")).transpose();
        Ok(result.map_err(|source| E::error(OPERATION, source))?.flatten().map(Bytes::from))
    }

    async fn keep_request(
        &self,
        attempt: &Attempt,
        record: RecordId,
        request: &Bytes,
        after: Duration,
    ) -> Result<Fenced, StoreError> {
        let statements = self.0.statements().await?;
        let keep = of_record(&statements.keep_request, &attempt.consumer, &attempt.key, record)
            .with(Value::Uuid(attempt.id.as_uuid()))
            .with(Value::Bytes(request))
            .with(Value::Span(after));
        Ok(fenced(&self.0.write("keep a request", vec![keep]).await?))
    }

    async fn keep_record(
        &self,
        consumer: &Consumer,
        key: &IdempotencyKey,
        record: RecordId,
    ) -> Result<Fenced, StoreError> {
        let call = of_record(&self.0.statements().await?.keep_record, consumer, key, record);
        Ok(fenced(&self.0.write("keep a record", vec![call]).await?))
    }

    async fn take_abandoned(&self, limit: u32, pause: Duration) -> Result<Vec<KeptRequest>, StoreError> {
        const OPERATION: &str = "take abandoned requests";
        let call = Call::new(Arc::clone(&self.0.statements().await?.take_abandoned))
            .with(Value::Int(limit.into()))
            .with(Value::Span(pause));
        let rows = self.0.write(OPERATION, vec![call]).await?.pop().unwrap_or_default();
        let requests = rows.iter().map(kept_request).collect::<Result<_, _>>();
        requests.map_err(|source| E::error(OPERATION, source))
    }

    async fn update_request(
        &self,
        record: RecordId,
        tries: Option<u32>,
        update: &RequestUpdate,
    ) -> Result<Fenced, StoreError> {
        let statements = self.0.statements().await?;
        let (after, tried, attention) = match update {
            RequestUpdate::SendAgain { after, tried } => (Some(*after), *tried, None),
            RequestUpdate::NeedsAttention(what) => (None, true, Some(storable(what))),
            RequestUpdate::Done => {
                let call =
                    Call::new(Arc::clone(&statements.delete_request)).with(Value::Uuid(record.as_uuid()));
                return Ok(fenced(&self.0.write("delete a request", vec![call]).await?));
            }
        };
        let call = Call::new(Arc::clone(&statements.update_request))
            .with(Value::Uuid(record.as_uuid()))
            .with(Value::Flag(after.is_some()))
            .with(Value::Span(after.unwrap_or_default()))
            .with(Value::text(attention.as_deref()))
            .with(Value::Int(tries.map_or(-1, i64::from)))
            .with(Value::Flag(tried));
        Ok(fenced(&self.0.write("update a request", vec![call]).await?))
    }

    async fn list_requests(&self, limit: u32) -> Result<Vec<KeptRequest>, StoreError> {
        const OPERATION: &str = "list requests";
        let call =
            Call::new(Arc::clone(&self.0.statements().await?.list_requests)).with(Value::Int(limit.into()));
        let rows = self.0.read(OPERATION, call).await?;
        let requests = rows.iter().map(kept_request).collect::<Result<_, _>>();
        requests.map_err(|source| E::error(OPERATION, source))
    }

    async fn purge_settled(&self, retention: Duration, limit: u32) -> Result<u64, StoreError> {
        let statements = self.0.statements().await?;
        let limit = || Value::Int(limit.into());
        let requests = Call::new(Arc::clone(&statements.purge_requests)).with(limit());
        let mut purged = 0;
        for sql in [&statements.purge_intents, &statements.purge_phases] {
            let call = Call::new(Arc::clone(sql)).with(limit()).with(Value::Span(retention));
            purged += self.0.write("purge", vec![call]).await?.iter().map(Vec::len).sum::<usize>();
        }
        purged += self.0.write("purge", vec![requests]).await?.iter().map(Vec::len).sum::<usize>();
        Ok(u64::try_from(purged).unwrap_or(u64::MAX))
    }
}

fn of_key<'a>(sql: &Arc<str>, consumer: &'a Consumer, key: &'a IdempotencyKey) -> Call<'a> {
    Call::new(Arc::clone(sql)).with(Value::Text(consumer.as_str())).with(Value::Text(key.as_str()))
}

fn of_record<'a>(
    sql: &Arc<str>,
    consumer: &'a Consumer,
    key: &'a IdempotencyKey,
    record: RecordId,
) -> Call<'a> {
    of_key(sql, consumer, key).with(Value::Uuid(record.as_uuid()))
}

/// Whether a statement that returns a row for each that it has changed has changed any.
fn fenced<R>(rows: &[Vec<R>]) -> Fenced {
    if rows.first().is_some_and(|rows| !rows.is_empty()) { Fenced::Applied } else { Fenced::Lost }
}

/// Text may come from an upstream, and PostgreSQL stores no NUL.
fn storable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

fn storable_update(update: &IntentUpdate) -> IntentUpdate {
    match update {
        IntentUpdate::Finalize(resource) => {
            IntentUpdate::Finalize(Resource { id: storable(&resource.id), payload: resource.payload.clone() })
        }
        IntentUpdate::Refuse(reason) => IntentUpdate::Refuse(storable(reason)),
        IntentUpdate::NotSent
        | IntentUpdate::Absent(_)
        | IntentUpdate::LookAgain { .. }
        | IntentUpdate::Close => update.clone(),
    }
}

/// The values of the statement that updates an intent.
fn changed<'a>(
    call: Call<'a>,
    intent: UpstreamKey,
    fence: IntentFence,
    update: &'a IntentUpdate,
    attention: Option<&'a str>,
) -> Call<'a> {
    let (state, last_call, takes) = match fence {
        IntentFence::Call(call) => (Value::Text("open"), Value::Uuid(call.as_uuid()), -1),
        IntentFence::AbsentCall(call) => (Value::Text("dead"), Value::Uuid(call.as_uuid()), -1),
        IntentFence::Lookup { call, takes, open } => {
            let state = if open { "open" } else { "dead" };
            (Value::Text(state), Value::Uuid(call.as_uuid()), i64::from(takes))
        }
        IntentFence::Operator => (Value::Text("operator"), Value::Null, -1),
        IntentFence::Attention => (Value::Text("attention"), Value::Null, -1),
    };
    let (state_after, resource, reason) = match update {
        IntentUpdate::Finalize(resource) => (Some("finalized"), Some(resource), None),
        IntentUpdate::Refuse(reason) => (Some("dead"), None, Some(reason.as_str())),
        IntentUpdate::Absent(_) => (Some("dead"), None, Some(ABSENT)),
        IntentUpdate::NotSent | IntentUpdate::LookAgain { .. } | IntentUpdate::Close => (None, None, None),
    };
    let (look, after, absences) = match update {
        _ if attention.is_some() => ("attention", Duration::ZERO, -1),
        IntentUpdate::NotSent => ("keep", Duration::ZERO, -1),
        IntentUpdate::Absent(Some(after)) => ("after", *after, 0),
        IntentUpdate::LookAgain { after, absences } => ("after", *after, i64::from(*absences)),
        IntentUpdate::Finalize(_)
        | IntentUpdate::Refuse(_)
        | IntentUpdate::Absent(None)
        | IntentUpdate::Close => ("never", Duration::ZERO, -1),
    };
    call.with(Value::Uuid(intent.as_uuid()))
        .with(Value::text(state_after))
        .with(Value::Flag(matches!(update, IntentUpdate::NotSent)))
        .with(Value::Flag(matches!(update, IntentUpdate::Absent(_))))
        .with(Value::text(resource.map(|resource| resource.id.as_str())))
        .with(Value::bytes(resource.and_then(|resource| resource.payload.as_deref())))
        .with(Value::text(reason))
        .with(Value::Text(look))
        .with(Value::Span(after))
        .with(Value::Int(absences))
        .with(Value::text(attention))
        .with(state)
        .with(last_call)
        .with(Value::Int(takes))
}

fn intent(row: &impl Fields) -> Result<Intent, sqlx::Error> {
    let required = |value: Option<String>| value.ok_or(sqlx::Error::RowNotFound);
    let time = |name| row.int(name).map(|micros| micros.map(instant));
    let state = match required(row.text("state")?)?.as_str() {
        "open" => IntentState::Open { sent: row.flag("sent")? },
        "finalized" => {
            let mut resource = Resource::new(row.text("resource_id")?.unwrap_or_default());
            resource.payload = row.bytes("payload")?.map(Bytes::from);
            IntentState::Finalized(resource)
        }
        "dead" => {
            IntentState::Dead { reason: row.text("reason")?.unwrap_or_default(), absent: row.flag("absent")? }
        }
        unknown => return Err(decoding(format!("unknown state {unknown:?}"))),
    };
    let discriminator = required(row.text("discriminator")?)?;
    let ordinal = number(row.int("ordinal")?.unwrap_or_default())?;
    Ok(Intent {
        upstream_key: UpstreamKey::from_uuid(row.uuid("id")?),
        record_id: RecordId::from_uuid(row.uuid("record_id")?),
        consumer: Consumer::new(required(row.text("consumer")?)?).map_err(decoding)?,
        key: IdempotencyKey::new(required(row.text("key")?)?).map_err(decoding)?,
        name: required(row.text("name")?)?,
        discriminator: (ordinal == 0).then_some(discriminator),
        ordinal,
        arguments: row.bytes("arguments")?.unwrap_or_default().into(),
        subject: row.text("subject")?,
        state,
        attempt: AttemptId::from_uuid(row.uuid("attempt")?),
        call: CallId::from_uuid(row.uuid("call")?),
        calls: number(row.int("calls")?.unwrap_or_default())?,
        created_at: time("created_at")?.unwrap_or(std::time::UNIX_EPOCH),
        opened_at: time("opened_at")?.unwrap_or(std::time::UNIX_EPOCH),
        settled_at: time("settled_at")?,
        age: span(row.int("age")?.unwrap_or_default()),
        dangling: row.flag("dangling")?,
        looks: number(row.int("looks")?.unwrap_or_default())?,
        takes: number(row.int("takes")?.unwrap_or_default())?,
        absences: number(row.int("absences")?.unwrap_or_default())?,
        attention: row.text("attention")?,
    })
}

fn counts(row: &impl Fields) -> Result<IntentCounts, sqlx::Error> {
    let count = |name| number(row.int(name)?.unwrap_or_default());
    Ok(IntentCounts {
        open: count("open")?,
        dangling: count("dangling")?,
        need_attention: count("need_attention")?,
        oldest: row.int("oldest")?.map(span),
    })
}

fn kept_request(row: &impl Fields) -> Result<KeptRequest, sqlx::Error> {
    let required = |value: Option<String>| value.ok_or(sqlx::Error::RowNotFound);
    Ok(KeptRequest {
        record_id: RecordId::from_uuid(row.uuid("record_id")?),
        consumer: Consumer::new(required(row.text("consumer")?)?).map_err(decoding)?,
        key: IdempotencyKey::new(required(row.text("key")?)?).map_err(decoding)?,
        request: row.bytes("request")?.unwrap_or_default().into(),
        tries: number(row.int("tries")?.unwrap_or_default())?,
        attention: row.text("attention")?,
    })
}
