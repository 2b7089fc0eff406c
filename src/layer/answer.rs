//! Answers that the layer gives itself: replays and refusals.

use std::{error::Error, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Response, header};
use http_body::Body;
use tokio::{task::JoinError, time::timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    consumer::Consumer,
    error::{BoxError, StoreError},
    key::IdempotencyKey,
    layer::{body::ResponseBody, settings::Settings},
    node::Node,
    redact::{TRACING_TARGET, traced},
    rejection::{OriginalResponse, Rejection, RejectionCode, render_again},
    stored::{
        intent::{Intent, IntentFilter, IntentState},
        record::{Record, RecordState},
        response::{StoredBody, StoredRepresentation, StoredResponse},
    },
};

/// Rows 9 to 12: the answer of a record to a retry of its request.
pub(crate) async fn response_of_record(
    node: &Node,
    settings: &Settings,
    record: &Record,
) -> Result<StoredResponse, Rejection> {
    match &record.state {
        // Row 9.
        RecordState::InProgress { .. } => Err(in_progress(settings, &record.consumer, &record.key)),
        // Row 10.
        RecordState::Held => Err(outcome_unknown(node, settings, record).await),
        // Rows 11 and 12.
        RecordState::Completed { response } => stored_answer(node, settings, record, response).await,
    }
}

pub(crate) fn in_progress(settings: &Settings, consumer: &Consumer, key: &IdempotencyKey) -> Rejection {
    tracing::info!(
        target: TRACING_TARGET, %consumer, key = %settings.attempts.shown(key), "conflict: in progress"
    );
    Rejection::new(
        RejectionCode::InProgress,
        "The first request with this key is still being processed. Send the request again with the same key \
         to get its response.",
    )
}

async fn outcome_unknown(node: &Node, settings: &Settings, record: &Record) -> Rejection {
    let (consumer, key) = (&record.consumer, settings.attempts.shown(&record.key));
    let what = "conflict: held, the outcome is unknown";
    // Clients may retry for ever.
    match node.lookups.is_first_refusal(record.id) {
        true => tracing::warn!(target: TRACING_TARGET, %consumer, %key, "{what}"),
        false => tracing::debug!(target: TRACING_TARGET, %consumer, %key, "{what}"),
    }
    match prospect(node, settings, record).await {
        Prospect::LookUp => Rejection::outcome_looked_up(),
        Prospect::Unclear => Rejection::outcome_unknown_for_now().at_any_time(),
        Prospect::Operator => Rejection::new(
            RejectionCode::OutcomeUnknown,
            "It is not known whether an earlier request with this key was performed. It is not performed \
             again until the operator of the API has found that out. Do not send the request with a new key.",
        ),
    }
}

/// The way in which the outcome of a held record is found out.
enum Prospect {
    /// This process looks it up.
    LookUp,
    /// Another process may look it up.
    Unclear,
    /// Only an operator can find it out.
    Operator,
}

/// Tells what the open intents of a held record can expect.
async fn prospect(node: &Node, settings: &Settings, record: &Record) -> Prospect {
    if record.unresolved == 0 {
        return Prospect::Operator;
    }
    let Ok(intents) = open_intents(node, settings, record).await else { return Prospect::Unclear };
    let waits_for_operator = intents.iter().any(|intent| intent.attention.is_some());
    let left_alone = intents.iter().filter(|intent| !node.lookups.has(&intent.name));
    let never_taken = || left_alone.clone().filter(|intent| intent.attention.is_none() && intent.takes == 0);
    for intent in never_taken() {
        if node.lookups.is_first_unregistered(&intent.name) {
            tracing::error!(
                target: TRACING_TARGET, consumer = %intent.consumer,
                key = %settings.attempts.shown(&intent.key), attempt = %intent.attempt, intent = intent.name,
                upstream_key = %intent.upstream_key,
                "a key is held, and no reconciler of this process looks up the call that holds it: unless \
                 another process does, the key stays held until an operator resolves the intent; see \
                 IdempotencyHandle::start_reconciler"
            );
        }
    }
    // Without an intent that may have arrived, the record is held for another reason.
    if intents.is_empty() || waits_for_operator || never_taken().any(|intent| intent.dangling) {
        Prospect::Operator
    } else if left_alone.clone().next().is_some() {
        Prospect::Unclear
    } else {
        Prospect::LookUp
    }
}

/// The intents of a record whose call may have arrived.
async fn open_intents(node: &Node, settings: &Settings, record: &Record) -> Result<Vec<Intent>, StoreError> {
    let (recovery, filter) = (node.recovery()?, IntentFilter::OfRecord(record.id));
    let listed = async move { recovery.list_intents(filter, MOST_INTENTS).await };
    let mut intents = node.tasks.call(settings.attempts.store_timeout, listed).await?;
    intents.retain(|intent| intent.state == IntentState::Open { sent: true });
    Ok(intents)
}

/// The number of intents of a record that are looked at for an answer.
const MOST_INTENTS: u32 = 1000;

