//! The Tower layer.

mod answer;
mod body;
mod buffer;
mod closing;
mod configure;
mod decision;
mod discard;
mod future;
mod grpc;
mod handler;
mod keep;
pub(crate) mod kept_requests;
mod reach;
mod readiness;
mod representation;
pub(crate) mod resent;
mod service;
pub(crate) mod settings;
mod single;
mod verdict;

use std::sync::Arc;

use tower_layer::Layer;

use self::settings::Settings;
use crate::{attempt::settings::AttemptSettings, node::Node, store::IntoStore};

pub use self::{
    body::{RequestBody, ResponseBody},
    future::ResponseFuture,
    representation::RenderRepresentation,
    service::IdempotencyService,
    settings::{StoreOutage, Strategy},
};
pub use crate::{policy::AbandonedAttempts, redact::KeyLogging, stored::response::StoredRepresentation};

/// Layer that performs a request with an idempotency key once and replays its response to every
/// retry.
///
/// Clones share the store, the limits and what is running. To give a route other settings, clone
/// the layer and change the clone. Give each route one of them, and do not nest them: an inner
/// clone passes through what the outer one guards, and its settings do not apply. So does another
/// layer over the same table, if it finds the same consumer and key; that costs a claim, and is
/// logged once.
///
/// ```
/// # #[cfg(all(feature = "axum", feature = "memory"))] {
/// # use axum::{Router, routing::post};
/// # use tower_idempotency::{IdempotencyLayer, MemoryStore, ResultPolicy};
/// # async fn create() {}
/// # async fn pay_out() {}
/// let layer = IdempotencyLayer::new(MemoryStore::new());
/// let strict = layer.clone().required().with_policy(ResultPolicy::at_most_once());
/// let app: Router = Router::new()
///     .route("/charges", post(create).layer(layer))
///     .route("/payouts", post(pay_out).layer(strict));
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct IdempotencyLayer {
    node: Arc<Node>,
    settings: Arc<Settings>,
}

impl IdempotencyLayer {
    /// Makes a layer over a store, or over a pool of connections of which a store is made, with the
    /// default settings.
    ///
    /// **No two attempts of a request run at the same time while leases hold, and a stored answer
    /// is never executed again.** After a crash, a panic, a 5xx or another result that is not
    /// stored, a retry runs the handler again (at least once). With
    /// [`at_most_once`](crate::ResultPolicy::at_most_once), a 5xx is stored, and a crash or a panic
    /// holds the key until an operator resolves it (409 `outcome-unknown`).
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// let layer = IdempotencyLayer::new(MemoryStore::new());
    /// # }
    /// ```
    #[must_use]
    pub fn new(store: impl IntoStore) -> Self {
        Self { node: Node::new(store.into_store()), settings: Arc::default() }
    }

    pub(crate) fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Passes every request through. Use it to switch the layer off where a type must stay the
    /// same.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// let layer = IdempotencyLayer::new(MemoryStore::new()).disabled();
    /// # }
    /// ```
    #[must_use]
    pub fn disabled(self) -> Self {
        self.set(|settings| settings.enabled = false)
    }

    fn set(mut self, change: impl FnOnce(&mut Settings)) -> Self {
        change(Arc::make_mut(&mut self.settings));
        self
    }

    fn set_attempts(self, change: impl FnOnce(&mut AttemptSettings)) -> Self {
        self.set(|settings| change(Arc::make_mut(&mut settings.attempts)))
    }
}

impl<S> Layer<S> for IdempotencyLayer {
    type Service = IdempotencyService<S>;

    /// Puts the layer around a service.
    ///
    /// # Panics
    ///
    /// If settings contradict each other. They are compared here, so that the order in which they
    /// are set does not matter.
    #[track_caller]
    fn layer(&self, inner: S) -> Self::Service {
        self.settings.check();
        IdempotencyService::new(inner, Arc::clone(&self.node), Arc::clone(&self.settings))
    }
}
