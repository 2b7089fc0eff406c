//! Decides which results are stored, and how a record continues after an attempt without a result.

use std::{fmt, sync::Arc};

use http::StatusCode;

/// The choice of what to do with the response of an attempt.
///
/// A handler or an inner layer puts it into the response's extensions. It then overrides the
/// [`ResultPolicy`] for that response:
///
/// ```
/// # use tower_idempotency::Directive;
/// let mut response = http::Response::new("the upstream is busy, try again");
/// response.extensions_mut().insert(Directive::Release);
/// ```
///
/// An axum handler returns `(Extension(Directive::Release), "the upstream is busy, try again")`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Directive {
    /// Stores the response. Every retry gets it.
    Store,
    /// Releases the key. A retry runs the handler again. The body is passed on as it is made, and a
    /// retry may run meanwhile.
    Release,
    /// Holds the key and stores nothing. The body is passed on as it is made. Retries get 409
    /// `outcome-unknown` until an operator resolves the record.
    Hold,
}

/// The choice of what to do with a record whose attempt ended without a result.
///
/// An attempt ends without a result when its process dies, when the handler panics, when the inner
/// service fails, when the response breaks off, or when it runs longer than `max_execution`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AbandonedAttempts {
    /// The next request with the key runs the handler again (at least once).
    ///
    /// If the leases of five attempts run out, the record is held: a request that kills its process
    /// is not run for ever.
    RunAgain,
    /// The record is held until an operator resolves it (at most once).
    Hold,
}

impl AbandonedAttempts {
    /// How many leases may run out before a record is held.
    pub(crate) fn limit(self) -> u16 {
        match self {
            Self::RunAgain => 5,
            Self::Hold => 1,
        }
    }
}

type Classify = dyn Fn(StatusCode) -> Directive + Send + Sync;

/// Decides by the status which responses are stored and replayed, and whether abandoned attempts
/// run again.
///
/// | policy | stored | abandoned attempts |
/// |---|---|---|
/// | default | 2xx, 3xx, and 4xx except 401, 403, 407, 408, 421, 425, 429 | run again |
/// | [`at_most_once`](Self::at_most_once) | the same and 5xx; 408 holds the key | held |
/// | [`success_only`](Self::success_only) | 2xx and 3xx | run again |
///
/// 307 and 308 are not stored, nor are other [responses that are no
/// results](#responses-that-are-no-results). A response that is not stored releases the key, and a
/// retry runs the handler again. The status codes are those of [RFC 9110].
///
/// # Responses that are no results
///
/// Some responses release the key under every policy, because no handler has performed the request.
/// A [`Directive`] in the response overrides this for all but refusals.
///
/// * **307 and 308** ask for this very request elsewhere. A 1xx is no final response.
/// * **A missing route.** A 404 is a handler's own if axum had matched a route before the request
///   came to the layer, as it has for `Router::layer` and `MethodRouter::layer`. Any other 404, and
///   every 405 and 501, is a handler's own if the inner service has read the request's body or used
///   a transaction, an intent or a phase. The rest is the answer of a router without the route, on
///   a node that is not updated yet.
/// * **Admission control inside the layer.** An error of the inner service's `poll_ready`, and the
///   error of `tower::load_shed`. A 429 or 503 that the inner service answers without waiting for
///   anything and without reading the request's body, which is not empty. If its layers wait before
///   they turn a request away, or requests have no body, let their error handler say
///   `Directive::Release`: with `at_most_once` a 503 is stored otherwise. A handler that does its
///   work without a single await, does not read the body and answers 503 says `Directive::Store`.
/// * **Refusals** of this layer, or of another one inside it. If a handler has run, with
///   `at_most_once` they hold the key after its panic, time-out or second run. A handler that has
///   done something which the layer does not know, and answers with a [`TxError`](crate::TxError)
///   or an [`IntentError`](crate::IntentError), says `Directive::Hold` where it must not run again.
///   A refusal is not stored by `Directive::Store`.
///
/// # gRPC
///
/// A response whose content type is `application/grpc` or `application/grpc-web` is judged by its
/// `grpc-status`, in the headers or the trailers. The policy sees the HTTP status that stands for
/// it, as does the function of [`from_fn`](Self::from_fn), and so do transactions:
///
/// | gRPC status | HTTP status |
/// |---|---|
/// | `OK` | 200 |
/// | `INVALID_ARGUMENT`, `FAILED_PRECONDITION`, `OUT_OF_RANGE` | 400 |
/// | `UNAUTHENTICATED` | 401 |
/// | `PERMISSION_DENIED` | 403 |
/// | `NOT_FOUND` | 404 |
/// | `CANCELLED`, which servers answer when a call has timed out | 408 |
/// | `ALREADY_EXISTS` | 409 |
/// | `RESOURCE_EXHAUSTED` | 429 |
/// | `UNKNOWN`, `INTERNAL`, `DATA_LOSS` | 500 |
/// | `UNIMPLEMENTED` | 501 |
/// | `UNAVAILABLE`, `ABORTED` | 503 |
/// | `DEADLINE_EXCEEDED` | 504 |
///
/// A response without a `grpc-status` counts as broken off. One that is too large or too slow to be
/// collected counts as `OK`, because its status is still to come.
///
/// ```
/// # use tower_idempotency::{IdempotencyLayer, MemoryStore, ResultPolicy};
/// let layer = IdempotencyLayer::new(MemoryStore::new())
///     .with_policy(ResultPolicy::at_most_once());
/// ```
///
/// [RFC 9110]: https://www.rfc-editor.org/rfc/rfc9110#name-status-codes
#[derive(Clone)]
pub struct ResultPolicy {
    classify: Arc<Classify>,
    abandoned: AbandonedAttempts,
}

