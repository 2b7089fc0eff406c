//! One attempt: runs the handler, judges its result, writes it down.

use std::{
    error::Error,
    future::{Future, pending, poll_fn},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use http::{Extensions, HeaderMap, Request, Response, header, response::Parts};
use http_body::Body;
use tokio::{
    sync::OwnedSemaphorePermit,
    task::{JoinError, JoinHandle},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tower_service::Service;
use tracing::Instrument;

use crate::{
    attempt::{idempotency::Idempotency, progress::Progress},
    error::BoxError,
    fingerprint::Fingerprint,
    layer::{
        answer::{answer_from, refused, replay},
        body::{RequestBody, ResponseBody},
        buffer::{Buffered, Collected, collect},
        closing::{Closed, Closing, Outcome},
        future::Answer,
        representation::rendered,
        settings::Settings,
    },
    node::{Node, ends::End, leases::Lease, running::Entered},
    policy::Directive,
    redact::TRACING_TARGET,
    rejection::{Rejection, RejectionCode},
    store::transaction::{StoreTransaction, TransactionErrorKind, TransactionUsage},
    stored::{
        record::{Attempt, Record, RecordId},
        response::Representation,
        response::{StoredBody, StoredResponse},
    },
};

/// An attempt that owns its record and is about to run.
pub(crate) struct Execution {
    pub(crate) node: Arc<Node>,
    pub(crate) settings: Arc<Settings>,
    pub(crate) attempt: Attempt,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) record_id: RecordId,
    pub(crate) attempt_number: u32,
    pub(crate) progress: Arc<Progress>,
    /// Whether the completer has sent the request.
    pub(crate) resent: bool,
    /// When the claim was sent: the lease runs from then on at the earliest.
    pub(crate) claimed_at: Instant,
    pub(crate) _permit: Option<OwnedSemaphorePermit>,
}

/// A response whose body was collected as far as possible, or the error of the inner service.
type Performed<B, E> = Result<(Parts, Collected<B>), E>;

/// What the client gets.
enum Verdict<B, E> {
    /// What the handler made.
    Passed(Answer<B, E>),
    /// What is stored, with the extensions of the handler's response.
    Stored(StoredResponse, Extensions),
    /// A refusal, made of what happened.
    Refused(Rejection),
}

/// How the handler's task ended.
#[expect(
    clippy::large_enum_variant,
    reason = "it is made and taken apart once, and the large variant is the rule"
)]
enum HandlerEnd<B, E> {
    Performed(Performed<B, E>),
    Panicked,
    Cancelled(Cause),
}

impl Execution {
    pub(crate) async fn run<S, ReqBody, ResBody>(
        self,
        inner: S,
        mut request: Request<RequestBody<ReqBody>>,
    ) -> Answer<ResBody, S::Error>
    where
        S: Service<Request<RequestBody<ReqBody>>, Response = Response<ResBody>> + Send + 'static,
        S::Future: Send + 'static,
        S::Error: Send + 'static,
        ReqBody: Send + 'static,
        ResBody: Body<Data = Bytes> + Send + 'static,
        ResBody::Error: Into<BoxError>,
    {
        let cancelled = CancellationToken::new();
        let entered = self.node.running.enter(self.attempt.clone(), self.record());
        let lease = self.keep_lease(&cancelled);
        let idempotency = self.idempotency(&cancelled);
        request.extensions_mut().insert(idempotency.clone());
        let mut offered = Extensions::new();
        let transaction = self.offer_transaction(&mut offered);
        request.extensions_mut().extend(offered.clone());
        idempotency.offer(transaction.clone(), offered);
        let mut handler = tokio::spawn(perform(inner, request, Arc::clone(&self.settings)).in_current_span());
        let this = Arc::new(self);
        let ended = match this.wait(&mut handler, &cancelled, transaction.as_deref()).await {
            Ok(ended) => ended,
            Err(cause) => {
                let held = matches!(this.end_without_result(), End::Hold);
                let refusal = refused(&this.settings, cause.rejection().final_if(held));
                this.leave_behind(handler, transaction, lease, entered);
                return Ok(refusal);
            }
        };
        let judged = this.judge(ended, transaction.as_deref());
        let closed = this.closing(lease, entered).close(judged.outcome, transaction).await;
        this.answer(closed, judged.answer).await
    }

