//! A request with a key: received whole, decided by the store, run or answered.

use std::{future::poll_fn, mem, sync::Arc};

use bytes::Bytes;
use http::{Request, Response, request::Parts};
use http_body::Body;
use tokio::{
    sync::{OwnedSemaphorePermit, oneshot},
    time::Instant,
};
use tower_service::Service;

use crate::{
    attempt::idempotency::Unprotected,
    consumer::Consumer,
    error::{BoxError, StoreError, StoreErrorKind},
    fingerprint::Fingerprint,
    key::IdempotencyKey,
    layer::{
        answer::{answer_from, in_progress, refused, replay},
        body::{RequestBody, ResponseBody},
        buffer::Buffered,
        future::Answer,
        handler::Execution,
        settings::{KeySource, Settings, StoreOutage},
    },
    node::Node,
    redact::TRACING_TARGET,
    rejection::{Rejection, RejectionCode},
    stored::{
        record::{Attempt, Claim, ClaimOutcome, Fenced, Record, RecordId, RecordState},
        response::StoredResponse,
    },
};

/// A request with a key, of a known consumer.
pub(crate) struct Guarded {
    node: Arc<Node>,
    settings: Arc<Settings>,
    consumer: Consumer,
    key: KeySource,
}

/// What a guarded request comes to, unless it is refused.
enum Decision {
    Run(Execution),
    Replay(StoredResponse),
    RunUnprotected,
}

impl Guarded {
    pub(crate) fn new(
        node: &Arc<Node>,
        settings: &Arc<Settings>,
        consumer: Consumer,
        key: KeySource,
    ) -> Self {
        Self { node: Arc::clone(node), settings: Arc::clone(settings), consumer, key }
    }

    /// The rest of the way of a request. Runs in a task of its own.
    pub(crate) async fn answer<S, ReqBody, ResBody>(
        self,
        mut inner: S,
        parts: Parts,
        body: ReqBody,
        caller: oneshot::Receiver<()>,
    ) -> Answer<ResBody, S::Error>
    where
        S: Service<Request<RequestBody<ReqBody>>, Response = Response<ResBody>> + Clone + Send + 'static,
        S::Future: Send + 'static,
        S::Error: Send + 'static,
        ReqBody: Body<Data = Bytes> + Send + 'static,
        ReqBody::Error: Into<BoxError>,
        ResBody: Body<Data = Bytes> + Send + 'static,
        ResBody::Error: Into<BoxError>,
    {
        if let KeySource::Resent(resent) = &self.key {
            resent.reached();
        }
        let body = match self.receive(body, caller).await {
            Ok(Some(body)) => body,
            Ok(None) => return Ok(Response::default()),
            Err(rejection) => return Ok(self.refuse(rejection)),
        };
        for _ in 0..self.settings.transactions.reruns {
            let clone = inner.clone();
            let ready = mem::replace(&mut inner, clone);
            let answer = self.perform(ready, parts.clone(), body.clone()).await;
            if !answer.as_ref().is_ok_and(collided) {
                return answer;
            }
            poll_fn(|cx| inner.poll_ready(cx)).await?;
        }
        self.perform(inner, parts, body).await
    }

    async fn perform<S, ReqBody, ResBody>(
        &self,
        mut inner: S,
        parts: Parts,
        body: Buffered,
    ) -> Answer<ResBody, S::Error>
    where
        S: Service<Request<RequestBody<ReqBody>>, Response = Response<ResBody>> + Send + 'static,
        S::Future: Send + 'static,
        S::Error: Send + 'static,
        ReqBody: Body<Data = Bytes> + Send + 'static,
        ResBody: Body<Data = Bytes> + Send + 'static,
        ResBody::Error: Into<BoxError>,
    {
        let decision = self.decide(&parts, &body.data).await;
        let mut request = Request::from_parts(parts, RequestBody::buffered(body.data, body.trailers));
        match decision {
            Ok(Decision::Run(execution)) => execution.run(inner, request).await,
            Ok(Decision::Replay(stored)) => Ok(replay(&self.settings, stored)),
            Ok(Decision::RunUnprotected) => {
                request.extensions_mut().insert(Unprotected);
                inner.call(request).await.map(|response| response.map(ResponseBody::passed))
            }
            Err(rejection) => Ok(self.refuse(rejection)),
        }
    }

