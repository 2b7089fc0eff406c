//! Errors of stores.

use std::error::Error as StdError;

pub(crate) type BoxError = Box<dyn StdError + Send + Sync>;

/// A store could not carry out a call.
///
/// [`kind`](Self::kind) says what is known about the effect. [`source`](StdError::source) holds the
/// cause.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct StoreError {
    kind: StoreErrorKind,
    message: String,
    source: Option<BoxError>,
}

/// The effect of a failed call, as far as it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreErrorKind {
    /// The store could not be reached, is full, or asked to come back later. Nothing was done; a
    /// retry makes sense.
    Unavailable,
    /// The call was sent and its reply was lost. It may have been done: repeat it, or undo it.
    Ambiguous,
    /// A table, a right or a setting is missing. Nothing was done, and only an operator can help.
    /// The message says what to do.
    Misconfigured,
    /// The store gave an answer that should not happen. Nothing was done.
    Internal,
}

impl StoreError {
    /// Makes an error of this kind. The message says what was tried and, if possible, what to do.
    pub fn new(kind: StoreErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// Adds the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Makes the error of one call from that of several.
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    pub(crate) fn shared(error: &std::sync::Arc<Self>) -> Self {
        Self::new(error.kind, error.message.clone()).with_source(std::sync::Arc::clone(error))
    }

    /// The effect of the call, as far as it is known.
    #[must_use]
    pub fn kind(&self) -> StoreErrorKind {
        self.kind
    }

    /// Returns `true` if the same call may succeed later, without the help of an operator.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(self.kind, StoreErrorKind::Unavailable | StoreErrorKind::Ambiguous)
    }
}
