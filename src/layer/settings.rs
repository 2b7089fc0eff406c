//! The settings of a layer, as the service reads them.

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Method, Response};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use crate::{
    consumer::ConsumerExtractor,
    fingerprint::Fingerprinter,
    key::{IdempotencyKey, KeySyntax},
    layer::{
        buffer::RequestLimits, kept_requests::KeptRequests, representation::RenderRepresentation,
        resent::Resent,
    },
    node::reaper::Reaper,
    policy::ResultPolicy,
    redact::{KeyLogging, TRACING_TARGET},
    rejection::{ProblemJson, Rejection, RejectionCode, RenderRejection, respond},
    store::transaction::TransactionOptions,
    stored::record::Attempt,
};

/// What happens to a request with a key while the store cannot be reached or does not answer in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StoreOutage {
    /// 503 `store-unavailable`; the handler does not run. The default.
    Refuse,
    /// The handler runs **without protection**: retries may be performed twice. Requests are then only as safe as they
    /// were without this layer. A missing table or right is refused all the same.
    ///
    /// There is no [`Idempotency`](crate::Idempotency) in such a request: take `Option<Idempotency>` in the handler. One
    /// that takes `Tx` answers 503 `store-unavailable`: without the store there is no transaction.
    /// `with_max_in_flight` does not count it.
    RunUnprotected,
}

/// Where the key of a request comes from.
pub(crate) enum KeySource {
    /// The client sent it.
    Sent(IdempotencyKey),
    /// It is derived from the request and counts for this long.
    Derived(Duration),
    /// A completer sends the request again.
    Resent(Resent),
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
    pub(crate) timing: Timing,
    pub(crate) in_flight: Option<Arc<Semaphore>>,
    pub(crate) store_timeout: Duration,
    pub(crate) on_store_outage: StoreOutage,
    pub(crate) key_logging: KeyLogging,
    pub(crate) reaper: Reaper,
    pub(crate) transactions: TransactionOptions,
    pub(crate) kept_requests: Option<KeptRequests>,
}

#[derive(Clone, Debug)]
pub(crate) struct Timing {
    pub(crate) lease: Duration,
    pub(crate) renewal: Option<Duration>,
    pub(crate) max_execution: Duration,
    pub(crate) retention: Duration,
}

impl Timing {
    pub(crate) fn renewal_interval(&self) -> Duration {
        self.renewal.unwrap_or(self.lease / 3)
    }

    /// Refuses what cannot work.
    #[track_caller]
    pub(crate) fn check(&self) {
        let Self { lease, max_execution, retention, .. } = self;
        let interval = self.renewal_interval();
        assert!(*lease >= MIN_LEASE, "a lease of {lease:?} is too short: use at least {MIN_LEASE:?}");
        assert!(
            !interval.is_zero() && interval.saturating_mul(2) <= *lease,
            "a lease of {lease:?} cannot be kept by renewing every {interval:?}: renew at least twice in a lease"
        );
        assert!(!max_execution.is_zero(), "max_execution is zero: no handler could run");
        assert!(
            *retention >= max_execution.saturating_add(*lease),
            "a retention of {retention:?} is shorter than max_execution and lease together ({max_execution:?} + \
             {lease:?}), so that a record could expire while its request runs: raise the retention first, or \
             lower max_execution or lease first"
        );
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            enabled: true,
            methods: vec![Method::POST, Method::PATCH],
            key_header: HeaderName::from_static("idempotency-key"),
            key_syntax: KeySyntax::default(),
            required: false,
            derived_key: None,
            consumer: ConsumerExtractor::default(),
            fingerprinter: Fingerprinter::default(),
            request_limits: RequestLimits {
                body: 1024 * 1024,
                total_limit: BUFFER_LIMIT,
                total: Arc::new(Semaphore::new(BUFFER_LIMIT)),
                timeout: Duration::from_secs(30),
            },
            response_body_limit: 1024 * 1024,
            response_body_timeout: Duration::from_secs(10),
            headers_not_kept: Vec::new(),
            representation_renderer: None,
            policy: ResultPolicy::default(),
            replay_marker: HeaderName::from_static("idempotent-replayed"),
            renderer: Arc::new(ProblemJson),
            timing: Timing {
                lease: Duration::from_secs(30),
                renewal: None,
                max_execution: Duration::from_secs(10 * 60),
                retention: Duration::from_secs(24 * 60 * 60),
            },
            in_flight: None,
            store_timeout: Duration::from_secs(5),
            on_store_outage: StoreOutage::Refuse,
            key_logging: KeyLogging::Plain,
            reaper: Reaper::default(),
            transactions: TransactionOptions::default(),
            kept_requests: None,
        }
    }
}

