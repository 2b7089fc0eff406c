//! Sends one request through the application and survives panics and hangs.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use tokio::{task::JoinError, time::timeout};
use tower_service::Service;

use crate::{
    error::BoxError,
    layer::resent::{Passage, Resent},
    node::Node,
    recovery::completer::{Completer, Refused},
    redact::subscribed,
    stored::request::KeptRequest,
};

/// A service of any type.
pub(super) type SendRequest = dyn Fn(Request<Bytes>) -> Sent + Send + Sync;
type Sent = Pin<Box<dyn Future<Output = Result<StatusCode, BoxError>> + Send>>;

/// The outcome of sending a request, before its record is read.
pub(super) enum Passed {
    /// The request was sent to the application; `passage` says whether it reached the layer.
    Through { passage: Arc<Passage>, status: Option<StatusCode>, what: String },
    /// The request was not sent, and may be sent later.
    NotYet(String),
    /// The request must not be sent.
    Never(String),
}

pub(super) fn erased<S, B, R>(service: S) -> Arc<SendRequest>
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<BoxError>,
    B: From<Bytes> + Send + 'static,
{
    // A service need not be `Sync`; the lock makes it so.
    let service = Mutex::new(service);
    Arc::new(move |request| {
        let mut service = service.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // A clone of its own, polled ready before its call, as the contract of `Service` demands.
        Box::pin(async move {
            poll_fn(|cx| service.poll_ready(cx)).await.map_err(Into::into)?;
            let response = service.call(request.map(B::from)).await.map_err(Into::into)?;
            Ok(response.status())
        })
    })
}

impl Completer {
    pub(super) async fn pass_on(&self, node: &Node, kept: &KeptRequest) -> Passed {
        let (mut parts, body) = match node.codec.read_request(&kept.request) {
            Ok(request) => request.into_parts(),
            Err(error) => return Passed::Never(error.to_string()),
        };
        let (resent, passage) = Resent::new(kept);
        parts.extensions.insert(resent);
        let request = match self.restored(Request::from_parts(parts, ()), kept).await {
            Ok(request) => request.map(|()| body),
            Err(Refused { reason, for_now: true }) => return Passed::NotYet(reason),
            Err(Refused { reason, for_now: false }) => return Passed::Never(reason),
        };
        let (status, what) = match self.send(request).await {
            Ok(status) => (Some(status), format!("the application answered {status}")),
            Err(what) => (None, what),
        };
        Passed::Through { passage, status, what }
    }

    async fn restored(&self, mut request: Request<()>, kept: &KeptRequest) -> Result<Request<()>, Refused> {
        let (restore, consumer) = (Arc::clone(&self.restore), kept.consumer.clone());
        let restored = self.in_time("Restore", async move {
            restore.restore(&mut request, &consumer).await.map(|()| request)
        });
        restored.await.unwrap_or_else(|what| Err(Refused::for_now(what)))
    }

    async fn send(&self, request: Request<Bytes>) -> Result<StatusCode, String> {
        let send = Arc::clone(&self.send);
        let sent = self.in_time("the application", async move { send(request).await }).await?;
        sent.map_err(|error| format!("the application failed: {error}"))
    }

    /// Runs code of the application, which may panic or hang.
    async fn in_time<T: Send + 'static>(
        &self,
        who: &str,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, String> {
        let mut task = tokio::spawn(subscribed(work));
        match timeout(self.timeout, &mut task).await {
            Ok(ended) => ended.map_err(|error: JoinError| match error.is_panic() {
                true => format!("{who} panicked"),
                false => format!("{who} was cut off"),
            }),
            Err(_) => {
                // Cuts off what is outside the layer; the attempt runs in a task of its own and goes on.
                task.abort();
                Err(format!("{who} took longer than {:?}", self.timeout))
            }
        }
    }
}