    /// What the client gets, by what became of the attempt.
    async fn answer<B, E>(&self, closed: Closed, answer: Verdict<B, E>) -> Answer<B, E> {
        match closed {
            Closed::Refused(rejection) => Ok(refused(&self.settings, rejection)),
            Closed::Superseded(record) => Ok(match answer_from(&self.settings, &record).await {
                Ok(stored) => replay(&self.settings, stored),
                Err(rejection) => refused(&self.settings, rejection),
            }),
            Closed::AsJudged => match answer {
                Verdict::Passed(answer) => answer,
                Verdict::Stored(response, extensions) => Ok(self.first_response(response, extensions).await),
                Verdict::Refused(rejection) => Ok(refused(&self.settings, rejection)),
            },
        }
    }

    async fn first_response<B>(
        &self,
        response: StoredResponse,
        extensions: Extensions,
    ) -> Response<ResponseBody<B>> {
        match rendered(&self.settings, &self.attempt.consumer, &self.attempt.key, response).await {
            Ok(response) => {
                let mut response = response.into_response();
                *response.extensions_mut() = extensions;
                response
            }
            Err(rejection) => refused(&self.settings, rejection),
        }
    }

    fn offer_transaction(&self, extensions: &mut Extensions) -> Option<Arc<dyn StoreTransaction>> {
        let Settings { transactions, timing, store_timeout, .. } = &*self.settings;
        let limits = transactions.limits(timing.lease, *store_timeout);
        self.node.store.transaction(&self.attempt, &limits, extensions)
    }

    fn closing(&self, lease: Lease, entered: Entered) -> Closing {
        Closing {
            node: Arc::clone(&self.node),
            settings: Arc::clone(&self.settings),
            attempt: self.attempt.clone(),
            fingerprint: self.fingerprint.clone(),
            lease,
            progress: Arc::clone(&self.progress),
            _entered: entered,
        }
    }

    fn keep_lease(&self, lost: &CancellationToken) -> Lease {
        let timing = &self.settings.timing;
        let interval = timing.renewal_interval();
        let lease =
            Lease::new(&self.node.renewer, self.attempt.clone(), timing.lease, interval, lost.clone());
        lease.keep(interval.saturating_sub(self.claimed_at.elapsed()));
        lease
    }

    fn record(&self) -> Record {
        let lease = self.settings.timing.lease;
        Record::won(&self.attempt, &self.fingerprint, lease, self.record_id, self.attempt_number)
    }

    fn idempotency(&self, cancelled: &CancellationToken) -> Idempotency {
        Idempotency::new(
            &self.node,
            &self.settings,
            self.attempt.clone(),
            self.record_id,
            self.attempt_number,
            cancelled.clone(),
            Arc::clone(&self.progress),
        )
    }