    fn refuse<B>(&self, rejection: Rejection) -> Response<ResponseBody<B>> {
        if let KeySource::Resent(resent) = &self.key {
            resent.refused(&rejection);
        }
        refused(&self.settings, rejection)
    }

    async fn receive<B>(&self, body: B, caller: oneshot::Receiver<()>) -> Result<Option<Buffered>, Rejection>
    where
        B: Body<Data = Bytes>,
        B::Error: Into<BoxError>,
    {
        if self.node.tasks.is_draining() {
            return Err(Rejection::new(
                RejectionCode::ShuttingDown,
                "The server is shutting down; send the request again.",
            ));
        }
        self.settings.request_limits.read(body, caller).await
    }

    async fn decide(&self, parts: &Parts, body: &Bytes) -> Result<Decision, Rejection> {
        let permit = self.settings.admit()?;
        self.check_keeping()?;
        self.settings.reaper.ensure_running(&self.node);
        let fingerprint = self.settings.fingerprinter.fingerprint(parts, body);
        let (key, retention) = match &self.key {
            KeySource::Sent(key) => (key.clone(), self.settings.timing.retention),
            KeySource::Derived(window) => (IdempotencyKey::from_digest(fingerprint.as_bytes()), *window),
            KeySource::Resent(resent) => (resent.key.clone(), self.settings.timing.retention),
        };
        let claim = Claim {
            lease: self.settings.timing.lease,
            retention,
            max_abandoned: self.settings.policy.max_abandoned(),
            ..Claim::new(Attempt::new(self.consumer.clone(), key), fingerprint)
        };
        self.claim(claim, permit, parts, body).await
    }

    /// Claims the key; once more if the record was made in another fingerprint scheme that is known here.
    async fn claim(
        &self,
        mut claim: Claim,
        permit: Option<OwnedSemaphorePermit>,
        parts: &Parts,
        body: &Bytes,
    ) -> Result<Decision, Rejection> {
        for _ in 0..2 {
            let claimed_at = Instant::now();
            let outcome = match self.node.ask(&claim, self.settings.store_timeout).await {
                Ok(outcome) => outcome,
                Err(error) => return self.without_store(&claim.attempt, &error),
            };
            let record = match outcome {
                ClaimOutcome::Won { record_id, attempt_number } => {
                    self.before_handler(&claim, claimed_at, record_id, (parts, body)).await?;
                    return Ok(Decision::Run(self.execution(
                        claim,
                        record_id,
                        attempt_number,
                        claimed_at,
                        permit,
                    )));
                }
                ClaimOutcome::Contended => break,
                ClaimOutcome::Exists(record) => record,
            };
            let fingerprint = self.same_request(&record, &claim.fingerprint, parts, body)?;
            if claim.fingerprint == fingerprint || !may_be_taken_over(&record) {
                return answer_from(&self.settings, &record).await.map(Decision::Replay);
            }
            claim.fingerprint = fingerprint;
        }
        Err(in_progress(&self.settings, &claim.attempt.consumer, &claim.attempt.key))
    }

    /// A store that cannot keep requests is found out before anything is claimed.
    fn check_keeping(&self) -> Result<(), Rejection> {
        if self.settings.kept_requests.is_none() || self.node.store.recovery().is_some() {
            return Ok(());
        }
        tracing::error!(
            target: TRACING_TARGET,
            "requests are to be kept and this store cannot: use a store of this crate, or no with_kept_requests"
        );
        Err(Rejection::new(
            RejectionCode::StoreMisconfigured,
            "The request was not performed: the store of this server cannot keep requests.",
        ))
    }

