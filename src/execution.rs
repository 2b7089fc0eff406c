//! One attempt: runs the handler, judges its result, writes it down.

use std::{error::Error, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, header, response::Parts};
use http_body::Body;
use tokio::{
    sync::OwnedSemaphorePermit,
    task::JoinHandle,
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

/// How the handler's task ended.
#[expect(
    clippy::large_enum_variant,
    reason = "it is made and taken apart once, and the large variant is the rule"
)]
enum HandlerEnd<B, E> {
    Performed(Performed<B, E>),
    Panicked,
    TimedOut,
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
        let ended = self.wait(&mut handler, &cancelled).await;
        let unfinished = matches!(ended, HandlerEnd::TimedOut).then_some(handler);
        let (end, answer) = self.judge(ended);
        match self.write_down((lease, entered), end, unfinished).await {
            // Another request's response must not be given for this one, and does not contradict it either.
            Some(Ended::Lost(record)) if record.fingerprint == self.fingerprint => {
                Ok(match answer_from(&self.settings, &record) {
                    Ok(stored) => replay(&self.settings, stored),
                    Err(rejection) => refused(&self.settings, rejection),
                })
            }
            Some(Ended::Done | Ended::Lost(_) | Ended::Absent) | None => answer,
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
        let mut record = Record::new(self.attempt.clone(), self.record_id, self.fingerprint.clone(), state);
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

    /// Waits for the handler, at most `max_execution`; shortly before that it is told.
    async fn wait<B, E>(
        &self,
        handler: &mut JoinHandle<Performed<B, E>>,
        cancelled: &CancellationToken,
    ) -> HandlerEnd<B, E> {
        let limit = self.settings.timing.max_execution;
        let mut ended = timeout(limit * 9 / 10, &mut *handler).await;
        if ended.is_err() {
            cancelled.cancel();
            ended = timeout(limit / 10, &mut *handler).await;
        }
        match ended {
            Ok(Ok(performed)) => HandlerEnd::Performed(performed),
            Ok(Err(error)) => {
                let what = if error.is_panic() { "panicked" } else { "was stopped with its runtime" };
                self.log_failure(&error, &format!("the handler {what}"));
                HandlerEnd::Panicked
            }
            Err(_) => {
                tracing::error!(
                    target: TRACING_TARGET, consumer = %self.attempt.consumer, attempt = %self.attempt.id, ?limit,
                    "the handler was cancelled: it ran longer than max_execution"
                );
                handler.abort();
                HandlerEnd::TimedOut
            }
        }
    }

    /// What is written down, and what the client gets once it is.
    fn judge<B, E>(&self, ended: HandlerEnd<B, E>) -> (End, Answer<B, E>) {
        match ended {
            HandlerEnd::Performed(Ok((parts, Collected::Whole(body)))) => self.judge_whole(parts, body),
            HandlerEnd::Performed(Ok((parts, Collected::Partial(frames, rest)))) => {
                let end = match self.directive(&parts) {
                    Directive::Store => self.complete(StoredResponse::of(&parts, StoredBody::NotKept)),
                    Directive::Release => End::Release,
                    Directive::Hold => End::Hold,
                };
                (end, Ok(Response::from_parts(parts, ResponseBody::resumed(frames, rest))))
            }
            HandlerEnd::Performed(Ok((_, Collected::Broken(error)))) => {
                self.log_failure(&*error, "the response broke off");
                self.without_result(Rejection::new(
                    RejectionCode::ResponseIncomplete,
                    "The handler's response broke off.",
                ))
            }
            HandlerEnd::Performed(Err(error)) => (End::Release, Err(error)),
            HandlerEnd::Panicked => {
                self.without_result(Rejection::new(RejectionCode::HandlerPanicked, "The handler failed."))
            }
            HandlerEnd::TimedOut => self.without_result(Rejection::new(
                RejectionCode::MaxExecutionExceeded,
                "The handler took too long and was cancelled.",
            )),
        }
    }

    fn judge_whole<B, E>(&self, parts: Parts, body: Buffered) -> (End, Answer<B, E>) {
        let Buffered { data, trailers } = body;
        let end = match self.directive(&parts) {
            Directive::Release => End::Release,
            Directive::Hold => End::Hold,
            Directive::Store => {
                let first = StoredResponse::of(&parts, StoredBody::Kept { data, trailers });
                let end = self.complete(first.clone());
                let mut response = first.into_response();
                *response.extensions_mut() = parts.extensions;
                return (end, Ok(response));
            }
        };
        (end, Ok(Response::from_parts(parts, ResponseBody::buffered(data, trailers))))
    }

    fn directive(&self, parts: &Parts) -> Directive {
        let directive = self.settings.policy.directive(parts);
        tracing::debug!(
            target: TRACING_TARGET, consumer = %self.attempt.consumer, key = %self.settings.shown(&self.attempt.key),
            attempt = %self.attempt.id, attempt_number = self.attempt_number, status = parts.status.as_u16(),
            ?directive, "performed"
        );
        directive
    }

    fn complete(&self, mut response: StoredResponse) -> End {
        response.remove_headers(&self.settings.headers_not_kept);
        End::Complete(response.encode())
    }

    fn without_result<B, E>(&self, rejection: Rejection) -> (End, Answer<B, E>) {
        let (end, held) = match self.settings.policy.without_result() {
            Directive::Hold => (End::Hold, true),
            Directive::Release | Directive::Store => (End::Release, false),
        };
        (end, Ok(refused(&self.settings, rejection.final_if(held))))
    }

    /// Writes the end of the attempt down in a task that goes on when waiting for it takes too long.
    async fn write_down<T: Send + 'static>(
        &self,
        (lease, entered): (Lease, Entered),
        end: End,
        unfinished: Option<JoinHandle<T>>,
    ) -> Option<Ended> {
        let limit = MAX_WAIT.min(self.settings.timing.lease * 3 / 4);
        let give_up = Instant::now() + self.settings.timing.max_execution.max(limit);
        let shared = Arc::clone(&self.shared);
        let task = self.shared.tasks.spawn(async move {
            if let Some(handler) = unfinished {
                // Nobody may run while a cancelled handler still does.
                let _ = handler.await;
            }
            let ended = shared.end(lease.attempt(), Some(&lease), &end, give_up).await;
            drop(entered);
            ended
        });
        let ended = crate::shared::flatten(timeout(limit, task).await, limit);
        if let Ok(Ended::Absent | Ended::Lost(_)) = ended {
            tracing::warn!(
                target: TRACING_TARGET, consumer = %self.attempt.consumer, attempt = %self.attempt.id,
                "the record was gone or another attempt's when its attempt ended"
            );
        }
        ended
            .inspect_err(|error| {
                self.log_failure(error, "the response is sent although it is not stored yet")
            })
            .ok()
    }

    fn log_failure(&self, error: &(dyn Error + 'static), what: &str) {
        let attempt = &self.attempt;
        tracing::error!(
            target: TRACING_TARGET, consumer = %attempt.consumer, attempt = %attempt.id, error, "{what}"
        );
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

/// For how long a client waits for its response to be stored while the store does not answer.
const MAX_WAIT: Duration = Duration::from_secs(10);