    /// Waits for the handler, at most `max_execution`, of which it is told shortly before, and at most as long as its
    /// transaction may be open. An error if it runs on although it was cancelled, because it does not yield.
    async fn wait<B, E>(
        &self,
        handler: &mut JoinHandle<Performed<B, E>>,
        cancelled: &CancellationToken,
        transaction: Option<&dyn StoreTransaction>,
    ) -> Result<HandlerEnd<B, E>, Cause> {
        let limit = self.settings.timing.max_execution;
        let mut max_execution = pin!(async {
            sleep(limit * 9 / 10).await;
            cancelled.cancel();
            sleep(limit / 10).await;
        });
        let mut overdue = pin!(async {
            match transaction {
                Some(transaction) => transaction.overdue().await,
                None => pending().await,
            }
        });
        let first = poll_fn(|cx| {
            if let Poll::Ready(ended) = Pin::new(&mut *handler).poll(cx) {
                return Poll::Ready(Ok(ended));
            }
            if overdue.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(Cause::TransactionOverdue));
            }
            max_execution.as_mut().poll(cx).map(|()| Err(Cause::TooLong))
        });
        let cause = match first.await {
            Ok(ended) => return Ok(self.handler_end(ended, Cause::TooLong)),
            Err(cause) => cause,
        };
        self.log_failure(&cause, "the handler is cancelled");
        handler.abort();
        let ended = timeout(CANCEL_GRACE, &mut *handler).await;
        ended.map(|ended| self.handler_end(ended, cause)).map_err(|_| cause)
    }

    fn handler_end<B, E>(
        &self,
        ended: Result<Performed<B, E>, JoinError>,
        cancelled: Cause,
    ) -> HandlerEnd<B, E> {
        match ended {
            Ok(performed) => HandlerEnd::Performed(performed),
            Err(error) if error.is_panic() => {
                self.log_failure(&error, "the handler panicked");
                HandlerEnd::Panicked
            }
            Err(_) => HandlerEnd::Cancelled(cancelled),
        }
    }

    /// Nobody may run while a cancelled handler still does, and what it returns all the same counts.
    fn leave_behind<B, E>(
        self: Arc<Self>,
        handler: JoinHandle<Performed<B, E>>,
        transaction: Option<Arc<dyn StoreTransaction>>,
        lease: Lease,
        entered: Entered,
    ) where
        B: Send + 'static,
        E: Send + 'static,
    {
        let tasks = self.node.tasks.clone();
        tasks.spawn(async move {
            let ended = self.handler_end(handler.await, Cause::TooLong);
            let Judged { outcome, answer } = self.judge(ended, transaction.as_deref());
            drop(answer);
            self.closing(lease, entered).close(outcome, transaction).await
        });
    }

    /// What is written down, and what the client gets once it is. It calls the application's policy.
    fn judge<B, E>(
        &self,
        ended: HandlerEnd<B, E>,
        transaction: Option<&dyn StoreTransaction>,
    ) -> Judged<B, E> {
        let in_use = || transaction.is_some_and(|transaction| transaction.usage() == TransactionUsage::InUse);
        let judge = || {
            if let Some(rejection) = self.progress.held() {
                drop(ended);
                return Judged { outcome: End::Hold.into(), answer: Verdict::Refused(rejection) };
            }
            if matches!(ended, HandlerEnd::Performed(Ok(_))) && in_use() {
                // If the body of the response has it, it is given back now.
                drop(ended);
                return self.transaction_kept();
            }
            self.judge_end(ended)
        };
        catch_unwind(AssertUnwindSafe(judge)).unwrap_or_else(|_| {
            self.without_result(Rejection::new(RejectionCode::Internal, "The result could not be judged."))
        })
    }

    fn judge_end<B, E>(&self, ended: HandlerEnd<B, E>) -> Judged<B, E> {
        match ended {
            HandlerEnd::Performed(Ok((parts, body))) => self.judge_response(parts, body),
            HandlerEnd::Performed(Err(error)) => {
                Judged { outcome: self.end_without_result().into(), answer: Verdict::Passed(Err(error)) }
            }
            HandlerEnd::Panicked => {
                self.without_result(Rejection::new(RejectionCode::HandlerPanicked, "The handler failed."))
            }
            HandlerEnd::Cancelled(cause) => self.without_result(cause.rejection()),
        }
    }

    fn judge_response<B, E>(&self, mut parts: Parts, body: Collected<B>) -> Judged<B, E> {
        let representation = parts.extensions.remove::<Representation>();
        let (body, kept) = match body {
            Collected::Whole(Buffered { data, trailers }) => {
                (ResponseBody::buffered(data.clone(), trailers.clone()), StoredBody::Kept { data, trailers })
            }
            Collected::Partial(frames, rest) => (ResponseBody::resumed(frames, rest), StoredBody::NotKept),
            Collected::Broken(error) => {
                self.log_failure(&*error, "the response broke off");
                let detail = "The handler's response broke off.";
                return self.without_result(Rejection::new(RejectionCode::ResponseIncomplete, detail));
            }
        };
        if let Some(outcome) = self.unstored(&parts) {
            return Judged { outcome, answer: Verdict::Passed(Ok(Response::from_parts(parts, body))) };
        }
        if let Some(representation) = representation {
            return self.judge_represented(parts, representation);
        }
        let first = StoredResponse::of(&parts, kept);
        let outcome = self.stored(first.clone());
        let answer = match first.body == StoredBody::NotKept {
            true => Verdict::Passed(Ok(Response::from_parts(parts, body))),
            false => Verdict::Stored(first, parts.extensions),
        };
        Judged { outcome, answer }
    }

    fn judge_represented<B, E>(&self, parts: Parts, representation: Representation) -> Judged<B, E> {
        let too_large = representation.data().len() > self.settings.response_body_limit;
        let first = StoredResponse::represented(parts.status, representation);
        let mut kept = first.clone();
        if too_large {
            kept.body = StoredBody::NotKept;
        }
        Judged { outcome: self.stored(kept), answer: Verdict::Stored(first, parts.extensions) }
    }

    fn transaction_kept<B, E>(&self) -> Judged<B, E> {
        tracing::error!(
            target: TRACING_TARGET, consumer = %self.attempt.consumer, attempt = %self.attempt.id,
            "the handler returned without giving its transaction back: it is in a task, a static or the response's body"
        );
        let rejection = TransactionErrorKind::InUse.rejection();
        Judged { outcome: End::Release.into(), answer: Verdict::Refused(rejection) }
    }

    /// How an attempt with this response ends, unless the response is to be stored.
    fn unstored(&self, parts: &Parts) -> Option<Outcome> {
        // A refusal of a layer inside this one is never stored.
        let refused = parts.extensions.get::<Rejection>().is_some();
        let release = refused || self.may_lack_a_header(parts);
        let directive = if release { Directive::Release } else { self.settings.policy.directive(parts) };
        tracing::debug!(
            target: TRACING_TARGET, consumer = %self.attempt.consumer, key = %self.settings.shown(&self.attempt.key),
            attempt = %self.attempt.id, attempt_number = self.attempt_number, status = parts.status.as_u16(),
            ?directive, "performed"
        );
        match directive {
            Directive::Store => None,
            Directive::Release => Some(End::Release.into()),
            Directive::Hold => Some(End::Hold.into()),
        }
    }

    /// Not every header of a request is kept. One that was sent again and got no further than to a client error, which the
    /// client may not get with all of its headers, is no result.
    fn may_lack_a_header(&self, parts: &Parts) -> bool {
        let overridden = parts.extensions.get::<Directive>().is_some();
        self.resent && parts.status.is_client_error() && !overridden && !self.progress.has_begun()
    }

    fn stored(&self, mut response: StoredResponse) -> Outcome {
        let status = response.status;
        let keeps_writes = status.is_success()
            || status.is_redirection()
            || status.is_client_error() && self.settings.transactions.keep_writes_of_client_errors;
        response.remove_headers(&self.settings.headers_not_kept);
        Outcome { end: End::Complete(response.encode()), keeps_writes }
    }

    fn without_result<B, E>(&self, rejection: Rejection) -> Judged<B, E> {
        let end = self.end_without_result();
        let held = matches!(end, End::Hold);
        Judged { outcome: end.into(), answer: Verdict::Refused(rejection.final_if(held)) }
    }

    fn end_without_result(&self) -> End {
        match self.settings.policy.without_result() {
            Directive::Hold => End::Hold,
            Directive::Release | Directive::Store => End::Release,
        }
    }

    fn log_failure(&self, error: &(dyn Error + 'static), what: &str) {
        self.settings.log_failure(&self.attempt, error, what);
    }
}

