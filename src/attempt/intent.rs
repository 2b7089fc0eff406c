//! The call of an intent: opened before, settled after.

use std::{fmt, time::Duration};

use bytes::Bytes;
use serde::Serialize;
use tokio::time::{Instant, timeout};

use crate::{
    attempt::{
        Facts,
        error::IntentError,
        idempotency::Idempotency,
        progress::{Entered, check_name},
    },
    duration::{capped, limit},
    error::BoxError,
    fingerprint::canonical_digest,
    redact::TRACING_TARGET,
    stored::{
        intent::{
            CallFailure, Intent, IntentFence, IntentState, IntentUpdate, OpenOutcome, Opening, Resource,
            UpstreamKey,
        },
        record::Fenced,
    },
};

impl Idempotency {
    /// Describes a call to the upstream service that `name` stands for. The call is persisted
    /// before it is made, and its outcome after it: a later attempt of the request gets the
    /// outcome, without the call.
    ///
    /// The name has 1 to 255 bytes and is part of the upstream key. Do not change it while requests
    /// may be retried.
    ///
    /// Make calls before the handler begins its transaction (`Tx`), which has the record locked:
    /// after that an intent is refused ([`IntentError::Misused`]).
    ///
    /// The store must keep intents: those of this crate do. See [`IntentBuilder::call`] for an
    /// example.
    pub fn intent(&self, name: impl Into<String>) -> IntentBuilder {
        IntentBuilder::new(self.clone(), name.into())
    }
}

/// Describes a call to an upstream service before it is made, and how the upstream behaves. Made by
/// [`Idempotency::intent`].
#[must_use = "nothing is opened before `call` or `open`"]
#[derive(Debug)]
pub struct IntentBuilder {
    idempotency: Idempotency,
    name: String,
    discriminator: Option<String>,
    arguments: Result<Bytes, &'static str>,
    subject: Option<String>,
    deduplicates_for: Duration,
    timeout: Duration,
    grace: Duration,
}

/// The next step for an intent.
#[derive(Debug)]
#[expect(clippy::exhaustive_enums, reason = "a handler must handle every one")]
pub enum Opened {
    /// Make the call, and settle this.
    Call(OpenIntent),
    /// Use this resource: an earlier attempt made the call and recorded it.
    Finalized(Resource),
    /// Make no call: the upstream has refused an earlier attempt, for this reason.
    Refused(String),
}

impl IntentBuilder {
    pub(crate) fn new(idempotency: Idempotency, name: String) -> Self {
        Self {
            idempotency,
            name,
            discriminator: None,
            arguments: Ok(Bytes::new()),
            subject: None,
            deduplicates_for: Duration::ZERO,
            timeout: TIMEOUT,
            grace: GRACE,
        }
    }

    /// Tells this intent from others of its name in the same request, whatever their order. For
    /// example the recipient of one of many transfers. Without it the order counts: the first
    /// `intent(name)` of an attempt is the first of every attempt. An intent that is asked for
    /// again in one attempt gets the outcome that was recorded, without a second call.
    ///
    /// ```
    /// # use tower_idempotency::Idempotency;
    /// # fn example(idempotency: Idempotency, iban: &str) {
    /// let intent = idempotency.intent("bank.transfer").of(iban);
    /// # }
    /// ```
    pub fn of(mut self, discriminator: impl fmt::Display) -> Self {
        self.discriminator = Some(discriminator.to_string());
        self
    }

    /// Sets the arguments of the call. A digest of them is stored. A later attempt that asks for
    /// the same intent with other arguments is refused
    /// ([`OtherArguments`](IntentError::OtherArguments)), instead of getting the result of another
    /// call. Only if no call of the intent was ever sent, it is called with the new ones. Arguments
    /// are compared as JSON: the order of the members of an object does not count.
    ///
    /// Without [`of`](Self::of), an intent with arguments that were settled before in the same
    /// attempt is refused ([`Misused`](IntentError::Misused)): a handler that loops would call
    /// twice.
    ///
    /// ```
    /// # use tower_idempotency::Idempotency;
    /// # fn example(idempotency: Idempotency, iban: &str, cents: u64) {
    /// let intent = idempotency.intent("bank.transfer").with_arguments(&(iban, cents));
    /// # }
    /// ```
    pub fn with_arguments(mut self, arguments: &(impl Serialize + ?Sized)) -> Self {
        self.arguments = canonical_digest(arguments)
            .ok_or("the arguments of an intent cannot be written as JSON without ambiguity");
        self
    }

