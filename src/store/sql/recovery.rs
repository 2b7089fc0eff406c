//! The contract of [`RecoveryStore`], for every SQL database.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use uuid::Uuid;

use super::{
    Due, Engine, all, applied,
    call::{Call, Statement},
    rows::{self, Fields},
};
use crate::{
    consumer::Consumer,
    error::StoreError,
    key::IdempotencyKey,
    store::recovery::{ABSENT, RecoveryStore},
    stored::{
        intent::{
            Intent, IntentCounts, IntentFence, IntentFilter, IntentState, IntentUpdate, OpenOutcome, Opening,
            Overlooked, UpstreamKey,
        },
        record::{Attempt, Fenced, RecordId},
        request::{KeptRequest, RequestUpdate},
    },
};

#[async_trait]
impl<E: Engine> RecoveryStore for E {
    async fn open_intent(&self, opening: &Opening) -> Result<OpenOutcome, StoreError> {
        const OPERATION: &str = "open an intent";
        let statements = &self.statements().await?.recovery;
        let Attempt { consumer, key, .. } = &opening.attempt;
        let subject = opening.subject.as_deref().map(storable);
        let of_opening = |statement| opening_call(statement, opening, subject.as_deref());
        // The lock comes first: of several simultaneous openings, one finds no intent and the
        // others find it.
        let calls = vec![
            Call::new(&statements.lock).of_key(consumer, key),
            of_opening(&statements.call_again),
            of_opening(&statements.call_first),
            Call::new(&statements.recount).of_record(consumer, key, opening.record_id),
            of_opening(&statements.opened),
        ];
        let mut replies = self.transact(OPERATION, calls).await?;
        // The second and third statements call the intent. The last one shows it if neither did.
        if replies.iter().skip(1).take(2).any(|reply| reply.changed > 0) {
            return Ok(OpenOutcome::Opened);
        }
        let rows = replies.pop().map(|reply| reply.rows).unwrap_or_default();
        let Some(found) = all::<Self, _>(OPERATION, &rows, rows::intent)?.pop() else {
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
        let Some(found) = show(self, OPERATION, intent).await? else { return Ok(Fenced::Lost) };
        let statements = self.statements().await?;
        let text = update_text(fence, update, attention.is_some());
        let statement = statements.dialect.statement(&text);
        let values = Values::of(fence, update, attention);
        // The lock comes first: otherwise the count at the end could miss an intent that another
        // transaction is changing.
        let calls = vec![
            Call::new(&statements.recovery.lock).of_key(&found.consumer, &found.key),
            values.call(&statement, intent),
            Call::new(&statements.recovery.recount).of_record(&found.consumer, &found.key, found.record_id),
        ];
        // The intent was read before the lock. That is safe: its key never changes, and the fence
        // is checked under the lock.
        let replies = self.transact(OPERATION, calls).await?;
        Ok(applied(replies.get(1).map_or(0, |reply| reply.changed)))
    }

    async fn take_dangling(
        &self,
        names: &[String],
        limit: u32,
        pause: Duration,
    ) -> Result<Vec<Intent>, StoreError> {
        const OPERATION: &str = "take dangling intents";
        let names = as_json(names);
        let rows = self.take(OPERATION, Due::DanglingIntents { names: &names }, limit, pause).await?;
        all::<Self, _>(OPERATION, &rows, rows::intent)
    }

    async fn count_overlooked(
        &self,
        names: &[String],
        overdue: Duration,
        limit: u32,
    ) -> Result<Vec<Overlooked>, StoreError> {
        const OPERATION: &str = "count overlooked intents";
        let names = as_json(names);
        let call = Call::new(&self.statements().await?.recovery.count_overlooked)
            .with("names", &*names)
            .with("overdue", overdue)
            .with("limit", limit);
        all::<Self, _>(OPERATION, &self.read(OPERATION, call).await?, rows::overlooked)
    }

    async fn get_intent(&self, intent: UpstreamKey) -> Result<Option<Intent>, StoreError> {
        show(self, "get an intent", intent).await
    }

    async fn list_intents(&self, filter: IntentFilter, limit: u32) -> Result<Vec<Intent>, StoreError> {
        const OPERATION: &str = "list intents";
        let statements = &self.statements().await?.recovery;
        let limited = |statement| Call::new(statement).with("limit", limit);
        let call = match filter {
            IntentFilter::Open => limited(&statements.list_open),
            IntentFilter::Dangling => limited(&statements.list_dangling),
            IntentFilter::NeedsAttention => limited(&statements.list_attention),
            IntentFilter::Dead => limited(&statements.list_dead),
            IntentFilter::OfRecord(record) => {
                limited(&statements.list_of_record).with("record", record.as_uuid())
            }
        };
        let rows = self.read(OPERATION, call).await?;
        all::<Self, _>(OPERATION, &rows, rows::intent)
    }

    async fn count_intents(&self) -> Result<IntentCounts, StoreError> {
        const OPERATION: &str = "count intents";
        let rows = self.read(OPERATION, Call::new(&self.statements().await?.recovery.count)).await?;
        let counts = rows.first().map(rows::intent_counts).transpose();
        Ok(counts.map_err(|source| E::error(OPERATION, source))?.unwrap_or_default())
    }

    async fn find_phase(
        &self,
        attempt: &Attempt,
        record: RecordId,
        name: &str,
    ) -> Result<Option<Bytes>, StoreError> {
        const OPERATION: &str = "find a phase";
        let statements = &self.statements().await?.recovery;
        // The lock waits for a transaction that is finishing the phase.
        let calls = vec![
            Call::new(&statements.lock).of_key(&attempt.consumer, &attempt.key),
            Call::new(&statements.find_phase).with("record", record.as_uuid()).with("name", name),
        ];
        let found = self.transact(OPERATION, calls).await?.pop();
        let result = found.and_then(|reply| reply.rows.first().map(|row| row.bytes("result"))).transpose();
        Ok(result.map_err(|source| E::error(OPERATION, source))?.flatten().map(Bytes::from))
    }

    async fn keep_request(
        &self,
        attempt: &Attempt,
        record: RecordId,
        request: &Bytes,
        after: Duration,
    ) -> Result<Fenced, StoreError> {
        let call = Call::new(&self.statements().await?.recovery.keep_request)
            .of_attempt(attempt)
            .with("record", record.as_uuid())
            .with("request", &**request)
            .with("after", after);
        Ok(applied(transact_one(self, "keep a request", call).await?))
    }

    async fn retain_record(
        &self,
        consumer: &Consumer,
        key: &IdempotencyKey,
        record: RecordId,
    ) -> Result<Fenced, StoreError> {
        let statement = &self.statements().await?.recovery.retain_record;
        let call = Call::new(statement).of_record(consumer, key, record);
        Ok(applied(transact_one(self, "retain a record", call).await?))
    }

    async fn take_abandoned(&self, limit: u32, pause: Duration) -> Result<Vec<KeptRequest>, StoreError> {
        const OPERATION: &str = "take abandoned requests";
        let rows = self.take(OPERATION, Due::AbandonedRequests, limit, pause).await?;
        all::<Self, _>(OPERATION, &rows, rows::kept_request)
    }

    async fn update_request(
        &self,
        record: RecordId,
        tries: Option<u32>,
        update: &RequestUpdate,
    ) -> Result<Fenced, StoreError> {
        let statements = &self.statements().await?.recovery;
        let (after, tried, attention) = match update {
            RequestUpdate::SendAgain { after, tried } => (Some(*after), *tried, None),
            RequestUpdate::NeedsAttention(what) => (None, true, Some(storable(what))),
            RequestUpdate::Done => {
                let call = Call::new(&statements.delete_request).with("record", record.as_uuid());
                return Ok(applied(transact_one(self, "delete a request", call).await?));
            }
        };
        let call = match tries {
            Some(tries) => Call::new(&statements.update_request).with("tries", tries).with("tried", tried),
            None => Call::new(&statements.reset_request),
        };
        let call = call
            .with("record", record.as_uuid())
            .with("again", after.is_some())
            .with("after", after.unwrap_or_default())
            .with("attention", attention.as_deref());
        Ok(applied(transact_one(self, "update a request", call).await?))
    }

    async fn list_requests(&self, limit: u32) -> Result<Vec<KeptRequest>, StoreError> {
        const OPERATION: &str = "list requests";
        let call = Call::new(&self.statements().await?.recovery.list_requests).with("limit", limit);
        all::<Self, _>(OPERATION, &self.read(OPERATION, call).await?, rows::kept_request)
    }

    async fn purge_settled(&self, retention: Duration, limit: u32) -> Result<u64, StoreError> {
        let purges = &self.statements().await?.purges;
        let mut purged = 0;
        // One transaction each, so that the locks of one purge do not last through the next.
        for statement in [&purges.intents, &purges.phases, &purges.requests] {
            let call = Call::new(statement).with("limit", limit).with("retention", retention);
            purged += transact_one(self, "purge", call).await?;
        }
        Ok(purged)
    }
}

async fn show<E: Engine>(
    engine: &E,
    operation: &str,
    intent: UpstreamKey,
) -> Result<Option<Intent>, StoreError> {
    let statement = &engine.statements().await?.recovery.get;
    let rows = engine.read(operation, Call::new(statement).with("intent", intent.as_uuid())).await?;
    Ok(all::<E, _>(operation, &rows, rows::intent)?.pop())
}

/// Runs one statement in a transaction. Unlike statements about records, some must not keep a plan
/// that was made while tables were small. None may run at another isolation level behind a pooler.
async fn transact_one<E: Engine>(engine: &E, operation: &str, call: Call<'_>) -> Result<u64, StoreError> {
    Ok(engine.transact(operation, vec![call]).await?.pop().map_or(0, |reply| reply.changed))
}

fn opening_call<'a>(statement: &'a Statement, opening: &'a Opening, subject: Option<&'a str>) -> Call<'a> {
    Call::new(statement)
        .of_attempt(&opening.attempt)
        .with("record", opening.record_id.as_uuid())
        .with("intent", opening.upstream_key.as_uuid())
        .with("name", opening.name.as_str())
        .with("discriminator", opening.discriminator.as_str())
        .with("ordinal", opening.ordinal)
        .with("arguments", &*opening.arguments)
        .with("subject", subject)
        .with("call", opening.call.as_uuid())
        .with("repeatable", !opening.repeatable_for.is_zero())
        .with("repeatable_for", opening.repeatable_for)
        .with("dangling_after", opening.dangling_after)
}

