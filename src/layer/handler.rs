//! The handler: runs in a task of its own, for as long as it may.

use std::{
    collections::VecDeque,
    future::{Future, pending, poll_fn},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, header};
use http_body::Body;
use tokio::{
    sync::OwnedSemaphorePermit,
    task::{JoinError, JoinHandle},
    time::timeout,
};
use tower_service::Service;

use crate::{
    attempt::{Facts, Ownership, run::CopyOfRequest},
    error::BoxError,
    layer::{
        body::RequestBody,
        buffer::{Buffered, Collected, collect},
        closing::close,
        future::Answer,
        grpc,
        reach::Reach,
        readiness::until_ready_within,
        settings::Settings,
        verdict::{Cause, HandlerEnd, Judge, Performed},
    },
    node::ends::End,
    redact::traced,
    stored::response::has_no_body,
};

/// A handler that is about to run for an attempt.
pub(crate) struct Handler {
    pub(crate) settings: Arc<Settings>,
    pub(crate) ownership: Ownership,
    /// A completer has sent the request.
    pub(crate) resent: bool,
    /// The place of the request among those in flight.
    pub(crate) permit: OwnedSemaphorePermit,
}

impl Handler {
    /// Runs the handler, and ends its attempt by its result.
    pub(crate) async fn run<S, ReqBody, ResBody>(
        self,
        mut inner: S,
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
        // `permit` is held until the answer is made, or goes with a handler that is left behind.
        let Self { settings, ownership, resent, permit } = self;
        let facts = Arc::clone(ownership.facts());
        let mut max_execution = pin!(facts.max_execution_over());
        if let Err(unready) = until_ready_within(&mut inner, max_execution.as_mut()).await {
            // Under every policy: the handler did not run.
            close(ownership, End::Release.into()).await;
            return unready.answer(&settings, &facts);
        }
        let reach = Arc::new(Reach::new(request.extensions(), request.body().has_data()));
        request.body_mut().watched_by(Arc::clone(&reach));
        let is_grpc = grpc::content_type(request.headers()).is_some();
        let judge = Judge { settings, facts: Arc::clone(&facts), resent, reach, is_grpc };
        ownership.idempotency().enter(request.extensions_mut());
        request.extensions_mut().insert(CopyOfRequest::default());
        request.extensions_mut().extend(ownership.offered.clone());
        // Not tracked itself: this task, or that of `leave_behind`, waits for it.
        let mut handler = tokio::spawn(traced(call_and_collect(inner, request, judge.clone())));
        let ended = match wait(&mut handler, &facts, max_execution).await {
            Ok(ended) => ended,
            Err(cause) => {
                // Before the renderer is called, which may panic: the record must stay owned while
                // the handler runs.
                leave_behind(handler, ownership, judge.clone(), permit);
                return Ok(judge.refuse_cancelled(cause));
            }
        };
        let judged = judge.judge(ended);
        let closed = close(ownership, judged.outcome).await;
        judge.answer(closed, judged.verdict).await
    }
}

/// Waits for the handler, at most `max_execution`, and at most as long as its transaction may be
/// open. An error if it runs on although it was cancelled, because it does not yield.
async fn wait<B, E>(
    handler: &mut JoinHandle<Performed<B, E>>,
    facts: &Facts,
    mut max_execution: Pin<&mut impl Future<Output = ()>>,
) -> Result<HandlerEnd<B, E>, Cause> {
    let mut overdue = pin!(async {
        match &facts.transaction {
            Some(transaction) => transaction.overdue().await,
            None => pending().await,
        }
    });
    let first = poll_fn(|cx| {
        // The handler first: a result that is there counts, however late.
        if let Poll::Ready(ended) = Pin::new(&mut *handler).poll(cx) {
            return Poll::Ready(Ok(ended));
        }
        if overdue.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(Cause::TransactionOverdue));
        }
        max_execution.as_mut().poll(cx).map(|()| Err(Cause::TooLong))
    });
    let cause = match first.await {
        // Not cancelled yet, but by a runtime that goes down: then any cause will do.
        Ok(ended) => return Ok(handler_end(facts, ended, Cause::TooLong)),
        Err(cause) => cause,
    };
    facts.log_failure(&cause, "the handler is cancelled");
    handler.abort();
    let ended = timeout(CANCEL_GRACE, &mut *handler).await;
    ended.map(|ended| handler_end(facts, ended, cause)).map_err(|_| cause)
}

fn handler_end<B, E>(
    facts: &Facts,
    ended: Result<Performed<B, E>, JoinError>,
    cancelled: Cause,
) -> HandlerEnd<B, E> {
    match ended {
        Ok(performed) => HandlerEnd::Performed(performed),
        Err(error) if error.is_panic() => {
            facts.log_failure(&error, "the handler panicked");
            HandlerEnd::Panicked
        }
        Err(_) => HandlerEnd::Cancelled(cancelled),
    }
}

/// Owns the record while a cancelled handler still runs, so that no other attempt does. A result
/// that it returns after all counts.
fn leave_behind<B, E>(
    handler: JoinHandle<Performed<B, E>>,
    ownership: Ownership,
    judge: Judge,
    permit: OwnedSemaphorePermit,
) where
    B: Send + 'static,
    E: Send + 'static,
{
    let tasks = ownership.node.tasks.clone();
    tasks.spawn(async move {
        // Any cause: it shows in the verdict alone, which is not used here.
        let ended = handler_end(ownership.facts(), handler.await, Cause::TooLong);
        // The verdict is for a client that has its answer already, and may hold the transaction: it
        // is dropped first.
        let outcome = judge.judge(ended).outcome;
        close(ownership, outcome).await;
        drop(permit);
    });
}

/// Calls the handler and collects its response.
async fn call_and_collect<S, ReqBody, ResBody>(
    mut inner: S,
    request: Request<RequestBody<ReqBody>>,
    judge: Judge,
) -> Performed<ResBody, S::Error>
where
    S: Service<Request<RequestBody<ReqBody>>, Response = Response<ResBody>>,
    ResBody: Body<Data = Bytes>,
    ResBody::Error: Into<BoxError>,
{
    let (mut parts, body) = answer_of(inner.call(request), &judge.reach).await?.into_parts();
    if body.size_hint().exact().is_some() {
        // The server counts itself. It would send a wrong length of the handler as it is.
        parts.headers.remove(header::CONTENT_LENGTH);
    }
    let Settings { response_body_limit, response_body_timeout, .. } = *judge.settings;
    let collected = if has_no_body(parts.status) {
        Collected::Whole(Buffered::default())
    } else if judge.is_streamed(&parts, &body) {
        Collected::Partial(VecDeque::new(), Box::pin(body))
    } else {
        collect(body, response_body_limit, response_body_timeout).await
    };
    Ok((parts, collected))
}

/// Waits for the answer, and notes that it has to.
async fn answer_of<F: Future>(call: F, reach: &Reach) -> F::Output {
    let mut call = pin!(call);
    let polled = |cx: &mut Context<'_>| {
        let polled = call.as_mut().poll(cx);
        if polled.is_pending() {
            reach.note_wait();
        }
        polled
    };
    poll_fn(polled).await
}

/// The time that a client waits for a cancelled handler to stop.
const CANCEL_GRACE: Duration = Duration::from_secs(1);
