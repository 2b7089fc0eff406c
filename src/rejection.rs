//! Refusals: answers that the layer gives instead of the handler's.

use std::{
    borrow::Cow,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header, response::Parts};
use serde_json::json;

use crate::{error::StoreErrorKind, redact::TRACING_TARGET};

/// The reason why the layer did not pass a request to the handler, or did not pass the handler's
/// result to the client.
///
/// It is in the extensions of the response, so that an outer layer can look at it:
///
/// ```
/// # use tower_idempotency::{Rejection, RejectionCode};
/// # fn outer_layer(response: http::Response<()>) {
/// if let Some(rejection) = response.extensions().get::<Rejection>() {
///     assert_ne!(rejection.code(), RejectionCode::StoreMisconfigured);
/// }
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Rejection {
    code: RejectionCode,
    detail: Cow<'static, str>,
    retryable: bool,
    /// It is known when a retry makes sense.
    paced: bool,
    original: Option<OriginalResponse>,
}

/// The known parts of a response whose body was not kept.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct OriginalResponse {
    /// The status.
    pub status: StatusCode,
    /// The `Location`, if the response had one that is text.
    pub location: Option<String>,
}

impl Rejection {
    pub(crate) fn new(code: RejectionCode, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { code, detail: detail.into(), retryable: code.is_retryable(), paced: true, original: None }
    }

    /// Not retryable if the key is held: the same request would be refused.
    pub(crate) fn final_if(mut self, held: bool) -> Self {
        self.retryable &= !held;
        self
    }

    /// The server failed while the layer had the request, and it is not known how far it had come.
    pub(crate) fn failed() -> Self {
        Self::new(
            RejectionCode::Internal,
            "The server failed, and the request may have been performed. Send it again with the same key.",
        )
    }

    /// The outcome is unknown, and may be found out later.
    pub(crate) fn outcome_unknown_for_now() -> Self {
        let detail = "It is not known whether a call of this request to another service was performed. The \
                      request is not performed again until that is found out. Send it again later with the \
                      same key: with a new key the call might be made twice.";
        Self { retryable: true, ..Self::new(RejectionCode::OutcomeUnknown, detail) }
    }

    /// The outcome is unknown until a call to an upstream service is looked up.
    pub(crate) fn outcome_looked_up() -> Self {
        let detail = "It is not known yet whether a call of this request to another service was performed. \
                      It is being looked up. Send the request again later with the same key: with a new key \
                      the call might be made twice.";
        Self { retryable: true, ..Self::new(RejectionCode::OutcomeUnknown, detail) }
    }

    /// No time can be named for the next try.
    pub(crate) fn at_any_time(mut self) -> Self {
        self.paced = false;
        self
    }

    /// The answer if the handler has run twice within one attempt. The next attempt begins from
    /// what the first run has recorded.
    pub(crate) fn second_run(code: RejectionCode) -> Self {
        let detail = "The server ran the request twice within one attempt, and stopped the second run. Send \
                      the request again with the same key, never with a new one.";
        Self { retryable: true, ..Self::new(code, detail) }
    }

    /// The refusal of a handler that needs a key, for a request without one.
    #[cfg(any(feature = "axum", feature = "sqlite", feature = "postgres"))]
    pub(crate) fn key_missing() -> Self {
        Self::new(
            RejectionCode::KeyMissing,
            "The request was not performed: this operation needs an idempotency key. Send it with a new key \
             for each operation and the same key for every retry.",
        )
    }

    pub(crate) fn with_original(mut self, original: OriginalResponse) -> Self {
        self.original = Some(original);
        self
    }

    /// The code: what happened.
    #[must_use]
    pub fn code(&self) -> RejectionCode {
        self.code
    }

