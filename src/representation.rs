//! Representations: what is stored of a response instead of the response, and the function that renders it.

use std::{error::Error, fmt, future::Future, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use http::{Response, StatusCode};
use tokio::{task::JoinError, time::timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use crate::{
    Consumer, IdempotencyKey, Rejection, RejectionCode, StoredBody, StoredResponse, TRACING_TARGET,
    error::BoxError, settings::Settings,
};

/// What a handler has stored instead of its response, for example an id: opaque bytes that
/// [`with_representation`](crate::IdempotencyLayer::with_representation) renders.
///
/// The handler, or a layer around it, puts it into the extensions of its response; a handler of axum returns
/// `(StatusCode::CREATED, Extension(Representation::new(id)))`. If the response is one to be stored (see
/// [`ResultPolicy`](crate::ResultPolicy) and [`Directive`](crate::Directive)), its status and these bytes are, and headers
/// and body of its own are dropped: the client gets the response that is rendered of it, first and with every replay.
///
/// In any other response it has no effect, and the response is sent as it is: when the result is not stored, and in
/// requests that are not guarded, because they have no key or run
/// [unprotected](crate::StoreOutage::RunUnprotected). In those there is no [`Idempotency`](crate::Idempotency) either:
/// require it, or give them a whole response.
#[derive(Clone, PartialEq, Eq)]
pub struct Representation(Bytes);

impl Representation {
    /// A representation of these bytes. Those that are longer than
    /// [`with_response_body_limit`](crate::IdempotencyLayer::with_response_body_limit) allows are rendered for the first
    /// caller and not kept: retries get 409 `response-not-kept`.
    #[must_use]
    pub fn new(data: impl Into<Bytes>) -> Self {
        Self(data.into())
    }

    /// The bytes.
    #[must_use]
    pub fn data(&self) -> &Bytes {
        &self.0
    }
}

/// Shows how long it is, and nothing of it.
impl fmt::Debug for Representation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Representation({} bytes)", self.0.len())
    }
}

/// What a response is rendered from.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoredRepresentation {
    /// Whose request it was: whom the response is for.
    pub consumer: Consumer,
    /// The status of the handler's response.
    pub status: StatusCode,
    /// What the handler had stored, as [`Representation`].
    pub data: Bytes,
}

impl StoredRepresentation {
    /// What the layer hands over for a [`Representation`] of these bytes.
    #[must_use]
    pub fn new(consumer: Consumer, status: StatusCode, data: impl Into<Bytes>) -> Self {
        Self { consumer, status, data: data.into() }
    }
}

/// Renders responses from representations. Implemented by asynchronous closures; set by
/// [`with_representation`](crate::IdempotencyLayer::with_representation).
#[async_trait]
pub trait RenderRepresentation: Send + Sync {
    /// Makes the response. It is sent with the status that it has here and without its extensions.
    ///
    /// # Errors
    ///
    /// Whatever stands in the way. It is logged, and the client gets 500 `representation-unrenderable`.
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

/// A response as the client gets it: one that is represented is rendered.
pub(crate) async fn rendered(
    settings: &Settings,
    consumer: &Consumer,
    key: &IdempotencyKey,
    response: StoredResponse,
) -> Result<StoredResponse, Rejection> {
    let StoredBody::Representation(Representation(data)) = response.body else { return Ok(response) };
    let stored = StoredRepresentation { consumer: consumer.clone(), status: response.status, data };
    let response = render(settings, stored).await.map_err(|error| {
        let (key, error) = (settings.shown(key), &error as &dyn Error);
        tracing::error!(target: TRACING_TARGET, %consumer, %key, error, "a response cannot be rendered");
        let detail = "The request was performed, and its response cannot be rendered right now. Send it again with the same key.";
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
    let limit = settings.store_timeout;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_not_shown() {
        assert_eq!(format!("{:?}", Representation::new("secret")), "Representation(6 bytes)");
    }
}
