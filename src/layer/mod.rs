//! The Tower layer.

mod answer;
mod body;
mod buffer;
mod closing;
mod future;
mod guarded;
mod handler;
mod keep;
mod kept_requests;
mod representation;
pub(crate) mod resent;
mod service;
pub(crate) mod settings;

use std::{sync::Arc, time::Duration};

use http::{HeaderName, Method};
use tokio::sync::Semaphore;
use tower_layer::Layer;

use self::settings::Settings;
use crate::{
    consumer::ConsumerExtractor,
    fingerprint::Fingerprinter,
    key::KeySyntax,
    node::{Node, reaper::Reaper},
    policy::ResultPolicy,
    redact::KeyLogging,
    rejection::RenderRejection,
    store::{IntoStore, TransactionOptions},
};

pub use self::{
    body::{RequestBody, ResponseBody},
    future::ResponseFuture,
    kept_requests::KeptRequests,
    representation::RenderRepresentation,
    service::IdempotencyService,
    settings::StoreOutage,
};
pub use crate::stored::response::{Representation, StoredRepresentation};

/// Layer that performs a request with an idempotency key once and replays its response to every retry.
///
/// Clones share the store, the limits and what is running. To give a route other settings, clone the layer and change
/// the clone. Give each route one of them: inside another clone a layer passes through what the outer one guards, and
/// its settings do not apply.
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
    /// A layer over a store, or over a pool of connections that a store is made of, with the default settings.
    ///
    /// What this promises: **no two attempts of a request run at the same time while leases hold, and a stored answer
    /// is never executed again.** A crash, a panic, a 5xx or another result that is not stored means that a retry runs
    /// the handler again (at least once); with [`ResultPolicy::at_most_once`] 5xx is stored, and a crash or panic holds
    /// the key (409 `outcome-unknown`) until an operator resolves it.
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

    /// Passes every request through. For switching the layer off where a type must stay the same.
    #[must_use]
    pub fn disabled(self) -> Self {
        self.set(|settings| settings.enabled = false)
    }

    /// Sets the guarded methods. Default: `POST` and `PATCH`. All others pass through, their key header ignored.
    ///
    /// # Panics
    ///
    /// If one of them is safe or has no business with keys: `GET`, `HEAD`, `OPTIONS`, `TRACE`, `CONNECT`.
    #[must_use]
    #[track_caller]
    pub fn with_methods(self, methods: impl IntoIterator<Item = Method>) -> Self {
        let methods: Vec<Method> = methods.into_iter().collect();
        let never = [Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE, Method::CONNECT];
        if let Some(method) = methods.iter().find(|method| never.contains(method)) {
            panic!(
                "{method} cannot be guarded: it changes nothing, so it is safe to retry; remove it from the methods"
            );
        }
        self.set(|settings| settings.methods = methods)
    }

    /// Sets the header that carries the key. Default: `Idempotency-Key`.
    #[must_use]
    pub fn with_key_header(self, name: HeaderName) -> Self {
        self.set(|settings| settings.key_header = name)
    }

    /// Sets which keys are accepted. Default: [`KeySyntax::default`], 1 to 255 bytes.
    #[must_use]
    pub fn with_key_syntax(self, syntax: KeySyntax) -> Self {
        self.set(|settings| settings.key_syntax = syntax)
    }

    /// Refuses guarded requests without a key: 400 `key-missing`. Default: they pass through, unprotected.
    #[must_use]
    pub fn required(self) -> Self {
        self.set(|settings| settings.required = true)
    }

    /// Derives a key from the fingerprint of a request that has none, for clients that cannot send one. Off by default.
    ///
    /// An equal request of the same consumer within `window` of the first counts as its retry, **also if it is meant as
    /// a second one**: two equal orders of the same article cannot be told apart. `window` is the retention of such
    /// records; there are no time buckets. [`required`](Self::required) has no effect beside it, and with
    /// [`Fingerprinter::none`] all requests to an endpoint are equal.
    ///
    /// # Panics
    ///
    /// If `window` is zero.
    #[must_use]
    #[track_caller]
    pub fn with_derived_key(self, window: Duration) -> Self {
        assert!(
            !window.is_zero(),
            "a window of zero derives keys that nothing can match: use at least a second"
        );
        self.set(|settings| settings.derived_key = Some(window))
    }

    /// Sets how the consumer of a request is found. Default: [`ConsumerExtractor::default`], which refuses to guess.
    ///
    /// # Panics
    ///
    /// If its header is to be [kept](Self::with_kept_requests).
    #[must_use]
    #[track_caller]
    pub fn with_consumer(self, extractor: ConsumerExtractor) -> Self {
        self.set(|settings| settings.consumer = extractor).checked()
    }

    /// Sets how a retry is told from another request. Default: [`Fingerprinter::default`], over method, path, query,
    /// content type and body.
    ///
    /// # Panics
    ///
    /// If it covers a header that cannot be kept, and requests are to be [kept](Self::with_kept_requests).
    #[must_use]
    #[track_caller]
    pub fn with_fingerprint(self, fingerprinter: Fingerprinter) -> Self {
        self.set(|settings| settings.fingerprinter = fingerprinter).checked()
    }

    /// Sets which results are stored and whether abandoned attempts run again. Default: [`ResultPolicy::default`].
    #[must_use]
    pub fn with_policy(self, policy: ResultPolicy) -> Self {
        self.set(|settings| settings.policy = policy)
    }

    /// Sets how responses are rendered from what handlers have stored instead of them ([`Representation`]). Default:
    /// responses are stored whole, and one with a representation is answered 500 `representation-unrenderable`.
    ///
    /// ```
    /// # #[cfg(all(feature = "axum", feature = "memory"))] {
    /// # async fn load(consumer: &Consumer, id: &[u8]) -> Result<String, std::io::Error> { Ok(String::new()) }
    /// use axum::{Extension, http::{Response, StatusCode}};
    /// use tower_idempotency::{
    ///     Consumer, Idempotency, IdempotencyLayer, MemoryStore, Representation,
    ///     StoredRepresentation,
    /// };
    ///
    /// async fn create_charge(_: Idempotency) -> (StatusCode, Extension<Representation>) {
    ///     (StatusCode::CREATED, Extension(Representation::new("ch_1")))
    /// }
    ///
    /// let render = |stored: StoredRepresentation| async move {
    ///     let charge = load(&stored.consumer, &stored.data).await?;
    ///     let response = Response::builder().status(stored.status).header("content-type", "application/json");
    ///     Ok::<_, Box<dyn std::error::Error + Send + Sync>>(response.body(charge)?)
    /// };
    /// let layer = IdempotencyLayer::new(MemoryStore::new()).with_representation(render);
    /// # }
    /// ```
    ///
    /// It renders the first response too, once the record is completed and the handler's transaction committed, so that
    /// first and replay are equal as long as what it reads is. A response that must not change with it is stored whole.
    /// Headers of the connection and those [not kept](Self::add_header_not_kept) are taken away from all of them.
    ///
    /// If it fails, panics or takes longer than the [store time-out](Self::with_store_timeout), the answer is 500
    /// `representation-unrenderable`. The record stays completed: a retry renders again, and the handler never runs again.
    ///
    /// [`Representation`]: crate::Representation
    #[must_use]
    pub fn with_representation(self, renderer: impl RenderRepresentation + 'static) -> Self {
        self.set(|settings| settings.representation_renderer = Some(Arc::new(renderer)))
    }

    /// Sets the header that marks a replay, with the value `true`. Default: `Idempotent-Replayed`.
    #[must_use]
    pub fn with_replay_marker(self, name: HeaderName) -> Self {
        self.set(|settings| settings.replay_marker = name)
    }

    /// Sets how refusals look. Default: [`ProblemJson`](crate::ProblemJson), which is also what the extractor answers and
    /// what a request gets whose task ends early (`internal`).
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Rejection};
    /// let layer = IdempotencyLayer::new(MemoryStore::new()).with_renderer(|rejection: &Rejection| {
    ///     let mut response = http::Response::new(rejection.code().as_str().into());
    ///     *response.status_mut() = rejection.status();
    ///     response
    /// });
    /// # }
    /// ```
    #[must_use]
    pub fn with_renderer(self, renderer: impl RenderRejection + 'static) -> Self {
        self.set(|settings| settings.renderer = Arc::new(renderer))
    }

    /// Sets for how long a record is kept, counted from its first claim. After that the key counts as new. A response
    /// that is stored later than that, and what intents and phases of an attempt have done that may run past it, is kept for
    /// as long again. Default: 24 h.
    ///
    /// # Panics
    ///
    /// If it is shorter than `max_execution` and lease together.
    #[must_use]
    #[track_caller]
    pub fn with_retention(self, retention: Duration) -> Self {
        self.set(|settings| settings.timing.retention = retention).checked()
    }

    /// Sets for how long an attempt owns its record without renewing: for how long retries are refused with 409 after a
    /// crash. Default: 30 s.
    ///
    /// # Panics
    ///
    /// If it is shorter than 100 ms or two renewals, or longer than the retention allows: set a longer retention first.
    #[must_use]
    #[track_caller]
    pub fn with_lease(self, lease: Duration) -> Self {
        self.set(|settings| settings.timing.lease = lease).checked()
    }

    /// Sets how often leases are renewed. Default: a third of the lease.
    ///
    /// # Panics
    ///
    /// If it is zero or longer than half the lease.
    #[must_use]
    #[track_caller]
    pub fn with_renewal_interval(self, interval: Duration) -> Self {
        self.set(|settings| settings.timing.renewal = Some(interval)).checked()
    }

    /// Sets for how long a handler may run before it is cancelled. Default: 10 min. Shorter limits belong into a
    /// time-out layer inside this one.
    ///
    /// # Panics
    ///
    /// If it is zero or longer than the retention allows: set a longer retention first.
    #[must_use]
    #[track_caller]
    pub fn with_max_execution(self, limit: Duration) -> Self {
        self.set(|settings| settings.timing.max_execution = limit).checked()
    }

    /// Limits how many requests with a key are decided and run at once; the others get 503 `overloaded`. Clones made
    /// afterwards share the limit. Default: none.
    ///
    /// # Panics
    ///
    /// If it is zero.
    #[must_use]
    #[track_caller]
    pub fn with_max_in_flight(self, limit: usize) -> Self {
        assert!(limit > 0, "no request in flight: every request with a key would be refused; use at least 1");
        let places = Arc::new(Semaphore::new(limit.min(Semaphore::MAX_PERMITS)));
        self.set(|settings| settings.in_flight = Some(places))
    }

    /// Limits the body of a request with a key, in bytes, to at most 4 GiB; a larger one gets 413. Default: 1 MiB.
    ///
    /// # Panics
    ///
    /// If it is over the limit of all bodies together.
    #[must_use]
    #[track_caller]
    pub fn with_request_body_limit(self, bytes: usize) -> Self {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.set(|settings| settings.request_limits.body = bytes).checked()
    }

    /// Limits all buffered request bodies together, in bytes; what does not fit gets 503 `overloaded`. Clones made
    /// afterwards share the limit. Default: 64 MiB.
    ///
    /// # Panics
    ///
    /// If it is below the limit of one body.
    #[must_use]
    #[track_caller]
    pub fn with_request_buffer_limit(self, bytes: usize) -> Self {
        let total = Arc::new(Semaphore::new(bytes.min(Semaphore::MAX_PERMITS)));
        self.set(|settings| {
            settings.request_limits.total_limit = bytes;
            settings.request_limits.total = total;
        })
        .checked()
    }

    /// Sets for how long the body of a request may take to arrive; a slower one gets 408. Default: 30 s.
    ///
    /// # Panics
    ///
    /// If it is zero.
    #[must_use]
    #[track_caller]
    pub fn with_request_body_timeout(self, limit: Duration) -> Self {
        assert!(!limit.is_zero(), "a time-out of zero for request bodies: none could arrive");
        self.set(|settings| settings.request_limits.timeout = limit)
    }

    /// Limits what is kept of a response's body, in bytes. A larger one reaches the first caller, and retries get 409
    /// `response-not-kept`. Default: 1 MiB.
    #[must_use]
    pub fn with_response_body_limit(self, bytes: usize) -> Self {
        self.set(|settings| settings.response_body_limit = bytes)
    }

    /// Sets for how long the body of a response is collected before it counts as endless and is not kept.
    /// Default: 10 s.
    #[must_use]
    pub fn with_response_body_timeout(self, limit: Duration) -> Self {
        self.set(|settings| settings.response_body_timeout = limit)
    }

    /// Leaves a header out of stored responses, so that replays lack it. Default: none is left out.
    #[must_use]
    pub fn add_header_not_kept(self, name: HeaderName) -> Self {
        self.set(|settings| settings.headers_not_kept.push(name))
    }

    /// Sets for how long a request waits for the store to claim its key, at most three quarters of the lease, and for its
    /// response to be [rendered](Self::with_representation). Default: 5 s.
    ///
    /// # Panics
    ///
    /// If it is zero.
    #[must_use]
    #[track_caller]
    pub fn with_store_timeout(self, limit: Duration) -> Self {
        assert!(!limit.is_zero(), "a store time-out of zero: no key could be claimed");
        self.set(|settings| settings.store_timeout = limit)
    }

    /// Sets what happens while the store is unavailable. Default: [`StoreOutage::Refuse`].
    #[must_use]
    pub fn with_store_outage(self, behaviour: StoreOutage) -> Self {
        self.set(|settings| settings.on_store_outage = behaviour)
    }

    /// Sets whether keys may stand in logs. Default: [`KeyLogging::Plain`].
    #[must_use]
    pub fn with_key_logging(self, logging: KeyLogging) -> Self {
        self.set(|settings| settings.key_logging = logging)
    }

    /// Sets how expired records are purged. Default: [`Reaper::default`], every minute. One task serves a layer and its
    /// clones, with the settings of whichever gets a request first.
    #[must_use]
    pub fn with_reaper(self, reaper: Reaper) -> Self {
        self.set(|settings| settings.reaper = reaper)
    }

    /// Sets how the transactions of handlers (`Tx`) are begun and ended. Default:
    /// [`TransactionOptions::default`].
    #[must_use]
    pub fn with_transactions(self, options: TransactionOptions) -> Self {
        self.set(|settings| settings.transactions = options)
    }

    /// Keeps requests before their handlers run, so that a [`Completer`](crate::Completer) can send them again when their
    /// process has died and their client does not come back. Off by default.
    ///
    /// Each request with a key then costs another write. One that cannot be kept is not run: 503 `store-unavailable`, and its
    /// key is given back. Needs a store that keeps requests, SQLite or PostgreSQL: with another one every request with a key
    /// is refused, 500 `store-misconfigured`.
    ///
    /// A process that dies before the request is kept has not begun its handler: nothing was done, and only the client's
    /// retry performs it.
    ///
    /// # Panics
    ///
    /// If a header that identifies who sends a request would be kept: see [`KeptRequests`].
    #[must_use]
    #[track_caller]
    pub fn with_kept_requests(self, kept: KeptRequests) -> Self {
        self.set(|settings| settings.kept_requests = Some(kept)).checked()
    }

    fn set(mut self, change: impl FnOnce(&mut Settings)) -> Self {
        change(Arc::make_mut(&mut self.settings));
        self
    }

    #[track_caller]
    fn checked(self) -> Self {
        self.settings.timing.check();
        self.settings.request_limits.check();
        self.settings.check_kept_requests();
        self
    }
}

impl<S> Layer<S> for IdempotencyLayer {
    type Service = IdempotencyService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        IdempotencyService::new(inner, Arc::clone(&self.node), Arc::clone(&self.settings))
    }
}
