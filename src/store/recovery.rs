//! The contract of recovery: intents, finished phases and requests beside the records of a store.

use std::{fmt::Debug, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;

use crate::{
    consumer::Consumer,
    error::StoreError,
    key::IdempotencyKey,
    stored::{
        intent::{
            Intent, IntentCounts, IntentFence, IntentFilter, IntentUpdate, OpenOutcome, Opening, Overlooked,
            UpstreamKey,
        },
        record::{Attempt, Fenced, RecordId},
        request::{KeptRequest, RequestUpdate},
    },
};

/// Keeps intents, finished phases and requests beside the records of a
/// [`Store`](crate::store::Store).
///
/// # Rules
///
/// The words in bold are also the names of these rules in the source of this crate's stores.
///
/// * **The record knows.** A change to an intent also changes its record, in the same transaction:
///   how many of its intents are open, and until when they may all be called again. Claims,
///   takeovers, releases and the purge read the record only. So none of them misses an intent that
///   is just being opened.
/// * **Unrepeatable** is a record with an open intent that may not be called again. If it has
///   lapsed or was released, it is **blocked**: it counts as held until that intent is settled. A
///   record whose open intents may all be called again is taken over as usual.
/// * **Retained** is a record that has an intent or a finished phase, or whose request is about to
///   be sent again. A release does not delete it: its id, fingerprint and attempt number go on.
/// * **The whole retention** goes to a record that was kept past its expiry by an open intent, a
///   hold or a live lease. It counts from the moment when that ends. It also goes to a retained
///   record whose lease outlives the expiry. So a retry finds the outcomes that were recorded.
/// * **Owned** is a record by the attempt with a live lease. An attempt opens an intent only while
///   it owns the record. The opening is committed before the call returns. It is repeatable: an
///   opening with the id of the last call succeeds again. While the attempt that called last owns
///   the record, the intent is **in flight**.
/// * **Callable** is an intent that is new; that is open and was certainly not sent; that is open
///   and whose key the upstream still recognizes; or that is dead because the upstream does not
///   know it. With other arguments it is callable only if none of its calls was ever sent: then the
///   new arguments replace the old ones.
/// * **Intents outlive their record.** An intent whose record is gone is settled alone.
/// * **Kept requests do not outlive their record.** A request is sent again only while its record
///   is **abandoned**, which means that it waits for the next attempt. It is purged once its record
///   is completed or gone.
#[async_trait]
pub trait RecoveryStore: Debug + Send + Sync {
    /// Opens an intent before its call.
    ///
    /// # Errors
    ///
    /// After [`Ambiguous`](crate::store::StoreErrorKind::Ambiguous) it may be open: open it again
    /// with the same call, or record that it was not sent.
    async fn open_intent(&self, opening: &Opening) -> Result<OpenOutcome, StoreError>;

    /// Changes an intent while its fence holds.
    ///
    /// `attention` is a message for the operator. An open intent that needs attention is not looked
    /// up any more. Returns [`Lost`](Fenced::Lost) if there is no such intent or its fence does not
    /// hold.
    ///
    /// # Errors
    ///
    /// After [`Ambiguous`](crate::store::StoreErrorKind::Ambiguous) the change may be recorded.
    async fn update_intent(
        &self,
        intent: UpstreamKey,
        fence: IntentFence,
        update: &IntentUpdate,
        attention: Option<&str>,
    ) -> Result<Fenced, StoreError>;

    /// Takes intents with one of these names that are due for a look-up, at most `limit`, the most
    /// overdue first.
    ///
    /// Only intents whose attempt does not own their record any more are taken. No other call takes
    /// them for `pause`, and each take counts as one more look-up. Intents with other names stay as
    /// they are, because another service may look them up.
    ///
    /// # Errors
    ///
    /// After any error, some may be taken.
    async fn take_dangling(
        &self,
        names: &[String],
        limit: u32,
        pause: Duration,
    ) -> Result<Vec<Intent>, StoreError>;

    /// Counts open intents with other names than these whose look-up has been due for longer than
    /// `overdue`, by name. At most `limit` intents are counted.
    ///
    /// Intents whose attempt owns their record are not due.
    ///
    /// # Errors
    ///
    /// After any error, nothing is changed.
    async fn count_overlooked(
        &self,
        names: &[String],
        overdue: Duration,
        limit: u32,
    ) -> Result<Vec<Overlooked>, StoreError>;

    /// Looks up one intent.
    ///
    /// # Errors
    ///
    /// After any error, nothing is changed.
    async fn get_intent(&self, intent: UpstreamKey) -> Result<Option<Intent>, StoreError>;

    /// Lists intents, at most `limit`.
    ///
    /// # Errors
    ///
    /// After any error, nothing is changed.
    async fn list_intents(&self, filter: IntentFilter, limit: u32) -> Result<Vec<Intent>, StoreError>;

    /// Counts the intents that are not settled or that need attention. The time it takes does not
    /// depend on the number of settled intents.
    ///
    /// # Errors
    ///
    /// After any error, nothing is changed.
    async fn count_intents(&self) -> Result<IntentCounts, StoreError>;

    /// Returns the result of a finished phase, or `None` if the phase was not finished.
    ///
    /// Waits for a transaction that is finishing the phase. Only the stores of this crate can have
    /// phases.
    ///
    /// # Errors
    ///
    /// After any error, nothing is changed.
    async fn find_phase(
        &self,
        attempt: &Attempt,
        record: RecordId,
        name: &str,
    ) -> Result<Option<Bytes>, StoreError>;

    /// Keeps the encoded request of an attempt that owns its record with a live lease. The request
    /// is sent again if its record is not completed `after` this time.
    ///
    /// The first request of a record counts: a later call by an attempt that owns the record
    /// succeeds and changes nothing. Returns [`Lost`](Fenced::Lost) for any other attempt.
    ///
    /// # Errors
    ///
    /// After [`Ambiguous`](crate::store::StoreErrorKind::Ambiguous) it may be kept.
    async fn keep_request(
        &self,
        attempt: &Attempt,
        record: RecordId,
        request: &Bytes,
        after: Duration,
    ) -> Result<Fenced, StoreError>;

    /// Retains a record when it is released, as if it had an intent, because its request is about
    /// to be sent again.
    ///
    /// Returns [`Lost`](Fenced::Lost) if the record is gone or completed.
    ///
    /// # Errors
    ///
    /// After any error, the record may be retained.
    async fn retain_record(
        &self,
        consumer: &Consumer,
        key: &IdempotencyKey,
        record: RecordId,
    ) -> Result<Fenced, StoreError>;

    /// Takes requests that are due to be sent again, at most `limit`.
    ///
    /// A request is taken if its time has come, if it does not need attention, and if its record
    /// waits for the next attempt:
    ///
    /// * The record is in progress and not expired, and its lease is over or it was released and
    ///   retained.
    /// * The next claim would not find it held.
    /// * It was not claimed under a policy that holds abandoned attempts
    ///   ([`max_abandoned`](crate::store::Claim::max_abandoned) 1). The way in which its attempt
    ///   ended does not matter.
    ///
    /// No other call takes them for `pause`, and each take counts as one more try.
    ///
    /// # Errors
    ///
    /// After any error, some may be taken.
    async fn take_abandoned(&self, limit: u32, pause: Duration) -> Result<Vec<KeptRequest>, StoreError>;

    /// Records the outcome of a try to send a request again.
    ///
    /// * With a number of `tries`, it applies only while the request has that number and waits to
    ///   be sent: a late caller must not undo what another has found out. If the request was not
    ///   sent, the try is not counted.
    /// * With `None`, which is for operators, it applies in any state, and the tries are counted
    ///   from zero again.
    /// * [`Done`](RequestUpdate::Done) applies in any state, because a record that is completed or
    ///   gone stays so.
    ///
    /// Returns [`Lost`](Fenced::Lost) if it does not apply, or if there is no such request.
    ///
    /// # Errors
    ///
    /// After any error, it may be recorded.
    async fn update_request(
        &self,
        record: RecordId,
        tries: Option<u32>,
        update: &RequestUpdate,
    ) -> Result<Fenced, StoreError>;

    /// Lists the requests that wait for an operator because they [need
    /// attention](RequestUpdate::NeedsAttention), at most `limit`.
    ///
    /// # Errors
    ///
    /// After any error, nothing is changed.
    async fn list_requests(&self, limit: u32) -> Result<Vec<KeptRequest>, StoreError>;

    /// Deletes data that is not needed any more, and returns the number of rows. At most `limit`
    /// rows are deleted of each kind:
    ///
    /// * requests whose record is completed or gone, of any age
    /// * settled intents that are older than `retention` and whose record is gone
    /// * finished phases that are older than `retention` and whose record is gone
    ///
    /// # Errors
    ///
    /// After any error, some may be deleted.
    async fn purge_settled(&self, retention: Duration, limit: u32) -> Result<u64, StoreError>;
}

/// The reason of an intent that is dead because the upstream does not know it.
#[cfg(any(feature = "memory", feature = "sqlite", feature = "postgres"))]
pub(super) const ABSENT: &str = "the upstream does not know it";
