//! Rendering of responses from stored representations.

use std::{error::Error, future::Future};

use async_trait::async_trait;
use bytes::Bytes;
use http::Response;

use crate::stored::response::StoredRepresentation;

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