struct Judged<B, E> {
    outcome: Outcome,
    answer: Verdict<B, E>,
}

/// Why a handler is cancelled.
#[derive(Clone, Copy, Debug, thiserror::Error)]
enum Cause {
    #[error("it runs longer than max_execution")]
    TooLong,
    #[error("its transaction is open for longer than TransactionOptions::with_time_limit")]
    TransactionOverdue,
}

impl Cause {
    fn rejection(self) -> Rejection {
        match self {
            Self::TooLong => Rejection::new(
                RejectionCode::MaxExecutionExceeded,
                "The handler took too long and was cancelled.",
            ),
            Self::TransactionOverdue => Rejection::new(
                RejectionCode::TransactionLost,
                "The handler's transaction was open for too long and was rolled back.",
            ),
        }
    }
}

/// Calls the handler and collects its response.
async fn perform<S, ReqBody, ResBody>(
    mut inner: S,
    request: Request<RequestBody<ReqBody>>,
    settings: Arc<Settings>,
) -> Performed<ResBody, S::Error>
where
    S: Service<Request<RequestBody<ReqBody>>, Response = Response<ResBody>>,
    ResBody: Body<Data = Bytes>,
    ResBody::Error: Into<BoxError>,
{
    let (parts, body) = inner.call(request).await?.into_parts();
    let limit = if is_event_stream(&parts.headers) { None } else { Some(settings.response_body_limit) };
    Ok((parts, collect(body, limit, settings.response_body_timeout).await))
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    let content_type = headers.get(header::CONTENT_TYPE).map_or(&[][..], |value| value.as_bytes());
    content_type.get(..17).is_some_and(|start| start.eq_ignore_ascii_case(b"text/event-stream"))
}

/// For how long a client waits for a cancelled handler to stop.
const CANCEL_GRACE: Duration = Duration::from_secs(1);
