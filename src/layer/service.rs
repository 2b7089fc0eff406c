//! The service: who passes, who is refused, who is guarded.

use std::{
    mem,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use tokio::sync::oneshot;
use tower_service::Service;
use tracing::Instrument;

use crate::{
    attempt::idempotency::Idempotency,
    error::BoxError,
    layer::{
        body::{RequestBody, ResponseBody},
        future::ResponseFuture,
        guarded::Guarded,
        resent::Resent,
        settings::{KeySource, Settings},
    },
    node::Node,
    rejection::{Rejection, RejectionCode},
};

/// Middleware that performs a request with an idempotency key once. Made by
/// [`IdempotencyLayer`](crate::IdempotencyLayer).
///
/// The inner service receives `Request<RequestBody<B>>`. It must be [`Clone`], as the services of axum and tower are.
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

    /// The key of a request that is to be guarded. A layer around this one may guard it already.
    fn key_of<B>(&self, request: &Request<B>) -> Result<Option<KeySource>, Rejection> {
        let key = self.settings.key_of(request.method(), request.headers())?;
        Ok(key.filter(|_| {
            !request.extensions().get::<Idempotency>().is_some_and(|outer| outer.is_of(&self.node))
        }))
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

    fn call(&mut self, mut request: Request<ReqBody>) -> Self::Future {
        let resent = request.extensions_mut().remove::<Resent>();
        let key = match resent
            .map_or_else(|| self.key_of(&request), |resent| Ok(Some(KeySource::Resent(resent))))
        {
            Ok(Some(key)) => key,
            Ok(None) => return ResponseFuture::passed(self.inner.call(request.map(RequestBody::passed))),
            Err(rejection) => return ResponseFuture::refused(self.settings.refuse(rejection)),
        };
        let (parts, body) = request.into_parts();
        let consumer = match &key {
            KeySource::Resent(resent) => Some(resent.consumer.clone()),
            KeySource::Sent(_) | KeySource::Derived(_) => self.settings.consumer.extract(&parts),
        };
        let Some(consumer) = consumer else {
            let rejection = Rejection::new(
                RejectionCode::ConsumerUnidentified,
                "It cannot be told safely whose idempotency key this is.",
            );
            return ResponseFuture::refused(self.settings.refuse(rejection));
        };
        let clone = self.inner.clone();
        let ready = mem::replace(&mut self.inner, clone);
        let (caller, gone) = oneshot::channel();
        let guarded = Guarded::new(&self.node, &self.settings, consumer, key);
        let task = guarded.answer(ready, parts, body, gone).in_current_span();
        ResponseFuture::guarded(self.node.tasks.spawn(task), caller)
    }
}
