#![doc = include_str!("docs/crate.md")]
#![doc = include_str!("docs/intents_index.md")]
#![warn(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod answer;
mod backoff;
mod body;
mod buffer;
mod closing;
mod completer;
mod consumer;
mod encoding;
mod error;
mod execution;
mod fingerprint;
mod future;
mod guarded;
mod handle;
mod idempotency;
mod intent;
mod intent_log;
mod kept_request;
mod key;
mod layer;
mod metrics;
mod policy;
mod reaper;
mod reconciler;
mod record;
mod rejection;
mod renewal;
mod representation;
mod resent;
mod response;
mod running;
mod service;
mod settings;
mod shared;
pub mod store;
mod structured_field;
mod transaction;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod tx;

pub use body::{RequestBody, ResponseBody};
pub use completer::{Completer, CompleterPass, Refused, Restore};
pub use consumer::{Consumer, ConsumerExtractor, InvalidConsumer};
pub use error::{StoreError, StoreErrorKind};
pub use fingerprint::{Fingerprint, Fingerprinter, InvalidPointer};
pub use future::ResponseFuture;
pub use handle::{DrainTimedOut, IdempotencyHandle};
pub use idempotency::Idempotency;
#[cfg(feature = "axum")]
pub use idempotency::MissingIdempotency;
pub use intent::{
    CallFailure, CallId, Intent, IntentBuilder, IntentCounts, IntentError, IntentFence, IntentFilter,
    IntentResolution, IntentState, IntentUpdate, OpenIntent, OpenOutcome, Opened, Opening,
    ResolveIntentOutcome, Resource, UpstreamKey,
};
pub use intent_log::{IntentLog, IntentLogError, LogAttempt, LogOutcome};
pub use kept_request::{KeptRequest, KeptRequests, RequestUpdate, UnreadableRequest};
pub use key::{IdempotencyKey, InvalidKey, KeySyntax};
pub use layer::IdempotencyLayer;
pub use policy::{AbandonedAttempts, Directive, ResultPolicy};
pub use reaper::Reaper;
pub use reconciler::{Lookup, Reconcile, Reconciler, ReconcilerPass};
pub use record::{
    Attempt, AttemptId, Claim, ClaimOutcome, CompleteOutcome, Fenced, Record, RecordFilter, RecordId,
    RecordState, RenewOutcome, Renewal, Resolution, ResolveOutcome,
};
pub use rejection::{OriginalResponse, ProblemJson, Rejection, RejectionCode, RenderRejection};
pub use representation::{RenderRepresentation, Representation, StoredRepresentation};
pub use response::{StoredBody, StoredResponse, UnreadableResponse};
pub use service::IdempotencyService;
pub use settings::{KeyLogging, StoreOutage};
#[cfg(feature = "memory")]
pub use store::MemoryStore;
#[cfg(feature = "postgres")]
pub use store::PostgresStore;
#[cfg(feature = "sqlite")]
pub use store::SqliteStore;
pub use store::{IntoStore, RecoveryStore, Store};
pub use transaction::{
    IsolationLevel, StoreTransaction, TransactionError, TransactionErrorKind, TransactionLimits,
    TransactionOptions, TransactionUsage,
};
#[cfg(any(feature = "sqlite", feature = "postgres"))]
pub use tx::{Tx, TxError};

/// Target of all `tracing` events.
const TRACING_TARGET: &str = "tower_idempotency";

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
