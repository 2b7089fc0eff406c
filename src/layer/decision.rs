//! The decision table: how a request is decided, from top to bottom, as the crate's documentation
//! shows it.
//!
//! | row | situation | here |
//! |---|---|---|
//! | 0 | a completer sends the request again, or an outer layer guards it | [`Entrance::of`] |
//! | 0 | an outer layer with another store over the same table guards it | [`Guarded::decide`] |
//! | 1 | the method is not guarded | [`head`], which asks for rows 2 to 5 |
//! | 2, 3, 4 | there is no key, or a malformed one | [`key_of`] |
//! | 5 | the consumer cannot be identified | [`consumer_of`] |
//! | 6 | the server shuts down, the body is announced to be too large | [`Guarded::admit`] |
//! | 6 | the body is too large, broken off or late; no memory is left | [`Guarded::receive`] |
//! | 7 | the store cannot keep requests | [`Guarded::check_store`] |
//! | 7 | too many handlers are running | [`Guarded::place`] |
//! | 7 | the store is away, or answers with an error | [`Guarded::without_store`] |
//! | 8 | the fingerprint differs | [`Guarded::same_request`] |
//! | 9 | another request is claiming the key | [`Guarded::decide`] |
//! | 9, 10, 11, 12 | the record is in progress, held or completed | [`response_of_record`] |
//! | 13 | the key is claimed | [`Guarded::begin`] |