impl Settings {
    /// The key of a request that is to be guarded; `None` if it passes through.
    pub(crate) fn key_of(
        &self,
        method: &Method,
        headers: &HeaderMap,
    ) -> Result<Option<KeySource>, Rejection> {
        if !self.enabled || !self.methods.contains(method) {
            return Ok(None);
        }
        match self.key_syntax.read(headers, &self.key_header) {
            Ok(Some(key)) => Ok(Some(KeySource::Sent(key))),
            Ok(None) => self.key_of_none(),
            Err(error) => {
                Err(Rejection::new(RejectionCode::KeyInvalid, format!("In {}: {error}.", self.key_header)))
            }
        }
    }

    fn key_of_none(&self) -> Result<Option<KeySource>, Rejection> {
        match self.derived_key {
            Some(window) => Ok(Some(KeySource::Derived(window))),
            None if self.required => Err(Rejection::new(
                RejectionCode::KeyMissing,
                format!(
                    "This operation needs the header {} with a key that is new for each operation.",
                    self.key_header
                ),
            )),
            None => Ok(None),
        }
    }

    /// Takes one of the places for running attempts, if there is a limit.
    pub(crate) fn admit(&self) -> Result<Option<OwnedSemaphorePermit>, Rejection> {
        let permit = self.in_flight.as_ref().map(|places| Arc::clone(places).try_acquire_owned());
        permit.transpose().map_err(|_| {
            Rejection::new(RejectionCode::Overloaded, "Too many requests are running; nothing was done.")
        })
    }

    pub(crate) fn refuse(&self, rejection: Rejection) -> Response<Bytes> {
        tracing::debug!(target: TRACING_TARGET, code = %rejection.code(), "refused");
        respond(rejection, &*self.renderer)
    }

    /// Logs what went wrong with an attempt.
    pub(crate) fn log_failure(
        &self,
        attempt: &Attempt,
        error: &(dyn std::error::Error + 'static),
        what: &str,
    ) {
        tracing::error!(
            target: TRACING_TARGET, consumer = %attempt.consumer, key = %self.shown(&attempt.key),
            attempt = %attempt.id, error, "{what}"
        );
    }

    /// How long an attempt waits for the store before it does something.
    pub(crate) fn store_wait(&self) -> Duration {
        self.store_timeout.min(self.timing.lease * 3 / 4)
    }

    /// How long an attempt waits for the store after it has done something.
    pub(crate) fn settle_wait(&self) -> Duration {
        MAX_WAIT.min(self.timing.lease * 3 / 4)
    }

    /// Until when it is tried to write the end of an attempt down. Also a short execution is worth some tries.
    pub(crate) fn give_up(&self) -> Instant {
        Instant::now() + self.timing.max_execution.max(MIN_TRIES)
    }

    /// A key as it may stand in logs.
    pub(crate) fn shown<'a>(&self, key: &'a IdempotencyKey) -> &'a str {
        self.key_logging.shown(key)
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("methods", &self.methods)
            .field("key_header", &self.key_header)
            .field("policy", &self.policy)
            .field("timing", &self.timing)
            .finish_non_exhaustive()
    }
}

/// For how long a client waits for what was done to be stored while the store does not answer.
const MAX_WAIT: Duration = Duration::from_secs(10);
/// For how long it is tried at least to write the end of an attempt down.
const MIN_TRIES: Duration = Duration::from_secs(10);
const BUFFER_LIMIT: usize = 64 * 1024 * 1024;
const MIN_LEASE: Duration = Duration::from_millis(100);
