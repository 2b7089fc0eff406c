#![warn(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

mod consumer;
mod error;
mod fingerprint;
mod key;
mod record;
mod response;
pub mod store;
mod structured_field;

pub use consumer::{Consumer, ConsumerExtractor, InvalidConsumer};
pub use error::{StoreError, StoreErrorKind};
pub use fingerprint::{Fingerprint, Fingerprinter, InvalidPointer};
pub use key::{IdempotencyKey, InvalidKey, KeySyntax};
pub use record::{
    Attempt, AttemptId, Claim, ClaimOutcome, CompleteOutcome, Fenced, Record, RecordFilter, RecordId, RecordState,
    RenewOutcome, Renewal, Resolution, ResolveOutcome,
};
pub use response::{StoredBody, StoredResponse, UnreadableResponse};
#[cfg(feature = "memory")]
pub use store::MemoryStore;
#[cfg(feature = "postgres")]
pub use store::PostgresStore;
#[cfg(feature = "sqlite")]
pub use store::SqliteStore;
pub use store::{IntoStore, Store};
