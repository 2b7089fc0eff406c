//! The future of the layer's responses.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderValue, Response};
use http_body::Body;
use pin_project_lite::pin_project;
use tokio::sync::oneshot;

use crate::{
    layer::{answer::passed, body::ResponseBody, grpc::translated, readiness::Call, settings::Settings},
    node::work::{EndedEarly, Work},
    redact::TRACING_TARGET,
    rejection::{ProblemJson, Rejection, respond},
};

type Waiting<B, E> = Pin<Box<dyn Future<Output = Result<Response<B>, E>> + Send>>;

/// The result of a guarded request.
pub(crate) type Answer<B, E> = Result<Response<ResponseBody<B>>, E>;

pin_project! {
    /// Response future of [`IdempotencyService`](crate::layer::IdempotencyService).
    ///
    /// A guarded request that is not answered immediately runs in a task. Dropping this future does
    /// not cancel an attempt that was begun.
    pub struct ResponseFuture<F, B, E> {
        #[pin]
        inner: Inner<F, B, E>,
        grpc: Option<HeaderValue>,
    }
}

pin_project! {
    #[project = Projected]
    enum Inner<F, B, E> {
        Passed { #[pin] future: F, settings: Option<Arc<Settings>> },
        Waiting { future: Waiting<B, E>, settings: Option<Arc<Settings>> },
        Refused { response: Option<Response<Bytes>> },
        Guarded { work: Work<Answer<B, E>>, _caller: oneshot::Sender<()> },
    }
}

impl<F, B, E> ResponseFuture<F, B, E> {
    fn new(inner: Inner<F, B, E>) -> Self {
        Self { inner, grpc: None }
    }

    /// Answers refusals as gRPC statuses, if the request has a content type of gRPC.
    pub(crate) fn for_grpc(self, content_type: Option<HeaderValue>) -> Self {
        Self { grpc: content_type, ..self }
    }

    /// Waits for the inner service. `settings` render the handler's refusals. `None`: an outer
    /// layer does.
    pub(crate) fn passed(call: Call<F>, settings: Option<Arc<Settings>>) -> Self
    where
        F: Future<Output = Result<Response<B>, E>>,
    {
        Self::new(match call {
            Call::Begun(future) => Inner::Passed { future, settings },
            Call::Waiting(future) => Inner::Waiting { future, settings },
        })
    }

    pub(crate) fn refused(response: Response<Bytes>) -> Self {
        Self::new(Inner::Refused { response: Some(response) })
    }

    /// Carries work out, which learns through `caller` that the client has gone.
    pub(crate) fn guarded(work: Work<Answer<B, E>>, caller: oneshot::Sender<()>) -> Self {
        Self::new(Inner::Guarded { work, _caller: caller })
    }
}

impl<F, B, E> Future for ResponseFuture<F, B, E>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: Body,
{
    type Output = Answer<B, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let answer = ready!(this.inner.poll(cx));
        Poll::Ready(match this.grpc.take() {
            Some(content_type) => answer.map(|response| translated(response, content_type)),
            None => answer,
        })
    }
}

impl<F, B, E> Future for Inner<F, B, E>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: Body,
{
    type Output = Answer<B, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project() {
            Projected::Passed { future, settings } => {
                Poll::Ready(ready!(future.poll(cx)).map(|response| passed(settings.as_deref(), response)))
            }
            Projected::Waiting { future, settings } => Poll::Ready(
                ready!(future.as_mut().poll(cx)).map(|response| passed(settings.as_deref(), response)),
            ),
            Projected::Refused { response } => {
                let response = response.take().unwrap_or_default();
                Poll::Ready(Ok(response.map(|data| ResponseBody::buffered(data, None))))
            }
            Projected::Guarded { work, .. } => {
                Poll::Ready(ready!(work.poll_or_move(cx)).unwrap_or_else(|error| Ok(ended_early(&error))))
            }
        }
    }
}

impl<F, B, E> fmt::Debug for ResponseFuture<F, B, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

/// A closure of the application panicked, which may be the renderer, or the runtime is going down.
fn ended_early<B>(error: &EndedEarly) -> Response<ResponseBody<B>> {
    let error = error as &dyn std::error::Error;
    tracing::error!(target: TRACING_TARGET, error, "the work for a request ended early");
    respond(Rejection::failed(), &ProblemJson::default()).map(|data| ResponseBody::buffered(data, None))
}
