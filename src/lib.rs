//! A [Tower](https://docs.rs/tower) layer that makes an HTTP API safe to retry: a request with an
//! `Idempotency-Key` is performed once, and every retry gets the same answer.
//!
#![doc = include_str!("../assets/retry.svg")]
//!
#![doc = include_str!("guide/front_page.md")]
#![warn(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod attempt;
mod consumer;
mod duration;
mod error;
mod fingerprint;
#[cfg(test)]
#[path = "../tests/fuzz/targets.rs"]
mod fuzz;
mod handle;
mod head;
pub mod jobs;
mod key;
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

/// Errors that an application seldom names: of values that are refused where they are made, and of
/// a shutdown that took too long.
pub mod errors {
    pub use crate::{
        consumer::InvalidConsumer, fingerprint::InvalidPointer, handle::DrainTimedOut, key::InvalidKey,
    };
}

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
pub use jobs::IntentLog;
pub use key::{IdempotencyKey, KeySyntax};
pub use layer::IdempotencyLayer;
pub use node::{cache::ReplayCache, reaper::Reaper};
pub use policy::{Directive, ResultPolicy};
pub use recovery::{Lookup, Reconcile, Reconciler};
pub use rejection::{ProblemJson, Rejection, RejectionCode};
#[cfg(feature = "memory")]
pub use store::MemoryStore;
#[cfg(feature = "postgres")]
pub use store::PostgresStore;
#[cfg(feature = "sqlite")]
pub use store::SqliteStore;
pub use stored::{
    intent::{CallFailure, Intent, Resource, UpstreamKey},
    response::Representation,
};

/// The guide, one chapter a page.
#[cfg(any(doc, doctest))]
pub mod guide {
    #![doc = include_str!("guide/contents.md")]

    #[doc = include_str!("guide/why_retries_hurt.md")]
    pub mod why_retries_hurt {}
    #[doc = include_str!("guide/first_application.md")]
    pub mod first_application {}
    #[doc = include_str!("guide/which_tool.md")]
    pub mod which_tool {}
    #[doc = include_str!("guide/calling_a_provider.md")]
    pub mod calling_a_provider {}
    #[doc = include_str!("guide/transactions.md")]
    pub mod transactions {}
    #[doc = include_str!("guide/intents.md")]
    pub mod intents {}
    #[doc = include_str!("guide/recovery.md")]
    pub mod recovery {}
    #[doc = include_str!("guide/existing_application.md")]
    pub mod existing_application {}
    #[doc = include_str!("guide/testing.md")]
    pub mod testing {}
    #[doc = include_str!("guide/errors.md")]
    pub mod errors {}
    #[doc = include_str!("guide/your_apis_users.md")]
    pub mod your_apis_users {}
    #[doc = include_str!("guide/operating.md")]
    pub mod operating {}
    #[doc = include_str!("guide/settings.md")]
    pub mod settings {}
    #[doc = include_str!("guide/writing_a_store.md")]
    pub mod writing_a_store {}
    #[doc = include_str!("guide/proof.md")]
    pub mod proof {}
    #[doc = include_str!("guide/fault_runs.md")]
    pub mod fault_runs {}
    #[doc = include_str!("guide/cost.md")]
    #[doc = include_str!("guide/cost_tables.md")]
    #[doc = include_str!("guide/cost_plots.svg")]
    pub mod cost {}
    #[doc = include_str!("guide/intents_index.md")]
    pub mod intents_index {}
}

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