use std::{
    error::Error,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{Response, request::Parts};
use http_body::{Body, SizeHint};
use tokio::{
    sync::{OwnedSemaphorePermit, oneshot},
    time::Instant,
};

use crate::{
    attempt::{Begun, Ownership, Won, idempotency::Idempotency, unguarded::Unguarded},
    consumer::Consumer,
    error::{BoxError, StoreError},
    fingerprint::{Comparison, Fingerprint},
    key::{IdempotencyKey, KEY_HEADER},
    layer::{
        answer::{in_progress, refused, response_of_record},
        body::ResponseBody,
        buffer::Buffered,
        discard::{discard, discard_rest},
        handler::Handler,
        resent::Resent,
        settings::{Settings, StoreOutage, Strategy},
    },
    node::Node,
    redact::TRACING_TARGET,
    rejection::{Rejection, RejectionCode},
    store::transaction::BeginOutcome,
    stored::{
        record::{Attempt, Claim, ClaimOutcome, Record, RecordState},
        response::StoredResponse,
    },
};

/// The decision by the head of a request.
pub(crate) enum Entrance {
    /// The request passes through. With the settings by which refusals of its handler are rendered,
    /// unless an outer layer does that.
    Pass(Option<Arc<Settings>>),
    Refuse(Rejection),
    Guard(Guarded),
}

/// The decision by body and record, for a guarded request that is not refused.
pub(crate) enum Decision {
    Run(Handler),
    Replay(StoredResponse),
    RunUnprotected(OwnedSemaphorePermit),
    /// An outer layer guards the request with the same record.
    Pass,
}

/// A request with a key, of a known consumer.
pub(crate) struct Guarded {
    pub(crate) node: Arc<Node>,
    pub(crate) settings: Arc<Settings>,
    consumer: Consumer,
    pub(crate) key: KeySource,
}

/// The origin of a request's key.
pub(crate) enum KeySource {
    /// The client sent it.
    Sent(IdempotencyKey),
    /// It is derived from the request and counts for this long.
    Derived(Duration),
    /// A completer sends the request again.
    Resent(Resent),
}

impl Entrance {
    pub(crate) fn of(node: &Arc<Node>, settings: &Arc<Settings>, parts: &mut Parts) -> Self {
        // Row 0: a completer sends it again, with record, consumer and key.
        if let Some(resent) = parts.extensions.remove::<Resent>() {
            let consumer = resent.consumer.clone();
            return Self::Guard(Guarded::new(node, settings, consumer, KeySource::Resent(resent)));
        }
        // Row 0: a layer around this one guards it already.
        if Idempotency::around(&parts.extensions).any(|outer| outer.is_of(node)) {
            return Self::Pass(None);
        }
        match head(settings, parts) {
            Ok(Some((key, consumer))) => Self::Guard(Guarded::new(node, settings, consumer, key)),
            Ok(None) => {
                mark_unguarded(settings, parts);
                Self::Pass(Some(Arc::clone(settings)))
            }
            Err(rejection) => Self::Refuse(rejection),
        }
    }
}

/// Tells a handler that asks for the attempt of a request with a key why there is none.
fn mark_unguarded(settings: &Settings, parts: &mut Parts) {
    let has_key = parts.headers.contains_key(&settings.key_header);
    if !has_key && !parts.headers.contains_key(KEY_HEADER) {
        return;
    }
    let reason = match (settings.enabled, has_key) {
        (false, _) => Unguarded::Disabled,
        (true, true) => Unguarded::OtherMethod,
        // The key of another layer.
        (true, false) => Unguarded::NoKey,
    };
    parts.extensions.insert(reason);
}

/// Rows 1 to 5: key and consumer. `None` passes through.
fn head(settings: &Settings, parts: &Parts) -> Result<Option<(KeySource, Consumer)>, Rejection> {
    // Row 1: the method is not guarded.
    if !settings.enabled || !settings.methods.contains(&parts.method) {
        return Ok(None);
    }
    let Some(key) = key_of(settings, parts)? else { return Ok(None) };
    Ok(Some((key, consumer_of(settings, parts)?)))
}

/// Rows 2, 3 and 4: the key.
fn key_of(settings: &Settings, parts: &Parts) -> Result<Option<KeySource>, Rejection> {
    let header = &settings.key_header;
    match settings.key_syntax.read(&parts.headers, header) {
        Ok(Some(key)) => Ok(Some(KeySource::Sent(key))),
        Ok(None) => match settings.derived_key {
            Some(window) => Ok(Some(KeySource::Derived(window))),
            // Row 3: the key is required.
            None if settings.required => Err(Rejection::new(
                RejectionCode::KeyMissing,
                format!(
                    "The request was not performed. This operation needs the header {header}, with a new key \
                     for each operation and the same key for every retry."
                ),
            )),
            // Row 2: the key is optional.
            None => Ok(None),
        },
        // Row 4: the key is malformed, or there are more than one.
        Err(error) => Err(Rejection::new(
            RejectionCode::KeyInvalid,
            format!("The request was not performed. The header {header} is invalid: {error}."),
        )),
    }
}

/// Row 5: the consumer.
fn consumer_of(settings: &Settings, parts: &Parts) -> Result<Consumer, Rejection> {
    settings.consumer.extract(parts, &settings.key_header).map_err(|cause| {
        cause.log();
        Rejection::new(
            RejectionCode::ConsumerUnidentified,
            "The request was not performed: the server cannot tell safely whose idempotency key this is. \
             Send the credentials that the API asks for. The server's log says which part of the request it \
             cannot read.",
        )
    })
}

impl Guarded {
    fn new(node: &Arc<Node>, settings: &Arc<Settings>, consumer: Consumer, key: KeySource) -> Self {
        Self { node: Arc::clone(node), settings: Arc::clone(settings), consumer, key }
    }

    pub(crate) fn refuse<B>(&self, rejection: Rejection) -> Response<ResponseBody<B>> {
        if let KeySource::Resent(resent) = &self.key {
            resent.refused(&rejection);
        }
        refused(&self.settings, rejection)
    }

    /// Row 6: the server does not shut down, and the body is not announced to be too large. Nothing
    /// of it is read yet.
    fn admit(&self, body: &SizeHint) -> Result<(), Rejection> {
        if let KeySource::Resent(resent) = &self.key {
            resent.reached();
        }
        // In the tracked task: a request that passes here is waited for by `drain`.
        if self.node.tasks.is_draining() {
            return Err(Rejection::new(
                RejectionCode::ShuttingDown,
                "The request was not performed: the server is shutting down. Send it again with the same \
                 key.",
            ));
        }
        self.settings.request_limits.check_announced(body)
    }

    /// Row 6: the body. `None` if the caller has gone meanwhile.
    pub(crate) async fn receive<B>(
        &self,
        head: &Parts,
        body: B,
        caller: oneshot::Receiver<()>,
    ) -> Result<Option<Buffered>, Rejection>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let limits = &self.settings.request_limits;
        if let Err(rejection) = self.admit(&body.size_hint()) {
            discard(head, body, limits.timeout);
            return Err(rejection);
        }
        let mut body = Box::pin(body);
        let received = limits.read(body.as_mut(), caller).await;
        if received.as_ref().is_err_and(|rejection| rejection.code() != RejectionCode::RequestIncomplete) {
            discard_rest(head.version, body, limits.timeout);
        }
        received
    }

    /// Rows 7 to 13: the store. Asks it twice if the record was made in another fingerprint scheme
    /// that is known here.
    pub(crate) async fn decide(&self, parts: &Parts, body: &Bytes) -> Result<Decision, Rejection> {
        self.check_store()?;
        self.settings.reaper.ensure_running(&self.node);
        let fingerprint = self.settings.fingerprinter.fingerprint(parts, body);
        let (key, window) = self.key(&fingerprint);
        // Before ids are made for a claim, which replays from the cache do not need.
        if let Ok(record) = self.node.known(&self.consumer, &key) {
            return self.answer_by(&record, &fingerprint, parts, body).await;
        }
        let mut claim = self.new_claim(key, window, fingerprint);
        if self.settings.in_flight.available_permits() == 0 {
            return self.decide_without_place(&claim, parts, body).await;
        }
        let mut strategy = self.settings.strategy;
        for _ in 0..2 {
            let record = match self.take(&claim, strategy).await {
                Err(error) => return self.without_store(&claim.attempt, &error),
                Ok(Taken::Won(won)) => return self.begin(won, parts, body).await.map(Decision::Run),
                Ok(Taken::Contended) if self.is_locked_by_outer_layer(&claim.attempt, parts) => {
                    return Ok(Decision::Pass);
                }
                // Row 9: another request is claiming the key at this very moment.
                Ok(Taken::Contended) => return Err(self.in_progress(&claim.attempt)),
                Ok(Taken::Exists(record)) => record,
            };
            if self.is_of_outer_layer(&record, parts) {
                return Ok(Decision::Pass);
            }
            let fingerprint = self.same_request(&record, &claim.fingerprint, parts, body)?;
            let is_final = strategy == Strategy::Claimed && claim.fingerprint == fingerprint;
            if is_final || !record.is_lapsed() {
                return response_of_record(&self.node, &self.settings, &record).await.map(Decision::Replay);
            }
            // The store hands an abandoned record only to the same fingerprint, and only to a claim.
            (claim.fingerprint, strategy) = (fingerprint, Strategy::Claimed);
        }
        // The record changed between the two claims.
        Err(self.in_progress(&claim.attempt))
    }

    /// Takes the key for an attempt: by a claim, or by a transaction.
    async fn take(&self, claim: &Claim, strategy: Strategy) -> Result<Taken, StoreError> {
        let attempts = &self.settings.attempts;
        let (claimed_at, limit) = (Instant::now(), attempts.store_timeout);
        let won = |record_id, attempt_number, age, begun| {
            let claim = claim.clone();
            Taken::Won(Won { claim, record_id, attempt_number, age, claimed_at, begun })
        };
        Ok(match strategy {
            Strategy::Claimed => match self.node.claim(claim, limit).await? {
                ClaimOutcome::Won { record_id, attempt_number, age } => {
                    won(record_id, attempt_number, age, None)
                }
                ClaimOutcome::Exists(record) => Taken::Exists(record),
                ClaimOutcome::Contended => Taken::Contended,
            },
            Strategy::SingleTransaction => {
                match self.node.begin(claim, attempts.transaction_limits(), limit).await? {
                    BeginOutcome::Begun { transaction, extensions } => {
                        won(claim.record_id, 1, Duration::ZERO, Some(Begun { transaction, extensions }))
                    }
                    BeginOutcome::Exists(record) => Taken::Exists(record),
                    BeginOutcome::Contended => Taken::Contended,
                }
            }
        })
    }

    /// No handler could run: nothing is claimed, and only what needs no handler is answered.
    async fn decide_without_place(
        &self,
        claim: &Claim,
        parts: &Parts,
        body: &Bytes,
    ) -> Result<Decision, Rejection> {
        let limit = self.settings.attempts.store_timeout;
        let record = match self.node.look_up(&claim.attempt, limit).await {
            Ok(record) => record.filter(|record| !may_be_claimed(record)).ok_or_else(overloaded)?,
            Err(error) => return self.without_store(&claim.attempt, &error),
        };
        self.answer_by(&record, &claim.fingerprint, parts, body).await
    }

    /// Rows 8 to 12: the answer of a record that is not claimed.
    async fn answer_by(
        &self,
        record: &Record,
        fingerprint: &Fingerprint,
        parts: &Parts,
        body: &Bytes,
    ) -> Result<Decision, Rejection> {
        if self.is_of_outer_layer(record, parts) {
            return Ok(Decision::Pass);
        }
        self.same_request(record, fingerprint, parts, body)?;
        response_of_record(&self.node, &self.settings, record).await.map(Decision::Replay)
    }

    /// Row 7: a place for the handler among those that run simultaneously.
    fn place(&self) -> Result<OwnedSemaphorePermit, Rejection> {
        Arc::clone(&self.settings.in_flight).try_acquire_owned().map_err(|_| overloaded())
    }

    /// Row 0: the record belongs to an attempt of a layer around this one, which has another node
    /// over the same table.
    fn is_of_outer_layer(&self, record: &Record, parts: &Parts) -> bool {
        let is_outer = Idempotency::around(&parts.extensions).any(|outer| outer.record_id() == record.id);
        if is_outer {
            self.node.warn_of_nesting();
        }
        is_outer
    }

    /// Row 0: the transaction of an attempt of a layer around this one has the key, as far as it
    /// can be told.
    fn is_locked_by_outer_layer(&self, attempt: &Attempt, parts: &Parts) -> bool {
        let is_outer = |outer: &Idempotency| {
            outer.is_single() && *outer.consumer() == attempt.consumer && *outer.key() == attempt.key
        };
        let is_locked = Idempotency::around(&parts.extensions).any(is_outer);
        if is_locked {
            self.node.warn_of_nesting();
        }
        is_locked
    }

    /// Row 7: the store can do what the settings ask for. Found out before anything is claimed.
    fn check_store(&self) -> Result<(), Rejection> {
        if self.settings.kept_requests.is_some() && self.node.store.recovery().is_none() {
            tracing::error!(
                target: TRACING_TARGET,
                "this store cannot keep requests: use a store of this crate, or remove with_kept_requests"
            );
            return Err(Rejection::new(
                RejectionCode::StoreMisconfigured,
                "The request was not performed: the store of this server cannot keep requests.",
            ));
        }
        Ok(())
    }

    /// The key, and how long it counts if it is derived from the request.
    fn key(&self, fingerprint: &Fingerprint) -> (IdempotencyKey, Option<Duration>) {
        match &self.key {
            KeySource::Sent(key) => (key.clone(), None),
            KeySource::Derived(window) => {
                (IdempotencyKey::from_digest(fingerprint.as_bytes()), Some(*window))
            }
            KeySource::Resent(resent) => (resent.key.clone(), None),
        }
    }

    fn new_claim(&self, key: IdempotencyKey, window: Option<Duration>, fingerprint: Fingerprint) -> Claim {
        let attempt = Attempt::new(self.consumer.clone(), key);
        let claim = self.settings.attempts.new_claim(attempt, fingerprint);
        Claim { retention: window.unwrap_or(claim.retention), ..claim }
    }

    /// Row 7: the store is away, or answers with an error.
    fn without_store(&self, attempt: &Attempt, error: &StoreError) -> Result<Decision, Rejection> {
        let resent = matches!(self.key, KeySource::Resent(_));
        if error.is_retryable() && !resent && self.settings.on_store_outage == StoreOutage::RunUnprotected {
            let (consumer, key) = (&attempt.consumer, self.settings.attempts.shown(&attempt.key));
            let error = error as &dyn Error;
            tracing::error!(
                target: TRACING_TARGET, %consumer, %key, error,
                "the handler runs without protection"
            );
            return self.place().map(Decision::RunUnprotected);
        }
        Err(self.store_failed(attempt, error, "the key could not be claimed"))
    }

    pub(crate) fn store_failed(&self, attempt: &Attempt, error: &StoreError, what: &str) -> Rejection {
        let (consumer, key) = (&attempt.consumer, self.settings.attempts.shown(&attempt.key));
        let source = error as &dyn Error;
        tracing::error!(target: TRACING_TARGET, %consumer, %key, error = source, "{what}");
        Rejection::of_store(error.kind())
    }

    /// Row 8: the request's fingerprint in the scheme of the record, if it is the record's.
    fn same_request(
        &self,
        record: &Record,
        fingerprint: &Fingerprint,
        parts: &Parts,
        body: &Bytes,
    ) -> Result<Fingerprint, Rejection> {
        if record.fingerprint == *fingerprint {
            return Ok(fingerprint.clone());
        }
        let (consumer, key) = (&self.consumer, self.settings.attempts.shown(&record.key));
        match self.settings.fingerprinter.compare(&record.fingerprint, parts, body) {
            Comparison::Same(fingerprint) => Ok(fingerprint),
            Comparison::Different(difference) => {
                tracing::info!(
                    target: TRACING_TARGET, %consumer, %key, %difference,
                    "mismatch: the key was used for another request"
                );
                Err(Rejection::new(
                    RejectionCode::KeyReused,
                    format!(
                        "The request was not performed: its key was used for a request with another \
                         {difference}. Use a new key for a new request.{}",
                        difference.hint()
                    ),
                ))
            }
            Comparison::Unknown => {
                tracing::warn!(
                    target: TRACING_TARGET, %consumer, %key,
                    "the record's fingerprint was made with settings that are unknown here: see \
                     Fingerprinter::add_previous"
                );
                Err(Rejection::new(
                    RejectionCode::FingerprintUnknown,
                    "The request was not performed: the first request with this key was recorded by a server \
                     with other settings. Send it again later with the same key.",
                ))
            }
        }
    }

    pub(crate) fn in_progress(&self, attempt: &Attempt) -> Rejection {
        in_progress(&self.settings, &attempt.consumer, &attempt.key)
    }

    /// Row 13: the key is claimed, and the request kept if configured. Returns the handler, ready
    /// to run.
    async fn begin(&self, won: Won, parts: &Parts, body: &Bytes) -> Result<Handler, Rejection> {
        let admitted = match self.place() {
            Ok(place) => self.keep_request(&won, parts, body).await.map(|()| place),
            Err(rejection) => Err(rejection),
        };
        let permit = match admitted {
            Ok(place) => place,
            // Whatever the reason: if only the lease of the claim is over, the key is still this
            // attempt's to give back.
            Err(rejection) => {
                match won.begun {
                    Some(begun) => self.node.take_back(begun.transaction),
                    None => self.node.give_back(won.claim.attempt),
                }
                return Err(rejection);
            }
        };
        let resent = matches!(self.key, KeySource::Resent(_));
        let ownership = Ownership::begin(&self.node, &self.settings.attempts, won);
        Ok(Handler { settings: Arc::clone(&self.settings), ownership, resent, permit })
    }
}

/// The outcome of taking a key.
#[expect(
    clippy::large_enum_variant,
    reason = "it is made and taken apart once, and the large variant is the rule"
)]
enum Taken {
    Won(Won),
    Exists(Box<Record>),
    Contended,
}

fn overloaded() -> Rejection {
    Rejection::new(
        RejectionCode::Overloaded,
        "The request was not performed: too many requests are running. Send it again later with the same \
         key.",
    )
}

/// A claim might be won: by the clock of this process, the record has expired or its lease ran out.
fn may_be_claimed(record: &Record) -> bool {
    let completed = matches!(record.state, RecordState::Completed { .. });
    completed && record.expires_at <= SystemTime::now() || record.is_lapsed()
}
