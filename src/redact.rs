//! Decides what logs may show, and where they go.

use std::{fmt, future::Future};

use bytes::Bytes;
use tokio_util::either::Either;
use tracing::{
    Instrument, dispatcher,
    instrument::{Instrumented, WithDispatch, WithSubscriber},
    subscriber::NoSubscriber,
};

use crate::key::IdempotencyKey;

/// Target of all `tracing` events.
pub(crate) const TRACING_TARGET: &str = "tower_idempotency";

/// Decides whether logs show keys.
///
/// ```
/// # use tower_idempotency::{IdempotencyLayer, MemoryStore, layer::KeyLogging};
/// let layer = IdempotencyLayer::new(MemoryStore::new())
///     .with_key_logging(KeyLogging::Redacted);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KeyLogging {
    /// Logs show keys as the clients sent them, and derived keys as `[redacted]`. The default.
    Plain,
    /// Logs show every key as `[redacted]`.
    ///
    /// sqlx has a log of its own, with the target `sqlx`. On PostgreSQL it shows the statement that
    /// rolls back the transaction of a handler, with consumer and key in hexadecimal. Turn that
    /// target off too.
    Redacted,
}

impl KeyLogging {
    /// The key as logs may show it.
    pub(crate) fn shown(self, key: &IdempotencyKey) -> &str {
        match self {
            Self::Plain if !key.is_derived() => key.as_str(),
            Self::Plain | Self::Redacted => "[redacted]",
        }
    }
}

/// Shows the length of secret bytes in [`Debug`](fmt::Debug), and none of them.
pub(crate) struct Length<'a>(pub(crate) &'a Bytes);

impl fmt::Debug for Length<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// Work with the subscriber that was current where it was made, if there was one.
pub(crate) type Subscribed<F> = Either<WithDispatch<F>, F>;
/// Work with the span and the subscriber that were current where it was made.
pub(crate) type Traced<F> = Subscribed<Instrumented<F>>;

/// Lets the span and the subscriber of the caller travel with work into another task.
#[inline]
pub(crate) fn traced<F: Future>(work: F) -> Traced<F> {
    subscribed(work.in_current_span())
}

/// Lets the subscriber of the caller travel with work into another task, without the span. Where
/// there is no subscriber, a global one that is set later gets the events.
#[inline]
pub(crate) fn subscribed<F: Future>(work: F) -> Subscribed<F> {
    let current = dispatcher::get_default(|current| (!current.is::<NoSubscriber>()).then(|| current.clone()));
    match current {
        Some(current) => Either::Left(work.with_subscriber(current)),
        None => Either::Right(work),
    }
}