/// Returns the statement for an update under a fence. An intent that needs attention is not looked
/// up any more.
fn update_text(fence: IntentFence, update: &IntentUpdate, needs_attention: bool) -> String {
    let outcome = match update {
        IntentUpdate::Finalize(_) => {
            "state = 'finalized', absent = FALSE, settled_at = {now}, reason = NULL, resource_id = :resource,
             payload = COALESCE(:payload, {i}.payload),"
        }
        IntentUpdate::Refuse(_) => "state = 'dead', absent = FALSE, settled_at = {now}, reason = :reason,",
        IntentUpdate::Absent(_) => {
            "sent = ({i}.sent OR {i}.absent), state = 'dead', absent = TRUE, settled_at = {now},
             reason = :reason,"
        }
        IntentUpdate::NotSent => "sent = {i}.sent_before,",
        IntentUpdate::LookAgain { .. } | IntentUpdate::Close => "",
    };
    let again = "look_at = {now} + :after, absences = :absences,";
    let look = match update {
        _ if needs_attention => "look_at = {far},",
        IntentUpdate::NotSent => "",
        IntentUpdate::Absent(Some(_)) | IntentUpdate::LookAgain { .. } => again,
        IntentUpdate::Finalize(_)
        | IntentUpdate::Refuse(_)
        | IntentUpdate::Absent(None)
        | IntentUpdate::Close => "look_at = NULL,",
    };
    // An operator has it looked up as if for the first time.
    let looks = if look == again && matches!(fence, IntentFence::Operator) { "looks = 0," } else { "" };
    let fence = match (fence, update) {
        (IntentFence::Call(_), _) => "{i}.call = :call AND {i}.state = 'open'",
        (IntentFence::AbsentCall(_), _) => "{i}.call = :call AND {i}.state = 'dead' AND {i}.absent",
        (IntentFence::Lookup { open: true, .. }, _) => {
            "{i}.call = :call AND {i}.takes = :takes AND {i}.state = 'open'"
        }
        (IntentFence::Lookup { open: false, .. }, _) => {
            "{i}.call = :call AND {i}.takes = :takes AND {i}.state = 'dead' AND {i}.absent"
        }
        (IntentFence::Operator, IntentUpdate::LookAgain { .. }) => {
            "{i}.state <> 'finalized' AND NOT {in_flight} AND ({i}.state = 'open' OR {i}.absent)"
        }
        (IntentFence::Operator, _) => "{i}.state <> 'finalized' AND NOT {in_flight}",
        (IntentFence::Attention, _) => "{i}.state <> 'open' AND {i}.attention IS NOT NULL",
    };
    format!(
        "UPDATE {{intents}} AS {{i}} SET {outcome} {look} {looks} attention = :attention
         WHERE {{i}}.id = :intent AND {fence}"
    )
}

