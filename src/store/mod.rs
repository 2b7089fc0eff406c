//! Where records live: the [`Store`] trait, its contract, and the stores of this crate.

#[cfg(feature = "conformance")]
pub mod conformance;
#[cfg(feature = "memory")]
pub(crate) mod memory;
#[cfg(feature = "postgres")]
pub(crate) mod postgres;
pub(crate) mod recovery;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
pub(crate) mod sql;
#[cfg(feature = "sqlite")]
pub(crate) mod sqlite;
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
pub use sql::{InvalidIdentifier, TableCreation};
#[cfg(feature = "sqlite")]
pub use sqlite::SqliteStore;
pub use transaction::{
    IsolationLevel, StoreTransaction, TransactionError, TransactionErrorKind, TransactionLimits,
    TransactionOptions, TransactionUsage,
};

use crate::{consumer::Consumer, key::IdempotencyKey};
pub use crate::{
    error::{StoreError, StoreErrorKind},
    stored::{
        intent::{CallId, IntentFence, IntentUpdate, OpenOutcome, Opening},
        record::{
            Attempt, AttemptId, Claim, ClaimOutcome, CompleteOutcome, Fenced, Record, RecordFilter, RecordId,
            RecordState, RenewOutcome, Renewal, Resolution, ResolveOutcome,
        },
        request::{KeptRequest, RequestUpdate, UnreadableRequest},
        response::{StoredBody, StoredResponse, UnreadableResponse},
    },
};

