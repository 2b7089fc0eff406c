//! Answers that the layer gives itself: replays and refusals.

use std::{error::Error, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Response, header};
use http_body::Body;
use tokio::{task::JoinError, time::timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use crate::{
    consumer::Consumer,
    error::BoxError,
    key::IdempotencyKey,
    layer::{body::ResponseBody, settings::Settings},
    node::Node,
    redact::TRACING_TARGET,
    rejection::{OriginalResponse, Rejection, RejectionCode, render_again},
    stored::{
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
        RecordState::Held => Err(outcome_unknown(settings, record)),
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

fn outcome_unknown(settings: &Settings, record: &Record) -> Rejection {
    let (consumer, key) = (&record.consumer, settings.attempts.shown(&record.key));
    tracing::warn!(target: TRACING_TARGET, %consumer, %key, "conflict: held, the outcome is unknown");
    if record.unresolved > 0 {
        return Rejection::outcome_unknown_for_now();
    }
    Rejection::new(
        RejectionCode::OutcomeUnknown,
        "It is not known whether an earlier request with this key was performed. It is not performed again \
         until the operator of the API has found that out. Do not send the request with a new key.",
    )
}

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
/// the layer's own.
pub(crate) fn passed<B: Body>(settings: &Settings, response: Response<B>) -> Response<ResponseBody<B>> {
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
    let task = tokio::spawn(async move { renderer.render(stored).await }.in_current_span());
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