    /// Keeps the request of a record that was claimed, once. A later attempt keeps it if the first one died before it could.
    /// A request that is sent again runs only for the record that it was kept for.
    async fn before_handler(
        &self,
        claim: &Claim,
        claimed_at: Instant,
        record_id: RecordId,
        request: (&Parts, &Bytes),
    ) -> Result<(), Rejection> {
        if let KeySource::Resent(resent) = &self.key {
            if resent.record_id == record_id {
                return Ok(());
            }
            self.node.give_back(claim.attempt.clone());
            return Err(Rejection::new(
                RejectionCode::KeyReused,
                "The record of the request that is sent again has gone.",
            ));
        }
        let kept = self.node.keep_request(&self.settings, claim, claimed_at, record_id, request).await;
        match kept {
            Ok(Fenced::Applied) => Ok(()),
            Ok(Fenced::Lost) => {
                // If only its lease is over, it is still ours to give back.
                self.node.give_back(claim.attempt.clone());
                Err(in_progress(&self.settings, &claim.attempt.consumer, &claim.attempt.key))
            }
            Err(error) => {
                self.node.give_back(claim.attempt.clone());
                Err(self.no_claim(&claim.attempt, &error))
            }
        }
    }

    fn execution(
        &self,
        claim: Claim,
        record_id: RecordId,
        attempt_number: u32,
        claimed_at: Instant,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Execution {
        Execution {
            node: Arc::clone(&self.node),
            settings: Arc::clone(&self.settings),
            attempt: claim.attempt,
            fingerprint: claim.fingerprint,
            record_id,
            attempt_number,
            progress: Arc::default(),
            resent: matches!(self.key, KeySource::Resent(_)),
            claimed_at,
            _permit: permit,
        }
    }

    /// The request's fingerprint in the scheme of the record, if it is the record's.
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
        let (consumer, key) = (&self.consumer, self.settings.shown(&record.key));
        match self.settings.fingerprinter.fingerprint_like(&record.fingerprint, parts, body) {
            Some(fingerprint) if fingerprint == record.fingerprint => Ok(fingerprint),
            Some(_) => {
                tracing::info!(target: TRACING_TARGET, %consumer, %key, "mismatch: the key was used for another request");
                Err(Rejection::new(
                    RejectionCode::KeyReused,
                    "This key was used for a request with another method, path or body. Use a new key for a new request.",
                ))
            }
            None => {
                tracing::warn!(
                    target: TRACING_TARGET, %consumer, %key,
                    "the record's fingerprint was made with settings that are unknown here: see Fingerprinter::add_previous"
                );
                Err(Rejection::new(
                    RejectionCode::FingerprintUnknown,
                    "This key's first request was recorded by a server with other settings; try again later.",
                ))
            }
        }
    }

    fn without_store(&self, attempt: &Attempt, error: &StoreError) -> Result<Decision, Rejection> {
        let (consumer, key) = (&attempt.consumer, self.settings.shown(&attempt.key));
        let source = error as &dyn std::error::Error;
        let down = matches!(error.kind(), StoreErrorKind::Unavailable | StoreErrorKind::Ambiguous);
        let resent = matches!(self.key, KeySource::Resent(_));
        if down && !resent && self.settings.on_store_outage == StoreOutage::RunUnprotected {
            tracing::error!(target: TRACING_TARGET, %consumer, %key, error = source, "running without protection");
            return Ok(Decision::RunUnprotected);
        }
        Err(self.no_claim(attempt, error))
    }

    fn no_claim(&self, attempt: &Attempt, error: &StoreError) -> Rejection {
        let (consumer, key) = (&attempt.consumer, self.settings.shown(&attempt.key));
        let source = error as &dyn std::error::Error;
        tracing::error!(target: TRACING_TARGET, %consumer, %key, error = source, "no claim");
        let down = matches!(error.kind(), StoreErrorKind::Unavailable | StoreErrorKind::Ambiguous);
        let detail = match down {
            true => "The request was not performed; send it again with the same key.",
            false => "The request was not performed; the server's log says why.",
        };
        Rejection::new(RejectionCode::of_store(error.kind()), detail)
    }
}

/// Whether the transaction collided with another one, so that the request may be performed again at once.
fn collided<B>(response: &Response<B>) -> bool {
    let rejection = response.extensions().get::<Rejection>();
    rejection.is_some_and(|rejection| rejection.code() == RejectionCode::TransactionConflict)
}

fn may_be_taken_over(record: &Record) -> bool {
    matches!(record.state, RecordState::InProgress { lease_remaining } if lease_remaining.is_zero())
}
