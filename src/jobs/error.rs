//! Why an attempt could not be begun or ended.

use crate::{error::StoreError, stored::response::UnreadableResponse};

/// An attempt could not be begun, or its end is not stored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IntentLogError {
    /// The store has failed. At the end of an attempt the end may be stored after all: it is tried on in the background.
    #[error("the store has failed")]
    Store(#[from] StoreError),
    /// The arguments cannot be written as JSON without ambiguity. Nothing was done.
    #[error("the arguments cannot be written as JSON without ambiguity")]
    Arguments,
    /// The stored result is damaged, or was stored by an unknown version. It is not worked out again.
    #[error("the stored result cannot be read")]
    Unreadable(#[from] UnreadableResponse),
    /// [`drain`](crate::IdempotencyHandle::drain) was called. Nothing was done.
    #[error("the process is shutting down")]
    ShuttingDown,
    /// The attempt does not own its record any more, and no result is stored: another attempt or an operator has taken it.
    #[error("the attempt does not own its record any more")]
    Lost,
    /// The record is held instead: an intent or a phase contradicts an earlier attempt.
    #[error("an intent or a phase contradicts an earlier attempt; the key is held")]
    Held,
}
