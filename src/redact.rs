//! What may stand in logs, and where they go.

use std::fmt;

use bytes::Bytes;

use crate::key::IdempotencyKey;

/// Target of all `tracing` events.
pub(crate) const TRACING_TARGET: &str = "tower_idempotency";

/// Whether keys may stand in logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KeyLogging {
    /// Keys are logged as the clients sent them; derived ones as `[redacted]`. The default.
    Plain,
    /// Keys are logged as `[redacted]`. sqlx has a log of its own, the target `sqlx`: the statement that rolls a
    /// transaction of a handler back on PostgreSQL holds consumer and key in hexadecimal.
    Redacted,
}

impl KeyLogging {
    /// A key as it may stand in logs.
    pub(crate) fn shown(self, key: &IdempotencyKey) -> &str {
        match self {
            Self::Plain if !key.is_derived() => key.as_str(),
            Self::Plain | Self::Redacted => "[redacted]",
        }
    }
}

/// Stands in for bytes of a response in what [`Debug`](fmt::Debug) shows.
pub(crate) struct Length<'a>(pub(crate) &'a Bytes);

impl fmt::Debug for Length<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}
