//! Which results are stored, and what happens to an attempt that ends without a result.

use std::{fmt, sync::Arc};

use http::StatusCode;

/// What is done with the result of an attempt.
///
/// Put into a response's extensions by the handler or an inner layer, it overrides the [`ResultPolicy`] for that
/// response:
///
/// ```
/// # use tower_idempotency::Directive;
/// let mut response = http::Response::new("the upstream is busy, try again");
/// response.extensions_mut().insert(Directive::Release);
/// ```
///
/// A handler of axum returns `(Extension(Directive::Release), "the upstream is busy, try again")`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Directive {
    /// Store the response: every retry gets it.
    Store,
    /// Give the key back: a retry runs the handler again.
    Release,
    /// Keep the key and store nothing: retries get 409 `outcome-unknown` until an operator resolves the record.
    Hold,
}

/// What becomes of a record whose attempt ended without a result: its process died, the handler panicked or the inner
/// service failed, its response broke off, or it ran longer than `max_execution`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AbandonedAttempts {
    /// The next request with the key runs the handler again (at least once). After five attempts whose lease ran out,
    /// the record is held all the same.
    RunAgain,
    /// The record is held (at most once).
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

/// Which results are stored and replayed, and whether abandoned attempts run again.
///
/// | policy | stored | abandoned attempts |
/// |---|---|---|
/// | default | 2xx, 3xx, and 4xx except 401, 403, 407, 408, 421, 425, 429 | run again |
/// | [`at_most_once`](Self::at_most_once) | the same and 5xx; 408 holds the key | held |
/// | [`success_only`](Self::success_only) | 2xx and 3xx | run again |
///
/// What is not stored releases the key.
#[derive(Clone)]
pub struct ResultPolicy {
    classify: Arc<Classify>,
    abandoned: AbandonedAttempts,
}

impl ResultPolicy {
    /// Stores 5xx too and holds the key of an abandoned attempt: no request whose outcome is unknown runs again, its key
    /// waits for an operator. A 408 and an error of the inner service, which a time-out inside the layer answers, hold the
    /// key too. 401, 403, 407, 421, 425 and 429 still release it.
    #[must_use]
    pub fn at_most_once() -> Self {
        let classify = |status: StatusCode| match status {
            StatusCode::REQUEST_TIMEOUT => Directive::Hold,
            status if status.is_server_error() => Directive::Store,
            status => by_status(status),
        };
        Self::from_fn(classify).with_abandoned(AbandonedAttempts::Hold)
    }

    /// Stores 2xx and 3xx only.
    #[must_use]
    pub fn success_only() -> Self {
        Self::from_fn(|status| match status.is_success() || status.is_redirection() {
            true => Directive::Store,
            false => Directive::Release,
        })
    }

    /// Decides by a function of the status. Abandoned attempts run again.
    #[must_use]
    pub fn from_fn(classify: impl Fn(StatusCode) -> Directive + Send + Sync + 'static) -> Self {
        Self { classify: Arc::new(classify), abandoned: AbandonedAttempts::RunAgain }
    }

    /// Sets what becomes of abandoned attempts.
    #[must_use]
    pub fn with_abandoned(mut self, abandoned: AbandonedAttempts) -> Self {
        self.abandoned = abandoned;
        self
    }

    pub(crate) fn directive(&self, response: &http::response::Parts) -> Directive {
        let overridden = response.extensions.get::<Directive>().copied();
        overridden.unwrap_or_else(|| (self.classify)(response.status))
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

/// 4xx that say nothing about the request itself: who asks, or when.
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
        let parts = |status: u16| http::Response::builder().status(status).body(()).unwrap().into_parts().0;
        [101, 200, 204, 301, 304, 400, 401, 402, 403, 404, 407, 408, 409, 421, 422, 425, 429, 500, 503]
            .into_iter()
            .filter(|status| policy.directive(&parts(*status)) == Directive::Store)
            .collect()
    }

    #[test]
    fn presets_store_what_they_say() {
        assert_eq!(stored(&ResultPolicy::default()), [200, 204, 301, 304, 400, 402, 404, 409, 422]);
        assert_eq!(
            stored(&ResultPolicy::at_most_once()),
            [200, 204, 301, 304, 400, 402, 404, 409, 422, 500, 503]
        );
        assert_eq!(stored(&ResultPolicy::success_only()), [200, 204, 301, 304]);
    }

    #[test]
    fn a_directive_in_the_response_wins() {
        let mut parts = http::Response::new(()).into_parts().0;
        parts.extensions.insert(Directive::Hold);
        assert_eq!(ResultPolicy::default().directive(&parts), Directive::Hold);
    }
}
