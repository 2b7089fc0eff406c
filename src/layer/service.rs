//! The service: passes a request through, refuses it, or guards it in a task.

use std::{
    future::poll_fn,
    mem,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Request, Response, request::Parts};
use http_body::Body;
use tokio::sync::oneshot;
use tower_service::Service;
use tracing::Instrument;

use crate::{
    attempt::unguarded::Unguarded,
    error::BoxError,
    layer::{
        answer::{passed, replay},
        body::{RequestBody, ResponseBody},
        buffer::Buffered,
        decision::{Decision, Entrance, Guarded},
        future::{Answer, ResponseFuture},
        settings::Settings,
    },
    node::Node,
    rejection::{Rejection, RejectionCode},
};

/// Middleware that performs a request with an idempotency key once. Made by
/// [`IdempotencyLayer`](crate::IdempotencyLayer).
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

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        let (mut parts, body) = request.into_parts();
        match Entrance::of(&self.node, &self.settings, &mut parts) {
            Entrance::Pass(settings) => {
                let request = Request::from_parts(parts, RequestBody::passed(body));
                ResponseFuture::passed(self.inner.call(request), settings)
            }
            Entrance::Refuse(rejection) => ResponseFuture::refused(self.settings.refuse(rejection)),
            Entrance::Guard(guarded) => {
                // The service that was polled ready, and not its clone.
                let clone = self.inner.clone();
                let ready = mem::replace(&mut self.inner, clone);
                let (caller, gone) = oneshot::channel();
                let task = guard(guarded, ready, parts, body, gone).in_current_span();
                ResponseFuture::guarded(self.node.tasks.spawn(task), caller)
            }
        }
    }
}

/// The task of a guarded request, which goes on when its caller has gone.
async fn guard<S, ReqBody, ResBody>(
    guarded: Guarded,
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
    let body = match guarded.receive(body, caller).await {
        Ok(Some(body)) => body,
        // The caller has gone before its request was complete: nothing was claimed.
        Ok(None) => return Ok(Response::default()),
        Err(rejection) => return Ok(guarded.refuse(rejection)),
    };
    for _ in 0..guarded.settings.attempts.transactions.reruns {
        let clone = inner.clone();
        let ready = mem::replace(&mut inner, clone);
        let answer = decide_and_answer(&guarded, ready, parts.clone(), body.clone()).await;
        if !answer.as_ref().is_ok_and(collided) {
            return answer;
        }
        poll_fn(|cx| inner.poll_ready(cx)).await?;
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
        Ok(Decision::RunUnprotected) => {
            request.extensions_mut().insert(Unguarded::StoreAway);
            inner.call(request).await.map(|response| passed(&guarded.settings, response))
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