impl ResultPolicy {
    /// Stores 5xx too, and holds the key of an abandoned attempt.
    ///
    /// Use it where a second execution is worse than none. A request whose outcome is unknown never
    /// runs again: its key waits until an operator resolves it. A 408 and an error of the inner
    /// service hold the key too, because a time-out inside the layer ends in one of them. 401, 403,
    /// 407, 421, 425, 429 and [responses that are no results](Self#responses-that-are-no-results)
    /// release the key as usual.
    #[must_use]
    pub fn at_most_once() -> Self {
        let classify = |status: StatusCode| match status {
            // A time-out inside the layer answers so, and the handler may have done its work by then.
            StatusCode::REQUEST_TIMEOUT => Directive::Hold,
            status if status.is_server_error() => Directive::Store,
            status => by_status(status),
        };
        Self::from_fn(classify).with_abandoned(AbandonedAttempts::Hold)
    }

    /// Stores 2xx, and 3xx except 307 and 308. A request that was refused runs again when it is
    /// retried.
    #[must_use]
    pub fn success_only() -> Self {
        Self::from_fn(|status| match status.is_success() || status.is_redirection() {
            true => Directive::Store,
            false => Directive::Release,
        })
    }

    /// Decides by a function of the status. Abandoned attempts run again. The function is not asked
    /// about [responses that are no results](Self#responses-that-are-no-results).
    ///
    /// ```
    /// # use tower_idempotency::{Directive, ResultPolicy};
    /// let policy = ResultPolicy::from_fn(|status| match status.is_server_error() {
    ///     true => Directive::Release,
    ///     false => Directive::Store,
    /// });
    /// ```
    #[must_use]
    pub fn from_fn(classify: impl Fn(StatusCode) -> Directive + Send + Sync + 'static) -> Self {
        Self { classify: Arc::new(classify), abandoned: AbandonedAttempts::RunAgain }
    }

    /// Decides how a record continues after an abandoned attempt. Default:
    /// [`RunAgain`](AbandonedAttempts::RunAgain), and [`Hold`](AbandonedAttempts::Hold) for
    /// [`at_most_once`](Self::at_most_once).
    ///
    /// ```
    /// # use tower_idempotency::{ResultPolicy, layer::AbandonedAttempts};
    /// let policy = ResultPolicy::default().with_abandoned(AbandonedAttempts::Hold);
    /// ```
    #[must_use]
    pub fn with_abandoned(mut self, abandoned: AbandonedAttempts) -> Self {
        self.abandoned = abandoned;
        self
    }

    /// Decides on a response without a directive of its own, which is judged by this status.
    pub(crate) fn directive(&self, status: StatusCode) -> Directive {
        match status {
            // They ask for this very request elsewhere.
            StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT => Directive::Release,
            status if status.is_informational() => Directive::Release,
            status => (self.classify)(status),
        }
    }

    pub(crate) fn abandoned(&self) -> AbandonedAttempts {
        self.abandoned
    }
}

impl Default for ResultPolicy {
    fn default() -> Self {
        Self::from_fn(by_status)
    }
}

impl fmt::Debug for ResultPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResultPolicy").field("abandoned", &self.abandoned).finish_non_exhaustive()
    }
}

/// Releases after a 4xx that is about the client or the moment and not about the request.
fn by_status(status: StatusCode) -> Directive {
    match status.as_u16() {
        401 | 403 | 407 | 408 | 421 | 425 | 429 => Directive::Release,
        200..=499 => Directive::Store,
        _ => Directive::Release,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(policy: &ResultPolicy) -> Vec<u16> {
        let statuses = [
            101, 200, 204, 301, 303, 304, 307, 308, 400, 401, 402, 403, 404, 407, 408, 409, 421, 422, 425,
            429, 500, 503,
        ];
        let is_stored =
            |status: &u16| policy.directive(StatusCode::from_u16(*status).unwrap()) == Directive::Store;
        statuses.into_iter().filter(is_stored).collect()
    }

    #[test]
    fn presets_store_what_they_say() {
        assert_eq!(stored(&ResultPolicy::default()), [200, 204, 301, 303, 304, 400, 402, 404, 409, 422]);
        assert_eq!(
            stored(&ResultPolicy::at_most_once()),
            [200, 204, 301, 303, 304, 400, 402, 404, 409, 422, 500, 503]
        );
        assert_eq!(stored(&ResultPolicy::success_only()), [200, 204, 301, 303, 304]);
    }

    #[test]
    fn no_function_stores_what_asks_for_the_request_elsewhere() {
        let policy = ResultPolicy::from_fn(|_| Directive::Store);
        for status in
            [StatusCode::SWITCHING_PROTOCOLS, StatusCode::TEMPORARY_REDIRECT, StatusCode::PERMANENT_REDIRECT]
        {
            assert_eq!(policy.directive(status), Directive::Release);
        }
    }
}