    /// The status of the answer.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.code.status()
    }

    /// One to three sentences for the author of the client.
    #[must_use]
    pub fn detail(&self) -> &str {
        &self.detail
    }

    /// `true` if the same request with the same key may succeed later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        self.retryable
    }

    /// The time to wait before the next try: the `Retry-After` of the answer.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        let later = matches!(self.status(), StatusCode::CONFLICT | StatusCode::SERVICE_UNAVAILABLE);
        let looked_up = self.code == RejectionCode::OutcomeUnknown;
        let delay = if looked_up { UNTIL_LOOKED_UP } else { Duration::from_secs(1) };
        (self.retryable && self.paced && later).then_some(delay)
    }

    /// The status and `Location` of a response that was not kept.
    #[must_use]
    pub fn original(&self) -> Option<&OriginalResponse> {
        self.original.as_ref()
    }
}

macro_rules! rejection_codes {
    ($(
        $(#[$doc:meta])*
        $variant:ident => $code:literal, $status:ident, $retryable:literal, $title:literal;
    )*) => {
        /// The kinds of [`Rejection`]. The text form ([`as_str`](Self::as_str)) is the `code` of
        /// the problem document.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum RejectionCode {
            $($(#[$doc])* #[doc = concat!("\n\nCode \
                                           `", $code, "`, status \
                                                                ", stringify!($status), ".")] $variant,)*
        }

        impl RejectionCode {
            /// The code in the problem document.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $code,)* }
            }

            /// The status of the answer.
            #[must_use]
            pub fn status(self) -> StatusCode {
                match self { $(Self::$variant => StatusCode::$status,)* }
            }

            /// The title of the problem document.
            #[must_use]
            pub fn title(self) -> &'static str {
                match self { $(Self::$variant => $title,)* }
            }

            fn is_retryable(self) -> bool {
                match self { $(Self::$variant => $retryable,)* }
            }
        }
    };
}

