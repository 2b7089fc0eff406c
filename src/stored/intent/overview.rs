//! Lists and counts of intents.

use std::time::Duration;

use crate::stored::record::RecordId;

/// Selects the intents to list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "a store must handle every one")]
pub enum IntentFilter {
    /// Open intents, the oldest first.
    Open,
    /// Open intents past their grace period, the oldest first.
    Dangling,
    /// Intents that wait for an operator, the oldest first.
    NeedsAttention,
    /// Dead intents, the newest first.
    Dead,
    /// The intents of a record in every state, the oldest first.
    OfRecord(RecordId),
}

/// The numbers of intents that are not settled or that need attention.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct IntentCounts {
    /// Open intents, also those whose call is being made.
    pub open: u64,
    /// Open intents past their grace period.
    pub dangling: u64,
    /// Intents that wait for an operator.
    pub need_attention: u64,
    /// The time since the oldest open intent was first opened.
    pub oldest: Option<Duration>,
}

/// The intents of one name whose look-up is overdue.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Overlooked {
    /// The name of the intents.
    pub name: String,
    /// The number of intents.
    pub intents: u64,
}

impl Overlooked {
    /// Makes the count of this name.
    #[must_use]
    pub fn new(name: impl Into<String>, intents: u64) -> Self {
        Self { name: name.into(), intents }
    }
}
