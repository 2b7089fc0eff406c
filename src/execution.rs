//! One attempt: runs the handler, judges its result, writes it down.

use std::{sync::Arc, time::Duration};

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
    core::{Core, Settled, Settlement},
    error::BoxError,
    future::Answer,
    renewal::Lease,
    running::Entered,
    settings::Settings,
};

/// An attempt that owns its record and is about to run.
pub(crate) struct Execution {
    pub(crate) core: Arc<Core>,
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
enum Ended<B, E> {
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
        let entered = self.core.running.enter(self.attempt.clone(), self.record());
        let lease = self.keep_lease(&cancelled);
        request.extensions_mut().insert(self.idempotency(&cancelled));
        let mut handler = tokio::spawn(perform(inner, request, Arc::clone(&self.settings)).in_current_span());
        let ended = self.wait(&mut handler, &cancelled).await;
        let unfinished = matches!(ended, Ended::TimedOut).then_some(handler);
        let (settlement, answer) = self.judge(ended);
        match self.settle((lease, entered), settlement, unfinished).await {
            Some(Settled::Lost(record)) => Ok(match answer_from(&self.settings, &record) {
                Ok(stored) => replay(&self.settings, stored),
                Err(rejection) => refused(&self.settings, rejection),
            }),
            Some(Settled::Done | Settled::Absent) | None => answer,
        }
    }

    fn keep_lease(&self, lost: &CancellationToken) -> Lease {
        let timing = &self.settings.timing;
        let interval = timing.renewal_interval();
        let lease =
            Lease::new(&self.core.renewer, self.attempt.clone(), timing.lease, interval, lost.clone());
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
            &self.core,
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
    ) -> Ended<B, E> {
        let limit = self.settings.timing.max_execution;
        let mut ended = timeout(limit * 9 / 10, &mut *handler).await;
        if ended.is_err() {
            cancelled.cancel();
            ended = timeout(limit / 10, &mut *handler).await;
        }
        match ended {
            Ok(Ok(performed)) => Ended::Performed(performed),
            Ok(Err(error)) => self.no_result(&error),
            Err(_) => {
                tracing::error!(
                    target: TRACING_TARGET, consumer = %self.attempt.consumer, attempt = %self.attempt.id, ?limit,
                    "the handler was cancelled: it ran longer than max_execution"
                );
                handler.abort();
                Ended::TimedOut
            }
        }
    }

    fn no_result<B, E>(&self, error: &JoinError) -> Ended<B, E> {
        tracing::error!(
            target: TRACING_TARGET, consumer = %self.attempt.consumer, attempt = %self.attempt.id,
            error = error as &dyn std::error::Error, "the handler panicked"
        );
        Ended::Panicked
    }

    /// What is written down, and what the client gets once it is.
    fn judge<B, E>(&self, ended: Ended<B, E>) -> (Settlement, Answer<B, E>) {
        match ended {
            Ended::Performed(Ok((parts, Collected::Whole(body)))) => self.judge_whole(parts, body),
            Ended::Performed(Ok((parts, Collected::Partial(frames, rest)))) => {
                let settlement = self.settlement(&parts, StoredBody::NotKept);
                (settlement, Ok(Response::from_parts(parts, ResponseBody::resumed(frames, rest))))
            }
            Ended::Performed(Ok((_, Collected::Broken(error)))) => {
                let detail = format!("The response broke off ({error}).");
                self.without_result(Rejection::new(RejectionCode::ResponseIncomplete, detail))
            }
            Ended::Performed(Err(error)) => (Settlement::Release, Err(error)),
            Ended::Panicked => {
                self.without_result(Rejection::new(RejectionCode::HandlerPanicked, "The handler failed."))
            }
            Ended::TimedOut => self.without_result(Rejection::new(
                RejectionCode::MaxExecutionExceeded,
                "The handler took too long and was cancelled.",
            )),
        }
    }

    fn judge_whole<B, E>(&self, parts: Parts, body: Buffered) -> (Settlement, Answer<B, E>) {
        let kept = StoredBody::Kept { data: body.data.clone(), trailers: body.trailers.clone() };
        let settlement = self.settlement(&parts, kept);
        let Settlement::Complete(_) = settlement else {
            let body = ResponseBody::buffered(body.data, body.trailers);
            return (settlement, Ok(Response::from_parts(parts, body)));
        };
        let kept = StoredBody::Kept { data: body.data, trailers: body.trailers };
        let mut response = StoredResponse::of(&parts, kept).into_response();
        *response.extensions_mut() = parts.extensions;
        (settlement, Ok(response))
    }

    fn settlement(&self, parts: &Parts, body: StoredBody) -> Settlement {
        let (consumer, key) = (&self.attempt.consumer, self.settings.shown(&self.attempt.key));
        let directive = self.settings.policy.directive(parts);
        tracing::debug!(
            target: TRACING_TARGET, %consumer, %key, attempt_number = self.attempt_number,
            status = parts.status.as_u16(), ?directive, "performed"
        );
        match directive {
            Directive::Release => Settlement::Release,
            Directive::Hold => Settlement::Hold,
            Directive::Store => {
                let mut stored = StoredResponse::of(parts, body);
                stored.remove_headers(&self.settings.headers_not_kept);
                Settlement::Complete(stored.encode())
            }
        }
    }

    fn without_result<B, E>(&self, rejection: Rejection) -> (Settlement, Answer<B, E>) {
        let (settlement, held) = match self.settings.policy.without_result() {
            Directive::Hold => (Settlement::Hold, true),
            Directive::Release | Directive::Store => (Settlement::Release, false),
        };
        (settlement, Ok(refused(&self.settings, rejection.final_if(held))))
    }

    /// Writes the end of the attempt down in a task that goes on when waiting for it takes too long.
    async fn settle<T: Send + 'static>(
        &self,
        (lease, entered): (Lease, Entered),
        settlement: Settlement,
        unfinished: Option<JoinHandle<T>>,
    ) -> Option<Settled> {
        let limit = MAX_WAIT.min(self.settings.timing.lease * 3 / 4);
        let give_up = Instant::now() + self.settings.timing.max_execution.max(limit);
        let core = Arc::clone(&self.core);
        let task = self.core.tasks.spawn(async move {
            if let Some(handler) = unfinished {
                // Nobody may run while a cancelled handler still does.
                let _ = handler.await;
            }
            let settled = core.settle(lease.attempt(), Some(&lease), &settlement, give_up).await;
            drop(entered);
            settled
        });
        let settled = crate::core::flatten(timeout(limit, task).await, limit);
        if let Ok(Settled::Absent) = settled {
            tracing::warn!(
                target: TRACING_TARGET, consumer = %self.attempt.consumer, attempt = %self.attempt.id,
                "the record was gone when its attempt ended: evicted, or forgotten by the store"
            );
        }
        settled.inspect_err(|error| self.not_settled(error)).ok()
    }

    fn not_settled(&self, error: &crate::StoreError) {
        tracing::error!(
            target: TRACING_TARGET, consumer = %self.attempt.consumer, attempt = %self.attempt.id,
            error = error as &dyn std::error::Error, "the response is sent although it is not stored yet"
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
