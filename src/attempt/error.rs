//! Errors of calls to upstream services.

use bytes::Bytes;
use http::Response;

use crate::{
    error::{BoxError, StoreError},
    redact::TRACING_TARGET,
    rejection::{Rejection, RejectionCode, respond_by_default},
};

/// A call to an upstream service has no result.
///
/// As a response, [`Refused`](Self::Refused) is a 422 that is stored, like any answer of the
/// handler: map it to one that says more to the client. All others are refusals, which are never
/// stored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IntentError {
    /// The upstream has refused, in this attempt or an earlier one, for this reason: 422
    /// `upstream-refused`.
    #[error("the upstream service has refused: {0}")]
    Refused(String),
    /// The call has certainly not been processed: 503 `upstream-unavailable`. The next attempt
    /// makes it.
    #[error("the call to the upstream service was not sent")]
    NotSent(#[source] BoxError),
    /// The call may have been processed. If it may be made again with the same key: 503
    /// `outcome-unknown`, and the next attempt makes it. Otherwise 409 `outcome-unknown`, and the
    /// key is held until the intent is settled.
    #[error("it is not known whether the upstream service has processed the call")]
    #[non_exhaustive]
    Unknown {
        /// `true` if the next attempt makes the call again.
        repeatable: bool,
        /// The cause, if the call was made in this attempt.
        source: Option<BoxError>,
    },
    /// The intent could not be written, and no call was made: 503 `store-unavailable` or 500
    /// `store-misconfigured`.
    #[error("the intent could not be recorded; no call was made")]
    NotRecorded(#[source] StoreError),
    /// An earlier attempt had the same intent with other arguments: 409 `outcome-unknown`. No call
    /// was made, and the key is held, whatever the handler answers.
    #[error("an earlier attempt had the same intent with other arguments; no call was made")]
    OtherArguments,
    /// The attempt does not own its record any more, or its outcome contradicts one that was
    /// recorded meanwhile: 409 `in-progress`.
    #[error("the attempt does not own its record any more")]
    Lost,
    /// The handler has used intents wrongly, as this says: 500 `intent-misused`. No call was made.
    #[error("{0}")]
    Misused(&'static str),
}

impl IntentError {
    /// The code of the response.
    #[must_use]
    pub fn code(&self) -> RejectionCode {
        match self {
            Self::Refused(_) => RejectionCode::UpstreamRefused,
            Self::NotSent(_) => RejectionCode::UpstreamUnavailable,
            Self::Unknown { repeatable: true, .. } => RejectionCode::OutcomePending,
            Self::Unknown { repeatable: false, .. } | Self::OtherArguments => RejectionCode::OutcomeUnknown,
            Self::NotRecorded(error) => RejectionCode::of_store(error.kind()),
            Self::Lost => RejectionCode::InProgress,
            Self::Misused(_) => RejectionCode::IntentMisused,
        }
    }

    pub(crate) fn rejection(&self) -> Rejection {
        let detail = match self {
            Self::Refused(_) => {
                "Another service has refused what the request asks for. Retries get this same answer."
            }
            Self::NotSent(_) => {
                "The request was not completed: another service could not be reached, and nothing was sent \
                 to it. Send the request again with the same key."
            }
            Self::Unknown { repeatable: true, .. } => {
                "The request was not completed: another service has not answered a call and may have \
                 performed it. Send the request again with the same key, never with a new one."
            }
            Self::Unknown { repeatable: false, .. } => return Rejection::outcome_unknown_for_now(),
            Self::OtherArguments => {
                "The request was stopped: an earlier attempt of it asked another service for something else. \
                 It is not performed again until the operator of the API has resolved that. Do not send it \
                 with a new key."
            }
            Self::NotRecorded(_) => {
                "The request was stopped before a call to another service was made. Send it again with the \
                 same key."
            }
            Self::Misused(_) => {
                "The server failed while it performed the request, and a part may have been performed. Do \
                 not send it with a new key."
            }
            Self::Lost => {
                "Another attempt of the request has taken over. Send the request again with the same key to \
                 get its response."
            }
        };
        Rejection::new(self.code(), detail)
    }

    fn log(&self) {
        let (code, error) = (self.code(), self as &(dyn std::error::Error + 'static));
        match self {
            // Logged when the call failed, with its cause.
            Self::Refused(_) | Self::NotSent(_) | Self::Unknown { .. } => {}
            Self::Lost => {
                tracing::warn!(
                    target: TRACING_TARGET, %code, error,
                    "the record of an attempt that calls was taken"
                );
            }
            Self::NotRecorded(_) | Self::OtherArguments | Self::Misused(_) => {
                tracing::error!(
                    target: TRACING_TARGET, %code, error,
                    "a call to an upstream service was not made"
                );
            }
        }
    }

    /// Makes the response and logs the cause. The layer around the handler renders it with its
    /// [renderer](crate::IdempotencyLayer::with_renderer).
    #[must_use]
    pub fn into_http_response(self) -> Response<Bytes> {
        self.log();
        let mut response = respond_by_default(self.rejection());
        if matches!(self, Self::Refused(_)) {
            // The handler's answer, and no refusal of the layer.
            response.extensions_mut().remove::<Rejection>();
        }
        response
    }
}

#[cfg(feature = "axum")]
impl axum_core::response::IntoResponse for IntentError {
    fn into_response(self) -> axum_core::response::Response {
        self.into_http_response().map(axum_core::body::Body::from)
    }
}
