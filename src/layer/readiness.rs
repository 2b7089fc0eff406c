//! The readiness of the inner service. Only what is performed waits for it: a limit inside the
//! layer has no say over replays and refusals.

use std::{
    future::{Future, poll_fn},
    mem,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    task::{Context, Poll, Waker},
};

use tower_service::Service;

use crate::{
    attempt::Facts,
    layer::{answer::refused, future::Answer, settings::Settings},
    redact::TRACING_TARGET,
    rejection::{Rejection, RejectionCode},
};

/// The reason why a service was not called.
pub(crate) enum Unready<E> {
    Failed(E),
    Panicked,
    /// It was not ready in time.
    Late,
}

/// A call of a service.
pub(crate) enum Call<F: Future> {
    /// The service was ready.
    Begun(F),
    /// The service is called once it is ready.
    Waiting(Pin<Box<dyn Future<Output = F::Output> + Send>>),
}

/// Calls the service immediately if it is ready, which costs neither a clone nor a box.
pub(crate) fn call_when_ready<S, R>(service: &mut S, request: R) -> Call<S::Future>
where
    S: Service<R> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    R: Send + 'static,
{
    // The waker is not used: a service that is not ready is polled again in the call's own future.
    match service.poll_ready(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(Ok(())) => Call::Begun(service.call(request)),
        Poll::Ready(Err(error)) => Call::Waiting(Box::pin(async { Err(error) })),
        Poll::Pending => {
            // The service that was polled, and not its clone: it has a place in the queue.
            let clone = service.clone();
            let mut polled = mem::replace(service, clone);
            Call::Waiting(Box::pin(async move {
                until_ready(&mut polled).await?;
                polled.call(request).await
            }))
        }
    }
}

/// Waits until the service is ready.
pub(crate) async fn until_ready<S: Service<R>, R>(service: &mut S) -> Result<(), S::Error> {
    poll_fn(|cx| service.poll_ready(cx)).await
}

/// Waits until the service is ready, or until `limit` completes.
pub(crate) async fn until_ready_within<S: Service<R>, R>(
    service: &mut S,
    mut limit: Pin<&mut impl Future<Output = ()>>,
) -> Result<(), Unready<S::Error>> {
    poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| service.poll_ready(cx))) {
        Ok(Poll::Ready(ready)) => Poll::Ready(ready.map_err(Unready::Failed)),
        Ok(Poll::Pending) => limit.as_mut().poll(cx).map(|()| Err(Unready::Late)),
        Err(_) => Poll::Ready(Err(Unready::Panicked)),
    })
    .await
}

impl<E> Unready<E> {
    /// The answer to a request that was claimed, and whose handler was not called.
    pub(crate) fn answer<B>(self, settings: &Settings, facts: &Facts) -> Answer<B, E> {
        let (code, cause, detail) = match self {
            Self::Failed(error) => return Err(error),
            Self::Panicked => (
                RejectionCode::Internal,
                "it panicked",
                "The request was not performed: the server failed. Send it again with the same key.",
            ),
            Self::Late => (
                RejectionCode::Overloaded,
                "it was not ready within max_execution",
                "The request was not performed: the server found no place for it in time. Send it again \
                 later with the same key.",
            ),
        };
        let Facts { attempt, .. } = facts;
        tracing::error!(
            target: TRACING_TARGET, consumer = %attempt.consumer, attempt = %attempt.id, cause,
            "the service inside the layer was not called, and the key is released"
        );
        Ok(refused(settings, Rejection::new(code, detail)))
    }
}
