//! One attempt: runs the handler, judges its result, writes it down.

use std::{
    error::Error,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, header, response::Parts};
use http_body::Body;
use tokio::{
    sync::OwnedSemaphorePermit,
    task::{JoinError, JoinHandle},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tower_service::Service;
use tracing::Instrument;

use crate::{
    Attempt, Directive, Fingerprint, Idempotency, Record, RecordId, RecordState, Rejection, RejectionCode,
    RequestBody, ResponseBody, StoredBody, StoredResponse, TRACING_TARGET,
    answer::{answer_from, refused, replay},
    buffer::{Buffered, Collected, collect},
    error::BoxError,
    future::Answer,
    renewal::Lease,
    running::Entered,
    settings::Settings,
    shared::{End, Ended, Shared},
};

/// An attempt that owns its record and is about to run.
pub(crate) struct Execution {
    pub(crate) shared: Arc<Shared>,
    pub(crate) settings: Arc<Settings>,
    pub(crate) attempt: Attempt,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) record_id: RecordId,
    pub(crate) attempt_number: u32,
    /// When the claim was sent: the lease runs from then on at the earliest.
    pub(crate) claimed_at: Instant,
    pub(crate) _permit: Option<OwnedSemaphorePermit>,
}

/// A response whose body was collected as far as possible, or the error of the inner service.
type Performed<B, E> = Result<(Parts, Collected<B>), E>;

/// The answer, or the refusal to be made of what happened.
type Verdict<B, E> = Result<Answer<B, E>, Rejection>;