rejection_codes! {
    /// The route requires a key, and the request has none.
    KeyMissing => "key-missing", BAD_REQUEST, false, "Idempotency-Key is missing";
    /// The key header is malformed or was sent more than once.
    KeyInvalid => "key-invalid", BAD_REQUEST, false, "Idempotency-Key is invalid";
    /// The request has a key, its handler needs an attempt, and no layer guards the request: the
    /// layer is missing, was added before the route, or does not guard the method. The server's log
    /// says which.
    NotGuarded => "not-guarded", INTERNAL_SERVER_ERROR, false, "The request is not protected";
    /// The owner of the key cannot be determined safely.
    ConsumerUnidentified => "consumer-unidentified", FORBIDDEN, false,
        "The API consumer cannot be identified";
    /// The request's body is larger than allowed.
    RequestTooLarge => "request-too-large", PAYLOAD_TOO_LARGE, false, "The request is too large";
    /// The request's body broke off.
    RequestIncomplete => "request-incomplete", BAD_REQUEST, true, "The request is incomplete";
    /// The request's body did not arrive in time.
    RequestTimeout => "request-timeout", REQUEST_TIMEOUT, true, "The request did not arrive in time";
    /// All buffered request bodies together have reached their limit, or too many attempts are
    /// running.
    Overloaded => "overloaded", SERVICE_UNAVAILABLE, true, "The server is overloaded";
    /// The server is shutting down.
    ShuttingDown => "shutting-down", SERVICE_UNAVAILABLE, true, "The server is shutting down";
    /// The store cannot be reached, or did not answer in time.
    StoreUnavailable => "store-unavailable", SERVICE_UNAVAILABLE, true,
        "Idempotency cannot be guaranteed right now";
    /// The store lacks a table, a right or a setting. The server's log says which.
    StoreMisconfigured => "store-misconfigured", INTERNAL_SERVER_ERROR, false,
        "The idempotency store is misconfigured";
    /// The key was used for a different request.
    KeyReused => "key-reused", UNPROCESSABLE_ENTITY, false, "Idempotency-Key is already used";
    /// The first request with this key is still being processed.
    InProgress => "in-progress", CONFLICT, true, "A request is outstanding for this Idempotency-Key";
    /// An earlier request with this key ended without a known outcome and must not run again.
    /// Retryable if only the outcome of a call to an upstream service is unknown: it is looked up.
    /// The same code with status 503 is [`OutcomePending`](Self::OutcomePending), which passes.
    OutcomeUnknown => "outcome-unknown", CONFLICT, false, "The outcome of the request is unknown";
    /// The request was performed. Its response was too large or endless and cannot be replayed.
    ResponseNotKept => "response-not-kept", CONFLICT, false, "The response was not kept";
    /// The record was made with fingerprint settings that this server does not know.
    FingerprintUnknown => "fingerprint-unknown", CONFLICT, true, "The earlier request cannot be compared";
    /// The stored response is damaged or was written by an unknown version.
    RecordUnreadable => "record-unreadable", INTERNAL_SERVER_ERROR, false,
        "The stored response is unreadable";
    /// The request was performed, and its response could not be rendered from what is stored of it.
    /// The next retry renders it again.
    RepresentationUnrenderable => "representation-unrenderable", INTERNAL_SERVER_ERROR, true,
        "The response cannot be rendered";
    /// The handler panicked.
    HandlerPanicked => "handler-panicked", INTERNAL_SERVER_ERROR, true, "The request failed";
    /// The body of the handler's response broke off.
    ResponseIncomplete => "response-incomplete", INTERNAL_SERVER_ERROR, true, "The response is incomplete";
    /// The handler ran longer than allowed and was cancelled.
    MaxExecutionExceeded => "max-execution-exceeded", INTERNAL_SERVER_ERROR, true,
        "The request took too long";
    /// The transaction collided with another one and was rolled back.
    TransactionConflict => "transaction-conflict", SERVICE_UNAVAILABLE, true,
        "The request collided with another one";
    /// The transaction was lost before it was committed and was rolled back: its connection broke
    /// or the server ended it. Or it was open for too long, and its handler is cancelled: if that
    /// does not stop immediately, only a retry tells whether it was committed.
    TransactionLost => "transaction-lost", SERVICE_UNAVAILABLE, true, "The transaction was lost";
    /// The database did not commit the transaction, and it was rolled back: one of its statements
    /// had failed, or a constraint is violated. Not retryable if the same statement would fail
    /// again.
    TransactionFailed => "transaction-failed", INTERNAL_SERVER_ERROR, true, "The request failed";
    /// The handler did not give its transaction back when it returned, asked for it while it had
    /// it, or ran twice within one attempt. Nothing of it is committed.
    TransactionInUse => "transaction-in-use", INTERNAL_SERVER_ERROR, true, "The request failed";
    /// The handler ended its transaction itself. Its writes may be committed, and the key is
    /// held.
    TransactionEnded => "transaction-ended", INTERNAL_SERVER_ERROR, false,
        "The outcome of the request is unknown";
    /// The outcome is not known yet, and sending the request again with the same key finds it out.
    /// Either the database has not confirmed a COMMIT in time: the retry gets the response if the
    /// transaction was committed, and is performed if not. Or an upstream service has not answered
    /// a call: the next attempt repeats the call with the same upstream key. The status tells this
    /// code from [`OutcomeUnknown`](Self::OutcomeUnknown).
    OutcomePending => "outcome-unknown", SERVICE_UNAVAILABLE, true,
        "The outcome of the request is not known yet";
    /// An upstream service has refused what the request asks for. Unlike the other codes it is the
    /// handler's answer, and stored.
    UpstreamRefused => "upstream-refused", UNPROCESSABLE_ENTITY, false,
        "The upstream service refused the request";
    /// An upstream service could not be reached. Nothing was sent to it.
    UpstreamUnavailable => "upstream-unavailable", SERVICE_UNAVAILABLE, true,
        "An upstream service is unavailable";
    /// The handler has used intents or phases wrongly. The server's log says how. Retryable if it
    /// ran twice within one attempt.
    IntentMisused => "intent-misused", INTERNAL_SERVER_ERROR, false, "The request failed";
    /// The layer itself failed, or the runtime is going down.
    Internal => "internal", INTERNAL_SERVER_ERROR, true, "Internal error";
}

