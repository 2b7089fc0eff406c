//! Who may send requests: known in one place, for requests from the network and for those that the server sends again.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{HeaderMap, StatusCode},
    middleware::Next,
    response::{IntoResponse, Response},
};
use tower_idempotency::{
    Consumer,
    recovery::{Refused, Restore},
};

use crate::Problem;

/// The consumers and which of them are revoked.
#[derive(Clone)]
pub(crate) struct Consumers {
    revoked: Arc<str>,
}

impl Consumers {
    /// All but these, with commas between them.
    pub(crate) fn without(revoked: &str) -> Self {
        Self { revoked: revoked.into() }
    }

    fn by_api_key(&self, headers: &HeaderMap) -> Option<Consumer> {
        let sent = headers.get("x-api-key")?;
        let (_, name) = API_KEYS.iter().find(|(key, _)| sent == key)?;
        Consumer::new(*name).ok().filter(|consumer| !self.is_revoked(consumer))
    }

    fn is_revoked(&self, consumer: &Consumer) -> bool {
        self.revoked.split(',').any(|revoked| revoked.trim() == consumer.as_str())
    }
}

/// The consumer of a request that is sent again, which has no API key: keys are never stored. Nothing that comes from a
/// network can set an extension, and nobody else has this type.
#[derive(Clone)]
struct Restored(Consumer);

/// Asked before a request is sent again, after hours perhaps.
#[async_trait::async_trait]
impl Restore for Consumers {
    async fn restore(
        &self,
        request: &mut axum::http::Request<()>,
        consumer: &Consumer,
    ) -> Result<(), Refused> {
        if self.is_revoked(consumer) {
            return Err(Refused::new(format!("{consumer} was revoked")));
        }
        request.extensions_mut().insert(Restored(consumer.clone()));
        Ok(())
    }
}

/// Tells the layers inside who has sent a request.
pub(crate) async fn authenticate(
    State(consumers): State<Consumers>,
    mut request: Request,
    next: Next,
) -> Response {
    let consumer = match request.extensions_mut().remove::<Restored>() {
        Some(Restored(consumer)) => Some(consumer),
        None => consumers.by_api_key(request.headers()),
    };
    let Some(consumer) = consumer else {
        return Problem(StatusCode::UNAUTHORIZED, "send a valid X-Api-Key".to_owned()).into_response();
    };
    request.extensions_mut().insert(consumer);
    next.run(request).await
}

const API_KEYS: [(&str, &str); 2] = [("acme-key", "acme"), ("globex-key", "globex")];