/// The values of an update. A text may come from an upstream, and not every database stores a NUL.
#[derive(Default)]
struct Values<'a> {
    resource: Option<String>,
    payload: Option<&'a [u8]>,
    reason: Option<String>,
    attention: Option<String>,
    after: Duration,
    absences: u32,
    call: Uuid,
    takes: u32,
}

impl<'a> Values<'a> {
    fn of(fence: IntentFence, update: &'a IntentUpdate, attention: Option<&str>) -> Self {
        let mut values = Self { attention: attention.map(storable), ..Self::default() };
        match update {
            IntentUpdate::Finalize(resource) => {
                values.resource = Some(storable(&resource.id));
                values.payload = resource.payload.as_deref();
            }
            IntentUpdate::Refuse(reason) => values.reason = Some(storable(reason)),
            IntentUpdate::Absent(again) => {
                values.reason = Some(ABSENT.to_owned());
                values.after = again.unwrap_or_default();
            }
            IntentUpdate::LookAgain { after, absences } => {
                (values.after, values.absences) = (*after, *absences);
            }
            IntentUpdate::NotSent | IntentUpdate::Close => {}
        }
        match fence {
            IntentFence::Call(call) | IntentFence::AbsentCall(call) => values.call = call.as_uuid(),
            IntentFence::Lookup { call, takes, .. } => (values.call, values.takes) = (call.as_uuid(), takes),
            IntentFence::Operator | IntentFence::Attention => {}
        }
        values
    }

    /// Makes the call with every value that the statement may have.
    fn call(&'a self, statement: &'a Statement, intent: UpstreamKey) -> Call<'a> {
        Call::new(statement)
            .with("intent", intent.as_uuid())
            .with("resource", self.resource.as_deref())
            .with("payload", self.payload)
            .with("reason", self.reason.as_deref())
            .with("attention", self.attention.as_deref())
            .with("after", self.after)
            .with("absences", self.absences)
            .with("call", self.call)
            .with("takes", self.takes)
    }
}

/// Returns names as JSON, which every database can turn into rows.
fn as_json(names: &[String]) -> String {
    serde_json::Value::from(names).to_string()
}

fn storable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}