impl RejectionCode {
    /// The code for an error of the store.
    pub(crate) fn of_store(kind: StoreErrorKind) -> Self {
        match kind {
            StoreErrorKind::Unavailable | StoreErrorKind::Ambiguous => Self::StoreUnavailable,
            StoreErrorKind::Misconfigured => Self::StoreMisconfigured,
            StoreErrorKind::Internal => Self::Internal,
        }
    }

    /// A handler has run, and ended without a result.
    pub(crate) fn is_end_without_result(self) -> bool {
        matches!(self, Self::HandlerPanicked | Self::ResponseIncomplete | Self::MaxExecutionExceeded)
    }
}

impl fmt::Display for RejectionCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Renders rejections as responses. Implemented by closures; the default is [`ProblemJson`].
///
/// The layer adds `Cache-Control: no-store` and `Retry-After` where the response has none of its
/// own. It answers a gRPC request with a status of gRPC instead, unless the rendered response has
/// a content type of gRPC: see [errors](crate::guide::errors).
pub trait RenderRejection: Send + Sync {
    /// Renders one rejection.
    fn render(&self, rejection: &Rejection) -> Response<Bytes>;
}

impl<F> RenderRejection for F
where
    F: Fn(&Rejection) -> Response<Bytes> + Send + Sync,
{
    fn render(&self, rejection: &Rejection) -> Response<Bytes> {
        self(rejection)
    }
}

/// Renders `application/problem+json` ([RFC 9457]) with `type`, `title`, `status`, `detail`, `code`
/// and `retryable`. A response that was not kept also has `original_status` and
/// `original_location`.
///
/// The titles for 400, 409 and 422 are those of the [IETF draft]. The `type` leads to the code's
/// documentation on docs.rs, unless [`with_type_base`](Self::with_type_base) sets a page of your
/// own.
///
/// [RFC 9457]: https://www.rfc-editor.org/rfc/rfc9457
/// [IETF draft]: https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ProblemJson {
    type_base: Option<String>,
}

impl ProblemJson {
    /// Sets the base of `type`: the code is appended to it. Default: a page on docs.rs.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, ProblemJson};
    /// // For example https://errors.example.com/key-missing
    /// let problems = ProblemJson::default().with_type_base("https://errors.example.com/");
    /// let layer = IdempotencyLayer::new(MemoryStore::new()).with_renderer(problems);
    /// # }
    /// ```
    #[must_use]
    pub fn with_type_base(mut self, base: impl Into<String>) -> Self {
        self.type_base = Some(base.into());
        self
    }

    fn type_of(&self, code: RejectionCode) -> String {
        match &self.type_base {
            Some(base) => format!("{base}{code}"),
            None => format!("{DOCUMENTATION}#variant.{code:?}"),
        }
    }
}

impl RenderRejection for ProblemJson {
    fn render(&self, rejection: &Rejection) -> Response<Bytes> {
        let code = rejection.code;
        let mut problem = json!({
            "type": self.type_of(code),
            "title": code.title(),
            "status": code.status().as_u16(),
            "detail": rejection.detail,
            "code": code.as_str(),
            "retryable": rejection.retryable,
        });
        if let Some(original) = &rejection.original {
            problem["original_status"] = original.status.as_u16().into();
            problem["original_location"] = original.location.clone().into();
        }
        let mut response = Response::new(problem.to_string().into());
        *response.status_mut() = code.status();
        let content_type = HeaderValue::from_static("application/problem+json");
        response.headers_mut().insert(header::CONTENT_TYPE, content_type);
        response
    }
}