/// Keeps records. This is the contract that every store fulfils and that the conformance suite
/// (feature `conformance`) checks.
///
/// ```text
///             claim                     complete (attempt = mine)
///   absent ───────────▶ in progress ─────────────────────────────▶ completed ──▶ purged after expiry
///                        │   │   ▲  ▲                                  ▲
///         release (mine) │   │   │  └ renew (mine)                     │ late completion (same attempt),
///                        ▼   │   │                                     │ resolve
///             claimable now  │   └ lease over, running again allowed:  │
///                   ▲        │     new attempt takes over              │
///                   │        └ lease over, not allowed; hold (mine): held
///                   │                                                  │
///                   └──────────── release (mine), resolve ─────────────┘
/// ```
///
/// # Rules
///
/// The words in bold are also the names of these rules in the source of this crate's stores.
///
/// * **Identity** is the pair (consumer, key), compared byte by byte: case and trailing spaces matter.
/// * **A claim is atomic.** Of any number of claims of an absent key, over any number of processes,
///   exactly one is won. Reading first is fine. Deciding by what was read is not.
/// * **Absent** is also a record past its expiry, purged or not, unless its lease is alive, it is
///   held, or it is in progress with an open intent. A claim makes a new record of it: new id, attempt
///   number 1, any fingerprint. **Purgeable** is an absent record without an open intent.
/// * **Lapsed** is a record in progress whose lease has run out. A claim with the *same* fingerprint
///   takes it over: same record id, next attempt number, one more abandoned attempt.
/// * **Exhausted** is a lapsed record whose attempt, counted as abandoned, is number `max_abandoned`,
///   as the record was claimed with. It counts as held before a claim makes it so.
/// * **Held** is a record that was made so, that is exhausted, or that is blocked by an intent (see
///   [`RecoveryStore`]). It stays past its expiry, and no claim takes it over.
/// * **Mine** is a record, in progress or held, with the id of the attempt that asks. `renew`,
///   `complete`, `release` and `hold` change no other. The age of the lease does not matter: until
///   another attempt takes a lapsed record over, its owner may still end it.
/// * **Resolvable** is a record that is held or lapsed: an operator may complete it. It is
///   **releasable** as well unless an intent makes it unrepeatable (see [`RecoveryStore`]).
/// * **The whole retention**, counted from that moment, goes to a record whose response is stored past
///   its expiry. Other reasons are in [`RecoveryStore`].
/// * **A repeated claim by the same attempt** is won again, with the same number: the reply to the
///   first may have been lost.
/// * **Completed records never change**, and a claim that finds one writes nothing.
/// * **Time** is the clock of the store alone. Claims and renewals carry durations.
/// * **No claim waits.** One that finds the key taken answers immediately. No call that serves more
///   than one request waits for a lock on one of its rows: it skips the row.
/// * **Durability.** When a call has answered, its effect survives a crash of the process and, for a
///   store that promises it, of the machine.
/// * **Errors** say by their [kind](crate::store::StoreErrorKind) what is known about the effect.
///
/// # Implementing it
///
/// The methods are those of an `#[async_trait]`: an implementation carries the same attribute, of the crate
/// `async-trait`. The source of the `MemoryStore`, in `src/store/memory`, is the contract as a program and a model to begin
/// with: what may be done with a record is in `entry.rs`, with an intent in `intents.rs`.
///
/// Calls may be cancelled by dropping their future only if the store is not harmed by it; the layer awaits them in
/// tasks that are not cancelled. A store is shared: clones and handles to the same tables see the same records.
#[async_trait]
pub trait Store: Debug + Send + Sync + 'static {
    /// Makes the store ready: creates or migrates its tables unless told not to, and checks that the store can be
    /// trusted. Every other call does this by itself once.
    ///
    /// Returns what an operator should know, one sentence each, for example that the server does not flush its log.
    ///
    /// # Errors
    ///
    /// [`Misconfigured`](crate::store::StoreErrorKind::Misconfigured) if the store cannot keep the contract: a read-only
    /// replica, missing tables or rights.
    async fn prepare(&self) -> Result<Vec<String>, StoreError>;

    /// Claims a key, or shows the record that has it.
    ///
    /// # Errors
    ///
    /// After [`Ambiguous`](crate::store::StoreErrorKind::Ambiguous) the key may have been won: claim again with the same
    /// attempt, or release.
    async fn claim(&self, claim: &Claim) -> Result<ClaimOutcome, StoreError>;

    /// Extends leases, in one round trip where the store can. Answers in the order of `renewals`.
    ///
    /// # Errors
    ///
    /// Any; some of the leases may have been extended.
    async fn renew(&self, renewals: &[Renewal]) -> Result<Vec<RenewOutcome>, StoreError>;

    /// Stores the encoded response of an attempt whose record is in progress or held.
    ///
    /// # Errors
    ///
    /// After [`Ambiguous`](crate::store::StoreErrorKind::Ambiguous) the response may be stored; calling again tells.
    async fn complete(&self, attempt: &Attempt, response: Bytes) -> Result<CompleteOutcome, StoreError>;

    /// Gives the key back: the record of the attempt, in progress or held, is claimable at once. It is gone, and any
    /// fingerprint may claim it, unless something hangs on it: see [`RecoveryStore`]. (A claim whose reply came too late is released even if it has become held by then.)
    ///
    /// # Errors
    ///
    /// After [`Ambiguous`](crate::store::StoreErrorKind::Ambiguous) it may be released; calling again is harmless.
    async fn release(&self, attempt: &Attempt) -> Result<Fenced, StoreError>;

    /// Makes the record of the attempt held.
    ///
    /// # Errors
    ///
    /// After [`Ambiguous`](crate::store::StoreErrorKind::Ambiguous) it may be held; calling again is harmless.
    async fn hold(&self, attempt: &Attempt) -> Result<Fenced, StoreError>;

    /// Looks one record up, expired or not. Purged ones are gone.
    ///
    /// # Errors
    ///
    /// Any; nothing is changed.
    async fn get(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<Option<Record>, StoreError>;

    /// Lists records, the oldest first, at most `limit`.
    ///
    /// # Errors
    ///
    /// Any; nothing is changed.
    async fn list(&self, filter: RecordFilter, limit: u32) -> Result<Vec<Record>, StoreError>;

    /// Deletes a record in whatever state. Returns whether there was one.
    ///
    /// # Errors
    ///
    /// After [`Ambiguous`](crate::store::StoreErrorKind::Ambiguous) it may be deleted; calling again is harmless.
    async fn evict(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<bool, StoreError>;

    /// Ends a record that is held or whose lease ran out. A completion by this call gives the record its whole
    /// retention anew, so that the waiting client can still fetch it, and takes it from its attempt.
    ///
    /// # Errors
    ///
    /// After [`Ambiguous`](crate::store::StoreErrorKind::Ambiguous) it may be resolved; [`get`](Self::get) tells.
    async fn resolve(
        &self,
        consumer: &Consumer,
        key: &IdempotencyKey,
        resolution: Resolution,
    ) -> Result<ResolveOutcome, StoreError>;

    /// Offers the handler of an attempt a transaction that its record can be completed in: puts something into the
    /// request's extensions that the handler gets it from. Nothing is begun before the handler asks. `None` if the store
    /// has no transactions: those of this crate, which `Tx` takes, are for its own stores.
    fn transaction(
        &self,
        attempt: &Attempt,
        limits: &TransactionLimits,
        extensions: &mut Extensions,
    ) -> Option<Arc<dyn StoreTransaction>>;

    /// What keeps intents, finished phases and kept requests beside these records. `None` if the store cannot.
    fn recovery(&self) -> Option<Arc<dyn RecoveryStore>>;

    /// Deletes at most `limit` records that count as absent, and returns how many. Held ones and those that the next
    /// claim would find held stay, and so do those with open intents. Safe on many nodes at once.
    ///
    /// # Errors
    ///
    /// Any; some records may have been deleted.
    async fn purge(&self, limit: u32) -> Result<u64, StoreError>;
}

/// What [`IdempotencyLayer::new`](crate::IdempotencyLayer::new) takes: a store, or a pool that a store is made of.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a store for idempotency records",
    note = "a `sqlx::PgPool` needs the feature `postgres` of tower-idempotency, a `sqlx::SqlitePool` the feature `sqlite`",
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
