//! The handler's view of its attempt.

use std::{fmt, sync::Arc};

use crate::{
    attempt::{Facts, error::IntentError, intent::IntentBuilder},
    consumer::Consumer,
    key::IdempotencyKey,
    node::Node,
    store::transaction::TransactionUsage,
    stored::record::{AttemptId, RecordId},
};

/// The attempt that a handler runs for. It is in the request's extensions, and with the feature `axum` an
/// extractor.
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
/// `Option<Idempotency>` is `None` for a request without a key. The handler runs in a task of its own:
/// the request's extensions and the current tracing span reach it, task-locals of the caller do not.
#[derive(Clone)]
pub struct Idempotency {
    pub(crate) facts: Arc<Facts>,
}

/// In the extensions of a request with a key that runs without protection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unprotected;

impl Idempotency {
    pub(super) fn of(facts: &Arc<Facts>) -> Self {
        Self { facts: Arc::clone(facts) }
    }

    /// The key, decoded.
    #[must_use]
    pub fn key(&self) -> &IdempotencyKey {
        &self.facts.attempt.key
    }

    /// The consumer that the key belongs to.
    #[must_use]
    pub fn consumer(&self) -> &Consumer {
        &self.facts.attempt.consumer
    }

    /// The record's id: the same over attempts that took over from one whose lease ran out, or that was released and on
    /// whose record an intent or a finished phase hangs.
    ///
    /// **A result that is not stored (5xx, panic, [`Directive::Release`](crate::Directive::Release)) ends a record without
    /// intents and finished phases: the retry gets a new id and attempt number 1.** To call others idempotently use
    /// [`intent`](Self::intent).
    #[must_use]
    pub fn record_id(&self) -> RecordId {
        self.facts.record_id
    }

    /// The id of this attempt: random, for fencing what the handler writes elsewhere.
    #[must_use]
    pub fn attempt_id(&self) -> AttemptId {
        self.facts.attempt.id
    }

    /// 1 for the first attempt of a record. It is 1 again after a 5xx, a panic or another released result of a request
    /// without intents and finished phases, so it does not tell whether the handler ran before.
    #[must_use]
    pub fn attempt_number(&self) -> u32 {
        self.facts.attempt_number
    }

    /// Completes when the attempt should come to its end: its lease was lost, so that its result will be discarded,
    /// or nine tenths of `max_execution` are over.
    pub async fn cancelled(&self) {
        self.facts.cancelled.cancelled().await;
    }

    /// Whether [`cancelled`](Self::cancelled) has completed.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.facts.cancelled.is_cancelled()
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
        self.transaction_is_open() || self.facts.progress.is_phase_open()
    }

    fn transaction_is_open(&self) -> bool {
        let usage = self.facts.transaction.as_ref().map(|transaction| transaction.usage());
        matches!(usage, Some(TransactionUsage::Open | TransactionUsage::InUse))
    }

    /// Whether the attempt belongs to this store, so that an inner layer over it passes the request through.
    pub(crate) fn is_of(&self, node: &Arc<Node>) -> bool {
        Arc::ptr_eq(&self.facts.node, node)
    }
}

impl fmt::Debug for Idempotency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Idempotency")
            .field("attempt", &self.facts.attempt)
            .field("attempt_number", &self.facts.attempt_number)
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