    /// Names the application's own row to which the call belongs, for operators.
    ///
    /// ```
    /// # use tower_idempotency::Idempotency;
    /// # fn example(idempotency: Idempotency) {
    /// let intent = idempotency.intent("bank.transfer").with_subject("payout 17");
    /// # }
    /// ```
    pub fn with_subject(mut self, subject: impl Into<String>) -> Self {
        self.subject = Some(subject.into());
        self
    }

    /// Declares that the upstream recognizes the [upstream key](UpstreamKey) for this long and
    /// performs a call once. Default: it does not.
    ///
    /// A call whose outcome is unknown is then made again with the same key, until shortly before
    /// the end of the window: a tenth of it, or the [grace period](Self::with_grace) if that is
    /// longer. Without it, such a call holds the idempotency key until the intent is reconciled.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_idempotency::Idempotency;
    /// # fn example(idempotency: Idempotency) {
    /// let day = Duration::from_secs(24 * 60 * 60);
    /// let intent = idempotency.intent("stripe.charge").deduplicates_for(day);
    /// # }
    /// ```
    pub fn deduplicates_for(mut self, window: Duration) -> Self {
        self.deduplicates_for = capped(window);
        self
    }

    /// Limits how long [`call`](Self::call) waits for the upstream, to at most a day. Default: 30
    /// s.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_idempotency::Idempotency;
    /// # fn example(idempotency: Idempotency) {
    /// let intent = idempotency.intent("bank.transfer").with_timeout(Duration::from_secs(10));
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// If it is shorter than 1 ms: the outcome of every call would be unknown.
    #[track_caller]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = limit("a time-out for calls", timeout).min(MAX_TIMEOUT);
        self
    }

    /// Sets the grace period: the time after which the intent is looked up if it is still open and
    /// its attempt has ended. At least twice the [time-out](Self::with_timeout). Default: 5 min.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_idempotency::Idempotency;
    /// # fn example(idempotency: Idempotency) {
    /// let intent = idempotency.intent("bank.transfer").with_grace(Duration::from_secs(60));
    /// # }
    /// ```
    pub fn with_grace(mut self, grace: Duration) -> Self {
        self.grace = capped(grace);
        self
    }

    fn dangling_after(&self) -> Duration {
        self.grace.max(self.timeout.saturating_mul(2))
    }

    /// The time from the opening in which a call may be repeated: a call may leave until its intent
    /// dangles.
    fn repeatable_for(&self) -> Duration {
        let margin = (self.deduplicates_for / 10).max(self.dangling_after());
        self.deduplicates_for.saturating_sub(margin)
    }

    /// Opens the intent, makes the call and settles the intent by the outcome:
    ///
    /// | the call | the intent | next attempt |
    /// |---|---|---|
    /// | `Ok` | finalized | gets the same [`Resource`], no call |
    /// | [`Refused`](CallFailure::Refused) | dead | gets the same refusal, no call |
    /// | [`NotSent`](CallFailure::NotSent) | open | calls again with the same key |
    /// | [`Unknown`](CallFailure::Unknown), the time-out, a panic | open | see below |
    ///
    /// After an unknown outcome the next attempt calls again with the same key, if the upstream
    /// [deduplicates](Self::deduplicates_for). Otherwise the idempotency key is held until the
    /// intent is settled.
    ///
    /// The closure gets the upstream key. Send it as the upstream's idempotency key. If the
    /// upstream has none, send it as a reference by which a look-up finds the resource.
    ///
    /// The call is not made if the attempt has [lost its record](Idempotency::cancelled), or if the
    /// process was stopped for so long that less than the time-out is left of the grace period. One
    /// gap remains without an upstream that deduplicates: the process may be stopped while it
    /// sends.
    ///
    /// ```
    /// # #[cfg(feature = "axum")] {
    /// # use std::time::Duration;
    /// # use tower_idempotency::{CallFailure, Idempotency, IntentError, Resource, UpstreamKey};
    /// # async fn transfer(key: UpstreamKey, cents: u64) -> Result<String, CallFailure> {
    /// #     Ok(String::new())
    /// # }
    /// async fn pay_out(idempotency: Idempotency) -> Result<String, IntentError> {
    ///     let day = Duration::from_secs(24 * 60 * 60);
    ///     let transfer = idempotency
    ///         .intent("bank.transfer")
    ///         .with_arguments(&("DE02", 1000))
    ///         .deduplicates_for(day)
    ///         .call(async |key| transfer(key, 1000).await.map(Resource::from))
    ///         .await?;
    ///     Ok(transfer.id)
    /// }
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`IntentError`], which says whether the call was made.
    pub async fn call<F>(self, call: F) -> Result<Resource, IntentError>
    where
        F: AsyncFnOnce(UpstreamKey) -> Result<Resource, CallFailure>,
    {
        let (limit, repeatable) = (self.timeout, !self.repeatable_for().is_zero());
        let intent = match self.open().await? {
            Opened::Call(intent) => intent,
            Opened::Finalized(resource) => return Ok(resource),
            Opened::Refused(reason) => return Err(IntentError::Refused(reason)),
        };
        if let Some(why) = intent.too_late(limit) {
            return Err(intent.not_sent_because(why.into()).await);
        }
        let failure = match timeout(limit, call(intent.upstream_key())).await {
            Ok(Ok(resource)) => return intent.finalize_surely(resource).await,
            Ok(Err(failure)) => failure,
            Err(_) => CallFailure::unknown(format!("no answer within {limit:?}, the time-out of the call")),
        };
        intent.log(&failure);
        match failure {
            CallFailure::Refused(reason) => {
                // Recorded or not: the upstream has refused.
                if let Err(error) = intent.dead(reason.clone()).await {
                    log_unsettled(&error);
                }
                Err(IntentError::Refused(reason))
            }
            CallFailure::NotSent(cause) => Err(intent.not_sent_because(cause).await),
            CallFailure::Unknown(cause) => Err(IntentError::Unknown { repeatable, source: Some(cause) }),
        }
    }

    /// Opens the intent: commits it before the call is made. Use it for calls that do not fit
    /// [`call`](Self::call).
    ///
    /// # Errors
    ///
    /// [`IntentError`]. Make no call then.
    pub async fn open(self) -> Result<Opened, IntentError> {
        self.idempotency.enter_run()?;
        self.idempotency.refuse_inside_transaction()?;
        check_name(&self.name)?;
        self.discriminator.as_deref().map_or(Ok(()), check_name)?;
        let (dangling_after, repeatable_for) = (self.dangling_after(), self.repeatable_for());
        let arguments = self.arguments.map_err(IntentError::Misused)?;
        let entered = self.idempotency.facts.progress.enter(&self.name, self.discriminator, &arguments)?;
        let (attempt, record_id) = (self.idempotency.facts.attempt.clone(), self.idempotency.record_id());
        let opening = Opening {
            arguments: arguments.clone(),
            subject: self.subject,
            repeatable_for,
            dangling_after,
            ..Opening::new(attempt, record_id, self.name, entered.place())
        };
        let (key, fence) = (opening.upstream_key, IntentFence::Call(opening.call));
        let opened_at = Instant::now();
        let outcome = self
            .idempotency
            .facts
            .node
            .open_intent(opening, self.idempotency.facts.settings.store_wait())
            .await;
        match outcome.map_err(IntentError::NotRecorded)? {
            OpenOutcome::Opened => {
                entered.opened(key);
                Ok(Opened::Call(OpenIntent {
                    idempotency: self.idempotency,
                    entered,
                    key,
                    fence,
                    opened_at,
                    dangling_after,
                }))
            }
            OpenOutcome::Lost => Err(IntentError::Lost),
            OpenOutcome::Recorded(intent) if intent.arguments != arguments => {
                self.idempotency.facts.progress.hold(IntentError::OtherArguments.rejection());
                tracing::error!(
                    target: TRACING_TARGET, consumer = %intent.consumer, intent = intent.name,
                    upstream_key = %key,
                    "an attempt asks for an intent with other arguments than an earlier one; the key is held"
                );
                Err(IntentError::OtherArguments)
            }
            OpenOutcome::Recorded(intent) => recorded(&entered, *intent),
        }
    }
}

