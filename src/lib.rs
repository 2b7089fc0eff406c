#![doc = include_str!("docs/crate.md")]
#![doc = include_str!("docs/intents_index.md")]
#![warn(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod attempt;
pub mod consumer;
mod error;
pub mod fingerprint;
pub mod handle;
pub mod jobs;
pub mod key;
pub mod layer;
mod metrics;
mod node;
mod policy;
pub mod recovery;
mod redact;
pub mod rejection;
mod retry;
pub mod store;
mod stored;

/// Calls to upstream services: what handlers build and what operators see.
pub mod intent {
    pub use crate::{
        attempt::{
            error::IntentError,
            intent::{IntentBuilder, OpenIntent, Opened},
        },
        handle::{IntentResolution, ResolveIntentOutcome},
        stored::intent::{
            CallFailure, Intent, IntentCounts, IntentFilter, IntentState, Resource, UpstreamKey,
        },
    };
}

pub use attempt::{error::IntentError, idempotency::Idempotency, settings::TransactionOptions};
#[cfg(any(feature = "sqlite", feature = "postgres"))]
pub use attempt::{tx::Tx, tx_error::TxError};
pub use consumer::{Consumer, ConsumerExtractor};
pub use error::StoreError;
pub use fingerprint::Fingerprinter;
pub use handle::IdempotencyHandle;
pub use jobs::{IntentLog, LogOutcome};
pub use key::{IdempotencyKey, KeySyntax};
pub use layer::{IdempotencyLayer, KeptRequests, StoreOutage};
pub use node::reaper::Reaper;
pub use policy::{AbandonedAttempts, Directive, ResultPolicy};
pub use recovery::{Completer, Lookup, Reconcile, Reconciler, Restore};
pub use redact::KeyLogging;
pub use rejection::{ProblemJson, Rejection, RejectionCode};
pub use store::IsolationLevel;
#[cfg(feature = "memory")]
pub use store::MemoryStore;
#[cfg(feature = "postgres")]
pub use store::PostgresStore;
#[cfg(feature = "sqlite")]
pub use store::SqliteStore;
pub use stored::{
    intent::{CallFailure, Intent, Resource, UpstreamKey},
    response::{Representation, StoredRepresentation},
};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
