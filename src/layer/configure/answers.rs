//! Settings of answers.

use std::{sync::Arc, time::Duration};

use http::HeaderName;

use crate::{
    duration::capped,
    layer::{IdempotencyLayer, RenderRepresentation},
    policy::ResultPolicy,
    rejection::RenderRejection,
};

/// Answers: what is stored, and how replays and refusals look.
impl IdempotencyLayer {
    /// Sets which results are stored, and whether abandoned attempts run again. Default:
    /// [`ResultPolicy::default`].
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, ResultPolicy};
    /// let layer = IdempotencyLayer::new(MemoryStore::new())
    ///     .with_policy(ResultPolicy::at_most_once());
    /// # }
    /// ```
    #[must_use]
    pub fn with_policy(self, policy: ResultPolicy) -> Self {
        self.set_attempts(|attempts| attempts.abandoned = policy.abandoned())
            .set(|settings| settings.policy = policy)
    }

    /// Sets the function that renders responses from what handlers have stored instead of them
    /// ([`Representation`]). Default: responses are stored whole, and a stored representation is
    /// answered 500 `representation-unrenderable`.
    ///
    /// ```
    /// # #[cfg(all(feature = "axum", feature = "memory"))] {
    /// # async fn load(consumer: &Consumer, id: &[u8]) -> std::io::Result<String> { todo!() }
    /// use axum::{Extension, http::{Response, StatusCode}};
    /// use tower_idempotency::{
    ///     Consumer, Idempotency, IdempotencyLayer, MemoryStore, Representation,
    ///     layer::StoredRepresentation,
    /// };
    ///
    /// async fn create_charge(_: Idempotency) -> (StatusCode, Extension<Representation>) {
    ///     (StatusCode::CREATED, Extension(Representation::new("ch_1")))
    /// }
    ///
    /// let render = |stored: StoredRepresentation| async move {
    ///     let charge = load(&stored.consumer, &stored.data).await?;
    ///     let response = Response::builder().status(stored.status);
    ///     let response = response.header("content-type", "application/json").body(charge)?;
    ///     Ok::<_, Box<dyn std::error::Error + Send + Sync>>(response)
    /// };
    /// let layer = IdempotencyLayer::new(MemoryStore::new()).with_representation(render);
    /// # }
    /// ```
    ///
    /// The first response is rendered too, once the record is completed and the handler's
    /// transaction committed. First response and replay are equal as long as the data that is read
    /// is equal. Store a response whole if it must not change with that data. Headers of the
    /// connection and those that are [not kept](Self::add_header_not_kept) are removed.
    ///
    /// If rendering fails, panics or takes longer than the [store
    /// time-out](Self::with_store_timeout), the answer is 500 `representation-unrenderable`. The
    /// record stays completed: a retry renders again, and the handler never runs again.
    ///
    /// [`Representation`]: crate::Representation
    #[must_use]
    pub fn with_representation(self, renderer: impl RenderRepresentation + 'static) -> Self {
        self.set(|settings| settings.representation_renderer = Some(Arc::new(renderer)))
    }

    /// Sets the header that marks a replay, with the value `true`. Default: `Idempotent-Replayed`.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use http::HeaderName;
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// let name = HeaderName::from_static("x-replayed");
    /// let layer = IdempotencyLayer::new(MemoryStore::new()).with_replay_marker(name);
    /// # }
    /// ```
    #[must_use]
    pub fn with_replay_marker(self, name: HeaderName) -> Self {
        self.set(|settings| settings.replay_marker = name)
    }

    /// Sets how refusals are rendered. Default: [`ProblemJson`](crate::ProblemJson).
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Rejection};
    /// let layer = IdempotencyLayer::new(MemoryStore::new());
    /// let layer = layer.with_renderer(|rejection: &Rejection| {
    ///     let mut response = http::Response::new(rejection.code().as_str().into());
    ///     *response.status_mut() = rejection.status();
    ///     response
    /// });
    /// # }
    /// ```
    ///
    /// It renders the refusals of the layer, and those that handlers and extractors answer:
    /// `Idempotency`, `Tx`, `TxError` and `IntentError`, also in requests that pass through without
    /// a key. Headers and extensions that a middleware inside the layer has added to such an answer
    /// stay. An answer whose status or content type a middleware has changed is the application's
    /// own, and left as it is.
    ///
    /// One refusal is always a `ProblemJson`: `internal`, for a request whose task ended early or
    /// whose refusal could not be rendered, because the renderer panicked.
    #[must_use]
    pub fn with_renderer(self, renderer: impl RenderRejection + 'static) -> Self {
        self.set(|settings| settings.renderer = Arc::new(renderer))
    }

    /// Limits the stored body of a response, in bytes. A larger one reaches the first caller, and
    /// retries get 409 `response-not-kept`. Default: 1 MiB.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// let layer = IdempotencyLayer::new(MemoryStore::new()).with_response_body_limit(64 * 1024);
    /// # }
    /// ```
    #[must_use]
    pub fn with_response_body_limit(self, bytes: usize) -> Self {
        self.set(|settings| settings.response_body_limit = bytes)
    }

    /// Limits how long the body of a response is collected. A slower one counts as endless: it
    /// reaches the first caller, and retries get 409 `response-not-kept`. Zero stores only bodies
    /// that are complete immediately. Default: 10 s.
    ///
    /// Responses of a streaming type, and those that are not stored, are not collected.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use std::time::Duration;
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// let limit = Duration::from_secs(2);
    /// let layer = IdempotencyLayer::new(MemoryStore::new()).with_response_body_timeout(limit);
    /// # }
    /// ```
    #[must_use]
    pub fn with_response_body_timeout(self, limit: Duration) -> Self {
        self.set(|settings| settings.response_body_timeout = capped(limit))
    }

    /// Leaves a header out of stored responses, so that replays lack it. Default: none is left out.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use http::header;
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// let layer = IdempotencyLayer::new(MemoryStore::new())
    ///     .add_header_not_kept(header::SET_COOKIE);
    /// # }
    /// ```
    #[must_use]
    pub fn add_header_not_kept(self, name: HeaderName) -> Self {
        self.set(|settings| settings.headers_not_kept.push(name))
    }
}
