//! What a handler learns about its attempt.

use std::{
    fmt,
    sync::{Arc, OnceLock},
};

use http::Extensions;
use tokio_util::sync::CancellationToken;

use crate::{
    attempt::{error::IntentError, intent::IntentBuilder, progress::Progress},
    consumer::Consumer,
    key::IdempotencyKey,
    layer::settings::Settings,
    node::Node,
    store::transaction::{StoreTransaction, TransactionUsage},
    stored::record::{Attempt, AttemptId, RecordId},
};

/// The attempt that a handler runs for: in the request's extensions, and with the feature `axum` an extractor.
///
/// ```
/// # #[cfg(feature = "axum")] {
/// use tower_idempotency::Idempotency;
///
/// async fn create_charge(idempotency: Idempotency) -> String {
///     format!("attempt {} of {}", idempotency.attempt_number(), idempotency.key())
/// }
/// # }
/// ```
///
/// `Option<Idempotency>` is `None` for a request without a key. Task-locals of the caller do not reach the handler,
/// which runs in a task of its own; the request's extensions and the current tracing span do.
#[derive(Clone)]
pub struct Idempotency(Arc<Inner>);

struct Inner {
    node: Arc<Node>,
    attempt: Attempt,
    record_id: RecordId,
    attempt_number: u32,
    cancelled: CancellationToken,
    settings: Arc<Settings>,
    progress: Arc<Progress>,
    offered: OnceLock<Offered>,
}

/// In the extensions of a request with a key that runs without protection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unprotected;

/// What the store offers an attempt.
struct Offered {
    transaction: Option<Arc<dyn StoreTransaction>>,
    /// What it has put into the extensions of the request.
    #[cfg_attr(not(any(feature = "sqlite", feature = "postgres")), expect(dead_code))]
    extensions: Extensions,
}

impl Idempotency {
    pub(crate) fn new(
        node: &Arc<Node>,
        settings: &Arc<Settings>,
        attempt: Attempt,
        record_id: RecordId,
        attempt_number: u32,
        cancelled: CancellationToken,
        progress: Arc<Progress>,
    ) -> Self {
        Self(Arc::new(Inner {
            node: Arc::clone(node),
            attempt,
            record_id,
            attempt_number,
            cancelled,
            settings: Arc::clone(settings),
            progress,
            offered: OnceLock::new(),
        }))
    }

    /// The key, decoded.
    #[must_use]
    pub fn key(&self) -> &IdempotencyKey {
        &self.0.attempt.key
    }

    /// The consumer that the key belongs to.
    #[must_use]
    pub fn consumer(&self) -> &Consumer {
        &self.0.attempt.consumer
    }

    /// The record's id: the same over attempts that took over from one whose lease ran out, or that was released and on
    /// whose record an intent or a finished phase hangs.
    ///
    /// **A result that is not stored (5xx, panic, [`Directive::Release`](crate::Directive::Release)) ends a record without
    /// intents and finished phases: the retry gets a new id and attempt number 1.** To call others idempotently use
    /// [`intent`](Self::intent).
    #[must_use]
    pub fn record_id(&self) -> RecordId {
        self.0.record_id
    }

    /// The id of this attempt: random, for fencing what the handler writes elsewhere.
    #[must_use]
    pub fn attempt_id(&self) -> AttemptId {
        self.0.attempt.id
    }

    /// 1 for the first attempt of a record. It is 1 again after a 5xx, a panic or another released result of a request
    /// without intents and finished phases, so it does not tell whether the handler ran before.
    #[must_use]
    pub fn attempt_number(&self) -> u32 {
        self.0.attempt_number
    }

    /// Completes when the attempt should come to its end: its lease was lost, so that its result will be discarded,
    /// or nine tenths of `max_execution` are over.
    pub async fn cancelled(&self) {
        self.0.cancelled.cancelled().await;
    }

    /// Whether [`cancelled`](Self::cancelled) has completed.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.is_cancelled()
    }

    /// A call to the upstream service that `name` stands for. It is persisted before it is made, and its outcome after it: a
    /// later attempt of the request gets the outcome, without the call.
    ///
    /// The name, 1 to 255 bytes, is part of the key that the call is sent with. Do not change it while requests may be
    /// retried.
    ///
    /// Make calls before the handler begins its transaction (`Tx`), which has the record locked: an intent is refused
    /// after that ([`IntentError::Misused`]).
    ///
    /// Needs a store that keeps intents: SQLite or PostgreSQL.
    pub fn intent(&self, name: impl Into<String>) -> IntentBuilder {
        IntentBuilder::new(self.clone(), name.into())
    }

    /// Once, when the attempt begins.
    pub(crate) fn offer(&self, transaction: Option<Arc<dyn StoreTransaction>>, extensions: Extensions) {
        let _ = self.0.offered.set(Offered { transaction, extensions });
    }

    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    pub(crate) fn offered(&self) -> Option<&Extensions> {
        self.0.offered.get().map(|offered| &offered.extensions)
    }

    /// The transaction has the record locked, which an intent changes.
    pub(crate) fn refuse_inside_transaction(&self) -> Result<(), IntentError> {
        if self.transaction_is_open() {
            return Err(IntentError::Misused(
                "after the handler's transaction has begun an intent or a phase would wait for it: they come before Tx::begin",
            ));
        }
        Ok(())
    }

    /// Whoever changes the record waits for this attempt.
    pub(crate) fn has_its_record_locked(&self) -> bool {
        self.transaction_is_open() || self.progress().is_phase_open()
    }

    fn transaction_is_open(&self) -> bool {
        let transaction = self.0.offered.get().and_then(|offered| offered.transaction.as_ref());
        let usage = transaction.map(|transaction| transaction.usage());
        matches!(usage, Some(TransactionUsage::Open | TransactionUsage::InUse))
    }

    pub(crate) fn attempt(&self) -> &Attempt {
        &self.0.attempt
    }

    pub(crate) fn node(&self) -> &Arc<Node> {
        &self.0.node
    }

    pub(crate) fn progress(&self) -> &Arc<Progress> {
        &self.0.progress
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.0.settings
    }

    /// Whether the attempt belongs to this store, so that an inner layer over it passes the request through.
    pub(crate) fn is_of(&self, node: &Arc<Node>) -> bool {
        Arc::ptr_eq(&self.0.node, node)
    }
}

impl fmt::Debug for Idempotency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Idempotency")
            .field("attempt", &self.0.attempt)
            .field("attempt_number", &self.0.attempt_number)
            .finish_non_exhaustive()
    }
}

#[cfg(feature = "axum")]
mod extract {
    use axum_core::extract::{FromRequestParts, OptionalFromRequestParts};
    use http::request::Parts;

    use super::Idempotency;
    use crate::rejection::{Rejection, RejectionCode};

    /// 400 `key-missing` if the request has no key or no [`IdempotencyLayer`](crate::IdempotencyLayer) guards the route.
    impl<S: Sync> FromRequestParts<S> for Idempotency {
        type Rejection = Rejection;

        async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Rejection> {
            parts.extensions.get::<Self>().cloned().ok_or_else(|| {
                Rejection::new(
                    RejectionCode::KeyMissing,
                    "This operation needs an idempotency key, or is not guarded by an idempotency layer.",
                )
            })
        }
    }

    impl<S: Sync> OptionalFromRequestParts<S> for Idempotency {
        type Rejection = std::convert::Infallible;

        async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Option<Self>, Self::Rejection> {
            Ok(parts.extensions.get::<Self>().cloned())
        }
    }
}
