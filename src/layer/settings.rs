//! Settings of a layer, as the service reads them.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderName, Method, Response};
use tokio::sync::Semaphore;

use crate::{
    attempt::settings::AttemptSettings,
    consumer::ConsumerExtractor,
    fingerprint::Fingerprinter,
    key::{KEY_HEADER, KeySyntax},
    layer::{buffer::RequestLimits, kept_requests::KeptRequests, representation::RenderRepresentation},
    node::reaper::Reaper,
    policy::{AbandonedAttempts, ResultPolicy},
    redact::TRACING_TARGET,
    rejection::{ProblemJson, Rejection, RenderRejection, respond},
};

/// The behaviour towards requests with a key while the store cannot be reached or does not answer
/// in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StoreOutage {
    /// Refuses with 503 `store-unavailable`; the handler does not run. The default.
    Refuse,
    /// Runs the handler **without protection**: retries may be performed twice. Requests are then
    /// only as safe as they were without this layer. A missing table or right is still refused.
    ///
    /// Such a request has no [`Idempotency`](crate::Idempotency): take `Option<Idempotency>` in the
    /// handler. A handler that takes `Tx` answers 503 `store-unavailable`, because without the
    /// store there is no transaction. `with_max_in_flight` counts such requests too.
    RunUnprotected,
}

/// The way in which an attempt has its key for itself. See
/// [transactions](crate::guide::transactions#two-strategies) for all differences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Strategy {
    /// A claim that is committed before the handler runs. The default.
    #[default]
    Claimed,
    /// One transaction, which begins before the handler runs: no claim, no lease. It locks the key,
    /// holds the handler's writes through `Tx`, and adds the completed record with its commit. One
    /// commit instead of two; after a crash, a retry runs immediately.
    ///
    /// A connection of the application's pool is held for as long as the handler runs, also if it
    /// does not ask for `Tx`. There are no intents, phases, kept requests and attempt counts. On
    /// SQLite, no other writer proceeds while a handler runs.
    SingleTransaction,
}

#[derive(Clone)]
pub(crate) struct Settings {
    pub(crate) enabled: bool,
    pub(crate) methods: Vec<Method>,
    pub(crate) key_header: HeaderName,
    pub(crate) key_syntax: KeySyntax,
    pub(crate) required: bool,
    pub(crate) derived_key: Option<Duration>,
    pub(crate) consumer: ConsumerExtractor,
    pub(crate) fingerprinter: Fingerprinter,
    pub(crate) request_limits: RequestLimits,
    pub(crate) response_body_limit: usize,
    pub(crate) response_body_timeout: Duration,
    pub(crate) headers_not_kept: Vec<HeaderName>,
    pub(crate) representation_renderer: Option<Arc<dyn RenderRepresentation>>,
    pub(crate) policy: ResultPolicy,
    pub(crate) replay_marker: HeaderName,
    pub(crate) renderer: Arc<dyn RenderRejection>,
    pub(crate) in_flight: Arc<Semaphore>,
    pub(crate) on_store_outage: StoreOutage,
    pub(crate) reaper: Reaper,
    pub(crate) kept_requests: Option<KeptRequests>,
    pub(crate) strategy: Strategy,
    pub(crate) attempts: Arc<AttemptSettings>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            enabled: true,
            methods: vec![Method::POST, Method::PATCH],
            key_header: KEY_HEADER,
            key_syntax: KeySyntax::default(),
            required: false,
            derived_key: None,
            consumer: ConsumerExtractor::default(),
            fingerprinter: Fingerprinter::default(),
            request_limits: RequestLimits::default(),
            response_body_limit: 1024 * 1024,
            response_body_timeout: Duration::from_secs(10),
            headers_not_kept: Vec::new(),
            representation_renderer: None,
            policy: ResultPolicy::default(),
            replay_marker: HeaderName::from_static("idempotent-replayed"),
            renderer: Arc::new(ProblemJson::default()),
            in_flight: Arc::new(Semaphore::new(MAX_IN_FLIGHT)),
            on_store_outage: StoreOutage::Refuse,
            reaper: Reaper::default(),
            kept_requests: None,
            strategy: Strategy::default(),
            attempts: Arc::default(),
        }
    }
}

impl Settings {
    /// Panics if settings contradict each other.
    #[track_caller]
    pub(crate) fn check(&self) {
        self.attempts.timing.check();
        self.request_limits.check();
        self.check_kept_requests();
        self.check_strategy();
    }

    #[track_caller]
    fn check_strategy(&self) {
        if self.strategy == Strategy::Claimed {
            return;
        }
        assert!(
            self.kept_requests.is_none(),
            "Strategy::SingleTransaction keeps no requests, because nothing is stored before its commit: \
             remove with_kept_requests, or use Strategy::Claimed"
        );
        assert!(
            self.attempts.abandoned == AbandonedAttempts::RunAgain,
            "Strategy::SingleTransaction cannot hold the keys of abandoned attempts, which leave no trace: \
             remove the policy at_most_once or AbandonedAttempts::Hold, or use Strategy::Claimed"
        );
    }

    pub(crate) fn refuse(&self, rejection: Rejection) -> Response<Bytes> {
        let code = rejection.code();
        tracing::debug!(target: TRACING_TARGET, %code, "refused");
        catch_unwind(AssertUnwindSafe(|| respond(rejection, &*self.renderer))).unwrap_or_else(|_| {
            tracing::error!(
                target: TRACING_TARGET, %code,
                "the renderer of refusals panicked; the client gets 500 internal instead"
            );
            respond(Rejection::failed(), &ProblemJson::default())
        })
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("methods", &self.methods)
            .field("key_header", &self.key_header)
            .field("policy", &self.policy)
            .field("attempts", &self.attempts)
            .finish_non_exhaustive()
    }
}

const MAX_IN_FLIGHT: usize = 1024;