fn rendered(rejection: &Rejection, renderer: &dyn RenderRejection) -> Response<Bytes> {
    let mut response = renderer.render(rejection);
    let headers = response.headers_mut();
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    if let Some(delay) = rejection.retry_after() {
        headers.entry(header::RETRY_AFTER).or_insert_with(|| delay.as_secs().into());
    }
    response
}

/// Renders a rejection and marks the response as a refusal.
pub(crate) fn respond(rejection: Rejection, renderer: &dyn RenderRejection) -> Response<Bytes> {
    let mut response = rendered(&rejection, renderer);
    response.extensions_mut().insert(rejection);
    response
}

/// In the extensions of a response that was rendered where the layer's renderer is not known.
#[derive(Clone, Debug)]
struct ByDefault {
    rejection: Rejection,
    /// The body, as it was rendered.
    body: Bytes,
}

/// Renders a rejection inside the handler. The layer around it [renders it again](render_again).
pub(crate) fn respond_by_default(rejection: Rejection) -> Response<Bytes> {
    let mut response = respond(rejection.clone(), &ProblemJson::default());
    let body = response.body().clone();
    response.extensions_mut().insert(ByDefault { rejection, body });
    response
}

/// Renders with the layer's renderer a response that was [rendered by default](respond_by_default),
/// and returns the new body. Other headers and extensions stay. `None` for any other response, also
/// for one whose status, content type or body the handler or a middleware has replaced.
///
/// `is_body` tells whether these bytes are still the body of the response.
pub(crate) fn render_again(
    parts: &mut Parts,
    renderer: &dyn RenderRejection,
    is_body: impl FnOnce(&Bytes) -> bool,
) -> Option<Bytes> {
    let ByDefault { rejection, body } = parts.extensions.remove::<ByDefault>()?;
    let default = rendered(&rejection, &ProblemJson::default());
    let content_type = default.headers().get(header::CONTENT_TYPE);
    if parts.status != default.status()
        || parts.headers.get(header::CONTENT_TYPE) != content_type
        || !is_body(&body)
    {
        return None;
    }
    // A renderer that panics must not change how the attempt ends: the default rendering stays.
    let again = catch_unwind(AssertUnwindSafe(|| rendered(&rejection, renderer)));
    let Ok(again) = again else {
        tracing::error!(
            target: TRACING_TARGET, code = %rejection.code,
            "the renderer of refusals panicked; the refusal is rendered by default"
        );
        return None;
    };
    let (again, body) = again.into_parts();
    parts.status = again.status;
    parts.headers = rebased(&parts.headers, default.headers(), again.headers);
    parts.extensions.extend(again.extensions);
    Some(body)
}

/// `headers` as if the middlewares that have made them of `default` had made them of `again`.
fn rebased(headers: &HeaderMap, default: &HeaderMap, mut again: HeaderMap) -> HeaderMap {
    let is_default = |name: &HeaderName, value| default.get(name) == Some(value);
    for name in headers.keys() {
        // A middleware has replaced it.
        if !headers.get_all(name).iter().any(|value| is_default(name, value)) {
            again.remove(name);
        }
    }
    for (name, value) in headers {
        if !is_default(name, value) && !OF_THE_BODY.contains(name) {
            again.append(name.clone(), value.clone());
        }
    }
    again
}

#[cfg(feature = "axum")]
impl axum_core::response::IntoResponse for Rejection {
    fn into_response(self) -> axum_core::response::Response {
        respond_by_default(self).map(axum_core::body::Body::from)
    }
}

/// Headers that would be wrong for another body.
const OF_THE_BODY: [HeaderName; 3] =
    [header::CONTENT_ENCODING, header::CONTENT_LENGTH, header::TRANSFER_ENCODING];

/// The time in which a call is usually looked up.
const UNTIL_LOOKED_UP: Duration = Duration::from_secs(60);

const DOCUMENTATION: &str =
    "https://docs.rs/tower-idempotency/latest/tower_idempotency/rejection/enum.RejectionCode.html";