/// The response of a completed record, as the client gets it.
async fn stored_answer(
    node: &Node,
    settings: &Settings,
    record: &Record,
    stored: &Bytes,
) -> Result<StoredResponse, Rejection> {
    let (consumer, key) = (&record.consumer, settings.attempts.shown(&record.key));
    let response = node.codec.read_response(stored).map_err(|error| {
        let error = &error as &dyn Error;
        tracing::error!(target: TRACING_TARGET, %consumer, %key, error, "a stored response cannot be read");
        Rejection::new(
            RejectionCode::RecordUnreadable,
            "The request was performed, and its response cannot be read. Do not send the request with a new \
             key.",
        )
    })?;
    let age = record.created_at.elapsed().unwrap_or_default();
    let status = response.status.as_u16();
    if response.body == StoredBody::NotKept {
        tracing::info!(target: TRACING_TARGET, %consumer, %key, ?age, status, "conflict: response not kept");
        return Err(not_kept(&response));
    }
    tracing::info!(target: TRACING_TARGET, %consumer, %key, ?age, status, "replay");
    rendered(settings, consumer, &record.key, response).await
}

fn not_kept(response: &StoredResponse) -> Rejection {
    let location = response.headers.get(header::LOCATION).and_then(|value| value.to_str().ok());
    let original = OriginalResponse { status: response.status, location: location.map(str::to_owned) };
    let detail = "The request was performed once. Its response was too large or endless to be kept for a \
                  replay. Do not send the request with a new key.";
    Rejection::new(RejectionCode::ResponseNotKept, detail).with_original(original)
}

/// A stored response, marked as a replay.
pub(crate) fn replay<B>(settings: &Settings, stored: StoredResponse) -> Response<ResponseBody<B>> {
    let mut response = stored.into_response();
    response.headers_mut().insert(settings.replay_marker.clone(), HeaderValue::from_static("true"));
    response
}

pub(crate) fn refused<B>(settings: &Settings, rejection: Rejection) -> Response<ResponseBody<B>> {
    settings.refuse(rejection).map(|data| ResponseBody::buffered(data, None))
}

/// The response of a request that is not guarded. Refusals that its handler answers are rendered as
/// the layer's own. `None`: an outer layer does that.
pub(crate) fn passed<B: Body>(
    settings: Option<&Settings>,
    response: Response<B>,
) -> Response<ResponseBody<B>> {
    let Some(settings) = settings else { return response.map(ResponseBody::passed) };
    let (mut parts, body) = response.into_parts();
    let body = match render_again(&mut parts, &*settings.renderer, |data| has_length_of(&body, data)) {
        Some(data) => ResponseBody::buffered(data, None),
        None => ResponseBody::passed(body),
    };
    Response::from_parts(parts, body)
}

/// The body of a request that is not guarded is not collected: its length tells whether it was
/// replaced.
fn has_length_of<B: Body>(body: &B, data: &Bytes) -> bool {
    body.size_hint().exact() == u64::try_from(data.len()).ok()
}

/// The response as the client gets it: rendered if only a representation of it is stored.
pub(crate) async fn rendered(
    settings: &Settings,
    consumer: &Consumer,
    key: &IdempotencyKey,
    response: StoredResponse,
) -> Result<StoredResponse, Rejection> {
    let StoredBody::Representation(representation) = response.body else { return Ok(response) };
    let stored = StoredRepresentation::new(consumer.clone(), response.status, representation.data().clone());
    let response = render(settings, stored).await.map_err(|error| {
        let (key, error) = (settings.attempts.shown(key), &error as &dyn Error);
        tracing::error!(target: TRACING_TARGET, %consumer, %key, error, "a response cannot be rendered");
        let detail = "The request was performed, and its response cannot be rendered right now. Send the \
                      request again with the same key to get it.";
        Rejection::new(RejectionCode::RepresentationUnrenderable, detail)
    })?;
    let (mut parts, data) = response.into_parts();
    parts.headers.remove(&settings.replay_marker);
    let mut response = StoredResponse::of(&parts, StoredBody::Kept { data, trailers: None });
    response.remove_headers(&settings.headers_not_kept);
    Ok(response)
}

/// Runs the renderer in a task of its own, so that a panic ends nothing else.
async fn render(settings: &Settings, stored: StoredRepresentation) -> Result<Response<Bytes>, Unrenderable> {
    let renderer = Arc::clone(settings.representation_renderer.as_ref().ok_or(Unrenderable::NoRenderer)?);
    let task = tokio::spawn(traced(async move { renderer.render(stored).await }));
    let limit = settings.attempts.store_timeout;
    match timeout(limit, AbortOnDropHandle::new(task)).await {
        Ok(Ok(rendered)) => rendered.map_err(Unrenderable::Failed),
        Ok(Err(error)) => Err(Unrenderable::EndedEarly(error)),
        Err(_) => Err(Unrenderable::TimedOut(limit)),
    }
}

impl StoredResponse {
    /// Makes first responses and replays alike, so that they are framed alike.
    pub(crate) fn into_response<B>(self) -> Response<ResponseBody<B>> {
        // An operator may have made it.
        let Self { status, headers, body } = self.framed();
        let mut response = Response::new(match body {
            StoredBody::Kept { data, trailers } => ResponseBody::buffered(data, trailers),
            StoredBody::NotKept | StoredBody::Representation(_) => ResponseBody::default(),
        });
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        response
    }
}

#[derive(Debug, thiserror::Error)]
enum Unrenderable {
    #[error("no renderer is set: see IdempotencyLayer::with_representation")]
    NoRenderer,
    #[error("the renderer failed")]
    Failed(#[source] BoxError),
    #[error("the renderer ended early")]
    EndedEarly(#[source] JoinError),
    #[error("the renderer took longer than {0:?}")]
    TimedOut(Duration),
}
