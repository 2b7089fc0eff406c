//! The kinds of refusals.

use std::fmt;

use http::StatusCode;

use crate::error::StoreErrorKind;

macro_rules! rejection_codes {
    ($(
        $(#[$doc:meta])*
        $variant:ident => $code:literal, $status:ident, $retryable:literal, $title:literal;
    )*) => {
        /// The kinds of [`Rejection`](super::Rejection). The text form
        /// ([`as_str`](Self::as_str)) is the `code` of the problem document.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum RejectionCode {
            $(
                $(#[$doc])*
                #[doc = concat!("\n\nCode `", $code, "`, status ", stringify!($status), ".")]
                $variant,
            )*
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

            pub(super) fn is_retryable(self) -> bool {
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
    /// Retryable if only the outcome of a call to an upstream service is unknown: it may be found
    /// out.
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
