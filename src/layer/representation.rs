//! Rendering of responses from stored representations.

use std::{error::Error, future::Future, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use http::Response;
use tokio::{task::JoinError, time::timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use crate::{
    consumer::Consumer,
    error::BoxError,
    key::IdempotencyKey,
    layer::settings::Settings,
    redact::TRACING_TARGET,
    rejection::{Rejection, RejectionCode},
    stored::response::{StoredBody, StoredRepresentation, StoredResponse},
};

/// Renders responses from representations. Implemented by asynchronous closures; set by
/// [`with_representation`](crate::IdempotencyLayer::with_representation).
#[async_trait]
pub trait RenderRepresentation: Send + Sync {
    /// Renders the response. It is sent with the status that it has here and without its
    /// extensions.
    ///
    /// # Errors
    ///
    /// Any. The error is logged, and the client gets 500 `representation-unrenderable`.
    async fn render(
        &self,
        stored: StoredRepresentation,
    ) -> Result<Response<Bytes>, Box<dyn Error + Send + Sync>>;
}

#[async_trait]
impl<F, Fut, B, E> RenderRepresentation for F
where
    F: Fn(StoredRepresentation) -> Fut + Send + Sync,
    Fut: Future<Output = Result<Response<B>, E>> + Send,
    B: Into<Bytes>,
    E: Into<Box<dyn Error + Send + Sync>>,
{
    async fn render(
        &self,
        stored: StoredRepresentation,
    ) -> Result<Response<Bytes>, Box<dyn Error + Send + Sync>> {
        self(stored).await.map(|response| response.map(Into::into)).map_err(Into::into)
    }
}

/// The response as the client gets it: rendered if only a representation of it is stored.
pub(crate) async fn rendered(
    settings: &Settings,
    consumer: &Consumer,
    key: &IdempotencyKey,
    response: StoredResponse,
) -> Result<StoredResponse, Rejection> {
    let StoredBody::Representation(representation) = response.body else { return Ok(response) };
    let stored = StoredRepresentation::new(consumer.clone(), response.status, representation.data().clone());
    let response = render(settings, stored).await.map_err(|error| {
        let (key, error) = (settings.attempts.shown(key), &error as &dyn Error);
        tracing::error!(target: TRACING_TARGET, %consumer, %key, error, "a response cannot be rendered");
        let detail = "The request was performed, and its response cannot be rendered right now. Send the \
                      request again with the same key to get it.";
        Rejection::new(RejectionCode::RepresentationUnrenderable, detail)
    })?;
    let (parts, data) = response.into_parts();
    let mut response = StoredResponse::of(&parts, StoredBody::Kept { data, trailers: None });
    response.remove_headers(&settings.headers_not_kept);
    Ok(response)
}

/// Runs the renderer in a task of its own, so that a panic ends nothing else.
async fn render(settings: &Settings, stored: StoredRepresentation) -> Result<Response<Bytes>, Unrenderable> {
    let renderer = Arc::clone(settings.representation_renderer.as_ref().ok_or(Unrenderable::NoRenderer)?);
    let task = tokio::spawn(async move { renderer.render(stored).await }.in_current_span());
    let limit = settings.attempts.store_timeout;
    match timeout(limit, AbortOnDropHandle::new(task)).await {
        Ok(Ok(rendered)) => rendered.map_err(Unrenderable::Failed),
        Ok(Err(error)) => Err(Unrenderable::EndedEarly(error)),
        Err(_) => Err(Unrenderable::TimedOut(limit)),
    }
}

#[derive(Debug, thiserror::Error)]
enum Unrenderable {
    #[error("no renderer is set: see IdempotencyLayer::with_representation")]
    NoRenderer,
    #[error("the renderer failed")]
    Failed(#[source] BoxError),
    #[error("the renderer ended early")]
    EndedEarly(#[source] JoinError),
    #[error("the renderer took longer than {0:?}")]
    TimedOut(Duration),
}
