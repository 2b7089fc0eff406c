//! The handler's view of its attempt.

use std::{fmt, sync::Arc};

use http::Extensions;

use crate::{
    attempt::{Facts, error::IntentError, run::RequestCopy},
    consumer::Consumer,
    key::IdempotencyKey,
    node::Node,
    rejection::RejectionCode,
    store::transaction::TransactionUsage,
    stored::record::{AttemptId, RecordId},
};

/// The attempt that a handler runs for. It is in the request's extensions, and with the feature
/// `axum` an extractor.
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
/// `Option<Idempotency>` is `None` for a request without a key.
///
/// An attempt runs the handler once. Its intents, phases and transaction belong to the first run
/// that uses one of them. A second run, by a retry inside the layer, is refused (500, never
/// stored): retry outside the layer or in the client. The extractor tells the runs apart. A handle
/// taken out of the request's extensions cannot. The handler runs in a task of its
/// own: the request's extensions and the current tracing span reach it, task-locals of the caller
/// do not.
#[derive(Clone)]
pub struct Idempotency {
    pub(crate) facts: Arc<Facts>,
    /// The request that it was extracted from.
    request: Option<Arc<RequestCopy>>,
}

/// In the extensions of a request that several layers guard: the attempts of all but the innermost.
#[derive(Clone, Default)]
struct Around(Vec<Idempotency>);

impl Idempotency {
    pub(super) fn of(facts: &Arc<Facts>) -> Self {
        Self { facts: Arc::clone(facts), request: None }
    }

    /// The idempotency key, decoded.
    #[must_use]
    pub fn key(&self) -> &IdempotencyKey {
        &self.facts.attempt.key
    }

    /// The consumer of the key.
    #[must_use]
    pub fn consumer(&self) -> &Consumer {
        &self.facts.attempt.consumer
    }

    /// The id of the record. It stays the same when an attempt takes over from one whose lease ran
    /// out, and when a record with an intent or a finished phase was released.
    ///
    /// **A result that is not stored (5xx, panic,
    /// [`Directive::Release`](crate::Directive::Release)) ends a record without intents and
    /// finished phases: the retry gets a new id and attempt number 1.** To call others idempotently
    /// use [`intent`](Self::intent).
    #[must_use]
    pub fn record_id(&self) -> RecordId {
        self.facts.record_id
    }

    /// The id of this attempt: random, for fencing writes of the handler elsewhere.
    #[must_use]
    pub fn attempt_id(&self) -> AttemptId {
        self.facts.attempt.id
    }

    /// The number of this attempt: 1 for the first of a record. It is 1 again after a 5xx, a panic
    /// or another released result of a request without intents and finished phases. So 1 does not
    /// mean that the handler never ran before.
    #[must_use]
    pub fn attempt_number(&self) -> u32 {
        self.facts.attempt_number
    }

    /// Completes when the attempt should end: its lease was lost, so that its result will be
    /// discarded, or nine tenths of `max_execution` are over.
    ///
    /// ```
    /// # use tower_idempotency::Idempotency;
    /// # async fn work() {}
    /// # async fn example(idempotency: Idempotency) {
    /// tokio::select! {
    ///     () = work() => {}
    ///     () = idempotency.cancelled() => return, // and clean up
    /// }
    /// # }
    /// ```
    pub async fn cancelled(&self) {
        self.facts.cancelled.cancelled().await;
    }

    /// `true` once [`cancelled`](Self::cancelled) has completed.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.facts.cancelled.is_cancelled()
    }

    /// An intent or a phase begins. A second run of the handler would inherit what the first has
    /// left behind.
    pub(crate) fn enter_run(&self) -> Result<(), IntentError> {
        if self.is_single() {
            return Err(IntentError::Misused(
                "Strategy::SingleTransaction has no intents and no phases, because nothing is stored before \
                 its commit: use Strategy::Claimed for this route",
            ));
        }
        let entered = self.facts.enter_run(self.request.as_ref(), RejectionCode::IntentMisused);
        entered.then_some(()).ok_or(IntentError::Misused(
            "the handler runs a second time within one attempt: retry outside of the IdempotencyLayer or in \
             the client",
        ))
    }

    /// An intent changes the record, which an open transaction has locked.
    pub(crate) fn refuse_inside_transaction(&self) -> Result<(), IntentError> {
        if self.transaction_is_open() {
            return Err(IntentError::Misused(
                "once the handler's transaction has begun, an intent or a phase would wait for it: they come \
                 before Tx",
            ));
        }
        Ok(())
    }

    /// Changes of the record wait for this attempt.
    pub(crate) fn has_its_record_locked(&self) -> bool {
        self.transaction_is_open() || self.facts.progress.is_phase_open()
    }

    fn transaction_is_open(&self) -> bool {
        let usage = self.facts.transaction.as_ref().map(|transaction| transaction.usage());
        matches!(usage, Some(TransactionUsage::Open | TransactionUsage::InUse))
    }

    /// The attempt has its key by its transaction alone.
    pub(crate) fn is_single(&self) -> bool {
        self.facts.single.is_some()
    }

    /// Puts the attempt into the extensions of its request, beside those of the layers around.
    pub(crate) fn enter(self, extensions: &mut Extensions) {
        if let Some(around) = extensions.insert(self) {
            extensions.get_or_insert_default::<Around>().0.push(around);
        }
    }

    /// The attempts for which a request is performed: one for each layer that guards it.
    pub(crate) fn around(extensions: &Extensions) -> impl Iterator<Item = &Self> {
        let outer = extensions.get::<Around>().map_or(&[][..], |around| &around.0);
        outer.iter().chain(extensions.get::<Self>())
    }

    /// The attempt belongs to this node: an inner layer over it passes the request through.
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
    use crate::{
        attempt::{run::RequestCopy, unguarded::Unguarded},
        rejection::Rejection,
    };

    impl Idempotency {
        fn extract(parts: &Parts) -> Option<Self> {
            let request = RequestCopy::extracted_from(&parts.extensions);
            parts.extensions.get::<Self>().map(|idempotency| Self { request, ..idempotency.clone() })
        }
    }

    /// 400 `key-missing` if the request has no key. 500 `not-guarded`, and an ERROR in the log, if
    /// it has one and no [`IdempotencyLayer`](crate::IdempotencyLayer) guards it.
    impl<S: Sync> FromRequestParts<S> for Idempotency {
        type Rejection = Rejection;

        async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Rejection> {
            Self::extract(parts).ok_or_else(|| Unguarded::of_request(parts).rejection())
        }
    }

    /// 500 `not-guarded` if the request has a key and no layer guards it, unless the layer is
    /// disabled or the method is safe (GET, HEAD, OPTIONS, TRACE).
    impl<S: Sync> OptionalFromRequestParts<S> for Idempotency {
        type Rejection = Rejection;

        async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Option<Self>, Rejection> {
            let idempotency = Self::extract(parts);
            let unguarded = Unguarded::of_request(parts);
            match idempotency.is_some() || unguarded.may_run(&parts.method) {
                true => Ok(idempotency),
                false => Err(unguarded.rejection()),
            }
        }
    }
}