/// The next step for an intent that an earlier attempt or call has left.
fn recorded(entered: &Entered, intent: Intent) -> Result<Opened, IntentError> {
    match intent.state {
        IntentState::Finalized(resource) => {
            entered.settled();
            Ok(Opened::Finalized(resource))
        }
        IntentState::Dead { reason, absent: false } => {
            entered.settled();
            Ok(Opened::Refused(reason))
        }
        // It may be called again, and another attempt has just done so.
        IntentState::Open { sent: false } | IntentState::Dead { absent: true, .. } => Err(IntentError::Lost),
        IntentState::Open { sent: true } => {
            entered.opened(intent.upstream_key);
            tracing::warn!(
                target: TRACING_TARGET, consumer = %intent.consumer, intent = intent.name,
                upstream_key = %intent.upstream_key,
                "a call is not repeated: the outcome of an earlier one is unknown"
            );
            let source =
                "an earlier call may have arrived, and the upstream does not recognize it, or not any more";
            Err(IntentError::Unknown { repeatable: false, source: Some(source.into()) })
        }
    }
}

/// An open intent. Make the call, then settle the intent by one of the methods. Dropped, the intent
/// stays open, as after a time-out.
#[must_use = "an intent that is dropped stays open"]
pub struct OpenIntent {
    idempotency: Idempotency,
    entered: Entered,
    key: UpstreamKey,
    fence: IntentFence,
    opened_at: Instant,
    dangling_after: Duration,
}

