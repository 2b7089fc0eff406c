//! The [`Store`] trait with its contract, and the stores of this crate.

#[cfg(feature = "conformance")]
pub mod conformance;
#[cfg(feature = "memory")]
mod memory;
#[cfg(feature = "postgres")]
mod postgres;
pub(crate) mod recovery;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
pub(crate) mod sql;
#[cfg(feature = "sqlite")]
mod sqlite;
pub(crate) mod transaction;

use std::{fmt::Debug, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use http::Extensions;

#[cfg(feature = "memory")]
pub use memory::MemoryStore;
#[cfg(feature = "postgres")]
pub use postgres::{ConnectionMode, PostgresStore};
pub use recovery::RecoveryStore;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
pub use sql::{Grouping, InvalidIdentifier, TableCreation};
#[cfg(feature = "sqlite")]
pub use sqlite::SqliteStore;
pub use transaction::{
    BeginOutcome, IsolationLevel, SingleTransaction, StoreTransaction, TransactionError,
    TransactionErrorKind, TransactionLimits, TransactionUsage,
};

use crate::{consumer::Consumer, key::IdempotencyKey};
pub use crate::{
    error::{StoreError, StoreErrorKind},
    fingerprint::Fingerprint,
    stored::{
        intent::{CallId, IntentFence, IntentUpdate, OpenOutcome, Opening, Overlooked},
        record::{
            Attempt, AttemptId, Claim, ClaimOutcome, CompleteOutcome, Fenced, Record, RecordFilter, RecordId,
            RecordState, RenewOutcome, Renewal, Resolution, ResolveOutcome,
        },
        request::{KeptRequest, RequestUpdate, UnreadableRequest},
        response::{StoredBody, StoredResponse, UnreadableResponse},
    },
};

/// The meaning of a failed statement of a handler for its transaction.
#[cfg(any(feature = "sqlite", feature = "postgres"))]
pub(crate) fn transaction_error_kind(error: &sqlx::Error) -> TransactionErrorKind {
    let kind = None;
    #[cfg(feature = "postgres")]
    let kind = kind.or_else(|| postgres::transaction_error_kind(error));
    #[cfg(feature = "sqlite")]
    let kind = kind.or_else(|| sqlite::transaction_error_kind(error));
    kind.unwrap_or_else(|| sql::errors::transaction_error_kind(error))
}

/// Keeps records. This is the contract that every store fulfils and that the conformance suite
/// (feature `conformance`) checks.
///
/// ```text
///             claim                   complete (attempt = mine)
///   absent ─────────▶ in progress ────────────────────────────▶ completed ──▶ purged after expiry
///                       │  │  ▲ ▲                                   ▲
///        release (mine) │  │  │ └ renew (mine)                      │ late completion
///                       ▼  │  │                                     │ (same attempt), resolve
///            claimable now │  └ lease over, running again           │
///                  ▲       │    allowed: a new attempt takes over   │
///                  │       └ lease over, not allowed; hold (mine): held
///                  │                                                │
///                  └─────────── release (mine), resolve ────────────┘
/// ```
///
/// # Rules
///
/// The words in bold are also the names of these rules in the source of this crate's stores.
///
/// * **Identity** is the pair (consumer, key), compared byte by byte: case and trailing spaces
///   matter. Read a consumer with [`Consumer::from_stored`]: [`Consumer::new`] refuses the scopes
///   that this crate makes, whose names begin with U+001F.
/// * **A claim is atomic.** Of any number of claims of an absent key, in any number of processes,
///   exactly one is won. An implementation may read first, but must not decide by what it has read.
/// * **Absent** is also a record past its expiry, purged or not. It is not absent if its lease is
///   alive, if it is held, or if it is in progress with an open intent. A claim replaces it by a
///   new record: new id, attempt number 1, any fingerprint. **Purgeable** is an absent record
///   without an open intent.
/// * **Lapsed** is a record in progress whose lease has run out. A claim with the *same*
///   fingerprint takes it over: same record id, next attempt number, one more abandoned attempt.
/// * **Exhausted** is a lapsed record whose attempt, counted as abandoned, is number
///   `max_abandoned` of the claim that made the record. It counts as held even before a claim makes
///   it held.
/// * **Held** is a record that was made held, that is exhausted, or that is blocked by an intent
///   (see [`RecoveryStore`]). It stays past its expiry, and no claim takes it over.
/// * **Mine** is a record, in progress or held, with the id of the attempt that asks. `renew`,
///   `complete`, `release` and `hold` change no other record. The age of the lease does not matter:
///   the owner may end a lapsed record until another attempt takes it over.
/// * **Resolvable** is a record that is held or lapsed: an operator may complete it. It is
///   **releasable** as well unless an intent makes it unrepeatable (see [`RecoveryStore`]).
/// * **The whole retention**, counted from that moment, goes to a record whose response is stored
///   past its expiry. [`RecoveryStore`] names other reasons.
/// * **A repeated claim by the same attempt** is won again, with the same number: the reply to the
///   first claim may have been lost.
/// * **Completed records never change**, and a claim that finds one writes nothing.
/// * **Time** is the clock of the store alone. Claims and renewals carry durations, not times.
/// * **No claim waits.** One that finds the key taken answers immediately. No call that serves more
///   than one request waits for a lock on one of its rows: it skips the row.
/// * **Durability.** Once a call has answered, its effect survives a crash of the process. If the
///   store promises it, the effect also survives a crash of the machine.
/// * **Errors** say by their [kind](crate::store::StoreErrorKind) how much is known about the
///   effect.
///
/// # Implementing it
///
/// The trait is an `#[async_trait]`: an implementation carries the same attribute, from the crate
/// `async-trait`. The source of the `MemoryStore`, in `src/store/memory/`, is the contract as a
/// program and a model to begin with. In it, `entry.rs` says when a record may be changed, and
/// `intents.rs` when an intent may.
///
/// The layer awaits every call in a task that is not cancelled. So a store need not handle a call
/// whose future is dropped. Other callers await it the same way, unless the store's docs allow
/// more. A store is shared: clones and handles to the same tables see the same records.
#[async_trait]
pub trait Store: Debug + Send + Sync + 'static {
    /// Prepares the store: creates or migrates its tables unless told not to, and checks that the
    /// store can be trusted. Every other call does this once.
    ///
    /// Returns warnings for an operator, one sentence each: for example, that the server does not
    /// flush its log.
    ///
    /// # Errors
    ///
    /// [`Misconfigured`](crate::store::StoreErrorKind::Misconfigured) if the store cannot keep the
    /// contract: a read-only replica, missing tables or rights.
    async fn prepare(&self) -> Result<Vec<String>, StoreError>;

    /// Claims a key, or shows the record that has it.
    ///
    /// # Errors
    ///
    /// After [`Ambiguous`](crate::store::StoreErrorKind::Ambiguous) the key may have been won:
    /// claim again with the same attempt, or release.
    async fn claim(&self, claim: &Claim) -> Result<ClaimOutcome, StoreError>;

    /// Extends leases, in one round trip if the store can. Answers in the order of `renewals`.
    ///
    /// # Errors
    ///
    /// After any error, some of the leases may have been extended.
    async fn renew(&self, renewals: &[Renewal]) -> Result<Vec<RenewOutcome>, StoreError>;

    /// Stores the encoded response of an attempt whose record is in progress or held.
    ///
    /// # Errors
    ///
    /// After [`Ambiguous`](crate::store::StoreErrorKind::Ambiguous) the response may be stored:
    /// repeat the call to find out.
    async fn complete(&self, attempt: &Attempt, response: Bytes) -> Result<CompleteOutcome, StoreError>;

    /// Releases the key. The record of the attempt, in progress or held, is claimable immediately.
    ///
    /// The record is deleted, and any fingerprint may claim the key, unless the record is retained
    /// for a reason that [`RecoveryStore`] names. A held record can be released too: a claim whose
    /// reply came too late must be released even if its record has become held meanwhile.
    ///
    /// # Errors
    ///
    /// After [`Ambiguous`](crate::store::StoreErrorKind::Ambiguous) it may be released; calling
    /// again is harmless.
    async fn release(&self, attempt: &Attempt) -> Result<Fenced, StoreError>;

    /// Makes the record of the attempt held.
    ///
    /// # Errors
    ///
    /// After [`Ambiguous`](crate::store::StoreErrorKind::Ambiguous) it may be held; calling again
    /// is harmless.
    async fn hold(&self, attempt: &Attempt) -> Result<Fenced, StoreError>;

    /// Looks up one record, expired or not. Purged records are gone.
    ///
    /// # Errors
    ///
    /// After any error, nothing is changed.
    async fn get(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<Option<Record>, StoreError>;

    /// Lists records, the oldest first, at most `limit`.
    ///
    /// # Errors
    ///
    /// After any error, nothing is changed.
    async fn list(&self, filter: RecordFilter, limit: u32) -> Result<Vec<Record>, StoreError>;

    /// Deletes a record in any state. Returns `true` if there was one.
    ///
    /// # Errors
    ///
    /// After [`Ambiguous`](crate::store::StoreErrorKind::Ambiguous) it may be deleted; calling
    /// again is harmless.
    async fn evict(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<bool, StoreError>;

    /// Ends a record that is held or whose lease ran out.
    ///
    /// A completion by this call takes the record from its attempt. It also keeps the record for
    /// its whole retention again, so that the waiting client can still fetch the response.
    ///
    /// # Errors
    ///
    /// After [`Ambiguous`](crate::store::StoreErrorKind::Ambiguous) it may be resolved;
    /// [`get`](Self::get) tells.
    async fn resolve(
        &self,
        consumer: &Consumer,
        key: &IdempotencyKey,
        resolution: Resolution,
    ) -> Result<ResolveOutcome, StoreError>;

    /// Offers the handler of an attempt a transaction in which its record can be completed.
    ///
    /// The store puts a value into the request's extensions, from which the handler gets the
    /// transaction. The transaction begins only when the handler asks for it. Returns `None` if the
    /// store has no transactions. The extractor `Tx` takes transactions of this crate's stores
    /// only.
    fn transaction(
        &self,
        attempt: &Attempt,
        limits: &TransactionLimits,
        extensions: &mut Extensions,
    ) -> Option<Arc<dyn StoreTransaction>>;

    /// Begins the transaction of an attempt that makes no claim
    /// ([`Strategy::SingleTransaction`](crate::layer::Strategy)).
    ///
    /// Until the transaction ends, no other such transaction begins for the key, in any process. A
    /// key whose record is [absent](Self#rules) has none. The look at the record comes after the
    /// key was taken, so that what an earlier transaction has committed is seen. Nothing waits for
    /// another attempt with the key.
    ///
    /// # Errors
    ///
    /// [`Misconfigured`](crate::store::StoreErrorKind::Misconfigured) if the store has no
    /// transactions. After any error, nothing is begun.
    async fn begin_single(
        &self,
        claim: &Claim,
        limits: &TransactionLimits,
    ) -> Result<BeginOutcome, StoreError>;

    /// Returns the part of the store that keeps intents, finished phases and requests. Returns
    /// `None` if the store keeps none.
    fn recovery(&self) -> Option<Arc<dyn RecoveryStore>>;

    /// Deletes at most `limit` records that count as absent, and returns their number.
    ///
    /// Records stay if they are held, if the next claim would find them held, or if they have open
    /// intents. Many nodes may purge simultaneously.
    ///
    /// # Errors
    ///
    /// After any error, some records may have been deleted.
    async fn purge(&self, limit: u32) -> Result<u64, StoreError>;

    /// Closes what the store has opened for itself: connections above all. Leaves the pool alone
    /// that it was given.
    ///
    /// Waits for calls that are under way. The future may be dropped: their connections then close
    /// when the calls end. A later call works and opens connections again, because clones and other
    /// layers may share the store.
    async fn close(&self);
}

/// A store, or a pool from which a store can be made. The argument of
/// [`IdempotencyLayer::new`](crate::IdempotencyLayer::new).
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a store for idempotency records",
    note = "a `sqlx::PgPool` needs the feature `postgres` of tower-idempotency",
    note = "a `sqlx::SqlitePool` needs the feature `sqlite` of tower-idempotency",
    note = "both must come from the same version of sqlx that tower-idempotency uses"
)]
pub trait IntoStore {
    /// Makes the store.
    fn into_store(self) -> Arc<dyn Store>;
}

impl<S: Store> IntoStore for S {
    fn into_store(self) -> Arc<dyn Store> {
        Arc::new(self)
    }
}

impl IntoStore for Arc<dyn Store> {
    fn into_store(self) -> Arc<dyn Store> {
        self
    }
}