/// How the handler's task ended.
#[expect(
    clippy::large_enum_variant,
    reason = "it is made and taken apart once, and the large variant is the rule"
)]
enum HandlerEnd<B, E> {
    Performed(Performed<B, E>),
    Panicked,
    Cancelled,
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
        let entered = self.shared.running.enter(self.attempt.clone(), self.record());
        let lease = self.keep_lease(&cancelled);
        request.extensions_mut().insert(self.idempotency(&cancelled));
        let mut handler = tokio::spawn(perform(inner, request, Arc::clone(&self.settings)).in_current_span());
        let this = Arc::new(self);
        let Some(ended) = this.wait(&mut handler, &cancelled).await else {
            let held = matches!(this.end_without_result(), End::Hold);
            let refusal = refused(&this.settings, too_long().final_if(held));
            this.leave_behind(handler, lease, entered);
            return Ok(refusal);
        };
        let (end, answer) = this.judge(ended);
        match this.write_down(end, lease, entered).await {
            // Another request's response must not be given for this one, and does not contradict it either.
            Some(Ended::Lost(record)) if record.fingerprint == this.fingerprint => {
                Ok(match answer_from(&this.settings, &record) {
                    Ok(stored) => replay(&this.settings, stored),
                    Err(rejection) => refused(&this.settings, rejection),
                })
            }
            Some(Ended::Done | Ended::Lost(_) | Ended::Absent) | None => {
                answer.unwrap_or_else(|rejection| Ok(refused(&this.settings, rejection)))
            }
        }
    }

    fn keep_lease(&self, lost: &CancellationToken) -> Lease {
        let timing = &self.settings.timing;
        let interval = timing.renewal_interval();
        let lease =
            Lease::new(&self.shared.renewer, self.attempt.clone(), timing.lease, interval, lost.clone());
        lease.keep(interval.saturating_sub(self.claimed_at.elapsed()));
        lease
    }

    fn record(&self) -> Record {
        let state = RecordState::in_progress(self.settings.timing.lease);
        let Attempt { consumer, key, id } = self.attempt.clone();
        let mut record = Record::new(self.record_id, consumer, key, self.fingerprint.clone(), state);
        record.attempt = Some(id);
        record.attempt_number = self.attempt_number;
        record
    }

    fn idempotency(&self, cancelled: &CancellationToken) -> Idempotency {
        Idempotency::new(
            &self.shared,
            self.attempt.clone(),
            self.record_id,
            self.attempt_number,
            cancelled.clone(),
        )
    }

    /// Waits for the handler, at most `max_execution`; shortly before that it is told. `None` if it runs on although it
    /// was cancelled, because it does not yield.
    async fn wait<B, E>(
        &self,
        handler: &mut JoinHandle<Performed<B, E>>,
        cancelled: &CancellationToken,
    ) -> Option<HandlerEnd<B, E>> {
        let limit = self.settings.timing.max_execution;
        let mut ended = timeout(limit * 9 / 10, &mut *handler).await;
        if ended.is_err() {
            cancelled.cancel();
            ended = timeout(limit / 10, &mut *handler).await;
        }
        if let Err(error) = &ended {
            self.log_failure(error, "the handler is cancelled: it runs longer than max_execution");
            handler.abort();
            ended = timeout(CANCEL_GRACE, &mut *handler).await;
        }
        ended.ok().map(|ended| self.handler_end(ended))
    }

    fn handler_end<B, E>(&self, ended: Result<Performed<B, E>, JoinError>) -> HandlerEnd<B, E> {
        match ended {
            Ok(performed) => HandlerEnd::Performed(performed),
            Err(error) if error.is_panic() => {
                self.log_failure(&error, "the handler panicked");
                HandlerEnd::Panicked
            }
            Err(_) => HandlerEnd::Cancelled,
        }
    }

    /// Nobody may run while a cancelled handler still does, and what it returns all the same counts.
    fn leave_behind<B, E>(
        self: Arc<Self>,
        handler: JoinHandle<Performed<B, E>>,
        lease: Lease,
        entered: Entered,
    ) where
        B: Send + 'static,
        E: Send + 'static,
    {
        let tasks = self.shared.tasks.clone();
        tasks.spawn(async move {
            let (end, answer) = self.judge(self.handler_end(handler.await));
            drop(answer);
            self.write_down(end, lease, entered).await
        });
    }

    /// What is written down, and what the client gets once it is. It calls the application's policy.
    fn judge<B, E>(&self, ended: HandlerEnd<B, E>) -> (End, Verdict<B, E>) {
        catch_unwind(AssertUnwindSafe(|| self.judge_end(ended))).unwrap_or_else(|_| {
            self.without_result(Rejection::new(RejectionCode::Internal, "The result could not be judged."))
        })
    }

    fn judge_end<B, E>(&self, ended: HandlerEnd<B, E>) -> (End, Verdict<B, E>) {
        match ended {
            HandlerEnd::Performed(Ok((parts, Collected::Whole(body)))) => self.judge_whole(parts, body),
            HandlerEnd::Performed(Ok((parts, Collected::Partial(frames, rest)))) => {
                let end = self
                    .end_unstored(&parts)
                    .unwrap_or_else(|| self.complete(StoredResponse::of(&parts, StoredBody::NotKept)));
                (end, Ok(Ok(Response::from_parts(parts, ResponseBody::resumed(frames, rest)))))
            }
            HandlerEnd::Performed(Ok((_, Collected::Broken(error)))) => {
                self.log_failure(&*error, "the response broke off");
                let detail = "The handler's response broke off.";
                self.without_result(Rejection::new(RejectionCode::ResponseIncomplete, detail))
            }
            HandlerEnd::Performed(Err(error)) => (self.end_without_result(), Ok(Err(error))),
            HandlerEnd::Panicked => {
                self.without_result(Rejection::new(RejectionCode::HandlerPanicked, "The handler failed."))
            }
            HandlerEnd::Cancelled => self.without_result(too_long()),
        }
    }

    fn judge_whole<B, E>(&self, parts: Parts, body: Buffered) -> (End, Verdict<B, E>) {
        let Buffered { data, trailers } = body;
        if let Some(end) = self.end_unstored(&parts) {
            return (end, Ok(Ok(Response::from_parts(parts, ResponseBody::buffered(data, trailers)))));
        }
        let first = StoredResponse::of(&parts, StoredBody::Kept { data, trailers });
        let end = self.complete(first.clone());
        let mut response = first.into_response();
        *response.extensions_mut() = parts.extensions;
        (end, Ok(Ok(response)))
    }

    /// How an attempt with this response ends, unless the response is to be stored.
    fn end_unstored(&self, parts: &Parts) -> Option<End> {
        // A refusal of a layer inside this one is never stored.
        let refused = parts.extensions.get::<Rejection>().is_some();
        let directive = if refused { Directive::Release } else { self.settings.policy.directive(parts) };
        tracing::debug!(
            target: TRACING_TARGET, consumer = %self.attempt.consumer, key = %self.settings.shown(&self.attempt.key),
            attempt = %self.attempt.id, attempt_number = self.attempt_number, status = parts.status.as_u16(),
            ?directive, "performed"
        );
        match directive {
            Directive::Store => None,
            Directive::Release => Some(End::Release),
            Directive::Hold => Some(End::Hold),
        }
    }

    fn complete(&self, mut response: StoredResponse) -> End {
        response.remove_headers(&self.settings.headers_not_kept);
        End::Complete(response.encode())
    }

    fn without_result<B, E>(&self, rejection: Rejection) -> (End, Verdict<B, E>) {
        let end = self.end_without_result();
        let held = matches!(end, End::Hold);
        (end, Err(rejection.final_if(held)))
    }

    fn end_without_result(&self) -> End {
        match self.settings.policy.without_result() {
            Directive::Hold => End::Hold,
            Directive::Release | Directive::Store => End::Release,
        }
    }

    /// Writes the end of the attempt down in a task that goes on when waiting for it takes too long.
    async fn write_down(&self, end: End, lease: Lease, entered: Entered) -> Option<Ended> {
        if matches!(end, End::Hold) {
            tracing::error!(
                target: TRACING_TARGET, consumer = %self.attempt.consumer,
                key = %self.settings.shown(&self.attempt.key), attempt = %self.attempt.id,
                "the key is held: the outcome is unknown and an operator must resolve it"
            );
        }
        let limit = MAX_WAIT.min(self.settings.timing.lease * 3 / 4);
        let give_up = Instant::now() + self.settings.timing.max_execution.max(limit);
        let shared = Arc::clone(&self.shared);
        let task = self.shared.tasks.spawn(async move {
            let ended = shared.end(lease.attempt(), Some(&lease), &end, give_up).await;
            drop(entered);
            ended
        });
        let ended = crate::shared::flatten(timeout(limit, task).await, limit);
        if let Ok(Ended::Absent | Ended::Lost(_)) = ended {
            tracing::warn!(
                target: TRACING_TARGET, consumer = %self.attempt.consumer,
                key = %self.settings.shown(&self.attempt.key), attempt = %self.attempt.id,
                "the record was gone or another attempt's when its attempt ended"
            );
        }
        let not_stored = "the response is sent although it is not stored yet";
        ended.inspect_err(|error| self.log_failure(error, not_stored)).ok()
    }

    fn log_failure(&self, error: &(dyn Error + 'static), what: &str) {
        let attempt = &self.attempt;
        tracing::error!(
            target: TRACING_TARGET, consumer = %attempt.consumer, key = %self.settings.shown(&attempt.key),
            attempt = %attempt.id, error, "{what}"
        );
    }
}

fn too_long() -> Rejection {
    let detail = "The handler took too long and was cancelled.";
    Rejection::new(RejectionCode::MaxExecutionExceeded, detail)
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

/// For how long a client waits for its response to be stored while the store does not answer.
const MAX_WAIT: Duration = Duration::from_secs(10);
/// For how long a client waits for a cancelled handler to stop.
const CANCEL_GRACE: Duration = Duration::from_secs(1);
