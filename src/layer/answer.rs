//! Answers that the layer gives itself: replays and refusals.

use http::{HeaderValue, Response, header};

use crate::{
    consumer::Consumer,
    key::IdempotencyKey,
    layer::{body::ResponseBody, representation::rendered, settings::Settings},
    redact::TRACING_TARGET,
    rejection::{OriginalResponse, Rejection, RejectionCode},
    stored::{
        record::{Record, RecordState},
        response::{StoredBody, StoredResponse},
    },
};

/// What a record answers to a retry of its request.
pub(crate) async fn answer_from(settings: &Settings, record: &Record) -> Result<StoredResponse, Rejection> {
    let (consumer, key) = (&record.consumer, settings.shown(&record.key));
    match &record.state {
        RecordState::InProgress { .. } => Err(in_progress(settings, consumer, &record.key)),
        RecordState::Held => {
            tracing::warn!(target: TRACING_TARGET, %consumer, %key, "conflict: held, the outcome is unknown");
            Err(match record.unresolved {
                0 => outcome_unknown(),
                _ => Rejection::outcome_unknown_for_now(),
            })
        }
        RecordState::Completed { response } => {
            let response = StoredResponse::decode(response).map_err(|error| {
                let error = &error as &dyn std::error::Error;
                tracing::error!(target: TRACING_TARGET, %consumer, %key, error, "a stored response cannot be read");
                Rejection::new(
                    RejectionCode::RecordUnreadable,
                    "The request was performed, and its response cannot be read.",
                )
            })?;
            let age = record.created_at.elapsed().unwrap_or_default();
            let status = response.status.as_u16();
            let what =
                if response.body == StoredBody::NotKept { "conflict: response not kept" } else { "replay" };
            tracing::info!(target: TRACING_TARGET, %consumer, %key, ?age, status, "{what}");
            rendered(settings, consumer, &record.key, kept(response)?).await
        }
    }
}

fn kept(response: StoredResponse) -> Result<StoredResponse, Rejection> {
    if response.body != StoredBody::NotKept {
        return Ok(response);
    }
    let location = response.headers.get(header::LOCATION).and_then(|value| value.to_str().ok());
    let original = OriginalResponse { status: response.status, location: location.map(str::to_owned) };
    let detail =
        "The request was performed once. Its response was too large or endless to be kept for a replay.";
    Err(Rejection::new(RejectionCode::ResponseNotKept, detail).with_original(original))
}

pub(crate) fn in_progress(settings: &Settings, consumer: &Consumer, key: &IdempotencyKey) -> Rejection {
    tracing::info!(target: TRACING_TARGET, %consumer, key = %settings.shown(key), "conflict: in progress");
    Rejection::new(
        RejectionCode::InProgress,
        "The first request with this key is still being processed. Send it again to get its response.",
    )
}

fn outcome_unknown() -> Rejection {
    Rejection::new(
        RejectionCode::OutcomeUnknown,
        "An earlier request with this key ended without a known outcome. It is not run again until that is resolved.",
    )
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

impl StoredResponse {
    /// First responses and replays are both made here, so that they are framed alike.
    pub(crate) fn into_response<B>(self) -> Response<ResponseBody<B>> {
        let mut response = Response::new(match self.body {
            StoredBody::Kept { data, trailers } => ResponseBody::buffered(data, trailers),
            StoredBody::NotKept | StoredBody::Representation(_) => ResponseBody::default(),
        });
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers;
        response
    }
}
