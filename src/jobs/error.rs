//! Errors of attempts outside HTTP.

use crate::{error::StoreError, stored::response::UnreadableResponse};

/// An attempt could not be begun, or its end is not stored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IntentLogError {
    /// The store has failed. The end of an attempt may still be stored: further tries are made in
    /// the background.
    #[error("the store has failed")]
    Store(#[from] StoreError),
    /// The arguments cannot be written as JSON without ambiguity. Nothing was done.
    #[error("the arguments cannot be written as JSON without ambiguity")]
    Arguments,
    /// The stored result is damaged, or was stored by an unknown version. The work is not done
    /// again.
    #[error("the stored result cannot be read")]
    Unreadable(#[from] UnreadableResponse),
    /// The node is [draining](crate::IdempotencyHandle::drain). Nothing was done.
    #[error("the process is shutting down")]
    ShuttingDown,
    /// Another attempt or an operator has taken the record, and no result is stored.
    #[error("the attempt does not own its record any more")]
    Lost,
    /// The record is held instead: an intent or a phase contradicts an earlier attempt.
    #[error("an intent or a phase contradicts an earlier attempt; the key is held")]
    Held,
}
