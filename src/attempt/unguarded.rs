//! Requests that no attempt belongs to.

#[cfg(feature = "axum")]
use http::{Method, request::Parts};

#[cfg(feature = "axum")]
use crate::key::KEY_HEADER;
#[cfg(any(feature = "axum", feature = "sqlite", feature = "postgres"))]
use crate::{
    error::StoreErrorKind,
    redact::TRACING_TARGET,
    rejection::{Rejection, RejectionCode},
};

/// The reason why a request has no attempt. A layer that passes a request with a key leaves it in
/// the request's extensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unguarded {
    /// The request has no key.
    NoKey,
    /// The store is away, and the layer runs requests without protection.
    StoreAway,
    /// The layer is disabled.
    Disabled,
    /// The layer does not guard the method.
    OtherMethod,
    /// No layer has seen the request.
    #[cfg(feature = "axum")]
    NoLayer,
}

#[cfg(any(feature = "axum", feature = "sqlite", feature = "postgres"))]
impl Unguarded {
    /// The reason as far as the extensions tell it.
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    pub(crate) fn of(extensions: &http::Extensions) -> Self {
        extensions.get::<Self>().copied().unwrap_or(Self::NoKey)
    }

    #[cfg(feature = "axum")]
    pub(crate) fn of_request(parts: &Parts) -> Self {
        let mark = parts.extensions.get::<Self>().copied();
        let unseen = if parts.headers.contains_key(KEY_HEADER) { Self::NoLayer } else { Self::NoKey };
        mark.unwrap_or(unseen)
    }

    /// A handler that can do without an attempt runs.
    #[cfg(feature = "axum")]
    pub(crate) fn may_run(self, method: &Method) -> bool {
        match self {
            Self::NoKey | Self::StoreAway | Self::Disabled => true,
            Self::OtherMethod | Self::NoLayer => method.is_safe(),
        }
    }

    /// The refusal of a handler that needs an attempt.
    pub(crate) fn rejection(self) -> Rejection {
        let cause = match self {
            Self::NoKey => return Rejection::key_missing(),
            Self::StoreAway => return Rejection::of_store(StoreErrorKind::Unavailable),
            Self::Disabled => "the IdempotencyLayer is disabled: take an Option of the extractor",
            Self::OtherMethod => {
                "the IdempotencyLayer does not guard this method: add it with IdempotencyLayer::with_methods"
            }
            #[cfg(feature = "axum")]
            Self::NoLayer => {
                "no IdempotencyLayer is around the route, or a middleware has dropped the extensions of the \
                 request: call Router::layer after Router::route"
            }
        };
        tracing::error!(
            target: TRACING_TARGET,
            "a request with a key is not protected, and was refused: {cause}"
        );
        Rejection::new(
            RejectionCode::NotGuarded,
            "The request was not performed: it has an idempotency key, and the server does not protect it. \
             The server's log says why.",
        )
    }
}