impl OpenIntent {
    /// The key with which the call is sent.
    #[must_use]
    pub fn upstream_key(&self) -> UpstreamKey {
        self.key
    }

    /// Records that the upstream has made the resource.
    ///
    /// A phase or a transaction of the handler that is open has the record locked. Then this
    /// returns immediately, and the resource is recorded after it.
    ///
    /// # Errors
    ///
    /// [`NotRecorded`](IntentError::NotRecorded) if the store does not answer for 10 s: further
    /// tries are made in the background. [`Lost`](IntentError::Lost) if something else was recorded
    /// meanwhile.
    pub async fn finalize(self, resource: impl Into<Resource>) -> Result<(), IntentError> {
        self.settle(IntentUpdate::Finalize(resource.into())).await
    }

    /// Records that the upstream has refused for good, for this reason.
    ///
    /// # Errors
    ///
    /// As of [`finalize`](Self::finalize).
    pub async fn dead(self, reason: impl Into<String>) -> Result<(), IntentError> {
        self.settle(IntentUpdate::Refuse(reason.into())).await
    }

    /// Records that the call has certainly not been processed. The intent stays open, and may be
    /// called again.
    ///
    /// # Errors
    ///
    /// As of [`finalize`](Self::finalize).
    pub async fn not_sent(self) -> Result<(), IntentError> {
        self.settle(IntentUpdate::NotSent).await
    }

    fn log(&self, failure: &CallFailure) {
        let (attempt, key, intent) = (&self.idempotency.facts.attempt, self.key, self.entered.name());
        let error = failure as &(dyn std::error::Error + 'static);
        match failure {
            CallFailure::Refused(_) => tracing::info!(
                target: TRACING_TARGET, consumer = %attempt.consumer, attempt = %attempt.id, intent,
                upstream_key = %key, error, "an upstream service has refused a call"
            ),
            CallFailure::NotSent(_) | CallFailure::Unknown(_) => tracing::warn!(
                target: TRACING_TARGET, consumer = %attempt.consumer, attempt = %attempt.id, intent,
                upstream_key = %key, error, "a call to an upstream service has no result"
            ),
        }
    }

    /// The reason why the call may not be made any more, if there is one.
    fn too_late(&self, timeout: Duration) -> Option<&'static str> {
        if self.idempotency.is_cancelled() {
            return Some("the attempt was cancelled before the call was made");
        }
        let left = self.dangling_after.saturating_sub(self.opened_at.elapsed());
        (left < timeout).then_some("the process was stopped for too long before the call was made")
    }

    async fn not_sent_because(self, cause: BoxError) -> IntentError {
        if let Err(error) = self.not_sent().await {
            log_unsettled(&error);
        }
        IntentError::NotSent(cause)
    }

    /// Returns the resource even if it is not recorded yet: the upstream has made it.
    async fn finalize_surely(self, resource: Resource) -> Result<Resource, IntentError> {
        match self.finalize(resource.clone()).await {
            Ok(()) => Ok(resource),
            Err(error @ IntentError::NotRecorded(_)) => {
                log_unsettled(&error);
                Ok(resource)
            }
            Err(error) => Err(error),
        }
    }

    async fn settle(self, update: IntentUpdate) -> Result<(), IntentError> {
        let Facts { node, settings, .. } = &*self.idempotency.facts;
        let wait = settings.settle_wait();
        let give_up = Instant::now() + settings.timing.max_execution.max(wait);
        let settles = matches!(update, IntentUpdate::Finalize(_) | IntentUpdate::Refuse(_));
        let task = node.settle_intent(self.key, self.fence, update, give_up);
        if settles {
            // Whatever the store says later: the next intent of this name is another one.
            self.entered.settled();
        }
        if self.idempotency.has_its_record_locked() {
            return Ok(());
        }
        let settled = node.tasks.wait_for(task, wait).await;
        match settled.map_err(IntentError::NotRecorded)? {
            Fenced::Applied => Ok(()),
            Fenced::Lost => Err(IntentError::Lost),
        }
    }
}

impl fmt::Debug for OpenIntent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenIntent").field("key", &self.key).finish_non_exhaustive()
    }
}

fn log_unsettled(error: &IntentError) {
    let error = error as &(dyn std::error::Error + 'static);
    tracing::error!(
        target: TRACING_TARGET, error,
        "the outcome of a call to an upstream service is not recorded yet; it is reconciled if it stays so"
    );
}

const TIMEOUT: Duration = Duration::from_secs(30);
const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);
const GRACE: Duration = Duration::from_secs(5 * 60);
