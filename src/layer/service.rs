//! The service: passes a request through, refuses it, or guards it.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Request, Response, request::Parts};
use http_body::Body;
use tokio::sync::oneshot;
use tower_service::Service;

use crate::{
    attempt::unguarded::Unguarded,
    error::BoxError,
    layer::{
        answer::{passed, replay},
        body::{RequestBody, ResponseBody},
        buffer::Buffered,
        decision::{Decision, Entrance, Guarded},
        discard::discard,
        future::{Answer, ResponseFuture},
        grpc,
        readiness::{call_when_ready, until_ready},
        settings::Settings,
    },
    node::Node,
    redact::TRACING_TARGET,
    rejection::{Rejection, RejectionCode},
};

/// Middleware that performs a request with an idempotency key once. Made by
/// [`IdempotencyLayer`](crate::IdempotencyLayer).
///
/// It is always ready. A request waits for the inner service to be ready only if the handler is to
/// run: replays and refusals do not. A request that is not guarded waits in its response future.
/// If the inner service fails to get ready, the key is released and the error returned.
///
/// The inner service receives `Request<RequestBody<B>>`. It must be [`Clone`], as the services of
/// axum and tower are.
#[derive(Clone, Debug)]
pub struct IdempotencyService<S> {
    inner: S,
    node: Arc<Node>,
    settings: Arc<Settings>,
}

impl<S> IdempotencyService<S> {
    pub(crate) fn new(inner: S, node: Arc<Node>, settings: Arc<Settings>) -> Self {
        Self { inner, node, settings }
    }

    /// The inner service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for IdempotencyService<S>
where
    S: Service<Request<RequestBody<ReqBody>>, Response = Response<ResBody>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    ReqBody: Body<Data = Bytes> + Send + 'static,
    ReqBody::Error: Into<BoxError>,
    ResBody: Body<Data = Bytes> + Send + 'static,
    ResBody::Error: Into<BoxError>,
{
    type Response = Response<ResponseBody<ResBody>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, ResBody, S::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        // The inner service is not polled: it would hold a place that a replay does not need, and that
        // its own clone in an attempt's task may wait for.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        let (mut parts, body) = request.into_parts();
        let grpc = grpc::content_type(&parts.headers);
        let future = match entrance(&self.node, &self.settings, &mut parts) {
            Entrance::Pass(settings) => {
                let request = Request::from_parts(parts, RequestBody::passed(body));
                ResponseFuture::passed(call_when_ready(&mut self.inner, request), settings)
            }
            Entrance::Refuse(rejection) => {
                discard(&parts, body, self.settings.request_limits.timeout);
                ResponseFuture::refused(self.settings.refuse(rejection))
            }
            Entrance::Guard(guarded) => {
                let (caller, gone) = oneshot::channel();
                let task = guard(guarded, self.inner.clone(), parts, body, gone);
                ResponseFuture::guarded(self.node.tasks.begin(task), caller)
            }
        };
        future.for_grpc(grpc)
    }
}

/// The decision by the head. A closure of the application that panics must not end the connection.
fn entrance(node: &Arc<Node>, settings: &Arc<Settings>, parts: &mut Parts) -> Entrance {
    catch_unwind(AssertUnwindSafe(|| Entrance::of(node, settings, parts))).unwrap_or_else(|_| {
        tracing::error!(target: TRACING_TARGET, "the consumer's extractor panicked; the request is refused");
        Entrance::Refuse(Rejection::new(
            RejectionCode::Internal,
            "The request was not performed: the server failed. Send it again with the same key.",
        ))
    })
}

/// The work of a guarded request, which goes on when its caller has gone.
async fn guard<S, ReqBody, ResBody>(
    guarded: Guarded,
    inner: S,
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
    let body = match guarded.receive(&parts, body, caller).await {
        Ok(Some(body)) => body,
        // The caller has gone before its request was complete: nothing was claimed.
        Ok(None) => return Ok(Response::default()),
        Err(rejection) => return Ok(guarded.refuse(rejection)),
    };
    for _ in 0..guarded.settings.attempts.transactions.reruns {
        let answer = decide_and_answer(&guarded, inner.clone(), parts.clone(), body.clone()).await;
        if !answer.as_ref().is_ok_and(collided) {
            return answer;
        }
    }
    decide_and_answer(&guarded, inner, parts, body).await
}

async fn decide_and_answer<S, ReqBody, ResBody>(
    guarded: &Guarded,
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
    let decision = guarded.decide(&parts, &body.data).await;
    let mut request = Request::from_parts(parts, RequestBody::buffered(body.data, body.trailers));
    match decision {
        Ok(Decision::Run(handler)) => handler.run(inner, request).await,
        Ok(Decision::Replay(stored)) => Ok(replay(&guarded.settings, stored)),
        Ok(Decision::RunUnprotected(place)) => {
            until_ready(&mut inner).await?;
            request.extensions_mut().insert(Unguarded::StoreAway);
            let response = inner.call(request).await;
            drop(place);
            response.map(|mut response| {
                response.headers_mut().remove(&guarded.settings.replay_marker);
                passed(Some(&guarded.settings), response)
            })
        }
        Ok(Decision::Pass) => {
            until_ready(&mut inner).await?;
            inner.call(request).await.map(|response| passed(None, response))
        }
        Err(rejection) => Ok(guarded.refuse(rejection)),
    }
}

/// The transaction collided with another one, so that the request may be performed again
/// immediately.
fn collided<B>(response: &Response<B>) -> bool {
    let rejection = response.extensions().get::<Rejection>();
    rejection.is_some_and(|rejection| rejection.code() == RejectionCode::TransactionConflict)
}
